"""An earlier run's weights on another catalog: rows by id, on any number of ranks, and the same embeddings."""

import numpy as np
import pytest
import torch
from grown import day_before, two_days
from ranks import run_ranks
from small import GATED, small_catalog, small_config
from trainings import trainer_of

from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import load_graphs
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.inference.masked_content import masked_content
from gtc_dist.inference.masked_embeddings import embed_masked
from gtc_dist.model.build import build_network, load_features
from gtc_dist.warm_start import carry_over as module
from gtc_dist.warm_start.carry_over import carry_over

MODELS = {"paper": {"masked_members": 2, "user_hop": False}, "gated": {**GATED, "user_hop": False}}
CHUNK = 9


def trained(catalog: Catalog, folder, model: dict) -> RunRef:
    """A run whose weights are those of one epoch, without scorers."""
    config = small_config(catalog.uri, str(folder), model=model, train={"epochs": 1})
    result = trainer_of(Communicator(), config, str(folder / "run")).fit()
    return RunRef(str(folder / "run"), result["checkpoint"], result["best_epoch"], config)


def carried(comm: Communicator, earlier: RunRef, today: str) -> dict:
    """Weights of the tables and embeddings on another catalog; the counts."""
    config = earlier.config.model_copy(update={"data": earlier.config.data.model_copy(update={"catalog": today})})
    catalog = Catalog(today)
    graphs = load_graphs(config, catalog)
    network, tables = build_network(config, catalog, comm)
    dense, counts = carry_over(earlier, catalog, graphs, network, tables, CHUNK)
    assert set(dense) >= {"network"}
    weights = {f"weight {table.name}": table.weight.clone() for table in tables.all()}
    return weights | embeddings(comm, config, network, tables) | {"counts": counts}


def embeddings(comm: Communicator, config, network, tables) -> dict:
    catalog = Catalog(config.data.catalog)
    graphs, features = load_graphs(config, catalog), load_features(network.modalities, catalog, comm)
    found = {"network": embed_catalog(network, tables, features, graphs, CHUNK)}
    if network.masked is not None:
        content = masked_content(network.masked, features, graphs, CHUNK)
        found["masked"] = embed_masked(network, tables, content, graphs, CHUNK)
    return {f"{name} {k}": getattr(e, k).weight.float() for name, e in found.items() for k in ("users", "items")}


@pytest.mark.parametrize("model", MODELS)
def test_another_order_and_scale_of_the_same_data_gives_the_same_embeddings(tmp_path, model):
    today = small_catalog(tmp_path / "today")
    before = day_before(today, tmp_path / "before", scale=3.0)
    earlier = trained(before, tmp_path, MODELS[model])
    comm = Communicator()
    network, tables = build_network(earlier.config, before, comm)
    module.carry_over(earlier, before, load_graphs(earlier.config, before), network, tables, CHUNK)
    want = embeddings(comm, earlier.config, network, tables)
    found = carried(comm, earlier, today.uri)
    place = {
        kind: [before.ids(kind).to_pylist().index(value) for value in today.ids(kind).to_pylist()]
        for kind in ("users", "items")
    }
    for name, rows in want.items():
        torch.testing.assert_close(found[name], rows[place[name.split()[1]]], rtol=1e-2, atol=2e-3)
    # without the map of the features, they would not be the same
    assert (network.members[0].project[0].weight != found_weight(earlier, today)).any()


def found_weight(earlier: RunRef, today: Catalog) -> torch.Tensor:
    """Weights of the first projection on another catalog."""
    config = earlier.config
    network, tables = build_network(config, today, Communicator())
    carry_over(earlier, today, load_graphs(config, today), network, tables, CHUNK)
    return network.members[0].project[0].weight


@pytest.mark.parametrize("model", MODELS)
def test_rows_are_found_by_id_on_any_number_of_ranks(tmp_path, model, monkeypatch):
    before, today = two_days(tmp_path)
    earlier = trained(before, tmp_path, MODELS[model])
    own, old_tables = build_network(earlier.config, before, Communicator())
    carry_over(earlier, before, load_graphs(earlier.config, before), own, old_tables, CHUNK)
    monkeypatch.setattr(module, "LOOKUP_ROWS", 7)
    alone = run_ranks(carried, 1, earlier, today.uri)[0]
    together = run_ranks(carried, 3, earlier, today.uri)
    for name in alone.keys() - {"counts"}:
        torch.testing.assert_close(torch.cat([part[name] for part in together]), alone[name], rtol=1e-4, atol=1e-5)
    for table in old_tables.all():
        kind = "users" if table.name == "user" else "items"
        old, degree = before.ids(kind).to_pylist(), {day: degrees(day, kind) for day in (before, today)}
        for row, value in enumerate(today.ids(kind).to_pylist()):
            same = (
                torch.equal(alone[f"weight {table.name}"][row], table.weight[old.index(value)])
                if value in old
                else None
            )
            became_warm = value in old and degree[before][old.index(value)] == 0 and degree[today][row] > 0
            assert same == (None if value not in old else not became_warm)
    counts = alone["counts"]
    assert counts == together[0]["counts"]
    assert sum(counts["users"].values()) == today.users
    assert sum(counts["items"].values()) == today.items
    assert counts["users"]["folded_in"] == 10
    assert counts["items"]["by_content"] >= 5


def degrees(catalog: Catalog, kind: str) -> np.ndarray:
    users, items = catalog.interactions("train")
    return np.bincount(users if kind == "users" else items, minlength=getattr(catalog, kind))
