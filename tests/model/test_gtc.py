"""The whole network against a slow dense reference, and its switches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gtc_reference import reference, setup
from small import small_catalog, small_config
from steps import global_draws, loader_of

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.graph import csc
from gtc_dist.graph.csc import Graphs, load_graphs
from gtc_dist.model import losses
from gtc_dist.model.item_encoder import EncodedItems
from gtc_dist.model.variant import GATED, PAPER

NO_HOPS = {"item_hop": False, "user_hop": False}
NETWORKS = {  # sections of the configuration, and parts of the network that no `model.variant` has
    "as in the paper": ({}, None),
    "no filter": ({"train": {"w_diff": 0}}, None),
    "no total correlation": ({"train": {"w_tc": 0}}, None),
    "no view attention": ({}, replace(PAPER, view_attention=False)),
    "free norms": ({}, replace(PAPER, unit_rows=False)),
    "free norms, no view attention": ({}, replace(PAPER, unit_rows=False, view_attention=False)),
    "no hops": ({"model": NO_HOPS}, None),
    "no convolution": ({"model": {"layers": 0}}, None),
    "three layers": ({"model": {"layers": 3}}, None),
    "three members": ({"model": {"members": 3}}, None),
    "gated": ({"model": {"variant": "gated"}}, None),
    "gated, two members": ({"model": {"variant": "gated", "members": 2}}, None),
    "gated, view attention, views concatenated": (
        {"model": {"members": 2}},
        replace(GATED, view_attention=True, sum_views=False),
    ),
    "gated, no hops": ({"model": {"variant": "gated", **NO_HOPS}}, None),
    "views summed, no view attention": ({}, replace(PAPER, sum_views=True, view_attention=False)),
}


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory):
    return {m: small_catalog(tmp_path_factory.mktemp("c") / "c", modalities=m) for m in (1, 2, 5)}


@pytest.mark.parametrize("name", NETWORKS)
def test_embeddings_match_the_dense_reference(catalogs, name):
    catalog = catalogs[2]
    sections, variant = NETWORKS[name]
    config, network, tables = setup(catalog, variant, **sections)
    users, items = reference(network, tables, catalog, config)
    batch = loader_of(config, catalog, Communicator(), network).assemble(global_draws(config, catalog))
    out = network.embed(
        batch.subgraph, tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup)
    )
    torch.testing.assert_close(network.join_views(out.users), users[batch.user_ids], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.join_views(out.items), items[batch.item_ids], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modalities", [1, 5])
def test_any_number_of_modalities(catalogs, modalities):
    catalog = catalogs[modalities]
    config, network, tables = setup(catalog)
    users, items = reference(network, tables, catalog, config)
    batch = loader_of(config, catalog, Communicator(), network).assemble(global_draws(config, catalog))
    out = network.embed(
        batch.subgraph, tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup)
    )
    assert modalities + 1 == network.n_views
    torch.testing.assert_close(out.items, items[batch.item_ids], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.users, users[batch.subgraph.users_in_seeds], rtol=1e-4, atol=1e-5)


def test_a_chosen_modality_alone(catalogs):
    _config, network, _ = setup(catalogs[5], model={"modalities": ["m3"]})
    assert list(network.modalities) == ["m3"]
    assert network.n_views == 2


@pytest.mark.parametrize(
    "negatives",
    [
        {"mode": "uniform", "count": 3},
        {"mode": "shared", "count": 7},
        {"mode": "in_batch"},
    ],
)
@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_ranking_and_l2_losses_by_loops(catalogs, negatives, loss):
    options = {"negatives": negatives, "loss": loss, "temperature": 0.5}
    config, network, tables = setup(catalogs[2], train=options)
    batch = loader_of(config, catalogs[2], Communicator(), network).assemble(global_draws(config, catalogs[2]))
    user_rows, item_rows = (
        tables.user.lookup(batch.subgraph.user_lookup),
        tables.item.lookup(batch.subgraph.item_lookup),
    )
    e = network.embed(batch.subgraph, user_rows, item_rows)
    _, parts = network(batch, user_rows, item_rows)
    ranking, l2 = [], []
    for n in range(len(batch.users)):
        user, positive = e.users[batch.users[n]], e.items[batch.positives[n]]
        pool = batch.negatives[n] if batch.negatives.dim() == 2 else batch.negatives
        allowed = [k for k in range(len(pool)) if batch.negative_mask is None or batch.negative_mask[n, k]]
        scores = [(user * positive).sum() - (user * e.items[pool[k]]).sum() for k in allowed]
        counts = [1.0 if batch.negative_weight is None else float(batch.negative_weight[k]) for k in allowed]
        if loss == "bpr":
            terms = [-c * torch.log(torch.sigmoid(s / 0.5)) for c, s in zip(counts, scores, strict=True)]
            value = sum(terms) / max(sum(counts), 1e-12)
        else:
            value = torch.log(1 + sum(c * torch.exp(-s / 0.5) for c, s in zip(counts, scores, strict=True)))
        ranking.append(value)
        ego = [
            user_rows[batch.subgraph.users_in_inputs[batch.users[n]]],
            item_rows[batch.subgraph.items_in_inputs[batch.positives[n]]],
        ]
        other = sum(item_rows[batch.subgraph.items_in_inputs[k]].square().sum() for k in pool) / len(pool)
        l2.append(0.5 * (sum(row.square().sum() for row in ego) + other))
    assert float(parts[loss]) == pytest.approx(float(sum(ranking).detach()) / len(ranking), rel=1e-4)
    assert float(parts["l2"]) == pytest.approx(float(sum(l2).detach()) / len(l2), rel=1e-4)


@pytest.mark.parametrize("negatives", ["uniform", "in_batch"])
def test_pairs_count_in_the_ranking_loss_by_their_recency(tmp_path, negatives):
    """A pair's weight is that of its interaction over the mean over train; the other loss terms do not change."""
    weight = np.exp2(-6 * np.random.default_rng(1).random(1000)).astype(np.float32)
    catalog = small_catalog(tmp_path / "c", weight=weight)
    config, network, tables = setup(catalog, train={"negatives": {"mode": negatives}})
    loader = loader_of(config, catalog, Communicator(), network)
    batch = loader.assemble(global_draws(config, catalog))
    weight_of = dict(zip(zip(*catalog.interactions("train"), strict=True), weight, strict=False))
    mean = np.mean(list(weight_of.values()))
    expected = [weight_of[pair] / mean for pair in zip(batch.drawn.users, batch.drawn.positives, strict=True)]
    np.testing.assert_allclose(batch.recency_weight.numpy(), expected, rtol=1e-5)
    assert loader.graphs.relative_weights(loader.users, loader.items).mean() == pytest.approx(1, rel=1e-5)

    rows = tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup)
    e = network.embed(batch.subgraph, *rows)
    of_pairs = losses.ranking_loss(network, e.users, e.items, batch).detach()
    parts, unweighted = (network(b, *rows)[1] for b in (batch, replace(batch, recency_weight=None)))
    assert float(unweighted.pop("bpr")) == pytest.approx(float(of_pairs.mean()), rel=1e-5)
    weighted = float((of_pairs * torch.tensor(expected)).mean())
    assert float(parts.pop("bpr")) == pytest.approx(weighted, rel=1e-5)
    assert parts == unweighted


def test_the_denoisers_are_trained_and_the_diffusion_loss_leaves_the_content_alone(catalogs):
    """The paper's code never registered its denoisers. And with a gradient into the content, the cheapest denoising
    would be content without content."""
    config, network, tables = setup(catalogs[2], train={"w_diff": 1.0})
    names = dict(network.named_parameters())
    assert any(name.startswith("members.0.filters.0.denoiser") for name in names)
    batch = loader_of(config, catalogs[2], Communicator(), network).assemble(global_draws(config, catalogs[2]))
    user_rows, item_rows = (
        tables.user.lookup(batch.subgraph.user_lookup),
        tables.item.lookup(batch.subgraph.item_lookup),
    )
    e = network.embed(batch.subgraph, user_rows, item_rows)
    loss = losses.denoising_loss(network, e, batch).sum()
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        trained = gradient is not None and bool(gradient.abs().sum() > 0)
        assert trained == ("denoiser" in name), name


def test_the_weights_of_the_loss_parts(catalogs):
    weights = {"w_tc": 0.3, "w_diff": 0.2, "w_reg": 0.1}
    config, network, tables = setup(catalogs[2], train=weights)
    batch = loader_of(config, catalogs[2], Communicator(), network).assemble(global_draws(config, catalogs[2]))
    loss, parts = network(
        batch, tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup)
    )
    want = parts["bpr"] + 0.3 * parts["tc"] + 0.2 * parts["diffusion"] + 0.1 * parts["l2"]
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-5)


def test_diagnostics(catalogs):
    _config, network, tables = setup(catalogs[2])
    member = network.members[0]
    content = member.content({n: torch.from_numpy(catalogs[2].features(n)) for n in network.modalities})
    views = member.views(tables.item.weight, content)
    ids = tables.item.weight
    untouched = member.diagnostics(EncodedItems(ids, None, content, content, views))
    assert untouched["kept_energy/m0"].tolist() == pytest.approx([1.0] * catalogs[2].items)
    half = {name: x / 2 for name, x in content.items()}
    halved = member.diagnostics(EncodedItems(ids, None, content, half, views))
    assert halved["kept_energy/m0"].tolist() == pytest.approx([0.75] * catalogs[2].items, rel=1e-5)
    assert sum(float(untouched[f"gate/{s}"][0]) for s in ("id", "m0", "m1")) == pytest.approx(1.0)


def test_the_temperature_of_the_total_correlation_comes_back_from_its_bound(catalogs):
    _, network, _ = setup(catalogs[2])
    with torch.no_grad():
        network.members[0].log_scale.fill_(7.0)
    network.clamp_parameters()
    assert network.tc_temperature == pytest.approx(np.exp(-4.6))
    before = network.members[0].log_scale.clone()
    with torch.no_grad():
        network.members[0].log_scale.sub_(0.1)
    network.clamp_parameters()
    assert network.members[0].log_scale == before - 0.1


def test_more_nodes_than_32_bits_number_are_refused(catalogs, monkeypatch):
    catalog = catalogs[2]
    nodes = catalog.users + catalog.items
    monkeypatch.setattr(csc, "MAX_NODES", nodes)
    Graphs.load(catalog)
    monkeypatch.setattr(csc, "MAX_NODES", nodes - 1)
    with pytest.raises(InputError, match=f"{catalog.items:,} items; at most {nodes - 1:,} together are possible"):
        Graphs.load(catalog)


def test_graph_hops_are_not_loaded_where_unused(catalogs):
    config = small_config(catalogs[2].uri, model={"item_hop": False})
    graphs = load_graphs(config, catalogs[2])
    assert graphs.item_item is None
    assert graphs.user_user is not None
