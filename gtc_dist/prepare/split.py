"""Algorithms that clean and split interactions, in vectorised numpy over codes.

Users and items are codes (positions among the sorted ids), so no result depends on the order of files or rows. Ties in
time are broken by user and item. Splits are int8 codes: 0 train, 1 valid, 2 test.

Algorithms that treat each user separately (`merge_duplicates`, `merged_weights`, `repeated_in_train`, `leave_last_out`,
`ratio`) take blocks of whole users. Algorithms over all interactions (`k_core`, `TimeCut`) stream over scratch columns.
"""

from collections.abc import Sequence

import numpy as np

from gtc_dist.data.scratch import Scratch

TRAIN, VALID, TEST = 0, 1, 2
SIGN_BIT = np.uint64(1 << 63)


def merge_duplicates(
    user: np.ndarray, item: np.ndarray, split: np.ndarray | None = None, time: np.ndarray | None = None
) -> np.ndarray:
    """Rows to keep so that no (user, split, item) occurs twice, sorted by user, split and item.

    The earliest of several rows is kept: a history is ordered by the user's first interaction with each item.
    """
    pair = _pair_keys(user, item, split)
    order = np.argsort(pair)
    starts = np.flatnonzero(np.diff(pair[order], prepend=-1))
    rows = order[starts]
    if time is not None and len(rows) < len(order):  # only duplicates, which are few, are sorted by time
        sizes = np.diff(np.append(starts, len(order)))
        group = np.repeat(np.arange(len(starts)), sizes)
        repeated = np.flatnonzero(np.repeat(sizes > 1, sizes))
        by_time = repeated[np.lexsort((time[order[repeated]], group[repeated]))]
        rows[sizes > 1] = order[by_time[np.flatnonzero(np.diff(group[by_time], prepend=-1))]]
    return rows


def merged_weights(
    user: np.ndarray, item: np.ndarray, split: np.ndarray | None, weight: np.ndarray | None, most: int
) -> np.ndarray:
    """Weights of the rows that `merge_duplicates` keeps, in its order, float32: the sum of the `most` largest weights
    of each (user, split, item).

    Args:
        weight: float32 [E]; None: ones.
    """
    pair = _pair_keys(user, item, split)
    weight = np.ones(len(pair), np.float32) if weight is None else weight
    order = np.lexsort((-weight, pair))
    starts = np.flatnonzero(np.diff(pair[order], prepend=-1))
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    counted = np.where(place < most, weight[order], 0)
    return np.add.reduceat(counted, starts).astype(np.float32) if len(order) else counted.astype(np.float32)


def repeated_in_train(user: np.ndarray, item: np.ndarray, split: np.ndarray, which: int) -> np.ndarray:
    """Rows of split `which` whose (user, item) is also in train."""
    pair, rows = _pair_keys(user, item), np.flatnonzero(split == which)
    train = np.sort(pair[split == TRAIN])
    position = np.searchsorted(train, pair[rows])
    return rows[np.append(train, -1)[position] == pair[rows]]


def leave_last_out(time: np.ndarray, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Split codes: each user's last interaction is test, the one before is valid, the others are train.

    A user with two interactions has none in valid; a user with one has it in train.
    """
    order = np.lexsort((item, time, user))
    from_end, count = _positions_in_groups(user[order])
    split = np.zeros(len(order), np.int8)
    split[order[(from_end == 1) & (count >= 3)]] = VALID
    split[order[(from_end == 0) & (count >= 2)]] = TEST
    return split


def ratio_generators(seed: Sequence[int], rows: int, users: int) -> tuple[np.random.Generator, ...]:
    """Three generators for `ratio`, at different positions of one random stream: one number per row, then two per user.

    So `ratio` over blocks of users, in order, draws the same numbers as over all users at once.
    """
    starts = (0, rows, rows + users)
    return tuple(np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)).advance(start)) for start in starts)


def ratio(
    user: np.ndarray, valid_share: float, test_share: float, generators: tuple[np.random.Generator, ...]
) -> np.ndarray:
    """Split codes: a random share of each user's interactions is valid, another test; at least one is train.

    Numbers of interactions are rounded at random, up with the probability of the fraction, so that the shares hold in
    expectation and short histories reach valid and test, too.

    Args:
        user: codes int32 [E], sorted.
        generators: for the order of a user's rows, the rounding of the test share and of the valid share.
    """
    order = np.lexsort((generators[0].random(len(user)), user))
    from_end, count = _positions_in_groups(user[order])
    starts = np.flatnonzero(from_end == count - 1)  # the first row of each user
    counts = count[starts]
    test = np.floor(counts * test_share + generators[1].random(len(starts))).astype(np.int64)
    valid = np.floor(counts * valid_share + generators[2].random(len(starts))).astype(np.int64)
    test = np.minimum(test, counts - 1)
    valid = np.minimum(valid, counts - 1 - test)
    split = np.zeros(len(order), np.int8)
    split[order[from_end < np.repeat(test + valid, counts)]] = VALID
    split[order[from_end < np.repeat(test, counts)]] = TEST
    return split


def k_core(columns: Sequence[np.ndarray], users: int, items: int, k: int, scratch: Scratch) -> int:
    """Keep the k-core of the bipartite graph: the largest set of rows in which every user and item has at least k rows.

    Each pass drops all users and items with fewer rows, until nothing changes.

    Args:
        columns: user and item codes (below `users` and `items`), without duplicate pairs, and any other columns. Kept
            rows are moved to the front, in order.

    Returns:
        The number of kept rows.
    """
    user, item = columns[:2]
    rows = len(user)
    good_user, good_item = np.ones(users, bool), np.ones(items, bool)
    while True:
        kept, by_user, by_item = 0, np.zeros(users, np.int64), np.zeros(items, np.int64)
        for block in scratch.blocks(rows, 64):
            keep = np.flatnonzero(good_user[user[block]] & good_item[item[block]])
            moved = slice(kept, kept + len(keep))
            for column in columns if moved != block else ():
                column[moved] = column[block][keep]
            by_user += np.bincount(user[moved], minlength=users)
            by_item += np.bincount(item[moved], minlength=items)
            kept = moved.stop
        good_user, good_item = by_user >= k, by_item >= k
        if not (by_user[~good_user].any() or by_item[~good_item].any()):
            return kept
        rows = kept


class TimeCut:
    """Divides rows at a position in their order by time; ties are in row order.

    Args:
        time: int64 or float64 [E], rows sorted by user and item.
        rank: number of rows before the cut.
    """

    def __init__(self, time: np.ndarray, rank: int, scratch: Scratch):
        self.ties = min(rank, len(time) - 1) if len(time) else 0
        # Radix select of the time at that rank, 16 bits per pass: only times with the leading bits found so far count.
        self.key = 0
        for shift in (48, 32, 16, 0):
            counts = np.zeros(1 << 16, np.int64)
            for block in scratch.blocks(len(time), 48):
                keys = _sortable_keys(time[block]) >> np.uint64(shift)
                if shift < 48:
                    keys = keys[keys >> np.uint64(16) == self.key]
                counts += np.bincount((keys & np.uint64(0xFFFF)).astype(np.int64), minlength=len(counts))
            below = np.cumsum(counts)
            digit = int(np.searchsorted(below, self.ties, side="right"))
            self.ties -= int(below[digit - 1]) if digit else 0
            self.key = self.key << 16 | digit
        self.ties += rank == len(time)  # ties: number of rows with exactly this time before the cut

    def after(self, time: np.ndarray) -> np.ndarray:
        """Mask of the rows after the cut, bool [n]. Must be called with the blocks of the column in order."""
        keys = _sortable_keys(time)
        tied = np.flatnonzero(keys == np.uint64(self.key))
        after = keys > np.uint64(self.key)
        after[tied[self.ties :]] = True
        self.ties = max(self.ties - len(tied), 0)
        return after


def _sortable_keys(time: np.ndarray) -> np.ndarray:
    """Keys uint64 that sort like the times."""
    if time.dtype.kind != "f":
        return time.astype(np.int64).view(np.uint64) ^ SIGN_BIT
    bits = (time.astype(np.float64) + 0.0).view(np.uint64)  # + 0.0: turns -0.0 into 0.0
    return np.where(bits & SIGN_BIT, ~bits, bits | SIGN_BIT)


def _pair_keys(user: np.ndarray, item: np.ndarray, split: np.ndarray | None = None) -> np.ndarray:
    """Keys int64 that sort like (user, split, item)."""
    key = user.astype(np.int64)
    if split is not None:
        key = key * (TEST + 1) + split
    return key * (int(item.max(initial=0)) + 1) + item


def _positions_in_groups(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For sorted group numbers: each row's distance from the end of its group, and the size of the group."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]][: len(groups)])
    sizes = np.diff(np.r_[starts, len(groups)])
    ends = np.repeat(starts + sizes, sizes)
    return ends - 1 - np.arange(len(groups)), np.repeat(sizes, sizes)
