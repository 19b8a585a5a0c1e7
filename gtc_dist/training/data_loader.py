"""Mini-batches: from a rank's interactions to a `Batch`.

    interactions of this rank (once per run, from Ray Data), re-partitioned by a hash so that they do not depend on
    which rank read them
      -> a permutation for each pass over them, seeded by (seed, pass, rank), cut into steps of nearly equal size
      -> `DrawnPairs`: negatives, timesteps and noise, seeded by (seed, pass, step, rank)
      -> `Subgraph`: the whole graph or sampled blocks (subgraph.py), with feature rows looked up
      -> a bounded queue, filled by one thread while the previous step computes

All ranks take the same number of steps; a pass holds every interaction once; a batch may be empty. An epoch is one
pass, or, where a pass takes hours, `train.epoch_steps` steps.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from scipy.special import gammaln

from gtc_dist.config import Config
from gtc_dist.data.hashing import hash_bucket
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.device_transfer import AsyncTransfer
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.graph.device_sampler import DeviceSampler
from gtc_dist.model.batch import Batch, DrawnPairs, MaskedUsers
from gtc_dist.model.gtc import GTC
from gtc_dist.model.total_correlation import draw_permutations
from gtc_dist.model.user_masks import UserMasks
from gtc_dist.subgraph.sampled_graph import SampledGraphBuilder, sampling_device
from gtc_dist.subgraph.whole_graph import FullGraphBuilder

PREFETCH = 2  # batches prepared ahead
LEAVE_SECONDS = 10  # wait for the batch in work when the main thread stops early


def build_loader(
    config: Config,
    network: GTC,
    users,
    items,
    graphs: Graphs,
    features: dict[str, ShardedTable],
    content: ShardedTable | None,
    comm: Communicator,
) -> "DataLoader":
    """The loader of one rank; `comm` and the tables belong to the prefetch thread.

    Args:
        users, items: int32 [n] interactions of this rank, in any order.
        content: of the masked diffusion.
    """
    masks, device = None, network.comm.device
    if config.model.propagation == "full":
        subgraphs = FullGraphBuilder(config, network, graphs, features)
    elif (where := sampling_device(config, graphs, device)).type == "cpu":
        from gtc_dist.graph.neighbor_sampler import NeighborSampler  # DGL is slow to import, and needed here alone

        subgraphs = SampledGraphBuilder(config, network, graphs, features, NeighborSampler)
    else:
        subgraphs = SampledGraphBuilder(config, network, graphs, features, DeviceSampler, where)
    if network.masked is not None:
        masks = UserMasks(graphs, content, config.train.seed, network.masked.members, device)
    return DataLoader(config, users, items, graphs, subgraphs, comm, masks, network.tc_shape, device)


class DataLoader:
    """Batches of one rank. Iteration is a collective where the subgraph looks rows up.

    Args:
        users, items: int32 [n] interactions of this rank, in any order.
        graphs: train graph; negatives are never train positives of their user.
        subgraph_builder: FullGraphBuilder or SampledGraphBuilder (subgraph.py).
        comm: a communicator with a process group of the prefetch thread's own.
        masks: of the masked diffusion; None without it.
        tc_shape: `GTC.tc_shape`.
        device: of the network, to which `epoch` brings the batches; None: that of `comm`.
    """

    def __init__(
        self,
        config: Config,
        users,
        items,
        graphs: Graphs,
        subgraph_builder,
        comm: Communicator,
        masks: UserMasks | None = None,
        tc_shape: tuple[int, int] = (0, 0),
        device: torch.device | None = None,
    ):
        self.tc_shape, self.transfer = tc_shape, AsyncTransfer(device or comm.device)
        self.graphs, self.subgraph_builder, self.comm, self.masks = graphs, subgraph_builder, comm, masks
        train, model = config.train, config.model
        self.seed, self.negatives, self.tc_rows = train.seed, train.negatives, train.tc_rows
        self.diffusion_steps = model.diffusion.steps
        # The content filter alone reads the noise. Sampled mode draws it in any case, since its sampler's seed comes
        # later in the random stream.
        self.noise_width = model.width if train.w_diff > 0 or model.propagation == "sampled" else 0
        self.n_modalities = len(subgraph_builder.features)
        # every ensemble member has its own negatives of a pair
        self.negative_count = train.negatives.count * (model.members if train.negatives.mode == "uniform" else 1)
        self.users, self.items = repartition_by_hash(users, items, graphs.items, comm)
        self.interactions_per_rank = comm.all_gather_int(len(self.users))
        self.item_counts = np.bincount(self.items, minlength=graphs.items)
        self.pass_steps = max(1, -(-sum(self.interactions_per_rank) // train.batch_size))
        self.steps = train.epoch_steps or self.pass_steps  # of an epoch

    def pairs_per_rank(self, step: int) -> list[int]:
        """Local. Pairs of each rank in a step of a pass: its interactions cut into parts whose sizes differ by at most
        one."""
        return [rows // self.pass_steps + (step < rows % self.pass_steps) for rows in self.interactions_per_rank]

    def tc_counts(self, counts: list[int]) -> list[int]:
        """Local. Pairs of each rank that enter the total correlation."""
        return [min(n, -(-self.tc_rows // self.comm.size)) if self.tc_rows else n for n in counts]

    def epoch(self, epoch: int, done: int = 0) -> Iterator[Batch]:
        """Batches of an epoch after the first `done`, on the device, prepared ahead by one thread, whose errors are
        raised here."""
        with closing(_prefetch(map(self.transfer.start, self._batches(epoch, done)), PREFETCH)) as transfers:
            yield from map(self.transfer.finish, transfers)

    def draw(self, pass_number: int, step: int, rows: np.ndarray) -> DrawnPairs:
        """Local. Negatives and randomness of a step, for the interactions at positions `rows` of this rank.

        Args:
            pass_number: from 1; step: of the pass, from 0.
        """
        rng = np.random.default_rng([self.seed, pass_number, step, self.comm.rank])
        users, positives = self.users[rows].astype(np.int64), self.items[rows].astype(np.int64)
        if self.negatives.mode == "uniform":
            negatives = self.graphs.draw_negatives(np.repeat(users, self.negative_count), rng)
            negatives = negatives.reshape(-1, self.negative_count)
        elif self.negatives.mode == "shared":
            negatives = rng.integers(0, self.graphs.items, self.negative_count)
        else:
            negatives = np.unique(positives)
        masked = np.empty(0, np.int64), [0] * self.comm.size, 0
        if self.masks is not None:
            masked = self.masks.draw(pass_number, step, self.pass_steps)
        return DrawnPairs(
            users,
            positives,
            negatives,
            rng.integers(1, self.diffusion_steps + 1, len(rows)),
            rng.standard_normal((self.n_modalities, len(rows), self.noise_width), dtype=np.float32),
            rng.random((2, len(rows)), dtype=np.float32),
            int(np.random.default_rng([self.seed, pass_number, step]).integers(1 << 31)),
            int(rng.integers(1 << 31)),
            self.pairs_per_rank(step),
            *masked,
        )

    def _batches(self, epoch: int, done: int) -> Iterator[Batch]:
        ordered, order = 0, np.empty(0, np.int64)
        for n in range((epoch - 1) * self.steps + done, epoch * self.steps):
            pass_number, step = 1 + n // self.pass_steps, n % self.pass_steps
            if pass_number != ordered:
                ordered, order = pass_number, self._order(pass_number)
            with self.transfer.beside():
                batch = self.assemble(self.draw(pass_number, step, order[self._rows(step)]))
            yield batch

    def _order(self, pass_number: int) -> np.ndarray:
        """Permutation of a pass over this rank's interactions."""
        return np.random.default_rng([self.seed, pass_number, self.comm.rank, 1]).permutation(len(self.users))

    def _rows(self, step: int) -> slice:
        """Place of a step's pairs in the permutation."""
        size, larger = divmod(len(self.users), self.pass_steps)
        start = step * size + min(step, larger)
        return slice(start, start + size + (step < larger))

    def assemble(self, drawn: DrawnPairs, all_pairs: np.ndarray | None = None) -> Batch:
        """The batch of drawn pairs.

        Args:
            all_pairs: pairs of all ranks, int64 [n, 2]; None: gathered from them.
        """
        all_pairs = self._gather_pairs(drawn) if all_pairs is None else all_pairs
        users, user_at = np.unique(drawn.users, return_inverse=True)
        together = np.concatenate([drawn.positives, drawn.negatives.reshape(-1)])
        items, item_at = np.unique(together, return_inverse=True)
        positives, negatives = item_at[: len(drawn.positives)], item_at[len(drawn.positives) :]
        mask = None
        if drawn.negatives.ndim == 1:
            mask = torch.from_numpy(~self.graphs.is_interacted(users, drawn.negatives)[user_at])
        recency = self.graphs.relative_weights(drawn.users, drawn.positives)
        return Batch(
            subgraph=self.subgraph_builder.build(users, items, all_pairs, drawn.sampler_seed),
            users=torch.from_numpy(user_at),
            positives=torch.from_numpy(positives),
            negatives=torch.from_numpy(negatives.reshape(drawn.negatives.shape)),
            negative_mask=mask,
            negative_weight=self._negative_weight(drawn),
            user_share=_counts(user_at, len(users)),
            item_share=_counts(positives, len(items))
            + _counts(negatives, len(items)) * (len(drawn.users) / max(drawn.negatives.size, 1)),
            user_ids=torch.from_numpy(users),
            item_ids=torch.from_numpy(items),
            timesteps=torch.from_numpy(drawn.timesteps),
            noise=torch.from_numpy(drawn.noise),
            dropout=torch.from_numpy(drawn.dropout),
            permutations=self._permutations(drawn),
            counts=drawn.counts,
            tc_counts=self.tc_counts(drawn.counts),
            drawn=drawn,
            all_pairs=all_pairs,
            masked=None if self.masks is None else self._masked_users(drawn),
            recency_weight=None if recency is None else torch.from_numpy(recency),
        )

    def _permutations(self, drawn: DrawnPairs) -> torch.Tensor | None:
        groups, views = self.tc_shape
        if not groups:
            return None
        return draw_permutations(groups, views, sum(self.tc_counts(drawn.counts)), drawn.permutation_seed)

    def _masked_users(self, drawn: DrawnPairs) -> MaskedUsers:
        return self.masks.build(drawn.masked_users, drawn.masked_counts, drawn.mask_seed)

    def _negative_weight(self, drawn: DrawnPairs) -> torch.Tensor | None:
        """Importance weight of an in-batch negative: 1 / P(item in batch), so that popular items are not negatives more
        often than others."""
        if self.negatives.mode != "in_batch":
            return None
        chance = inclusion_chance(self.item_counts[drawn.negatives], len(self.users), len(drawn.users))
        return torch.from_numpy((1 / chance).astype(np.float32))

    def _gather_pairs(self, drawn: DrawnPairs) -> np.ndarray:
        """Interactions of all ranks in this step, int64 [n, 2]. Every rank excludes the edges of all of them, so that a
        step does not depend on how many ranks share its batch."""
        own = torch.from_numpy(np.stack([drawn.users, drawn.positives], axis=1))
        return self.comm.all_gather(own.to(self.comm.device), drawn.counts).cpu().numpy()


def repartition_by_hash(
    users: np.ndarray, items: np.ndarray, items_total: int, comm: Communicator
) -> tuple[np.ndarray, np.ndarray]:
    """Send every interaction to the rank that its hash names; each rank's are sorted: int32 [n], int32 [n].

    Ray Data hands out blocks by demand, so which rank reads what differs from run to run. After this it does not, and
    resume is bit-exact. Collective: every rank must call it.
    """
    key = np.sort(users.astype(np.int64) * items_total + items)
    if comm.size > 1:
        owner = hash_bucket(key, comm.size)
        order = np.argsort(owner, kind="stable")
        receive = np.bincount(owner, minlength=comm.size).tolist()
        one_each = [1] * comm.size
        send = torch.tensor(receive, dtype=torch.int64, device=comm.device)
        incoming = comm.all_to_all(send, one_each, one_each).tolist()
        rows = torch.from_numpy(key[order]).to(comm.device)
        key = np.sort(comm.all_to_all(rows, receive, incoming).cpu().numpy())
    return (key // items_total).astype(np.int32), (key % items_total).astype(np.int32)


def inclusion_chance(count: np.ndarray, total: int, drawn: int) -> np.ndarray:
    """Probability that one of `count` rows is among `drawn` of `total`, drawn without replacement; float64, count >=
    1."""
    none = gammaln(total - count + 1) + gammaln(total - drawn + 1)
    none = none - gammaln(np.maximum(total - count - drawn, 0) + 1) - gammaln(total + 1)
    return np.where(count > total - drawn, 1.0, -np.expm1(none))


def _counts(positions: np.ndarray, total: int) -> torch.Tensor:
    """How often each of `total` positions occurs, float32."""
    return torch.from_numpy(np.bincount(positions, minlength=total).astype(np.float32))


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


_END = object()


def _prefetch(source: Iterator, depth: int) -> Iterator:
    """Run `source` in a thread, at most `depth` ahead. Leaving early ends the thread after the batch in work, or, where
    that waits for a rank that is gone, with the process."""
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
