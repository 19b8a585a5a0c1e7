"""Raw interactions -> users, items and the three splits under catalog indexes.

The chain: `inspect` (before Ray: files, columns, types) -> `read` (Ray Data parses the files, the driver keeps columns
of codes: 8 bytes an interaction, plus time and rating where used) -> `build` (clean, split, index). The driver's part
is linear in the interactions but for sorts, and vectorised throughout.

What is dropped, in this order, and counted: rows below `min_rating`; rows that repeat a pair of the same split (the
earliest is kept; since ratings are filtered before, a pair stays if its highest rating does); rows outside the k-core.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gtc_dist.config import Data
from gtc_dist.data import ids, parallel, parse, split, storage
from gtc_dist.data.catalog import SPLITS
from gtc_dist.data.parse import RawFile
from gtc_dist.errors import InputError


@dataclass(frozen=True)
class Raw:
    """All rows of the raw files, in no particular order.

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


@dataclass(frozen=True)
class Interactions:
    """What goes into the catalog.

    users, items: original ids in index order; splits: name -> (user int32, item int32), shuffled;
    dropped: reason -> rows.
    """

    users: pa.Array
    items: pa.Array
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    dropped: dict[str, int]

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(user) for name, (user, _) in self.splits.items()}


def inspect(data: Data) -> list[RawFile]:
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
        jobs = [pool.submit(parse.inspect, uri, roles, columns.format, code, labels) for uri, code in wanted]
        files = [job.result() for job in jobs]
    for role in ("user", "item"):  # text files show their type only when they are read
        typed = {file.uri: file.types[role] for file in files if file.format in ("parquet", "jsonl")}
        if typed:
            ids.common_type(typed, f"{role} ids")
    return files


def read(files: list[RawFile]) -> Raw:
    """Parse the files in Ray tasks and gather their columns."""
    tables: list[list[pa.Table]] = [[] for _ in files]
    for position, table in parallel.map_tables(parse.read, files):
        tables[position].append(table)
    parts = [(file, pa.concat_tables(_one_type(chunks))) for file, chunks in zip(files, tables, strict=True) if chunks]
    parts = [(file, table) for file, table in parts if table.num_rows]
    if not parts:
        raise InputError(f"no interactions in {', '.join(file.uri for file in files[:5])}")
    user_ids, user = _codes(parts, "user")
    item_ids, item = _codes(parts, "item")
    optional = {
        name: np.concatenate([table[name].to_numpy() for _, table in parts])
        for name in ("rating", "split")
        if name in parts[0][1].column_names
    }
    time = _times(parts) if "time" in parts[0][1].column_names else None
    return Raw(user_ids, item_ids, user, item, time, **optional)


def build(raw: Raw, data: Data, more_items: pa.Array | None = None) -> Interactions:
    """Clean, split and index the interactions.

    Args:
        more_items: ids that become items though they may have no interaction (data.items: all).

    Raises:
        InputError: no row left, an empty split, or pairs of valid or test that are also in train.
    """
    rows, dropped = _clean(raw, data)
    user, item = raw.user[rows], raw.item[rows]
    codes = _split(raw, data, rows)
    for which, name in enumerate(SPLITS):
        _check_split(raw, data, user, item, codes, which, name)
    seed = data.split.seed
    users, user = _index(raw.user_ids, user, np.random.default_rng([seed, 0]))
    items, item = _index(raw.item_ids, item, np.random.default_rng([seed, 1]), more_items)
    splits = {}
    for which, name in enumerate(SPLITS):
        chosen = np.flatnonzero(codes == which)
        chosen = chosen[np.random.default_rng([seed, 2, which]).permutation(len(chosen))]
        splits[name] = (user[chosen], item[chosen])
    return Interactions(users, items, splits, dropped)


def _find(data: Data, name: str | None) -> list[str]:
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


def _one_type(tables: list[pa.Table]) -> list[pa.Table]:
    """A text file's ids are integers only if all its blocks' are; as text they are what they were, being plain."""
    for role in ("user", "item"):
        texts = [ids.is_text(table[role].type) for table in tables]
        if any(texts) and not all(texts):
            tables = [
                table if text else table.set_column(table.column_names.index(role), role, table[role].cast(pa.string()))
                for table, text in zip(tables, texts, strict=True)
            ]
    return tables


def _codes(parts: list[tuple[RawFile, pa.Table]], role: str) -> tuple[pa.Array, np.ndarray]:
    what = f"{role} ids"
    type = ids.common_type({file.uri: table[role].type for file, table in parts}, what)
    return ids.encode(
        pa.chunked_array([chunk for _, table in parts for chunk in ids.cast(table[role], type, what).chunks], type)
    )


def _times(parts: list[tuple[RawFile, pa.Table]]) -> np.ndarray:
    """Times of all rows on one scale."""
    instants = [file.uri for file, table in parts if pa.types.is_timestamp(table["time"].type)]
    numbers = [file.uri for file, table in parts if not pa.types.is_timestamp(table["time"].type)]
    if instants and numbers:
        raise InputError(f"times are timestamps in {instants[0]} but numbers in {numbers[0]}; write them alike")
    columns = [table["time"].cast(pa.int64()) if instants else table["time"] for _, table in parts]
    return np.concatenate([column.to_numpy() for column in columns])  # int64 and float64 together: float64


def _clean(raw: Raw, data: Data) -> tuple[np.ndarray, dict[str, int]]:
    """Rows that stay, in canonical order, and how many went for which reason."""
    minimum, k = data.interactions.min_rating, data.interactions.k_core
    rows, dropped = np.arange(len(raw.user)), {}
    if minimum is not None:
        rows = rows[raw.rating >= minimum]
        dropped["min_rating"] = len(raw.user) - len(rows)
        if not len(rows):
            raise InputError(f"data.interactions.min_rating={minimum:g} leaves no interaction")
    merged = rows[split.merge_duplicates(raw.user[rows], raw.item[rows], _take(raw.split, rows), _take(raw.time, rows))]
    dropped["duplicate"] = len(rows) - len(merged)
    rows = merged
    if k:
        core = rows[split.k_core(raw.user[rows], raw.item[rows], k)]
        dropped["k_core"] = len(rows) - len(core)
        rows = core
        if not len(rows):
            raise InputError(f"data.interactions.k_core={k} leaves no interaction")
    return rows, dropped


def _split(raw: Raw, data: Data, rows: np.ndarray) -> np.ndarray:
    method, user, item, time = data.split.method, raw.user[rows], raw.item[rows], _take(raw.time, rows)
    shares = (data.split.valid_share, data.split.test_share)
    if method == "global_time":
        return split.global_time(time, user, item, *shares)
    if method == "leave_last_out":
        return split.leave_last_out(time, user, item)
    if method == "ratio":
        return split.ratio(user, *shares, np.random.default_rng([data.split.seed, 3]))
    return raw.split[rows]


def _check_split(raw: Raw, data: Data, user, item, codes: np.ndarray, which: int, name: str) -> None:
    if not (codes == which).any():
        raise InputError(
            f"the {name} split is empty (data.split.method={data.split.method}); "
            f"interactions: {', '.join(f'{n} {np.sum(codes == c)}' for c, n in enumerate(SPLITS))}"
        )
    if raw.split is None or which == split.TRAIN:
        return  # splits that were made here share nothing
    repeated = split.repeated_in_train(user, item, codes, which)
    if len(repeated):
        first = repeated[0]
        files = getattr(data.split, name) if data.split.method == "given" else data.interactions.files
        raise InputError(
            f"{name} ({', '.join(files[:3])} in {data.raw}) repeats {len(repeated)} interactions of train, such as "
            f"{data.interactions.user}={raw.user_ids[user[first]].as_py()!r}, "
            f"{data.interactions.item}={raw.item_ids[item[first]].as_py()!r}; remove them from one of the two"
        )


def _index(
    all_ids: pa.Array, codes: np.ndarray, rng: np.random.Generator, more: pa.Array | None = None
) -> tuple[pa.Array, np.ndarray]:
    """Ids in index order and each row's index: a random permutation of the sorted ids that are in use."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(all_ids)))
    kept = all_ids.take(pa.array(used))
    if more is not None:
        kept = ids.sorted_unique(pa.chunked_array([kept, more.cast(kept.type)]))
    index = rng.permutation(len(kept)).astype(np.int32)
    where = np.full(len(all_ids), -1, np.int32)
    where[used] = index[ids.positions(all_ids.take(pa.array(used)), kept)]
    order = np.empty(len(kept), np.int64)
    order[index] = np.arange(len(kept))
    return kept.take(pa.array(order)), where[codes]


def _take(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[rows]
