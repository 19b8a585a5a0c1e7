"""Full-catalog ranking and its metrics.

Protocol: users with at least one train interaction and one in the split; train positives masked; all items ranked by
dot product; every metric averaged over users. For K in 5, 10, 20, 50:
Recall = hits / positives; NDCG with the ideal list cut at K; Precision = hits / K; HitRate = any hit;
MRR = 1 / rank of the first hit, 0 beyond K. "cold" counts only positives without a train interaction, over the users
that have one, in the same ranking of all items.
"""

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.graph.csc import Graphs, by_destination, edge_of, take
from gtc_dist.model.collectives import World
from gtc_dist.model.table import RowTable, make_route

CUTS = (5, 10, 20, 50)
METRICS = ("recall", "ndcg", "precision", "hitrate", "mrr")


@torch.no_grad()
def evaluate(
    users: RowTable, items: RowTable, graphs: Graphs, truth: CSC, item_block: int = 16384, user_block: int = 1024
) -> dict:
    """Metrics of a split: {"users": n, "overall": {"recall@5": ...}, "cold_users": n, "cold": {...}}. A collective.

    Args:
        users, items: embeddings, row-sharded over the same ranks.
        truth: by user, the split's items (`split_truth`).
    """
    mine = np.arange(users.start, users.stop)
    mine = mine[(truth.degree[mine] > 0) & (graphs.user_degree[mine] > 0)]
    top = top_items(users, items, graphs, mine, max(CUTS), item_block, user_block)
    cold = graphs.item_degree == 0
    who = np.repeat(mine, top.shape[1])
    hit = (top.reshape(-1) >= 0) & (edge_of(truth, who, np.maximum(top.reshape(-1), 0)) >= 0)
    hit = hit.reshape(top.shape)
    is_cold = cold[np.maximum(top, 0)]
    indptr, edges = take(truth, mine)
    counts = np.append(cold[truth.indices[edges]].astype(np.int64), 0)
    cold_count = np.add.reduceat(counts, indptr[:-1]) if len(mine) else indptr[:0]
    overall = user_metrics(hit, truth.degree[mine])
    with_cold = cold_count > 0
    cold_part = user_metrics((hit & is_cold)[with_cold], cold_count[with_cold])
    n, values = _mean(overall, users.world)
    n_cold, cold_values = _mean(cold_part, users.world)
    return {"users": n, "overall": values, "cold_users": n_cold, "cold": cold_values}


def split_truth(split: tuple[np.ndarray, np.ndarray], users: int) -> CSC:
    """A split's interactions (user int32 [E], item int32 [E]) by user."""
    return by_destination(split[0], split[1], users)


def popularity(graphs: Graphs, world: World) -> tuple[RowTable, RowTable]:
    """Embeddings of width 1 that rank every item by its train interactions: the baseline. Ties go to the lower index:
    the score is the place in that order, exact in float32 up to 16 M items."""
    users = RowTable("popularity", graphs.users, 1, world, trainable=False)
    items = RowTable("popularity", graphs.items, 1, world, trainable=False)
    users.weight.fill_(1)
    score = np.empty(graphs.items, np.float32)
    score[np.argsort(-graphs.item_degree, kind="stable")] = np.arange(graphs.items, 0, -1)
    items.weight[:, 0] = torch.from_numpy(score[items.start : items.stop]).to(world.device)
    return users, items


def top_items(
    users: RowTable, items: RowTable, graphs: Graphs, mine: np.ndarray, k: int, item_block: int, user_block: int
) -> np.ndarray:
    """Best k items of some of this rank's users by dot product, train positives left out: int64 [n, k], best first;
    -1 where there are fewer. Item blocks are looked up by all ranks in turn and merged into a running top k. A
    collective."""
    device, world = users.world.device, users.world
    best = torch.full((len(mine), k), float("-inf"), device=device)
    index = torch.full((len(mine), k), -1, dtype=torch.int64, device=device)
    rows = torch.from_numpy(mine - users.start).to(device)
    for first in range(0, items.rows, item_block):
        last = min(first + item_block, items.rows)
        ids = torch.arange(first, last, device=device)
        block = items.lookup(make_route(ids, items.rows, world)).float()
        for start in range(0, len(mine), user_block):
            part = slice(start, min(start + user_block, len(mine)))
            scores = users.weight[rows[part]].float() @ block.T
            row, seen = _seen(graphs, mine[part], first, last)
            scores[row.to(device), seen.to(device)] = float("-inf")
            value, at = scores.topk(min(k, last - first), dim=1)
            merged, order = torch.cat([best[part], value], dim=1).topk(k, dim=1)
            index[part] = torch.cat([index[part], at + first], dim=1).gather(1, order)
            best[part] = merged
    index[best == float("-inf")] = -1
    return index.cpu().numpy()


def user_metrics(hit: np.ndarray, positives: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each user.

    Args:
        hit: bool [n, >= 50], whether the item at each rank is a positive; positives: [n], at least 1.

    Returns:
        name@K -> float64 [n].
    """
    discount = 1 / np.log2(np.arange(2, max(CUTS) + 2))
    ideal = np.cumsum(discount)
    hits = np.cumsum(hit, axis=1)
    gain = np.cumsum(hit * discount[: hit.shape[1]], axis=1)
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1.0, np.inf)
    out = {}
    for k in CUTS:
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


def _mean(values: dict[str, np.ndarray], world: World) -> tuple[int, dict[str, float]]:
    names = [f"{metric}@{k}" for metric in METRICS for k in CUTS]
    local = [float(values[name].sum()) for name in names] + [float(len(values[names[0]]))]
    *sums, n = world.sum(torch.tensor(local, dtype=torch.float64, device=world.device)).tolist()
    return int(n), {name: total / max(n, 1) for name, total in zip(names, sums, strict=True)}
