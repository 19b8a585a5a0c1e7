"""Weights on the features of one catalog, rewritten for those of another, give the same on every raw vector."""

import numpy as np
import pytest
import torch

from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.warm_start.feature_map import FeatureMap

RAW = 6


def transform(rng: np.random.Generator, components: np.ndarray | None) -> FeatureTransform:
    scale = rng.uniform(0.5, 2, RAW) if components is None else np.full(len(components), rng.uniform(0.5, 2))
    return FeatureTransform(rng.normal(size=RAW), scale, components)


def exact(transform: FeatureTransform, raw: np.ndarray) -> torch.Tensor:
    """`FeatureTransform.apply` without rounding to float16."""
    x = raw - transform.mean
    x = x if transform.components is None else x @ transform.components.T
    scale = np.where(transform.scale > 0, transform.scale, np.inf)
    return torch.from_numpy(x / scale)


def rotation(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(RAW, RAW)))[0]


@pytest.mark.parametrize("pca", ["none", "all components", "fewer components of the same plane"])
def test_weights_and_points_give_the_same(pca):
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(9, RAW))
    first = second = None
    if pca == "all components":
        first, second = rotation(rng), rotation(rng)
    earlier, now = transform(rng, first), transform(rng, second)
    if pca.startswith("fewer"):
        basis, turn = rotation(rng)[:3], np.linalg.qr(rng.normal(size=(3, 3)))[0]
        earlier, now = transform(rng, basis), transform(rng, turn @ basis)
        raw, now = rng.normal(size=(9, 3)) @ basis, FeatureTransform(earlier.mean * 0, now.scale, now.components)
        earlier = FeatureTransform(np.ones(3) @ basis, earlier.scale, basis)
    mapped, weights = FeatureMap(earlier, now), torch.from_numpy(rng.normal(size=(4, len(earlier.scale))))
    want = exact(earlier, raw) @ weights.T
    found = exact(now, raw) @ mapped.weights(weights).T + mapped.offset(weights)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(mapped.points(exact(earlier, raw)), exact(now, raw))
    assert not mapped.is_identity
    assert FeatureMap(now, now).is_identity


def test_a_dimension_without_variance_counts_for_nothing():
    rng = np.random.default_rng(1)
    mean, scale = rng.normal(size=RAW), rng.uniform(0.5, 2, RAW)
    constant = np.where(np.arange(RAW) == 2, 0, scale)
    raw, weights = rng.normal(size=(5, RAW)), torch.from_numpy(rng.normal(size=(2, RAW)))
    raw[:, 2] = mean[2]  # as it was for all items of the earlier catalog
    mapped = FeatureMap(FeatureTransform(mean, constant), FeatureTransform(mean + 1, scale))
    want = exact(mapped.earlier, raw) @ weights.T
    torch.testing.assert_close(exact(mapped.now, raw) @ mapped.weights(weights).T + mapped.offset(weights), want)
