"""Ranking metrics of recommendation lists: Recall, NDCG, Precision, HitRate and MRR at K in 5, 10, 20, 50.

Recall = hits / positives; NDCG with the ideal list cut at K; Precision = hits / K; HitRate = any hit;
MRR = 1 / rank of the first hit, 0 beyond K. Each is averaged over users.
"""

from collections.abc import Mapping

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import find_edges, take_edges

K_VALUES = (5, 10, 20, 50)
METRIC_NAMES = ("recall", "ndcg", "precision", "hitrate", "mrr")
_LIST_METRICS = [f"{metric}@{k}" for metric in METRIC_NAMES for k in K_VALUES]


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
    return metrics_of_groups(top, rows, truth, {"": counted})[""]


def metrics_of_groups(
    top: np.ndarray, rows: np.ndarray, truth: CSC, groups: Mapping[str, np.ndarray | None]
) -> dict[str, dict[str, np.ndarray]]:
    """`metrics_of_lists` for several groups of items that count as positives, with one search for the hits.

    Args:
        groups: name -> `counted` of that group.
    """
    hit, out = hits(top, rows, truth), {}
    for group, counted in groups.items():
        positives = count_positives(rows, truth, counted)
        if counted is None:
            out[group] = user_metrics(hit, positives)
            continue
        any_left = positives > 0
        out[group] = user_metrics(hit[any_left] & counted[np.maximum(top[any_left], 0)], positives[any_left])
    return out


def means_of_groups(
    top: np.ndarray,
    rows: np.ndarray,
    truth: CSC,
    groups: Mapping[str, np.ndarray | None],
    comm: Communicator,
    block: int,
) -> dict[str, tuple[int, dict[str, float]]]:
    """For each group the number of users over all ranks with a positive in it, and the mean of each metric over them.
    Collective: every rank must call it.

    Args:
        top, rows, truth, groups: of `metrics_of_groups`.
        block: users whose metrics are held at once.
    """
    sums = np.zeros((len(groups), len(_LIST_METRICS) + 1))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        for n, values in enumerate(metrics_of_groups(top[part], rows[part], truth, groups).values()):
            sums[n] += _sums(values)
    return dict(zip(groups, map(_means, comm.all_reduce(torch.from_numpy(sums).to(comm.device)).tolist()), strict=True))


def mean_over_users(values: dict[str, np.ndarray], comm: Communicator) -> tuple[int, dict[str, float]]:
    """Number of users over all ranks, and the mean of each metric over them. Collective: every rank must call it."""
    return _means(comm.all_reduce(torch.from_numpy(_sums(values)).to(comm.device)).tolist())


def flat_metrics(result: dict) -> dict[str, float]:
    """All metrics of `evaluate_split` under the names of `eval.metric`: "recall@20", "head_free/ndcg@20",
    "strata/tail/recall@20", "coverage@20"; numbers of users are left out."""
    flat = {}
    for name, value in result.items():
        if isinstance(value, dict):
            prefix = "" if name == "overall" else f"{name}/"
            flat |= {prefix + inner: metric for inner, metric in flat_metrics(value).items()}
        elif "@" in name:
            flat[name] = value
    return flat


def personalisation_lines(result: dict) -> list[str]:
    """Lines for the terminal on how personal the lists of a split are; none for a result of version 0.2 or older, which
    lacks these metrics.

    Args:
        result: of `evaluate_split`, or read from metrics.json.
    """
    if "head_free" not in result:
        return []
    shown = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@20")
    head_free, one_list, gain = result["head_free"], result["mean_list"], result["personal_gain"]
    return [
        f"{'head-free':>10}  " + "  ".join(f"{name} {head_free[name]:.4f}" for name in shown),
        f"{'mean list':>10}  "
        + "  ".join(f"{name} {one_list[name]:.4f} (own lists {value:+.4f})" for name, value in gain.items())
        + f"  coverage@20 {result['coverage@20']:.4f}  head_share@20 {result['head_share@20']:.4f}",
    ]


def metric_value(result: dict, name: str) -> float:
    """One metric of `evaluate_split` by its name in `flat_metrics`."""
    return flat_metrics(result)[name]


def _sums(values: dict[str, np.ndarray]) -> np.ndarray:
    """Sum of each metric over users, then the number of users: float64 [metrics + 1]."""
    return np.array([*(values[name].sum() for name in _LIST_METRICS), len(values[_LIST_METRICS[0]])], np.float64)


def _means(sums: list[float]) -> tuple[int, dict[str, float]]:
    *totals, n = sums
    return int(n), {name: total / max(n, 1) for name, total in zip(_LIST_METRICS, totals, strict=True)}


def count_positives(rows: np.ndarray, truth: CSC, counted: np.ndarray | None) -> np.ndarray:
    """Positives of each user, int64 [n].

    Args:
        rows: [n], the users' rows in `truth`.
        counted: bool [items], only these count; None: all items.
    """
    if counted is None:
        return truth.degree[rows]
    indptr, edges = take_edges(truth, rows)
    before = np.concatenate([[0], np.cumsum(counted[truth.indices[edges]])])
    return before[indptr[1:]] - before[indptr[:-1]]


def hits(top: np.ndarray, rows: np.ndarray, truth: CSC) -> np.ndarray:
    """Whether each recommended item is a positive of its user, bool [n, k]; -1 is none."""
    users = np.repeat(rows, top.shape[1])
    hit = (top.reshape(-1) >= 0) & (find_edges(truth, users, np.maximum(top.reshape(-1), 0)) >= 0)
    return hit.reshape(top.shape)
