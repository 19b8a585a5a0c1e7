"""The content profile: what a user's items look like, as a part of an embedding beside the trained members.

For each modality an item has its features, centred, of length one, on their `width` principal directions. A user has
the sum of its items' (N of `walk.py`) and of those one step of co-interaction away (N C), in equal parts.
Nothing is learned, and an item needs no interaction to be scored, which makes it the part that ranks cold items.
"""

import torch

from gtc_dist.engine.walk import Walk, pair
from gtc_dist.model.table import RowTable


@torch.no_grad()
def profile_part(walk: Walk, features: RowTable, width: int) -> tuple[RowTable, RowTable]:
    """Tables of users [users, k] and items [items, k], k = min(width, features' width). A collective."""
    items = content_rows(features, width)
    near = walk.to_users(items)
    far = walk.to_users(walk(items))
    moments = item_moments(pair(walk, near, items)[1])
    return pair(walk, near * inverse_spread(near, moments) + far * inverse_spread(far, moments), items)


def content_rows(features: RowTable, width: int) -> torch.Tensor:
    """This rank's features: centred over all items, of length one, on their principal directions. A collective."""
    world, rows = features.world, features.weight.double()
    mean = world.sum(rows.sum(0)) / features.rows
    rows = torch.nn.functional.normalize(rows - mean, dim=1)
    if width >= rows.shape[1]:
        return rows.float()
    second = world.sum(rows.T @ rows)
    directions = torch.linalg.eigh((second + second.T) / 2)[1][:, -width:]
    return (rows @ directions).float()


def item_moments(items: RowTable) -> torch.Tensor:
    """Covariance of the columns over all items, float64 [k, k]. A collective."""
    rows, world = items.weight.double(), items.world
    mean = world.sum(rows.sum(0)) / items.rows
    return world.sum((rows - mean).T @ (rows - mean)) / items.rows


def inverse_spread(users: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """1 / standard deviation of each user's scores over the items that have these moments, [n, 1]; 0 where all are
    alike."""
    u = users.double()
    variance = ((u @ moments) * u).sum(1, keepdim=True)
    return torch.where(variance > 1e-60, variance.clamp(min=1e-60).rsqrt(), 0).float()
