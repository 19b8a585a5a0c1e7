"""Full-catalog ranking and its metrics.

Protocol: users with at least one train interaction and one in the split; train positives masked; all items ranked by
dot product; every metric averaged over users. For K in 5, 10, 20, 50:
Recall = hits / positives; NDCG with the ideal list cut at K; Precision = hits / K; HitRate = any hit;
MRR = 1 / rank of the first hit, 0 beyond K. "cold" counts only positives without a train interaction, over the users
that have one, in the same ranking of all items.

Each rank ranks for its own users. Item blocks go round all ranks and are merged into a running top 50, so a rank holds
one block of items at a time. Scoring every user of a split costs users x items; a seeded sample of the users bounds it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.graph.csc import Graphs, by_destination, edge_of, take

K_VALUES = (5, 10, 20, 50)
METRIC_NAMES = ("recall", "ndcg", "precision", "hitrate", "mrr")


@dataclass(frozen=True)
class RankingOptions:
    item_block: int = 16384  # items scored at once
    user_block: int = 1024  # users scored at once
    users: int | None = None  # rank about so many users of the split, a seeded sample; None: all
    seed: int = 0


@torch.no_grad()
def evaluate(
    users: ShardedTable, items: ShardedTable, graphs: Graphs, truth: CSC, options: RankingOptions | None = None
) -> dict:
    """Metrics of a split: {"users": n, "overall": {"recall@5": ...}, "cold_users": n, "cold": {...}}. A collective.

    Args:
        users, items: embeddings, row-sharded over the same ranks.
        truth: the split's items of this rank's users (`load_ground_truth`).
    """
    overall, cold = metrics_by_user(users, items, graphs, truth, options or RankingOptions())
    n, values = mean_over_users(overall, users.comm)
    n_cold, cold_values = mean_over_users(cold, users.comm)
    return {"users": n, "overall": values, "cold_users": n_cold, "cold": cold_values}


@torch.no_grad()
def evaluate_on_items(
    users: ShardedTable,
    items: ShardedTable,
    graphs: Graphs,
    truth: CSC,
    options: RankingOptions,
    counted: np.ndarray | None,
) -> dict[str, float]:
    """Metrics where only some of the items, bool [items], count as positives, over the users that have one; None: all
    of them. A collective."""
    mine = ranked_users(users, graphs, truth, options)
    top, _ = top_k_items(users, items, graphs, mine, max(K_VALUES), options)
    own, hit = mine - users.start, _hits(top, mine - users.start, truth)
    metrics_by_user = user_metrics(hit, truth.degree[own]) if counted is None else _among(hit, top, own, truth, counted)
    return mean_over_users(metrics_by_user, users.comm)[1]


@torch.no_grad()
def metrics_by_user(
    users: ShardedTable, items: ShardedTable, graphs: Graphs, truth: CSC, options: RankingOptions
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Metrics of each of this rank's users that are ranked, and on cold items of those that have one:
    name@K -> float64 [users], by user index. A collective."""
    mine = ranked_users(users, graphs, truth, options)
    top, _ = top_k_items(users, items, graphs, mine, max(K_VALUES), options)
    return metrics_of_lists(top, mine - users.start, graphs, truth)


def ranked_users(users: ShardedTable, graphs: Graphs, truth: CSC, options: RankingOptions) -> np.ndarray:
    """Indexes of this rank's users that are ranked. A collective."""
    mine = np.arange(users.start, users.stop)
    mine = mine[(truth.degree > 0) & (graphs.user_degree[users.start : users.stop] > 0)]
    return _sample(mine, options, users.comm)


def metrics_of_lists(
    top: np.ndarray, own: np.ndarray, graphs: Graphs, truth: CSC
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `metrics_by_user` returns, of ranked items int64 [n, k], best first (-1: none), of users `own`, rows of `truth`."""
    hit = _hits(top, own, truth)
    return user_metrics(hit, truth.degree[own]), _among(hit, top, own, truth, graphs.item_degree == 0)


def metrics_of_lists_on_items(
    top: np.ndarray, own: np.ndarray, truth: CSC, counted: np.ndarray
) -> dict[str, np.ndarray]:
    """Metrics where only some of the items count as positives, of the users that have one: name@K -> float64 [users].

    Args:
        top: ranked items int64 [n, k], best first, -1: none; own: [n], rows of `truth`.
        counted: bool [items].
    """
    return _among(_hits(top, own, truth), top, own, truth, counted)


def _hits(top: np.ndarray, own: np.ndarray, truth: CSC) -> np.ndarray:
    """Whether each ranked item is a positive of its user, bool [n, k]."""
    who = np.repeat(own, top.shape[1])
    hit = (top.reshape(-1) >= 0) & (edge_of(truth, who, np.maximum(top.reshape(-1), 0)) >= 0)
    return hit.reshape(top.shape)


def _among(hit: np.ndarray, top: np.ndarray, own: np.ndarray, truth: CSC, counted: np.ndarray) -> dict[str, np.ndarray]:
    hit = hit & counted[np.maximum(top, 0)]
    indptr, edges = take(truth, own)
    positives = np.append(counted[truth.indices[edges]].astype(np.int64), 0)
    count = np.add.reduceat(positives, indptr[:-1]) if len(own) else indptr[:0]
    return user_metrics(hit[count > 0], count[count > 0])


def load_ground_truth(catalog: Catalog, split: str, start: int = 0, stop: int | None = None) -> CSC:
    """A split's items of users [start, stop), by user less `start`; read file by file."""
    stop = catalog.users if stop is None else stop
    parts = [(np.empty(0, np.int32), np.empty(0, np.int32))]
    for user, item in catalog.interaction_files(split):
        own = (user >= start) & (user < stop)
        parts.append((user[own] - np.int32(start), item[own]))
    users, items = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return by_destination(users, items, stop - start)


def _sample(users: np.ndarray, options: RankingOptions, comm: Communicator) -> np.ndarray:
    """About `options.users` of the users of all ranks. A user is in by a hash of its index, whatever rank owns it."""
    total = sum(comm.all_gather_int(len(users)))
    if options.users is None or total <= options.users:
        return users
    mixed = hash_index(users, options.seed)
    return users[(mixed >> np.uint64(11)).astype(np.float64) < options.users / total * 2.0**53]


def hash_index(index: np.ndarray, seed: int = 0) -> np.ndarray:
    """64 mixed bits for each index below 2^32, uint64: the same whatever rank has it."""
    mixed = (index.astype(np.uint64) + np.uint64((seed % 2**32) << 32)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)


def popularity(graphs: Graphs, comm: Communicator) -> tuple[ShardedTable, ShardedTable]:
    """Embeddings of width 1 that rank every item by its train interactions: the baseline. Ties go to the lower index:
    the score is the place in that order, exact in float32 up to 16 M items."""
    users = ShardedTable("popularity", graphs.users, 1, comm, trainable=False)
    items = ShardedTable("popularity", graphs.items, 1, comm, trainable=False)
    users.weight.fill_(1)
    score = np.empty(graphs.items, np.float32)
    score[np.argsort(-graphs.item_degree, kind="stable")] = np.arange(graphs.items, 0, -1)
    items.weight[:, 0] = torch.from_numpy(score[items.start : items.stop]).to(comm.device)
    return users, items


def top_k_items(
    users: ShardedTable, items: ShardedTable, graphs: Graphs, mine: np.ndarray, k: int, options: RankingOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Best k items of some of this rank's users by dot product, train positives left out: int64 [n, k], best first, -1
    where there are fewer; and their scores, float32 [n, k]. Of equal scores across blocks the lower index stays. A
    collective."""
    device, comm = users.comm.device, users.comm
    best = torch.full((len(mine), k), float("-inf"), device=device)
    index = torch.full((len(mine), k), -1, dtype=torch.int64, device=device)
    rows = torch.from_numpy(mine - users.start).to(device)
    for first in range(0, items.rows, options.item_block):
        last = min(first + options.item_block, items.rows)
        ids = torch.arange(first, last, device=device)
        block = items.lookup(plan_lookup(ids, items.rows, comm)).float()
        for start in range(0, len(mine), options.user_block):
            part = slice(start, min(start + options.user_block, len(mine)))
            scores = users.weight[rows[part]].float() @ block.T
            row, seen = _seen(graphs, mine[part], first, last)
            scores[row.to(device), seen.to(device)] = float("-inf")
            if first:
                value, at = _above(scores, best[part, -1], k)
            else:  # nothing to be above yet
                value, at = scores.topk(min(k, scores.shape[1]), dim=1)
            best[part], order = torch.cat([best[part], value], dim=1).topk(k, dim=1)
            index[part] = torch.cat([index[part], at + first], dim=1).gather(1, order)
    index[best == float("-inf")] = -1
    return index.cpu().numpy(), best.cpu().numpy()


def _above(scores: torch.Tensor, least: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates for a running top k: scores [n, m] of each row that are above its `least` [n], or its k best where
    many are; value and column [n, at most k], padded with -inf.

    After a few blocks hardly a score is above the k-th best so far, and finding these takes one pass over the scores,
    where `topk` would take several.
    """
    above = scores > least[:, None]
    counts = above.sum(dim=1)
    most = int(counts.max()) if len(counts) else 0
    if most > k:
        return scores.topk(min(k, scores.shape[1]), dim=1)
    row, column = above.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    value = scores.new_full((len(scores), most), float("-inf"))
    at = column.new_zeros((len(scores), most))
    value[row, place], at[row, place] = scores[row, column], column
    return value, at


def user_metrics(hit: np.ndarray, positives: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each user.

    Args:
        hit: bool [n, >= 50], whether the item at each rank is a positive; positives: [n], at least 1.

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


def _seen(graphs: Graphs, users: np.ndarray, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of the train positives of `users` among items [first, last)."""
    indptr, edges = take(graphs.nodes, users)
    items = graphs.nodes.indices[edges] - graphs.users
    row = np.repeat(np.arange(len(users)), np.diff(indptr))
    inside = (items >= first) & (items < last)
    return torch.from_numpy(row[inside]), torch.from_numpy(items[inside].astype(np.int64) - first)


def mean_over_users(values: dict[str, np.ndarray], comm: Communicator) -> tuple[int, dict[str, float]]:
    """Users of all ranks, and the mean of each metric over them. A collective."""
    names = [f"{metric}@{k}" for metric in METRIC_NAMES for k in K_VALUES]
    local = [float(values[name].sum()) for name in names] + [float(len(values[names[0]]))]
    *sums, n = comm.all_reduce(torch.tensor(local, dtype=torch.float64, device=comm.device)).tolist()
    return int(n), {name: total / max(n, 1) for name, total in zip(names, sums, strict=True)}
