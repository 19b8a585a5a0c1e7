"""Layer-wise inference equals full-graph propagation, in chunks and over ranks."""

import pytest
import torch
from gtc_reference import reference, setup
from ranks import run_ranks
from small import GATED, small_catalog, small_config

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import load_graphs
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.model.build import build_network, load_features


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize("hops", [True, False])
@pytest.mark.parametrize("model", [{}, GATED])
def test_matches_the_dense_reference(catalog, chunk, hops, model):
    config, network, tables = setup(catalog, model={"item_hop": hops, "user_hop": hops, **model})
    features = load_features(network.modalities, catalog, Communicator())
    users, items = embed_catalog(network, tables, features, load_graphs(config, catalog), chunk)
    want_users, want_items = reference(network, tables, catalog, config)
    torch.testing.assert_close(users.weight, want_users.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(items.weight, want_items.detach(), rtol=1e-4, atol=1e-5)


def own_rows(comm: Communicator, uri: str, config) -> dict:
    catalog = Catalog(uri)
    network, tables = build_network(config, catalog, comm)
    features = load_features(network.modalities, catalog, comm)
    diagnostics: dict[str, float] = {}
    out = embed_catalog(network, tables, features, load_graphs(config, catalog), 9, diagnostics)
    return {"users": out[0].weight, "items": out[1].weight, "diagnostics": diagnostics}


@pytest.mark.parametrize("model", [{}, GATED])
def test_ranks_compute_their_own_rows(catalog, model):
    config = small_config(catalog.uri, model=model)
    alone = run_ranks(own_rows, 1, catalog.uri, config)[0]
    together = run_ranks(own_rows, 3, catalog.uri, config)
    for kind in ("users", "items"):
        rows = torch.cat([result[kind] for result in together])
        torch.testing.assert_close(rows, alone[kind], rtol=1e-5, atol=1e-6)
    for result in together:
        assert result["diagnostics"] == pytest.approx(alone["diagnostics"], rel=1e-5)
    assert sum(v for k, v in alone["diagnostics"].items() if k.startswith("gate/")) == pytest.approx(1, rel=1e-5)


def test_twice_the_same_bits(catalog):
    config = small_config(catalog.uri)
    first, second = (own_rows(Communicator(), catalog.uri, config) for _ in range(2))
    assert torch.equal(first["users"], second["users"])
    assert torch.equal(first["items"], second["items"])
