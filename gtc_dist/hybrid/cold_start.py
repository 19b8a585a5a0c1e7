"""Cold items: what an item without a train interaction has instead of columns that are learned from interactions.

Its own id row says nothing: it was only ever a negative, or never looked at. Two things are known of it by its content:

1. **Neighbours**: the mean of its nearest items by content, of those that have interactions, weighed as the item-item
   graph weighs them
2. **Regression** (`regression.py`): what a linear map from content to the embeddings of warm items makes of its own

Which of them is better depends on the catalog, and a warm item can stand for a cold one, as neither looks at its own
row (what its neighbours have of it over the graphs is left, which flatters them a little). So it is chosen on the valid
split with every item's embedding told by its content; and with it how much an item's own content profile (`profile.py`)
counts beside. Last comes the length of cold items' rows, which decides how many get into the lists: the largest that
costs the ranking of warm items no more than a given share of what it is worth without cold items in the lists. Where
less than a tenth of the items are cold, some warm ones stand for as many as are missing, so that it also holds for
items that arrive later.

All that ranks the valid split several times, so it is done for the epochs that are the best so far, which are kept.
"""

from collections.abc import Callable

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.content_regression import ContentRegression, numbered
from gtc_dist.hybrid.coordinate_search import Embeddings, grid_neighbours, nearest_step
from gtc_dist.inference.layerwise import ShardedSpMM

# what embeddings are worth on the valid split; with bool [items], counting only these as positives. A collective.
Objective = Callable[[Embeddings, np.ndarray | None], float]
REGRESSION = "regression"  # 1 or 0: neighbours
CONTENT_WEIGHT = "own"  # of an item's own profile
NORM_SCALE = "lift"  # of the whole row
CONTENT_WEIGHT_STEPS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
NORM_SCALE_STEPS = (0.0, *(round(1.1**n, 3) for n in range(-12, 13)))

SHARE = 0.1  # of the items that are cold, or stand for cold ones, while the length is chosen


class WarmNeighbours:
    """Means over items' warm neighbours in the item-item graph, for this rank's rows. A collective to make."""

    def __init__(self, graphs: Graphs, comm: Communicator, chunk: int):
        self.graph, self.warm, self.chunk = graphs.item_item, graphs.item_degree > 0, chunk
        items = ShardedTable("items", graphs.items, 0, comm, trainable=False)
        self.cold = torch.from_numpy(~self.warm[items.start : items.stop])[:, None].to(comm.device)
        self.edges = self._into(items, ~self.warm)

    def of_all(self, items: ShardedTable) -> torch.Tensor:
        """Of each of this rank's items, float32 [items, width]; zero where no similar one is warm. A collective."""
        return self._means(self._into(items, np.ones_like(self.warm)), items)

    def of_cold(self, items: ShardedTable) -> torch.Tensor:
        """The same, zero for warm items too. A collective."""
        return self._means(self.edges, items)

    def filled(self, items: ShardedTable) -> ShardedTable:
        """The table with the rows of cold items taken from their neighbours. A collective."""
        return items.holding(torch.where(self.cold, self.of_cold(items), items.weight.float()))

    def _into(self, items: ShardedTable, wanted: np.ndarray) -> ShardedSpMM:
        """The edges from warm items into those of this rank's that are wanted."""
        near = warm_neighbours(self.graph, self.warm, wanted[items.start : items.stop], items.start)
        return ShardedSpMM(near.indptr, near.indices, near.weight, -items.start, items, items, self.chunk)

    @staticmethod
    def _means(edges: ShardedSpMM, items: ShardedTable) -> torch.Tensor:
        return torch.cat([values for _, _, values in edges.sums(items)])


class ColdStart:
    """What cold items have in the final embeddings.

    Args:
        cold: bool [items], of all ranks.
        neighbours: None: there is no item-item graph.
        regression: None: no item has content.
        loss: what cold items in the lists may cost warm ones, a share of what rankings are worth without.
    """

    def __init__(
        self,
        cold: np.ndarray,
        neighbours: WarmNeighbours | None,
        regression: ContentRegression | None,
        loss: float,
    ):
        self.cold, self.neighbours, self.regression, self.loss = cold, neighbours, regression, loss
        self.weights = self.start()
        # cold, or standing for cold ones while the length is chosen; by a hash of the index
        self.lacking = cold | (numbered(0, len(cold), 10_000) < 10_000 * (SHARE - cold.mean()))

    @staticmethod
    def of(
        graphs: Graphs,
        features: dict[str, ShardedTable],
        comm: Communicator,
        chunk: int,
        neighbours: WarmNeighbours | None,
        loss: float = 0.01,
    ) -> "ColdStart | None":
        """None where nothing is known of an item but its interactions."""
        cold = graphs.item_degree == 0
        regression = ContentRegression(features, ~cold, chunk) if features and not cold.all() else None
        return None if neighbours is None and regression is None else ColdStart(cold, neighbours, regression, loss)

    def start(self) -> dict[str, float]:
        """The weights before anything is chosen."""
        return {REGRESSION: float(self.neighbours is None), CONTENT_WEIGHT: 1.0, NORM_SCALE: 1.0}

    def filled(self, pair: Embeddings, profiles: dict[str, slice]) -> Embeddings:
        """Embeddings with the rows of cold items told by their content. A collective.

        Args:
            profiles: modality -> columns of the items' own content profiles.
        """
        if not self.cold.any():
            return pair
        users, items = pair
        if self.weights[REGRESSION]:
            told = self.regression.told(self.regression.fit(items), self._own(self.cold, items))
        else:
            told = self.neighbours.of_cold(items)
        told = self._with_profiles(told, items, profiles, self.weights[CONTENT_WEIGHT])
        return users, self._replaced(items, told, self.cold, self.weights[NORM_SCALE])

    def choose(self, pair: Embeddings, profiles: dict[str, slice], worth: Objective) -> None:
        """The weights, from what was chosen before. A collective."""
        users, items = pair
        told: dict[float, torch.Tensor] = {}  # by form, one at a time: it is as large as the embeddings
        tried: dict[tuple, float] = {}

        def tell(weights: dict[str, float]) -> torch.Tensor:
            form = weights[REGRESSION]
            if form not in told:
                told.clear()
                regression, neighbours = self.regression, self.neighbours
                told[form] = regression.told(regression.fit(items)) if form else neighbours.of_all(items)
            return self._with_profiles(told[form], items, profiles, weights[CONTENT_WEIGHT])

        def alone(weights: dict[str, float]) -> float:
            key = weights[REGRESSION], weights[CONTENT_WEIGHT]
            if key not in tried:
                tried[key] = worth((users, items.holding(tell(weights))), None)
            return tried[key]

        forms = [float(form) for form, has in enumerate((self.neighbours, self.regression)) if has is not None]
        choices = {REGRESSION: tuple(forms)} | ({CONTENT_WEIGHT: CONTENT_WEIGHT_STEPS} if profiles else {})
        for _ in range(2 if profiles else 1):  # once more, as the one may change the other
            for name, steps in choices.items():
                while (best := max(grid_neighbours(self.weights, name, steps), key=alone)) != self.weights:
                    self.weights = best
        self._choose_lift(pair, tell(self.weights), worth)

    def _choose_lift(self, pair: Embeddings, told: torch.Tensor, worth: Objective) -> None:
        """The largest that costs no more than it may, from the last choice on. Rows of zeros score zero, which is not
        in a list as long as there are enough items that score more."""
        users, items = pair
        tried: dict[int, float] = {}

        def value(at: int) -> float:
            if at not in tried:
                lifted = self._replaced(items, told, self.lacking, NORM_SCALE_STEPS[at])
                tried[at] = worth((users, lifted), ~self.lacking)
            return tried[at]

        least = (1 - self.loss) * value(0)
        if not least > 0:
            return  # warm items are not found at all: there is nothing to measure a loss by
        at = nearest_step(NORM_SCALE_STEPS, self.weights[NORM_SCALE])
        while value(at) < least:
            at -= 1
        while at + 1 < len(NORM_SCALE_STEPS) and value(at + 1) >= least:
            at += 1
        self.weights = {**self.weights, NORM_SCALE: NORM_SCALE_STEPS[at]}

    @staticmethod
    def _with_profiles(
        told: torch.Tensor, items: ShardedTable, profiles: dict[str, slice], weight: float
    ) -> torch.Tensor:
        """The rows with an item's own profiles in their columns, in place."""
        for columns in profiles.values():
            torch.mul(items.weight[:, columns], weight, out=told[:, columns])
        return told

    def _replaced(self, items: ShardedTable, told: torch.Tensor, which: np.ndarray, lift: float) -> ShardedTable:
        """The table with some of the rows, bool [items], told by content."""
        rows, own = items.weight.float().clone(), self._own(which, items)
        rows[own] = lift * told[own]
        return items.holding(rows)

    @staticmethod
    def _own(which: np.ndarray, items: ShardedTable) -> torch.Tensor:
        """Those of this rank's rows that are in bool [items], int64 [n]."""
        return torch.from_numpy(np.flatnonzero(which[items.start : items.stop])).to(items.comm.device)


def warm_neighbours(graph: CSC, warm: np.ndarray, wanted: np.ndarray, start: int = 0) -> CSC:
    """Of an item-item graph, the edges from warm items into wanted ones; the weights of an item add to one, or are all
    zero where it is similar to no warm one.

    Args:
        warm: bool [items]; wanted: bool [n], of the items from `start` on, which are 0, 1, ... in the result.
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
