"""What content says of an item's embedding: ridge regression from features to the rows of warm items.

Of an item that is warm itself it is told by a fit without it (one of `FOLDS`), so that warm items can stand for cold
ones where something is chosen. The moments of the content are computed once, those with the embeddings at every fit, of
`MOST_ITEMS` items at most: there are far fewer weights than that.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch

from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.ranking import hash_index
from gtc_dist.hybrid.content_profile import ContentMap

FOLDS = 10
MOST_ITEMS = 1 << 18
DIRECTIONS = 256  # of a modality that are used; the penalty leaves little of those beyond


class ContentRegression:
    """Over this rank's rows. Making one costs nothing; the first fit makes the moments of the content.

    The content of an item is that of its modalities side by side, each centred, of length one and on its principal
    directions (zeros where it has none), and a one. The penalty is the mean square sum of its columns.

    Args:
        features: modality -> table of the items' features.
        warm: bool [items], of all ranks; only these are fitted to.
        chunk: rows of a rank at once.
    """

    def __init__(self, features: dict[str, ShardedTable], warm: np.ndarray, chunk: int):
        self.features, self.chunk = features, chunk
        table = next(iter(features.values()))
        self.comm, own = table.comm, slice(table.start, table.stop)
        fitted = warm[own] & (numbered(table.start, table.stop, 1 << 30) < (1 << 30) * MOST_ITEMS / max(warm.sum(), 1))
        self.fitted = torch.from_numpy(np.flatnonzero(fitted)).to(self.comm.device)
        # cold items are told by the fit of all
        fold = np.where(warm[own], numbered(table.start, table.stop, FOLDS), FOLDS)
        self.fold = torch.from_numpy(fold).to(self.comm.device)

    @cached_property
    def maps(self) -> dict[str, ContentMap]:
        """A collective, the first time."""
        return {name: ContentMap.of(table, DIRECTIONS, self.fitted) for name, table in self.features.items()}

    @cached_property
    def factors(self) -> torch.Tensor:
        """Of the moments of the content without each fold, and of all, [FOLDS + 1, content, content], with the penalty.
        A collective, the first time."""
        moments = self._by_fold(lambda rows, x: x)
        total = moments.sum(0)
        penalty = total.diagonal()[:-1].mean().clamp(min=1e-12) * torch.eye(len(total), device=total.device)
        return torch.linalg.cholesky(torch.cat([total - moments, total[None]]) + penalty)

    def fit(self, items: ShardedTable) -> torch.Tensor:
        """Weights [FOLDS + 1, content, width of `items`], float32: without each fold, and of all. A collective."""
        moments = self._by_fold(lambda rows, x: items.weight[rows].double())
        total = moments.sum(0)
        return torch.cholesky_solve(torch.cat([total - moments, total[None]]), self.factors).float()

    def told(self, fit: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of this rank's items, float32 [items, width]: of warm ones by the fit without them.

        Args:
            chosen: int64 [n], those that are wanted, others are zero; None: all.
        """
        out = torch.zeros(len(self.fold), fit.shape[2], device=fit.device)
        chosen = torch.arange(len(self.fold), device=fit.device) if chosen is None else chosen
        for rows in chosen.split(self.chunk):
            x, fold = self._content(rows).float(), self.fold[rows]
            for k in fold.unique().tolist():
                out[rows[fold == k]] = x[fold == k] @ fit[k]
        return out

    def new(self, fit: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rows [n, width] of items that are not in the catalog, from features [n, d] of each modality."""
        return self._joint(features).float() @ fit[-1]

    def _by_fold(self, values: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Sum of content times `values(rows, content)` over the fitted items of each fold, float64 [FOLDS, content, w].
        A collective."""
        sums = None
        for rows in self.fitted.split(self.chunk):
            x = self._content(rows)
            y = values(rows, x)
            sums = x.new_zeros(FOLDS, x.shape[1], y.shape[1]) if sums is None else sums
            for k in range(FOLDS):
                own = self.fold[rows] == k
                sums[k] += x[own].T @ y[own]
        return self.comm.all_reduce(sums)

    def _content(self, rows: torch.Tensor) -> torch.Tensor:
        return self._joint({name: table.weight[rows] for name, table in self.features.items()})

    def _joint(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """float64 [n, content]."""
        parts = []
        for name, values in features.items():
            present = (values != 0).any(dim=1, keepdim=True)
            parts.append(torch.where(present, self.maps[name].apply(values), 0).double())
        return torch.cat([*parts, parts[0].new_ones(len(parts[0]), 1)], dim=1)


def numbered(start: int, stop: int, below: int) -> np.ndarray:
    """A number below `below` for each index from `start` to `stop`, int64: by a hash, whatever rank has the index."""
    return ((hash_index(np.arange(start, stop)) >> np.uint64(32)) % np.uint64(below)).astype(np.int64)
