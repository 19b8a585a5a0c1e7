"""Inverted lists (IVF) for the largest inner product, whose lists suit the users that ask.

FAISS groups items by their direction. With embeddings whose norms differ a hundredfold, as those of popular items do, a
search must then look at most lists. Here items share a list where users score them alike: k-means on projections whose
distances are differences of the users' scores,

    |P x - P y|^2 = mean over users u of (u x - u y)^2,

P the leading PROJECTION directions of the users' second moment. A search goes through the lists whose mean item scores
highest. The result is an ordinary `IndexIVFFlat`; figures are in docs/scaling.md.
"""

from typing import Any

import faiss
import numpy as np

PROJECTION = 64  # directions of the users' second moment
FIT_ITEMS = 64  # items for each list, on which k-means is fitted
ITERATIONS = 10


def list_count(rows: int) -> int:
    """Number of lists for a number of items."""
    return max(min(round(4 * rows**0.5), rows // FIT_ITEMS), 1)


class InvertedLists:
    """An index that is filled some rows at a time.

    Args:
        items: sample of the items, float32 [n, dim], at least one for each list.
        users: sample of the users, float32 [m, dim].
        lists: number of lists.
    """

    def __init__(self, items: np.ndarray, users: np.ndarray, lists: int):
        dim = items.shape[1]
        moment = (users.astype(np.float64).T @ users) / len(users) if len(users) else np.eye(dim)
        energy, directions = np.linalg.eigh(moment)
        leading = np.argsort(-energy)[:PROJECTION]
        self.projection = (directions[:, leading] * np.sqrt(np.maximum(energy[leading], 0))).astype(np.float32)
        kmeans = faiss.Kmeans(len(leading), lists, niter=ITERATIONS, seed=0, min_points_per_centroid=1)
        kmeans.train(np.ascontiguousarray(items @ self.projection))
        self.centroids = kmeans.index
        self.means = faiss.IndexFlatIP(dim)  # the index refers to it
        self.index = faiss.IndexIVFFlat(self.means, dim, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.is_trained = True
        self.sums, self.counts = np.zeros((lists, dim)), np.zeros(lists, np.int64)

    def add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        """Add rows, float32 [n, dim], under their ids, int64 [n]."""
        at = self.centroids.search(np.ascontiguousarray(vectors @ self.projection), 1)[1].reshape(-1)
        arrays = [np.ascontiguousarray(each) for each in (vectors, ids, at)]
        self.index.add_core(len(vectors), *(faiss.swig_ptr(array) for array in arrays))
        order = np.argsort(at, kind="stable")
        lists, first = np.unique(at[order], return_index=True)
        self.sums[lists] += np.add.reduceat(vectors[order].astype(np.float64), first, axis=0)
        self.counts += np.bincount(at, minlength=len(self.counts))

    def finish(self) -> Any:
        """The index, which searches the lists by their mean item."""
        self.means.add((self.sums / np.maximum(self.counts, 1)[:, None]).astype(np.float32))
        return self.index
