"""Masked diffusion of interactions, conditioned on content: which items does a user interact with, given some others?

The forward process masks a user's train interactions: each is kept with a probability that is drawn for the user (an
absorbing-state discrete diffusion: D3PM, Austin et al. 2021; MDLM, Sahoo et al. 2024). The network predicts the masked
ones from the kept ones and their contents:

    c_i = content of the item + NEIGHBOUR_WEIGHT * mean content of its neighbours in the item-item graph
    p_i = unit(id row + W c_i)                                  one vector per item, for input and output
    h_u = unit(sum of p_j over the kept items j)
    log p(i | kept) = scale * h_u . p_i + b_i - log of the sum over all items

c is made once, before training (inference/masked_content.py): at most CONTENT_WIDTH principal directions of each
modality, so that a step costs the same however wide the features are, and looks up no neighbours.

`members` of these are trained side by side, from other initial values and with other id rows dropped; their scores are
added, which ranks better than one of twice the width (docs/log.md).

At the end nothing is masked, so a user's row is the unit sum over all of the user's items, and the score is a dot
product. EASE (Steck 2019) with content as side information is its linear case in closed form, at a cost cubic in items;
here an item costs O(D). An id row that is dropped in a step leaves the item to its content, which trains content for
items with few interactions. A user needs no row: one that arrives after training is the sum of its items.

Many catalogs have users with a few interactions and users with thousands; a step takes users, not interactions, and at
most `MAX_ITEMS` interactions of each.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from gtc_dist.model.batch import MaskedUsers
from gtc_dist.model.functions import log_partition, unit_rows

MASKED_TABLE = "masked_item"
WIDTH = 128  # D of a member
CONTENT_WIDTH = 256  # columns of a modality's content
ID_NORM = 0.3  # initial norm of an id row; that of a content vector is 1: content leads until interactions say more
SCALE = 8.0  # initial scale of the cosine; it is learned
NEIGHBOUR_WEIGHT = 0.3
TABLE_LR, DENSE_LR = 2e-3, 6e-4  # Adam; a content map that follows every interaction overfits


class MaskedDiffusion(nn.Module):
    """The dense part. An item's row of the table has the id rows [members * D] and the biases [members].

    Args:
        modalities: name -> width of its features.
        autocast: a step runs under autocast, which would round the ids and biases if they were added in a product.
    """

    def __init__(self, modalities: dict[str, int], members: int, autocast: bool = False):
        super().__init__()
        self.width, self.members, self.autocast = WIDTH, members, autocast
        self.columns = members * WIDTH
        # modality -> columns of its content; state of the projection that made it, for inference on another machine
        self.content_widths = {name: min(d, CONTENT_WIDTH) for name, d in modalities.items()}
        for number, (d, kept) in enumerate(zip(modalities.values(), self.content_widths.values(), strict=True)):
            self.register_buffer(f"content_mean_{number}", torch.zeros(d, dtype=torch.float64))
            self.register_buffer(f"content_directions_{number}", torch.eye(d, kept, dtype=torch.float64))
        self.content_map = nn.Parameter(torch.empty(sum(self.content_widths.values()), self.columns))
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        for rows in self.content_map.data.split(list(self.content_widths.values())):
            for block in rows.split(WIDTH, dim=1):
                nn.init.orthogonal_(block)  # content keeps its cosines

    @property
    def initial_std(self) -> torch.Tensor:
        """Standard deviation of the table's initial values in each column, [members * (D + 1)]."""
        ids = torch.full((self.columns,), ID_NORM / self.width**0.5)
        return torch.cat([ids, torch.zeros(self.members)])

    def vectors(self, ids: torch.Tensor, content: torch.Tensor, has_id: torch.Tensor | None = None) -> torch.Tensor:
        """p of items, [n, members * D].

        Args:
            ids: [n, members * D] id rows of the table.
            content: c of the items, [n, sum of `content_widths`]; a row of zeros: no content.
            has_id: bool [n, members]; False: without the id row. None: all with it.
        """
        if has_id is not None:
            ids = (ids.unflatten(1, (self.members, self.width)) * has_id[:, :, None]).flatten(1)
        if self.autocast:
            return self.unit(ids + torch.mm(content.float(), self.content_map).float())
        return self.unit(torch.addmm(ids, content.float(), self.content_map))

    def unit(self, vectors: torch.Tensor) -> torch.Tensor:
        """Each member's vectors with norm one; zeros stay zeros. [n, members * D]."""
        return unit_rows(vectors.unflatten(1, (self.members, self.width))).flatten(1)

    def forward(self, batch: MaskedUsers, rows: torch.Tensor) -> torch.Tensor:
        """Sum over this rank's users of -log p(masked items | kept items), divided by the users of all ranks; the mean
        over members.

        Args:
            rows: [n, members * (D + 1)] of the batch's items.
        """
        ids, bias = rows.split([self.columns, self.members], dim=1)
        items = self.vectors(ids, batch.content, batch.has_id)
        hidden, wanted = self._sums_by_user(batch, items)
        users, bias = self.unit(hidden) * self.log_scale.exp(), bias.T
        own = None if batch.log_inclusion is None else self._log_inclusion(batch, batch.log_inclusion)
        dtype = torch.bfloat16 if self.autocast else torch.float32
        log_sums = log_partition(self._by_member(users), self._by_member(items), bias, own, dtype)
        # scores of the masked items from the vectors, not from the scores of all items: a gradient of an entry of those
        # would be a matrix of their size
        weights = batch.target_start.diff()
        of_targets = bias.index_select(1, batch.target)
        if batch.recency_weight is not None:
            of_targets = of_targets * batch.recency_weight
            weights = torch.zeros_like(log_sums[0])
            weights = weights.index_add(0, user_of(batch.target_start, batch.target), batch.recency_weight)
        loss = (log_sums * weights).sum() - (users * wanted).sum() - of_targets.sum()
        return loss / (self.members * max(batch.total_users, 1))

    @staticmethod
    def _sums_by_user(batch: MaskedUsers, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the vectors of each user's kept items, and of its masked ones by their weights, [m, members * D]."""
        chosen = torch.cat([batch.kept, batch.target])
        start = torch.cat([batch.kept_start, batch.kept_start[-1:] + batch.target_start[1:]])
        weight = None
        if batch.recency_weight is not None:
            weight = torch.cat([torch.ones_like(batch.kept, dtype=torch.float32), batch.recency_weight])
        sums = F.embedding_bag(chosen, items, start, mode="sum", per_sample_weights=weight, include_last_offset=True)
        return sums.view(2, len(batch.kept_start) - 1, items.shape[1]).unbind(0)

    def _by_member(self, vectors: torch.Tensor) -> torch.Tensor:
        """[n, members * D] -> [members, n, D]."""
        return vectors.unflatten(1, (self.members, self.width)).transpose(0, 1)

    @staticmethod
    def _log_inclusion(batch: MaskedUsers, of_items: torch.Tensor) -> torch.Tensor:
        """log P(item in batch) for each user, [m, n]: a user's own items are in for certain."""
        chance = of_items.repeat(len(batch.kept_start) - 1, 1)
        chance[user_of(batch.kept_start, batch.kept), batch.kept] = 0
        chance[user_of(batch.target_start, batch.target), batch.target] = 0
        return chance


def user_of(start: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """User of each of `items`, which are by user, int64 [len(items)]; start: int64 [m + 1], each user's first."""
    users = torch.arange(len(start) - 1, device=start.device)
    return torch.repeat_interleave(users, start.diff(), output_size=len(items))
