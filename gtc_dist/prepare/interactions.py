"""Raw interactions -> users, items and the three splits under catalog indexes.

The chain: `inspect_features` (before Ray: files, columns, types) -> `read_feature_chunk` (Ray Data parses the files, the driver appends
columns of codes to scratch: 8 bytes an interaction, plus time and rating where used) -> `build` (clean, split, index,
shuffle). The driver holds the ids and a few numbers for each user and item; rows lie in scratch and are handled in
blocks that fit `prepare.memory_gib`. The result depends neither on the blocks nor on the order of files or rows.

What is dropped, in this order, and counted: rows below `min_rating`; rows that repeat a pair of the same split (the
earliest is kept; since ratings are filtered before, a pair stays if its highest rating does); rows outside the k-core.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gtc_dist.config import DataConfig
from gtc_dist.data import ray_tasks, storage
from gtc_dist.data.catalog import INTERACTION_ROWS, SPLITS
from gtc_dist.data.scratch import Buckets, Growing, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import ids, parse, split
from gtc_dist.prepare.clean import Raw, Rows, clean
from gtc_dist.prepare.parse import RawFile
from gtc_dist.progress import ProgressCallback, no_progress

MOST_PENDING = 1 << 30  # bytes of tables at most whose ids are looked up together


@dataclass(frozen=True)
class SplitInteractions:
    """What goes into the catalog.

    users, items: original ids in index order; splits: name -> (user int32, item int32), shuffled, in scratch;
    dropped: reason -> rows.
    """

    users: pa.Array
    items: pa.Array
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    dropped: dict[str, int]

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(user) for name, (user, _) in self.splits.items()}


def inspect_interactions(data: DataConfig) -> list[RawFile]:
    """Find and check all raw interaction files; no Ray. Raises InputError for what cannot be read."""
    columns, method = data.interactions, data.split.method
    roles = {"user": columns.user, "item": columns.item}
    if columns.rating is not None:
        roles["rating"] = columns.rating
    if columns.time is not None:
        roles["time"] = columns.time
    elif method in ("global_time", "leave_last_out"):
        raise InputError(
            f"data.split.method is {method}, which orders by time: set data.interactions.time to the time column"
        )
    labels = {}
    if method == "label":
        roles["label"] = data.split.label
        labels = {str(getattr(data.split, f"{name}_label")): code for code, name in enumerate(SPLITS)}
        if len(labels) < len(SPLITS):
            raise InputError("data.split: train_label, valid_label and test_label must differ")
    if method == "given":
        wanted = [(uri, code) for code, name in enumerate(SPLITS) for uri in _find(data, name)]
    else:
        wanted = [(uri, None) for uri in _find(data, None)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(parse.inspect_tables, uri, roles, columns.format, code, labels) for uri, code in wanted]
        files = [job.result() for job in jobs]
    for role in ("user", "item"):  # text files show their type only when they are read
        typed = {file.uri: file.types[role] for file in files if file.format in ("parquet", "jsonl")}
        if typed:
            ids.common_type(typed, f"{role} ids")
    return files


def read_interactions(files: list[RawFile], scratch: Scratch, tell: ProgressCallback = no_progress) -> Raw:
    """Parse the files in Ray tasks and gather their columns in scratch.

    Args:
        tell: takes a line about how far it is, often.

    Raises:
        InputError: what is wrong in a file; files whose ids or times do not go together; no row at all.
    """
    users, items, times = ids.Vocabulary("user ids"), ids.Vocabulary("item ids"), _Times(scratch)
    columns = {"user": scratch.growing(np.int32), "item": scratch.growing(np.int32)}
    tables = ((files[position].uri, table) for position, table in ray_tasks.map_tables(parse.read_table_file, files))
    for batch in _batches(tables, min(scratch.memory_bytes // 8, MOST_PENDING)):
        columns["user"].append(users.add([(file, table["user"]) for file, table in batch]))
        columns["item"].append(items.add([(file, table["item"]) for file, table in batch]))
        for file, table in batch:
            for name, dtype in {"rating": np.float64, "split": np.int8}.items():
                if name in table.column_names:
                    columns[name] = columns.get(name) or scratch.growing(dtype)
                    columns[name].append(table[name].to_numpy())
            if "time" in table.column_names:
                times.append(file, table["time"])
        tell(f"interactions read: {columns['user'].rows:,}; {len(users):,} users, {len(items):,} items so far")
    if not columns["user"].rows:
        raise InputError(f"no interactions in {', '.join(file.uri for file in files[:5])}")
    user_ids, user_places = users.finish()
    item_ids, item_places = items.finish()
    time = times.finish()
    arrays = {name: column.finish() for name, column in columns.items()}
    for block in scratch.blocks(len(arrays["user"]), 16):
        arrays["user"][block] = user_places[arrays["user"][block]]
        arrays["item"][block] = item_places[arrays["item"][block]]
    return Raw(user_ids, item_ids, time=time, **arrays)


def build(
    raw: Raw,
    data: DataConfig,
    scratch: Scratch,
    more_items: pa.Array | None = None,
    tell: ProgressCallback = no_progress,
) -> SplitInteractions:
    """Clean, split and index the interactions. Takes the columns of `raw` away from scratch.

    Args:
        more_items: ids that become items though they may have no interaction (data.items: all).

    Raises:
        InputError: no row left, an empty split, or pairs of valid or test that are also in train.
    """
    rows, dropped = clean(raw, data, scratch, tell)
    tell("interactions split")
    codes = _split(rows, data, scratch)
    counts = _check_splits(raw, data, rows, codes, scratch)
    seed = data.split.seed
    users, user_index = _index(raw.user_ids, rows.users, np.random.default_rng([seed, 0]))
    items, item_index = _index(raw.item_ids, rows.items, np.random.default_rng([seed, 1]), more_items)
    splits = {}
    for which, name in enumerate(SPLITS):
        tell(f"interactions shuffled: {name}")
        chosen = _chosen(rows, codes, which, user_index, item_index, scratch)
        splits[name] = _shuffled(chosen, counts[which], [seed, 4, which], [seed, 2, which], scratch)
    scratch.discard(rows.user, rows.item, rows.time, codes)
    return SplitInteractions(users, items, splits, dropped)


def _find(data: DataConfig, name: str | None) -> list[str]:
    """Absolute URIs of one split's files (None: of data.interactions.files), each once."""
    key = "data.interactions.files" if name is None else f"data.split.{name}"
    patterns = data.interactions.files if name is None else getattr(data.split, name)
    if not patterns:
        raise InputError(f"{key} is empty; name the files with interactions, relative to data.raw ({data.raw})")
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            found |= dict.fromkeys(storage.glob(storage.join(data.raw, pattern)))
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
    return list(found)


def _batches(tables: Iterator[tuple[str, pa.Table]], most_bytes: int) -> Iterator[list[tuple[str, pa.Table]]]:
    """Tables gathered to batches of some size: looking ids up costs a pass over all ids known so far."""
    batch, size = [], 0
    for file, table in tables:
        if table.num_rows:
            batch.append((file, table))
            size += table.nbytes
        if size >= most_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Times:
    """Times of all rows on one scale: a column of 8 bytes that holds int64 or float64, run by run, until `finish`."""

    def __init__(self, scratch: Scratch):
        self.scratch = scratch
        self.column: Growing | None = None
        self.runs: list[tuple[int, str]] = []  # (first row, dtype's kind) where it changes
        self.instants: dict[str, None] = {}  # files with timestamps, in the order they came
        self.numbers: dict[str, None] = {}

    def append(self, file: str, time: pa.ChunkedArray) -> None:
        instant = pa.types.is_timestamp(time.type)
        (self.instants if instant else self.numbers)[file] = None
        values = (time.cast(pa.int64()) if instant else time).to_numpy()
        self.column = self.column or self.scratch.growing(np.int64)
        if not self.runs or self.runs[-1][1] != values.dtype.kind:
            self.runs.append((self.column.rows, values.dtype.kind))
        self.column.append(values.view(np.int64))

    def finish(self) -> np.ndarray | None:
        """The column; float64 where some files have fractions. Raises InputError for timestamps beside numbers."""
        if self.instants and self.numbers:
            raise InputError(
                f"times are timestamps in {min(self.instants)} but numbers in {min(self.numbers)}; write them alike"
            )
        if self.column is None:
            return None
        time = self.column.finish()
        if all(kind == "i" for _, kind in self.runs):
            return time
        stops = [start for start, _ in self.runs[1:]] + [len(time)]
        for (start, kind), stop in zip(self.runs, stops, strict=True):
            for block in self.scratch.blocks(stop - start, 16) if kind == "i" else ():
                part = time[start + block.start : start + block.stop]
                part[:] = part.astype(np.float64).view(np.int64)
        return time.view(np.float64)


def _split(rows: Rows, data: DataConfig, scratch: Scratch) -> np.ndarray:
    """Each row's split, int8."""
    method, shares = data.split.method, (data.split.valid_share, data.split.test_share)
    if rows.split is not None:
        return rows.split
    codes = scratch.array(len(rows), np.int8)
    if method == "global_time":
        valid, test = (round(len(rows) * share) for share in shares)
        cuts = [split.TimeCut(rows.time, len(rows) - later, scratch) for later in (test + valid, test)]
        for block in scratch.blocks(len(rows), 64):
            codes[block] = sum(cut.after(rows.time[block]).astype(np.int8) for cut in cuts)
        return codes
    draws = split.ratio_draws([data.split.seed, 3], len(rows), int(np.count_nonzero(rows.users)))
    for block in rows.of_users(scratch):
        user = rows.user[block]
        if method == "leave_last_out":
            codes[block] = split.leave_last_out(rows.time[block], user, rows.item[block])
        else:
            codes[block] = split.ratio(user, *shares, draws)
    return codes


def _check_splits(raw: Raw, data: DataConfig, rows: Rows, codes: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Rows of each split. Raises InputError for an empty one, and for pairs of valid or test that are also in train."""
    counts = np.zeros(len(SPLITS), np.int64)
    repeated: dict[int, list] = {split.VALID: [0, None], split.TEST: [0, None]}  # how many, and the first
    for block in rows.of_users(scratch):
        user, item, code = rows.user[block], rows.item[block], codes[block]
        counts += np.bincount(code, minlength=len(counts))
        for which in repeated if rows.split is not None else ():  # splits that were made here share nothing
            found = split.repeated_in_train(user, item, code, which)
            repeated[which][0] += len(found)
            if len(found) and repeated[which][1] is None:
                repeated[which][1] = (int(user[found[0]]), int(item[found[0]]))
    for which, name in enumerate(SPLITS):
        if not counts[which]:
            raise InputError(
                f"the {name} split is empty (data.split.method={data.split.method}); "
                f"interactions: {', '.join(f'{n} {c}' for n, c in zip(SPLITS, counts, strict=True))}; "
                f"{_mend_empty(data, name)}"
            )
        number, first = repeated.get(which, (0, None))
        if first is not None:
            files = getattr(data.split, name) if data.split.method == "given" else data.interactions.files
            raise InputError(
                f"{name} ({', '.join(files[:3])} in {data.raw}) repeats {number} interactions of train, such as "
                f"{data.interactions.user}={raw.user_ids[first[0]].as_py()!r}, "
                f"{data.interactions.item}={raw.item_ids[first[1]].as_py()!r}; remove them from one of the two"
            )
    return counts


def _mend_empty(data: DataConfig, name: str) -> str:
    """What to do about an empty split."""
    method, asked = data.split.method, data.split
    if method == "given":
        return f"add rows to {', '.join(getattr(asked, name)[:3])} in {data.raw}"
    if method == "label":
        return f"column {asked.label!r} needs rows with data.split.{name}_label={getattr(asked, f'{name}_label')}"
    return "use more interactions, a lower k_core" + ("" if method == "leave_last_out" else " or other shares")


def _index(
    all_ids: pa.Array, rows: np.ndarray, rng: np.random.Generator, more: pa.Array | None = None
) -> tuple[pa.Array, np.ndarray]:
    """Ids in index order and each code's index: a random permutation of the sorted ids that are in use.

    Args:
        rows: how many rows each code has.
        more: ids that are in use without a row.
    """
    used = np.flatnonzero(rows)
    kept = all_ids.take(pa.array(used))
    if more is not None:
        kept = ids.sorted_unique(pa.chunked_array([kept, more.cast(kept.type)]))
    index = rng.permutation(len(kept)).astype(np.int32)
    where = np.full(len(all_ids), -1, np.int32)
    where[used] = index[ids.positions(all_ids.take(pa.array(used)), kept)]
    order = np.empty(len(kept), np.int64)
    order[index] = np.arange(len(kept))
    return kept.take(pa.array(order)), where


def _chosen(
    rows: Rows, codes: np.ndarray, which: int, user_index: np.ndarray, item_index: np.ndarray, scratch: Scratch
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of the rows of one split, under catalog indexes."""
    for block in scratch.blocks(len(rows), 64):
        chosen = codes[block] == which
        yield user_index[rows.user[block][chosen]], item_index[rows.item[block][chosen]]


def _shuffled(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]],
    count: int,
    deal_seed: list[int],
    order_seed: list[int],
    scratch: Scratch,
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` pairs in a random order: each goes to a random bucket, then each bucket is shuffled by itself. The
    number of buckets goes by the number of pairs alone."""
    parts = max(-(-int(count) // INTERACTION_ROWS), 1)
    rng, sizes = np.random.default_rng(deal_seed), np.zeros(parts, np.int64)
    for block in scratch.blocks(int(count), 32):
        sizes += np.bincount(_deal(rng, block.stop - block.start, parts), minlength=parts)
    buckets, rng = Buckets(scratch, sizes, [np.int32, np.int32]), np.random.default_rng(deal_seed)
    for user, item in pairs:
        buckets.add(_deal(rng, len(user), parts), user, item)
    for number in range(parts):
        user, item = buckets.bucket(number)
        order = np.random.default_rng([*order_seed, number]).permutation(len(user))
        user[:], item[:] = user[order], item[order]
    return tuple(buckets.columns)


def _deal(rng: np.random.Generator, rows: int, parts: int) -> np.ndarray:
    """A random bucket for each row; rows may be dealt in blocks, since each takes one draw."""
    return (rng.random(rows) * parts).astype(np.int32)
