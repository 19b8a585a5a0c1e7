"""Sampled propagation: equal to the full graph with all neighbours, unbiased with a few; with both samplers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import GATED, small_catalog, small_config
from steps import assert_same_step, global_draws, loader_of, set_away_from_start, step

from gtc_dist.distributed import message_passing
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import load_graphs
from gtc_dist.graph.device_sampler import DeviceSampler
from gtc_dist.graph.neighbor_sampler import NeighborSampler
from gtc_dist.model.build import build_network
from gtc_dist.subgraph.sampled_graph import sampling_device

SAMPLERS = pytest.mark.parametrize("sampler", [NeighborSampler, DeviceSampler])
ALL = {"propagation": "sampled", "fanout": [-1, -1], "item_fanout": -1}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


@SAMPLERS
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("w_diff", [0, 0.7])
@pytest.mark.parametrize("content", [{}, GATED])
def test_fanout_minus_one_equals_the_full_graph(catalog, excluded, w_diff, content, sampler):
    outcomes = []
    for model in ({"propagation": "full", **content}, {**ALL, **content}):
        config = small_config(catalog.uri, model=model, train={"exclude_seed_edges": excluded, "w_diff": w_diff})
        draws = global_draws(config, catalog)
        outcomes.append(step(Communicator(), catalog.uri, config, draws, [24], sampler))
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


@SAMPLERS
def test_fanout_minus_one_equals_the_full_graph_with_recency_weights(tmp_path, sampler):
    weight = np.exp2(-6 * np.random.default_rng(1).random(1000)).astype(np.float32)
    weighted = small_catalog(tmp_path / "c", weight=weight)
    outcomes = []
    for model in ({"propagation": "full"}, ALL):
        config = small_config(weighted.uri, model=model)
        outcomes.append(step(Communicator(), weighted.uri, config, global_draws(config, weighted), [24], sampler))
    assert_same_step(outcomes[1], outcomes[0])


def test_excluding_seed_edges_changes_the_result(catalog):
    outcomes = []
    for excluded in (False, True):
        config = small_config(catalog.uri, train={"exclude_seed_edges": excluded})
        outcomes.append(step(Communicator(), catalog.uri, config, global_draws(config, catalog), [24]))
    assert abs(outcomes[0]["parts"]["bpr"] - outcomes[1]["parts"]["bpr"]) > 1e-3


@pytest.mark.parametrize(
    ("layer_nodes", "content", "sampler"),
    [
        (None, {}, NeighborSampler),
        (12, {}, NeighborSampler),
        (12, GATED, NeighborSampler),
        (None, {}, DeviceSampler),
        (12, {}, DeviceSampler),
    ],
)
def test_mean_of_many_draws_converges_to_full_propagation(catalog, layer_nodes, content, sampler):
    """Embeddings of the batch: two layers, smoothing layers and their corrections. Without the filter, whose condition
    holds sampled neighbours, nothing but these sums depends on the sample, so the estimate is unbiased."""

    def embeddings(model: dict, draws: int) -> torch.Tensor:
        config = small_config(catalog.uri, model={**model, **content}, train={"w_diff": 0})
        network, tables = build_network(config, catalog, Communicator())
        set_away_from_start(network)
        loader = loader_of(config, catalog, Communicator(), network, sampler)
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


def test_the_sampler_goes_to_a_gpu_where_the_graph_fits(catalog, monkeypatch):
    config, cuda, cpu = small_config(catalog.uri, model=ALL), torch.device("cuda"), torch.device("cpu")
    graphs = load_graphs(config, catalog)
    memory = SimpleNamespace(total_memory=4 * graphs.bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert sampling_device(config, graphs, cuda) == cuda
    assert sampling_device(config, graphs, cpu) == cpu
    memory.total_memory -= 4
    assert sampling_device(config, graphs, cuda) == cpu
    on_gpu = {"model": {**ALL, "sampler_device": "gpu"}, "cluster": {"gpu": True}}
    assert sampling_device(small_config(catalog.uri, **on_gpu), graphs, cuda) == cuda
    memory.total_memory *= 9
    assert sampling_device(small_config(catalog.uri, model={**ALL, "sampler_device": "cpu"}), graphs, cuda) == cpu
    with pytest.raises(InputError, match=r"model\.sampler_device is gpu, but cluster\.gpu is false"):
        small_config(catalog.uri, model={**ALL, "sampler_device": "gpu"})
