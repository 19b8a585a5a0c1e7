"""Sharded sparse-dense matrix products: each rank sums over the edges into its own rows, in bounded memory (on a GPU up
to `MAX_KEPT_BYTES` of edges stay on the device).

A rank's destinations are computed a chunk at a time, and a chunk looks up only the source rows that its edges name.
Nothing is differentiated: inference and the untrained scorers use this, training uses `message_passing`.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from gtc_dist.distributed.message_passing import Block, weighted_sum
from gtc_dist.distributed.sharded_table import LookupPlan, ShardedTable, plan_lookup

MAX_KEPT_BYTES = 1 << 30  # edges of an operator that stay on a GPU between products


class ShardedSpMM:
    """Weighted sums over the edges into this rank's rows, for tables of any width. Making one is a collective.

    Args:
        indptr, indices, weight: graph by destination (CSC). weight None: the mean over a destination's edges.
        first: destination of the graph that is row 0 of `rows`.
        rows: a table over the destinations; only its row ranges are used.
        sources: a table over the sources; only its number of rows is used.
        chunk: destinations computed at once.
        base: source of the graph that is row 0 of `sources`.
    """

    def __init__(
        self, indptr, indices, weight, first: int, rows: ShardedTable, sources: ShardedTable, chunk: int, base: int = 0
    ):
        self.indptr, self.indices, self.weight, self.base = indptr, indices, weight, base
        self.comm, self.bounds = rows.comm, list(row_chunks(rows, chunk))
        self.first = first + rows.start
        # with several ranks: the source rows of each chunk, planned once for all columns and layers
        self.plans = [self._plan(*bounds, sources.rows) for bounds in self.bounds] if self.comm.size > 1 else []
        # a GPU gets the edges once, not for every group of columns, if they are few enough
        edges = int(indptr[self.first + self.bounds[-1][1]] - indptr[self.first]) if self.bounds else 0
        self.keeps_blocks = self.comm.device.type != "cpu" and 8 * edges <= MAX_KEPT_BYTES
        self.blocks: dict[int, Block] = {}

    def sums(self, sources: ShardedTable) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, end, float32 [end - first, width]) of this rank's rows, chunk by chunk. Collective: every rank
        must exhaust the iterator."""
        for number, (low, high) in enumerate(self.bounds):
            rows = sources.lookup(self.plans[number][1]) if self.plans else sources.weight
            yield low, high, weighted_sum(self._block(number, len(rows)), rows).float()

    def _block(self, number: int, sources: int) -> Block:
        """Local. Edges into a chunk, from this many source rows, on the device."""
        if number in self.blocks:
            return self.blocks[number]
        edges, indptr = self._edges(*self.bounds[number])
        if self.weight is None:
            count = np.diff(indptr)
            weight = np.repeat(1 / np.maximum(count, 1).astype(np.float32), count)
        else:
            weight = np.array(self.weight[edges])  # a copy: shared memory is read-only
        position = self.plans[number][0] if self.plans else torch.from_numpy(self.indices[edges] - np.int32(self.base))
        block = Block.forward_only(torch.from_numpy(indptr), position, torch.from_numpy(weight), sources)
        block = block.to(self.comm.device)
        if self.keeps_blocks:
            self.blocks[number] = block
        return block

    def _edges(self, low: int, high: int) -> tuple[slice, np.ndarray]:
        """Local. Edges into rows [low, high), and their indptr from 0."""
        indptr = self.indptr[self.first + low : self.first + high + 1]
        return slice(int(indptr[0]), int(indptr[-1])), indptr - indptr[0]

    def _plan(self, low: int, high: int, rows: int) -> tuple[torch.Tensor, LookupPlan]:
        """Place of each edge's source among the looked-up rows, and the plan that looks these up."""
        ids = torch.from_numpy(self.indices[self._edges(low, high)[0]] - np.int32(self.base))
        used, position = torch.unique(ids, return_inverse=True)
        plan = plan_lookup(used.long().to(self.comm.device), rows, self.comm, trained=False)
        return position.int(), replace(plan, position=None)  # rows arrive in the order of `used`


def row_chunks(table: ShardedTable, chunk: int) -> Iterator[tuple[int, int]]:
    """Bounds of chunks of this rank's rows: the same number on every rank, the last ones empty where a rank has fewer
    rows. Collective: every rank must call it."""
    rows = table.stop - table.start
    for n in range(table.comm.all_reduce_max(-(-rows // chunk))):
        yield min(n * chunk, rows), min((n + 1) * chunk, rows)
