"""Cold items: what an item without a train interaction has instead of columns that are learned from interactions.

The mean of its nearest items by content, of those that have interactions, weighed as the item-item graph weighs them.
Its own id row says nothing: it was only ever a negative, or never looked at.
"""

from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.engine.inference import Incoming
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.collectives import World
from gtc_dist.model.table import RowTable


@dataclass
class ColdItems:
    """The cold items among this rank's rows, and their edges from warm ones."""

    mask: torch.Tensor  # bool [items of this rank, 1]
    edges: Incoming

    @staticmethod
    def of(graphs: Graphs, world: World, chunk: int) -> "ColdItems | None":
        """None where there is no item-item graph to know neighbours by. A collective."""
        if graphs.item_item is None:
            return None
        items = RowTable("items", graphs.items, 0, world, trainable=False)
        warm = warm_neighbours(graphs.item_item, graphs.item_degree > 0)
        mask = torch.from_numpy(graphs.item_degree[items.start : items.stop] == 0)[:, None]
        edges = Incoming(warm.indptr, warm.indices, warm.weight, 0, items, items, chunk)
        return ColdItems(mask.to(world.device), edges)

    def filled(self, items: RowTable) -> RowTable:
        """The table with the rows of cold items taken from their warm neighbours; zero where there are none. A
        collective."""
        means = torch.cat([values for _, _, values in self.edges.sums(items)])
        return items.holding(torch.where(self.mask, means, items.weight.float()))


def warm_neighbours(graph: CSC, warm: np.ndarray) -> CSC:
    """Of an item-item graph, the edges from warm items into cold ones; the weights of an item add to one."""
    count = np.diff(graph.indptr)
    kept = warm[graph.indices] & np.repeat(~warm, count)
    ends = np.concatenate([[0], np.cumsum(kept)])
    indptr, indices = ends[graph.indptr], graph.indices[kept]
    count, weight = np.diff(indptr), graph.weight[kept].astype(np.float64)
    total = np.zeros(len(count))
    np.add.at(total, np.repeat(np.arange(len(count)), count), weight)
    # opposed content has weight zero: then all alike
    alike = np.repeat(1 / np.maximum(count, 1), count)
    total = np.repeat(total, count)
    weight = np.divide(weight, total, out=alike, where=total > 0)
    return CSC(indptr.astype(np.int64), indices, weight.astype(np.float32))
