"""Both samplers, DGL's and the one in torch: true edges, seeds, probabilities."""

import numpy as np
import pytest
import torch
from graphs import random_graph

from gtc_dist.data.catalog import CSC
from gtc_dist.graph.device_sampler import DeviceSampler, hashed_uniform
from gtc_dist.graph.neighbor_sampler import NeighborSampler

KINDS = pytest.mark.parametrize("kind", [NeighborSampler, DeviceSampler])


def sampler_of(kind, graph: CSC, seed: int):
    sampler = kind(graph) if kind is NeighborSampler else kind(graph, torch.device("cpu"))
    sampler.seed(seed)
    return sampler


@KINDS
def test_a_layer_holds_true_edges_of_its_destinations(kind):
    graph, _ = random_graph()
    indptr, indices = torch.from_numpy(graph.indptr), torch.from_numpy(graph.indices)
    destinations = torch.from_numpy(np.random.default_rng(0).permutation(150)[:40])
    for fanout, keep in ((6, True), (6, False), (-1, True), (1, False)):
        layer = sampler_of(kind, graph, 1).layer(destinations, fanout, keep)
        if keep:
            assert (layer.sources[:40] == destinations).all()
        else:
            assert set(layer.sources.tolist()) == set(indices[layer.edges].tolist())
        assert len(set(layer.sources.tolist())) == len(layer.sources)
        assert (indices[layer.edges] == layer.sources[layer.positions]).all()
        to = destinations[layer.destination]
        assert ((indptr[to] <= layer.edges) & (layer.edges < indptr[to + 1])).all()
        assert len(set(layer.edges.tolist())) == len(layer.edges)
        degree = torch.from_numpy(graph.degree)[destinations]
        drawn = degree if fanout < 0 else degree.clamp(max=fanout)
        assert (layer.indptr.diff() == drawn).all()
        torch.testing.assert_close(layer.correction, (degree / drawn).float())


@KINDS
def test_every_neighbour_is_drawn_equally_often(kind):
    """A node of 7 neighbours at fanout 3: each is in 3/7 of the draws."""
    graph = CSC(np.array([0, 7, 7]), np.zeros(7, np.int32), np.ones(7, np.float32))
    sampler, draws = sampler_of(kind, graph, 3), 4000
    edges = torch.cat([sampler.layer(torch.tensor([0, 1]), 3).edges for _ in range(draws)])
    share = torch.bincount(edges, minlength=7) / draws
    assert (share - 3 / 7).abs().max() < 0.04  # five standard errors


@KINDS
def test_nodes_without_neighbours_and_no_destinations(kind):
    graph = CSC(np.array([0, 0, 2, 2]), np.array([0, 2], np.int32), np.ones(2, np.float32))
    sampler = sampler_of(kind, graph, 0)
    layer = sampler.layer(torch.tensor([2, 0]), 5)
    assert layer.sources.tolist() == [2, 0]
    assert layer.indptr.tolist() == [0, 0, 0]
    nothing = sampler.layer(torch.empty(0, dtype=torch.int64), 5)
    assert (len(nothing.sources), nothing.indptr.tolist(), len(nothing.edges)) == (0, [0], 0)


@KINDS
def test_the_same_seed_draws_the_same(kind):
    sampler = sampler_of(kind, random_graph()[0], 0)
    drawn, everyone = [], torch.arange(50)
    for seed in (5, 5, 6):
        sampler.seed(seed)
        layers = [sampler.layer(everyone, 3) for _ in range(2)]
        assert not torch.equal(layers[0].edges, layers[1].edges)
        drawn.append(torch.cat([layer.edges for layer in layers]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@KINDS
def test_shared_read_only_arrays_are_wrapped(kind):
    graph, _ = random_graph()
    for array in (graph.indptr, graph.indices, graph.weight):
        array.flags.writeable = False
    assert len(sampler_of(kind, graph, 0).layer(torch.tensor([3]), -1).edges) == graph.degree[3]


def test_draws_of_nodes_are_independent_of_the_samples():
    """A node that was kept by its number gets another number when its neighbours are sampled."""
    graph = CSC(np.arange(0, 10_001, 10), np.tile(np.arange(10, dtype=np.int32), 1000), np.ones(10_000, np.float32))
    sampler, uniform, nodes = sampler_of(DeviceSampler, graph, 4), DeviceSampler.uniform(4), torch.arange(1000)
    for _ in range(3):
        kept = nodes[uniform(nodes) < 0.3]
        place = sampler.layer(kept, 1).edges % 10
        assert abs(place.float().mean() - 4.5) < 0.85  # five standard errors; 1 for the same numbers


def test_hashed_numbers_are_uniform_and_independent():
    ids = torch.arange(200_000)
    numbers = torch.stack([hashed_uniform(ids, *key) for key in ((7, 0), (7, 1), (8, 0), (2**31 - 1, 0))])
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert (numbers.mean(1) - 0.5).abs().max() < 0.004  # six standard errors
    assert (numbers.var(1) - 1 / 12).abs().max() < 0.001
    correlation = torch.corrcoef(torch.cat([numbers, numbers[:1].roll(1, 1)])) - torch.eye(5)
    assert correlation.abs().max() < 0.014


def test_splitmix64():
    """The first outputs of the reference generator with seed 0 (Steele et al. 2014; Vigna's splitmix64.c)."""
    from gtc_dist.graph.device_sampler import _GOLDEN, _mixed, _signed

    states = torch.tensor([_signed(n * _GOLDEN % 2**64) for n in (1, 2, 3)])
    assert [value % 2**64 for value in _mixed(states).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
