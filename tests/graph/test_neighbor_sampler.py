"""Sampled propagation: equal to the whole graph with every neighbour, unbiased with a few."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import GATED, small_catalog, small_config
from steps import assert_same_step, global_draws, loader_of, set_away_from_start, step

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.neighbor_sampler import Sampler, inclusion, thin
from gtc_dist.model.build import build_network

ALL = {"propagation": "sampled", "fanout": [-1, -1], "item_fanout": -1, "user_fanout": -1}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def random_graph(nodes=150, seed=0) -> tuple[CSC, sp.csr_matrix]:
    matrix = sp.random(nodes, nodes, 0.15, format="csr", random_state=seed, dtype=np.float32)
    matrix.sort_indices()
    graph = CSC(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data)
    return graph, matrix


@pytest.mark.parametrize("kind", ["neighbor", "labor"])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("condition", ["item", "audience"])
@pytest.mark.parametrize("content", [{}, GATED])
def test_fanout_minus_one_equals_the_whole_graph(catalog, kind, excluded, condition, content):
    outcomes = []
    for model in ({"propagation": "full", **content}, {**ALL, **content, "sampler": kind}):
        config = small_config(
            catalog.uri,
            model={**model, "diffusion": {"condition": condition, "steps": 20, "start_step": 5}},
            train={"exclude_seed_edges": excluded},
        )
        draws = global_draws(config, catalog)
        outcomes.append(step(Communicator(), catalog.uri, config, draws, [24]))
    assert_same_step(outcomes[1], outcomes[0])


def test_leaving_out_seed_edges_changes_the_result(catalog):
    outcomes = []
    for excluded in (False, True):
        config = small_config(catalog.uri, train={"exclude_seed_edges": excluded})
        outcomes.append(step(Communicator(), catalog.uri, config, global_draws(config, catalog), [24]))
    assert abs(outcomes[0]["parts"]["bpr"] - outcomes[1]["parts"]["bpr"]) > 1e-3


@pytest.mark.parametrize(
    ("kind", "layer_nodes", "content"),
    [("neighbor", None, {}), ("labor", None, {}), ("neighbor", 12, {}), ("neighbor", 12, GATED)],
)
def test_mean_of_many_draws_converges_to_whole_propagation(catalog, kind, layer_nodes, content):
    """Embeddings of the batch: two layers, hops and their corrections. The gate and the filter see no sample here
    (condition: item), so the estimate is unbiased."""

    def embeddings(model: dict, draws: int) -> torch.Tensor:
        config = small_config(
            catalog.uri, model={**model, **content, "diffusion": {"condition": "item", "steps": 20, "start_step": 5}}
        )
        network, tables = build_network(config, catalog, Communicator())
        set_away_from_start(network)
        loader = loader_of(config, catalog, Communicator(), network)
        total, batch_draws = 0, global_draws(config, catalog)
        with torch.no_grad():
            for n in range(draws):
                batch_draws.sampler_seed = 1000 + n
                batch = loader.assemble(batch_draws)
                rows = (tables.user.lookup(batch.user_route), tables.item.lookup(batch.item_route))
                out = network.embed(batch, *rows)
                total = total + torch.cat([out["users"], out["items"]])
        return total / draws

    want = embeddings({"propagation": "full"}, 1)
    few = {"propagation": "sampled", "sampler": kind, "fanout": [2, 2], "item_fanout": 2, "user_fanout": 2}
    few |= {"layer_nodes": layer_nodes}
    one, many = embeddings(few, 4), embeddings(few, 900)
    error_one, error_many = (one - want).norm() / want.norm(), (many - want).norm() / want.norm()
    assert error_many < 0.05  # without the corrections it stays near 0.5
    assert error_many < error_one / 8  # 15 times fewer standard errors


@pytest.mark.parametrize("kind", ["neighbor", "labor"])
def test_a_layer_holds_true_edges_of_its_destinations(kind):
    graph, _ = random_graph()
    sampler = Sampler(graph, kind)
    sampler.seed(1)
    wanted = np.random.default_rng(0).permutation(150)[:40]
    layer = sampler.layer(wanted, 6)
    assert (layer.sources[:40] == wanted).all()
    assert len(set(layer.sources.tolist())) == len(layer.sources)
    assert (graph.indices[layer.edges] == layer.sources[layer.positions]).all()
    to = wanted[layer.destination]
    assert ((graph.indptr[to] <= layer.edges) & (layer.edges < graph.indptr[to + 1])).all()
    assert len(set(layer.edges.tolist())) == len(layer.edges)
    if kind == "neighbor":
        assert (np.diff(layer.indptr) == np.minimum(graph.degree[wanted], 6)).all()


@pytest.mark.parametrize("kind", ["neighbor", "labor"])
def test_the_same_seed_draws_the_same(kind):
    sampler = Sampler(random_graph()[0], kind)
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
def test_inclusion_probabilities_add_up_and_keep_their_proportions(sizes, expected):
    size = np.array(sizes)
    chance = inclusion(size, expected)
    positive = int((size > 0).sum())
    assert ((chance >= 0) & (chance <= 1)).all()
    assert (chance[size == 0] == 0).all()
    assert chance.sum() == pytest.approx(min(expected, positive), abs=1e-6)
    part = np.flatnonzero((chance > 0) & (chance < 1))
    if len(part) > 1:
        np.testing.assert_allclose(chance[part] / chance[part[0]], size[part] / size[part[0]], rtol=1e-6)


def test_thinned_layers_keep_free_sources_hold_the_limit_and_stay_unbiased():
    graph, matrix = random_graph()
    sampler = Sampler(graph)
    sampler.seed(0)
    wanted = np.arange(30)
    layer = sampler.layer(wanted, -1)
    free = np.arange(len(layer.sources)) < 30
    rng, total, kept = np.random.default_rng(1), np.zeros((30, 150)), []
    for _ in range(400):
        thinned, weight = thin(layer, graph.weight[layer.edges], free, 20, rng)
        assert (thinned.sources[:30] == wanted).all()
        assert (graph.indices[thinned.edges] == thinned.sources[thinned.positions]).all()
        assert thinned.indptr[-1] == len(thinned.edges) == len(weight)
        kept.append(len(thinned.sources) - 30)
        np.add.at(total, (thinned.destination, thinned.sources[thinned.positions]), weight)
    assert 18 < np.mean(kept) < 22
    want = matrix.toarray()[:30]
    assert np.linalg.norm(total / 400 - want) < 0.15 * np.linalg.norm(want)
    assert thin(layer, graph.weight[layer.edges], free, 1000, rng)[0] is layer


def test_the_rows_of_a_step_do_not_grow_with_the_catalog(tmp_path):
    """Fanouts alone bring in more and more different nodes; `layer_nodes` bounds them."""
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
            rows[limit, users] = len(batch.user_route.position) + len(batch.item_route.position)
    assert rows[None, 1600] > 1.5 * rows[None, 400]
    assert rows[40, 1600] < 1.2 * rows[40, 400]


def test_labor_needs_fewer_sources_than_neighbor_sampling():
    graph, _ = random_graph(1500)
    counts = {}
    for kind in ("neighbor", "labor"):
        sampler = Sampler(graph, kind)
        sampler.seed(0)
        counts[kind] = len(sampler.layer(np.arange(200), 10, keep_destinations=False).sources)
    assert counts["labor"] < counts["neighbor"]


def test_shared_read_only_arrays_are_wrapped():
    graph, _ = random_graph()
    for array in (graph.indptr, graph.indices, graph.weight):
        array.flags.writeable = False
    sampler = Sampler(graph)
    sampler.seed(0)
    assert len(sampler.layer(np.array([3]), -1).edges) == graph.degree[3]
