"""Neighbour sampling with DGL (1.1.3, CPU); the only file that imports DGL.

The user-item graph is one homogeneous graph here: users are nodes [0, users), items [users, users + items), and both
directions are edges, stored as CSC. DGL wraps the arrays without a copy, so the ranks on one machine share them. Of the
d neighbours of a node, s = min(fanout, d) are drawn without replacement and their weights are multiplied by d / s, so
that a weighted sum over the sample is an unbiased estimate of the sum over all neighbours. Layers come back as plain
tensors.

DGL keeps one random state per thread, and the same seed gives another random stream in every thread, depending on the
order in which threads were created. Therefore one thread of the process does all sampling, and the draws depend on the
seed alone.
"""

import logging
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.message_passing import edge_index_type
from gtc_dist.graph.sampled_layer import CSCTensors, SampledLayer, as_tensor

os.environ.setdefault("DGLBACKEND", "pytorch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # DGL logs missing optional packages on import
    import dgl
    from dgl.utils import set_num_threads

    logging.disable(_level)

_SAMPLING_THREAD = ThreadPoolExecutor(1, "dgl")


class NeighborSampler:
    """Samples in-neighbours of one graph.

    Args:
        graph: CSC over one set of nodes.
        threads: number of DGL's sampling threads.
    """

    def __init__(self, graph: CSC, threads: int = 1):
        self.graph, self.threads = CSCTensors.on(graph, torch.device("cpu")), threads
        # DGL wants node and edge numbers of one type: beyond 2^31 edges it gets a copy of the indices, of 8 bytes each
        self.dtype = edge_index_type(len(graph.indices))
        indptr = torch.from_numpy(graph.indptr.astype(self.dtype))
        indices = as_tensor(graph.indices.astype(self.dtype, copy=False))
        nodes = len(graph.indptr) - 1
        self._dgl = dgl.graph(("csc", (indptr, indices, torch.empty(0, dtype=indptr.dtype))), num_nodes=nodes)

    @staticmethod
    def uniform(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A source of random numbers in [0, 1): from node ids [n] to float64 [n]."""
        rng = np.random.default_rng(seed)
        return lambda ids: torch.from_numpy(rng.random(len(ids)))

    def seed(self, seed: int) -> None:
        """Set the random state for the next draws of all samplers."""
        _SAMPLING_THREAD.submit(self._seed, seed % (1 << 31)).result()

    def layer(self, destinations: torch.Tensor, fanout: int, keep_destinations: bool = True) -> SampledLayer:
        """Draw up to `fanout` (-1: all) in-neighbours of each destination.

        Args:
            destinations: int64 [n], unique node ids.
            keep_destinations: list the destinations among the sources, first.
        """
        return _SAMPLING_THREAD.submit(self._layer, destinations, fanout, keep_destinations).result()

    def _seed(self, seed: int) -> None:
        set_num_threads(self.threads)
        dgl.seed(seed)

    def _layer(self, destinations: torch.Tensor, fanout: int, keep_destinations: bool) -> SampledLayer:
        nodes = destinations.to(torch.int32 if self.dtype is np.int32 else torch.int64)
        frontier = self._dgl.sample_neighbors(nodes, fanout)
        block = dgl.to_block(frontier, nodes, include_dst_in_src=keep_destinations)
        indptr, positions, order = block.adj_tensors("csc")
        edges = frontier.edata[dgl.EID][block.edata[dgl.EID].long()]
        if len(order):
            edges = edges[order.long()]
        indptr = indptr.long()
        correction = self.graph.degree(destinations).float() / indptr.diff().float().clamp(min=1)
        return SampledLayer(block.srcdata[dgl.NID].long(), indptr, positions.long(), edges.long(), correction)
