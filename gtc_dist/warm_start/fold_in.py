"""Rows of users and items that were never trained, from those that were.

- An item gets the mean of its nearest trained items by content (the item-item graph, weighted by similarity).
- A user gets the mean over its train items of the mean row of their trained users: those who share items with it.

Where nothing trained is near, and for users without a train interaction, it is the mean of all trained rows.
"""

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.sharded_spmm import ShardedSpMM
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.warm_neighbours import edges_from_warm


@torch.no_grad()
def fold_in_items(tables: list[ShardedTable], trained: np.ndarray, graph: CSC | None, chunk: int) -> int:
    """Fill the rows of the other items in tables over the items, in place; returns how many of all ranks' items are
    near no trained one. Collective: every rank must call it.

    Args:
        trained: bool [items], over all ranks.
        graph: item-item graph, None: there is none.
        chunk: rows of a rank computed at once.
    """
    items = tables[0]
    mine = slice(items.start, items.stop)
    near = np.zeros(items.stop - items.start, bool)
    if graph is not None:
        edges = edges_from_warm(graph, trained, ~trained[mine], items.start)
        near = np.bincount(np.repeat(np.arange(len(near)), edges.degree), edges.weight, len(near)) > 0
        means = ShardedSpMM(edges.indptr, edges.indices, edges.weight, -items.start, items, items, chunk)
    for table in tables:
        rows = _mean_row(table, trained).expand(len(table.weight), -1).clone()
        for low, high, values in () if graph is None else means.sums(table):
            found = torch.from_numpy(near[low:high]).to(values.device)
            rows[low:high][found] = values[found]
        _fill(table, rows, ~trained[mine])
    return sum(items.comm.all_gather_int(int((~near & ~trained[mine]).sum())))


@torch.no_grad()
def fold_in_users(users: ShardedTable, trained: np.ndarray, wanted: np.ndarray, graphs: Graphs, chunk: int) -> int:
    """Fill the rows of the wanted users, in place; returns how many of them, on all ranks, share no item with a trained
    one. Collective: every rank must call it.

    Args:
        trained, wanted: bool [users], over all ranks.
        chunk: rows of a rank computed at once.
    """
    mine = slice(users.start, users.stop)
    known = torch.from_numpy(trained[mine]).to(users.weight)[:, None]
    nodes = graphs.nodes
    items = ShardedTable("items", graphs.items, users.width + 1, users.comm, trainable=False)
    of_items = ShardedSpMM(nodes.indptr, nodes.indices, None, graphs.users, items, users, chunk)
    for low, high, values in of_items.sums(users.with_values(torch.cat([users.weight * known, known], dim=1))):
        items.weight[low:high] = _means(values)
    of_users = ShardedSpMM(nodes.indptr, nodes.indices, None, 0, users, items, chunk, base=graphs.users)
    rows = _mean_row(users, trained).expand(len(users.weight), -1).clone()
    far = torch.from_numpy(wanted[mine].copy())
    for low, high, values in of_users.sums(items):
        values = _means(values)
        found = values[:, -1] > 0
        rows[low:high][found] = values[found, :-1]
        far[low:high] &= ~found.cpu()
    _fill(users, rows, wanted[mine])
    return sum(users.comm.all_gather_int(int(far.sum())))


def _means(sums: torch.Tensor) -> torch.Tensor:
    """Rows of sums with their count in the last column -> means, and 1 there; zeros stay zeros."""
    count = sums[:, -1:]
    return sums / torch.where(count > 0, count, 1)


def _mean_row(table: ShardedTable, trained: np.ndarray) -> torch.Tensor:
    """Mean of the trained rows, float32 [1, width]. A collective."""
    chosen = torch.from_numpy(trained[table.start : table.stop]).to(table.weight.device)
    total = table.comm.all_reduce(table.weight[chosen].double().sum(0, keepdim=True))
    return (total / max(int(trained.sum()), 1)).float()


def _fill(table: ShardedTable, rows: torch.Tensor, wanted: np.ndarray) -> None:
    """Local."""
    chosen = torch.from_numpy(wanted).to(rows.device)
    table.weight[chosen] = rows[chosen].to(table.weight.dtype)
