"""Read raw interaction files into columns of codes.

`inspect_interactions` checks files, columns and types before Ray starts. `read_interactions` parses the files in Ray
tasks; the driver maps ids to codes and appends the columns to scratch: 8 bytes per interaction, plus time, rating and
split if used. The driver holds all ids in memory. The result does not depend on the order of files or rows.
`catalog_interactions.py` does the rest.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import DataConfig
from gtc_dist.data import ray_tasks, storage
from gtc_dist.data.catalog import SPLITS
from gtc_dist.data.scratch import GrowingColumn, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare.clean import RawInteractions
from gtc_dist.progress import ProgressCallback, no_progress
from gtc_dist.raw import ids, parse
from gtc_dist.raw.bad_rows import REJECTED, BadRows
from gtc_dist.raw.interaction_file import InteractionFile

COLUMN_TYPES = {"rating": np.float64, "weight": np.float32, "split": np.int8}
UNITS = {  # range of times between 1973 and 5138 in each, as numbers since 1970
    "seconds": (1e8, 1e11),
    "milliseconds": (1e11, 1e14),
    "microseconds": (1e14, 1e17),
    "nanoseconds": (1e17, math.inf),
}
BATCH_BYTES = 1 << 30  # largest batch of tables whose ids are looked up together


def inspect_interactions(data: DataConfig) -> list[InteractionFile]:
    """Find and check all raw interaction files, without Ray. Raises InputError for a file that cannot be read."""
    columns, method = data.interactions, data.split.method
    roles = {"user": columns.user, "item": columns.item}
    named = {"rating": columns.rating, "weight": columns.weight, "event": columns.event, "time": columns.time}
    roles |= {role: name for role, name in named.items() if name is not None}
    if columns.time is None and data.split.orders_by_time:
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
    options = {
        "labels": labels,
        "events": columns.event_weights,
        "separator": columns.separator or "",
        "names": tuple(columns.columns or ()),
        "skip": columns.on_bad_rows == "skip",
    }
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(parse.inspect_table, uri, roles, columns.format, split=code, **options) for uri, code in wanted
        ]
        files = [job.result() for job in jobs]
        if data.ids == "integer":
            list(pool.map(_refuse_text_ids, files))
    return files


def _refuse_text_ids(file: InteractionFile) -> None:
    """Refuse a file whose first rows have ids of text: a start of Ray is not needed to find them. Raises InputError."""
    table = next(parse.checked_tables(file, BadRows(file)), None)
    for role in ("user", "item") if table is not None and table.num_rows else ():
        vocabulary = ids.Vocabulary(f"{role} ids")
        vocabulary.add([(file.uri, table[role])])
        vocabulary.finish(as_integer=True)


def read_interactions(
    files: list[InteractionFile],
    scratch: Scratch,
    progress: ProgressCallback = no_progress,
    text_items: bool = False,
    ids_as: str = "auto",
) -> RawInteractions:
    """Parse the files in Ray tasks and gather their columns in scratch.

    Args:
        progress: called with a line for every batch.
        text_items: item ids are text elsewhere, so they become text, whatever the files have.
        ids_as: `data.ids`.

    Raises:
        InputError: a file cannot be parsed; times have different types in two files; there is no row.
    """
    rejected: list[pa.Table] = []
    users, items, times = ids.Vocabulary("user ids"), ids.Vocabulary("item ids"), _TimeColumn(scratch)
    columns = {"user": scratch.growing(np.int32), "item": scratch.growing(np.int32)}
    tables = _without_rejected(files, ray_tasks.map_tables(parse.read_table_file, files), rejected)
    for batch in _batch_tables(tables, min(scratch.memory_bytes // 8, BATCH_BYTES)):
        columns["user"].append(users.add([(file, table["user"]) for file, table in batch]))
        columns["item"].append(items.add([(file, table["item"]) for file, table in batch]))
        for file, table in batch:
            values = {name: table[name].to_numpy() for name in ("rating", "split") if name in table.column_names}
            factors = [table[name].to_numpy() for name in ("weight", "event") if name in table.column_names]
            if factors:
                values["weight"] = np.prod(factors, axis=0)
            for name, column in values.items():
                columns[name] = columns.get(name) or scratch.growing(COLUMN_TYPES[name])
                columns[name].append(column)
            if "time" in table.column_names:
                times.append(file, table["time"])
        progress(f"interactions read: {columns['user'].rows:,}; {len(users):,} users, {len(items):,} items so far")
    if not columns["user"].rows:
        raise InputError(f"no interactions in {', '.join(file.uri for file in files[:5])}")
    text, integer = ids_as == "text", ids_as == "integer"
    user_ids, user_positions = users.finish(text, integer)
    item_ids, item_positions = items.finish(text or text_items, integer)
    time = times.finish()
    arrays = {name: column.finish() for name, column in columns.items()}
    for block in scratch.blocks(len(arrays["user"]), 16):
        arrays["user"][block] = user_positions[arrays["user"][block]]
        arrays["item"][block] = item_positions[arrays["item"][block]]
    unit = 1e-6 if times.timestamp_files else 1.0
    return RawInteractions(user_ids, item_ids, time=time, time_unit=unit, rejected=rejected, **arrays)


def _without_rejected(
    files: list[InteractionFile], tables: Iterator[tuple[int, pa.Table]], rejected: list[pa.Table]
) -> Iterator[tuple[str, pa.Table]]:
    """Tables of interactions, with the name of their file; those of bad rows are added to `rejected`, with a column
    `file`."""
    for position, table in tables:
        uri = files[position].uri
        if table.schema.equals(REJECTED):
            rejected.append(table.add_column(0, "file", pa.array([uri] * table.num_rows, pa.string())))
        else:
            yield uri, table


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
        self.units: dict[str, tuple[str, float]] = {}  # unit that numbers look like -> a file with one, and the number

    def append(self, file: str, time: pa.ChunkedArray) -> None:
        is_timestamp = pa.types.is_timestamp(time.type)
        (self.timestamp_files if is_timestamp else self.number_files)[file] = None
        values = (time.cast(pa.int64()) if is_timestamp else time).to_numpy()
        for unit, (least, above) in UNITS.items() if not is_timestamp else ():
            inside = (values >= least) & (values < above)
            if unit not in self.units and inside.any():
                self.units[unit] = file, values[inside.argmax()].item()
        self.column = self.column or self.scratch.growing(np.int64)
        if not self.runs or self.runs[-1][1] != values.dtype.kind:
            self.runs.append((self.column.rows, values.dtype.kind))
        self.column.append(values.view(np.int64))

    def finish(self) -> np.ndarray | None:
        """The column: float64 if some times are fractions, else int64.

        Raises:
            InputError: some files have timestamps and others numbers (one of each is named), or numbers are of
                different units.
        """
        if len(self.units) > 1:
            found = "; ".join(f"{unit} in {file} ({value:.0f})" for unit, (file, value) in self.units.items())
            raise InputError(f"times look like {found}; write them in one unit")
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
