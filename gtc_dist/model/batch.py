"""Input of a training step: pairs, their randomness, and the subgraph that their embeddings are computed from.

Nodes, as in DGL: *input* users and items are those whose rows are looked up; *seed* users and items are those for which
the user-item convolution computes an output (seed users first, then seed items); the *batch's* users and items are the
distinct ones in its pairs, a part of the seeds.
"""

from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.distributed.message_passing import Block
from gtc_dist.distributed.sharded_table import LookupPlan


@dataclass
class DrawnPairs:
    """Pairs of this rank with their negatives and the randomness of the step, on the host. Users and items are catalog
    indexes."""

    users: np.ndarray  # int64 [B]
    positives: np.ndarray  # int64 [B]
    negatives: np.ndarray  # int64 [B, K], or [P] shared by the batch
    timesteps: np.ndarray  # int64 [B], 1..T
    noise: np.ndarray  # float32 [modalities, B, D], or [modalities, B, 0] where no filter reads it
    dropout: np.ndarray  # float32 [2, B], uniform in [0, 1)
    permutation_seed: int  # of the total correlation, the same on every rank
    sampler_seed: int  # of this rank's neighbour sampling
    counts: list[int]  # pairs of each rank
    masked_users: np.ndarray  # int64 [m], of this rank, for the masked diffusion
    masked_counts: list[int]  # masked users of each rank
    mask_seed: int  # of their masks and negatives


@dataclass
class MaskedUsers:
    """Users of this rank with some of their interactions masked, for one step of the masked diffusion. Items are
    positions among the batch's n items."""

    item_lookup: LookupPlan  # the n items
    content: torch.Tensor  # [n, d] of the items, as the masked diffusion takes it
    has_id: torch.Tensor  # bool [n, members] False: the member's id row of the item is dropped
    kept: torch.Tensor  # int64 [k] kept items, by user
    kept_start: torch.Tensor  # int64 [m + 1] first kept item of each user
    target: torch.Tensor  # int64 [t] masked items, by user
    target_start: torch.Tensor  # int64 [m + 1] first masked item of each user
    recency_weight: torch.Tensor | None  # float32 [t] of the masked items, mean one over train; None: all one
    log_inclusion: torch.Tensor | None  # float32 [n] log P(item in batch); None: all items are
    total_users: int  # of all ranks


@dataclass
class HistoryLookup:
    """Rows of the historical embeddings that a batch needs, and the edges that they hold and the batch must not see."""

    users: LookupPlan  # the batch's users
    items: LookupPlan  # the batch's items
    excluded_users: LookupPlan  # users at excluded edges
    excluded_items: LookupPlan  # items at excluded edges
    excluded_into_users: Block  # excluded items -> the batch's users, weights as in the graph
    excluded_into_items: Block  # excluded users -> the batch's items


@dataclass
class HistoryRows:
    """Historical embeddings of the last full-graph refresh, at the rows of a batch: constants, float32."""

    inputs: torch.Tensor  # [input users + input items, node views * D] what entered the graph
    users: torch.Tensor  # [u, node views * D] convolved, before the user's view weights
    user_hop: torch.Tensor | None  # [u, node views * D] what the user-user hop added
    items: torch.Tensor  # [i, node views * D] convolved, with the item-item hop


@dataclass
class ExcludedEdges:
    """Edges of the whole graph that a batch must not see: positions among a block's edges by destination and source."""

    edges: torch.Tensor  # of the user-item block, which is symmetric: the same positions in both orders
    audience: torch.Tensor | None  # of the audience
    audience_by_source: torch.Tensor | None


@dataclass
class Subgraph:
    """Rows to look up and blocks (message-flow graphs) that lead from them to the batch's users and items."""

    user_lookup: LookupPlan  # input users
    item_lookup: LookupPlan  # input items
    features: dict[str, torch.Tensor]  # modality -> [input items, d]
    audience: Block | None  # input users -> input items, weights sum to one: mean preference of an item's users
    input_nodes: torch.Tensor | None  # [sources of the first block], rows of cat(input users, items); None: in order
    blocks: list[Block]  # one per user-item layer
    n_seed_users: int
    n_seed_items: int
    user_hop: Block | None  # seed users -> the batch's users
    input_hop: Block | None  # input items -> those of them that enter the graph, which come first
    item_hop: Block | None  # seed items -> the batch's items
    users_in_seeds: torch.Tensor  # [u] positions of the batch's users among the seed users
    items_in_seeds: torch.Tensor  # [i] positions of the batch's items among the seed items
    users_in_inputs: torch.Tensor  # [u] positions of the batch's users among the input users
    items_in_inputs: torch.Tensor  # [i] positions of the batch's items among the input items
    history: HistoryLookup | None = None  # sampled, with historical embeddings
    excluded: ExcludedEdges | None = None  # full: edges whose weight is zero in this batch

    def without_excluded(self) -> tuple[list[Block], Block | None]:
        """The blocks and the audience without the excluded edges."""
        if self.excluded is None:
            return self.blocks, self.audience
        edges, audience = self.excluded.edges, self.audience
        blocks = [self.blocks[0].without(edges, edges)] * len(self.blocks) if self.blocks else []
        if audience is not None:
            audience = audience.without(self.excluded.audience, self.excluded.audience_by_source)
        return blocks, audience


@dataclass
class Batch:
    """One step of one rank. `users`, `positives` and `negatives` are positions among the batch's users and items."""

    subgraph: Subgraph
    users: torch.Tensor  # [B]
    positives: torch.Tensor  # [B]
    negatives: torch.Tensor  # [B, K], or [P] shared by the batch
    negative_mask: torch.Tensor | None  # [B, P] False where a shared negative is the user's train positive
    negative_weight: torch.Tensor | None  # float32 [P] importance weight of an in-batch negative; None: all one
    user_share: torch.Tensor  # float32 [u] pairs of each user
    item_share: torch.Tensor  # float32 [i] pairs whose positive the item is, and its share of the pairs' negatives
    user_ids: torch.Tensor  # [u] catalog index of the batch's users
    item_ids: torch.Tensor  # [i] catalog index of the batch's items
    timesteps: torch.Tensor  # int64 [B] diffusion steps of the denoising loss
    noise: torch.Tensor  # [modalities, B, D] its noise
    dropout: torch.Tensor  # float32 [2, B] in [0, 1): the condition is dropped below a share; row 1 is unused
    permutations: torch.Tensor | None  # int64 [groups, views, views - 1, rows] of the total correlation
    counts: list[int]  # pairs of each rank
    tc_counts: list[int]  # pairs of each rank that enter the total correlation
    drawn: DrawnPairs  # the same pairs as catalog indexes; stays on the host
    all_pairs: np.ndarray  # int64 [n, 2] user and positive of all ranks' pairs, catalog indexes; stays on the host
    masked: MaskedUsers | None = None  # for the masked diffusion
    recency_weight: torch.Tensor | None = None  # float32 [B] of the pairs, mean one over train; None: all one
