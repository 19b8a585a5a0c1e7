"""What the fusion weights depend on: a user's activity and taste for popular items, and an item's popularity.

Popularity and activity are log(1 + train interactions), taste is the mean popularity of a user's train items. Each is
less its mean over warm items or users; cold ones have 0. Recency weights count where the catalog has them.
"""

import numpy as np
import torch

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import Graphs, take_edges

USER_TERMS = ("", "/activity", "/taste")  # of the columns of `user_features`; the first is 1
EXPONENT_TERMS = ("/popularity", "/popularity_squared")  # of the columns of `exponent_features`
POPULARITY = ("popularity", "popularity_squared", "popularity_cubed")  # columns of `popularity_powers`
USER_BLOCK = 1 << 16


def item_popularity(graphs: Graphs) -> torch.Tensor:
    """Popularity of all items, float32 [items]."""
    warm = graphs.item_degree > 0
    return _centred_log(graphs.weighted_item_degree / graphs.mean_weight, warm, warm)


def user_features(graphs: Graphs, popularity: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """One, activity and taste of this rank's users, float32 [n, 3]. Collective: every rank must call it.

    Args:
        popularity: of `item_popularity`.
    """
    start, stop = comm.row_range(graphs.users)
    warm, counted = graphs.user_degree > 0, graphs.counted_users
    activity = _centred_log(graphs.weighted_user_degree / graphs.mean_weight, warm, counted)[start:stop]
    total, of_items = np.zeros(stop - start), popularity.numpy().astype(np.float64)
    for first in range(start, stop, USER_BLOCK):
        users = np.arange(first, min(first + USER_BLOCK, stop))
        indptr, edges = take_edges(graphs.nodes, users)
        values = of_items[graphs.nodes.indices[edges] - graphs.users]
        total[users - start] = np.bincount(np.repeat(users - first, np.diff(indptr)), values, len(users))
    taste = torch.from_numpy(total / np.maximum(graphs.user_degree[start:stop], 1))
    of_counted = torch.where(torch.from_numpy(counted[start:stop]), taste, 0).sum()
    mean = comm.all_reduce(of_counted.to(comm.device)).cpu() / max(int(counted.sum()), 1)
    taste = torch.where(torch.from_numpy(warm[start:stop]), taste - mean, 0).float()
    return torch.stack([torch.ones_like(taste), activity, taste], dim=1)


def exponent_features(popularity: torch.Tensor) -> torch.Tensor:
    """Of a scorer's exponent: float32 [..., 2]."""
    return torch.stack([popularity, popularity**2 / 3], dim=-1)


def popularity_powers(popularity: torch.Tensor) -> torch.Tensor:
    """Of the weights of popularity itself: float32 [..., 3]."""
    return torch.stack([popularity, popularity**2, popularity**3 / 3], dim=-1)


def _centred_log(degree: np.ndarray, warm: np.ndarray, counted: np.ndarray) -> torch.Tensor:
    """log(1 + degree) less its mean over the counted ones, float32 [n]; 0 for those that are not warm."""
    logs = np.log1p(degree)
    mean = logs[counted].mean() if counted.any() else 0
    return torch.from_numpy(np.where(warm, logs - mean, 0).astype(np.float32))
