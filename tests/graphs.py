"""Helpers of the tests of graphs."""

import numpy as np
import scipy.sparse as sp

from gtc_dist.data.catalog import CSC

USERS, ITEMS = 40, 25


def train_pairs(seed: int, users: int = USERS, items: int = ITEMS, count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs in random order; some users and items have none; low item indexes are popular."""
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.geometric(0.15, count), items - 1).astype(np.int32)
    pairs = np.unique(np.stack([rng.integers(0, users, count), item], 1), axis=0)
    pairs = pairs[rng.permutation(len(pairs))].astype(np.int32)
    return pairs[:, 0], pairs[:, 1]


def dense(graph: CSC, sources: int) -> np.ndarray:
    """[destinations, sources] weights."""
    out = np.zeros((len(graph.indptr) - 1, sources))
    for destination in range(len(out)):
        edges = slice(graph.indptr[destination], graph.indptr[destination + 1])
        out[destination, graph.indices[edges]] = graph.weight[edges]
    return out


def check_layout(graph: CSC, destinations: int) -> None:
    assert (graph.indptr.dtype, graph.indices.dtype, graph.weight.dtype) == (np.int64, np.int32, np.float32)
    assert len(graph.indptr) == destinations + 1
    assert graph.indptr[0] == 0
    assert graph.indptr[-1] == len(graph.indices) == len(graph.weight)
    for destination in range(destinations):
        sources = graph.indices[graph.indptr[destination] : graph.indptr[destination + 1]]
        assert (np.diff(sources) > 0).all()  # sorted, none twice


def same(graph: CSC, other: CSC) -> bool:
    """Whether two graphs are equal to the last bit."""
    pairs = zip(*((g.indptr, g.indices, g.weight) for g in (graph, other)), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def random_graph(nodes: int = 150, seed: int = 0) -> tuple[CSC, sp.csr_matrix]:
    """A graph over one set of nodes, and its matrix [destinations, sources]."""
    matrix = sp.random(nodes, nodes, 0.15, format="csr", random_state=seed, dtype=np.float32)
    matrix.sort_indices()
    return CSC(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data), matrix
