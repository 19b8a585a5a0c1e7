"""What content says of an item's embedding: ridge regression from features to the rows of warm items.

Of an item that is warm itself it is told by a fit without it (one of `FOLDS`), so that warm items can stand for cold
ones where something is chosen. The moments of the content are computed once, those with the embeddings at every fit.
"""

from collections.abc import Iterator

import numpy as np
import torch

from gtc_dist.engine.profile import ContentMap
from gtc_dist.model.table import RowTable

FOLDS = 10
DIRECTIONS = 256  # of a modality that are used; the penalty leaves little of those beyond


class ContentRegression:
    """Over this rank's rows; a collective to make, and to fit.

    The content of an item is that of its modalities side by side, each centred, of length one and on its principal
    directions (zeros where it has none), and a one. The penalty is the mean square sum of its columns.

    Args:
        features: modality -> table of the items' features.
        warm: bool [items of this rank]; only these are fitted to.
        chunk: rows of a rank at once.
    """

    def __init__(self, features: dict[str, RowTable], warm: torch.Tensor, chunk: int):
        self.features, self.warm, self.chunk = features, warm, chunk
        table = next(iter(features.values()))
        self.world = table.world
        self.fold = torch.from_numpy(hashed(table.start, table.stop, FOLDS)).to(self.world.device)
        self.maps = {name: ContentMap.of(table, DIRECTIONS) for name, table in features.items()}
        moments = self._by_fold(lambda rows, x: x)
        total = moments.sum(0)
        width = len(total)
        penalty = total.diagonal()[:-1].mean().clamp(min=1e-12) * torch.eye(width, device=total.device)
        # of all items last, which is what cold ones are told by
        self.factors = torch.linalg.cholesky(torch.cat([total - moments, total[None]]) + penalty)

    def fit(self, items: RowTable) -> torch.Tensor:
        """Weights [FOLDS + 1, content, width of `items`], float32: without each fold, and of all warm items."""
        moments = self._by_fold(lambda rows, x: items.weight[rows].double())
        total = moments.sum(0)
        return torch.cholesky_solve(torch.cat([total - moments, total[None]]), self.factors).float()

    def told(self, fit: torch.Tensor) -> torch.Tensor:
        """Rows of all of this rank's items, float32 [items, width]: of warm ones by the fit without them."""
        out = torch.empty(len(self.warm), fit.shape[2], device=fit.device)
        for rows in self._chunks():
            x, fold = self._content(rows).float(), torch.where(self.warm[rows], self.fold[rows], FOLDS)
            for k in fold.unique().tolist():
                out[rows][fold == k] = x[fold == k] @ fit[k]
        return out

    def new(self, fit: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rows [n, width] of items that are not in the catalog, from features [n, d] of each modality."""
        return self._joint(features).float() @ fit[-1]

    def _by_fold(self, values) -> torch.Tensor:
        """Sum of content times `values(rows, content)` over the warm items of each fold, float64 [FOLDS, content, w]. A
        collective."""
        sums = None
        for rows in self._chunks():
            x = self._content(rows)
            y = values(rows, x)
            sums = x.new_zeros(FOLDS, x.shape[1], y.shape[1]) if sums is None else sums
            for k in range(FOLDS):
                own = (self.fold[rows] == k) & self.warm[rows]
                sums[k] += x[own].T @ y[own]
        return self.world.sum(sums)

    def _content(self, rows: slice) -> torch.Tensor:
        return self._joint({name: table.weight[rows] for name, table in self.features.items()})

    def _joint(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """float64 [n, content]."""
        parts = []
        for name, values in features.items():
            present = (values != 0).any(dim=1, keepdim=True)
            parts.append(torch.where(present, self.maps[name].apply(values), 0).double())
        return torch.cat([*parts, parts[0].new_ones(len(parts[0]), 1)], dim=1)

    def _chunks(self) -> Iterator[slice]:
        rows = len(self.warm)
        return (slice(first, min(first + self.chunk, rows)) for first in range(0, max(rows, 1), self.chunk))


def hashed(start: int, stop: int, below: int) -> np.ndarray:
    """A number below `below` for each index from `start` to `stop`, int64: by a hash, whatever rank has the index."""
    mixed = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return ((mixed >> np.uint64(32)) % np.uint64(below)).astype(np.int64)
