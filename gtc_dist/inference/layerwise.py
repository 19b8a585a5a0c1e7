"""Embeddings of the whole catalog, layer by layer, in bounded memory.

Each rank computes its own rows in chunks and looks neighbours up through row-sharded tables, so no rank holds more than
its share of anything that grows with the catalog, except the graph's index arrays. Once the streams have entered the
graph their columns do not mix any more, so they go through it a few at a time: beside the result, a rank holds tables
of `COLUMNS` columns. It gives what full-graph propagation gives, for runs that were trained on the whole graph and for
those trained on samples.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from gtc_dist.distributed.message_passing import Block, weighted_sum
from gtc_dist.distributed.sharded_table import LookupPlan, ShardedTable, plan_lookup
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.gtc import GTC, Tables

COLUMNS = 32  # of a stream that go through the graph at once


@torch.no_grad()
def embed_catalog(
    model: GTC,
    tables: Tables,
    features: dict[str, ShardedTable],
    graphs: Graphs,
    layers: int,
    chunk: int,
    watched: dict[str, float] | None = None,
) -> tuple[ShardedTable, ShardedTable]:
    """Final embeddings of all users and items as frozen tables of width `out_width`. A collective.

    Args:
        features: tables of the modalities' features over the model's ranks.
        layers: user-item convolution layers.
        chunk: rows of this rank that are computed at once.
        watched: filled with means over all items of what `GTC.watch` tells.
    """
    users, items = embed_streams(model, tables, features, graphs, layers, chunk, watched)
    return _joined(model, users), _joined(model, items)


@torch.no_grad()
def embed_streams(
    model: GTC,
    tables: Tables,
    features: dict[str, ShardedTable],
    graphs: Graphs,
    layers: int,
    chunk: int,
    watched: dict[str, float] | None = None,
) -> tuple[ShardedTable, ShardedTable]:
    """The same before the streams are joined: tables of width T * D."""
    users, items = graph_inputs(model, tables, features, graphs, chunk, torch.float32, watched)
    edges = GraphOperators(graphs, users, items, chunk * users.width // COLUMNS)
    for columns in column_groups(model):
        of_users, of_items = edges.convolved(*edges.entering(model, users, items, columns), layers)
        apply_view_weights(of_users, model, tables.user, columns)
        users.weight[:, columns], items.weight[:, columns] = of_users.weight, of_items.weight
        item_hop = None if model.hops_first else edges.item_item
        for out, sums, hop in ((users, of_users, edges.user_user), (items, of_items, item_hop)):
            for low, high, values in hop.sums(sums) if hop else ():
                out.weight[low:high, columns] += values
    return users, items


@torch.no_grad()
def graph_inputs(
    model: GTC,
    tables: Tables,
    features: dict[str, ShardedTable],
    graphs: Graphs,
    chunk: int,
    dtype: torch.dtype,
    watched: dict[str, float] | None = None,
) -> tuple[ShardedTable, ShardedTable]:
    """What enters the graph for users and for items, tables of width T * D. A collective."""
    training = model.training
    model.eval()
    width = model.T * model.D
    users, out = _new(tables.user, width, dtype), _new(tables.item, width, dtype)
    for low, high in _chunks(users, chunk):
        users.weight[low:high] = model.users_in(tables.user.weight[low:high])[0]
    sums: dict[str, torch.Tensor] = {}
    audiences = audience_spmm(graphs, users, out, chunk) if model.needs_audience else None
    for low, high, audience in audiences.sums(users) if audiences else _nothing(out, chunk):
        content = {name: table.weight[low:high] for name, table in features.items()}
        out.weight[low:high], ways = model.items_in(tables.item.weight[low:high], content, audience)
        if watched is not None:
            for name, values in model.watch(ways).items():
                sums[name] = sums.get(name, 0) + values.sum()
    if watched is not None:
        total = out.comm.all_reduce(torch.stack(list(sums.values())))
        watched |= {name: float(value) / out.rows for name, value in zip(sums, total, strict=True)}
    model.train(training)
    return users, out


def audience_spmm(graphs: Graphs, users: ShardedTable, items: ShardedTable, chunk: int) -> "ShardedSpMM":
    """From users to the mean over each item's users. A collective."""
    return ShardedSpMM(graphs.nodes.indptr, graphs.nodes.indices, None, graphs.users, items, users, chunk)


def apply_view_weights(sums: ShardedTable, model: GTC, user: ShardedTable, columns: slice) -> None:
    """Multiply columns of the users' sums with their weights of the columns' stream."""
    weights = user.weight[:, model.user_widths[0] :]
    sums.weight *= model.stream_weights(weights)[:, columns.start // model.D, None]


def column_groups(model: GTC) -> list[slice]:
    """The columns of all streams, at most `COLUMNS` at once and never of two streams."""
    return [
        slice(first, min(first + COLUMNS, stream + model.D))
        for stream in range(0, model.T * model.D, model.D)
        for first in range(stream, stream + model.D, COLUMNS)
    ]


class ShardedSpMM:
    """Edges into this rank's rows, in chunks, for weighted sums over tables of any width. A collective to make.

    Args:
        indptr, indices, weight: of a graph by destination (CSC). weight None: the mean over a destination's edges.
        first: number of the graph's destination that is row 0 of `rows`.
        rows: a table with the destinations' rows.
        sources: a table with the sources' rows; source `base` of the graph is its row 0.
        chunk: destinations at once.
    """

    def __init__(
        self, indptr, indices, weight, first: int, rows: ShardedTable, sources: ShardedTable, chunk: int, base: int = 0
    ):
        self.indptr, self.indices, self.weight, self.base = indptr, indices, weight, base
        self.comm, self.bounds = rows.comm, list(_chunks(rows, chunk))
        self.first = first + rows.start
        # with several ranks: which rows of others a chunk needs, found once for all columns and layers
        self.routes = [self._route(*bounds, sources.rows) for bounds in self.bounds] if self.comm.size > 1 else []

    def sums(self, sources: ShardedTable) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, end, float32 [end - first, width]), chunk by chunk. A collective."""
        for number, (low, high) in enumerate(self.bounds):
            edges, indptr = self._edges(low, high)
            if self.weight is None:
                count = np.diff(indptr)
                weight = np.repeat(1 / np.maximum(count, 1).astype(np.float32), count)
            else:
                weight = np.array(self.weight[edges])  # shared memory is read-only
            if self.routes:
                position, route = self.routes[number]
                rows = sources.lookup(route)
            else:
                position, rows = torch.from_numpy(self.indices[edges] - np.int32(self.base)), sources.weight
            block = Block.forward_only(torch.from_numpy(indptr), position, torch.from_numpy(weight), len(rows))
            yield low, high, weighted_sum(block.to(self.comm.device), rows).float()

    def _edges(self, low: int, high: int) -> tuple[slice, np.ndarray]:
        indptr = self.indptr[self.first + low : self.first + high + 1]
        return slice(int(indptr[0]), int(indptr[-1])), indptr - indptr[0]

    def _route(self, low: int, high: int, rows: int) -> tuple[torch.Tensor, LookupPlan]:
        ids = torch.from_numpy(self.indices[self._edges(low, high)[0]] - np.int32(self.base))
        used, position = torch.unique(ids, return_inverse=True)
        route = plan_lookup(used.long().to(self.comm.device), rows, self.comm)
        return position.int(), replace(route, position=None)  # rows come in the order of `used`


class GraphOperators:
    """A catalog's graphs, ready for sums over this rank's rows. A collective to make."""

    def __init__(self, graphs: Graphs, users: ShardedTable, items: ShardedTable, chunk: int):
        nodes = (graphs.nodes.indptr, graphs.nodes.indices, graphs.nodes.weight)
        self.to_users = ShardedSpMM(*nodes, 0, users, items, chunk, base=graphs.users)
        self.to_items = ShardedSpMM(*nodes, graphs.users, items, users, chunk)
        self.user_user, self.item_item = (
            None if hop is None else ShardedSpMM(hop.indptr, hop.indices, hop.weight, 0, table, table, chunk)
            for hop, table in ((graphs.user_user, users), (graphs.item_item, items))
        )

    @torch.no_grad()
    def entering(
        self, model: GTC, users: ShardedTable, items: ShardedTable, columns: slice
    ) -> tuple[ShardedTable, ShardedTable]:
        """Some columns of what enters the graph, of one stream, float32, after the hop where it comes first."""
        x_user, x_item = _column(users, columns), _column(items, columns)
        if model.hops_first and model.is_content(columns.start // model.D):
            x_item = _layer(self.item_item, x_item, x_item)
        return x_user, x_item

    @torch.no_grad()
    def convolved(self, x_user: ShardedTable, x_item: ShardedTable, layers: int) -> tuple[ShardedTable, ShardedTable]:
        """x + Ax + A^2 x + ... of what enters the graph, float32. A collective."""
        sums = _column(x_user, slice(None)), _column(x_item, slice(None))
        for _ in range(layers):
            x_user, x_item = _layer(self.to_users, x_user, x_item), _layer(self.to_items, x_item, x_user)
            for total, x in zip(sums, (x_user, x_item), strict=True):
                total.weight += x.weight
        return sums


def _layer(edges: ShardedSpMM, like: ShardedTable, sources: ShardedTable) -> ShardedTable:
    out = _new(like, like.width)
    for low, high, values in edges.sums(sources):
        out.weight[low:high] = values
    return out


def _nothing(table: ShardedTable, chunk: int) -> Iterator[tuple[int, int, None]]:
    return ((low, high, None) for low, high in _chunks(table, chunk))


def _chunks(table: ShardedTable, chunk: int) -> Iterator[tuple[int, int]]:
    """Chunks of this rank's rows; as many on every rank, the last ones empty where it has fewer."""
    rows = table.stop - table.start
    for n in range(table.comm.all_reduce_max(-(-rows // chunk))):
        yield min(n * chunk, rows), min((n + 1) * chunk, rows)


def _new(like: ShardedTable, width: int, dtype: torch.dtype = torch.float32) -> ShardedTable:
    return ShardedTable(like.name, like.rows, width, like.comm, dtype=dtype, trainable=False)


def _joined(model: GTC, streams: ShardedTable) -> ShardedTable:
    if model.out_width == streams.width:
        return streams
    out = _new(streams, model.out_width)
    out.weight = model.joined(streams.weight)
    return out


def _column(table: ShardedTable, columns: slice) -> ShardedTable:
    """Some columns as a table of their own, float32."""
    column = _new(table, len(range(*columns.indices(table.width))))
    column.weight.copy_(table.weight[:, columns])
    return column
