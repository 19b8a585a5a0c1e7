"""The user-user graph: for each user, the users with the most items in common.

Co-interaction counts are products of blocks of the user x item matrix with its transpose, so the work is one addition
for each pair of users of an item. For popular items this would be quadratic, and such items carry little information
about similar users; so each item counts with at most `hub_cap` of its users, a random sample. The sample is chosen by a
hash of (user, item): it depends on the seed and the pair alone, and both directions of the graph can be sampled without
a common table.

With recency weights (`CSC.weighted_degree`) a common item counts the product of the two interactions' weights.

scipy and numpy release the GIL in the long calls, so the threads of one process share the matrices.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse as sp

from gtc_dist.data.catalog import CSC
from gtc_dist.data.hashing import hash_pair
from gtc_dist.data.scratch import Scratch
from gtc_dist.graph.user_item_graph import EDGE_BYTES, edge_ranges, in_memory

PAIR_BYTES = 40  # memory per pair of users while a block is counted
BLOCK_PAIRS = 1 << 22  # larger blocks leave the processor's cache
NO_LIMIT = np.uint64(2**64 - 1)  # threshold of an item that is not a hub
FLOAT_BITS = 31  # of a positive float32: read as integers, these sort like the floats


def build_user_cooccurrence_graph(
    item_user: CSC,
    user_item: CSC,
    k: int,
    hub_cap: int,
    seed: int,
    threads: int = 1,
    scratch: Scratch | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    block_pairs: int = BLOCK_PAIRS,
) -> CSC:
    """Build the graph of the k users with the most items in common, weighted by the softmax of the common.

    Ties go to the lower index. A user without common items has no neighbours.

    Args:
        item_user, user_item: both directions of the user-item graph of the train interactions.
        hub_cap: largest number of users that count for one item.
        scratch: holds the arrays of the graph; None: in memory, for few edges.
        progress: called with the numbers of finished and of all users.
        block_pairs: limit of the pairs in a block of users, besides the scratch's memory.
    """
    if scratch is None:
        with Scratch() as scratch:
            arguments = (item_user, user_item, k, hub_cap, seed, threads, scratch, progress, block_pairs)
            return in_memory(build_user_cooccurrence_graph(*arguments))
    users = len(item_user.indptr) - 1
    common = _CommonItems(item_user, user_item, hub_cap, seed, scratch)
    blocks = common.blocks(min(block_pairs, scratch.rows(PAIR_BYTES * threads)))
    indptr = np.zeros(users + 1, np.int64)
    indices, weight = scratch.growing(np.int32), scratch.growing(np.float32)
    for block, (degree, source, part) in _map_in_threads(lambda block: _neighbours(common, block, k), blocks, threads):
        indptr[block.start + 1 : block.stop + 1] = degree
        indices.append(source)
        weight.append(part)
        scratch.release()
        progress(block.stop, users)
    np.cumsum(indptr, out=indptr)
    scratch.discard(*common.arrays)
    return CSC(indptr, indices.finish(), weight.finish())


class _CommonItems:
    """The incidence matrix of users and items, with at most `hub_cap` users per item.

    by_item: item x user matrix of ones (int32), or of the interactions' recency weights (float32), in scratch
    by_user(block): rows of its transpose
    """

    def __init__(self, item_user: CSC, user_item: CSC, hub_cap: int, seed: int, scratch: Scratch):
        self.item_user, self.seed, self.scratch = item_user, seed, scratch
        self.degrees = item_user.weighted_degree, user_item.weighted_degree
        self.users, self.items = len(item_user.indptr) - 1, len(user_item.indptr) - 1
        self.threshold = np.full(self.items, NO_LIMIT)  # largest hash in an item's sample
        indptr = np.concatenate([[0], np.cumsum(np.minimum(user_item.degree, hub_cap))])
        is_weighted = item_user.weighted_degree is not None
        indices = scratch.array(int(indptr[-1]), np.int32)
        values = scratch.array(int(indptr[-1]), np.float32 if is_weighted else np.int32)
        for part in edge_ranges(user_item.indptr, scratch.rows(EDGE_BYTES)):
            edges = slice(indptr[part.start], indptr[part.stop])
            indices[edges], values[edges] = self._sample_hubs(user_item, part, hub_cap)
            scratch.release()
        # 32-bit indptr like the indices if possible: otherwise scipy copies all to 64 bits for every block
        indptr = indptr.astype(np.int32) if indptr[-1] < 2**31 else indptr
        self.by_item = sp.csr_matrix((values, indices, indptr), shape=(self.items, self.users))
        self.arrays = indices, values
        self.source_bits = max(self.users - 1, 1).bit_length()
        self.count_bits = FLOAT_BITS if is_weighted else max(int(item_user.degree.max(initial=0)), 1).bit_length()

    def by_user(self, block: slice) -> sp.csr_matrix:
        """Rows of a block of users, [users in the block, items]."""
        edges = slice(self.item_user.indptr[block.start], self.item_user.indptr[block.stop])
        degree = np.diff(self.item_user.indptr[block.start : block.stop + 1])
        item = self.item_user.indices[edges]
        user = np.repeat(np.arange(block.start, block.stop), degree)
        keep = self._sampled(user, item)
        degree = np.bincount(user[keep] - block.start, minlength=block.stop - block.start)
        indptr = np.concatenate([[0], np.cumsum(degree)]).astype(np.int32)
        values = self._values(self.item_user.weight[edges][keep], user[keep], item[keep])
        return sp.csr_matrix((values, item[keep], indptr), shape=(block.stop - block.start, self.items))

    def blocks(self, max_pairs: int) -> list[slice]:
        """Blocks of users with at most `max_pairs` (user, item, other user) triples; a user with more is alone."""
        users_of_item = np.diff(self.by_item.indptr).astype(np.int64)
        pairs = np.zeros(self.users + 1, np.int64)
        for block in edge_ranges(self.item_user.indptr, self.scratch.rows(EDGE_BYTES)):
            rows = self.by_user(block)
            rows.data[:] = 1
            pairs[block.start + 1 : block.stop + 1] = rows @ users_of_item
            self.scratch.release()
        max_rows = 1 << min(63 - self.source_bits - self.count_bits, 31)  # for the packing in _top_k_users
        return edge_ranges(np.cumsum(pairs), max_pairs, max_rows)

    def _sample_hubs(self, user_item: CSC, part: slice, hub_cap: int) -> tuple[np.ndarray, np.ndarray]:
        """Users of a range of items and their values; of each hub only its sample, and stores the hub's threshold."""
        edges = slice(user_item.indptr[part.start], user_item.indptr[part.stop])
        degree = np.diff(user_item.indptr[part.start : part.stop + 1])
        user, item = user_item.indices[edges], np.repeat(np.arange(part.start, part.stop), degree)
        in_hub = np.flatnonzero(np.repeat(degree > hub_cap, degree))
        key = hash_pair(user[in_hub], item[in_hub], self.seed)
        key = key[np.lexsort((key, item[in_hub]))]
        hubs = np.flatnonzero(degree > hub_cap)
        starts = np.cumsum(degree[hubs]) - degree[hubs]
        self.threshold[part.start + hubs] = key[starts + hub_cap - 1]
        keep = self._sampled(user, item)
        return user[keep], self._values(user_item.weight[edges][keep], user[keep], item[keep])

    def _values(self, edge_weight: np.ndarray, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Entries of the matrix: ones int32; or recency weights w float32, from edges' w/sqrt(degree * degree)."""
        of_users, of_items = self.degrees
        if of_users is None:
            return np.ones(len(user), np.int32)
        return (edge_weight * np.sqrt(of_users[user] * of_items[item])).astype(np.float32)

    def _sampled(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Whether each interaction is in the sample of its item, bool [E]."""
        keep = np.ones(len(item), bool)
        in_hub = np.flatnonzero(self.threshold[item] != NO_LIMIT)
        keep[in_hub] = hash_pair(user[in_hub], item[in_hub], self.seed) <= self.threshold[item[in_hub]]
        return keep


def _map_in_threads(function: Callable, blocks: list[slice], threads: int) -> Iterator[tuple[slice, tuple]]:
    """Yield each block and `function(block)`, in order; at most two blocks per thread are submitted at a time."""
    with ThreadPoolExecutor(threads) as pool:
        submitted, remaining = deque(), deque(blocks)
        while submitted or remaining:
            while remaining and len(submitted) < 2 * threads:
                submitted.append((remaining[0], pool.submit(function, remaining.popleft())))
            block, future = submitted.popleft()
            yield block, future.result()


def _neighbours(common: _CommonItems, block: slice, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For a block of users: number of neighbours of each, and neighbours (sorted by index) and weights of all."""
    rows = block.stop - block.start
    product = common.by_user(block) @ common.by_item
    row, source, count = _top_k_users(product, block.start, k, common.source_bits, common.count_bits)
    return np.bincount(row, minlength=rows), source.astype(np.int32), _softmax(row, count, rows)


def _top_k_users(
    product: sp.csr_matrix, first: int, k: int, source_bits: int, count_bits: int
) -> tuple[np.ndarray, ...]:
    """The k largest entries of each row except the diagonal, ties to the lower index.

    Row, falling count and rising source are packed into one integer per entry, so one sort of integers ranks all rows.
    Weighted counts, which are positive float32, are packed as their bits.

    Returns:
        Row, source and count of the entries, sorted by row and source.
    """
    entry, row = _candidates(product, first, k)
    is_weighted = product.dtype == np.float32
    packed = product.data.view(np.int32) if is_weighted else product.data
    top_count, top_source = (1 << count_bits) - 1, (1 << source_bits) - 1
    key = (row << count_bits | top_count - packed[entry]) << source_bits | product.indices[entry]
    key.sort()
    row = key >> source_bits + count_bits
    starts = np.searchsorted(row, np.arange(product.shape[0]))
    best = np.arange(len(row)) - starts[row] < k
    key, row = key[best], row[best]
    source, count = key & top_source, top_count - (key >> source_bits & top_count)
    order = np.argsort(row << source_bits | source)
    count = count[order].astype(np.int32).view(np.float32) if is_weighted else count[order]
    return row[order], source[order], count


def _candidates(product: sp.csr_matrix, first: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and rows of entries that include each row's k largest without the diagonal, and few others.

    Most entries belong to users with a single common item, among whom the lowest indexes win. Indexes are a random
    permutation, so an upper bound of the index leaves about as many entries as needed; a row with too few gets all.
    Weighted counts of single items differ, so that all entries are candidates.
    """
    size, users = np.diff(product.indptr), product.shape[1]
    expected = k + 4 * np.sqrt(k) + 8  # four standard deviations more than needed
    if product.dtype == np.float32:
        expected = np.inf
    bound = np.minimum(expected * users / np.maximum(size, 1), users).astype(np.int32)
    entry, row = _below(product, first, bound)
    short = np.bincount(row, minlength=len(size)) < np.minimum(k, size - 1)
    return _below(product, first, np.where(short, np.int32(users), bound)) if short.any() else (entry, row)


def _below(product: sp.csr_matrix, first: int, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and rows of entries with a count above 1 or an index below the row's bound, without the diagonal."""
    keep = product.indices < np.repeat(bound, np.diff(product.indptr))
    keep |= product.data > 1
    entry = np.flatnonzero(keep)
    row = np.searchsorted(product.indptr, entry, side="right") - 1
    other = product.indices[entry] != row + first
    return entry[other], row[other]


def _softmax(row: np.ndarray, count: np.ndarray, rows: int) -> np.ndarray:
    """Softmax of the counts within each row, float32."""
    peak = np.zeros(rows, count.dtype)
    np.maximum.at(peak, row, count)
    weight = np.exp((count - peak[row]).astype(np.float64))
    return (weight / np.bincount(row, weight, rows)[row]).astype(np.float32)
