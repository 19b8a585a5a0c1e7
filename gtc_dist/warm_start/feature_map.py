"""From the features of an earlier catalog to those of a grown one.

prepare fits the standardisation of features, and their PCA, to the items of the catalog, so the same vector has other
features in a grown catalog. Both transforms are affine and stored, so weights that act on the earlier features
can be rewritten to give the same values on the new ones: exactly without PCA, with it up to what the components leave
out.
"""

from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.data.catalog import Catalog
from gtc_dist.data.feature_transform import FeatureTransform


@dataclass(frozen=True)
class FeatureMap:
    """Of one modality, from the transform of the earlier catalog to that of the present one."""

    earlier: FeatureTransform
    now: FeatureTransform

    @staticmethod
    def between(earlier: Catalog, catalog: Catalog, modality: str) -> "FeatureMap":
        return FeatureMap(*(FeatureTransform.load(each.uri, modality) for each in (earlier, catalog)))

    @property
    def is_identity(self) -> bool:
        pairs = [(getattr(self.earlier, part), getattr(self.now, part)) for part in ("mean", "scale", "components")]
        return all(a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs)

    @property
    def mean_stretch(self) -> float:
        """By how much earlier features are longer than present ones, root of the mean square over directions."""
        stretch = self.weights(torch.eye(len(self.earlier.scale), dtype=torch.float64))
        return float(stretch.square().sum() / max(np.count_nonzero(self.now.scale), 1)) ** 0.5

    def points(self, features: torch.Tensor) -> torch.Tensor:
        """Features [n, d] in the earlier catalog -> those of the same vectors in the present one, float64."""
        raw = _dense(features) * self.earlier.scale
        raw = raw if self.earlier.components is None else raw @ self.earlier.components
        raw = raw + self.earlier.mean - self.now.mean
        raw = raw if self.now.components is None else raw @ self.now.components.T
        return torch.from_numpy(raw * _inverse(self.now.scale)).to(features.device)

    def weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights [k, d] that multiply earlier features -> those that give the same on present ones, but for
        `offset`."""
        raw = self._on_raw(weights)
        raw = raw if self.now.components is None else raw @ self.now.components.T
        return torch.from_numpy(raw * self.now.scale).to(weights)

    def offset(self, weights: torch.Tensor) -> torch.Tensor:
        """What weights [k, d] of earlier features give where the present features are 0, [k]."""
        return torch.from_numpy(self._on_raw(weights) @ (self.now.mean - self.earlier.mean)).to(weights)

    def _on_raw(self, weights: torch.Tensor) -> np.ndarray:
        """Weights that act on raw vectors less their mean in the earlier catalog, [k, raw width]."""
        scaled = _dense(weights) * _inverse(self.earlier.scale)
        return scaled if self.earlier.components is None else scaled @ self.earlier.components


def _dense(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, 0 for a dimension without variance."""
    return np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
