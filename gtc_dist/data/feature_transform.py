"""The transform from raw feature vectors to catalog features: standardisation, or PCA on one common scale.

prepare fits it (prepare/features.py) and stores it in the catalog; new items go through the same transform.
"""

from dataclasses import dataclass

import numpy as np

from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import CatalogWriter

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class FeatureTransform:
    """Maps raw vectors x of a modality to (x - mean) @ components.T / scale; without PCA there are no components.

    Attributes:
        mean: float64 [raw width].
        scale: float64 [width]: without PCA the standard deviation of each dimension, 0 for one without variance,
            which becomes 0; with PCA one common scale, repeated.
        components: float64 [width, raw width], or None.
    """

    mean: np.ndarray
    scale: np.ndarray
    components: np.ndarray | None = None

    @property
    def width(self) -> int:
        return len(self.scale)

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Raw vectors [n, raw width] -> float16 [n, width], clipped to the range of float16."""
        x = raw.astype(np.float64) - self.mean
        if self.components is not None:
            x = x @ self.components.T
        x *= np.divide(1.0, self.scale, out=np.zeros_like(self.scale), where=self.scale > 0)
        return np.clip(x, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)

    def save(self, writer: CatalogWriter, modality: str) -> None:
        """Write the arrays beside the modality's features."""
        writer.array(f"features/{modality}/mean.npy", self.mean)
        writer.array(f"features/{modality}/std.npy", self.scale)
        if self.components is not None:
            writer.array(f"features/{modality}/components.npy", self.components)

    @classmethod
    def load(cls, catalog_uri: str, modality: str) -> "FeatureTransform":
        """Read the transform of a catalog's modality, to apply it to new raw vectors."""
        folder = storage.join(catalog_uri, "features", modality)
        parts = [storage.join(folder, f"{part}.npy") for part in ("mean", "std", "components")]
        arrays = [formats.read_array(uri) for uri in parts[:2]]
        return cls(*arrays, formats.read_array(parts[2]) if storage.exists(parts[2]) else None)
