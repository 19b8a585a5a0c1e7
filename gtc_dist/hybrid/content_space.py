"""The two spaces in which items' contents are compared: unit vectors per modality, side by side.

- `ContentSpace` is fitted: each modality is centred over the items, scaled to unit rows (so that dot products are
  cosines) and projected on its principal directions. Used for content profiles and by the regression.
- `weighted_unit_rows` fits nothing: unit rows scaled by modality weights, the similarity of the item-item graph, which
  `graph/item_knn_graph.py` computes out of core for catalogs that do not fit in memory. Used for new items.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from gtc_dist.data.hashing import index_bucket
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.hybrid.embeddings import row_blocks

MAX_FITTED_ITEMS = 1 << 18  # far more than there are directions


@dataclass(frozen=True)
class ModalityMap:
    """Features of one modality to centred unit rows in its principal directions.

    mean: float64 [d]. directions: float64 [d, k]; None: no projection, k = d.
    """

    mean: torch.Tensor
    directions: torch.Tensor | None = None

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """Features [n, d] to float32 [n, k]. Rows have length one before the projection."""
        return torch.cat([self._apply_block(block) for block in row_blocks(features)])

    def _apply_block(self, features: torch.Tensor) -> torch.Tensor:
        rows = normalize(features.double() - self.mean, dim=1)
        return (rows if self.directions is None else rows @ self.directions).float()


@dataclass(frozen=True)
class ContentSpace:
    """Fitted maps of the modalities, in the order of their columns."""

    maps: dict[str, ModalityMap]

    @staticmethod
    def fit(features: dict[str, ShardedTable], width: int, fitted: torch.Tensor | None = None) -> "ContentSpace":
        """Mean and leading principal directions of each modality. Collective: every rank must call it.

        Args:
            features: modality -> table of the items' features.
            width: columns of each modality; all of them without projection where it is not wider.
            fitted: int64 [n], rows of this rank that are used; None: `sampled_rows`.
        """
        return ContentSpace(
            {
                name: _fit_modality(table, width, sampled_rows(table) if fitted is None else fitted)
                for name, table in features.items()
            }
        )

    def apply(self, features: dict[str, torch.Tensor], missing_as_zero: bool = False) -> torch.Tensor:
        """Local. Joint content vectors float32 [n, k].

        Args:
            features: modality -> [n, d].
            missing_as_zero: items whose features are all zero have no content: zeros instead of the centred row.
        """
        parts = []
        for name, modality in self.maps.items():
            rows = modality.apply(features[name])
            if missing_as_zero:
                rows = torch.where((features[name] != 0).any(dim=1, keepdim=True), rows, 0)
            parts.append(rows)
        return _side_by_side(parts)


def sampled_rows(table: ShardedTable, among: np.ndarray | None = None) -> torch.Tensor:
    """Local. Rows of this rank that moments of content are computed from, int64 [n]: a sample by hash, with about
    `MAX_FITTED_ITEMS` rows over all ranks.

    Args:
        among: bool [rows of the whole table], only these; None: all.
    """
    among = np.ones(table.rows, bool) if among is None else among
    chance = MAX_FITTED_ITEMS / max(among.sum(), 1)
    sampled = index_bucket(table.start, table.stop, 1 << 30) < (1 << 30) * chance
    return torch.from_numpy(np.flatnonzero(among[table.start : table.stop] & sampled)).to(table.comm.device)


def weighted_unit_rows(features: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """Joint content vectors float32 [n, all d], whose dot products are weighted means of the modalities' cosines.

    Args:
        features: modality -> [n, d].
        weights: of the same modalities, with a sum above 0.
    """
    total, parts = sum(weights.values()), []
    for name, weight in weights.items():
        scale = (weight / total) ** 0.5
        units = [normalize(block.float(), dim=1) * scale for block in row_blocks(features[name])]
        parts.append(torch.cat(units))
    return _side_by_side(parts)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _fit_modality(table: ShardedTable, width: int, fitted: torch.Tensor) -> ModalityMap:
    comm, rows = table.comm, table.weight if len(fitted) == len(table.weight) else table.weight[fitted]
    blocks = row_blocks(rows)
    count = sum(comm.all_gather_int(len(rows)))
    mean = comm.all_reduce(sum(block.double().sum(0) for block in blocks)) / max(count, 1)
    if width >= table.width:
        return ModalityMap(mean)
    units = (normalize(block.double() - mean, dim=1) for block in blocks)
    second = comm.all_reduce(sum(rows.T @ rows for rows in units))
    return ModalityMap(mean, torch.linalg.eigh((second + second.T) / 2)[1][:, -width:])
