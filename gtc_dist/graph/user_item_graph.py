"""The user-item graph from train interactions, built in blocks.

All graphs of a catalog are `CSC`s with sources sorted by index; item_knn_graph.py and user_cooccurrence_graph.py build
the other two. The builders read and write arrays that may be memory-mapped. In memory they hold a few numbers per user
and item and one block at a time, whose size follows from the scratch's `memory_bytes`; results do not depend on it.
"""

from dataclasses import dataclass

import numpy as np

from gtc_dist.data.catalog import CSC
from gtc_dist.data.scratch import Buckets, Scratch

EDGE_BYTES = 64  # memory per edge while a block is sorted


@dataclass(frozen=True)
class _Side:
    """The users or the items of the interactions.

    node: int32 [E], of each interaction
    degree: int64 [nodes], number of interactions
    weighted_degree: float64 [nodes], sum of their weights; None: all weigh one
    """

    node: np.ndarray
    degree: np.ndarray
    weighted_degree: np.ndarray | None

    @property
    def norm(self) -> np.ndarray:
        return (self.degree if self.weighted_degree is None else self.weighted_degree).astype(np.float64)


def build_user_item_graph(
    user: np.ndarray,
    item: np.ndarray,
    users: int,
    items: int,
    scratch: Scratch | None = None,
    weight: np.ndarray | None = None,
) -> tuple[CSC, CSC]:
    """Build both directions of the user-item graph, with edge weights w / sqrt(user degree * item degree).

    Args:
        user, item: int32 [E], train interactions, without duplicates.
        scratch: holds the edges while they are sorted, and the result; None: in memory, for few edges.
        weight: float32 [E], w of each interaction, whose sums are the degrees; None: 1.

    Returns:
        item_user (destination user, sources its items) and user_item (destination item, sources its users).
    """
    if scratch is None:
        with Scratch() as scratch:
            graphs = build_user_item_graph(user, item, users, items, scratch, weight)
            return tuple(in_memory(graph) for graph in graphs)
    by_user, by_item = _side(user, users, weight, scratch), _side(item, items, weight, scratch)
    return (
        _sort_by_destination(by_item, by_user, weight, scratch),
        _sort_by_destination(by_user, by_item, weight, scratch),
    )


def in_memory(graph: CSC) -> CSC:
    """Copy of a graph in memory, independent of scratch."""
    return CSC(*(np.array(array) for array in (graph.indptr, graph.indices, graph.weight)), graph.weighted_degree)


def edge_ranges(ends: np.ndarray, max_edges: int, max_destinations: int | None = None) -> list[slice]:
    """Split destinations into ranges of at most `max_edges` edges; a destination with more is alone in its range.

    Args:
        ends: int64 [destinations + 1], cumulative number of edges (an indptr).
        max_destinations: limit of the destinations in a range.
    """
    total, first, out = len(ends) - 1, 0, []
    while first < total:
        last = int(np.searchsorted(ends, ends[first] + max_edges, side="right")) - 1
        last = min(max(last, first + 1), first + (max_destinations or total), total)
        out.append(slice(first, last))
        first = last
    return out


def _side(node: np.ndarray, nodes: int, weight: np.ndarray | None, scratch: Scratch) -> _Side:
    degree, weighted = np.zeros(nodes, np.int64), None if weight is None else np.zeros(nodes)
    for block in scratch.blocks(len(node), EDGE_BYTES):
        degree += np.bincount(node[block], minlength=nodes)
        if weight is not None:
            np.add.at(weighted, node[block], weight[block])  # adds row by row, so blocks do not change the rounding
    return _Side(node, degree, weighted)


def _sort_by_destination(source: _Side, destination: _Side, weight: np.ndarray | None, scratch: Scratch) -> CSC:
    """Partition the edges into ranges of destinations that fit in memory, then sort each range."""
    columns, types = [destination.node, source.node], [np.int32, np.int32]
    if weight is not None:
        columns, types = [*columns, weight], [*types, np.float32]
    norm, source_norm = destination.norm, source.norm
    indptr = np.concatenate([[0], np.cumsum(destination.degree)]).astype(np.int64)
    parts = edge_ranges(indptr, scratch.rows(EDGE_BYTES))
    part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [part.stop - part.start for part in parts])
    sizes = [indptr[part.stop] - indptr[part.start] for part in parts]
    buckets = Buckets(scratch, sizes, types)
    for block in scratch.blocks(len(source.node), EDGE_BYTES):
        buckets.add(part_of[destination.node[block]], *(column[block] for column in columns))

    indices, edge_weight = scratch.array(len(source.node), np.int32), scratch.array(len(source.node), np.float32)
    for number, part in enumerate(parts):
        part_destination, part_source, *weights = buckets.bucket(number)
        key = part_destination.astype(np.int64) << 32 | part_source  # one sort by both
        if weights:
            order = key.argsort()
            key, part_weight = key[order], weights[0][order]
        else:
            key.sort()
            part_weight = 1.0
        part_destination, part_source = key >> 32, key & 0xFFFFFFFF
        edges = slice(indptr[part.start], indptr[part.stop])
        indices[edges] = part_source
        edge_weight[edges] = part_weight / np.sqrt(norm[part_destination] * source_norm[part_source])
        scratch.release()
    scratch.discard(*buckets.columns)
    return CSC(indptr, indices, edge_weight, destination.weighted_degree)
