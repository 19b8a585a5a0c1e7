"""Full-catalog ranking over row-wise sharded embeddings, and its evaluation.

Protocol: users with at least one train interaction and one in the split; train positives masked; all items ranked by
dot product; every metric (`metrics.py`) averaged over users. Metrics of a group of items (`item_groups.py`) count only
these as positives, over the users that have one, in the same ranking of all items. `beyond_accuracy.py` compares the
lists with one list for everyone.

Each rank ranks for its own users. All ranks look up one block of items after the other and merge it into a running top
K, so a rank holds one block of items at a time. Scoring every user of a split costs users x items; a seeded sample of
the users bounds the cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.config import Config
from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.data.hashing import hash_index
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.evaluation.beyond_accuracy import list_spread, mean_lists
from gtc_dist.evaluation.item_groups import STRATA, positive_groups
from gtc_dist.evaluation.metrics import K_VALUES, means_of_groups, metrics_of_groups
from gtc_dist.graph.csc import Graphs, by_destination, take_edges
from gtc_dist.progress import ShareDone

GROUP = 8  # columns whose maximum `top_of_rows` looks at first


@dataclass(frozen=True)
class RankingOptions:
    item_block: int = 16384  # items scored at once
    user_block: int = 1024  # users scored at once
    users: int | None = None  # rank about this many users of the split, a seeded sample; None: all
    seed: int = 0

    @staticmethod
    def of(config: Config) -> "RankingOptions":
        """Options of the validation during training."""
        return RankingOptions(config.eval.block_rows, users=config.eval.users, seed=config.train.seed)


@torch.no_grad()
def evaluate_split(
    users: ShardedTable,
    items: ShardedTable,
    graphs: Graphs,
    truth: CSC,
    options: RankingOptions | None = None,
    head: np.ndarray | None = None,
) -> dict:
    """Metrics of a split. Collective: every rank must call it.

    Args:
        users, items: embeddings, row-sharded over the same ranks.
        truth: the split's items of this rank's users (`load_ground_truth`).
        head: bool [items], items of `valid_head`, which "head_free" does not count as positives; None: no item.

    Returns:
        users: number of users; overall: {"recall@5": ...}
        cold_users, cold, head_free_users, head_free: the same for positives in these groups
        strata: {"head": {"users": n, "recall@5": ...}, "middle": ..., "tail": ...}
        mean_list: metrics of one list for everyone; personal_gain: overall less mean_list for recall@20 and ndcg@20
        coverage@20, head_share@20: see `list_spread`
    """
    options, comm = options or RankingOptions(), users.comm
    head = np.zeros(graphs.items, bool) if head is None else head
    rank_users = ranked_users(users, graphs, truth, options)
    rows = rank_users - users.start
    top, _ = top_k_items(users, items, graphs, rank_users, max(K_VALUES), options)
    mean = means_of_groups(top, rows, truth, positive_groups(graphs, head), comm, options.user_block)
    blocks = options.item_block, options.user_block
    same_for_all = mean_lists(users, items, graphs, rank_users, max(K_VALUES), *blocks)
    _, mean_list = means_of_groups(same_for_all, rows, truth, {"": None}, comm, options.user_block)[""]
    (n, overall), (n_cold, cold), (n_free, head_free) = (mean[group] for group in ("overall", "cold", "head_free"))
    strata = {name: mean[f"strata/{name}"] for name in STRATA}
    return {
        "users": n,
        "overall": overall,
        "cold_users": n_cold,
        "cold": cold,
        "head_free_users": n_free,
        "head_free": head_free,
        "strata": {name: {"users": count, **values} for name, (count, values) in strata.items()},
        "mean_list": mean_list,
        "personal_gain": {name: overall[name] - mean_list[name] for name in ("recall@20", "ndcg@20")},
        **list_spread(top, graphs, comm),
    }


@torch.no_grad()
def evaluate_on_items(
    users: ShardedTable,
    items: ShardedTable,
    graphs: Graphs,
    truth: CSC,
    options: RankingOptions,
    counted: np.ndarray | None,
) -> dict[str, float]:
    """Metrics that count only some items as positives. Collective: every rank must call it.

    Args:
        counted: bool [items]; users without such a positive are left out. None: all items count.
    """
    rank_users = ranked_users(users, graphs, truth, options)
    top, _ = top_k_items(users, items, graphs, rank_users, max(K_VALUES), options)
    rows, block = rank_users - users.start, options.user_block
    return means_of_groups(top, rows, truth, {"": counted}, users.comm, block)[""][1]


@torch.no_grad()
def metrics_by_user(
    users: ShardedTable,
    items: ShardedTable,
    graphs: Graphs,
    truth: CSC,
    options: RankingOptions,
    groups: Mapping[str, np.ndarray | None],
) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of each ranked user of this rank for groups of items that count as positives: group -> name@K -> float64
    [users with a positive in the group], in the order of user indexes. Collective: every rank must call it.

    Args:
        groups: name -> bool [items], or None: all items count.
    """
    rank_users = ranked_users(users, graphs, truth, options)
    top, _ = top_k_items(users, items, graphs, rank_users, max(K_VALUES), options)
    return metrics_of_groups(top, rank_users - users.start, truth, groups)


def ranked_users(users: ShardedTable, graphs: Graphs, truth: CSC, options: RankingOptions) -> np.ndarray:
    """Indexes of this rank's users that are ranked. Collective: every rank must call it."""
    rank_users = np.arange(users.start, users.stop)
    rank_users = rank_users[(truth.degree > 0) & (graphs.user_degree[users.start : users.stop] > 0)]
    return _sample(rank_users, options, users.comm)


def load_ground_truth(catalog: Catalog, split: str, start: int = 0, stop: int | None = None) -> CSC:
    """A split's items of the users [start, stop), by user index less `start`; read file by file."""
    stop = catalog.users if stop is None else stop
    parts = [(np.empty(0, np.int32), np.empty(0, np.int32))]
    for user, item in catalog.interaction_files(split):
        inside = (user >= start) & (user < stop)
        parts.append((user[inside] - np.int32(start), item[inside]))
    users, items = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return by_destination(users, items, stop - start)


def _sample(users: np.ndarray, options: RankingOptions, comm: Communicator) -> np.ndarray:
    """About `options.users` of the users of all ranks, chosen by a hash of the index: the same for any number of
    ranks."""
    total = sum(comm.all_gather_int(len(users)))
    if options.users is None or total <= options.users:
        return users
    mixed = hash_index(users, options.seed)
    return users[(mixed >> np.uint64(11)).astype(np.float64) < options.users / total * 2.0**53]


def popularity(graphs: Graphs, comm: Communicator) -> tuple[ShardedTable, ShardedTable]:
    """Popularity baseline as embeddings of width 1: items are ranked by train interactions, ties by the lower index.
    The score is the position in that order, exact in float32 up to 16 M items."""
    users = ShardedTable("popularity", graphs.users, 1, comm, trainable=False)
    items = ShardedTable("popularity", graphs.items, 1, comm, trainable=False)
    users.weight.fill_(1)
    score = np.empty(graphs.items, np.float32)
    score[np.argsort(-graphs.item_degree, kind="stable")] = np.arange(graphs.items, 0, -1)
    items.weight[:, 0] = torch.from_numpy(score[items.start : items.stop]).to(comm.device)
    return users, items


def top_k_items(
    users: ShardedTable,
    items: ShardedTable,
    graphs: Graphs,
    rank_users: np.ndarray,
    k: int,
    options: RankingOptions,
    allowed: np.ndarray | None = None,
    known: CSC | None = None,
    mask_train: bool = True,
    done: ShareDone | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Best k items by dot product, without a user's train positives. Of equal scores in different blocks, the lower
    index wins. Collective: every rank must call it.

    Args:
        rank_users: [n], indexes of this rank's users to rank for.
        allowed: bool [items], only these are listed; None: all.
        known: further items of each of this rank's users that are not listed, by user index less the rank's first.
        mask_train: False: train positives are listed, too.
        done: called after every block of items.

    Returns:
        items int64 [n, k], best first, -1 where there are fewer; their scores float32 [n, k], -inf there.
    """
    device, comm = users.comm.device, users.comm
    best = torch.full((len(rank_users), k), float("-inf"), device=device)
    index = torch.full((len(rank_users), k), -1, dtype=torch.int64, device=device)
    rows = torch.from_numpy(rank_users - users.start).to(device)
    seen = False
    for first in range(0, items.rows, options.item_block):
        last = min(first + options.item_block, items.rows)
        listed = np.arange(first, last) if allowed is None else first + np.flatnonzero(allowed[first:last])
        if not len(listed):
            continue
        ids = torch.from_numpy(listed).to(device)
        block = items.lookup(plan_lookup(ids, items.rows, comm)).float()
        for start in range(0, len(rank_users), options.user_block):
            part = slice(start, min(start + options.user_block, len(rank_users)))
            scores = users.weight[rows[part]].float() @ block.T
            if mask_train:
                _exclude(scores, graphs.nodes, rank_users[part], listed, graphs.users)
            if known is not None:
                _exclude(scores, known, rank_users[part] - users.start, listed)
            if seen:
                value, at = _above_running_best(scores, best[part, -1], k)
            else:  # no running top k yet
                value, at = top_of_rows(scores, k)
            best[part], order = torch.cat([best[part], value], dim=1).topk(k, dim=1)
            index[part] = torch.cat([index[part], ids[at]], dim=1).gather(1, order)
        seen = True
        if done is not None:
            done(last / items.rows)
    index[best == float("-inf")] = -1
    return index.cpu().numpy(), best.cpu().numpy()


def _exclude(scores: torch.Tensor, graph: CSC, rows: np.ndarray, listed: np.ndarray, base: int = 0) -> None:
    """Set the scores [n, m] of the n rows' items of a graph to -inf; `listed`: int64 [m], ascending, the items of the
    columns; base: as in `items_in_range`."""
    first = int(listed[0])
    row, item = items_in_range(graph, rows, first, int(listed[-1]) + 1, base)
    if len(listed) <= listed[-1] - first:  # not all items of the range
        column = np.searchsorted(listed, item.numpy() + first)
        is_listed = torch.from_numpy(listed[column] == item.numpy() + first)
        row, item = row[is_listed], torch.from_numpy(column)[is_listed]
    scores[row.to(scores.device), item.to(scores.device)] = float("-inf")


def _above_running_best(scores: torch.Tensor, least: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates for a running top k: the scores [n, m] of each row above its `least` [n], or the k best where a row
    has more. Value and column [n, at most k], padded with -inf.

    After a few blocks hardly any score is above the k-th best so far, and finding these takes one pass over the scores;
    `topk` would take several.
    """
    above = scores > least[:, None]
    counts = above.sum(dim=1)
    most = int(counts.max()) if len(counts) else 0
    if most > k:
        return top_of_rows(scores, k)
    row, column = above.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    value = scores.new_full((len(scores), most), float("-inf"))
    at = column.new_zeros((len(scores), most))
    value[row, place], at[row, place] = scores[row, column], column
    return value, at


def top_of_rows(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best scores of each row, best first, and their columns: `topk` of [n, m], each [n, at most k].

    On a CPU a long row's best are looked for among the columns of the k groups with the largest maxima: one pass finds
    these, and `topk` reads an eighth of the row.
    """
    n, m = scores.shape
    size = m // GROUP
    if scores.device.type != "cpu" or size < 4 * k:
        return scores.topk(min(k, m), dim=1)
    groups = scores[:, : GROUP * size].unflatten(1, (GROUP, size)).amax(1).topk(k, dim=1, sorted=False).indices
    columns = (groups[:, :, None] + torch.arange(GROUP) * size).flatten(1)
    columns = torch.cat([columns, torch.arange(GROUP * size, m).expand(n, -1)], dim=1)
    best, at = scores.gather(1, columns).topk(k, dim=1)
    return best, columns.gather(1, at)


def train_positives(graphs: Graphs, users: np.ndarray, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of the train positives of `users` among items [first, last)."""
    return items_in_range(graphs.nodes, users, first, last, graphs.users)


def items_in_range(
    graph: CSC, rows: np.ndarray, first: int, last: int, base: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of the items in [first, last) of some rows of a graph, whose first item has the index `base`."""
    indptr, edges = take_edges(graph, rows)
    items = graph.indices[edges] - base
    row = np.repeat(np.arange(len(rows)), np.diff(indptr))
    inside = (items >= first) & (items < last)
    return torch.from_numpy(row[inside]), torch.from_numpy(items[inside].astype(np.int64) - first)
