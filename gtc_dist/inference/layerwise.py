"""Layer-wise inference: embeddings of the whole catalog, in bounded memory.

Each rank computes its own rows in chunks and looks neighbours up in row-wise sharded tables, so it holds only its share
of everything that grows with the catalog, except the graph's index arrays. After the views have entered the graph,
their columns are independent, so they are propagated in groups: beside the result, a rank holds tables of `COLUMNS`
columns. The result equals full-graph propagation, whether the run was trained on the whole graph or on samples.
"""

from collections.abc import Iterator

import torch

from gtc_dist.distributed.sharded_spmm import ShardedSpMM, row_chunks
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.model.gtc import GTC, Tables

COLUMNS = 32  # of a view that are propagated at once


@torch.no_grad()
def embed_catalog(
    network: GTC,
    tables: Tables,
    features: dict[str, ShardedTable],
    graphs: Graphs,
    chunk: int,
    diagnostics: dict[str, float] | None = None,
) -> Embeddings:
    """The network's embeddings of all users and items, frozen tables of width `out_width`. Collective: every rank must
    call it.

    Args:
        features: modality -> table of the items' features, over the network's ranks.
        chunk: rows of this rank computed at once.
        diagnostics: filled with the mean of each of `GTC.diagnostics` over all items.
    """
    users, items = embed_views(network, tables, features, graphs, chunk, diagnostics)
    return Embeddings(_join_views(network, users), _join_views(network, items))


@torch.no_grad()
def embed_views(
    network: GTC,
    tables: Tables,
    features: dict[str, ShardedTable],
    graphs: Graphs,
    chunk: int,
    diagnostics: dict[str, float] | None = None,
) -> Embeddings:
    """`embed_catalog` before the views are joined: tables of width node views * D. Collective: every rank must call
    it."""
    users, items = graph_inputs(network, tables, features, graphs, chunk, torch.float32, diagnostics)
    operators = GraphOperators(graphs, users, items, chunk * users.width // COLUMNS)
    for columns in column_groups(network):
        inputs = operators.input_columns(network, users, items, columns)
        user_sums, item_sums = operators.propagate(*inputs, network.model_config.layers)
        apply_view_weights(user_sums, network, tables.user, columns)
        users.weight[:, columns], items.weight[:, columns] = user_sums.weight, item_sums.weight
        item_hop = None if network.item_hop_first else operators.item_item
        for out, sums, hop in ((users, user_sums, operators.user_user), (items, item_sums, item_hop)):
            for low, high, values in hop.sums(sums) if hop else ():
                out.weight[low:high, columns] += values
    return Embeddings(users, items)


@torch.no_grad()
def graph_inputs(
    network: GTC,
    tables: Tables,
    features: dict[str, ShardedTable],
    graphs: Graphs,
    chunk: int,
    dtype: torch.dtype,
    diagnostics: dict[str, float] | None = None,
) -> Embeddings:
    """Rows of all users and items that enter the graph, tables of width node views * D. Collective: every rank must
    call it."""
    training = network.training
    network.eval()
    width = network.n_node_views * network.dim
    users, items = _empty_like(tables.user, width, dtype), _empty_like(tables.item, width, dtype)
    for low, high in row_chunks(users, chunk):
        users.weight[low:high] = network.encode_users(tables.user.weight[low:high, : network.user_widths[0]])
    sums: dict[str, torch.Tensor] = {}
    audiences = audience_spmm(graphs, users, items, chunk) if network.has_filter else None
    for low, high, audience in audiences.sums(users) if audiences else _chunks_without_audience(items, chunk):
        chunk_features = {name: table.weight[low:high] for name, table in features.items()}
        items.weight[low:high], encoded = network.encode_items(tables.item.weight[low:high], chunk_features, audience)
        if diagnostics is not None:
            for name, values in network.diagnostics(encoded).items():
                sums[name] = sums.get(name, 0) + values.sum()
    if diagnostics is not None:
        total = items.comm.all_reduce(torch.stack(list(sums.values())))
        diagnostics |= {name: float(value) / items.rows for name, value in zip(sums, total, strict=True)}
    network.train(training)
    return Embeddings(users, items)


def audience_spmm(graphs: Graphs, users: ShardedTable, items: ShardedTable, chunk: int) -> ShardedSpMM:
    """Operator from user rows to the mean over each item's users. Collective: every rank must call it."""
    return ShardedSpMM(graphs.nodes.indptr, graphs.nodes.indices, None, graphs.users, items, users, chunk)


def apply_view_weights(sums: ShardedTable, network: GTC, user: ShardedTable, columns: slice) -> None:
    """Multiply a column group of the users' sums by the users' weights of its view, in place."""
    weights = user.weight[:, network.user_widths[0] :]
    sums.weight *= network.view_weights(weights)[:, columns.start // network.dim, None]


def column_groups(network: GTC) -> list[slice]:
    """The columns of all views in groups of at most `COLUMNS`, each within one view."""
    return [
        slice(first, min(first + COLUMNS, view + network.dim))
        for view in range(0, network.n_node_views * network.dim, network.dim)
        for first in range(view, view + network.dim, COLUMNS)
    ]


class GraphOperators:
    """The graphs of a catalog as operators for this rank's rows. The constructor and the methods are collectives."""

    def __init__(self, graphs: Graphs, users: ShardedTable, items: ShardedTable, chunk: int):
        nodes = (graphs.nodes.indptr, graphs.nodes.indices, graphs.nodes.weight)
        self.to_users = ShardedSpMM(*nodes, 0, users, items, chunk, base=graphs.users)
        self.to_items = ShardedSpMM(*nodes, graphs.users, items, users, chunk)
        self.user_user, self.item_item = (
            None if hop is None else ShardedSpMM(hop.indptr, hop.indices, hop.weight, 0, table, table, chunk)
            for hop, table in ((graphs.user_user, users), (graphs.item_item, items))
        )

    @torch.no_grad()
    def input_columns(
        self, network: GTC, users: ShardedTable, items: ShardedTable, columns: slice
    ) -> tuple[ShardedTable, ShardedTable]:
        """A column group of the graph inputs, float32; content views after the item-item hop where it comes first."""
        x_user, x_item = _columns(users, columns), _columns(items, columns)
        if network.item_hop_first and network.is_content(columns.start // network.dim):
            x_item = _product(self.item_item, x_item, x_item)
        return x_user, x_item

    @torch.no_grad()
    def propagate(self, x_user: ShardedTable, x_item: ShardedTable, layers: int) -> tuple[ShardedTable, ShardedTable]:
        """Light graph convolution x + Ax + A^2 x + ... of float32 inputs."""
        sums = _columns(x_user, slice(None)), _columns(x_item, slice(None))
        for _ in range(layers):
            x_user, x_item = _product(self.to_users, x_user, x_item), _product(self.to_items, x_item, x_user)
            for total, x in zip(sums, (x_user, x_item), strict=True):
                total.weight += x.weight
        return sums


def _product(operator: ShardedSpMM, destinations: ShardedTable, sources: ShardedTable) -> ShardedTable:
    out = _empty_like(destinations, destinations.width)
    for low, high, values in operator.sums(sources):
        out.weight[low:high] = values
    return out


def _chunks_without_audience(table: ShardedTable, chunk: int) -> Iterator[tuple[int, int, None]]:
    return ((low, high, None) for low, high in row_chunks(table, chunk))


def _empty_like(table: ShardedTable, width: int, dtype: torch.dtype = torch.float32) -> ShardedTable:
    return ShardedTable(table.name, table.rows, width, table.comm, dtype=dtype, trainable=False)


def _join_views(network: GTC, views: ShardedTable) -> ShardedTable:
    if network.out_width == views.width:
        return views
    out = _empty_like(views, network.out_width)
    out.weight = network.join_views(views.weight)
    return out


def _columns(table: ShardedTable, columns: slice) -> ShardedTable:
    """Some columns as a table of their own, float32."""
    selected = _empty_like(table, len(range(*columns.indices(table.width))))
    selected.weight.copy_(table.weight[:, columns])
    return selected
