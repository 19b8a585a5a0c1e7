"""Masked diffusion of interactions, conditioned on content: which items does a user interact with, given some others?

The forward process masks a user's train interactions: each is kept with a probability that is drawn for the user (an
absorbing-state discrete diffusion: D3PM, Austin et al. 2021; MDLM, Sahoo et al. 2024). The network predicts the masked
ones from the kept ones and their contents:

    x_i = id row + sum over modalities of W_m content_m
    p_i = unit(x_i + NEIGHBOUR_WEIGHT * mean of x over the item's neighbours in the item-item graph)
                                                                one vector per item, for input and output
    h_u = unit(sum of p_j over the kept items j)
    log p(i | kept) = scale * h_u . p_i + b_i - log of the sum over all items

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

from gtc_dist.distributed.message_passing import weighted_sum
from gtc_dist.model.batch import MaskedUsers

MASKED_TABLE = "masked_item"
WIDTH = 128  # D of a member
ID_NORM = 0.3  # initial norm of an id row; that of a content vector is 1: content leads until interactions say more
SCALE = 8.0  # initial scale of the cosine; it is learned
NEIGHBOUR_WEIGHT = 0.3
TABLE_LR, DENSE_LR = 2e-3, 6e-4  # Adam; content maps that follow every interaction overfit


class MaskedDiffusion(nn.Module):
    """The dense part. An item's row of the table has the id rows [members * D] and the biases [members].

    Args:
        modalities: name -> width of its features.
    """

    def __init__(self, modalities: dict[str, int], members: int):
        super().__init__()
        self.width, self.members, self.names = WIDTH, members, list(modalities)
        self.columns = members * WIDTH
        self.maps = nn.ParameterList(nn.Parameter(torch.empty(d, self.columns)) for d in modalities.values())
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        for content_map in self.maps:
            for block in content_map.data.split(WIDTH, dim=1):
                nn.init.orthogonal_(block)  # content keeps its cosines where it is not wider than D

    @property
    def initial_std(self) -> torch.Tensor:
        """Standard deviation of the table's initial values in each column, [members * (D + 1)]."""
        ids = torch.full((self.columns,), ID_NORM / self.width**0.5)
        return torch.cat([ids, torch.zeros(self.members)])

    def own_vectors(
        self, rows: torch.Tensor, features: dict[str, torch.Tensor], has_id: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x of items, [n, members * D].

        Args:
            rows: [n, members * (D + 1)] of the table.
            features: modality -> [n, d]; a row of zeros: no content.
            has_id: bool [n, members], or [n, 1] for all members alike; False: without the id row. None: all with it.
        """
        vectors = rows[:, : self.columns]
        if has_id is not None:
            vectors = (vectors.unflatten(1, (self.members, self.width)) * has_id[:, :, None]).flatten(1)
        for number, name in enumerate(self.names):
            vectors = vectors + F.normalize(features[name].float(), dim=1) @ self.maps[number]
        return vectors

    def smooth(self, own: torch.Tensor, neighbour_mean: torch.Tensor) -> torch.Tensor:
        """p of items, [n, members * D], from their x and the mean x of their neighbours."""
        return self.unit(own + NEIGHBOUR_WEIGHT * neighbour_mean)

    def unit(self, vectors: torch.Tensor) -> torch.Tensor:
        """Each member's vectors with norm one; zeros stay zeros. [n, members * D]."""
        return F.normalize(vectors.unflatten(1, (self.members, self.width)), dim=2).flatten(1)

    def forward(self, batch: MaskedUsers, rows: torch.Tensor) -> torch.Tensor:
        """Sum over this rank's users of -log p(masked items | kept items), divided by the users of all ranks; the mean
        over members.

        Args:
            rows: [r, members * (D + 1)] of the batch's n items, and of their neighbours.
        """
        own = self.own_vectors(rows, batch.features, batch.has_id)
        if batch.item_hop is None:
            items = self.unit(own)
        else:
            items = self.smooth(own[: batch.item_hop.destinations], weighted_sum(batch.item_hop, own))
        users = F.embedding_bag(batch.kept, items, batch.kept_start, mode="sum", include_last_offset=True)
        users = self.unit(users) * self.log_scale.exp()
        bias = rows[: len(items), self.columns :].T[:, None]
        scores = torch.baddbmm(bias, self._by_member(users), self._by_member(items).transpose(1, 2))
        target = scores[:, batch.target_user, batch.target]
        log_sum = torch.logsumexp(scores - self._log_inclusion(batch, scores), dim=2)[:, batch.target_user]
        loss = log_sum - target
        if batch.recency_weight is not None:
            loss = loss * batch.recency_weight
        return loss.sum() / (self.members * max(batch.total_users, 1))

    def _by_member(self, vectors: torch.Tensor) -> torch.Tensor:
        """[n, members * D] -> [members, n, D]."""
        return vectors.unflatten(1, (self.members, self.width)).transpose(0, 1)

    @staticmethod
    def _log_inclusion(batch: MaskedUsers, scores: torch.Tensor) -> torch.Tensor | float:
        """log P(item in batch) for each user, [m, n]: a user's own items are in for certain."""
        if batch.log_inclusion is None:
            return 0.0
        chance = batch.log_inclusion.expand(scores.shape[1:]).clone()
        kept_user = torch.repeat_interleave(
            torch.arange(len(chance), device=scores.device), batch.kept_start.diff(), output_size=len(batch.kept)
        )
        chance[kept_user, batch.kept] = 0
        chance[batch.target_user, batch.target] = 0
        return chance
