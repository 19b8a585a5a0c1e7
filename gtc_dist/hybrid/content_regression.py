"""Ridge regression from item content to item embeddings, fitted on warm items.

Warm items get out-of-fold predictions (10-fold), so they can simulate cold-start items in validation; cold items are
predicted by the fit on all. The content moments are computed once, the cross moments with the embeddings at every fit,
from a sample of the items in large catalogs, far more than there are weights.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch

from gtc_dist.data.hashing import index_bucket
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.hybrid.content_space import ContentSpace, sampled_rows

FOLDS = 10
DIRECTIONS = 256  # principal directions of a modality; the penalty leaves little of the others


class ContentRegression:
    """Regression for this rank's rows. The constructor is local; content moments are computed at the first fit. Methods
    are collectives unless marked Local.

    The regressors of an item are its modalities in a `ContentSpace` (zeros for a missing modality) and a constant. The
    penalty is the mean sum of squares of the content columns.

    Args:
        features: modality -> table of the items' features.
        warm: bool [items], over all ranks; only warm items are fitted.
        chunk: rows of a rank computed at once.
    """

    def __init__(self, features: dict[str, ShardedTable], warm: np.ndarray, chunk: int):
        self.features, self.chunk = features, chunk
        table = next(iter(features.values()))
        self.comm, rank_rows = table.comm, slice(table.start, table.stop)
        self.fitted = sampled_rows(table, warm)
        # fold FOLDS, of cold items, is the fit on all
        fold = np.where(warm[rank_rows], index_bucket(table.start, table.stop, FOLDS), FOLDS)
        self.fold = torch.from_numpy(fold).to(self.comm.device)

    @cached_property
    def space(self) -> ContentSpace:
        """Fitted on the first access."""
        return ContentSpace.fit(self.features, DIRECTIONS, self.fitted)

    @cached_property
    def factors(self) -> torch.Tensor:
        """Cholesky factors of the penalised content moments without each fold, and of all folds,
        float64 [FOLDS + 1, content, content]; computed on the first access."""
        moments = self._moments_by_fold(lambda rows, x: x)
        total = moments.sum(0)
        penalty = total.diagonal()[:-1].mean().clamp(min=1e-12) * torch.eye(len(total), device=total.device)
        return torch.linalg.cholesky(torch.cat([total - moments, total[None]]) + penalty)

    def fit(self, items: ShardedTable) -> torch.Tensor:
        """Coefficients float32 [FOLDS + 1, content, width of `items`]: without each fold, and of all folds."""
        moments = self._moments_by_fold(lambda rows, x: items.weight[rows].double())
        total = moments.sum(0)
        return torch.cholesky_solve(torch.cat([total - moments, total[None]]), self.factors).float()

    def predict(self, coefficients: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Local. Predicted rows of this rank's items, float32 [n, width]; out of fold for warm items.

        Args:
            chosen: int64 [n], the rows that are predicted; None: all.
        """
        chosen = torch.arange(len(self.fold), device=coefficients.device) if chosen is None else chosen
        out = torch.empty(len(chosen), coefficients.shape[2], device=coefficients.device)
        for rows, predicted in zip(chosen.split(self.chunk), out.split(self.chunk), strict=True):
            x, fold = self._regressors(rows).float(), self.fold[rows]
            for k in fold.unique().tolist():
                predicted[fold == k] = x[fold == k] @ coefficients[k]
        return out

    def predict_new(self, coefficients: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Local. Predicted rows [n, width] of items outside the catalog, from features [n, d] of each modality."""
        return self._with_constant(features).float() @ coefficients[-1]

    def _moments_by_fold(self, targets: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """X^T `targets(rows, X)` over the fitted items of each fold, float64 [FOLDS, content, w]."""
        sums = None
        for rows in self.fitted.split(self.chunk):
            x = self._regressors(rows)
            y = targets(rows, x)
            sums = x.new_zeros(FOLDS, x.shape[1], y.shape[1]) if sums is None else sums
            for k in range(FOLDS):
                in_fold = self.fold[rows] == k
                sums[k] += x[in_fold].T @ y[in_fold]
        return self.comm.all_reduce(sums)

    def _regressors(self, rows: torch.Tensor) -> torch.Tensor:
        return self._with_constant({name: table.weight[rows] for name, table in self.features.items()})

    def _with_constant(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Content and a column of ones, float64 [n, content]."""
        x = self.space.apply(features, missing_as_zero=True).double()
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1)
