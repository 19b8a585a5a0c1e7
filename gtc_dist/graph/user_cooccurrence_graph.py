"""The user-user graph: with whom a user shares most items.

Counts are products of blocks of the user x item matrix with its transpose, so the work is one addition for each pair
of users of an item. Popular items would make it quadratic and say little about who is alike, so an item counts with at
most `hub_cap` users, a random sample. The sample goes by a hash of the pair: who is in it depends on the seed and the
pair alone, and both directions of the graph can be cut without a common table.

scipy and numpy let go of Python's lock in the long calls, so plain threads share the matrices.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse as sp

from gtc_dist.data.catalog import CSC
from gtc_dist.data.scratch import Scratch
from gtc_dist.graph.user_item_graph import EDGE_BYTES, in_memory, ranges

PAIR_BYTES = 40  # of a pair while its block is counted
BLOCK_PAIRS = 1 << 22  # more at a time would only leave the processor's cache
EVERYONE = np.uint64(2**64 - 1)  # threshold of an item that is no hub


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
    """The k users with whom each user shares most items, weighted by the softmax of the counts.

    Ties go to the lower index. A user who shares no item has no neighbour.

    Args:
        item_user, user_item: both directions of the train interactions.
        hub_cap: of an item with more users, so many count as sharing it.
        scratch: None: for few edges, the result is in memory.
        progress: told how many users are done, and of how many.
        block_pairs: bounds a block of users, together with the scratch's memory.
    """
    if scratch is None:
        with Scratch() as scratch:
            arguments = (item_user, user_item, k, hub_cap, seed, threads, scratch, progress, block_pairs)
            return in_memory(build_user_cooccurrence_graph(*arguments))
    users = len(item_user.indptr) - 1
    shared = _Shared(item_user, user_item, hub_cap, seed, scratch)
    blocks = shared.blocks(min(block_pairs, scratch.rows(PAIR_BYTES * threads)))
    indptr = np.zeros(users + 1, np.int64)
    indices, weight = scratch.growing(np.int32), scratch.growing(np.float32)
    for block, (degree, source, part) in _in_threads(lambda block: _neighbours(shared, block, k), blocks, threads):
        indptr[block.start + 1 : block.stop + 1] = degree
        indices.append(source)
        weight.append(part)
        scratch.release()
        progress(block.stop, users)
    np.cumsum(indptr, out=indptr)
    scratch.discard(*shared.arrays)
    return CSC(indptr, indices.finish(), weight.finish())


class _Shared:
    """Who shares which item, hubs cut down to `hub_cap` users.

    by_item: item x user matrix of ones, in scratch. by_user(block): rows of its transpose.
    """

    def __init__(self, item_user: CSC, user_item: CSC, hub_cap: int, seed: int, scratch: Scratch):
        self.item_user, self.seed, self.scratch = item_user, seed, scratch
        self.users, self.items = len(item_user.indptr) - 1, len(user_item.indptr) - 1
        self.threshold = np.full(self.items, EVERYONE)  # largest hash that is in an item's sample
        indptr = np.concatenate([[0], np.cumsum(np.minimum(user_item.degree, hub_cap))])
        indices, ones = (scratch.array(int(indptr[-1]), np.int32) for _ in range(2))
        for part in ranges(user_item.indptr, scratch.rows(EDGE_BYTES)):
            inside = slice(indptr[part.start], indptr[part.stop])
            indices[inside] = self._cap(user_item, part, hub_cap)
            ones[inside] = 1
            scratch.release()
        # indptr of 32 bits, like the indices, where it can: scipy would copy all to 64 bits with every block
        indptr = indptr.astype(np.int32) if indptr[-1] < 2**31 else indptr
        self.by_item = sp.csr_matrix((ones, indices, indptr), shape=(self.items, self.users))
        self.arrays = indices, ones
        self.source_bits = max(self.users - 1, 1).bit_length()
        self.count_bits = max(int(item_user.degree.max(initial=0)), 1).bit_length()

    def by_user(self, block: slice) -> sp.csr_matrix:
        """The rows of some users, [users in the block, items]."""
        edges = slice(self.item_user.indptr[block.start], self.item_user.indptr[block.stop])
        degree = np.diff(self.item_user.indptr[block.start : block.stop + 1])
        item = self.item_user.indices[edges]
        user = np.repeat(np.arange(block.start, block.stop), degree)
        keep = self._sampled(user, item)
        degree = np.bincount(user[keep] - block.start, minlength=block.stop - block.start)
        indptr = np.concatenate([[0], np.cumsum(degree)]).astype(np.int32)
        ones = np.ones(int(indptr[-1]), np.int32)
        return sp.csr_matrix((ones, item[keep], indptr), shape=(block.stop - block.start, self.items))

    def blocks(self, most: int) -> list[slice]:
        """Blocks of users who meet at most `most` others, counted with repetition; a user with more is alone."""
        sharers = np.diff(self.by_item.indptr).astype(np.int64)
        meets = np.zeros(self.users + 1, np.int64)
        for block in ranges(self.item_user.indptr, self.scratch.rows(EDGE_BYTES)):
            meets[block.start + 1 : block.stop + 1] = self.by_user(block) @ sharers
            self.scratch.release()
        most_rows = 1 << min(63 - self.source_bits - self.count_bits, 31)  # for the packing in _top
        return ranges(np.cumsum(meets), most, most_rows)

    def _cap(self, user_item: CSC, part: slice, hub_cap: int) -> np.ndarray:
        """The users of a range of items, of each hub its sample, whose threshold is noted."""
        edges = slice(user_item.indptr[part.start], user_item.indptr[part.stop])
        degree = np.diff(user_item.indptr[part.start : part.stop + 1])
        user, item = user_item.indices[edges], np.repeat(np.arange(part.start, part.stop), degree)
        in_hub = np.flatnonzero(np.repeat(degree > hub_cap, degree))
        key = self._hash(user[in_hub], item[in_hub])
        key = key[np.lexsort((key, item[in_hub]))]
        hubs = np.flatnonzero(degree > hub_cap)
        starts = np.cumsum(degree[hubs]) - degree[hubs]
        self.threshold[part.start + hubs] = key[starts + hub_cap - 1]
        return user[self._sampled(user, item)]

    def _sampled(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Whether each interaction counts, bool [E]."""
        keep = np.ones(len(item), bool)
        in_hub = np.flatnonzero(self.threshold[item] != EVERYONE)
        keep[in_hub] = self._hash(user[in_hub], item[in_hub]) <= self.threshold[item[in_hub]]
        return keep

    def _hash(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """uint64, another for each pair (splitmix64's finaliser is one to one)."""
        x = user.astype(np.uint64) << np.uint64(32) | item.astype(np.uint64)
        x ^= np.random.SeedSequence(self.seed).generate_state(1, np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))


def _in_threads(work: Callable, blocks: list[slice], threads: int) -> Iterator[tuple[slice, tuple]]:
    """Each block and what `work` makes of it, in order; at most one finished result a thread waits."""
    with ThreadPoolExecutor(threads) as pool:
        waiting, left = deque(), deque(blocks)
        while waiting or left:
            while left and len(waiting) < 2 * threads:
                waiting.append((left[0], pool.submit(work, left.popleft())))
            block, future = waiting.popleft()
            yield block, future.result()


def _neighbours(shared: _Shared, block: slice, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a block of users: number of neighbours of each, then the neighbours (by index) and weights of all."""
    rows = block.stop - block.start
    product = shared.by_user(block) @ shared.by_item
    row, source, count = _top(product, block.start, k, shared.source_bits, shared.count_bits)
    return np.bincount(row, minlength=rows), source.astype(np.int32), _softmax(row, count, rows)


def _top(product: sp.csr_matrix, first: int, k: int, source_bits: int, count_bits: int) -> tuple[np.ndarray, ...]:
    """The k largest entries of each row but the diagonal, ties to the lower index: row, source and count, by row and
    source.

    Row, falling count and rising source are packed into one integer each, so one plain sort finds them all.
    """
    entry, row = _candidates(product, first, k)
    top_count, top_source = (1 << count_bits) - 1, (1 << source_bits) - 1
    key = (row << count_bits | top_count - product.data[entry]) << source_bits | product.indices[entry]
    key.sort()
    row = key >> source_bits + count_bits
    starts = np.searchsorted(row, np.arange(product.shape[0]))
    best = np.arange(len(row)) - starts[row] < k
    key, row = key[best], row[best]
    source, count = key & top_source, top_count - (key >> source_bits & top_count)
    order = np.argsort(row << source_bits | source)
    return row[order], source[order], count[order]


def _candidates(product: sp.csr_matrix, first: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries that hold each row's k largest but the diagonal, few more than needed: their places and rows.

    Most entries are of users who share a single item, of whom the lowest indexes win. Indexes are a random permutation,
    so a bound leaves about as many as wanted; a row with too few of them gets all of its entries.
    """
    size, users = np.diff(product.indptr), product.shape[1]
    wanted = k + 4 * np.sqrt(k) + 8  # four standard deviations more
    bound = np.minimum(wanted * users / np.maximum(size, 1), users).astype(np.int32)
    entry, row = _below(product, first, bound)
    short = np.bincount(row, minlength=len(size)) < np.minimum(k, size - 1)
    return _below(product, first, np.where(short, np.int32(users), bound)) if short.any() else (entry, row)


def _below(product: sp.csr_matrix, first: int, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and rows of the entries with a count above 1 or an index below the row's bound, without the diagonal."""
    keep = product.indices < np.repeat(bound, np.diff(product.indptr))
    keep |= product.data > 1
    entry = np.flatnonzero(keep)
    row = np.searchsorted(product.indptr, entry, side="right") - 1
    other = product.indices[entry] != row + first
    return entry[other], row[other]


def _softmax(row: np.ndarray, count: np.ndarray, rows: int) -> np.ndarray:
    peak = np.zeros(rows, np.int64)
    np.maximum.at(peak, row, count)
    weight = np.exp((count - peak[row]).astype(np.float64))
    return (weight / np.bincount(row, weight, rows)[row]).astype(np.float32)
