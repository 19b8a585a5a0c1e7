"""Embeddings of the whole catalog, layer by layer, in bounded memory.

Each rank computes its own rows in chunks and looks neighbours up through row-sharded tables, so no rank holds more than
its share of anything that grows with the catalog, except the graph's index arrays. Once the streams have entered the
graph their columns do not mix any more, so they go through it a few at a time: beside the result, a rank holds tables
of `COLUMNS` columns. It gives what full-graph propagation gives, for runs that were trained on the whole graph and for
those trained on samples.
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

COLUMNS = 32  # of a stream that go through the graph at once


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
    users, items = inputs(model, tables, features, graphs, chunk, torch.float32, watched)
    for columns in column_groups(model):
        of_users, of_items = convolved(users, items, columns, graphs, layers, chunk)
        weigh(of_users, model, tables.user, columns)
        users.weight[:, columns], items.weight[:, columns] = of_users.weight, of_items.weight
        for out, sums, graph in ((users, of_users, graphs.user_user), (items, of_items, graphs.item_item)):
            for low, high, hop in hops(sums, graph, chunk):
                out.weight[low:high, columns] += hop
    return users, items


@torch.no_grad()
def inputs(
    model: GTC,
    tables: Tables,
    features: dict[str, RowTable],
    graphs: Graphs,
    chunk: int,
    dtype: torch.dtype,
    watched: dict[str, float] | None = None,
) -> tuple[RowTable, RowTable]:
    """What enters the graph for users and for items, tables of width S * D. A collective."""
    training = model.training
    model.eval()
    width = model.S * model.D
    users, out = _new(tables.user, width, dtype), _new(tables.item, width, dtype)
    for low, high in _chunks(users, chunk):
        users.weight[low:high] = model.users_in(tables.user.weight[low:high])[0].flatten(1)
    sums: dict[str, torch.Tensor] = {}
    for low, high in _chunks(out, chunk):
        audience = None
        if model.needs_audience:
            audience = _pull(*audience_edges(graphs, out.start + low, out.start + high), users)
        ids = tables.item.weight[low:high]
        content = model.content({name: table.weight[low:high] for name, table in features.items()})
        filtered = model.filtered(ids, content, audience)
        streams = model.streams(ids, filtered)
        out.weight[low:high] = model.items_in(streams)
        if watched is not None:
            for name, values in model.watch(streams, content, filtered).items():
                sums[name] = sums.get(name, 0) + values.sum()
    if watched is not None:
        total = out.world.sum(torch.stack(list(sums.values())))
        watched |= {name: float(value) / out.rows for name, value in zip(sums, total, strict=True)}
    model.train(training)
    return users, out


@torch.no_grad()
def convolved(
    users: RowTable, items: RowTable, columns: slice, graphs: Graphs, layers: int, chunk: int
) -> tuple[RowTable, RowTable]:
    """x + Ax + A^2 x + ... of some columns x of what enters the graph, float32. A collective."""
    x_user, x_item = _column(users, columns), _column(items, columns)
    sums = _column(x_user, slice(None)), _column(x_item, slice(None))
    for _ in range(layers):
        x_user, x_item = (
            _layer(graphs, x_user, 0, x_item, graphs.users, chunk),
            _layer(graphs, x_item, graphs.users, x_user, 0, chunk),
        )
        for total, x in zip(sums, (x_user, x_item), strict=True):
            total.weight += x.weight
    return sums


def weigh(sums: RowTable, model: GTC, user: RowTable, columns: slice) -> None:
    """Multiply columns of the users' sums with their weights of the columns' stream."""
    weights = user.weight[:, model.S * model.D :]
    sums.weight *= model.stream_weights(weights)[:, columns.start // model.D, None]


@torch.no_grad()
def hops(sums: RowTable, graph: CSC | None, chunk: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """What a hop over a graph of the table's own nodes adds: (first, end, values), by chunks; nothing
    without the graph. A collective."""
    for low, high in _chunks(sums, chunk) if graph is not None else ():
        indptr, edges = take(graph, np.arange(sums.start + low, sums.start + high))
        yield low, high, _pull(indptr, graph.indices[edges], graph.weight[edges], sums)


def column_groups(model: GTC) -> list[slice]:
    """The columns of all streams, at most `COLUMNS` at once and never of two streams."""
    return [
        slice(first, min(first + COLUMNS, stream + model.D))
        for stream in range(0, model.S * model.D, model.D)
        for first in range(stream, stream + model.D, COLUMNS)
    ]


def _layer(graphs: Graphs, like: RowTable, offset: int, sources: RowTable, base: int, chunk: int) -> RowTable:
    """One user-item layer: rows of nodes offset + [0, like.rows) from those of nodes base + [0, sources.rows)."""
    out, nodes = _new(like, like.width), graphs.nodes
    for low, high in _chunks(out, chunk):
        indptr, edges = take(nodes, np.arange(offset + out.start + low, offset + out.start + high))
        out.weight[low:high] = _pull(indptr, nodes.indices[edges] - np.int32(base), nodes.weight[edges], sources)
    return out


def _pull(indptr: np.ndarray, indices: np.ndarray, weight: np.ndarray, table: RowTable) -> torch.Tensor:
    """Weighted sums over edges by destination whose sources are rows of a sharded table: looks up just the rows in
    use. A collective."""
    world, ids = table.world, torch.from_numpy(indices)
    if world.size == 1 and table.weight.dtype == torch.float32:
        rows = table.weight  # all rows are here
    else:
        used, ids = torch.unique(ids, return_inverse=True)
        rows = table.lookup(make_route(used.long().to(world.device), table.rows, world)).float()
    block = Block.forward_only(torch.from_numpy(indptr), ids, torch.from_numpy(weight), len(rows))
    return weighted_sum(block.to(world.device), rows)


def _chunks(table: RowTable, chunk: int) -> Iterator[tuple[int, int]]:
    """Chunks of this rank's rows; as many on every rank, the last ones empty where it has fewer."""
    rows = table.stop - table.start
    for n in range(table.world.max(-(-rows // chunk))):
        yield min(n * chunk, rows), min((n + 1) * chunk, rows)


def _new(like: RowTable, width: int, dtype: torch.dtype = torch.float32) -> RowTable:
    return RowTable(like.name, like.rows, width, like.world, dtype=dtype, trainable=False)


def _column(table: RowTable, columns: slice) -> RowTable:
    """Some columns as a table of their own, float32."""
    column = _new(table, len(range(*columns.indices(table.width))))
    column.weight.copy_(table.weight[:, columns])
    return column
