"""Neighbour sampling with DGL (1.1.3, CPU); the only file that imports it.

The user-item graph is one homogeneous graph here: users are nodes [0, users), items [users, users + items), and both
directions are edges, destinations' sources in CSC. DGL wraps the arrays without a copy, so ranks of a node share them.
A sampled layer comes back as plain arrays with weights corrected for the sampling, so that a weighted sum over it is
an unbiased estimate of the sum over all neighbours:

    neighbor  s of d neighbours without replacement: weight * d / s
    labor     LABOR-0 (Balin and Catalyurek 2023), each neighbour with probability min(1, k / d): weight * max(1, d / k)

`thin` then bounds how many sources a layer brings in, whatever the catalog's size: see there.

DGL's random state belongs to a thread, and the same seed gives another stream in every thread, by the order in which
threads came. So one thread of the process does all of the sampling: what is drawn depends on the seed alone.
"""

import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.data.catalog import CSC

os.environ.setdefault("DGLBACKEND", "pytorch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # dgl announces missing optional parts on import
    import dgl
    from dgl.utils import set_num_threads

    logging.disable(_level)

_THREAD = ThreadPoolExecutor(1, "dgl")


@dataclass(frozen=True)
class Layer:
    """Sampled in-edges of some destinations.

    sources: node ids [n_src], unique; the destinations first where they were kept among the sources
    indptr: int64 [n_dst + 1]; positions: [E] of each edge's source in `sources`; edges: [E] edge ids in the graph
    correction: float32 [n_dst] that makes weighted sums unbiased
    """

    sources: np.ndarray
    indptr: np.ndarray
    positions: np.ndarray
    edges: np.ndarray
    correction: np.ndarray

    @property
    def destination(self) -> np.ndarray:
        """[E] position of each edge's destination."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))


class Sampler:
    """Samples in-neighbours of one graph.

    Args:
        graph: CSC over one set of nodes.
        kind: `neighbor` or `labor`.
        threads: of DGL's sampling.
    """

    def __init__(self, graph: CSC, kind: str = "neighbor", threads: int = 1):
        self.graph, self.kind, self.threads = graph, kind, threads
        nodes = len(graph.indptr) - 1
        indptr = torch.from_numpy(graph.indptr.astype(np.int32))
        indices = _shared(graph.indices)
        self._dgl = dgl.graph(("csc", (indptr, indices, torch.empty(0, dtype=torch.int32))), num_nodes=nodes)

    def seed(self, seed: int) -> None:
        """Fix the random state of the next draws, of all samplers."""
        self._labor_seed = seed % (1 << 31)
        _THREAD.submit(self._seed).result()

    def layer(self, destinations: np.ndarray, fanout: int, keep_destinations: bool = True) -> Layer:
        """Draw up to `fanout` (-1: all) in-neighbours of each destination (unique node ids)."""
        return _THREAD.submit(self._layer, destinations, fanout, keep_destinations).result()

    def _seed(self) -> None:
        set_num_threads(self.threads)
        dgl.seed(self._labor_seed)

    def _layer(self, destinations: np.ndarray, fanout: int, keep_destinations: bool) -> Layer:
        wanted = torch.from_numpy(np.ascontiguousarray(destinations, dtype=np.int32))
        if self.kind == "labor" and fanout > 0:
            seed = dgl.backend.zerocopy_to_dgl_ndarray(torch.tensor([self._labor_seed], dtype=torch.int64))
            frontier, _ = self._dgl.sample_labors(wanted, fanout, random_seed=seed)
            self._labor_seed = (self._labor_seed * 6364136223846793005 + 1442695040888963407) % (1 << 31)
        else:
            frontier = self._dgl.sample_neighbors(wanted, fanout)
        block = dgl.to_block(frontier, wanted, include_dst_in_src=keep_destinations)
        indptr, positions, order = block.adj_tensors("csc")
        edges = frontier.edata[dgl.EID][block.edata[dgl.EID].long()]
        if len(order):
            edges = edges[order.long()]
        indptr = indptr.long().numpy()
        degree = (self.graph.indptr[destinations + 1] - self.graph.indptr[destinations]).astype(np.float32)
        drawn = np.diff(indptr).astype(np.float32)
        if self.kind == "labor" and fanout > 0:
            correction = np.maximum(1.0, degree / fanout)
        else:
            correction = degree / np.maximum(drawn, 1)
        sources = block.srcdata[dgl.NID].long().numpy()
        return Layer(sources, indptr, positions.long().numpy(), edges.long().numpy(), correction.astype(np.float32))


def thin(
    layer: Layer, weight: np.ndarray, free: np.ndarray, limit: int, rng: np.random.Generator
) -> tuple[Layer, np.ndarray]:
    """Keep about `limit` of the sources that a layer brings in, so that sums over it stay unbiased.

    Neighbours of a batch seldom coincide in a large catalog and often do in a small one, so with a fanout alone the
    rows that a step touches grow with the catalog until all are different. Here each new source stays with a
    probability proportional to the norm of its edges' weights (importance sampling of layers, as in LADIES, Zou et
    al. 2019), and its weights are divided by it.

    Args:
        weight: float32 [E] of the layer's edges, corrected for the sampling.
        free: bool [n_src], sources that cost nothing: they are in the batch anyway and always stay.
        limit: expected number of other sources.

    Returns:
        The layer without the sources that went and their edges, and the weights of its edges.
    """
    new = np.flatnonzero(~free)
    if len(new) <= limit:
        return layer, weight
    norm = np.sqrt(np.bincount(layer.positions, weight.astype(np.float64) ** 2, len(layer.sources)))
    chance = np.ones(len(layer.sources))
    chance[new] = inclusion(norm[new], limit)
    stays = rng.random(len(chance)) < chance  # a chance of one always stays: draws are below one
    edge = stays[layer.positions]
    counts = np.bincount(layer.destination[edge], minlength=len(layer.indptr) - 1)
    positions = layer.positions[edge]
    kept = Layer(
        layer.sources[stays],
        np.concatenate([[0], np.cumsum(counts)]),
        (np.cumsum(stays) - 1)[positions],
        layer.edges[edge],
        layer.correction,
    )
    return kept, (weight[edge] / chance[positions]).astype(np.float32)


def inclusion(size: np.ndarray, expected: int) -> np.ndarray:
    """Probabilities proportional to `size` (non-negative, [n]) but at most one, whose sum is `expected`: float64 [n].

    Where fewer than `expected` sizes are positive, these get one and the others zero.
    """
    chance = np.zeros(len(size))
    rest = np.flatnonzero(size > 0)
    while len(rest) and expected > 0:
        if len(rest) <= expected:
            chance[rest] = 1
            break
        part = size[rest] / size[rest].max()  # of tiny sizes the inverse of the sum would be infinite
        scaled = part * (expected / part.sum())
        sure = scaled >= 1
        if not sure.any():
            chance[rest] = scaled
            break
        chance[rest[sure]] = 1
        expected -= int(sure.sum())
        rest = rest[~sure]
    return chance


def _shared(array: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor. Shared memory is read-only, of which torch warns; nothing here writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)
