"""Sampled in-edges of some nodes, and importance sampling of their sources. Plain torch, on any device.

`importance_sample_sources` bounds the number of source nodes of a layer independently of the size of the catalog.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gtc_dist.data.catalog import CSC


@dataclass(frozen=True)
class CSCTensors:
    """A graph (`CSC`) as tensors on a device; on the CPU they share the graph's memory.

    indptr int64 [destinations + 1], indices int32 [E], weight float32 [E]
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    weight: torch.Tensor

    @staticmethod
    def on(graph: CSC, device: torch.device) -> "CSCTensors":
        return CSCTensors(*(as_tensor(array).to(device) for array in (graph.indptr, graph.indices, graph.weight)))

    def degree(self, destinations: torch.Tensor) -> torch.Tensor:
        """In-degree of some destinations (int64 [n]): int64 [n]."""
        return self.indptr[destinations + 1] - self.indptr[destinations]


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the same memory. torch warns that shared memory is read-only; nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


@dataclass(frozen=True)
class SampledLayer:
    """Sampled in-edges of some destinations; all tensors are on one device.

    sources: int64 [n_src], node ids, unique; the destinations come first if they were kept among the sources
    indptr: int64 [n_dst + 1]
    positions: int64 [E], position of each edge's source in `sources`
    edges: int64 [E], edge ids in the graph
    correction: float32 [n_dst], factor of the edge weights that makes weighted sums unbiased
    """

    sources: torch.Tensor
    indptr: torch.Tensor
    positions: torch.Tensor
    edges: torch.Tensor
    correction: torch.Tensor

    @cached_property
    def destination(self) -> torch.Tensor:
        """int64 [E], position of each edge's destination."""
        counts = self.indptr.diff()
        numbers = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(numbers, counts, output_size=len(self.positions))


def importance_sample_sources(
    layer: SampledLayer, weight: torch.Tensor, already_present: torch.Tensor, limit: int, uniform
) -> tuple[SampledLayer, torch.Tensor]:
    """Keep about `limit` new sources of a layer; sums over the layer stay unbiased.

    In a large catalog the neighbours of a batch rarely coincide, so with fanouts alone the number of rows that a step
    touches grows with the catalog. Here a new source is kept with a probability proportional to the norm of its edge
    weights, and the weights of its edges are divided by that probability: layer-wise importance sampling, as in LADIES
    (Zou et al. 2019).

    Args:
        weight: float32 [E], weights of the layer's edges, corrected for the neighbour sampling.
        already_present: bool [n_src], sources that the batch needs anyway; they are always kept and do not count.
        limit: expected number of other sources to keep.
        uniform: from node ids [n_src] to float64 [n_src], random numbers in [0, 1).

    Returns:
        The layer without the dropped sources and their edges, and the weights of the remaining edges.
    """
    new = (~already_present).nonzero().flatten()
    if len(new) <= limit:
        return layer, weight
    squares = torch.bincount(layer.positions, weight.double().square(), len(layer.sources))
    chance = torch.ones(len(layer.sources), dtype=torch.float64, device=weight.device)
    chance[new] = inclusion_probabilities(squares[new].sqrt(), limit)
    kept = uniform(layer.sources) < chance  # a chance of 1 always passes, because draws are below 1
    kept_edges = kept[layer.positions]
    positions = layer.positions[kept_edges]
    counts = torch.bincount(layer.destination[kept_edges], minlength=len(layer.indptr) - 1)
    smaller = SampledLayer(
        layer.sources[kept],
        starts(counts),
        (kept.cumsum(0) - 1)[positions],
        layer.edges[kept_edges],
        layer.correction,
    )
    return smaller, (weight[kept_edges] / chance[positions]).float()


def inclusion_probabilities(size: torch.Tensor, expected: int) -> torch.Tensor:
    """Probabilities proportional to `size` (float64 [n], non-negative), at most 1, with the sum `expected`.

    If fewer than `expected` sizes are positive, these get 1 and the others 0.
    """
    chance = torch.zeros_like(size)
    rest = (size > 0).nonzero().flatten()
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


def starts(counts: torch.Tensor) -> torch.Tensor:
    """First position of each group, and the total: int64 [n + 1] from the sizes of n groups."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
