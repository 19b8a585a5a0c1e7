"""Walks over co-interactions: the operator that the untrained parts of an embedding are made with.

With R the train interactions, N = D_u^-p R D_i^-q takes what items carry to users, and C = N^T N without its diagonal
takes it from item to item over common users. The way from an item to its user and straight back says nothing of other
items, and it would be the strongest tie of every item with few users: hence no diagonal.
"""

from dataclasses import dataclass

import numpy as np
import torch

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.layerwise import ShardedSpMM

COLUMNS = 32  # that are walked at once


@dataclass(frozen=True)
class WalkOptions:
    user_exponent: float  # p
    item_exponent: float  # q
    chunk: int  # rows of a rank at once


class CooccurrenceOperator:
    """N and C over this rank's rows. A collective to make, and to use."""

    def __init__(self, graphs: Graphs, comm: Communicator, options: WalkOptions):
        nodes = (graphs.nodes.indptr, graphs.nodes.indices, graphs.nodes.weight)
        users = ShardedTable("users", graphs.users, 0, comm, trainable=False)
        items = ShardedTable("items", graphs.items, 0, comm, trainable=False)
        self.users, self.items = users, items
        self.into_users = ShardedSpMM(*nodes, 0, users, items, options.chunk, base=graphs.users)
        self.into_items = ShardedSpMM(*nodes, graphs.users, items, users, options.chunk)
        self.warm = torch.from_numpy(graphs.item_degree[items.start : items.stop] > 0).to(comm.device)[:, None]
        # the graph's own weights are (degree of user * degree of item)^-1/2
        self.user_scale = _power(graphs.user_degree, users, 0.5 - options.user_exponent)
        self.rest = _power(graphs.item_degree, items, 0.5 - options.item_exponent)
        self.item_scale = _power(graphs.item_degree, items, -options.item_exponent)
        back = self._sums(self.into_items, users, _power(graphs.user_degree, users, 0.5 - 2 * options.user_exponent))
        self.diagonal = back * _power(graphs.item_degree, items, 0.5 - 2 * options.item_exponent)

    def to_users(self, x: torch.Tensor) -> torch.Tensor:
        """N x, for x [items of this rank, b]."""
        return self._sums(self.into_users, self.items, x * self.rest) * self.user_scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """C x, for x [items of this rank, b]."""
        return self._sums(self.into_items, self.users, self.to_users(x) * self.user_scale) * self.rest - (
            self.diagonal * x
        )

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over all items that have interactions, [1, b], for x [items of this rank, b]. A collective."""
        sums = self.items.comm.all_reduce(torch.cat([x.double() * self.warm, self.warm.double()], dim=1).sum(0))
        return (sums[:-1] / sums[-1].clamp(min=1))[None].to(x.dtype)

    @staticmethod
    def _sums(edges: ShardedSpMM, like: ShardedTable, x: torch.Tensor) -> torch.Tensor:
        out = []
        for columns in x.float().split(COLUMNS, dim=1):
            sources = like.holding(columns.contiguous())
            out.append(torch.cat([values for _, _, values in edges.sums(sources)]))
        return torch.cat(out, dim=1)


def _power(degree: np.ndarray, like: ShardedTable, exponent: float) -> torch.Tensor:
    """degree^exponent of this rank's rows, [n, 1]; rows without edges get 1, which nothing multiplies."""
    own = np.maximum(degree[like.start : like.stop], 1).astype(np.float64) ** exponent
    return torch.from_numpy(own.astype(np.float32)).to(like.comm.device)[:, None]


def pair(walk: CooccurrenceOperator, users: torch.Tensor, items: torch.Tensor) -> tuple[ShardedTable, ShardedTable]:
    """Frozen tables of this rank's rows of users and items, whose dot product is a score."""
    return walk.users.holding(users.float()), walk.items.holding(items.float())
