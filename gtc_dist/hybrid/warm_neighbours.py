"""Neighbour means for cold-start items: the mean embedding of an item's warm neighbours in the item-item graph."""

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_spmm import ShardedSpMM
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs


class WarmNeighbours:
    """Means over warm neighbours, weighted by content similarity, for this rank's rows. The constructor and the methods
    are collectives.

    cold_rows: int64 [n], cold items among this rank's rows, ascending.

    Args:
        chunk: rows of a rank computed at once.
    """

    def __init__(self, graphs: Graphs, comm: Communicator, chunk: int):
        self.graph, self.warm, self.chunk = graphs.item_item, graphs.item_degree > 0, chunk
        items = ShardedTable("items", graphs.items, 0, comm, trainable=False)
        self.cold_rows = torch.from_numpy(np.flatnonzero(~self.warm[items.start : items.stop])).to(comm.device)
        self.edges_into_cold = self._edges_into(items, ~self.warm)

    def of_all(self, items: ShardedTable) -> torch.Tensor:
        """Mean of each item's warm neighbours, float32 [items, width]; zeros where no similar item is warm."""
        means = items.weight.new_empty(items.weight.shape, dtype=torch.float32)
        for low, high, values in self._edges_into(items, np.ones_like(self.warm)).sums(items):
            means[low:high] = values
        return means

    def of_cold(self, items: ShardedTable) -> torch.Tensor:
        """Mean of the warm neighbours of each of this rank's cold items (`cold_rows`), float32 [n, width]; zeros where
        no similar item is warm."""
        rows = self.cold_rows
        means = items.weight.new_empty((len(rows), items.width), dtype=torch.float32)
        for low, high, values in self.edges_into_cold.sums(items):
            first, last = torch.searchsorted(rows, rows.new_tensor([low, high])).tolist()
            means[first:last] = values[rows[first:last] - low]
        return means

    def impute(self, items: ShardedTable) -> ShardedTable:
        """A copy of the table with the rows of cold items replaced by the means of their warm neighbours."""
        return items.with_values(items.weight.float().index_copy(0, self.cold_rows, self.of_cold(items)))

    def _edges_into(self, items: ShardedTable, wanted: np.ndarray) -> ShardedSpMM:
        """Edges from warm items into this rank's items of `wanted`, bool [items]."""
        kept = edges_from_warm(self.graph, self.warm, wanted[items.start : items.stop], items.start)
        return ShardedSpMM(kept.indptr, kept.indices, kept.weight, -items.start, items, items, self.chunk)


def edges_from_warm(graph: CSC, warm: np.ndarray, wanted: np.ndarray, start: int = 0) -> CSC:
    """Edges of an item-item graph from warm items into wanted ones. The weights into an item sum to one, or are all
    zero where it is similar to no warm item.

    Args:
        warm: bool [items].
        wanted: bool [n], for the items from `start` on, which are destinations 0, 1, ... of the result.
    """
    stop = start + len(wanted)
    edges = slice(int(graph.indptr[start]), int(graph.indptr[stop]))
    kept = warm[graph.indices[edges]] & np.repeat(wanted, np.diff(graph.indptr[start : stop + 1]))
    ends = np.concatenate([[0], np.cumsum(kept)])
    indptr = ends[graph.indptr[start : stop + 1] - edges.start]
    indices, weight = graph.indices[edges][kept], graph.weight[edges][kept].astype(np.float64)
    item = np.repeat(np.arange(len(wanted)), np.diff(indptr))
    total = np.bincount(item, weights=weight, minlength=len(wanted))[item]
    weight = weight / np.where(total > 0, total, 1)
    return CSC(indptr.astype(np.int64), indices, weight.astype(np.float32))
