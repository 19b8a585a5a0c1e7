"""The item-item graph: each item's nearest items by content.

Up to `EXACT_ITEMS` items all pairs are compared. Beyond, with FAISS:

1. directions: the joint vectors are projected on their principal directions (of a sample), as many as hold `ENERGY` of
   their squares, 64 at most; what is left decides little about who is near
2. lists: k-means on the sample cuts the items into lists of about `LIST_ITEMS`; an index holds every item's projection
   in 8 bits a value
3. candidates: for each item the `CANDIDATES` x k nearest in the `probes` lists that are nearest to it
4. ranking: the candidates' exact similarities, in float32, decide

The work is linear in the items at a fixed number of probes, but for finding the nearest lists. Items are asked for list
by list, so that what one needs is still in the cache from the one before. `graph_recall` measures what the shortcut costs.
Blocks are of fixed sizes wherever a sum of floats could depend on them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import faiss
import numpy as np

from gtc_dist.data.catalog import CSC
from gtc_dist.data.scratch import Scratch
from gtc_dist.graph.user_item_graph import in_memory

EXACT_ITEMS = 50_000  # `auto` compares all pairs up to here
ITEM_BLOCK = 1 << 13  # items at once
LIST_ITEMS = 250
SAMPLE = 50  # items of the sample for each list
LEAST_SAMPLED, MOST_SAMPLED = 1 << 14, 1 << 17
DIRECTIONS_SAMPLE = 1 << 16
ENERGY, MOST_DIRECTIONS = 0.95, 64
CANDIDATES = 3  # x k are ranked exactly
ROUNDS = 8  # of k-means
ROW_BYTES = 8  # of a value of a candidate while it is ranked
ROUNDING = 1e-5  # of a similarity

SearchProgress = Callable[[int, int], None]


def build_item_knn_graph(
    content: dict[str, np.ndarray],
    weights: dict[str, float],
    k: int,
    threads: int,
    *,
    search: Literal["auto", "exact", "approximate"] = "auto",
    probes: int = 160,
    seed: int = 0,
    scratch: Scratch | None = None,
    progress: SearchProgress = lambda done, total: None,
) -> CSC:
    """k nearest items by content, each item's weights adding to one.

    The similarity is the mean of the modalities' cosines by `weights`; an item without a vector (zeros) has cosine 0,
    and ties go to the lower index. Opposed content (negative similarity) gets weight 0, so all weights of an item that
    is similar to none are 0: nothing is known that it could have of others.

    Args:
        content: modality -> float16 [items, width].
        k: neighbours; fewer if there are not as many other items.
        probes: of the approximate search: lists of about 250 items that are looked through for each item.
        scratch: None: for few items, the result is in memory.
        progress: told how many items are done, and of how many.
    """
    if scratch is None:
        with Scratch() as scratch:
            options = {"search": search, "probes": probes, "seed": seed, "scratch": scratch, "progress": progress}
            return in_memory(build_item_knn_graph(content, weights, k, threads, **options))
    faiss.omp_set_num_threads(threads)
    joint = Joint(content, weights, threads, scratch)
    k = max(min(k, joint.items - 1), 0)
    indices, weight = scratch.array((joint.items, k), np.int32), scratch.array((joint.items, k), np.float32)
    if approximates(search, joint.items):
        found = _approximate(joint, k, probes, seed)
    else:
        found = ((items, *_nearest(joint, items, row, k)) for items, row in joint.blocks())
    done = 0
    for items, neighbour, similarity in found if k else ():
        order = np.argsort(neighbour, axis=1)
        indices[items] = np.take_along_axis(neighbour, order, 1)
        weight[items] = np.take_along_axis(similarity_weights(similarity), order, 1)
        scratch.release()
        done += len(neighbour)
        progress(done, joint.items)
    return CSC(np.arange(joint.items + 1, dtype=np.int64) * k, indices.reshape(-1), weight.reshape(-1))


def approximates(search: str, items: int) -> bool:
    return search == "approximate" or (search == "auto" and items > EXACT_ITEMS)


def graph_recall(
    graph: CSC,
    content: dict[str, np.ndarray],
    weights: dict[str, float],
    threads: int,
    *,
    seed: int = 0,
    sample: int = 1000,
    scratch: Scratch | None = None,
) -> float:
    """Share of the neighbours that are as near as the k-th nearest of all items, over a sample of the items."""
    if scratch is None:
        with Scratch() as scratch:
            return graph_recall(graph, content, weights, threads, seed=seed, sample=sample, scratch=scratch)
    faiss.omp_set_num_threads(threads)
    joint = Joint(content, weights, threads, scratch)
    k = len(graph.indices) // joint.items
    if not k:
        return 1.0
    asked = np.sort(np.random.default_rng(seed).choice(joint.items, min(sample, joint.items), replace=False))
    near = 0
    for items, row in joint.blocks(asked):
        _, nearest = _nearest(joint, items, row, k)
        found = _similarities(joint, items, graph.indices.reshape(-1, k)[items].astype(np.int64))
        near += int((found >= nearest[:, -1:] - ROUNDING).sum())
    return near / (len(asked) * k)


class Joint:
    """The joint vectors: rows whose inner products are the weighted means of the modalities' cosines.

    They are made where they are asked for; only the rows' lengths are kept. width: of all modalities together.
    present: bool [items], whether an item has a vector at all.
    """

    def __init__(self, content: dict[str, np.ndarray], weights: dict[str, float], threads: int, scratch: Scratch):
        self.threads, self.scratch = threads, scratch
        total = sum(weights[name] for name in content)
        self.parts, self.scales = [matrix for name, matrix in content.items() if weights[name]], []
        factors = [np.float32(np.sqrt(weights[name] / total)) for name in content if weights[name]]
        self.items, self.width = len(self.parts[0]), sum(matrix.shape[1] for matrix in self.parts)
        for matrix, factor in zip(self.parts, factors, strict=True):
            scale = np.zeros(self.items, np.float32)
            for block in _blocks(self.items):
                part = matrix[block].astype(np.float32)
                length = np.sqrt(np.einsum("nd,nd->n", part, part))
                np.divide(factor, length, out=scale[block], where=length > 0)
                scratch.release()
            self.scales.append(scale)
        self.present = np.any(self.scales, axis=0)

    def rows(self, items: np.ndarray) -> np.ndarray:
        """float32 [n, width]."""
        out = np.empty((len(items), self.width), np.float32)
        with ThreadPoolExecutor(self.threads) as pool:  # numpy lets go of Python's lock
            size = -(-len(items) // self.threads)
            list(pool.map(lambda block: self._fill(out[block], items[block]), _blocks(len(items), max(size, 1))))
        return out

    def blocks(self, items: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of all items or the given ones, block by block: items [n], rows float32 [n, width]."""
        items = np.arange(self.items) if items is None else items
        for block in _blocks(len(items)):
            yield items[block], self.rows(items[block])
            self.scratch.release()

    def _fill(self, out: np.ndarray, items: np.ndarray) -> None:
        column = 0
        for matrix, scale in zip(self.parts, self.scales, strict=True):
            part = out[:, column : column + matrix.shape[1]]
            part[:] = matrix[items]
            part *= scale[items, None]
            column += matrix.shape[1]


def _blocks(total: int, size: int = ITEM_BLOCK) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def similarity_weights(similarity: np.ndarray) -> np.ndarray:
    """Weights of the neighbours [n, k], adding to one; zeros where none is similar."""
    weight = np.maximum(similarity.astype(np.float64), 0)
    total = weight.sum(axis=1, keepdims=True)
    return (weight / np.where(total > 0, total, 1)).astype(np.float32)


def _nearest(joint: Joint, items: np.ndarray, row: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exactly the k nearest other items, best first: index int64 [n, k] and similarity float32 [n, k]."""
    neighbour, similarity = np.empty((len(items), 0), np.int64), np.empty((len(items), 0), np.float32)
    for others, other_row in joint.blocks():
        near, found = faiss.knn(row, other_row, min(k + 1, len(others)), faiss.METRIC_INNER_PRODUCT)
        neighbour = np.concatenate([neighbour, found + others[0]], axis=1)
        neighbour, similarity = _best(neighbour, np.concatenate([similarity, near], axis=1), k + 1)
    own = neighbour == items[:, None]
    # The item itself is left out. Among more than k twins it may not have been found: then the last goes.
    extra = np.where(own.any(axis=1), own.argmax(axis=1), k)
    wanted = np.arange(k + 1) != extra[:, None]
    return neighbour[wanted].reshape(-1, k), similarity[wanted].reshape(-1, k)


def _best(neighbour: np.ndarray, similarity: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((neighbour, -similarity), axis=1)[:, :k]
    return np.take_along_axis(neighbour, order, 1), np.take_along_axis(similarity, order, 1)


def _approximate(joint: Joint, k: int, probes: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of items with the near ones: items [n], index int64 [n, k], similarity float32 [n, k]."""
    present, without = np.flatnonzero(joint.present), np.flatnonzero(~joint.present)
    if len(present):
        directions, index = _index(joint, present, seed)
        # An unusually long list (many items with one content) is not looked through whole: the work stays linear.
        settings = faiss.SearchParametersIVF(nprobe=probes, max_codes=2 * probes * LIST_ITEMS)
        for items, row in joint.blocks(_by_list(index)):
            _, found = index.search(directions.apply(row), CANDIDATES * k + 1, params=settings)
            yield items, *_ranked(joint, items, found, k)
    lowest = np.arange(k)  # an item without a vector is near to none: weights of zero
    for block in _blocks(len(without)):
        items = without[block]
        yield items, lowest + (lowest >= items[:, None]), np.zeros((len(items), k), np.float32)


def _index(joint: Joint, present: np.ndarray, seed: int) -> tuple[faiss.LinearTransform, faiss.IndexIVF]:
    """The projection, and the index with all items that have a vector."""
    lists = max(len(present) // LIST_ITEMS, 1)
    size = min(max(SAMPLE * lists, LEAST_SAMPLED), MOST_SAMPLED, len(present))
    sample = np.sort(np.random.default_rng(seed).choice(present, size, replace=False))
    directions = _directions(joint, sample[:: -(-size // DIRECTIONS_SAMPLE)])
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(directions.d_out),
        directions.d_out,
        lists,
        faiss.ScalarQuantizer.QT_8bit_uniform,
        faiss.METRIC_INNER_PRODUCT,
        False,  # codes are of the vectors, not of what is left of them beside the list's centre
    )
    index.sq.rangestat_arg = 0.1  # codes reach a little beyond the sample's values
    index.cp.seed, index.cp.niter, index.cp.spherical = seed % 2**31, ROUNDS, True
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, SAMPLE
    index.train(np.concatenate([directions.apply(row) for _, row in joint.blocks(sample)]))
    for items, row in joint.blocks(present):
        index.add_with_ids(directions.apply(row), items)
    return directions, index


def _directions(joint: Joint, sample: np.ndarray) -> faiss.LinearTransform:
    """The projection on the principal directions of a sample (about zero: inner products are wanted), biggest first."""
    moments = np.zeros((joint.width, joint.width))
    for _, row in joint.blocks(sample):
        moments += row.T @ row
    energy, vectors = np.linalg.eigh(moments)
    share = np.cumsum(energy[::-1]) / max(energy.sum(), 1e-30)
    needed = 16 * -(-int(np.searchsorted(share, ENERGY) + 1) // 16)
    axes = vectors[:, ::-1][:, : min(needed, MOST_DIRECTIONS)].T.astype(np.float32)
    transform = faiss.LinearTransform(joint.width, len(axes), False)
    faiss.copy_array_to_vector(np.ascontiguousarray(axes).reshape(-1), transform.A)
    transform.is_trained = True
    return transform


def _by_list(index: faiss.IndexIVF) -> np.ndarray:
    """The index's items list by list, int64."""
    lists = index.invlists
    sizes = [lists.list_size(number) for number in range(index.nlist)]
    return np.concatenate([faiss.rev_swig_ptr(lists.get_ids(n), size).copy() for n, size in enumerate(sizes) if size])


def _ranked(joint: Joint, items: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the candidates but the item itself, by exact similarity: index int64 [n, k], float32 [n, k].

    Args:
        found: candidates of each item, int64 [n, more than k], -1 where there are none.
    """
    found[found == items[:, None]] = -1
    for row in np.flatnonzero((found >= 0).sum(axis=1) < k):  # seldom: a nearly empty part of the index
        free = np.flatnonzero(found[row] < 0)
        lowest = np.setdiff1d(np.arange(min(joint.items, found.shape[1] + k + 1)), np.append(found[row], items[row]))
        count = min(len(free), len(lowest))
        found[row, free[:count]] = lowest[:count]
    similarity = np.empty(found.shape, np.float32)
    for block in _blocks(len(items), joint.scratch.rows(found.shape[1] * joint.width * ROW_BYTES)):
        similarity[block] = _similarities(joint, items[block], found[block])
    return _best(found, np.where(found >= 0, similarity, -np.inf), k)


def _similarities(joint: Joint, items: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """float32 [n, candidates]; whatever where a candidate is -1. Each distinct row is made once."""
    distinct, place = np.unique(np.concatenate([items, np.maximum(candidates, 0).reshape(-1)]), return_inverse=True)
    row = joint.rows(distinct)
    query, place = row[place[: len(items)]], np.ascontiguousarray(place[len(items) :])
    out = np.empty(candidates.shape, np.float32)
    pointer = faiss.swig_ptr
    faiss.fvec_inner_products_by_idx(
        pointer(out), pointer(query), pointer(row), pointer(place), joint.width, *candidates.shape
    )
    return out
