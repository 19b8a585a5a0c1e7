"""Neighbour sampling with DGL (1.1.3, CPU); the only file that imports DGL.

The user-item graph is one homogeneous graph here: users are nodes [0, users), items [users, users + items), and both
directions are edges, stored as CSC. DGL wraps the arrays without a copy, so the ranks on one machine share them. Of the
d neighbours of a node, s = min(fanout, d) are drawn without replacement and their weights are multiplied by d / s, so
that a weighted sum over the sample is an unbiased estimate of the sum over all neighbours. Layers come back as plain
arrays.

`importance_sample_sources` then bounds the number of source nodes of a layer independently of the size of the catalog.

DGL keeps one random state per thread, and the same seed gives another random stream in every thread, depending on the
order in which threads were created. Therefore one thread of the process does all sampling, and the draws depend on the
seed alone.
"""

import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.message_passing import edge_index_type

os.environ.setdefault("DGLBACKEND", "pytorch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # DGL logs missing optional packages on import
    import dgl
    from dgl.utils import set_num_threads

    logging.disable(_level)

_SAMPLING_THREAD = ThreadPoolExecutor(1, "dgl")


@dataclass(frozen=True)
class SampledLayer:
    """Sampled in-edges of some destinations.

    sources: node ids [n_src], unique; the destinations come first if they were kept among the sources
    indptr: int64 [n_dst + 1]
    positions: [E], position of each edge's source in `sources`
    edges: [E], edge ids in the graph
    correction: float32 [n_dst], factor of the edge weights that makes weighted sums unbiased
    """

    sources: np.ndarray
    indptr: np.ndarray
    positions: np.ndarray
    edges: np.ndarray
    correction: np.ndarray

    @property
    def destination(self) -> np.ndarray:
        """[E], position of each edge's destination."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))


class NeighborSampler:
    """Samples in-neighbours of one graph.

    Args:
        graph: CSC over one set of nodes.
        threads: number of DGL's sampling threads.
    """

    def __init__(self, graph: CSC, threads: int = 1):
        self.graph, self.threads = graph, threads
        nodes = len(graph.indptr) - 1
        # DGL wants node and edge numbers of one type: beyond 2^31 edges it gets a copy of the indices, of 8 bytes each
        self.dtype = edge_index_type(len(graph.indices))
        indptr = torch.from_numpy(graph.indptr.astype(self.dtype))
        indices = _as_tensor(graph.indices.astype(self.dtype, copy=False))
        self._dgl = dgl.graph(("csc", (indptr, indices, torch.empty(0, dtype=indptr.dtype))), num_nodes=nodes)

    def seed(self, seed: int) -> None:
        """Set the random state for the next draws of all samplers."""
        _SAMPLING_THREAD.submit(self._seed, seed % (1 << 31)).result()

    def layer(self, destinations: np.ndarray, fanout: int, keep_destinations: bool = True) -> SampledLayer:
        """Draw up to `fanout` (-1: all) in-neighbours of each destination.

        Args:
            destinations: unique node ids.
            keep_destinations: list the destinations among the sources, first.
        """
        return _SAMPLING_THREAD.submit(self._layer, destinations, fanout, keep_destinations).result()

    def _seed(self, seed: int) -> None:
        set_num_threads(self.threads)
        dgl.seed(seed)

    def _layer(self, destinations: np.ndarray, fanout: int, keep_destinations: bool) -> SampledLayer:
        nodes = torch.from_numpy(np.ascontiguousarray(destinations, dtype=self.dtype))
        frontier = self._dgl.sample_neighbors(nodes, fanout)
        block = dgl.to_block(frontier, nodes, include_dst_in_src=keep_destinations)
        indptr, positions, order = block.adj_tensors("csc")
        edges = frontier.edata[dgl.EID][block.edata[dgl.EID].long()]
        if len(order):
            edges = edges[order.long()]
        indptr = indptr.long().numpy()
        degree = (self.graph.indptr[destinations + 1] - self.graph.indptr[destinations]).astype(np.float32)
        drawn = np.diff(indptr).astype(np.float32)
        correction = (degree / np.maximum(drawn, 1)).astype(np.float32)
        sources = block.srcdata[dgl.NID].long().numpy()
        return SampledLayer(sources, indptr, positions.long().numpy(), edges.long().numpy(), correction)


def importance_sample_sources(
    layer: SampledLayer, weight: np.ndarray, already_present: np.ndarray, limit: int, rng: np.random.Generator
) -> tuple[SampledLayer, np.ndarray]:
    """Keep about `limit` new sources of a layer; sums over the layer stay unbiased.

    In a large catalog the neighbours of a batch rarely coincide, so with fanouts alone the number of rows that a step
    touches grows with the catalog. Here a new source is kept with a probability proportional to the norm of its edge
    weights, and the weights of its edges are divided by that probability: layer-wise importance sampling, as in LADIES
    (Zou et al. 2019).

    Args:
        weight: float32 [E], weights of the layer's edges, corrected for the neighbour sampling.
        already_present: bool [n_src], sources that the batch needs anyway; they are always kept and do not count.
        limit: expected number of other sources to keep.

    Returns:
        The layer without the dropped sources and their edges, and the weights of the remaining edges.
    """
    new = np.flatnonzero(~already_present)
    if len(new) <= limit:
        return layer, weight
    norm = np.sqrt(np.bincount(layer.positions, weight.astype(np.float64) ** 2, len(layer.sources)))
    chance = np.ones(len(layer.sources))
    chance[new] = inclusion_probabilities(norm[new], limit)
    kept = rng.random(len(chance)) < chance  # a chance of 1 always passes, because draws are below 1
    kept_edges = kept[layer.positions]
    counts = np.bincount(layer.destination[kept_edges], minlength=len(layer.indptr) - 1)
    positions = layer.positions[kept_edges]
    smaller = SampledLayer(
        layer.sources[kept],
        np.concatenate([[0], np.cumsum(counts)]),
        (np.cumsum(kept) - 1)[positions],
        layer.edges[kept_edges],
        layer.correction,
    )
    return smaller, (weight[kept_edges] / chance[positions]).astype(np.float32)


def inclusion_probabilities(size: np.ndarray, expected: int) -> np.ndarray:
    """Probabilities proportional to `size` (non-negative, [n]), at most 1, with the sum `expected`: float64 [n].

    If fewer than `expected` sizes are positive, these get 1 and the others 0.
    """
    chance = np.zeros(len(size))
    rest = np.flatnonzero(size > 0)
    while len(rest) and expected > 0:
        if len(rest) <= expected:
            chance[rest] = 1
            break
        share = size[rest] / size[rest].max()  # otherwise the inverse of a sum of tiny sizes is infinite
        scaled = share * (expected / share.sum())
        certain = scaled >= 1
        if not certain.any():
            chance[rest] = scaled
            break
        chance[rest[certain]] = 1
        expected -= int(certain.sum())
        rest = rest[~certain]
    return chance


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the same memory. torch warns that shared memory is read-only; nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
