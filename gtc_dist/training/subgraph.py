"""Subgraphs: rows and blocks that a batch needs, on the whole graph or on a sample of it.

Both builders give the same numbers where the sample takes every neighbour; a test compares them.
"""

import numpy as np
import scipy.sparse as sp
import torch

from gtc_dist.config import Config
from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.device_transfer import to_device
from gtc_dist.distributed.message_passing import Block
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup, plan_whole_table
from gtc_dist.distributed.stopwatch import Stopwatch
from gtc_dist.graph.csc import Graphs, find_edges, take_edges
from gtc_dist.graph.neighbor_sampler import NeighborSampler, SampledLayer, importance_sample_sources
from gtc_dist.model.batch import ExcludedEdges, HistoryLookup, Subgraph
from gtc_dist.model.gtc import GTC


class FullGraphBuilder:
    """The whole graph as one block. Hops after the convolution are restricted to the batch.

    Args:
        features: tables of the modalities' features, float16; read once, whole.
    """

    def __init__(self, config: Config, network: GTC, graphs: Graphs, features: dict[str, ShardedTable]):
        self.graphs, self.stopwatch = graphs, Stopwatch()
        self.layers, self.exclude_seed_edges = config.model.layers, config.train.exclude_seed_edges
        device, comm = network.comm.device, next(iter(features.values())).comm
        users, items, nodes = graphs.users, graphs.items, graphs.nodes
        all_items = plan_whole_table(items, comm)
        self.features = {name: table.lookup(all_items).float().to(device) for name, table in features.items()}
        self.lookups = {
            "user_lookup": to_device(plan_whole_table(users, comm), device),
            "item_lookup": to_device(all_items, device),
        }
        self.block = Block.build(nodes.indptr, nodes.indices, nodes.weight, users + items).to(device)
        self.item_hop_first, self.input_hop = network.item_hop_first, None
        if network.item_hop_first:
            hop = graphs.item_item
            self.input_hop = Block.build(hop.indptr, hop.indices, hop.weight, items).to(device)
        self.audience = None
        if network.has_filter:
            self.audience = mean_of_users(graphs).to(device)
            # ids of edges into items follow those of edges into users
            self.first_audience_edge = int(nodes.indptr[users])
            self.audience_by_source = _position_by_source(nodes, users, items)

    def build(self, users: np.ndarray, items: np.ndarray, all_pairs: np.ndarray, seed: int) -> Subgraph:
        """The subgraph of a batch.

        Args:
            users, items: distinct users [u] and items [i] of the batch, catalog indexes.
            all_pairs: int64 [n, 2], interactions of the global batch, whose edges are excluded if so configured.
            seed: of the sampling; not used on the whole graph.
        """
        self.stopwatch.part("sampling")
        graphs, excluded = self.graphs, None
        if self.exclude_seed_edges:
            into_users, into_items = _seed_edges(graphs, all_pairs)
            edges, of_audience = np.concatenate([into_users, into_items]), (None, None)
            if self.audience is not None:
                at = into_items - self.first_audience_edge
                of_audience = torch.from_numpy(at), torch.from_numpy(self.audience_by_source[at])
            excluded = ExcludedEdges(torch.from_numpy(edges), *of_audience)
        users_at, items_at = torch.from_numpy(users), torch.from_numpy(items)
        subgraph = Subgraph(
            **self.lookups,
            features=self.features,
            audience=self.audience,
            input_nodes=None,
            blocks=[self.block] * self.layers,
            n_seed_users=graphs.users,
            n_seed_items=graphs.items,
            user_hop=_restricted_hop(graphs.user_user, users),
            input_hop=self.input_hop,
            item_hop=None if self.item_hop_first else _restricted_hop(graphs.item_item, items),
            users_in_seeds=users_at,
            items_in_seeds=items_at,
            users_in_inputs=users_at,
            items_in_inputs=items_at,
            excluded=excluded,
        )
        self.stopwatch.part(None)
        return subgraph


class SampledGraphBuilder:
    """DGL blocks around the batch; feature rows are looked up here, in the prefetch thread.

    Nothing here is linear in the catalog: a subgraph costs what its batch, its fanouts and `layer_nodes` ask for.

    Args:
        features: tables whose communicator is the prefetch thread's.
    """

    def __init__(self, config: Config, network: GTC, graphs: Graphs, features: dict[str, ShardedTable]):
        self.graphs, self.features, self.stopwatch = graphs, features, Stopwatch()
        self.model, self.exclude_seed_edges = config.model, config.train.exclude_seed_edges
        self.has_filter, self.item_hop_first = network.has_filter, network.item_hop_first
        self.has_history = config.has_historical_embeddings
        self.comm = next(iter(features.values())).comm
        budget = config.model.layer_nodes
        self.node_budget = None if budget is None else -(-budget // self.comm.size)  # new nodes of this rank per layer
        self.user_item_sampler, self.item_sampler, self.user_sampler = (
            None if graph is None else NeighborSampler(graph)
            for graph in (graphs.nodes, graphs.item_item, graphs.user_user)
        )

    def build(self, users: np.ndarray, items: np.ndarray, all_pairs: np.ndarray, seed: int) -> Subgraph:
        """The subgraph of a batch; arguments as in `FullGraphBuilder.build`. A collective."""
        self.stopwatch.part("sampling")
        n_users, model = self.graphs.users, self.model
        self.rng = np.random.default_rng(seed)
        for offset, sampler in enumerate((self.user_item_sampler, self.item_sampler, self.user_sampler)):
            if sampler is not None:
                sampler.seed(seed + offset)
        user_hop, seed_users = self._hop(self.user_sampler, users, model.item_fanout)
        output_sampler = None if self.item_hop_first else self.item_sampler
        item_hop, seed_items = self._hop(output_sampler, items, model.item_fanout)
        excluded = np.sort(np.concatenate(_seed_edges(self.graphs, all_pairs))) if self.exclude_seed_edges else None

        frontier = np.concatenate([seed_users, seed_items + n_users])
        blocks = []
        for fanout in model.fanout:
            block, frontier = self._layer(frontier, fanout, excluded)
            blocks.insert(0, block)
        # `frontier` now holds the sources of the first block, users and items mixed. `order` becomes the row of each in
        # cat(input users, input items), after the hop has added items and the audience has added users at the end.
        in_users, in_items = frontier[frontier < n_users], frontier[frontier >= n_users] - n_users
        order = np.empty(len(frontier), np.int64)
        order[frontier >= n_users] = np.arange(len(in_items))
        input_hop, in_items = self._hop(self.item_sampler if self.item_hop_first else None, in_items, model.item_fanout)
        audience, in_users = self._audience(in_users, in_items, excluded)
        order[frontier < n_users] = np.arange((frontier < n_users).sum())
        order[frontier >= n_users] += len(in_users)  # the audience may have added users
        self.stopwatch.part("features")
        item_lookup = plan_lookup(torch.from_numpy(in_items), self.graphs.items, self.comm)
        users_at, items_at = torch.arange(len(users)), torch.arange(len(items))  # the batch's nodes come first
        subgraph = Subgraph(
            user_lookup=plan_lookup(torch.from_numpy(in_users), n_users, self.comm),
            item_lookup=item_lookup,
            features={name: table.lookup(item_lookup) for name, table in self.features.items()},
            audience=audience,
            input_nodes=torch.from_numpy(order),
            blocks=blocks,
            n_seed_users=len(seed_users),
            n_seed_items=len(seed_items),
            user_hop=user_hop,
            input_hop=input_hop,
            item_hop=item_hop,
            users_in_seeds=users_at,
            items_in_seeds=items_at,
            users_in_inputs=users_at,
            items_in_inputs=items_at,
            history=self._history(users, items, all_pairs) if self.has_history else None,
        )
        self.stopwatch.part(None)
        return subgraph

    def _history(self, users: np.ndarray, items: np.ndarray, all_pairs: np.ndarray) -> HistoryLookup:
        """Look-ups of the batch's historical embeddings, and the edges of `all_pairs` that end in the batch."""
        graphs = self.graphs
        if not self.exclude_seed_edges or not self.model.layers:
            all_pairs = all_pairs[:0]
        weight = graphs.nodes.weight[_seed_edges(graphs, all_pairs)[0]]
        into_users, excluded_items = _edges_into(users, all_pairs[:, 0], all_pairs[:, 1], weight)
        into_items, excluded_users = _edges_into(items, all_pairs[:, 1], all_pairs[:, 0], weight)
        rows = (
            (users, graphs.users),
            (items, graphs.items),
            (excluded_users, graphs.users),
            (excluded_items, graphs.items),
        )
        lookups = [plan_lookup(torch.from_numpy(ids), total, self.comm, trained=False) for ids, total in rows]
        return HistoryLookup(*lookups, into_users, into_items)

    def _hop(self, sampler: NeighborSampler | None, batch: np.ndarray, fanout: int) -> tuple[Block | None, np.ndarray]:
        """One hop to the rows `batch`, and its sources, those rows first."""
        if sampler is None:
            return None, batch
        layer = sampler.layer(batch, fanout)
        weight = sampler.graph.weight[layer.edges] * layer.correction[layer.destination]
        layer, weight = self._limit_nodes(layer, weight, np.arange(len(layer.sources)) < len(batch))
        return Block.build(layer.indptr, layer.positions, weight, len(layer.sources)), layer.sources

    def _layer(self, frontier: np.ndarray, fanout: int, excluded: np.ndarray | None) -> tuple[Block, np.ndarray]:
        """A user-item layer with the graph's weights, corrected for the sampling, and its sources, frontier first."""
        layer, nodes = self.user_item_sampler.layer(frontier, fanout), self.graphs.nodes
        if nodes.weighted_degree is None:  # weights 1 / sqrt(degree * degree)
            norm = 1 / np.sqrt(np.maximum(_degree(nodes, layer.sources), 1)).astype(np.float32)
            weight = norm[layer.positions] * (norm[: len(frontier)] * layer.correction)[layer.destination]
        else:
            weight = nodes.weight[layer.edges] * layer.correction[layer.destination]
        _zero_excluded(layer, weight, excluded)
        layer, weight = self._limit_nodes(layer, weight, np.arange(len(layer.sources)) < len(frontier))
        return Block.build(layer.indptr, layer.positions, weight, len(layer.sources)), layer.sources

    def _audience(
        self, in_users: np.ndarray, in_items: np.ndarray, excluded: np.ndarray | None
    ) -> tuple[Block | None, np.ndarray]:
        """Mean over (sampled) users of each input item, and the input users with those users appended."""
        if not self.has_filter:
            return None, in_users
        destinations = in_items + self.graphs.users
        layer = self.user_item_sampler.layer(destinations, self.model.item_fanout, keep_destinations=False)
        degree = np.maximum(_degree(self.graphs.nodes, destinations), 1).astype(np.float32)
        weight = (layer.correction / degree)[layer.destination]  # corrected sum over the degree: the mean
        _zero_excluded(layer, weight, excluded)
        layer, weight = self._limit_nodes(layer, weight, _position(in_users, layer.sources) >= 0)
        at = _position(in_users, layer.sources)
        more = layer.sources[at < 0]
        at[at < 0] = len(in_users) + np.arange(len(more))
        block = Block.build(layer.indptr, at[layer.positions], weight, len(in_users) + len(more))
        return block, np.concatenate([in_users, more])

    def _limit_nodes(
        self, layer: SampledLayer, weight: np.ndarray, already_present: np.ndarray
    ) -> tuple[SampledLayer, np.ndarray]:
        if self.node_budget is None:
            return layer, weight
        return importance_sample_sources(layer, weight, already_present, self.node_budget, self.rng)


def mean_of_users(graphs: Graphs) -> Block:
    """Users -> mean over all users of each item."""
    indptr = graphs.nodes.indptr[graphs.users :]
    degree = np.diff(indptr)
    weight = np.repeat(1 / np.maximum(degree, 1).astype(np.float32), degree)
    return Block.build(indptr - indptr[0], graphs.nodes.indices[indptr[0] :], weight, graphs.users)


def _degree(graph: CSC, destinations: np.ndarray) -> np.ndarray:
    return graph.indptr[destinations + 1] - graph.indptr[destinations]


def _zero_excluded(layer: SampledLayer, weight: np.ndarray, excluded: np.ndarray | None) -> None:
    """Set the weight of a layer's edges that are among `excluded` (sorted edge ids) to zero."""
    if excluded is not None and len(excluded):
        at = np.minimum(np.searchsorted(excluded, layer.edges), len(excluded) - 1)
        weight[excluded[at] == layer.edges] = 0


def _edges_into(
    rows: np.ndarray, destination: np.ndarray, source: np.ndarray, weight: np.ndarray
) -> tuple[Block, np.ndarray]:
    """Those of some edges that end in `rows`, as a block, and its sources."""
    at = _position(rows, destination)
    ends = at >= 0
    sources, column = np.unique(source[ends], return_inverse=True)
    edges = sp.csr_matrix((weight[ends], (at[ends], column)), shape=(len(rows), len(sources)))
    arrays = (torch.from_numpy(array) for array in (edges.indptr, edges.indices, edges.data))
    return Block.forward_only(*arrays, len(sources)), sources


def _position(among: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Position of each id in `among` (distinct, any order), -1 where it is missing."""
    if not len(among):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(among)
    at = order[np.minimum(np.searchsorted(among, ids, sorter=order), len(among) - 1)]
    return np.where(among[at] == ids, at, -1)


def _restricted_hop(graph: CSC | None, rows: np.ndarray) -> Block | None:
    if graph is None:
        return None
    indptr, edges = take_edges(graph, rows)
    return Block.build(indptr, graph.indices[edges], graph.weight[edges], len(graph.indptr) - 1)


def _seed_edges(graphs: Graphs, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edge ids of train interactions [n, 2]: into their users, into their items."""
    users, items = pairs[:, 0], pairs[:, 1] + graphs.users
    return find_edges(graphs.nodes, users, items), find_edges(graphs.nodes, items, users)


def _position_by_source(nodes: CSC, users: int, items: int) -> np.ndarray:
    """Position of each edge user -> item when edges are ordered by source, int64 [E]."""
    first = nodes.indptr[users]
    shape = (items, users)
    number = np.arange(len(nodes.indices) - first)
    by_item = sp.csr_matrix((number, nodes.indices[first:], nodes.indptr[users:] - first), shape=shape)
    position = np.empty_like(number)
    position[by_item.tocsc().data] = number
    return position
