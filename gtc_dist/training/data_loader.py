"""Mini-batches, from a rank's interactions to a `Batch`.

    interactions of this rank (once per run, from Ray Data; put into one order that does not depend on who read what)
      -> an epoch's permutation, seeded by (seed, epoch, rank), cut into steps of nearly equal size
      -> draws: negatives, timesteps, noise, seeded by (seed, epoch, step, rank)
      -> a plan: whole graph (`FullPlanner`) or sampled blocks (`SampledPlanner`), feature rows looked up
      -> a bounded queue, filled by one thread while the previous step computes

All ranks take the same number of steps; every interaction comes once in a pass over them; a batch may be empty. An
epoch is one pass, or, for interactions that a pass of which takes hours, a number of steps (`epoch_steps`).
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import gammaln

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.batch import Batch


@dataclass
class SampledBatch:
    """A step's pairs and its randomness; catalog indexes."""

    users: np.ndarray  # int64 [B]
    positives: np.ndarray  # int64 [B]
    negatives: np.ndarray  # int64 [B, K], or [P] shared
    timesteps: np.ndarray  # int64 [B], 1..T
    noise: np.ndarray  # float32 [modalities, B, D]
    dropout: np.ndarray  # float32 [2, B], uniform in [0, 1)
    seed: int  # alike on every rank: permutations of the total correlation
    sampler_seed: int  # this rank's: neighbour sampling
    counts: list[int]  # pairs of each rank


@dataclass(frozen=True)
class LoaderOptions:
    batch_size: int  # over all ranks
    seed: int
    negatives: str  # uniform, shared or in_batch
    negative_count: int
    correlation_rows: int  # over all ranks; 0: one for each pair
    diffusion_steps: int
    modalities: int
    width: int
    prefetch: int
    epoch_steps: int | None = None  # None: as many as a pass takes
    negatives_correct: bool = True  # in_batch: weighed by 1 / the chance to be in the batch
    negative_popularity: float = 0.0  # uniform: drawn by (interactions of an item)^this
    user_discount: float = 0.0  # a pair of a user with n interactions counts n^-user_discount, times a constant


class DataLoader:
    """Batches of one rank.

    Args:
        users, items: int32 [n] interactions of this rank, in any order.
        graphs: the train graph keeps negatives clear of train positives.
        planner: turns draws into a batch.
        world: a world whose process group is the prefetch thread's own.
    """

    def __init__(self, users, items, graphs: Graphs, planner, options: LoaderOptions, comm: Communicator):
        self.graphs, self.planner, self.options, self.comm = graphs, planner, options, comm
        self.users, self.items = repartition_by_hash(users, items, graphs.items, comm)
        self.rank_rows = comm.all_gather_int(len(self.users))
        self.item_counts = np.bincount(self.items, minlength=graphs.items)
        self.pass_steps = max(1, -(-sum(self.rank_rows) // options.batch_size))
        self.steps = options.epoch_steps or self.pass_steps  # of an epoch
        self.negative_share = cumulative_share(graphs.item_degree, options.negative_popularity)
        degree = graphs.user_degree
        self.user_weights = discounted(degree, options.user_discount)
        if len(degree) and degree.max() >= graphs.items:
            raise InputError(
                f"the user with index {int(degree.argmax())} interacted with all {graphs.items} items in train: "
                "there is no negative to rank them against"
            )

    def counts(self, step: int) -> list[int]:
        """Pairs of each rank in a step of a pass: its rows cut into parts whose sizes differ by one at most."""
        return [rows // self.pass_steps + (step < rows % self.pass_steps) for rows in self.rank_rows]

    def correlation_counts(self, counts: list[int]) -> list[int]:
        """Of a step's pairs of each rank, those whose items enter the total correlation."""
        rows = self.options.correlation_rows
        return [min(n, -(-rows // self.comm.size)) if rows else n for n in counts]

    def epoch(self, epoch: int, done: int = 0) -> Iterator[Batch]:
        """The batches of an epoch after the first `done`; one thread prepares them ahead, whose errors are raised."""
        return _prefetch(self._batches(epoch, done), self.options.prefetch)

    def draw(self, turn: int, step: int, rows: np.ndarray) -> SampledBatch:
        """The randomness of a step of a pass (`turn`, from 1) for the interactions `rows` of this rank."""
        o = self.options
        rng = np.random.default_rng([o.seed, turn, step, self.comm.rank])
        users, positives = self.users[rows].astype(np.int64), self.items[rows].astype(np.int64)
        if o.negatives == "uniform":
            negatives = self.graphs.draw_negatives(np.repeat(users, o.negative_count), rng, self.negative_share)
            negatives = negatives.reshape(-1, o.negative_count)
        elif o.negatives == "shared":
            negatives = rng.integers(0, self.graphs.items, o.negative_count)
        else:
            negatives = np.unique(positives)
        return SampledBatch(
            users,
            positives,
            negatives,
            rng.integers(1, o.diffusion_steps + 1, len(rows)),
            rng.standard_normal((o.modalities, len(rows), o.width), dtype=np.float32),
            rng.random((2, len(rows)), dtype=np.float32),
            int(np.random.default_rng([o.seed, turn, step]).integers(1 << 31)),
            int(rng.integers(1 << 31)),
            self.counts(step),
        )

    def _batches(self, epoch: int, done: int) -> Iterator[Batch]:
        ordered, order = 0, np.empty(0, np.int64)
        for n in range((epoch - 1) * self.steps + done, epoch * self.steps):
            turn, step = 1 + n // self.pass_steps, n % self.pass_steps
            if turn != ordered:
                ordered, order = turn, self._order(turn)
            yield self.assemble(self.draw(turn, step, order[self._rows(step)]))

    def _order(self, turn: int) -> np.ndarray:
        """The permutation of a pass over this rank's interactions."""
        return np.random.default_rng([self.options.seed, turn, self.comm.rank, 1]).permutation(len(self.users))

    def _rows(self, step: int) -> slice:
        """Where a step's pairs stand in the permutation."""
        size, larger = divmod(len(self.users), self.pass_steps)
        start = step * size + min(step, larger)
        return slice(start, start + size + (step < larger))

    def assemble(self, draws: SampledBatch, pairs: np.ndarray | None = None) -> Batch:
        """The batch of some draws. A collective where the planner looks rows up.

        Args:
            pairs: of all ranks, int64 [n, 2]; None: asked from them.
        """
        pairs = self._global_pairs(draws) if pairs is None else pairs
        users, user_at = np.unique(draws.users, return_inverse=True)
        together = np.concatenate([draws.positives, draws.negatives.reshape(-1)])
        items, item_at = np.unique(together, return_inverse=True)
        positives, negatives = item_at[: len(draws.positives)], item_at[len(draws.positives) :]
        mask = None
        if draws.negatives.ndim == 1:
            mask = torch.from_numpy(~self.graphs.crossed(users, draws.negatives)[user_at])
        return Batch(
            **self.planner.plan(users, items, pairs, draws.sampler_seed),
            users=torch.from_numpy(user_at),
            positives=torch.from_numpy(positives),
            negatives=torch.from_numpy(negatives.reshape(draws.negatives.shape)),
            negative_mask=mask,
            negative_weight=self._negative_weight(draws),
            pair_weights=torch.from_numpy(self.user_weights[draws.users]),
            user_ids=torch.from_numpy(users),
            item_ids=torch.from_numpy(items),
            timesteps=torch.from_numpy(draws.timesteps),
            noise=torch.from_numpy(draws.noise),
            dropout=torch.from_numpy(draws.dropout),
            pairs=pairs,
            permutation_seed=draws.seed,
            sampler_seed=draws.sampler_seed,
            counts=draws.counts,
            correlation_counts=self.correlation_counts(draws.counts),
        )

    def _negative_weight(self, draws: SampledBatch) -> torch.Tensor | None:
        """1 / the chance that a negative of the batch is in it."""
        if self.options.negatives != "in_batch" or not self.options.negatives_correct:
            return None
        chance = inclusion_chance(self.item_counts[draws.negatives], len(self.users), len(draws.users))
        return torch.from_numpy((1 / chance).astype(np.float32))

    def _global_pairs(self, draws: SampledBatch) -> np.ndarray:
        """Interactions of all ranks in this step, int64 [n, 2]: a step's result must not depend on how many ranks
        share its batch, so each leaves out the edges of all."""
        mine = torch.from_numpy(np.stack([draws.users, draws.positives], axis=1))
        return self.comm.all_gather(mine.to(self.comm.device), draws.counts).cpu().numpy()


def repartition_by_hash(
    users: np.ndarray, items: np.ndarray, items_total: int, comm: Communicator
) -> tuple[np.ndarray, np.ndarray]:
    """Give every interaction to the rank that a hash of it names, each rank's sorted: int32 [n], int32 [n].

    Ray Data hands out blocks by demand, so which rank reads what differs from run to run; after this it does not.
    A collective.
    """
    key = np.sort(users.astype(np.int64) * items_total + items)
    if comm.size > 1:
        mixed = (key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)
        owner = (mixed % np.uint64(comm.size)).astype(np.int64)
        order = np.argsort(owner, kind="stable")
        receive = np.bincount(owner, minlength=comm.size).tolist()
        one_each = [1] * comm.size
        send = torch.tensor(receive, dtype=torch.int64, device=comm.device)
        incoming = comm.all_to_all(send, one_each, one_each).tolist()
        rows = torch.from_numpy(key[order]).to(comm.device)
        key = np.sort(comm.all_to_all(rows, receive, incoming).cpu().numpy())
    return (key // items_total).astype(np.int32), (key % items_total).astype(np.int32)


def cumulative_share(degree: np.ndarray, power: float) -> np.ndarray | None:
    """Share of the items up to each, by degree^power, float64 [items], increasing to 1; None for power 0."""
    if not power:
        return None
    share = np.cumsum(degree.astype(np.float64) ** power)
    return share / share[-1]


def inclusion_chance(count: np.ndarray, total: int, drawn: int) -> np.ndarray:
    """Chance that one of `count` rows is among `drawn` of `total`, drawn without replacement; float64, count >= 1."""
    none = gammaln(total - count + 1) + gammaln(total - drawn + 1)
    none = none - gammaln(np.maximum(total - count - drawn, 0) + 1) - gammaln(total + 1)
    return np.where(count > total - drawn, 1.0, -np.expm1(none))


def discounted(degree: np.ndarray, power: float) -> np.ndarray:
    """Weight of each user's interactions, float32 [users]: degree^-power, scaled to a mean of one over interactions."""
    weight = np.maximum(degree, 1.0) ** -power
    total = degree.sum()
    return (weight * (total / (weight @ degree) if total else 1.0)).astype(np.float32)


LEAVE_SECONDS = 10  # for the batch in work when the main thread leaves early


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


_END = object()


def _prefetch(source: Iterator, depth: int) -> Iterator:
    """Run `source` in a thread, at most `depth` ahead. Leaving early ends the thread: after the batch in work, or,
    where that waits for a rank that is gone, with the process."""
    results: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(value) -> bool:
        while not stopped.is_set():
            try:
                results.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce():
        try:
            for value in source:
                if not put(value):
                    return
            put(_END)
        except BaseException as error:
            put(_Failure(error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (value := results.get()) is not _END:
            if isinstance(value, _Failure):
                raise value.error
            yield value
    finally:
        stopped.set()
        thread.join(LEAVE_SECONDS)
