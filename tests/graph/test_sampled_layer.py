"""Importance sampling of a layer's sources."""

import numpy as np
import pytest
import torch
from graphs import random_graph
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gtc_dist.graph.neighbor_sampler import NeighborSampler
from gtc_dist.graph.sampled_layer import importance_sample_sources, inclusion_probabilities


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e3), max_size=40), st.integers(0, 50))
@example([2.3e-309, 2.3e-309], 1)
@example([1.0, 4.0, 1.1e-308, 1.1e-308], 3)
def test_inclusion_probabilities_add_up_and_stay_proportional(sizes, expected):
    size = np.array(sizes)
    chance = inclusion_probabilities(torch.tensor(sizes, dtype=torch.float64), expected).numpy()
    positive = int((size > 0).sum())
    assert ((chance >= 0) & (chance <= 1)).all()
    assert (chance[size == 0] == 0).all()
    assert chance.sum() == pytest.approx(min(expected, positive), abs=1e-6)
    part = np.flatnonzero((chance > 0) & (chance < 1))
    if len(part) > 1:
        np.testing.assert_allclose(chance[part] / chance[part[0]], size[part] / size[part[0]], rtol=1e-6)


def test_importance_sampling_keeps_present_sources_respects_the_limit_and_is_unbiased():
    graph, matrix = random_graph()
    sampler = NeighborSampler(graph)
    sampler.seed(0)
    destinations, uniform = torch.arange(30), NeighborSampler.uniform(1)
    layer = sampler.layer(destinations, -1)
    present = torch.arange(len(layer.sources)) < 30
    weights, indices = torch.from_numpy(graph.weight), torch.from_numpy(graph.indices)
    total, kept = torch.zeros(30, 150), []
    for _ in range(400):
        smaller, weight = importance_sample_sources(layer, weights[layer.edges], present, 20, uniform)
        assert (smaller.sources[:30] == destinations).all()
        assert (indices[smaller.edges] == smaller.sources[smaller.positions]).all()
        assert smaller.indptr[-1] == len(smaller.edges) == len(weight)
        kept.append(len(smaller.sources) - 30)
        total.index_put_((smaller.destination, smaller.sources[smaller.positions]), weight, accumulate=True)
    assert 18 < np.mean(kept) < 22
    want = torch.from_numpy(matrix.toarray()[:30])
    assert (total / 400 - want).norm() < 0.15 * want.norm()
    assert importance_sample_sources(layer, weights[layer.edges], present, 1000, uniform)[0] is layer
