"""Slow reference of the whole network: dense matrices, no code shared with the package for graphs and gates."""

import numpy as np
import torch
import torch.nn.functional as F
from small import small_config
from steps import set_away_from_start

from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.model.build import build_network


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
        sides = member_reference(network, m, rows_m, weights, common, ids_m, catalog, config.model)
        for out, views in zip((users, items), sides, strict=True):
            views = views.view(len(views), -1, D)
            out.append(views.sum(1) if network.variant.sum_views else views.flatten(1))
    return torch.cat(users, dim=1), torch.cat(items, dim=1)


def member_reference(
    network, m: int, rows, weights, common, ids, catalog: Catalog, model
) -> tuple[torch.Tensor, torch.Tensor]:
    """One member's views of users and items, side by side."""
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
            liked = unit_mean_square(audience @ rows) if gated else D**0.5 * (audience @ preference[:, s])
            c[audience.sum(1) == 0] = 0  # nobody's: known by its content alone
            c = torch.cat([c, liked], dim=1)
            x0 = member.filters[s - 1](x0, c)
        contents.append(x0)
    if gated:
        contents = [ids / (1 + torch.exp(-x)) for x in contents]
    views = torch.stack([F.normalize(x, dim=1) for x in [ids, *contents]], dim=1)
    gate = torch.full((catalog.items, S), 1 / S)
    if variant.view_attention:
        for i in range(catalog.items):
            cosine = views[i] @ views[i].T
            agreement = torch.stack([(cosine[s].sum() - cosine[s, s]) / (S - 1) for s in range(S)])
            gate[i] = torch.softmax(member.gate_scale * agreement, dim=0)
    if gated:
        weighted = sum(gate[:, s : s + 1] * contents[s - 1] for s in range(1, S))
        content = member.content_length * weighted / gate[:, 1:].sum(1, keepdim=True)
        if model.item_hop:
            content = dense(catalog.graph("item_item"), catalog.items) @ content
        views = torch.stack([ids, content], dim=1)
    elif variant.unit_rows:
        fused = sum(gate[:, s : s + 1] * views[:, s] for s in range(S))
        first = F.normalize(views[:, 0] + fused, dim=1)
        views = torch.cat([first[:, None], views[:, 1:]], dim=1) * S * gate[:, :, None]
    else:
        content = [views[:, s] * member.content_length[s - 1] for s in range(1, S)]
        first = ids + sum(gate[:, s : s + 1] * content[s - 1] for s in range(1, S))
        scaled = [S * gate[:, s : s + 1] * content[s - 1] for s in range(1, S)]
        views = torch.stack([first, *scaled], dim=1)
    nodes = torch.cat([preference.flatten(1), views.flatten(1)])
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
