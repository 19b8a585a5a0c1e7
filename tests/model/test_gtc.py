"""The whole network against a slow dense reference, and its switches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import small_catalog, small_config
from steps import global_draws, loader_of, set_away_from_start

from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.graph import csc
from gtc_dist.graph.csc import Graphs, load_graphs
from gtc_dist.model import losses
from gtc_dist.model.build import build_network
from gtc_dist.model.item_encoder import EncodedItems
from gtc_dist.model.variant import GATED, PAPER

NO_HOPS = {"item_hop": False, "user_hop": False}
NETWORKS = {  # sections of the configuration, and parts of the network that no `model.variant` has
    "as in the paper": ({}, None),
    "condition on the item alone": ({"model": {"diffusion": {"condition": "item"}}}, None),
    "filter for users": ({"model": {"diffusion": {"condition": "user"}}}, None),
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
    "gated, filter for users": (
        {"model": {"variant": "gated", "members": 2, "diffusion": {"condition": "user"}}},
        None,
    ),
    "gated, no hops": ({"model": {"variant": "gated", **NO_HOPS}}, None),
    "views summed, no view attention": ({}, replace(PAPER, sum_views=True, view_attention=False)),
}


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory):
    return {m: small_catalog(tmp_path_factory.mktemp("c") / "c", modalities=m) for m in (1, 2, 5)}


def dense(graph: CSC, sources: int) -> torch.Tensor:
    out = torch.zeros(len(graph.indptr) - 1, sources)
    for c in range(len(graph.indptr) - 1):
        for e in range(graph.indptr[c], graph.indptr[c + 1]):
            out[c, graph.indices[e]] += float(graph.weight[e])
    return out


def unit_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt()


def reference(network, tables, catalog: Catalog, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of all users and items, with dense matrices and no shared code for graph and gate."""
    D, M = network.dim, config.model.members
    gated = network.variant.gated_content
    G = 2 if gated else network.n_views
    rows, ids = tables.user.weight, tables.item.weight
    preferences = M * D if gated else M * G * D
    users, items = [], []
    for m in range(M):
        of_m = slice(m * preferences // M, (m + 1) * preferences // M)
        weights = rows[:, preferences + m * G : preferences + (m + 1) * G]
        common = None if gated or network.variant.unit_rows else network.common[of_m]
        rows_m, ids_m = rows[:, of_m], ids[:, m * D : (m + 1) * D]
        sides = one(network, m, rows_m, weights, common, ids_m, catalog, config.model)
        for out, streams in zip((users, items), sides, strict=True):
            streams = streams.view(len(streams), -1, D)
            out.append(streams.sum(1) if network.variant.sum_views else streams.flatten(1))
    return torch.cat(users, dim=1), torch.cat(items, dim=1)


def one(network, m: int, rows, weights, common, ids, catalog: Catalog, model) -> tuple[torch.Tensor, torch.Tensor]:
    """One member's streams of users and items, side by side."""
    variant, member, S, D, U = network.variant, network.members[m], network.n_views, network.dim, catalog.users
    gated = variant.gated_content
    if gated:
        preference = torch.stack([rows, torch.zeros_like(rows)], dim=1)
    elif variant.unit_rows:
        preference = torch.stack([F.normalize(rows[:, s * D : (s + 1) * D], dim=1) for s in range(S)], dim=1)
    else:
        preference = torch.stack([row.view(S, D) + common.view(S, D) for row in rows])
    user_weight = weights.shape[1] * torch.softmax(weights, dim=1)
    audience = (dense(catalog.graph("user_item"), U) > 0).float()
    audience = audience / audience.sum(1, keepdim=True).clamp(min=1)
    contents = []
    for s, name in enumerate(network.modalities, start=1):
        x0 = unit_mean_square(member.project[s - 1](torch.from_numpy(catalog.features(name).astype(np.float32))))
        if network.has_filter:
            c = unit_mean_square(ids)
            if model.diffusion.condition != "item":
                liked = unit_mean_square(audience @ rows) if gated else D**0.5 * (audience @ preference[:, s])
                c[audience.sum(1) == 0] = 0  # nobody's: known by its content alone
                c = torch.cat(
                    [c, liked, *([torch.zeros_like(liked)] if model.diffusion.condition == "user" else [])], dim=1
                )
            x0 = member.filters[s - 1](x0, c)
        contents.append(x0)
    if gated:
        contents = [ids / (1 + torch.exp(-x)) for x in contents]
    streams = torch.stack([F.normalize(x, dim=1) for x in [ids, *contents]], dim=1)
    gate = torch.full((catalog.items, S), 1 / S)
    if variant.view_attention:
        for i in range(catalog.items):
            cosine = streams[i] @ streams[i].T
            agreement = torch.stack([(cosine[s].sum() - cosine[s, s]) / (S - 1) for s in range(S)])
            gate[i] = torch.softmax(member.gate_scale * agreement, dim=0)
    if gated:
        weighted = sum(gate[:, s : s + 1] * contents[s - 1] for s in range(1, S))
        content = member.content_length * weighted / gate[:, 1:].sum(1, keepdim=True)
        if model.item_hop:
            content = dense(catalog.graph("item_item"), catalog.items) @ content
        streams = torch.stack([ids, content], dim=1)
    elif variant.unit_rows:
        fused = sum(gate[:, s : s + 1] * streams[:, s] for s in range(S))
        first = F.normalize(streams[:, 0] + fused, dim=1)
        streams = torch.cat([first[:, None], streams[:, 1:]], dim=1) * S * gate[:, :, None]
    else:
        content = [streams[:, s] * member.content_length[s - 1] for s in range(1, S)]
        first = ids + sum(gate[:, s : s + 1] * content[s - 1] for s in range(1, S))
        scaled = [S * gate[:, s : s + 1] * content[s - 1] for s in range(1, S)]
        streams = torch.stack([first, *scaled], dim=1)
    nodes = torch.cat([preference.flatten(1), streams.flatten(1)])
    items = catalog.items
    A = torch.zeros(U + items, U + items)
    A[:U, U:] = dense(catalog.graph("item_user"), items)
    A[U:, :U] = dense(catalog.graph("user_item"), U)
    out = sum(torch.linalg.matrix_power(A, k) @ nodes for k in range(model.layers + 1))
    users = out[:U] * user_weight.repeat_interleave(D, dim=1)
    item_out = out[U:]
    if model.user_hop:
        users = users + dense(catalog.graph("user_user"), U) @ users
    if model.item_hop and not gated:
        item_out = item_out + dense(catalog.graph("item_item"), items) @ item_out
    return users, item_out


def setup(catalog, variant=None, **sections):
    sections.setdefault("train", {})
    sections["train"] = {"exclude_seed_edges": False, **sections["train"]}
    config = small_config(catalog.uri, **sections)
    network, tables = build_network(config, catalog, Communicator(), variant=variant)
    set_away_from_start(network)
    tables.user.weight += 0.3 * torch.randn(tables.user.weight.shape, generator=torch.Generator().manual_seed(1))
    return config, network, tables


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
    torch.testing.assert_close(out.users, users[batch.subgraph.user_seeds], rtol=1e-4, atol=1e-5)


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
            user_rows[batch.subgraph.user_inputs[batch.users[n]]],
            item_rows[batch.subgraph.item_inputs[batch.positives[n]]],
        ]
        other = sum(item_rows[batch.subgraph.item_inputs[k]].square().sum() for k in pool) / len(pool)
        l2.append(0.5 * (sum(row.square().sum() for row in ego) + other))
    assert float(parts[loss]) == pytest.approx(float(sum(ranking).detach()) / len(ranking), rel=1e-4)
    assert float(parts["l2"]) == pytest.approx(float(sum(l2).detach()) / len(l2), rel=1e-4)


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


def test_what_is_watched(catalogs):
    _config, network, tables = setup(catalogs[2])
    member = network.members[0]
    content = member.content({n: torch.from_numpy(catalogs[2].features(n)) for n in network.modalities})
    streams = member.views(tables.item.weight, content)
    ids = tables.item.weight
    untouched = member.diagnostics(EncodedItems(ids, None, content, content, streams))
    assert untouched["kept_energy/m0"].tolist() == pytest.approx([1.0] * catalogs[2].items)
    half = {name: x / 2 for name, x in content.items()}
    halved = member.diagnostics(EncodedItems(ids, None, content, half, streams))
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


def test_more_interactions_than_32_bits_index_are_refused(catalogs, monkeypatch):
    rows = catalogs[2].manifest.interactions["train"]
    monkeypatch.setattr(csc, "MAX_EDGES", 2 * rows)
    Graphs.load(catalogs[2])
    monkeypatch.setattr(csc, "MAX_EDGES", 2 * rows - 1)
    with pytest.raises(InputError, match=f"has {rows:,} train interactions; at most {rows - 1:,} are possible"):
        Graphs.load(catalogs[2])


def test_graph_hops_are_not_loaded_where_unused(catalogs):
    config = small_config(catalogs[2].uri, model={"item_hop": False})
    graphs = load_graphs(config, catalogs[2])
    assert graphs.item_item is None
    assert graphs.user_user is not None
