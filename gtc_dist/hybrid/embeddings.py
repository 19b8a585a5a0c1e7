"""Embeddings of users and items, and the standardisation that makes scores of different scorers comparable."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from gtc_dist.distributed.sharded_table import ShardedTable

BLOCK_VALUES = 1 << 24  # values converted to float64 at once


class Embeddings(NamedTuple):
    """Row-wise sharded tables of equal width; the score of a user and an item is the dot product of their rows."""

    users: ShardedTable
    items: ShardedTable


@dataclass(frozen=True)
class SpecialColumns:
    """Columns of fused embeddings that predictions treat apart.

    profiles: modality -> columns of its content profile. own_profiles: modality -> this rank's items' profiles.
    constant: column that is 1 for all users, if there is one. popularity: number of leading columns, with the constant,
    that hold the weights of an item's popularity.
    """

    profiles: dict[str, slice] = field(default_factory=dict)
    own_profiles: dict[str, torch.Tensor] = field(default_factory=dict)
    constant: int | None = None
    popularity: int = 0


def unit_variance(embeddings: Embeddings) -> Embeddings:
    """Scale user rows so that each user's scores have standard deviation 1 over all items. Collective: every rank must
    call it."""
    users, items = embeddings
    scale = inverse_score_std(users.weight, item_covariance(items))
    return Embeddings(users.with_values(users.weight.float() * scale), items.with_values(items.weight.float()))


def item_covariance(items: ShardedTable) -> torch.Tensor:
    """Covariance of the columns over all items, float64 [k, k]. Collective: every rank must call it."""
    comm, blocks = items.comm, row_blocks(items.weight)
    mean = comm.all_reduce(sum(block.double().sum(0) for block in blocks)) / items.rows
    centred = (block.double() - mean for block in blocks)
    return comm.all_reduce(sum(rows.T @ rows for rows in centred)) / items.rows


def inverse_score_std(users: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """1 / standard deviation of each user's scores over items with this covariance, float32 [n, 1]; 0 where all items
    score the same."""
    blocks = (block.double() for block in row_blocks(users))
    variance = torch.cat([((u @ covariance) * u).sum(1, keepdim=True) for u in blocks])
    return torch.where(variance > 1e-60, variance.clamp(min=1e-60).rsqrt(), 0).float()


def row_blocks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows [n, w] in blocks of about `BLOCK_VALUES` values, at least one block."""
    return rows.split(max(BLOCK_VALUES // max(rows.shape[1], 1), 1))
