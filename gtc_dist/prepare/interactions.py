"""Read raw interaction files into columns of codes.

`inspect_interactions` checks files, columns and types before Ray starts. `read_interactions` parses the files in Ray
tasks; the driver maps ids to codes and appends the columns to scratch: 8 bytes per interaction, plus time, rating and
split if used. The driver holds all ids in memory. The result does not depend on the order of files or rows.
`catalog_interactions.py` does the rest.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import DataConfig
from gtc_dist.data import ray_tasks, storage
from gtc_dist.data.catalog import SPLITS
from gtc_dist.data.scratch import GrowingColumn, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import ids, parse
from gtc_dist.prepare.clean import RawInteractions
from gtc_dist.prepare.interaction_file import InteractionFile
from gtc_dist.progress import ProgressCallback, no_progress

BATCH_BYTES = 1 << 30  # largest batch of tables whose ids are looked up together


def inspect_interactions(data: DataConfig) -> list[InteractionFile]:
    """Find and check all raw interaction files, without Ray. Raises InputError for a file that cannot be read."""
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
        labels = {str(label): code for code, label in enumerate(data.split.labels)}
        if len(labels) < len(SPLITS):
            raise InputError(f"data.split.labels is {data.split.labels}; the labels must differ")
    if method == "given":
        wanted = [(uri, code) for code, name in enumerate(SPLITS) for uri in _find_files(data, name)]
    else:
        wanted = [(uri, None) for uri in _find_files(data, None)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(parse.inspect_table, uri, roles, columns.format, code, labels) for uri, code in wanted]
        files = [job.result() for job in jobs]
    return files


def read_interactions(
    files: list[InteractionFile],
    scratch: Scratch,
    progress: ProgressCallback = no_progress,
    text_items: bool = False,
) -> RawInteractions:
    """Parse the files in Ray tasks and gather their columns in scratch.

    Args:
        progress: called with a line for every batch.
        text_items: item ids are text elsewhere, so they become text, whatever the files have.

    Raises:
        InputError: a file cannot be parsed; times have different types in two files; there is no row.
    """
    users, items, times = ids.Vocabulary("user ids"), ids.Vocabulary("item ids"), _TimeColumn(scratch)
    columns = {"user": scratch.growing(np.int32), "item": scratch.growing(np.int32)}
    tables = ((files[position].uri, table) for position, table in ray_tasks.map_tables(parse.read_table_file, files))
    for batch in _batch_tables(tables, min(scratch.memory_bytes // 8, BATCH_BYTES)):
        columns["user"].append(users.add([(file, table["user"]) for file, table in batch]))
        columns["item"].append(items.add([(file, table["item"]) for file, table in batch]))
        for file, table in batch:
            for name, dtype in {"rating": np.float64, "split": np.int8}.items():
                if name in table.column_names:
                    columns[name] = columns.get(name) or scratch.growing(dtype)
                    columns[name].append(table[name].to_numpy())
            if "time" in table.column_names:
                times.append(file, table["time"])
        progress(f"interactions read: {columns['user'].rows:,}; {len(users):,} users, {len(items):,} items so far")
    if not columns["user"].rows:
        raise InputError(f"no interactions in {', '.join(file.uri for file in files[:5])}")
    user_ids, user_positions = users.finish()
    item_ids, item_positions = items.finish(text_items)
    time = times.finish()
    arrays = {name: column.finish() for name, column in columns.items()}
    for block in scratch.blocks(len(arrays["user"]), 16):
        arrays["user"][block] = user_positions[arrays["user"][block]]
        arrays["item"][block] = item_positions[arrays["item"][block]]
    unit = 1e-6 if times.timestamp_files else 1.0
    return RawInteractions(user_ids, item_ids, time=time, time_unit=unit, **arrays)


def _find_files(data: DataConfig, name: str | None) -> list[str]:
    """Absolute URIs of the files of one split (None: of data.interactions.files), without duplicates."""
    key = "data.interactions.files" if name is None else f"data.split.{name}"
    patterns = data.interactions.files if name is None else getattr(data.split, name)
    if not patterns:
        raise InputError(f"{key} is empty; name the interaction files, relative to data.raw ({data.raw})")
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            found |= dict.fromkeys(storage.glob(storage.join(data.raw, pattern)))
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
    return list(found)


def _batch_tables(tables: Iterator[tuple[str, pa.Table]], batch_bytes: int) -> Iterator[list[tuple[str, pa.Table]]]:
    """Group tables into batches of about `batch_bytes`, since each look-up of ids scans all known ids."""
    batch, size = [], 0
    for file, table in tables:
        if table.num_rows:
            batch.append((file, table))
            size += table.nbytes
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _TimeColumn:
    """Times of all rows: a scratch column of 8 bytes per row. Until `finish`, runs of rows are int64 or float64."""

    def __init__(self, scratch: Scratch):
        self.scratch = scratch
        self.column: GrowingColumn | None = None
        self.runs: list[tuple[int, str]] = []  # (first row, kind of the dtype) of each run
        self.timestamp_files: dict[str, None] = {}  # in order of arrival
        self.number_files: dict[str, None] = {}

    def append(self, file: str, time: pa.ChunkedArray) -> None:
        is_timestamp = pa.types.is_timestamp(time.type)
        (self.timestamp_files if is_timestamp else self.number_files)[file] = None
        values = (time.cast(pa.int64()) if is_timestamp else time).to_numpy()
        self.column = self.column or self.scratch.growing(np.int64)
        if not self.runs or self.runs[-1][1] != values.dtype.kind:
            self.runs.append((self.column.rows, values.dtype.kind))
        self.column.append(values.view(np.int64))

    def finish(self) -> np.ndarray | None:
        """The column: float64 if some times are fractions, else int64.

        Raises:
            InputError: some files have timestamps and others numbers (one of each is named).
        """
        if self.timestamp_files and self.number_files:
            raise InputError(
                f"times are timestamps in {min(self.timestamp_files)} but numbers in {min(self.number_files)}; "
                "write them with one type"
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
