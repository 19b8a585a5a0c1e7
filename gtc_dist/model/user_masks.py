"""Users of a step of the masked diffusion, their masks, and the items among which masked ones are predicted.

In a pass over the interactions every user with at least two of them comes up once: a permutation of this rank's users,
seeded by (seed, pass, rank), is cut into the steps of the pass. Each user draws the share of its interactions that are
kept. The softmax runs over all items of a catalog of at most `FULL_SOFTMAX` items, otherwise over the rank's masked and
kept items and `NEGATIVES` uniform ones, with importance weights 1 / P(item in batch), so that its sum estimates that
over all items.
"""

import numpy as np
import torch

from gtc_dist.data.hashing import hash_bucket
from gtc_dist.distributed.device_transfer import to_device
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup, plan_whole_table
from gtc_dist.graph.csc import Graphs, take_edges
from gtc_dist.model.batch import MaskedUsers

KEPT_SHARE = (0.2, 0.9)  # of a user's interactions: uniform between these
ID_DROP = 0.6  # share of the items whose id row is dropped in a step, of each member
MAX_ITEMS = 200  # interactions of a user in a step, a sample of them
FULL_SOFTMAX = 4_000  # items; beyond, sampled items rank as well in two thirds of the time (docs/log.md)
NEGATIVES = 2048
STREAM = 2  # of the random generator of a pass; the interactions' permutation has 1


class UserMasks:
    """Draws and builds the steps of one rank. The constructor and `use_content` are collectives, and `build` beyond
    `FULL_SOFTMAX` items.

    Args:
        content: the items' content as the masked diffusion takes it; its communicator is the prefetch thread's.
        members: of the masked diffusion.
        device: of the network; what all steps share stays there.
    """

    def __init__(self, graphs: Graphs, content: ShardedTable, seed: int, members: int, device: torch.device):
        self.graphs, self.comm, self.seed, self.members, self.device = graphs, content.comm, seed, members, device
        users = np.flatnonzero(graphs.user_degree > 1)
        self.users = users[hash_bucket(users, self.comm.size) == self.comm.rank]
        self.users_per_rank = self.comm.all_gather_int(len(self.users))
        self.ordered, self.order = 0, np.empty(0, np.int64)
        self.every_item = graphs.items <= FULL_SOFTMAX
        self.use_content(content)

    def use_content(self, content: ShardedTable) -> None:
        """Take this content in the following steps."""
        self.content = content
        if self.every_item:
            plan = plan_whole_table(self.graphs.items, self.comm)
            self.all_content = content.lookup(plan).float().to(self.device)
            self.lookup = to_device(plan, self.device)

    def draw(self, pass_number: int, step: int, steps: int) -> tuple[np.ndarray, list[int], int]:
        """Local. Users of a step, int64 [m], the number of users of each rank, and the seed of the masks.

        Args:
            pass_number: from 1; step: of the pass, from 0; steps: of a pass.
        """
        if pass_number != self.ordered:
            rng = np.random.default_rng([self.seed, pass_number, self.comm.rank, STREAM])
            self.ordered, self.order = pass_number, rng.permutation(self.users)
        first, last = (n * len(self.order) // steps for n in (step, step + 1))
        counts = [(step + 1) * users // steps - step * users // steps for users in self.users_per_rank]
        rng = np.random.default_rng([self.seed, pass_number, step, self.comm.rank, STREAM])
        return self.order[first:last], counts, int(rng.integers(1 << 31))

    def build(self, users: np.ndarray, counts: list[int], seed: int) -> MaskedUsers:
        """Mask interactions of the users and look up the content of the items that the step needs; arguments as
        returned by `draw`."""
        rng = np.random.default_rng(seed)
        kept, kept_user, masked, masked_user = self._mask(users, rng)
        recency = self.graphs.relative_weights(users[masked_user], masked)
        if self.every_item:
            lookup, content, log_inclusion = self.lookup, self.all_content, None
        else:
            negatives = rng.integers(0, self.graphs.items, NEGATIVES)
            items = np.unique(np.concatenate([kept, masked, negatives]))
            lookup = plan_lookup(torch.from_numpy(items), self.graphs.items, self.comm)
            content = self.content.lookup(lookup)
            others = (len(kept) + len(masked)) * (len(users) - 1) / max(len(users), 1)  # a user's own are in anyway
            log_inclusion = self._log_inclusion(items, others)
            kept, masked = np.searchsorted(items, kept), np.searchsorted(items, masked)
        return MaskedUsers(
            item_lookup=lookup,
            content=content,
            has_id=torch.from_numpy(rng.random((len(content), self.members)) >= ID_DROP),
            kept=torch.from_numpy(kept),
            kept_start=torch.from_numpy(np.searchsorted(kept_user, np.arange(len(users) + 1))),
            target=torch.from_numpy(masked),
            target_start=torch.from_numpy(np.searchsorted(masked_user, np.arange(len(users) + 1))),
            recency_weight=None if recency is None else torch.from_numpy(recency),
            log_inclusion=log_inclusion,
            total_users=sum(counts),
        )

    def _mask(self, users: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Local. Kept items and their users' positions, masked items and theirs, int64, by user; at least one of each
        per user."""
        indptr, edges = take_edges(self.graphs.nodes, users)
        items = (self.graphs.nodes.indices[edges] - self.graphs.users).astype(np.int64)
        user = np.repeat(np.arange(len(users)), np.diff(indptr))
        order = np.lexsort((rng.random(len(items)), user))  # a random order within each user
        rank = np.arange(len(items)) - indptr[user]
        items = items[order]
        drawn = np.minimum(np.diff(indptr), MAX_ITEMS)
        share = rng.uniform(*KEPT_SHARE, len(users))
        n_kept = np.clip(rng.binomial(drawn, share), 1, drawn - 1)
        is_kept = rank < n_kept[user]
        is_masked = ~is_kept & (rank < drawn[user])
        return items[is_kept], user[is_kept], items[is_masked], user[is_masked]

    def _log_inclusion(self, items: np.ndarray, interactions: float) -> torch.Tensor:
        """Local. log P(item in batch): as one of the negatives, or as one of this many interactions."""
        share = self.graphs.item_degree[items] / max(len(self.graphs.nodes.indices) // 2, 1)
        missed = NEGATIVES * np.log1p(-1 / self.graphs.items) + interactions * np.log1p(-np.minimum(share, 1 - 1e-9))
        return torch.from_numpy(np.log(-np.expm1(missed)).astype(np.float32))
