"""Masked diffusion of interactions, conditioned on content: which items does a user interact with, given some others?

The forward process masks a user's train interactions: each is kept with a probability that is drawn for the user (an
absorbing-state discrete diffusion: D3PM, Austin et al. 2021; MDLM, Sahoo et al. 2024). The network predicts the masked
ones from the kept ones and their contents:

    x_i = id row + sum over modalities of W_m content_m
    p_i = unit(x_i + NEIGHBOUR_WEIGHT * mean of x over the item's neighbours in the item-item graph)
                                                                one vector per item, for input and output
    h_u = unit(sum of p_j over the kept items j)
    log p(i | kept) = scale * h_u . p_i + b_i - log of the sum over all items

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
ID_NORM = 0.3  # initial norm of an id row; that of a content vector is 1: content leads until interactions say more
SCALE = 8.0  # initial scale of the cosine; it is learned
NEIGHBOUR_WEIGHT = 0.3
TABLE_LR, DENSE_LR = 1e-3, 3e-4  # Adam; content maps that follow every interaction overfit


class MaskedDiffusion(nn.Module):
    """The dense part. An item's row of the table is its id row [D] and its bias.

    Args:
        modalities: name -> width of its features.
        width: D.
    """

    def __init__(self, modalities: dict[str, int], width: int):
        super().__init__()
        self.width, self.names = width, list(modalities)
        self.maps = nn.ParameterList(nn.Parameter(torch.empty(d, width)) for d in modalities.values())
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        for content_map in self.maps:
            nn.init.orthogonal_(content_map)  # content keeps its cosines where it is not wider than D

    @property
    def initial_std(self) -> torch.Tensor:
        """Standard deviation of the table's initial values in each column, [D + 1]."""
        return torch.cat([torch.full((self.width,), ID_NORM / self.width**0.5), torch.zeros(1)])

    def own_vectors(
        self, rows: torch.Tensor, features: dict[str, torch.Tensor], has_id: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x of items, [n, D].

        Args:
            rows: [n, D + 1] of the table.
            features: modality -> [n, d]; a row of zeros: no content.
            has_id: bool [n], False: without the id row; None: all with it.
        """
        vectors = rows[:, :-1] if has_id is None else rows[:, :-1] * has_id[:, None]
        for number, name in enumerate(self.names):
            vectors = vectors + F.normalize(features[name].float(), dim=1) @ self.maps[number]
        return vectors

    @staticmethod
    def smooth(own: torch.Tensor, neighbour_mean: torch.Tensor) -> torch.Tensor:
        """p of items, [n, D], from their x and the mean x of their neighbours."""
        return F.normalize(own + NEIGHBOUR_WEIGHT * neighbour_mean, dim=1)

    def forward(self, batch: MaskedUsers, rows: torch.Tensor) -> torch.Tensor:
        """Sum over this rank's users of -log p(masked items | kept items), divided by the users of all ranks.

        Args:
            rows: [r, D + 1] of the batch's n items, and of their neighbours.
        """
        own = self.own_vectors(rows, batch.features, batch.has_id)
        if batch.item_hop is None:
            items = F.normalize(own, dim=1)
        else:
            items = self.smooth(own[: batch.item_hop.destinations], weighted_sum(batch.item_hop, own))
        users = F.embedding_bag(batch.kept, items, batch.kept_start, mode="sum", include_last_offset=True)
        users = F.normalize(users, dim=1) * self.log_scale.exp()
        scores = users @ items.T + rows[: len(items), -1]
        target = scores[batch.target_user, batch.target]
        log_sum = torch.logsumexp(scores - self._log_inclusion(batch, scores), dim=1)[batch.target_user]
        loss = log_sum - target
        if batch.recency_weight is not None:
            loss = loss * batch.recency_weight
        return loss.sum() / max(batch.total_users, 1)

    @staticmethod
    def _log_inclusion(batch: MaskedUsers, scores: torch.Tensor) -> torch.Tensor | float:
        """log P(item in batch) for each user, [m, n]: a user's own items are in for certain."""
        if batch.log_inclusion is None:
            return 0.0
        chance = batch.log_inclusion.expand_as(scores).clone()
        kept_user = torch.repeat_interleave(
            torch.arange(len(scores), device=scores.device), batch.kept_start.diff(), output_size=len(batch.kept)
        )
        chance[kept_user, batch.kept] = 0
        chance[batch.target_user, batch.target] = 0
        return chance
