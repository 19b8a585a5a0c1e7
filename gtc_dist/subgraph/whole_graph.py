"""The subgraph of a batch on the whole graph; sampled_graph.py has its counterpart on a sample.

Both builders give the same numbers where the sample takes every neighbour; a test compares them.
"""

import numpy as np
import scipy.sparse as sp
import torch

from gtc_dist.config import Config
from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.device_transfer import to_device
from gtc_dist.distributed.message_passing import Block
from gtc_dist.distributed.sharded_table import ShardedTable, plan_whole_table
from gtc_dist.distributed.stopwatch import Stopwatch
from gtc_dist.graph.csc import Graphs, take_edges
from gtc_dist.model.batch import ExcludedEdges, Subgraph
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
            into_users, into_items = graphs.edges_of(all_pairs)
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


def mean_of_users(graphs: Graphs) -> Block:
    """Users -> mean over all users of each item."""
    indptr = graphs.nodes.indptr[graphs.users :]
    degree = np.diff(indptr)
    weight = np.repeat(1 / np.maximum(degree, 1).astype(np.float32), degree)
    return Block.build(indptr - indptr[0], graphs.nodes.indices[indptr[0] :], weight, graphs.users)


def _restricted_hop(graph: CSC | None, rows: np.ndarray) -> Block | None:
    if graph is None:
        return None
    indptr, edges = take_edges(graph, rows)
    return Block.build(indptr, graph.indices[edges], graph.weight[edges], len(graph.indptr) - 1)


def _position_by_source(nodes: CSC, users: int, items: int) -> np.ndarray:
    """Position of each edge user -> item when edges are ordered by source, int64 [E]."""
    first = nodes.indptr[users]
    shape = (items, users)
    number = np.arange(len(nodes.indices) - first)
    by_item = sp.csr_matrix((number, nodes.indices[first:], nodes.indptr[users:] - first), shape=shape)
    position = np.empty_like(number)
    position[by_item.tocsc().data] = number
    return position
