"""Embeddings of the whole catalog, layer by layer, in bounded memory.

Each rank computes its own rows in chunks and looks neighbours up through row-sharded tables, so no rank holds more than
its share of anything that grows with the catalog, except the graph's index arrays. Once the streams have entered the
graph they do not mix any more, so they go through it one after the other: beside the result, a rank holds two or three
tables of one stream's width. It gives what full-graph propagation gives, for runs that were trained on the whole graph
and for those trained on samples.
"""

from collections.abc import Iterator

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.engine.planner import audience_edges
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
    users, items = _new(tables.user, model.S * model.D), _new(tables.item, model.S * model.D)
    for low, high in _chunks(users, chunk):
        users.weight[low:high] = model.users_in(tables.user.weight[low:high])[0].flatten(1)
    _items_in(model, tables.item, users, items, features, graphs, chunk, watched)
    for stream in _streams(model):
        _convolve(users, items, stream, graphs, layers, chunk)
    for low, high in _chunks(users, chunk):
        weights = model.users_in(tables.user.weight[low:high])[1]
        users.weight[low:high] = model.users_out(users.weight[low:high], weights)
    for table, graph in ((users, graphs.user_user), (items, graphs.item_item)):
        if graph is not None:
            for stream in _streams(model):
                _add_hop(table, stream, graph, chunk)
    return users, items


def _items_in(
    model: GTC,
    ids: RowTable,
    users: RowTable,
    out: RowTable,
    features: dict[str, RowTable],
    graphs: Graphs,
    chunk: int,
    watched: dict[str, float] | None,
) -> None:
    """What enters the graph for items, into `out`; `users` holds all preferences."""
    sums: dict[str, torch.Tensor] = {}
    for low, high in _chunks(out, chunk):
        audience = None
        if model.needs_audience:
            audience = _pull(*audience_edges(graphs, out.start + low, out.start + high), users)
        content = model.content({name: table.weight[low:high] for name, table in features.items()})
        filtered = model.filtered(ids.weight[low:high], content, audience)
        streams = model.streams(ids.weight[low:high], filtered)
        out.weight[low:high] = model.items_in(streams)
        if watched is not None:
            for name, values in model.watch(streams, content, filtered).items():
                sums[name] = sums.get(name, 0) + values.sum()
    if watched is not None:
        total = out.world.sum(torch.stack(list(sums.values())))
        watched |= {name: float(value) / out.rows for name, value in zip(sums, total, strict=True)}


def _convolve(users: RowTable, items: RowTable, stream: slice, graphs: Graphs, layers: int, chunk: int) -> None:
    """Add the user-item layers of one stream to its columns: x becomes x + Ax + A^2 x + ..."""
    x_user, x_item = _column(users, stream), _column(items, stream)
    for _ in range(layers):
        x_user, x_item = (
            _layer(graphs, x_user, 0, x_item, graphs.users, chunk),
            _layer(graphs, x_item, graphs.users, x_user, 0, chunk),
        )
        users.weight[:, stream] += x_user.weight
        items.weight[:, stream] += x_item.weight


def _layer(graphs: Graphs, like: RowTable, offset: int, sources: RowTable, base: int, chunk: int) -> RowTable:
    """One user-item layer: rows of nodes offset + [0, like.rows) from those of nodes base + [0, sources.rows)."""
    out, nodes = _new(like, like.width), graphs.nodes
    for low, high in _chunks(out, chunk):
        indptr, edges = take(nodes, np.arange(offset + out.start + low, offset + out.start + high))
        out.weight[low:high] = _pull(indptr, nodes.indices[edges] - np.int32(base), nodes.weight[edges], sources)
    return out


def _add_hop(table: RowTable, stream: slice, graph: CSC, chunk: int) -> None:
    """Add one hop over a graph of the table's own nodes to the columns of one stream."""
    before = _column(table, stream)
    for low, high in _chunks(table, chunk):
        indptr, edges = take(graph, np.arange(table.start + low, table.start + high))
        table.weight[low:high, stream] += _pull(indptr, graph.indices[edges], graph.weight[edges], before)


def _pull(indptr: np.ndarray, indices: np.ndarray, weight: np.ndarray, table: RowTable) -> torch.Tensor:
    """Weighted sums over edges by destination whose sources are rows of a sharded table: looks up just the rows in
    use. A collective."""
    world, ids = table.world, torch.from_numpy(indices)
    if world.size == 1:
        rows = table.weight  # all rows are here
    else:
        used, ids = torch.unique(ids, return_inverse=True)
        rows = table.lookup(make_route(used.long().to(world.device), table.rows, world))
    block = Block.forward_only(torch.from_numpy(indptr), ids, torch.from_numpy(weight), len(rows))
    return weighted_sum(block.to(world.device), rows)


def _streams(model: GTC) -> list[slice]:
    return [slice(s * model.D, (s + 1) * model.D) for s in range(model.S)]


def _chunks(table: RowTable, chunk: int) -> Iterator[tuple[int, int]]:
    """Chunks of this rank's rows; as many on every rank, the last ones empty where it has fewer."""
    rows = table.stop - table.start
    for n in range(table.world.max(-(-rows // chunk))):
        yield min(n * chunk, rows), min((n + 1) * chunk, rows)


def _new(like: RowTable, width: int) -> RowTable:
    return RowTable(like.name, like.rows, width, like.world, trainable=False)


def _column(table: RowTable, stream: slice) -> RowTable:
    """One stream's columns as a table of their own."""
    column = _new(table, stream.stop - stream.start)
    column.weight.copy_(table.weight[:, stream])
    return column
