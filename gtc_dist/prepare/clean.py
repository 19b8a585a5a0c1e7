"""Filter and deduplicate raw interactions, and sort them by user, split and item.

Rows are partitioned into ranges of users that fit `prepare.memory_gib`, and each range is cleaned on its own. The
result does not depend on the ranges. (A user with more rows than fit gets a range of its own.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import DataConfig
from gtc_dist.data.scratch import Buckets, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import split
from gtc_dist.progress import ProgressCallback

ROW_BYTES = 128  # memory per row while rows are merged or split: columns, sort key, permutation, temporary arrays


@dataclass(frozen=True)
class RawInteractions:
    """All rows of the raw files, in no particular order. The columns are in scratch.

    Attributes:
        user_ids, item_ids: sorted unique ids.
        user, item: int32 positions among them [E], called codes.
        time: int64 or float64 [E], or None.
        time_unit: seconds of one unit of time, 1e-6 where the files have timestamps.
        rating: float64 [E], or None.
        split: int8 [E], or None if neither files nor labels give the split.
        weight: float32 [E], or None: all weigh one.
        rejected: bad rows that were left out, with the columns of `bad_rows.REJECTED` and their file.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None = None
    rating: np.ndarray | None = None
    split: np.ndarray | None = None
    time_unit: float = 1.0
    weight: np.ndarray | None = None
    rejected: Sequence[pa.Table] = ()

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns that are used after ratings are filtered."""
        columns = {"user": self.user, "item": self.item, "time": self.time, "split": self.split}
        columns["weight"] = self.weight
        return {name: column for name, column in columns.items() if column is not None}


@dataclass(frozen=True)
class CleanInteractions:
    """Cleaned interactions in scratch, sorted by user, split and item.

    Attributes:
        user, item: int32 codes [E].
        time, split: as in `RawInteractions`.
        weight: float32 [E], of all rows of a pair together, or None: all weigh one.
        unmerged: where rows weigh differently and the split orders by time, all rows in ranges of users, and the names
            of their columns, so that the weights of train can leave out what is later; else None.
        user_counts, item_counts: int64, number of rows of each code.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None
    split: np.ndarray | None
    weight: np.ndarray | None
    user_counts: np.ndarray
    item_counts: np.ndarray
    unmerged: tuple[Buckets, list[str]] | None = None

    def __len__(self) -> int:
        return len(self.user)

    def user_blocks(self, scratch: Scratch) -> Iterator[slice]:
        """Blocks of rows that fit memory, in order; no user is in two blocks."""
        ends = np.cumsum(self.user_counts)
        for first, last in _user_ranges(self.user_counts, scratch.rows(ROW_BYTES)):
            yield slice(int(ends[first] - self.user_counts[first]), int(ends[last - 1]))
            scratch.release()


def clean_interactions(
    raw: RawInteractions, data: DataConfig, scratch: Scratch, progress: ProgressCallback
) -> tuple[CleanInteractions, dict[str, int]]:
    """Leave out events of weight 0, apply `min_rating`, merge the rows of a pair and apply `k_core`, in this order.

    Args:
        raw: its columns are removed from scratch.

    Returns:
        The remaining rows, and numbers of dropped rows by reason: `event`, `min_rating`, `duplicate`, `k_core`.

    Raises:
        InputError: a filter leaves no row.
    """
    minimum, k = data.interactions.min_rating, data.interactions.k_core
    buckets, dropped = _partition_by_user(raw, minimum, scratch, progress)
    before = int(buckets.ends.sum() - buckets.starts[:-1].sum())
    if not before and dropped.get("event") == len(raw.user):
        raise InputError("data.interactions.event_weights leaves no interaction: all events have weight 0")
    if minimum is not None and not before:
        raise InputError(f"data.interactions.min_rating={minimum:g} leaves no interaction")
    names = list(raw.columns)
    columns = _merge_repeats(buckets, names, data.interactions.repeats, scratch, progress)
    scratch.discard(raw.user, raw.item, raw.time, raw.rating, raw.split, raw.weight)
    unmerged = (buckets, names) if "weight" in columns and data.split.orders_by_time else None
    if unmerged is None:
        scratch.discard(*buckets.columns)
    rows = len(columns["user"])
    dropped["duplicate"] = before - rows
    if k:
        progress(f"k-core of {rows:,} interactions")
        before = rows
        rows = split.k_core(list(columns.values()), len(raw.user_ids), len(raw.item_ids), k, scratch)
        dropped["k_core"] = before - rows
        if not rows:
            raise InputError(f"data.interactions.k_core={k} leaves no interaction")
        columns = {name: column[:rows] for name, column in columns.items()}
    users, items = np.zeros(len(raw.user_ids), np.int64), np.zeros(len(raw.item_ids), np.int64)
    for block in scratch.blocks(rows, 16):
        users += np.bincount(columns["user"][block], minlength=len(users))
        items += np.bincount(columns["item"][block], minlength=len(items))
    more = (columns.get(name) for name in ("time", "split", "weight"))
    return CleanInteractions(columns["user"], columns["item"], *more, users, items, unmerged), dropped


def _partition_by_user(
    raw: RawInteractions, minimum: float | None, scratch: Scratch, progress: ProgressCallback
) -> tuple[Buckets, dict[str, int]]:
    """Rows with a positive weight and at least the minimum rating, partitioned into ranges of users that fit memory;
    and the number of others by reason."""
    counts, dropped = np.zeros(len(raw.user_ids), np.int64), {}

    def passes(block: slice) -> np.ndarray | slice:
        if raw.weight is None and minimum is None:
            return slice(None)
        weighs = np.ones(block.stop - block.start, bool) if raw.weight is None else raw.weight[block] > 0
        return weighs if minimum is None else weighs & (raw.rating[block] >= minimum)

    for block in scratch.blocks(len(raw.user), 32):
        counts += np.bincount(raw.user[block][passes(block)], minlength=len(counts))
        if raw.weight is not None:
            dropped["event"] = dropped.get("event", 0) + int(np.count_nonzero(raw.weight[block] == 0))
    if minimum is not None:
        dropped["min_rating"] = len(raw.user) - int(counts.sum()) - dropped.get("event", 0)
    ranges = _user_ranges(counts, scratch.rows(ROW_BYTES))
    bucket_of_user = np.repeat(np.arange(len(ranges), dtype=np.int32), [last - first for first, last in ranges])
    sizes = np.add.reduceat(counts, [first for first, _ in ranges])
    buckets = Buckets(scratch, sizes, [column.dtype for column in raw.columns.values()])
    for block in scratch.blocks(len(raw.user), ROW_BYTES):
        passed = passes(block)
        columns = [column[block][passed] for column in raw.columns.values()]
        buckets.add(bucket_of_user[columns[0]], *columns)
        progress(f"interactions grouped by user: {block.stop:,} of {len(raw.user):,}")
    return buckets, dropped


def _merge_repeats(
    buckets: Buckets, names: list[str], repeats: int, scratch: Scratch, progress: ProgressCallback
) -> dict[str, np.ndarray]:
    """Columns of the buckets' rows, one for each pair and split, sorted by user, split and item; with weights where the
    rows have them or `repeats` (`data.interactions.repeats`) is above 1."""
    out = {name: scratch.growing(column.dtype) for name, column in zip(names, buckets.columns, strict=True)}
    if repeats > 1:
        out.setdefault("weight", scratch.growing(np.float32))
    for number in range(len(buckets)):
        columns = dict(zip(names, buckets.bucket(number), strict=True))
        key = columns["user"], columns["item"], columns.get("split")
        kept = split.merge_duplicates(*key, columns.get("time"))
        merged = {name: column[kept] for name, column in columns.items()}
        if "weight" in out:
            merged["weight"] = split.merged_weights(*key, columns.get("weight"), repeats)
        for name, column in merged.items():
            out[name].append(column)
        scratch.release()
        progress(f"interactions merged and sorted: {buckets.ends[number]:,}")
    return {name: column.finish() for name, column in out.items()}


def _user_ranges(counts: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cut users into ranges [first, last) of at most `most` rows, or of a single user with more."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    ranges, first = [], 0
    while first < len(counts):
        last = max(int(np.searchsorted(ends, ends[first] + most, side="right")) - 1, first + 1)
        ranges.append((first, last))
        first = last
    return ranges
