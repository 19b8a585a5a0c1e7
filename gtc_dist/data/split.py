"""Cleaning and splitting interactions: plain numpy over codes, no Python loop over rows.

Users and items are codes (positions among the sorted ids), so every result depends on the ids alone and not on the
order of files or rows; ties in time go by user and item. Splits are int8 codes: 0 train, 1 valid, 2 test.
"""

import numpy as np

TRAIN, VALID, TEST = 0, 1, 2


def merge_duplicates(
    user: np.ndarray, item: np.ndarray, split: np.ndarray | None = None, time: np.ndarray | None = None
) -> np.ndarray:
    """Rows to keep so that every (split, user, item) is there once, sorted by split, user and item.

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


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Rows of the largest subset in which every user and every item has at least k rows (k-core of a bipartite graph).

    Expects merged pairs. Each pass drops all users and items below k at once, until nothing changes.
    """
    rows = np.arange(len(user))
    while len(rows):
        u, i = user[rows], item[rows]
        keep = (np.bincount(u)[u] >= k) & (np.bincount(i)[i] >= k)
        if keep.all():
            break
        rows = rows[keep]
    return rows


def global_time(
    time: np.ndarray, user: np.ndarray, item: np.ndarray, valid_share: float, test_share: float
) -> np.ndarray:
    """The latest share of all interactions is test, the share before it valid, the rest train."""
    order = np.lexsort((item, user, time))
    test = round(len(order) * test_share)
    valid = round(len(order) * valid_share)
    split = np.zeros(len(order), np.int8)
    split[order[len(order) - test - valid :]] = VALID
    split[order[len(order) - test :]] = TEST
    return split


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


def ratio(user: np.ndarray, valid_share: float, test_share: float, rng: np.random.Generator) -> np.ndarray:
    """A random share of each user's interactions is valid, another test; each user keeps at least one in train.

    A share of a user's few interactions is seldom whole. It is rounded up with a probability of its fraction, so that
    short histories reach valid and test too and the shares hold over all users. Expects rows in a canonical order.
    """
    order = np.lexsort((rng.random(len(user)), user))
    from_end, count = _places(user[order])
    starts = np.flatnonzero(from_end == count - 1)  # the first row of each user
    counts = count[starts]
    test = np.floor(counts * test_share + rng.random(len(starts))).astype(np.int64)
    valid = np.floor(counts * valid_share + rng.random(len(starts))).astype(np.int64)
    test = np.minimum(test, counts - 1)
    valid = np.minimum(valid, counts - 1 - test)
    split = np.zeros(len(order), np.int8)
    split[order[from_end < np.repeat(test + valid, counts)]] = VALID
    split[order[from_end < np.repeat(test, counts)]] = TEST
    return split


def _pair(user: np.ndarray, item: np.ndarray, split: np.ndarray | None = None) -> np.ndarray:
    """One int64 for each (split, user, item), in their order."""
    key = user.astype(np.int64)
    if split is not None:
        key += split.astype(np.int64) * (int(user.max(initial=0)) + 1)
    return key * (int(item.max(initial=0)) + 1) + item


def _places(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For sorted groups: each row's distance from its group's end, and its group's size."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]][: len(groups)])
    sizes = np.diff(np.r_[starts, len(groups)])
    ends = np.repeat(starts + sizes, sizes)
    return ends - 1 - np.arange(len(groups)), np.repeat(sizes, sizes)
