"""Raw interactions -> rows that stay, in canonical order: by user, split and item.

Rows are dealt to ranges of users that fit `prepare.memory_gib`, and each range is cleaned by itself; what comes out
does not depend on the ranges. (A single user with more rows than fit makes a range as large as it takes.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gtc_dist.config import DataConfig
from gtc_dist.data.scratch import Buckets, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import split
from gtc_dist.progress import ProgressCallback

ROW_BYTES = 128  # that a row takes while it is merged or split: its columns, a sort key, a permutation, temporaries


@dataclass(frozen=True)
class Raw:
    """All rows of the raw files, in no particular order; columns in scratch.

    user_ids, item_ids: sorted unique ids; user, item: int32 positions among them [E]; time: int64 or float64 [E];
    rating: float64 [E]; split: int8 [E] where the files or a label column give it.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None = None
    rating: np.ndarray | None = None
    split: np.ndarray | None = None

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns that matter once ratings are filtered."""
        columns = {"user": self.user, "item": self.item, "time": self.time, "split": self.split}
        return {name: column for name, column in columns.items() if column is not None}


@dataclass(frozen=True)
class Rows:
    """Cleaned interactions in scratch, sorted by user (and within it by split and item).

    user, item: int32 codes [E]; time, split: as in `Raw`, or None; users, items: int64, rows of each code.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None
    split: np.ndarray | None
    users: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def of_users(self, scratch: Scratch) -> Iterator[slice]:
        """Blocks of whole users, in order."""
        ends = np.cumsum(self.users)
        for first, last in _ranges(self.users, scratch.rows(ROW_BYTES)):
            yield slice(int(ends[first] - self.users[first]), int(ends[last - 1]))
            scratch.release()


def clean(raw: Raw, data: DataConfig, scratch: Scratch, tell: ProgressCallback) -> tuple[Rows, dict[str, int]]:
    """Rows that stay, and how many went for which reason: `min_rating`, `duplicate`, `k_core`, in this order.

    Args:
        raw: its columns are gone from scratch afterwards.

    Raises:
        InputError: a filter leaves nothing.
    """
    minimum, k = data.interactions.min_rating, data.interactions.k_core
    buckets, dropped = _by_user(raw, minimum, scratch, tell), {}
    left = int(buckets.ends.sum() - buckets.starts[:-1].sum())
    if minimum is not None:
        dropped["min_rating"] = len(raw.user) - left
        if not left:
            raise InputError(f"data.interactions.min_rating={minimum:g} leaves no interaction")
    columns = _merged(buckets, list(raw.columns), scratch, tell)
    scratch.discard(*buckets.columns, raw.user, raw.item, raw.time, raw.rating, raw.split)
    rows = len(columns["user"])
    dropped["duplicate"] = left - rows
    if k:
        tell(f"k-core of {rows:,} interactions")
        left = rows
        rows = split.k_core(list(columns.values()), len(raw.user_ids), len(raw.item_ids), k, scratch)
        dropped["k_core"] = left - rows
        if not rows:
            raise InputError(f"data.interactions.k_core={k} leaves no interaction")
        columns = {name: column[:rows] for name, column in columns.items()}
    users, items = np.zeros(len(raw.user_ids), np.int64), np.zeros(len(raw.item_ids), np.int64)
    for block in scratch.blocks(rows, 16):
        users += np.bincount(columns["user"][block], minlength=len(users))
        items += np.bincount(columns["item"][block], minlength=len(items))
    return Rows(columns["user"], columns["item"], columns.get("time"), columns.get("split"), users, items), dropped


def _by_user(raw: Raw, minimum: float | None, scratch: Scratch, tell: ProgressCallback) -> Buckets:
    """Rows with at least the minimum rating, dealt to ranges of users that fit memory."""
    users = np.zeros(len(raw.user_ids), np.int64)
    for block in scratch.blocks(len(raw.user), 32):
        user = raw.user[block]
        users += np.bincount(user if minimum is None else user[raw.rating[block] >= minimum], minlength=len(users))
    ranges = _ranges(users, scratch.rows(ROW_BYTES))
    bucket_of_user = np.repeat(np.arange(len(ranges), dtype=np.int32), [last - first for first, last in ranges])
    sizes = np.add.reduceat(users, [first for first, _ in ranges])
    buckets = Buckets(scratch, sizes, [column.dtype for column in raw.columns.values()])
    for block in scratch.blocks(len(raw.user), ROW_BYTES):
        passed = slice(None) if minimum is None else raw.rating[block] >= minimum
        columns = [column[block][passed] for column in raw.columns.values()]
        buckets.add(bucket_of_user[columns[0]], *columns)
        tell(f"interactions grouped by user: {block.stop:,} of {len(raw.user):,}")
    return buckets


def _merged(buckets: Buckets, names: list[str], scratch: Scratch, tell: ProgressCallback) -> dict[str, np.ndarray]:
    """The buckets' rows without duplicates, in canonical order."""
    out = {name: scratch.growing(column.dtype) for name, column in zip(names, buckets.columns, strict=True)}
    for number in range(len(buckets)):
        columns = dict(zip(names, buckets.bucket(number), strict=True))
        kept = split.merge_duplicates(columns["user"], columns["item"], columns.get("split"), columns.get("time"))
        for name, column in columns.items():
            out[name].append(column[kept])
        scratch.release()
        tell(f"interactions merged and ordered: {buckets.ends[number]:,}")
    return {name: column.finish() for name, column in out.items()}


def _ranges(counts: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cut users into ranges [first, last) of at most `most` rows each, but of one user at least."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    ranges, first = [], 0
    while first < len(counts):
        last = max(int(np.searchsorted(ends, ends[first] + most, side="right")) - 1, first + 1)
        ranges.append((first, last))
        first = last
    return ranges
