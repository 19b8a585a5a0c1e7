"""The user-item graph from train interactions, in blocks.

The catalog's graphs are `CSC`s with sources sorted by index; the other two are in `neighbours` (item-item) and
`co_users` (user-user). All three take and give arrays that may be memory-mapped. What they hold in memory is a few
numbers for each user and item and one block at a time, sized by the scratch's `memory_bytes`. Their results are the
same for any size.
"""

import numpy as np

from gtc_dist.data.catalog import CSC
from gtc_dist.data.scratch import Buckets, Scratch

EDGE_BYTES = 64  # of an edge while its block is sorted


def build_user_item_graph(
    user: np.ndarray, item: np.ndarray, users: int, items: int, scratch: Scratch | None = None
) -> tuple[CSC, CSC]:
    """Both directions of the interactions, weighted 1/sqrt(user's degree * item's degree).

    Args:
        user, item: int32 [E], train interactions, no pair twice.
        scratch: where the edges are sorted and stay; None: for few edges, the result is in memory.

    Returns:
        item_user (destination user, sources its items) and user_item (destination item, sources its users).
    """
    if scratch is None:
        with Scratch() as scratch:
            return tuple(in_memory(graph) for graph in build_user_item_graph(user, item, users, items, scratch))
    user_degree, item_degree = _degrees(user, users, scratch), _degrees(item, items, scratch)
    return (
        _by_destination(item, user, item_degree, user_degree, scratch),
        _by_destination(user, item, user_degree, item_degree, scratch),
    )


def in_memory(graph: CSC) -> CSC:
    """A copy that does without scratch."""
    return CSC(*(np.array(array) for array in (graph.indptr, graph.indices, graph.weight)))


def ranges(ends: np.ndarray, most: int, at_most: int | None = None) -> list[slice]:
    """Cut destinations into ranges with at most `most` edges each; one with more is alone in its range.

    Args:
        ends: int64 [destinations + 1], edges up to each destination, from 0 (an indptr).
        at_most: destinations in a range.
    """
    total, first, out = len(ends) - 1, 0, []
    while first < total:
        last = int(np.searchsorted(ends, ends[first] + most, side="right")) - 1
        last = min(max(last, first + 1), first + (at_most or total), total)
        out.append(slice(first, last))
        first = last
    return out


def _degrees(node: np.ndarray, nodes: int, scratch: Scratch) -> np.ndarray:
    degree = np.zeros(nodes, np.int64)
    for block in scratch.blocks(len(node), EDGE_BYTES):
        degree += np.bincount(node[block], minlength=nodes)
    return degree


def _by_destination(
    source: np.ndarray, destination: np.ndarray, source_degree: np.ndarray, degree: np.ndarray, scratch: Scratch
) -> CSC:
    """Edges are dealt to ranges of destinations that fit in memory, then each range is sorted."""
    indptr = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
    parts = ranges(indptr, scratch.rows(EDGE_BYTES))
    part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [part.stop - part.start for part in parts])
    buckets = Buckets(scratch, [indptr[part.stop] - indptr[part.start] for part in parts], (np.int32, np.int32))
    for block in scratch.blocks(len(destination), EDGE_BYTES):
        buckets.add(part_of[destination[block]], destination[block], source[block])

    indices, weight = scratch.array(len(source), np.int32), scratch.array(len(source), np.float32)
    for number, part in enumerate(parts):
        to, of = buckets.bucket(number)
        key = to.astype(np.int64) << 32 | of  # one plain sort orders both
        key.sort()
        to, of = key >> 32, key & 0xFFFFFFFF
        edges = slice(indptr[part.start], indptr[part.stop])
        indices[edges] = of
        weight[edges] = 1.0 / np.sqrt(degree[to] * source_degree[of].astype(np.float64))
        scratch.release()
    scratch.discard(*buckets.columns)
    return CSC(indptr, indices, weight)
