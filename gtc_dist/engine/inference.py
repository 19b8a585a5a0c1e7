"""Embeddings of the whole catalog, layer by layer, in bounded memory.

Each rank computes its own rows in chunks and looks neighbours up through row-sharded tables, so no rank holds more than
its share of anything that grows with the catalog, except the graph's index arrays. It gives what full-graph
propagation gives, for runs that were trained on the whole graph and for those trained on samples.
"""

from collections.abc import Iterator

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.engine.planner import whole_audience
from gtc_dist.graph.csc import Graphs, take
from gtc_dist.model.gtc import GTC, Tables
from gtc_dist.model.propagation import Block, weighted_sum
from gtc_dist.model.table import RowTable, make_route


@torch.no_grad()
def embed_catalog(
    model: GTC,
    tables: Tables,
    features: dict[str, RowTable],
    graphs: Graphs,
    layers: int,
    chunk: int,
    watched: dict[str, float] | None = None,
) -> tuple[RowTable, RowTable]:
    """Final embeddings of all users and items as frozen tables of width S * D. A collective.

    Args:
        features: tables of the modalities' features over the model's ranks.
        layers: user-item convolution layers.
        chunk: rows of this rank that are computed at once.
        watched: filled with means over all items of what `GTC.watch` tells.
    """
    model.eval()
    users, items = tables.user, tables.item
    weights = _new(users, model.S)
    x_user, x_item = _new(users, model.S * model.D), _new(items, model.S * model.D)
    for low, high in _chunks(users, chunk):
        preference, weight = model.users_in(users.weight[low:high])
        x_user.weight[low:high], weights.weight[low:high] = preference.flatten(1), weight
    sums: dict[str, torch.Tensor] = {}
    for low, high in _chunks(items, chunk):
        audience = None
        if model.needs_audience:
            audience = _pull(whole_audience(graphs, items.start + low, items.start + high), x_user)
        content = model.content({name: table.weight[low:high] for name, table in features.items()})
        filtered = model.filtered(items.weight[low:high], content, audience)
        streams = model.streams(items.weight[low:high], filtered)
        x_item.weight[low:high] = model.items_in(streams)
        for name, values in model.watch(streams, content, filtered).items():
            sums[name] = sums.get(name, 0) + values.sum()
    if watched is not None:
        total = items.world.sum(torch.stack(list(sums.values())))
        watched |= {name: float(value) / items.rows for name, value in zip(sums, total, strict=True)}
    out_user, out_item = _copy(x_user), _copy(x_item)
    for _ in range(layers):
        x_user, x_item = (
            _convolve(graphs, x_user, 0, x_item, graphs.users, chunk),
            _convolve(graphs, x_item, graphs.users, x_user, 0, chunk),
        )
        out_user.weight += x_user.weight
        out_item.weight += x_item.weight
    for low, high in _chunks(users, chunk):
        out_user.weight[low:high] = model.users_out(out_user.weight[low:high], weights.weight[low:high])
    if graphs.user_user is not None:
        out_user = _add_hop(out_user, graphs.user_user, chunk)
    if graphs.item_item is not None:
        out_item = _add_hop(out_item, graphs.item_item, chunk)
    return out_user, out_item


def _convolve(graphs: Graphs, like: RowTable, offset: int, sources: RowTable, base: int, chunk: int) -> RowTable:
    """One user-item layer: rows of nodes offset + [0, like.rows) from those of nodes base + [0, sources.rows)."""
    out, nodes = _new(like, like.width), graphs.nodes
    for low, high in _chunks(out, chunk):
        indptr, edges = take(nodes, np.arange(offset + out.start + low, offset + out.start + high))
        block = Block.build(indptr, nodes.indices[edges] - base, nodes.weight[edges], sources.rows)
        out.weight[low:high] = _pull(block, sources)
    return out


def _add_hop(table: RowTable, graph: CSC, chunk: int) -> RowTable:
    """The table's rows plus one hop over a graph of its own nodes."""
    out = _copy(table)
    for low, high in _chunks(table, chunk):
        indptr, edges = take(graph, np.arange(table.start + low, table.start + high))
        out.weight[low:high] += _pull(Block.build(indptr, graph.indices[edges], graph.weight[edges], table.rows), table)
    return out


def _pull(block: Block, table: RowTable) -> torch.Tensor:
    """Weighted sum over a block whose sources are rows of a sharded table: looks up just the rows in use."""
    used, at = torch.unique(block.indices, return_inverse=True)
    route = make_route(used.long().to(table.world.device), table.rows, table.world)
    rows = table.lookup(route)
    empty = block.t_indptr[:1]
    small = Block(len(rows), block.indptr, at.int(), block.weight, empty, empty, block.weight[:0])
    return weighted_sum(small.to(table.world.device), rows)


def _chunks(table: RowTable, chunk: int) -> Iterator[tuple[int, int]]:
    """Chunks of this rank's rows; as many on every rank, the last ones empty where it has fewer."""
    rows = table.stop - table.start
    for n in range(table.world.max(-(-rows // chunk))):
        yield min(n * chunk, rows), min((n + 1) * chunk, rows)


def _new(like: RowTable, width: int) -> RowTable:
    return RowTable(like.name, like.rows, width, like.world, trainable=False)


def _copy(table: RowTable) -> RowTable:
    copy = _new(table, table.width)
    copy.weight.copy_(table.weight)
    return copy
