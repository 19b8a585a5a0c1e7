"""Cold items: what an item without a train interaction has instead of columns that are learned from interactions.

Its own id row says nothing: it was only ever a negative, or never looked at. Two things are known of it by its content:

1. **Neighbours**: the mean of its nearest items by content, of those that have interactions, weighed as the item-item
   graph weighs them
2. **Regression** (`regression.py`): what a linear map from content to the embeddings of warm items makes of its own

Which of them is better depends on the catalog, and a warm item can stand for a cold one, as neither looks at its own
row. So it is chosen on the valid split with every item's embedding told by its content; and with it how much an item's
own content profile (`profile.py`) counts beside. Last comes the length of cold items' rows, which decides how many get
into the lists: the largest that costs the ranking of warm items no more than a given share of what it is worth without
cold items in the lists. Where less than a tenth of the items are cold, some warm ones stand for as many as are missing,
so that it also holds for items that arrive later.

All that ranks the valid split several times, so it is done for the epochs that are the best so far, which are kept.
"""

from collections.abc import Callable

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.engine.inference import Incoming
from gtc_dist.engine.regression import ContentRegression, hashed
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.collectives import World
from gtc_dist.model.table import RowTable

Pair = tuple[RowTable, RowTable]
# what embeddings are worth on the valid split; with bool [items], counting only these as positives. A collective.
Worth = Callable[[Pair, np.ndarray | None], float]
REGRESSION = "regression"  # 1 or 0: neighbours
OWN = "own"  # of an item's own profile
LIFT = "lift"  # of the whole row
OWN_STEPS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
LIFT_STEPS = (0.0, *(round(1.1**n, 3) for n in range(-12, 13)))

SHARE = 0.1  # of the items that are cold, or stand for cold ones, while the length is chosen


class WarmNeighbours:
    """Means over each item's warm neighbours in the item-item graph, over this rank's rows. A collective to make."""

    def __init__(self, graphs: Graphs, world: World, chunk: int):
        items = RowTable("items", graphs.items, 0, world, trainable=False)
        warm = graphs.item_degree > 0
        self.cold = torch.from_numpy(~warm[items.start : items.stop])[:, None].to(world.device)
        near = warm_neighbours(graphs.item_item, warm, items.start, items.stop)
        self.edges = Incoming(near.indptr, near.indices, near.weight, -items.start, items, items, chunk)

    def means(self, items: RowTable) -> torch.Tensor:
        """Of each of this rank's items, float32 [items, width]; zero where no neighbour is warm. A collective."""
        return torch.cat([values for _, _, values in self.edges.sums(items)])

    def filled(self, items: RowTable) -> RowTable:
        """The table with the rows of cold items taken from their neighbours. A collective."""
        return items.holding(torch.where(self.cold, self.means(items), items.weight.float()))


class ColdItems:
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
        self.lacking = cold | (hashed(0, len(cold), 10_000) < 10_000 * (SHARE - cold.mean()))
        self.weights = {REGRESSION: float(neighbours is None), OWN: 1.0, LIFT: 1.0}

    @staticmethod
    def of(
        graphs: Graphs,
        features: dict[str, RowTable],
        world: World,
        chunk: int,
        neighbours: WarmNeighbours | None,
        loss: float = 0.01,
    ) -> "ColdItems | None":
        """None where nothing is known of an item but its interactions."""
        cold = graphs.item_degree == 0
        regression = ContentRegression(features, ~cold, chunk) if features and not cold.all() else None
        return None if neighbours is None and regression is None else ColdItems(cold, neighbours, regression, loss)

    def filled(self, pair: Pair, profiles: dict[str, slice]) -> Pair:
        """Embeddings with the rows of cold items told by their content. A collective.

        Args:
            profiles: modality -> columns of the items' own content profiles.
        """
        if not self.cold.any():
            return pair
        return self._replaced(pair, self._told(pair[1], profiles, self.weights), self.cold, self.weights[LIFT])

    def choose(self, pair: Pair, profiles: dict[str, slice], worth: Worth) -> None:
        """The weights, from what was chosen before. A collective."""
        everything = np.ones_like(self.cold)
        tried: dict[tuple, float] = {}

        def alone(weights: dict[str, float]) -> float:
            key = weights[REGRESSION], weights[OWN]
            if key not in tried:
                tried[key] = worth(self._replaced(pair, self._told(pair[1], profiles, weights), everything, 1.0), None)
            return tried[key]

        forms = [float(form) for form, has in enumerate((self.neighbours, self.regression)) if has is not None]
        choices = {REGRESSION: tuple(forms)} | ({OWN: OWN_STEPS} if profiles else {})
        for _ in range(2 if profiles else 1):  # once more, as the one may change the other
            for name, steps in choices.items():
                while (best := max(nearby(self.weights, name, steps), key=alone)) != self.weights:
                    self.weights = best
        self._choose_lift(pair, self._told(pair[1], profiles, self.weights), worth)

    def _choose_lift(self, pair: Pair, told: torch.Tensor, worth: Worth) -> None:
        """The largest that costs no more than it may, from the last choice on."""

        def value(at: int) -> float:
            return worth(self._replaced(pair, told, self.lacking, LIFT_STEPS[at]), ~self.lacking)

        least = (1 - self.loss) * value(0)

        def fits(at: int) -> bool:
            return value(at) >= least

        at = LIFT_STEPS.index(self.weights[LIFT])
        while at and not fits(at):
            at -= 1
        while at + 1 < len(LIFT_STEPS) and fits(at + 1):
            at += 1
        self.weights = {**self.weights, LIFT: LIFT_STEPS[at]}

    def _told(self, items: RowTable, profiles: dict[str, slice], weights: dict[str, float]) -> torch.Tensor:
        """What content says of each of this rank's items, float32 [items, width]. A collective."""
        regression, neighbours = self.regression, self.neighbours
        rows = regression.told(regression.fit(items)) if weights[REGRESSION] else neighbours.means(items)
        for columns in profiles.values():
            rows[:, columns] = weights[OWN] * items.weight[:, columns]
        return rows

    @staticmethod
    def _replaced(pair: Pair, told: torch.Tensor, which: np.ndarray, lift: float) -> Pair:
        items = pair[1]
        own = torch.from_numpy(which[items.start : items.stop]).to(told.device)[:, None]
        return pair[0], items.holding(torch.where(own, lift * told, items.weight.float()))


def nearby(weights: dict[str, float], name: str, steps: tuple[float, ...], reach: int = 1) -> list[dict[str, float]]:
    """The weights themselves, which win where others are worth as much, and those with one of them moved by up to
    `reach` steps."""
    at = min(range(len(steps)), key=lambda n: abs(steps[n] - weights[name]))
    moved = [*steps[max(at - reach, 0) : at], *steps[at + 1 : at + reach + 1]]
    return [weights, *({**weights, name: one} for one in moved)]


def warm_neighbours(graph: CSC, warm: np.ndarray, start: int, stop: int) -> CSC:
    """Of an item-item graph, the edges from warm items into those from `start` to `stop`, by item less `start`; the
    weights of an item add to one."""
    edges = slice(int(graph.indptr[start]), int(graph.indptr[stop]))
    kept = warm[graph.indices[edges]]
    ends = np.concatenate([[0], np.cumsum(kept)])
    indptr = ends[graph.indptr[start : stop + 1] - edges.start]
    indices, weight = graph.indices[edges][kept], graph.weight[edges][kept].astype(np.float64)
    count = np.diff(indptr)
    item = np.repeat(np.arange(len(count)), count)
    total = np.bincount(item, weights=weight, minlength=len(count))[item]
    # opposed content has weight zero: then all alike
    weight = np.divide(weight, total, out=(1 / np.maximum(count, 1))[item], where=total > 0)
    return CSC(indptr.astype(np.int64), indices, weight.astype(np.float32))
