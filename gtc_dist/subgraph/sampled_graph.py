"""The subgraph of a batch on a sample of the graph.

Sampling and everything that follows from it is torch on one device: the CPU with DGL's sampler, or the rank's GPU with
`DeviceSampler`. Rows of the features are looked up on the host, in the prefetch thread.
"""

import numpy as np
import scipy.sparse as sp
import torch

from gtc_dist.config import Config
from gtc_dist.distributed.message_passing import Block
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.distributed.stopwatch import Stopwatch
from gtc_dist.graph.csc import Graphs
from gtc_dist.graph.device_sampler import DeviceSampler
from gtc_dist.graph.sampled_layer import SampledLayer, importance_sample_sources
from gtc_dist.model.batch import HistoryLookup, Subgraph
from gtc_dist.model.gtc import GTC

CPU = torch.device("cpu")
GRAPH_SHARE = 0.25  # of a GPU's memory that the graphs may take


def sampling_device(config: Config, graphs: Graphs, device: torch.device) -> torch.device:
    """Where to sample for a network on `device`: `model.sampler_device`."""
    if device.type != "cuda" or config.model.sampler_device == "cpu":
        return CPU
    memory = torch.cuda.get_device_properties(device).total_memory  # not what is free: a resumed run decides as before
    fits = graphs.bytes <= GRAPH_SHARE * memory
    return device if fits or config.model.sampler_device == "gpu" else CPU


class SampledGraphBuilder:
    """Sampled blocks around the batch; feature rows are looked up here, in the prefetch thread.

    Nothing here is linear in the catalog: a subgraph costs what its batch, its fanouts and `layer_nodes` ask for.

    Args:
        features: tables whose communicator is the prefetch thread's, on the CPU.
        sampler: `NeighborSampler`, for the CPU, or `DeviceSampler`.
        device: of the sampling.
    """

    def __init__(
        self,
        config: Config,
        network: GTC,
        graphs: Graphs,
        features: dict[str, ShardedTable],
        sampler: type,
        device: torch.device = CPU,
    ):
        self.graphs, self.features, self.stopwatch = graphs, features, Stopwatch()
        self.model, self.exclude_seed_edges = config.model, config.train.exclude_seed_edges
        self.has_filter, self.item_hop_first = network.has_filter, network.item_hop_first
        self.has_history = config.has_historical_embeddings
        self.comm, self.device = next(iter(features.values())).comm, device
        budget = config.model.layer_nodes
        self.node_budget = None if budget is None else -(-budget // self.comm.size)  # new nodes of this rank per layer
        on_device = (device,) if sampler is DeviceSampler else ()
        self.draws_of = sampler.uniform
        self.user_item_sampler, self.item_sampler, self.user_sampler = (
            None if graph is None else sampler(graph, *on_device)
            for graph in (graphs.nodes, graphs.item_item, graphs.user_user)
        )

    def build(self, users: np.ndarray, items: np.ndarray, all_pairs: np.ndarray, seed: int) -> Subgraph:
        """The subgraph of a batch; arguments as in `FullGraphBuilder.build`. A collective."""
        self.stopwatch.part("sampling")
        n_users, model = self.graphs.users, self.model
        self.uniform = self.draws_of(seed)
        for offset, sampler in enumerate((self.user_item_sampler, self.item_sampler, self.user_sampler)):
            if sampler is not None:
                sampler.seed(seed + offset)
        user_hop, seed_users = self._hop(self.user_sampler, self._tensor(users), model.item_fanout)
        output_sampler = None if self.item_hop_first else self.item_sampler
        item_hop, seed_items = self._hop(output_sampler, self._tensor(items), model.item_fanout)
        excluded = None
        if self.exclude_seed_edges:
            excluded = self._tensor(np.sort(np.concatenate(self.graphs.edges_of(all_pairs))))

        frontier = torch.cat([seed_users, seed_items + n_users])
        blocks = []
        for fanout in model.fanout:
            block, frontier = self._layer(frontier, fanout, excluded)
            blocks.insert(0, block)
        # `frontier` now holds the sources of the first block, users and items mixed. `order` becomes the row of each in
        # cat(input users, input items), after the hop has added items and the audience has added users at the end.
        is_user = frontier < n_users
        in_users, in_items = frontier[is_user], frontier[~is_user] - n_users
        order = torch.where(is_user, is_user.cumsum(0), (~is_user).cumsum(0)) - 1
        input_hop, in_items = self._hop(self.item_sampler if self.item_hop_first else None, in_items, model.item_fanout)
        audience, in_users = self._audience(in_users, in_items, excluded)
        order += ~is_user * len(in_users)
        self.stopwatch.part("features")
        user_lookup = plan_lookup(in_users.to(CPU), n_users, self.comm)
        item_lookup = plan_lookup(in_items.to(CPU), self.graphs.items, self.comm)
        users_at, items_at = torch.arange(len(users)), torch.arange(len(items))  # the batch's nodes come first
        subgraph = Subgraph(
            user_lookup=user_lookup,
            item_lookup=item_lookup,
            features={name: table.lookup(item_lookup) for name, table in self.features.items()},
            audience=audience,
            input_nodes=order,
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

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _history(self, users: np.ndarray, items: np.ndarray, all_pairs: np.ndarray) -> HistoryLookup:
        """Look-ups of the batch's historical embeddings, and the edges of `all_pairs` that end in the batch."""
        graphs = self.graphs
        if not self.exclude_seed_edges or not self.model.layers:
            all_pairs = all_pairs[:0]
        weight = graphs.nodes.weight[graphs.edges_of(all_pairs)[0]]
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

    def _hop(self, sampler, batch: torch.Tensor, fanout: int) -> tuple[Block | None, torch.Tensor]:
        """One hop to the rows `batch`, and its sources, those rows first."""
        if sampler is None:
            return None, batch
        layer = sampler.layer(batch, fanout)
        weight = sampler.graph.weight[layer.edges] * layer.correction[layer.destination]
        return self._block(*self._limit_nodes(layer, weight, _first(len(batch), layer)))

    def _layer(self, frontier: torch.Tensor, fanout: int, excluded: torch.Tensor | None) -> tuple[Block, torch.Tensor]:
        """A user-item layer with the graph's weights, corrected for the sampling, and its sources, frontier first."""
        sampler = self.user_item_sampler
        layer = sampler.layer(frontier, fanout)
        if self.graphs.nodes.weighted_degree is None:  # weights 1 / sqrt(degree * degree)
            norm = 1 / sampler.graph.degree(layer.sources).clamp(min=1).double().sqrt().float()
            weight = norm[layer.positions] * (norm[: len(frontier)] * layer.correction)[layer.destination]
        else:
            weight = sampler.graph.weight[layer.edges] * layer.correction[layer.destination]
        weight = _without(layer, weight, excluded)
        return self._block(*self._limit_nodes(layer, weight, _first(len(frontier), layer)))

    def _audience(
        self, in_users: torch.Tensor, in_items: torch.Tensor, excluded: torch.Tensor | None
    ) -> tuple[Block | None, torch.Tensor]:
        """Mean over (sampled) users of each input item, and the input users with those users appended."""
        if not self.has_filter:
            return None, in_users
        destinations, sampler = in_items + self.graphs.users, self.user_item_sampler
        layer = sampler.layer(destinations, self.model.item_fanout, keep_destinations=False)
        degree = sampler.graph.degree(destinations).clamp(min=1).float()
        weight = (layer.correction / degree)[layer.destination]  # corrected sum over the degree: the mean
        weight = _without(layer, weight, excluded)
        layer, weight = self._limit_nodes(layer, weight, _position(in_users, layer.sources) >= 0)
        at = _position(in_users, layer.sources)
        missing = at < 0
        at = torch.where(missing, len(in_users) + missing.cumsum(0) - 1, at)
        everyone = torch.cat([in_users, layer.sources[missing]])
        return Block.of_tensors(layer.indptr, at[layer.positions], weight, len(everyone)), everyone

    def _block(self, layer: SampledLayer, weight: torch.Tensor) -> tuple[Block, torch.Tensor]:
        return Block.of_tensors(layer.indptr, layer.positions, weight, len(layer.sources)), layer.sources

    def _limit_nodes(
        self, layer: SampledLayer, weight: torch.Tensor, already_present: torch.Tensor
    ) -> tuple[SampledLayer, torch.Tensor]:
        if self.node_budget is None:
            return layer, weight
        return importance_sample_sources(layer, weight, already_present, self.node_budget, self.uniform)


def _first(count: int, layer: SampledLayer) -> torch.Tensor:
    """Mask of the first `count` sources of a layer."""
    return torch.arange(len(layer.sources), device=layer.sources.device) < count


def _without(layer: SampledLayer, weight: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
    """The weights of a layer's edges, zero for edges that are among `excluded` (sorted edge ids)."""
    if excluded is None or not len(excluded):
        return weight
    at = torch.searchsorted(excluded, layer.edges).clamp(max=len(excluded) - 1)
    return weight.masked_fill_(excluded[at] == layer.edges, 0)


def _position(among: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Position of each id in `among` (distinct, any order), -1 where it is missing."""
    if not len(among):
        return torch.full_like(ids, -1)
    ordered, order = torch.sort(among)
    at = torch.searchsorted(ordered, ids).clamp(max=len(among) - 1)
    return torch.where(ordered[at] == ids, order[at], -1)


def _edges_into(
    rows: np.ndarray, destination: np.ndarray, source: np.ndarray, weight: np.ndarray
) -> tuple[Block, np.ndarray]:
    """Those of some edges that end in `rows`, as a block, and its sources."""
    at = _position(torch.from_numpy(rows), torch.from_numpy(np.ascontiguousarray(destination))).numpy()
    ends = at >= 0
    sources, column = np.unique(source[ends], return_inverse=True)
    edges = sp.csr_matrix((weight[ends], (at[ends], column)), shape=(len(rows), len(sources)))
    arrays = (torch.from_numpy(array) for array in (edges.indptr, edges.indices, edges.data))
    return Block.forward_only(*arrays, len(sources)), sources
