"""The item-item graph: the k nearest neighbours of each item by content.

Up to `EXACT_ITEMS` items, all pairs are compared. Beyond, the search is approximate, with FAISS:

1. projection: the joint content vectors are projected on the principal directions of a sample that hold a share
   `ENERGY` of the squared norms, at most 64; the other directions contribute little to similarities
2. inverted lists: k-means on the sample partitions the items into lists of about `LIST_ITEMS`, in catalogs of more than
   4 M items into `ROOT_LISTS` times the square root of their number; the index stores the projection of every item in 8
   bits per value
3. candidates: for each item, the `CANDIDATES` x k nearest items in the `probes` lists nearest to it
4. reranking: the exact float32 similarities of the candidates decide

With a fixed number of probes the work is linear in the number of items, except for finding the nearest lists. Items are
queried list by list, so that consecutive queries read the same lists from the processor's cache. `graph_recall`
measures the accuracy of the approximation. Blocks have fixed sizes wherever a sum of floats could depend on them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import faiss
import numpy as np

from gtc_dist.data.catalog import CSC
from gtc_dist.data.scratch import Scratch
from gtc_dist.graph.csc import similarity_weights
from gtc_dist.graph.user_item_graph import in_memory

ITEM_NEIGHBOURS = 10  # k of the catalog's item-item graph
EXACT_ITEMS = 50_000  # `auto` compares all pairs up to this number of items
ITEM_BLOCK = 1 << 13  # items per block
LIST_ITEMS = 250  # mean length of an inverted list
ROOT_LISTS = 8
LIST_SAMPLE, LEAST_LIST_SAMPLE = 50, 30  # sampled items per list for k-means, and where these are more than MAX_SAMPLE
MIN_SAMPLE, MAX_SAMPLE = 1 << 14, 1 << 17  # bounds of the whole sample
DIRECTIONS_SAMPLE = 1 << 16  # items for the principal directions
ENERGY, MAX_DIRECTIONS = 0.95, 64
CANDIDATES = 3  # times k candidates are compared exactly
KMEANS_ROUNDS = 8
VALUE_BYTES = 8  # memory per value of a candidate's vector while it is compared
ROUNDING = 1e-5  # tolerance when similarities are compared

SearchProgress = Callable[[int, int], None]


def build_item_knn_graph(
    features: dict[str, np.ndarray],
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
    """Build the graph of the k nearest items by content; the weights of each item add up to one.

    The similarity of two items is the mean of their cosines per modality, weighted by `weights`. An item without a
    vector in a modality (zeros) has cosine 0 there. Ties go to the lower index. Negative similarities get weight 0, so
    an item without positive similarity has only weights of 0.

    Args:
        features: modality -> float16 [items, width].
        k: number of neighbours, limited to the number of other items.
        probes: lists searched for each item, in the approximate search.
        scratch: holds the arrays of the graph; None: in memory, for few items.
        progress: called with the numbers of finished and of all items.
    """
    if scratch is None:
        with Scratch() as scratch:
            options = {"search": search, "probes": probes, "seed": seed, "scratch": scratch, "progress": progress}
            return in_memory(build_item_knn_graph(features, weights, k, threads, **options))
    faiss.omp_set_num_threads(threads)
    joint = JointContent(features, weights, threads, scratch)
    k = max(min(k, joint.items - 1), 0)
    indices, weight = scratch.array((joint.items, k), np.int32), scratch.array((joint.items, k), np.float32)
    if is_approximate(search, joint.items):
        blocks = _search_index(joint, k, probes, seed)
    else:
        blocks = ((items, *_search_exactly(joint, items, rows, k)) for items, rows in joint.blocks())
    done = 0
    for items, neighbour, similarity in blocks if k else ():
        order = np.argsort(neighbour, axis=1)
        indices[items] = np.take_along_axis(neighbour, order, 1)
        weight[items] = np.take_along_axis(similarity_weights(similarity), order, 1)
        scratch.release()
        done += len(neighbour)
        progress(done, joint.items)
    return CSC(np.arange(joint.items + 1, dtype=np.int64) * k, indices.reshape(-1), weight.reshape(-1))


def is_approximate(search: str, items: int) -> bool:
    """Whether a search of this kind over `items` items is approximate."""
    return search == "approximate" or (search == "auto" and items > EXACT_ITEMS)


def graph_recall(
    graph: CSC,
    features: dict[str, np.ndarray],
    weights: dict[str, float],
    threads: int,
    *,
    seed: int = 0,
    sample: int = 1000,
    scratch: Scratch | None = None,
) -> float:
    """Recall of the graph: share of its neighbours at least as similar as the true k-th nearest, on sampled items."""
    if scratch is None:
        with Scratch() as scratch:
            return graph_recall(graph, features, weights, threads, seed=seed, sample=sample, scratch=scratch)
    faiss.omp_set_num_threads(threads)
    joint = JointContent(features, weights, threads, scratch)
    k = len(graph.indices) // joint.items
    if not k:
        return 1.0
    sampled = np.sort(np.random.default_rng(seed).choice(joint.items, min(sample, joint.items), replace=False))
    hits = 0
    for items, rows in joint.blocks(sampled):
        _, exact = _search_exactly(joint, items, rows, k)
        found = _similarities(joint, items, graph.indices.reshape(-1, k)[items].astype(np.int64))
        hits += int((found >= exact[:, -1:] - ROUNDING).sum())
    return hits / (len(sampled) * k)


class JointContent:
    """Joint content vectors: their inner products are the weighted means of the modalities' cosines.

    Vectors are computed on request; only the norms of the rows are stored. Features may be memory-mapped.

    Attributes:
        width: width of all modalities together.
        present: bool [items], whether an item has a vector in any modality.
    """

    def __init__(self, features: dict[str, np.ndarray], weights: dict[str, float], threads: int, scratch: Scratch):
        self.threads, self.scratch = threads, scratch
        total = sum(weights[name] for name in features)
        self.parts, self.scales = [matrix for name, matrix in features.items() if weights[name]], []
        factors = [np.float32(np.sqrt(weights[name] / total)) for name in features if weights[name]]
        self.items, self.width = len(self.parts[0]), sum(matrix.shape[1] for matrix in self.parts)
        for matrix, factor in zip(self.parts, factors, strict=True):
            scale = np.zeros(self.items, np.float32)
            for block in _blocks(self.items):
                part = matrix[block].astype(np.float32)
                norm = np.sqrt(np.einsum("nd,nd->n", part, part))
                np.divide(factor, norm, out=scale[block], where=norm > 0)
                scratch.release()
            self.scales.append(scale)
        self.present = np.any(self.scales, axis=0)

    def rows(self, items: np.ndarray) -> np.ndarray:
        """Joint vectors of some items, float32 [n, width]."""
        out = np.empty((len(items), self.width), np.float32)
        with ThreadPoolExecutor(self.threads) as pool:  # numpy releases the GIL
            size = -(-len(items) // self.threads)
            list(pool.map(lambda block: self._fill(out[block], items[block]), _blocks(len(items), max(size, 1))))
        return out

    def blocks(self, items: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of all or some items: (items [n], joint vectors float32 [n, width])."""
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


def _search_exactly(joint: JointContent, items: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The exact k nearest other items, nearest first: index int64 [n, k] and similarity float32 [n, k]."""
    neighbour, similarity = np.empty((len(items), 0), np.int64), np.empty((len(items), 0), np.float32)
    for others, other_rows in joint.blocks():
        block_similarity, found = faiss.knn(rows, other_rows, min(k + 1, len(others)), faiss.METRIC_INNER_PRODUCT)
        neighbour = np.concatenate([neighbour, found + others[0]], axis=1)
        neighbour, similarity = _top_k(neighbour, np.concatenate([similarity, block_similarity], axis=1), k + 1)
    itself = neighbour == items[:, None]
    # Drop the item itself. With more than k duplicates it may not be among the k + 1; then drop the last one.
    dropped = np.where(itself.any(axis=1), itself.argmax(axis=1), k)
    kept = np.arange(k + 1) != dropped[:, None]
    return neighbour[kept].reshape(-1, k), similarity[kept].reshape(-1, k)


def _top_k(neighbour: np.ndarray, similarity: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar neighbours of each row, best first, ties to the lower index."""
    order = np.lexsort((neighbour, -similarity), axis=1)[:, :k]
    return np.take_along_axis(neighbour, order, 1), np.take_along_axis(similarity, order, 1)


def _search_index(joint: JointContent, k: int, probes: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Approximate neighbours of all items, in blocks: items [n], index int64 [n, k], similarity float32 [n, k]."""
    present, without = np.flatnonzero(joint.present), np.flatnonzero(~joint.present)
    if len(present):
        projection, index = _build_index(joint, present, seed)
        # max_codes limits the search in unusually long lists (many items with the same content): the work stays linear.
        settings = faiss.SearchParametersIVF(nprobe=probes, max_codes=2 * probes * LIST_ITEMS)
        for items, rows in joint.blocks(_items_by_list(index)):
            _, found = index.search(projection.apply(rows), CANDIDATES * k + 1, params=settings)
            yield items, *_rerank(joint, items, found, k)
    lowest = np.arange(k)  # an item without a vector gets the first items as neighbours, with weights of zero
    for block in _blocks(len(without)):
        items = without[block]
        yield items, lowest + (lowest >= items[:, None]), np.zeros((len(items), k), np.float32)


def _build_index(joint: JointContent, present: np.ndarray, seed: int) -> tuple[faiss.LinearTransform, faiss.IndexIVF]:
    """The projection, and the index of all items that have a vector."""
    lists, size = lists_and_sample(len(present))
    sample = np.sort(np.random.default_rng(seed).choice(present, size, replace=False))
    projection = _fit_projection(joint, sample[:: -(-size // DIRECTIONS_SAMPLE)])
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(projection.d_out),
        projection.d_out,
        lists,
        faiss.ScalarQuantizer.QT_8bit_uniform,
        faiss.METRIC_INNER_PRODUCT,
        False,  # encode the vectors, not their residuals to the centroid of the list
    )
    index.sq.rangestat_arg = 0.1  # widen the range of the codes a little beyond the sample's values
    index.cp.seed, index.cp.niter, index.cp.spherical = seed % 2**31, KMEANS_ROUNDS, True
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, LIST_SAMPLE
    index.train(np.concatenate([projection.apply(rows) for _, rows in joint.blocks(sample)]))
    for items, rows in joint.blocks(present):
        index.add_with_ids(projection.apply(rows), items)
    return projection, index


def lists_and_sample(items: int) -> tuple[int, int]:
    """Number of inverted lists, and of items that k-means partitions: at least `LEAST_LIST_SAMPLE` for each list, or
    all."""
    lists = max(min(items // LIST_ITEMS, int(ROOT_LISTS * items**0.5)), 1)
    size = max(LIST_SAMPLE * lists, MIN_SAMPLE)
    return lists, min(size, max(MAX_SAMPLE, LEAST_LIST_SAMPLE * lists), items)


def _fit_projection(joint: JointContent, sample: np.ndarray) -> faiss.LinearTransform:
    """Projection on the principal directions of a sample; not centred, because it has to preserve inner products."""
    moments = np.zeros((joint.width, joint.width))
    for _, rows in joint.blocks(sample):
        moments += rows.T @ rows
    energy, vectors = np.linalg.eigh(moments)
    share = np.cumsum(energy[::-1]) / max(energy.sum(), 1e-30)
    needed = 16 * -(-int(np.searchsorted(share, ENERGY) + 1) // 16)
    axes = vectors[:, ::-1][:, : min(needed, MAX_DIRECTIONS)].T.astype(np.float32)
    transform = faiss.LinearTransform(joint.width, len(axes), False)
    faiss.copy_array_to_vector(np.ascontiguousarray(axes).reshape(-1), transform.A)
    transform.is_trained = True
    return transform


def _items_by_list(index: faiss.IndexIVF) -> np.ndarray:
    """All items of the index, list by list, int64."""
    lists = index.invlists
    sizes = [lists.list_size(number) for number in range(index.nlist)]
    return np.concatenate([faiss.rev_swig_ptr(lists.get_ids(n), size).copy() for n, size in enumerate(sizes) if size])


def _rerank(joint: JointContent, items: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k candidates with the largest exact similarity, without the item: index int64 [n, k], float32 [n, k].

    Args:
        found: int64 [n, more than k], candidates of each item; -1: no candidate.
    """
    found[found == items[:, None]] = -1
    for row in np.flatnonzero((found >= 0).sum(axis=1) < k):  # rare: a nearly empty part of the index
        empty = np.flatnonzero(found[row] < 0)
        lowest = np.setdiff1d(np.arange(min(joint.items, found.shape[1] + k + 1)), np.append(found[row], items[row]))
        count = min(len(empty), len(lowest))
        found[row, empty[:count]] = lowest[:count]
    similarity = np.empty(found.shape, np.float32)
    for block in _blocks(len(items), joint.scratch.rows(found.shape[1] * joint.width * VALUE_BYTES)):
        similarity[block] = _similarities(joint, items[block], found[block])
    return _top_k(found, np.where(found >= 0, similarity, -np.inf), k)


def _similarities(joint: JointContent, items: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Exact similarities, float32 [n, candidates], undefined for candidates of -1. Computes each distinct row once."""
    distinct, place = np.unique(np.concatenate([items, np.maximum(candidates, 0).reshape(-1)]), return_inverse=True)
    rows = joint.rows(distinct)
    query, place = rows[place[: len(items)]], np.ascontiguousarray(place[len(items) :])
    out = np.empty(candidates.shape, np.float32)
    pointer = faiss.swig_ptr
    faiss.fvec_inner_products_by_idx(
        pointer(out), pointer(query), pointer(rows), pointer(place), joint.width, *candidates.shape
    )
    return out
