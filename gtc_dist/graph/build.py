"""The catalog's graphs from train interactions and content: numpy, scipy and FAISS in the driver.

Every graph is a `CSC` with sources sorted by index. Work and memory are linear in the interactions, but for the content
neighbours (exact search, items x items multiplications in blocks) and the co-interactions (one multiplication for each
pair of users of an item; an item counts with at most `hub_cap` users). Nothing here is ever items x items or
users x users in memory.
"""

import faiss
import numpy as np
import scipy.sparse as sp

from gtc_dist.data.catalog import CSC

PAIRS_AT_ONCE = 1 << 24  # co-interacting pairs held at a time: about 400 MB with their sort
QUERIES_AT_ONCE = 1 << 14


def user_item(user: np.ndarray, item: np.ndarray, users: int, items: int) -> tuple[CSC, CSC]:
    """Both directions of the interactions, weighted 1/sqrt(user's degree * item's degree).

    Args:
        user, item: int32 [E], train interactions, no pair twice.

    Returns:
        item_user (destination user, sources its items) and user_item (destination item, sources its users).
    """
    user_degree, item_degree = np.bincount(user, minlength=users), np.bincount(item, minlength=items)
    weight = (1.0 / np.sqrt(user_degree[user] * item_degree[item].astype(np.float64))).astype(np.float32)
    return _csc(item, user, weight, users, items), _csc(user, item, weight, items, users)


def item_item(features: dict[str, np.ndarray], weights: dict[str, float], k: int, threads: int) -> CSC:
    """k nearest items by content, each item's weights adding to one.

    The similarity is the mean of the modalities' cosines by `weights`; an item without a vector (zeros) has cosine 0.
    Opposed content (negative similarity) gets weight 0; an item that is similar to none of its neighbours weights them
    alike.

    Args:
        features: modality -> float16 [items, width].
        k: neighbours; fewer if there are not as many other items.
    """
    vectors = _joint_vectors(features, weights)
    items = len(vectors)
    k = min(k, items - 1)
    if k < 1:
        return CSC(np.zeros(items + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    neighbour, similarity = _nearest(vectors, k, threads)
    weight = np.maximum(similarity.astype(np.float64), 0)
    total = weight.sum(axis=1, keepdims=True)
    weight = np.where(total > 0, weight / np.where(total > 0, total, 1), 1 / k)
    order = np.argsort(neighbour, axis=1)
    return CSC(
        np.arange(items + 1, dtype=np.int64) * k,
        np.take_along_axis(neighbour, order, 1).reshape(-1).astype(np.int32),
        np.take_along_axis(weight, order, 1).reshape(-1).astype(np.float32),
    )


def user_user(item_user: CSC, items: int, k: int, hub_cap: int, seed: int, pairs_at_once: int = PAIRS_AT_ONCE) -> CSC:
    """The k users with whom each user shares most items, weighted by the softmax of the counts.

    Ties go to the lower index. A user who shares no item has no neighbour. Of an item with more than `hub_cap` users, a
    random sample of them counts as sharing it: such items say little about who is alike and would cost the most.

    Args:
        item_user: destination user, sources its items.
        pairs_at_once: bounds the memory of a block of users.
    """
    users = len(item_user.indptr) - 1
    shared = _cap_hubs(item_user, items, hub_cap, seed)
    by_item = shared.T.tocsr()
    # Pairs that a user's row meets: the sum of its items' users. Rows of the product hold at most as many entries.
    pairs = np.concatenate([[0], np.cumsum(shared @ np.diff(by_item.indptr).astype(np.int64))])
    source_bits = _bits(users - 1)
    count_bits = _bits(int(np.diff(shared.indptr).max(initial=0)))
    most_rows = 1 << min(63 - source_bits - count_bits, 31)  # so that row, count and source fit one int64
    counts, neighbours, weights = np.zeros(users, np.int64), [], []
    first = 0
    while first < users:
        last = int(np.searchsorted(pairs, pairs[first] + pairs_at_once, side="right")) - 1
        last = min(max(last, first + 1), first + most_rows, users)
        row, source, count = _top_co_users(shared[first:last] @ by_item, first, k, source_bits, count_bits)
        counts[first:last] = np.bincount(row, minlength=last - first)
        neighbours.append(source.astype(np.int32))
        weights.append(_row_softmax(row, count, last - first))
        first = last
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return CSC(indptr, _join(neighbours, np.int32), _join(weights, np.float32))


def _csc(source: np.ndarray, destination: np.ndarray, weight: np.ndarray, destinations: int, sources: int) -> CSC:
    order = np.argsort(destination.astype(np.int64) * sources + source, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(destination, minlength=destinations))]).astype(np.int64)
    return CSC(indptr, source[order].astype(np.int32), weight[order])


def _joint_vectors(features: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """float32 [items, widths together], whose inner products are the weighted means of the modalities' cosines."""
    total = sum(weights[name] for name in features)
    parts = []
    for name, matrix in features.items():
        part = matrix.astype(np.float32)
        length = np.linalg.norm(part, axis=1, keepdims=True)
        part *= np.sqrt(weights[name] / total) / np.where(length > 0, length, 1)
        parts.append(part)
    return np.concatenate(parts, axis=1)


def _nearest(vectors: np.ndarray, k: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's k nearest other rows by inner product, best first: index int64 [N, k], similarity float32 [N, k].

    Exact. An approximate index for larger catalogs takes the place of `IndexFlatIP`.
    """
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    neighbour = np.empty((len(vectors), k), np.int64)
    similarity = np.empty((len(vectors), k), np.float32)
    for first in range(0, len(vectors), QUERIES_AT_ONCE):
        rows = slice(first, first + QUERIES_AT_ONCE)
        near, found = index.search(vectors[rows], k + 1)
        own = np.arange(first, first + len(found))[:, None]
        # The item itself is left out. Among more than k twins it may not have been found: then the last goes.
        extra = np.where((found == own).any(axis=1), (found == own).argmax(axis=1), k)
        others = np.arange(k + 1) != extra[:, None]
        neighbour[rows] = found[others].reshape(-1, k)
        similarity[rows] = near[others].reshape(-1, k)
    return neighbour, similarity


def _cap_hubs(item_user: CSC, items: int, hub_cap: int, seed: int) -> sp.csr_matrix:
    """User x item matrix of ones, with at most hub_cap users for an item."""
    users = len(item_user.indptr) - 1
    user, item = np.repeat(np.arange(users), item_user.degree), item_user.indices
    degree = np.bincount(item, minlength=items)
    in_hub = np.flatnonzero(degree[item] > hub_cap)
    keep = np.ones(len(item), bool)
    if len(in_hub):
        rng = np.random.default_rng(seed)
        order = in_hub[np.lexsort((rng.random(len(in_hub)), item[in_hub]))]
        starts = np.flatnonzero(np.r_[True, np.diff(item[order]) != 0])
        sizes = np.diff(np.r_[starts, len(order)])
        place = np.arange(len(order)) - np.repeat(starts, sizes)
        keep[order[place >= hub_cap]] = False
    ones = np.ones(int(keep.sum()), np.int32)
    return sp.csr_matrix((ones, (user[keep], item[keep])), shape=(users, items))


def _top_co_users(
    product: sp.csr_matrix, first: int, k: int, source_bits: int, count_bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k largest entries of each row but the diagonal: row in the block, source and count, by row and source.

    Row, falling count and rising source are packed into one integer each, so one plain sort finds them all.
    """
    top_count = (1 << count_bits) - 1
    row = np.repeat(np.arange(product.shape[0], dtype=np.int64), np.diff(product.indptr))
    other = product.indices != row + first
    key = row[other] << count_bits | (top_count - product.data[other])
    key = key << source_bits | product.indices[other]
    key.sort()
    row = key >> (source_bits + count_bits)
    starts = np.searchsorted(row, np.arange(product.shape[0]))
    key, row = _within(key, row, starts, k)
    source = key & ((1 << source_bits) - 1)
    count = top_count - (key >> source_bits & top_count)
    order = np.lexsort((source, row))
    return row[order], source[order], count[order]


def _within(key: np.ndarray, row: np.ndarray, starts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    keep = np.arange(len(row)) - starts[row] < k
    return key[keep], row[keep]


def _row_softmax(row: np.ndarray, count: np.ndarray, rows: int) -> np.ndarray:
    peak = np.zeros(rows, np.int64)
    np.maximum.at(peak, row, count)
    weight = np.exp((count - peak[row]).astype(np.float64))
    return (weight / np.bincount(row, weight, rows)[row]).astype(np.float32)


def _bits(largest: int) -> int:
    return max(int(largest).bit_length(), 1)


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
