"""Cleaning and splitting interactions: plain numpy over codes, no Python loop over rows.

Users and items are codes (positions among the sorted ids), so every result depends on the ids alone and not on the
order of files or rows; ties in time go by user and item. Splits are int8 codes: 0 train, 1 valid, 2 test.

What is decided within a user (`merge_duplicates`, `repeated_in_train`, `leave_last_out`, `ratio`) takes a block of
whole users at a time. What is decided over all interactions (`k_core`, `TimeCut`) streams over scratch columns.
"""

from collections.abc import Sequence

import numpy as np

from gtc_dist.data.scratch import Scratch

TRAIN, VALID, TEST = 0, 1, 2
SIGN = np.uint64(1 << 63)


def merge_duplicates(
    user: np.ndarray, item: np.ndarray, split: np.ndarray | None = None, time: np.ndarray | None = None
) -> np.ndarray:
    """Rows to keep so that every (user, split, item) is there once, sorted by user, split and item.

    Of rows that repeat a pair the earliest is kept: a user's first contact with an item is what orders the history.
    """
    pair = _pair(user, item, split)
    order = np.argsort(pair)
    starts = np.flatnonzero(np.diff(pair[order], prepend=-1))
    rows = order[starts]
    if time is not None and len(rows) < len(order):  # few rows repeat, so only those are sorted by time
        sizes = np.diff(np.append(starts, len(order)))
        group = np.repeat(np.arange(len(starts)), sizes)
        repeated = np.flatnonzero(np.repeat(sizes > 1, sizes))
        by_time = repeated[np.lexsort((time[order[repeated]], group[repeated]))]
        rows[sizes > 1] = order[by_time[np.flatnonzero(np.diff(group[by_time], prepend=-1))]]
    return rows


def repeated_in_train(user: np.ndarray, item: np.ndarray, split: np.ndarray, which: int) -> np.ndarray:
    """Rows of split `which` whose (user, item) is also in train."""
    pair, rows = _pair(user, item), np.flatnonzero(split == which)
    train = np.sort(pair[split == TRAIN])
    place = np.searchsorted(train, pair[rows])
    return rows[np.append(train, -1)[place] == pair[rows]]


def leave_last_out(time: np.ndarray, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Each user's last interaction is test, the one before it valid, as far as one stays in train.

    A user with two interactions has no valid one, a user with one is in train only.
    """
    order = np.lexsort((item, time, user))
    from_end, count = _places(user[order])
    split = np.zeros(len(order), np.int8)
    split[order[(from_end == 1) & (count >= 3)]] = VALID
    split[order[(from_end == 0) & (count >= 2)]] = TEST
    return split


def ratio_draws(seed: Sequence[int], rows: int, users: int) -> tuple[np.random.Generator, ...]:
    """The three generators of `ratio`: parts of one random stream, which holds a draw for each of all `rows` and then
    two for each of all `users`. So blocks of users, taken in order, draw what all users at once would."""
    starts = (0, rows, rows + users)
    return tuple(np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)).advance(start)) for start in starts)


def ratio(
    user: np.ndarray, valid_share: float, test_share: float, draws: tuple[np.random.Generator, ...]
) -> np.ndarray:
    """A random share of each user's interactions is valid, another test; each user keeps at least one in train.

    A share of a user's few interactions is seldom whole. It is rounded up with a probability of its fraction, so that
    short histories reach valid and test too and the shares hold over all users. Expects rows in a canonical order.

    Args:
        draws: of the order of a user's rows, and of the rounding of the test and of the valid share.
    """
    order = np.lexsort((draws[0].random(len(user)), user))
    from_end, count = _places(user[order])
    starts = np.flatnonzero(from_end == count - 1)  # the first row of each user
    counts = count[starts]
    test = np.floor(counts * test_share + draws[1].random(len(starts))).astype(np.int64)
    valid = np.floor(counts * valid_share + draws[2].random(len(starts))).astype(np.int64)
    test = np.minimum(test, counts - 1)
    valid = np.minimum(valid, counts - 1 - test)
    split = np.zeros(len(order), np.int8)
    split[order[from_end < np.repeat(test + valid, counts)]] = VALID
    split[order[from_end < np.repeat(test, counts)]] = TEST
    return split


def k_core(columns: Sequence[np.ndarray], users: int, items: int, k: int, scratch: Scratch) -> int:
    """Keep the largest subset of rows in which every user and every item has at least k (k-core of a bipartite graph).

    Each pass drops all users and items below k at once, until nothing changes.

    Args:
        columns: user, item (codes below `users` and `items`; merged pairs) and any others. The rows that stay are moved
            to their front, in order.

    Returns:
        The number of rows that stay.
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
    """Parts the rows of a column of times, ordered by time and then by place, before and after one rank.

    Args:
        time: int64 or float64 [E], rows in canonical order (by user and item).
        rank: rows that come before the cut.
    """

    def __init__(self, time: np.ndarray, rank: int, scratch: Scratch):
        self.ties = min(rank, len(time) - 1) if len(time) else 0
        # The time at that rank, 16 bits a pass: count the leading bits, go on among the times that share them.
        self.key = 0
        for shift in (48, 32, 16, 0):
            counts = np.zeros(1 << 16, np.int64)
            for block in scratch.blocks(len(time), 48):
                keys = _ordered(time[block]) >> np.uint64(shift)
                if shift < 48:
                    keys = keys[keys >> np.uint64(16) == self.key]
                counts += np.bincount((keys & np.uint64(0xFFFF)).astype(np.int64), minlength=len(counts))
            below = np.cumsum(counts)
            digit = int(np.searchsorted(below, self.ties, side="right"))
            self.ties -= int(below[digit - 1]) if digit else 0
            self.key = self.key << 16 | digit
        self.ties += rank == len(time)  # ties: rows with that very time that come before the cut

    def after(self, time: np.ndarray) -> np.ndarray:
        """Which rows come after the cut; takes the column's blocks in order."""
        keys = _ordered(time)
        tied = np.flatnonzero(keys == np.uint64(self.key))
        after = keys > np.uint64(self.key)
        after[tied[self.ties :]] = True
        self.ties = max(self.ties - len(tied), 0)
        return after


def _ordered(time: np.ndarray) -> np.ndarray:
    """Keys of uint64 in the order of the times."""
    if time.dtype.kind != "f":
        return time.astype(np.int64).view(np.uint64) ^ SIGN
    bits = (time.astype(np.float64) + 0.0).view(np.uint64)  # + 0.0: there is one zero
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def _pair(user: np.ndarray, item: np.ndarray, split: np.ndarray | None = None) -> np.ndarray:
    """One int64 for each (user, split, item), in their order."""
    key = user.astype(np.int64)
    if split is not None:
        key = key * (TEST + 1) + split
    return key * (int(item.max(initial=0)) + 1) + item


def _places(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For sorted groups: each row's distance from its group's end, and its group's size."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]][: len(groups)])
    sizes = np.diff(np.r_[starts, len(groups)])
    ends = np.repeat(starts + sizes, sizes)
    return ends - 1 - np.arange(len(groups)), np.repeat(sizes, sizes)
