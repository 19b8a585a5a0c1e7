"""The user-item graph from train interactions, built in blocks.

All graphs of a catalog are `CSC`s with sources sorted by index; item_knn_graph.py and user_cooccurrence_graph.py build
the other two. The builders read and write arrays that may be memory-mapped. In memory they hold a few numbers per user
and item and one block at a time, whose size follows from the scratch's `memory_bytes`; results do not depend on it.
"""

import numpy as np

from gtc_dist.data.catalog import CSC
from gtc_dist.data.scratch import Buckets, Scratch

EDGE_BYTES = 64  # memory per edge while a block is sorted


def build_user_item_graph(
    user: np.ndarray, item: np.ndarray, users: int, items: int, scratch: Scratch | None = None
) -> tuple[CSC, CSC]:
    """Build both directions of the user-item graph, with edge weights 1 / sqrt(user degree * item degree).

    Args:
        user, item: int32 [E], train interactions, without duplicates.
        scratch: holds the edges while they are sorted, and the result; None: in memory, for few edges.

    Returns:
        item_user (destination user, sources its items) and user_item (destination item, sources its users).
    """
    if scratch is None:
        with Scratch() as scratch:
            return tuple(in_memory(graph) for graph in build_user_item_graph(user, item, users, items, scratch))
    user_degree, item_degree = _degrees(user, users, scratch), _degrees(item, items, scratch)
    return (
        _sort_by_destination(item, user, item_degree, user_degree, scratch),
        _sort_by_destination(user, item, user_degree, item_degree, scratch),
    )


def in_memory(graph: CSC) -> CSC:
    """Copy of a graph in memory, independent of scratch."""
    return CSC(*(np.array(array) for array in (graph.indptr, graph.indices, graph.weight)))


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


def _degrees(node: np.ndarray, nodes: int, scratch: Scratch) -> np.ndarray:
    degree = np.zeros(nodes, np.int64)
    for block in scratch.blocks(len(node), EDGE_BYTES):
        degree += np.bincount(node[block], minlength=nodes)
    return degree


def _sort_by_destination(
    source: np.ndarray, destination: np.ndarray, source_degree: np.ndarray, degree: np.ndarray, scratch: Scratch
) -> CSC:
    """Partition the edges into ranges of destinations that fit in memory, then sort each range."""
    indptr = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
    parts = edge_ranges(indptr, scratch.rows(EDGE_BYTES))
    part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [part.stop - part.start for part in parts])
    buckets = Buckets(scratch, [indptr[part.stop] - indptr[part.start] for part in parts], (np.int32, np.int32))
    for block in scratch.blocks(len(destination), EDGE_BYTES):
        buckets.add(part_of[destination[block]], destination[block], source[block])

    indices, weight = scratch.array(len(source), np.int32), scratch.array(len(source), np.float32)
    for number, part in enumerate(parts):
        part_destination, part_source = buckets.bucket(number)
        key = part_destination.astype(np.int64) << 32 | part_source  # one sort by both
        key.sort()
        part_destination, part_source = key >> 32, key & 0xFFFFFFFF
        edges = slice(indptr[part.start], indptr[part.stop])
        indices[edges] = part_source
        weight[edges] = 1.0 / np.sqrt(degree[part_destination] * source_degree[part_source].astype(np.float64))
        scratch.release()
    scratch.discard(*buckets.columns)
    return CSC(indptr, indices, weight)
