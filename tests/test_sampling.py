"""Sampled propagation: equal to the whole graph with every neighbour, unbiased with a few."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from small import small_catalog, small_config
from steps import assert_same_step, global_draws, loader_of, set_away_from_start, step

from gtc_dist.data.catalog import CSC
from gtc_dist.engine.build import build_network
from gtc_dist.graph.sampling import Sampler
from gtc_dist.model.collectives import World

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
def test_fanout_minus_one_equals_the_whole_graph(catalog, kind, excluded, condition):
    outcomes = []
    for model in ({"propagation": "full"}, {**ALL, "sampler": kind}):
        config = small_config(
            catalog.uri,
            model={**model, "diffusion": {"condition": condition, "steps": 20, "start_step": 5}},
            train={"exclude_seed_edges": excluded},
        )
        draws = global_draws(config, catalog)
        outcomes.append(step(World(), catalog.uri, config, draws, [24]))
    assert_same_step(outcomes[1], outcomes[0])


def test_leaving_out_seed_edges_changes_the_result(catalog):
    outcomes = []
    for excluded in (False, True):
        config = small_config(catalog.uri, train={"exclude_seed_edges": excluded})
        outcomes.append(step(World(), catalog.uri, config, global_draws(config, catalog), [24]))
    assert abs(outcomes[0]["parts"]["bpr"] - outcomes[1]["parts"]["bpr"]) > 1e-3


@pytest.mark.parametrize("kind", ["neighbor", "labor"])
def test_mean_of_many_draws_converges_to_whole_propagation(catalog, kind):
    """Embeddings of the batch: two layers, hops and their corrections. The gate and the filter see no sample here
    (condition: item), so the estimate is unbiased."""

    def embeddings(model: dict, draws: int) -> torch.Tensor:
        config = small_config(
            catalog.uri, model={**model, "diffusion": {"condition": "item", "steps": 20, "start_step": 5}}
        )
        network, tables = build_network(config, catalog, World())
        set_away_from_start(network)
        loader = loader_of(config, catalog, World(), network)
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
