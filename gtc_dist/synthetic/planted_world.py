"""The ground truth of a synthetic dataset: item factors, popularity, tastes of groups, and features of items."""

import zlib
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from gtc_dist.synthetic.choice import ChoicePool, dot_rows
from gtc_dist.synthetic.spec import Spec

FEATURE_ITEMS = 1 << 13  # items whose features are computed at once


class PlantedWorld:
    """The ground truth shared by all chunks.

    factors float32 [items, K]; log_popularity float32 [items]; cold bool [items]; item_ids int64 [items];
    masks bool [G, K]; tastes float32 [G, K], zero outside the mask.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        n, k = spec.items, spec.factors
        rng = random_generator(spec, "world")
        rank = rng.permutation(n) + 1
        self.log_popularity = (-spec.zipf * np.log(rank)).astype(np.float32)
        self.cold = np.zeros(n, bool)
        self.cold[rng.permutation(n)[spec.warm :]] = True
        self.masks = rng.random((spec.groups, k)).argsort(1).argsort(1) < spec.kept
        signs = rng.choice(np.float32([-1, 1]), (spec.groups, k))
        size = rng.uniform(0.7, 1.3, (spec.groups, k)).astype(np.float32)
        self.tastes = self.masks * signs * size / np.float32(np.sqrt(spec.kept))
        self.factors = np.empty((n, k), np.float32)
        self.item_ids = np.empty(n, np.int64)
        for chunk, rows in enumerate(chunk_slices(n, spec.item_chunk)):
            rng = random_generator(spec, "items", chunk)
            self.factors[rows] = rng.standard_normal((rows.stop - rows.start, k), np.float32)
            gaps = rng.integers(0, 997, rows.stop - rows.start)
            self.item_ids[rows] = 1_000_000_007 + 997 * np.arange(rows.start, rows.stop) + gaps  # distinct, with gaps

    @cached_property
    def peaks(self) -> np.ndarray:
        """With drift: the time of each item's highest popularity, as an angle in [0, pi): float32 [items]."""
        return random_generator(self.spec, "drift").uniform(0, np.pi, self.spec.items).astype(np.float32)

    @cached_property
    def pools(self) -> dict[str, ChoicePool]:
        """The items that users choose from: `interactions` (warm items) and `cold` (cold-start items)."""
        if not self.cold.any():
            return {"interactions": ChoicePool(None, self.factors, self.log_popularity, self.spec.strength)}
        members = {"interactions": np.flatnonzero(~self.cold), "cold": np.flatnonzero(self.cold)}
        return {
            name: ChoicePool(m, self.factors, self.log_popularity, self.spec.strength) for name, m in members.items()
        }


def draw_features(world: PlantedWorld, modality: str, chunk: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Raw features of a chunk of items, `dtype` [n, d], and a mask of the items that have a vector, bool [n].

    Variance per dimension: 1 for the signal, `noise` for the nuisance factors, 0.1 for the white noise.
    """
    spec = world.spec
    rows = chunk_slice(spec.items, spec.item_chunk, chunk)
    width = spec.modalities[modality]
    seen = visible_factors(spec)[modality]
    maps = random_generator(spec, f"map {modality}")
    signal = maps.standard_normal((len(seen), width), np.float32) / np.float32(np.sqrt(len(seen)))
    offset = maps.standard_normal(width, np.float32)
    n = rows.stop - rows.start
    rng = random_generator(spec, f"features {modality}", chunk)
    half = spec.nuisance // 2
    nuisance = None
    if spec.nuisance and spec.noise:
        shared = random_generator(spec, "nuisance", chunk).standard_normal((n, half), np.float32)
        nuisance = np.concatenate([shared, rng.standard_normal((n, spec.nuisance - half), np.float32)], 1)
        spread = maps.standard_normal((spec.nuisance, width), np.float32) * np.sqrt(spec.noise / spec.nuisance)
        spread = spread.T.astype(np.float32)
    out = np.empty((n, width), dtype)
    for slab in chunk_slices(n, FEATURE_ITEMS):
        vectors = dot_rows(world.factors[rows][slab][:, seen], signal.T) + offset
        if nuisance is not None:
            vectors += dot_rows(nuisance[slab], spread)
        out[slab] = vectors + np.float32(np.sqrt(0.1)) * rng.standard_normal(vectors.shape, np.float32)
    return out, rng.random(n) >= spec.missing_share


def visible_factors(spec: Spec) -> dict[str, np.ndarray]:
    """Factors visible in each modality: about two thirds of all; every factor is visible in at least one modality."""
    rng = random_generator(spec, "visible")
    shown = rng.random((len(spec.modalities), spec.factors)) < 2 / 3
    shown[rng.integers(0, len(spec.modalities), spec.factors), np.arange(spec.factors)] = True
    shown[~shown.any(1)] = True  # a modality without visible factors gets all of them
    return {modality: np.flatnonzero(row) for modality, row in zip(spec.modalities, shown, strict=True)}


def random_generator(spec: Spec, kind: str, chunk: int = 0) -> np.random.Generator:
    """A generator with its own random stream for each kind of part and chunk."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([spec.seed, zlib.crc32(kind.encode()), chunk])))


def chunk_slices(total: int, size: int) -> Iterator[slice]:
    """The rows of all chunks."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def chunk_slice(total: int, size: int, chunk: int) -> slice:
    """The rows of one chunk."""
    return slice(chunk * size, min((chunk + 1) * size, total))
