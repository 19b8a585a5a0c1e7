"""Neighbour sampling in plain torch, where the graph is on the device; for GPUs.

Systematic sampling: of the d neighbours of a node, s = min(fanout, d) are drawn, those at the positions
floor((j + u) d / s), j = 0 .. s - 1, with one uniform number u a node. They are distinct, and each neighbour is drawn
with probability s / d, so that sums over the sample whose weights are multiplied by d / s are unbiased, as with DGL's
sampler (neighbor_sampler.py), which stays the reference. u is a hash of the seed, the number of the draw and the node's
id: the sample is the same on every device, and no kernel waits for a random state.
"""

from collections.abc import Callable

import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.graph.sampled_layer import CSCTensors, SampledLayer, starts

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: multiples of it are spread evenly (Knuth)
_OF_OTHERS = 1 << 40  # added to a seed for draws that are not a sampler's


class DeviceSampler:
    """Samples in-neighbours of one graph that lies on a device. Not for several threads at once.

    Args:
        graph: CSC over one set of nodes; copied to the device.
    """

    def __init__(self, graph: CSC, device: torch.device):
        self.graph = CSCTensors.on(graph, device)
        # position of a node among the sources while a layer is made, -1: not one of them
        self._place = torch.full((len(graph.indptr) - 1,), -1, dtype=torch.int64, device=device)
        self.seed(0)

        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # batches are sampled on another stream

    @staticmethod
    def uniform(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A source of random numbers in [0, 1): from node ids (int64 [n], any device) to float64 [n]. Each call is a
        draw of its own, and independent of those of a sampler with the same seed."""
        return _draws(seed + _OF_OTHERS)

    def seed(self, seed: int) -> None:
        """Set the seed (int in [0, 2^32)) of the next draws of this sampler."""
        self._uniform = _draws(seed)

    def layer(self, destinations: torch.Tensor, fanout: int, keep_destinations: bool = True) -> SampledLayer:
        """Draw up to `fanout` (-1: all) in-neighbours of each destination.

        Args:
            destinations: int64 [n] on the sampler's device, unique node ids.
            keep_destinations: list the destinations among the sources, first.
        """
        graph, device = self.graph, destinations.device
        begin, degree = graph.indptr[destinations], graph.degree(destinations)
        drawn = degree if fanout < 0 else degree.clamp(max=fanout)
        step = degree.double() / drawn.clamp(min=1)
        indptr = starts(drawn)
        at = torch.repeat_interleave(torch.arange(len(drawn), device=device), drawn)
        number = torch.arange(len(at), device=device) - indptr[at]
        position = ((number + self._uniform(destinations)[at]) * step[at]).long()
        edges = begin[at] + torch.minimum(position, degree[at] - 1)  # rounding may reach d
        neighbours = graph.indices[edges].long()

        place, first = self._place, destinations if keep_destinations else destinations[:0]
        place[first] = torch.arange(len(first), device=device)
        sources = torch.cat([first, torch.unique(neighbours[place[neighbours] < 0])])
        place[sources] = torch.arange(len(sources), device=device)
        positions = place[neighbours]
        place[sources] = -1
        return SampledLayer(sources, indptr, positions, edges, step.float())


def _draws(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    numbers = iter(range(1 << 62))
    return lambda ids: hashed_uniform(ids, seed, next(numbers))


def hashed_uniform(ids: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """A number in [0, 1) for each id (int64 [n]), float64 [n], which depends on nothing but the id, the seed and the
    number of the draw: the finalizer of splitmix64 (Steele et al. 2014), applied to their sum twice."""
    offset = (int(_mixed(torch.tensor(seed))) + draw * _GOLDEN) % (1 << 64)
    return (_mixed(_mixed(ids + _signed(offset))) >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mixed(z: torch.Tensor) -> torch.Tensor:
    # torch's 64-bit integers are signed: products wrap as unsigned ones do, and a mask makes a right shift unsigned
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    """The signed integer of the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
