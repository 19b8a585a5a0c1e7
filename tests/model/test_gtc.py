"""The whole network against a slow dense reference, and its switches."""

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
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.build import build_network, load_graphs

VARIANTS = {
    "as in the paper": {},
    "condition on the item alone": {"diffusion": {"condition": "item"}},
    "filter for users": {"diffusion": {"condition": "user"}},
    "no filter": {"diffusion": {"enabled": False}},
    "no total correlation": {"correlation": {"enabled": False}},
    "no gate": {"gate": False},
    "rows of any length": {"unit_rows": False},
    "rows of any length, no gate": {"unit_rows": False, "gate": False},
    "no hops": {"item_hop": False, "user_hop": False},
    "no convolution": {"layers": 0},
    "three layers": {"layers": 3},
    "three members": {"members": 3},
    "content as a gate": {"unit_rows": False, "content": "gate"},
    "content as a gate, two members, summed": {"unit_rows": False, "content": "gate", "members": 2, "join": "sum"},
    "content as a gate, filter for users": {
        "unit_rows": False,
        "content": "gate",
        "members": 2,
        "diffusion": {"condition": "user"},
    },
    "content as a gate, no hops": {"unit_rows": False, "content": "gate", "item_hop": False, "user_hop": False},
    "streams summed, no gate": {"join": "sum", "gate": False},
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
    D, M = network.D, config.model.members
    gated = config.model.content == "gate"
    G = 2 if gated else network.S
    rows, ids = tables.user.weight, tables.item.weight
    preferences = M * D if gated else M * G * D
    users, items = [], []
    for m in range(M):
        of_m = slice(m * preferences // M, (m + 1) * preferences // M)
        weights = rows[:, preferences + m * G : preferences + (m + 1) * G]
        common = None if gated or config.model.unit_rows else network.common[of_m]
        rows_m, ids_m = rows[:, of_m], ids[:, m * D : (m + 1) * D]
        sides = one(network, m, rows_m, weights, common, ids_m, catalog, config.model)
        for out, streams in zip((users, items), sides, strict=True):
            streams = streams.view(len(streams), -1, D)
            out.append(streams.sum(1) if config.model.join == "sum" else streams.flatten(1))
    return torch.cat(users, dim=1), torch.cat(items, dim=1)


def one(network, m: int, rows, weights, common, ids, catalog: Catalog, model) -> tuple[torch.Tensor, torch.Tensor]:
    """One member's streams of users and items, side by side."""
    shape, member, S, D, U = network.shape, network.members[m], network.S, network.D, catalog.users
    gated = shape.content == "gate"
    if gated:
        preference = torch.stack([rows, torch.zeros_like(rows)], dim=1)
    elif shape.unit_rows:
        preference = torch.stack([F.normalize(rows[:, s * D : (s + 1) * D], dim=1) for s in range(S)], dim=1)
    else:
        preference = torch.stack([row.view(S, D) + common.view(S, D) for row in rows])
    user_weight = weights.shape[1] * torch.softmax(weights, dim=1)
    audience = (dense(catalog.graph("user_item"), U) > 0).float()
    audience = audience / audience.sum(1, keepdim=True).clamp(min=1)
    contents = []
    for s, name in enumerate(shape.modalities, start=1):
        x0 = unit_mean_square(member.project[s - 1](torch.from_numpy(catalog.features(name).astype(np.float32))))
        if shape.diffusion:
            c = unit_mean_square(ids)
            if shape.condition != "item":
                liked = unit_mean_square(audience @ rows) if gated else D**0.5 * (audience @ preference[:, s])
                c[audience.sum(1) == 0] = 0  # nobody's: known by its content alone
                c = torch.cat([c, liked, *([torch.zeros_like(liked)] if shape.condition == "user" else [])], dim=1)
            x0 = member.filters[s - 1](x0, c)
        contents.append(x0)
    if gated:
        contents = [ids / (1 + torch.exp(-x)) for x in contents]
    streams = torch.stack([F.normalize(x, dim=1) for x in [ids, *contents]], dim=1)
    gate = torch.full((catalog.items, S), 1 / S)
    if shape.gate:
        for i in range(catalog.items):
            cosine = streams[i] @ streams[i].T
            agreement = torch.stack([(cosine[s].sum() - cosine[s, s]) / (S - 1) for s in range(S)])
            gate[i] = torch.softmax(member.gate_scale * agreement, dim=0)
    if gated:
        weighted = sum(gate[:, s : s + 1] * contents[s - 1] for s in range(1, S))
        content = member.content_length * weighted / gate[:, 1:].sum(1, keepdim=True)
        if shape.item_hop:
            content = dense(catalog.graph("item_item"), catalog.items) @ content
        streams = torch.stack([ids, content], dim=1)
    elif shape.unit_rows:
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
    if shape.item_hop and not gated:
        item_out = item_out + dense(catalog.graph("item_item"), items) @ item_out
    return users, item_out


def setup(catalog, **sections):
    sections.setdefault("train", {})
    sections["train"] = {"exclude_seed_edges": False, **sections["train"]}
    config = small_config(catalog.uri, **sections)
    network, tables = build_network(config, catalog, Communicator())
    set_away_from_start(network)
    tables.user.weight += 0.3 * torch.randn(tables.user.weight.shape, generator=torch.Generator().manual_seed(1))
    return config, network, tables


@pytest.mark.parametrize("name", VARIANTS)
def test_embeddings_match_the_dense_reference(catalogs, name):
    catalog = catalogs[2]
    config, network, tables = setup(catalog, model=VARIANTS[name])
    users, items = reference(network, tables, catalog, config)
    batch = loader_of(config, catalog, Communicator(), network).assemble(global_draws(config, catalog))
    out = network.embed(batch, tables.user.lookup(batch.user_route), tables.item.lookup(batch.item_route))
    torch.testing.assert_close(network.joined(out["users"]), users[batch.user_ids], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.joined(out["items"]), items[batch.item_ids], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modalities", [1, 5])
def test_any_number_of_modalities(catalogs, modalities):
    catalog = catalogs[modalities]
    config, network, tables = setup(catalog)
    users, items = reference(network, tables, catalog, config)
    batch = loader_of(config, catalog, Communicator(), network).assemble(global_draws(config, catalog))
    out = network.embed(batch, tables.user.lookup(batch.user_route), tables.item.lookup(batch.item_route))
    assert modalities + 1 == network.S
    torch.testing.assert_close(out["items"], items[batch.item_ids], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["users"], users[batch.user_rows], rtol=1e-4, atol=1e-5)


def test_a_chosen_modality_alone(catalogs):
    _config, network, _ = setup(catalogs[5], model={"modalities": ["m3"]})
    assert list(network.shape.modalities) == ["m3"]
    assert network.S == 2


@pytest.mark.parametrize(
    "negatives",
    [
        {"mode": "uniform", "count": 3},
        {"mode": "shared", "count": 7},
        {"mode": "in_batch"},
        {"mode": "in_batch", "correct": False},
    ],
)
@pytest.mark.parametrize("loss", ["bpr", "softmax", "bpr+softmax"])
def test_ranking_and_l2_losses_by_loops(catalogs, negatives, loss):
    options = {"negatives": negatives, "loss": loss, "temperature": 0.5, "user_discount": 0.5}
    config, network, tables = setup(catalogs[2], train=options)
    batch = loader_of(config, catalogs[2], Communicator(), network).assemble(global_draws(config, catalogs[2]))
    user_rows, item_rows = tables.user.lookup(batch.user_route), tables.item.lookup(batch.item_route)
    e = network.embed(batch, user_rows, item_rows)
    _, parts = network(batch, user_rows, item_rows)
    ranking, l2 = [], []
    degree = catalogs[2].graph("item_user").degree
    root = degree.sum() / np.sqrt(degree).sum()
    for n in range(len(batch.users)):
        user, positive = e["users"][batch.users[n]], e["items"][batch.positives[n]]
        pool = batch.negatives[n] if batch.negatives.dim() == 2 else batch.negatives
        allowed = [k for k in range(len(pool)) if batch.negative_mask is None or batch.negative_mask[n, k]]
        scores = [(user * positive).sum() - (user * e["items"][pool[k]]).sum() for k in allowed]
        counts = [1.0 if batch.negative_weight is None else float(batch.negative_weight[k]) for k in allowed]
        value = 0
        if "bpr" in loss:
            terms = [-c * torch.log(torch.sigmoid(s / 0.5)) for c, s in zip(counts, scores, strict=True)]
            value = sum(terms) / max(sum(counts), 1e-12)
        if "softmax" in loss:
            value = value + torch.log(1 + sum(c * torch.exp(-s / 0.5) for c, s in zip(counts, scores, strict=True)))
        ranking.append(value * root / np.sqrt(degree[global_draws(config, catalogs[2]).users[n]]))
        ego = [user_rows[batch.ego_users[batch.users[n]]], item_rows[batch.ego_items[batch.positives[n]]]]
        other = sum(item_rows[batch.ego_items[k]].square().sum() for k in pool) / len(pool)
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
    user_rows, item_rows = tables.user.lookup(batch.user_route), tables.item.lookup(batch.item_route)
    e = network.embed(batch, user_rows, item_rows)
    loss = network._diffusion(e, batch).sum()
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        trained = gradient is not None and bool(gradient.abs().sum() > 0)
        assert trained == ("denoiser" in name), name


def test_the_weights_of_the_loss_parts(catalogs):
    weights = {"w_tc": 0.3, "w_diff": 0.2, "w_reg": 0.1}
    config, network, tables = setup(catalogs[2], train=weights)
    batch = loader_of(config, catalogs[2], Communicator(), network).assemble(global_draws(config, catalogs[2]))
    loss, parts = network(batch, tables.user.lookup(batch.user_route), tables.item.lookup(batch.item_route))
    want = parts["bpr"] + 0.3 * parts["tc"] + 0.2 * parts["diffusion"] + 0.1 * parts["l2"]
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-5)


def test_what_is_watched(catalogs):
    _config, network, tables = setup(catalogs[2])
    member = network.members[0]
    content = member.content({n: torch.from_numpy(catalogs[2].features(n)) for n in network.shape.modalities})
    streams = member.streams(tables.item.weight, content)
    untouched = member.watch(streams, content, content)
    assert untouched["kept_energy/m0"].tolist() == pytest.approx([1.0] * catalogs[2].items)
    halved = member.watch(streams, content, {name: x / 2 for name, x in content.items()})
    assert halved["kept_energy/m0"].tolist() == pytest.approx([0.75] * catalogs[2].items, rel=1e-5)
    assert sum(float(untouched[f"gate/{s}"][0]) for s in ("id", "m0", "m1")) == pytest.approx(1.0)


def test_the_temperature_of_the_total_correlation_comes_back_from_its_bound(catalogs):
    _, network, _ = setup(catalogs[2])
    with torch.no_grad():
        network.members[0].log_scale.fill_(7.0)
    network.keep_bounds()
    assert network.correlation_temperature == pytest.approx(np.exp(-4.6))
    before = network.members[0].log_scale.clone()
    with torch.no_grad():
        network.members[0].log_scale.sub_(0.1)
    network.keep_bounds()
    assert network.members[0].log_scale == before - 0.1
    config = small_config(catalogs[2].uri, model={"correlation": {"temperature": 0.005}})
    assert build_network(config, catalogs[2], Communicator())[0].correlation_temperature == pytest.approx(np.exp(-4.6))


def test_more_interactions_than_32_bits_index_are_refused(catalogs, monkeypatch):
    rows = catalogs[2].manifest.interactions["train"]
    monkeypatch.setattr(csc, "MOST_EDGES", 2 * rows)
    Graphs.load(catalogs[2])
    monkeypatch.setattr(csc, "MOST_EDGES", 2 * rows - 1)
    with pytest.raises(InputError, match=f"has {rows:,} train interactions; at most {rows - 1:,} can be trained on"):
        Graphs.load(catalogs[2])


def test_graph_hops_are_not_loaded_where_unused(catalogs):
    config = small_config(catalogs[2].uri, model={"item_hop": False})
    graphs = load_graphs(config, catalogs[2])
    assert graphs.item_item is None
    assert graphs.user_user is not None
