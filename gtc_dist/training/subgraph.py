"""Plans: which rows and blocks a batch needs, on the whole graph or on a sample of it.

Both give the same numbers where the sample takes every neighbour; a test holds them to that.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.message_passing import Block
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup, plan_whole_table
from gtc_dist.graph.csc import Graphs, edge_of, take
from gtc_dist.graph.neighbor_sampler import Layer, Sampler, thin
from gtc_dist.model.batch import HistoryLookup
from gtc_dist.training.run_log import Stopwatch


@dataclass(frozen=True)
class PlannerOptions:
    layers: int
    audience: bool
    exclude_seed_edges: bool
    fanout: tuple[int, ...]  # sampled: last layer first
    item_fanout: int
    user_fanout: int
    layer_nodes: int | None  # sampled: expected new nodes of this rank's layers and hops; None: all that are drawn
    sampler: str
    threads: int
    history: bool  # sampled: the batch's rows of a history are wanted
    hops_first: bool  # the hop over the item-item graph is of what enters the graph, not of what leaves it


class FullGraphBuilder:
    """The whole graph as one block; only the hops are cut to the batch.

    Args:
        features: tables of the modalities' features, float16; read once, whole.
    """

    def __init__(
        self, graphs: Graphs, features: dict[str, ShardedTable], options: PlannerOptions, device: torch.device
    ):
        self.graphs, self.options = graphs, options
        comm = next(iter(features.values())).comm
        self.watch = Stopwatch()
        users, items = graphs.users, graphs.items
        whole_items = plan_whole_table(items, comm)
        self.features = {name: table.lookup(whole_items).float().to(device) for name, table in features.items()}
        self.routes = {"user_route": plan_whole_table(users, comm).to(device), "item_route": whole_items.to(device)}
        nodes = graphs.nodes
        self.block = Block.build(nodes.indptr, nodes.indices, nodes.weight, users + items).to(device)
        self.audience = whole_audience(graphs).to(device) if options.audience else None
        item_item = graphs.item_item
        self.input_hop = None
        if options.hops_first:
            self.input_hop = Block.build(item_item.indptr, item_item.indices, item_item.weight, items).to(device)
        # edge ids of an item's users follow those of the users' items; where they stand by source
        self.first_audience_edge = int(nodes.indptr[users])
        self.audience_by_source = _position_by_source(nodes, users, items) if options.audience else None

    def plan(self, users: np.ndarray, items: np.ndarray, pairs: np.ndarray, seed: int) -> dict:
        """Fields of the batch.

        Args:
            users, items: the batch's unique ones, [u] and [i], catalog indexes.
            pairs: int64 [n, 2], interactions of the global batch, whose edges are left out if so configured.
            seed: of the sampling; not used on the whole graph.
        """
        self.watch.part("sampling")
        graphs, options = self.graphs, self.options
        block, audience = self.block, self.audience
        if options.exclude_seed_edges:
            to_users, to_items = _seed_edges(graphs, pairs)
            edges = np.concatenate([to_users, to_items])
            block = _without(block, edges, edges)  # symmetric: both orders of its edges are alike
            if audience is not None:
                edges = to_items - self.first_audience_edge
                audience = _without(audience, edges, self.audience_by_source[edges])
        fields = {
            **self.routes,
            "features": self.features,
            "audience": audience,
            "input_nodes": None,
            "blocks": [block] * options.layers,
            "seed_users": graphs.users,
            "seed_items": graphs.items,
            "user_hop": _whole_hop(graphs.user_user, users),
            "input_hop": self.input_hop,
            "item_hop": None if options.hops_first else _whole_hop(graphs.item_item, items),
            "user_rows": torch.from_numpy(users),
            "item_rows": torch.from_numpy(items),
            "ego_users": torch.from_numpy(users),
            "ego_items": torch.from_numpy(items),
            "history": None,
        }
        self.watch.part(None)
        return fields


class SampledGraphBuilder:
    """DGL blocks around the batch; feature rows are looked up here, in the prefetch thread.

    Nothing here is linear in the catalog: a plan costs what its batch, its fanouts and `layer_nodes` ask for.

    Args:
        features: tables whose world is the prefetch thread's.
    """

    def __init__(self, graphs: Graphs, features: dict[str, ShardedTable], options: PlannerOptions):
        self.graphs, self.options, self.features = graphs, options, features
        self.comm = next(iter(features.values())).comm
        self.watch = Stopwatch()
        self.nodes, self.item_item, self.user_user = (
            None if graph is None else Sampler(graph, options.sampler, options.threads)
            for graph in (graphs.nodes, graphs.item_item, graphs.user_user)
        )

    def plan(self, users: np.ndarray, items: np.ndarray, pairs: np.ndarray, seed: int) -> dict:
        self.watch.part("sampling")
        U, options = self.graphs.users, self.options
        self.rng = np.random.default_rng(seed)
        for offset, sampler in enumerate((self.nodes, self.item_item, self.user_user)):
            if sampler is not None:
                sampler.seed(seed + offset)
        user_hop, seed_users = self._hop(self.user_user, users, options.user_fanout)
        output_hop = None if options.hops_first else self.item_item
        item_hop, seed_items = self._hop(output_hop, items, options.item_fanout)
        excluded = np.sort(np.concatenate(_seed_edges(self.graphs, pairs))) if options.exclude_seed_edges else None

        frontier = np.concatenate([seed_users, seed_items + U])
        blocks = []
        for fanout in options.fanout:
            block, frontier = self._layer(frontier, fanout, excluded)
            blocks.insert(0, block)
        in_users, in_items = frontier[frontier < U], frontier[frontier >= U] - U
        order = np.empty(len(frontier), np.int64)
        order[frontier >= U] = np.arange(len(in_items))
        hop = self.item_item if options.hops_first else None
        input_hop, in_items = self._hop(hop, in_items, options.item_fanout)
        audience, in_users = self._audience(in_users, in_items, excluded)
        order[frontier < U] = np.arange((frontier < U).sum())
        order[frontier >= U] += len(in_users)  # which may have grown by an audience
        self.watch.part("features")
        item_route = plan_lookup(torch.from_numpy(in_items), self.graphs.items, self.comm)
        fields = {
            "user_route": plan_lookup(torch.from_numpy(in_users), U, self.comm),
            "item_route": item_route,
            "features": {name: table.lookup(item_route).float() for name, table in self.features.items()},
            "audience": audience,
            "input_nodes": torch.from_numpy(order),
            "blocks": blocks,
            "seed_users": len(seed_users),
            "seed_items": len(seed_items),
            "user_hop": user_hop,
            "input_hop": input_hop,
            "item_hop": item_hop,
            "user_rows": torch.arange(len(users)),
            "item_rows": torch.arange(len(items)),
            "ego_users": torch.arange(len(users)),
            "ego_items": torch.arange(len(items)),
            "history": self._history(users, items, pairs) if options.history else None,
        }
        self.watch.part(None)
        return fields

    def _history(self, users: np.ndarray, items: np.ndarray, pairs: np.ndarray) -> HistoryLookup:
        """Routes of the batch's rows of a history, and the edges of `pairs` that end in them. A collective."""
        graphs, options = self.graphs, self.options
        if not options.exclude_seed_edges or not options.layers:
            pairs = pairs[:0]
        weight = graphs.nodes.weight[_seed_edges(graphs, pairs)[0]]
        of_users, left_items = _left_out(users, pairs[:, 0], pairs[:, 1], weight)
        of_items, left_users = _left_out(items, pairs[:, 1], pairs[:, 0], weight)
        rows = ((users, graphs.users), (items, graphs.items), (left_users, graphs.users), (left_items, graphs.items))
        routes = [plan_lookup(torch.from_numpy(ids), total, self.comm) for ids, total in rows]
        return HistoryLookup(*routes, of_users, of_items)

    def _hop(self, sampler: Sampler | None, batch: np.ndarray, fanout: int) -> tuple[Block | None, np.ndarray]:
        """One hop to the batch's rows and the seeds that it needs, the batch first."""
        if sampler is None:
            return None, batch
        layer = sampler.layer(batch, fanout)
        weight = sampler.graph.weight[layer.edges] * layer.correction[layer.destination]
        layer, weight = self._thinned(layer, weight, np.arange(len(layer.sources)) < len(batch))
        return Block.build(layer.indptr, layer.positions, weight, len(layer.sources)), layer.sources

    def _layer(self, frontier: np.ndarray, fanout: int, excluded: np.ndarray | None) -> tuple[Block, np.ndarray]:
        """A user-item layer with weights 1 / sqrt(degree * degree), corrected for the sampling, and its sources, the
        frontier first."""
        layer = self.nodes.layer(frontier, fanout)
        norm = 1 / np.sqrt(np.maximum(_degree(self.graphs.nodes, layer.sources), 1)).astype(np.float32)
        weight = norm[layer.positions] * (norm[: len(frontier)] * layer.correction)[layer.destination]
        _leave_out(layer, weight, excluded)
        layer, weight = self._thinned(layer, weight, np.arange(len(layer.sources)) < len(frontier))
        return Block.build(layer.indptr, layer.positions, weight, len(layer.sources)), layer.sources

    def _audience(
        self, in_users: np.ndarray, in_items: np.ndarray, excluded: np.ndarray | None
    ) -> tuple[Block | None, np.ndarray]:
        """Mean over (sampled) users of each in-item, and the in-users with those users added behind."""
        if not self.options.audience:
            return None, in_users
        destinations = in_items + self.graphs.users
        layer = self.nodes.layer(destinations, self.options.user_fanout, keep_destinations=False)
        degree = np.maximum(_degree(self.graphs.nodes, destinations), 1).astype(np.float32)
        weight = (layer.correction / degree)[layer.destination]  # corrected sum over the degree: the mean
        _leave_out(layer, weight, excluded)
        layer, weight = self._thinned(layer, weight, _place(in_users, layer.sources) >= 0)
        at = _place(in_users, layer.sources)
        more = layer.sources[at < 0]
        at[at < 0] = len(in_users) + np.arange(len(more))
        block = Block.build(layer.indptr, at[layer.positions], weight, len(in_users) + len(more))
        return block, np.concatenate([in_users, more])

    def _thinned(self, layer: Layer, weight: np.ndarray, free: np.ndarray) -> tuple[Layer, np.ndarray]:
        if self.options.layer_nodes is None:
            return layer, weight
        return thin(layer, weight, free, self.options.layer_nodes, self.rng)


def _degree(graph: CSC, destinations: np.ndarray) -> np.ndarray:
    return graph.indptr[destinations + 1] - graph.indptr[destinations]


def _leave_out(layer: Layer, weight: np.ndarray, excluded: np.ndarray | None) -> None:
    """Weight 0 for a layer's edges that are among `excluded` (sorted edge ids)."""
    if excluded is not None and len(excluded):
        at = np.minimum(np.searchsorted(excluded, layer.edges), len(excluded) - 1)
        weight[excluded[at] == layer.edges] = 0


def _left_out(
    rows: np.ndarray, destination: np.ndarray, source: np.ndarray, weight: np.ndarray
) -> tuple[Block, np.ndarray]:
    """Of some edges those that end in `rows`, as a block, and its sources."""
    at = _place(rows, destination)
    ends = at >= 0
    sources, column = np.unique(source[ends], return_inverse=True)
    edges = sp.csr_matrix((weight[ends], (at[ends], column)), shape=(len(rows), len(sources)))
    arrays = (torch.from_numpy(array) for array in (edges.indptr, edges.indices, edges.data))
    return Block.forward_only(*arrays, len(sources)), sources


def _place(among: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Position of each id in `among` (unique, any order), -1 where it is not there."""
    if not len(among):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(among)
    at = order[np.minimum(np.searchsorted(among, ids, sorter=order), len(among) - 1)]
    return np.where(among[at] == ids, at, -1)


def whole_audience(graphs: Graphs) -> Block:
    """Mean over all users of each item."""
    indptr = graphs.nodes.indptr[graphs.users :]
    degree = np.diff(indptr)
    weight = np.repeat(1 / np.maximum(degree, 1).astype(np.float32), degree)
    return Block.build(indptr - indptr[0], graphs.nodes.indices[indptr[0] :], weight, graphs.users)


def _whole_hop(graph: CSC | None, rows: np.ndarray) -> Block | None:
    if graph is None:
        return None
    indptr, edges = take(graph, rows)
    return Block.build(indptr, graph.indices[edges], graph.weight[edges], len(graph.indptr) - 1)


def _seed_edges(graphs: Graphs, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edge ids of train interactions [n, 2]: into their users, into their items."""
    users, items = pairs[:, 0], pairs[:, 1] + graphs.users
    return edge_of(graphs.nodes, users, items), edge_of(graphs.nodes, items, users)


def _position_by_source(nodes: CSC, users: int, items: int) -> np.ndarray:
    """Where each edge user -> item stands when the edges are ordered by source, int64 [E]."""
    first = nodes.indptr[users]
    shape = (items, users)
    number = np.arange(len(nodes.indices) - first)
    by_item = sp.csr_matrix((number, nodes.indices[first:], nodes.indptr[users:] - first), shape=shape)
    position = np.empty_like(number)
    position[by_item.tocsc().data] = number
    return position


def _without(block: Block, edges: np.ndarray, by_source: np.ndarray) -> Block:
    """The block with the weights of some edges zero; their positions by destination and by source."""
    weight, t_weight = block.weight.clone(), block.t_weight.clone()
    weight[torch.from_numpy(edges).to(weight.device)] = 0
    t_weight[torch.from_numpy(by_source).to(weight.device)] = 0
    return replace(block, weight=weight, t_weight=t_weight)
