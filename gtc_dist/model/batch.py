"""What the loader hands to a step: rows to look up, blocks, pairs, and the step's randomness."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from gtc_dist.distributed.message_passing import Block
from gtc_dist.distributed.sharded_table import LookupPlan


@dataclass
class HistoryLookup:
    """Where a batch's rows of the history are, and the edges that the history holds and the batch must not see."""

    user_route: LookupPlan  # of the batch's users
    item_route: LookupPlan  # of the batch's items
    left_user_route: LookupPlan  # of the users at edges that are left out
    left_item_route: LookupPlan  # of the items at edges that are left out
    left_out_of_users: Block | None  # left-out items -> batch users, weights as in the graph
    left_out_of_items: Block | None  # left-out users -> batch items

    def to(self, device: torch.device) -> "HistoryLookup":
        return HistoryLookup(*(_move(getattr(self, f.name), device) for f in fields(self)))


@dataclass
class HistoryRows:
    """Whole-catalog propagation of a moment ago, at the rows of a batch: constants, float32."""

    inputs: torch.Tensor  # [in-users + in-items, T * D] what entered the graph
    users: torch.Tensor  # [u, T * D] convolved, before the user's stream weights
    user_hop: torch.Tensor | None  # [u, T * D] what the hop over the user-user graph added
    items: torch.Tensor  # [i, T * D] convolved, with the hop over the item-item graph


@dataclass
class Batch:
    """What one step needs. "in" users and items are those whose rows are looked up; "seed" ones those that the
    convolution gives an output for (seed users first, then seed items)."""

    # rows
    user_route: LookupPlan  # of the in-users
    item_route: LookupPlan  # of the in-items
    features: dict[str, torch.Tensor]  # modality -> [in-items, d]
    # graph
    audience: Block | None  # in-users -> in-items, weights sum to one: mean preference of an item's users
    input_nodes: (
        torch.Tensor | None
    )  # [sources of the first block], rows of cat(in-users, in-items); None: all in order
    blocks: list[Block]
    seed_users: int
    seed_items: int
    user_hop: Block | None  # seed users -> batch users
    input_hop: Block | None  # in-items -> the in-items whose nodes enter the graph, the first of them
    item_hop: Block | None  # seed items -> batch items
    user_rows: torch.Tensor  # [u] the batch's users among the seed users
    item_rows: torch.Tensor  # [i] the batch's items among the seed items
    # pairs; positions in user_rows and item_rows
    users: torch.Tensor  # [B]
    positives: torch.Tensor  # [B]
    negatives: torch.Tensor  # [B, K], or [P] shared by the batch
    negative_mask: torch.Tensor | None  # [B, P] False where a shared negative is the user's train positive
    negative_weight: torch.Tensor | None  # float32 [P] how many items a shared negative stands for; None: all alike
    pair_weights: torch.Tensor  # float32 [B], of the ranking loss; their mean over all interactions is one
    # ego rows of the pairs; positions among the in-users and in-items
    ego_users: torch.Tensor  # [u]
    ego_items: torch.Tensor  # [i]
    user_ids: torch.Tensor  # [u] catalog index of the batch's users
    item_ids: torch.Tensor  # [i] catalog index of the batch's items
    # randomness of the diffusion loss, and the seed of the total correlation's permutations (alike on every rank)
    timesteps: torch.Tensor  # int64 [B]
    noise: torch.Tensor  # [modalities, B, D]
    dropout: torch.Tensor  # float32 [2, B] in [0, 1): below their shares, the condition and the user are left out
    pairs: np.ndarray  # int64 [n, 2] user and positive of all ranks' pairs, by catalog index; stays on the host
    permutation_seed: int
    sampler_seed: int  # what the neighbours were sampled with
    # sampled, with a history (training/control_variate.py)
    history: "HistoryLookup | None"
    # sizes over ranks
    counts: list[int]  # pairs of each rank
    correlation_counts: list[int]  # rows of each rank in the total correlation

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{f.name: _move(getattr(self, f.name), device) for f in fields(self)})


def _move(value, device):
    if isinstance(value, list) and value and isinstance(value[0], Block):
        # layers that share one block go on sharing it
        moved = {id(block): block.to(device) for block in value}
        return [moved[id(block)] for block in value]
    if isinstance(value, dict):
        return {key: tensor.to(device, non_blocking=True) for key, tensor in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor | Block | LookupPlan | HistoryLookup) else value
