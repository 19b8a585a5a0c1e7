"""The content profile: what a user's items look like, as a part of an embedding beside the trained members.

For each modality an item has its features, centred, of length one, on their `width` principal directions. A user has
the sum of its items' (N of `walk.py`) and of those one step of co-interaction away (N C), in equal parts.
Nothing is learned, and an item needs no interaction to be scored, which makes it the part that ranks cold items.
"""

from dataclasses import dataclass

import torch

from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator, pair

ROW_BLOCK = 1 << 24  # values at once


@torch.no_grad()
def content_profile_scores(
    walk: CooccurrenceOperator, features: ShardedTable, width: int
) -> tuple[ShardedTable, ShardedTable]:
    """Tables of users [users, k] and items [items, k], k = min(width, features' width). A collective."""
    items = ContentMap.of(features, width).apply(features.weight)
    near = walk.to_users(items)
    far = walk.to_users(walk(items))
    moments = item_moments(pair(walk, near, items)[1])
    return pair(walk, near * inverse_spread(near, moments) + far * inverse_spread(far, moments), items)


@dataclass
class ContentMap:
    """From a modality's features to rows of length one: centred over all items, on their principal directions."""

    mean: torch.Tensor  # float64 [d]
    directions: torch.Tensor | None  # float64 [d, k]; None: all

    @staticmethod
    def of(features: ShardedTable, width: int, chosen: torch.Tensor | None = None) -> "ContentMap":
        """A collective.

        Args:
            chosen: int64 [n], those of this rank's rows that mean and directions are taken from; None: all.
        """
        comm, rows = features.comm, features.weight if chosen is None else features.weight[chosen]
        blocks = in_blocks(rows)
        count = sum(comm.all_gather_int(len(rows)))
        mean = comm.all_reduce(sum(block.double().sum(0) for block in blocks)) / max(count, 1)
        if width >= features.width:
            return ContentMap(mean, None)
        units = (torch.nn.functional.normalize(block.double() - mean, dim=1) for block in blocks)
        second = comm.all_reduce(sum(rows.T @ rows for rows in units))
        return ContentMap(mean, torch.linalg.eigh((second + second.T) / 2)[1][:, -width:])

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """Features [n, d] -> float32 [n, k]; before the projection they have length one."""
        return torch.cat([self._apply(block) for block in in_blocks(features)])

    def _apply(self, features: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.normalize(features.double() - self.mean, dim=1)
        return (rows if self.directions is None else rows @ self.directions).float()


def in_blocks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows [n, w] in blocks of about `WARM_BLOCK` values, at least one block."""
    return rows.split(max(ROW_BLOCK // max(rows.shape[1], 1), 1))


def item_moments(items: ShardedTable) -> torch.Tensor:
    """Covariance of the columns over all items, float64 [k, k]. A collective."""
    comm, blocks = items.comm, in_blocks(items.weight)
    mean = comm.all_reduce(sum(block.double().sum(0) for block in blocks)) / items.rows
    apart = (block.double() - mean for block in blocks)
    return comm.all_reduce(sum(rows.T @ rows for rows in apart)) / items.rows


def inverse_spread(users: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """1 / standard deviation of each user's scores over the items that have these moments, [n, 1]; 0 where all are
    alike."""
    blocks = (block.double() for block in in_blocks(users))
    variance = torch.cat([((u @ moments) * u).sum(1, keepdim=True) for u in blocks])
    return torch.where(variance > 1e-60, variance.clamp(min=1e-60).rsqrt(), 0).float()
