"""Control variates: sampled steps estimate only the change since the last full propagation (the history)."""

import pytest
import torch
from ranks import run_ranks
from small import GATED, small_catalog, small_config
from steps import assert_same_step, global_draws, loader_of, set_away_from_start, share, whole_gradient

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import load_graphs
from gtc_dist.model.build import build_network, load_features
from gtc_dist.training.control_variate import HistoricalEmbeddings

ALL = {"propagation": "sampled", "fanout": [-1, -1], "item_fanout": -1}
FEW = {"propagation": "sampled", "fanout": [2, 2], "item_fanout": 2}
# of few neighbours: the filter's condition is sampled, too, and not linear
NO_FILTER = {"train": {"exclude_seed_edges": False, "w_diff": 0}}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def move(tables, by: float, width: int) -> None:
    """Change every item and the users' first `width` columns, wherever the rows live."""
    for number, table in enumerate(tables.all()):
        change = by * torch.randn(table.rows, table.width, generator=torch.Generator().manual_seed(number))
        change[:, width:] = 0
        table.weight += change[table.start : table.stop]


def network_with_history(config, catalog, comm, dtype=torch.float32, moved=0.0):
    """A network whose tables have moved since its history was made."""
    network, tables = build_network(config, catalog, comm)
    set_away_from_start(network)
    features, graphs = load_features(network.modalities, catalog, comm), load_graphs(config, catalog)
    history = HistoricalEmbeddings(network, tables, features, graphs, every=10**6, chunk=7, dtype=dtype)
    history.refresh()
    move(tables, moved, network.user_widths[0])
    return network, tables, history


def step(comm: Communicator, uri: str, config, draws, counts, moved: float) -> dict:
    """Loss parts of the global batch and all gradients, with a history if the configuration samples."""
    catalog = Catalog(uri)
    network, tables, history = network_with_history(config, catalog, comm, moved=moved)
    batch = loader_of(config, catalog, comm, network).assemble(share(draws, comm.rank, counts))
    rows = history.rows(batch.subgraph) if config.model.propagation == "sampled" else None
    lookups = (tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup))
    loss, parts = network(batch, *lookups, rows)
    loss.backward()
    names = sorted(parts)
    summed = comm.all_reduce(torch.stack([parts[name] for name in names]))
    dense = {name: comm.all_reduce(p.grad) / comm.size for name, p in network.named_parameters()}
    return {
        "parts": dict(zip(names, summed.tolist(), strict=True)),
        "dense": dense,
        "tables": {table.name: whole_gradient(table) for table in tables.all()},
    }


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("hops", [True, False])
@pytest.mark.parametrize("content", [{}, GATED])
def test_all_neighbours_give_the_full_graph_with_a_history_of_any_age(catalog, layers, hops, content):
    outcomes = []
    for model in ({"propagation": "full"}, {**ALL, "fanout": [-1] * layers}):
        model = {**model, **content, "layers": layers, "item_hop": hops, "user_hop": hops}
        config = small_config(catalog.uri, model=model, train={"exclude_seed_edges": False, "loss": "softmax"})
        outcomes.append(step(Communicator(), catalog.uri, config, global_draws(config, catalog), [24], moved=0.2))
    # the view weights of a hop neighbour get a gradient only from the change since the refresh
    for outcome in outcomes:
        outcome["tables"]["user"] = outcome["tables"]["user"][:, : (2 if content else 3) * config.model.width]
    assert_same_step(outcomes[1], outcomes[0])


@pytest.mark.parametrize("content", [{}, GATED])
def test_every_rank_excludes_the_edges_of_all_ranks(catalog, content):
    model = {**ALL, **content}
    config = small_config(catalog.uri, model=model, train={"tc_rows": 0})
    draws = global_draws(config, catalog)
    alone = run_ranks(step, 1, catalog.uri, config, draws, [24], 0.2)[0]
    for result in run_ranks(step, 3, catalog.uri, config, draws, [15, 0, 9], 0.2):
        assert_same_step(result, alone)
    other = small_config(catalog.uri, model=model, train={"tc_rows": 0, "exclude_seed_edges": False})
    kept = step(Communicator(), catalog.uri, other, draws, [24], 0.2)
    assert abs(kept["parts"]["bpr"] - alone["parts"]["bpr"]) > 1e-3


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("content", [{}, {**GATED, "item_hop": True}])
def test_excluded_edges_are_not_on_paths_of_one_step(catalog, layers, content):
    outcomes = []
    for model in ({"propagation": "full"}, {**ALL, "fanout": [-1] * layers}):
        model = {**model, "layers": layers, "user_hop": False, "item_hop": False, **content}
        config = small_config(catalog.uri, model=model)
        outcomes.append(
            step(Communicator(), catalog.uri, config, global_draws(config, catalog), [24], 0.0)["parts"]["bpr"]
        )
    with_edges = small_config(catalog.uri, model=model, train={"exclude_seed_edges": False})
    kept = step(Communicator(), catalog.uri, with_edges, global_draws(config, catalog), [24], 0.0)["parts"]["bpr"]
    if layers == 1:
        assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-5)
    assert abs(outcomes[1] - outcomes[0]) < abs(kept - outcomes[0]) / 2


def embeddings(catalog, config, moved: float, with_history: bool, draws: int, dtype=torch.float32) -> torch.Tensor:
    """[draws, rows, S * D] of a batch's users and items."""
    network, tables, history = network_with_history(config, catalog, Communicator(), dtype, moved)
    loader, batch_draws, out = loader_of(config, catalog, Communicator(), network), global_draws(config, catalog), []
    with torch.no_grad():
        for n in range(draws):
            batch_draws.sampler_seed = 1000 + n
            batch = loader.assemble(batch_draws)
            rows = (tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup))
            embedded = network.embed(batch.subgraph, *rows, history.rows(batch.subgraph) if with_history else None)
            out.append(torch.cat([embedded.users, embedded.items]))
    return torch.stack(out)


def test_few_neighbours_are_unbiased_with_an_error_that_follows_the_change(catalog):
    few = small_config(catalog.uri, model={**FEW, "user_hop": False, "layer_nodes": 12}, **NO_FILTER)
    whole = small_config(catalog.uri, model={"propagation": "full", "user_hop": False}, **NO_FILTER)
    want = embeddings(catalog, whole, 0.02, False, 1)[0]
    drawn = {kind: embeddings(catalog, few, 0.02, kind, 300) for kind in (False, True)}
    error = {kind: ((out - want).square().sum() / want.square().sum() / 300).item() for kind, out in drawn.items()}
    assert error[True] < error[False] / 10
    assert (drawn[True].mean(0) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("content", [{}, GATED])
def test_right_after_a_refresh_there_is_no_sampling_error(catalog, content):
    """Two sampled neighbours give the embeddings of the full graph, to the rounding of float16."""
    few = small_config(catalog.uri, model={**FEW, **content}, **NO_FILTER)
    whole = small_config(catalog.uri, model={"propagation": "full", **content}, **NO_FILTER)
    want = embeddings(catalog, whole, 0.0, False, 1)[0]
    torch.testing.assert_close(embeddings(catalog, few, 0.0, True, 1, torch.float16)[0], want, rtol=5e-3, atol=5e-3)


def test_refreshes_when_due_or_cleared(catalog):
    config = small_config(catalog.uri, model=FEW)
    network, _, history = network_with_history(config, catalog, Communicator())
    batch = loader_of(config, catalog, Communicator(), network).assemble(global_draws(config, catalog))
    history.every, refreshed, refresh = 32, [], history.refresh
    history.clear()
    history.refresh = lambda: refreshed.append(step) or refresh()
    for step in range(110):
        if step == 100:
            history.clear()
        history.rows(batch.subgraph)
    assert refreshed == [0, 2, 4, 8, 16, 32, 64, 96, 100]
