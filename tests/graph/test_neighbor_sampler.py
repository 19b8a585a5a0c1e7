"""Sampled propagation: equal to the full graph with all neighbours, unbiased with a few."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import GATED, small_catalog, small_config
from steps import assert_same_step, global_draws, loader_of, set_away_from_start, step

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed import message_passing
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.neighbor_sampler import NeighborSampler, importance_sample_sources, inclusion_probabilities
from gtc_dist.model.build import build_network

ALL = {"propagation": "sampled", "fanout": [-1, -1], "item_fanout": -1}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def random_graph(nodes=150, seed=0) -> tuple[CSC, sp.csr_matrix]:
    matrix = sp.random(nodes, nodes, 0.15, format="csr", random_state=seed, dtype=np.float32)
    matrix.sort_indices()
    graph = CSC(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data)
    return graph, matrix


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("w_diff", [0, 0.7])
@pytest.mark.parametrize("content", [{}, GATED])
def test_fanout_minus_one_equals_the_full_graph(catalog, excluded, w_diff, content):
    outcomes = []
    for model in ({"propagation": "full", **content}, {**ALL, **content}):
        config = small_config(catalog.uri, model=model, train={"exclude_seed_edges": excluded, "w_diff": w_diff})
        draws = global_draws(config, catalog)
        outcomes.append(step(Communicator(), catalog.uri, config, draws, [24]))
    assert_same_step(outcomes[1], outcomes[0])


def test_graphs_with_more_edges_than_32_bits_number(catalog, monkeypatch):
    """With 64-bit indices a step is the same, sampled and on the whole graph."""
    for model in ({"propagation": "full"}, {"propagation": "sampled", "fanout": [3, 3], "item_fanout": 2}):
        outcomes = []
        for most in (2**31 - 1, 20):
            monkeypatch.setattr(message_passing, "MAX_INT32_EDGES", most)
            config = small_config(catalog.uri, model=model)
            outcomes.append(step(Communicator(), catalog.uri, config, global_draws(config, catalog), [24]))
        assert_same_step(outcomes[1], outcomes[0])


def test_fanout_minus_one_equals_the_full_graph_with_recency_weights(tmp_path):
    weight = np.exp2(-6 * np.random.default_rng(1).random(1000)).astype(np.float32)
    weighted = small_catalog(tmp_path / "c", weight=weight)
    outcomes = []
    for model in ({"propagation": "full"}, ALL):
        config = small_config(weighted.uri, model=model)
        outcomes.append(step(Communicator(), weighted.uri, config, global_draws(config, weighted), [24]))
    assert_same_step(outcomes[1], outcomes[0])


def test_excluding_seed_edges_changes_the_result(catalog):
    outcomes = []
    for excluded in (False, True):
        config = small_config(catalog.uri, train={"exclude_seed_edges": excluded})
        outcomes.append(step(Communicator(), catalog.uri, config, global_draws(config, catalog), [24]))
    assert abs(outcomes[0]["parts"]["bpr"] - outcomes[1]["parts"]["bpr"]) > 1e-3


@pytest.mark.parametrize(
    ("layer_nodes", "content"),
    [(None, {}), (12, {}), (12, GATED)],
)
def test_mean_of_many_draws_converges_to_full_propagation(catalog, layer_nodes, content):
    """Embeddings of the batch: two layers, smoothing layers and their corrections. Without the filter, whose condition
    holds sampled neighbours, nothing but these sums depends on the sample, so the estimate is unbiased."""

    def embeddings(model: dict, draws: int) -> torch.Tensor:
        config = small_config(catalog.uri, model={**model, **content}, train={"w_diff": 0})
        network, tables = build_network(config, catalog, Communicator())
        set_away_from_start(network)
        loader = loader_of(config, catalog, Communicator(), network)
        total, batch_draws = 0, global_draws(config, catalog)
        with torch.no_grad():
            for n in range(draws):
                batch_draws.sampler_seed = 1000 + n
                batch = loader.assemble(batch_draws)
                rows = (tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup))
                out = network.embed(batch.subgraph, *rows)
                total = total + torch.cat([out.users, out.items])
        return total / draws

    want = embeddings({"propagation": "full"}, 1)
    few = {"propagation": "sampled", "fanout": [2, 2], "item_fanout": 2}
    few |= {"layer_nodes": layer_nodes}
    one, many = embeddings(few, 4), embeddings(few, 900)
    error_one, error_many = (one - want).norm() / want.norm(), (many - want).norm() / want.norm()
    assert error_many < 0.05  # without the corrections it stays near 0.5
    assert error_many < error_one / 8  # the standard error is 15 times smaller


def test_a_layer_holds_true_edges_of_its_destinations():
    graph, _ = random_graph()
    sampler = NeighborSampler(graph)
    sampler.seed(1)
    destinations = np.random.default_rng(0).permutation(150)[:40]
    layer = sampler.layer(destinations, 6)
    assert (layer.sources[:40] == destinations).all()
    assert len(set(layer.sources.tolist())) == len(layer.sources)
    assert (graph.indices[layer.edges] == layer.sources[layer.positions]).all()
    to = destinations[layer.destination]
    assert ((graph.indptr[to] <= layer.edges) & (layer.edges < graph.indptr[to + 1])).all()
    assert len(set(layer.edges.tolist())) == len(layer.edges)
    assert (np.diff(layer.indptr) == np.minimum(graph.degree[destinations], 6)).all()


def test_the_same_seed_draws_the_same():
    sampler = NeighborSampler(random_graph()[0])
    drawn = []
    for seed in (5, 5, 6):
        sampler.seed(seed)
        drawn.append(np.concatenate([sampler.layer(np.arange(50), 3).edges, sampler.layer(np.arange(50), 3).edges]))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e3), max_size=40), st.integers(0, 50))
@example([2.3e-309, 2.3e-309], 1)
@example([1.0, 4.0, 1.1e-308, 1.1e-308], 3)
def test_inclusion_probabilities_add_up_and_stay_proportional(sizes, expected):
    size = np.array(sizes)
    chance = inclusion_probabilities(size, expected)
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
    destinations = np.arange(30)
    layer = sampler.layer(destinations, -1)
    present = np.arange(len(layer.sources)) < 30
    rng, total, kept = np.random.default_rng(1), np.zeros((30, 150)), []
    for _ in range(400):
        smaller, weight = importance_sample_sources(layer, graph.weight[layer.edges], present, 20, rng)
        assert (smaller.sources[:30] == destinations).all()
        assert (graph.indices[smaller.edges] == smaller.sources[smaller.positions]).all()
        assert smaller.indptr[-1] == len(smaller.edges) == len(weight)
        kept.append(len(smaller.sources) - 30)
        np.add.at(total, (smaller.destination, smaller.sources[smaller.positions]), weight)
    assert 18 < np.mean(kept) < 22
    want = matrix.toarray()[:30]
    assert np.linalg.norm(total / 400 - want) < 0.15 * np.linalg.norm(want)
    assert importance_sample_sources(layer, graph.weight[layer.edges], present, 1000, rng)[0] is layer


def test_the_rows_of_a_step_do_not_grow_with_the_catalog(tmp_path):
    """With fanouts alone, the number of distinct nodes grows with the catalog; `layer_nodes` bounds it."""
    rows = {}
    for limit in (None, 40):
        for users in (400, 1600):
            small = small_catalog(tmp_path / f"{users}-{limit}", users=users, items=users, per_user=12)
            model = {"propagation": "sampled", "fanout": [10, 10], "layer_nodes": limit}
            negatives = {"mode": "shared", "count": 16}
            config = small_config(small.uri, model=model, train={"negatives": negatives})
            batch = next(
                loader_of(config, small, Communicator(), build_network(config, small, Communicator())[0]).epoch(1)
            )
            rows[limit, users] = len(batch.subgraph.user_lookup.position) + len(batch.subgraph.item_lookup.position)
    assert rows[None, 1600] > 1.5 * rows[None, 400]
    assert rows[40, 1600] < 1.2 * rows[40, 400]


def test_shared_read_only_arrays_are_wrapped():
    graph, _ = random_graph()
    for array in (graph.indptr, graph.indices, graph.weight):
        array.flags.writeable = False
    sampler = NeighborSampler(graph)
    sampler.seed(0)
    assert len(sampler.layer(np.array([3]), -1).edges) == graph.degree[3]
