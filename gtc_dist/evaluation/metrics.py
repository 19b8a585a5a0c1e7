"""Ranking metrics of recommendation lists: Recall, NDCG, Precision, HitRate and MRR at K in 5, 10, 20, 50.

Recall = hits / positives; NDCG with the ideal list cut at K; Precision = hits / K; HitRate = any hit;
MRR = 1 / rank of the first hit, 0 beyond K. Each is averaged over users.
"""

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import Graphs, find_edges, take_edges

K_VALUES = (5, 10, 20, 50)
METRIC_NAMES = ("recall", "ndcg", "precision", "hitrate", "mrr")


def user_metrics(hit: np.ndarray, positives: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each user.

    Args:
        hit: bool [n, >= 50], whether the item at each rank is a positive.
        positives: [n], the user's number of positives, at least 1.

    Returns:
        name@K -> float64 [n].
    """
    discount = 1 / np.log2(np.arange(2, max(K_VALUES) + 2))
    ideal = np.cumsum(discount)
    hits = np.cumsum(hit, axis=1)
    gain = np.cumsum(hit * discount[: hit.shape[1]], axis=1)
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1.0, np.inf)
    out = {}
    for k in K_VALUES:
        out[f"recall@{k}"] = hits[:, k - 1] / positives
        out[f"ndcg@{k}"] = gain[:, k - 1] / ideal[np.minimum(positives, k) - 1]
        out[f"precision@{k}"] = hits[:, k - 1] / k
        out[f"hitrate@{k}"] = (hits[:, k - 1] > 0).astype(np.float64)
        out[f"mrr@{k}"] = np.where(first <= k, 1 / first, 0.0)
    return out


def metrics_of_lists(
    top: np.ndarray, rows: np.ndarray, truth: CSC, counted: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Metrics of each user's list, name@K -> float64 [users].

    Args:
        top: recommended items int64 [n, k], best first, -1: none.
        rows: [n], the users' rows in `truth`.
        truth: the split's items of each user.
        counted: bool [items], only these count as positives, and users without one are left out; None: all items.
    """
    hit = _hits(top, rows, truth)
    if counted is None:
        return user_metrics(hit, truth.degree[rows])
    hit = hit & counted[np.maximum(top, 0)]
    indptr, edges = take_edges(truth, rows)
    positives = np.append(counted[truth.indices[edges]].astype(np.int64), 0)
    count = np.add.reduceat(positives, indptr[:-1]) if len(rows) else indptr[:0]
    return user_metrics(hit[count > 0], count[count > 0])


def overall_and_cold_metrics(
    top: np.ndarray, rows: np.ndarray, graphs: Graphs, truth: CSC
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`metrics_of_lists` on all items and on cold ones (without a train interaction)."""
    return metrics_of_lists(top, rows, truth), metrics_of_lists(top, rows, truth, graphs.item_degree == 0)


def mean_over_users(values: dict[str, np.ndarray], comm: Communicator) -> tuple[int, dict[str, float]]:
    """Number of users over all ranks, and the mean of each metric over them. Collective: every rank must call it."""
    names = [f"{metric}@{k}" for metric in METRIC_NAMES for k in K_VALUES]
    local = [float(values[name].sum()) for name in names] + [float(len(values[names[0]]))]
    *sums, n = comm.all_reduce(torch.tensor(local, dtype=torch.float64, device=comm.device)).tolist()
    return int(n), {name: total / max(n, 1) for name, total in zip(names, sums, strict=True)}


def _hits(top: np.ndarray, rows: np.ndarray, truth: CSC) -> np.ndarray:
    """Whether each recommended item is a positive of its user, bool [n, k]."""
    users = np.repeat(rows, top.shape[1])
    hit = (top.reshape(-1) >= 0) & (find_edges(truth, users, np.maximum(top.reshape(-1), 0)) >= 0)
    return hit.reshape(top.shape)
