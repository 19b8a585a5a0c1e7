"""One raw interaction file -> normalised Arrow tables, streamed.

`inspect_features` looks at a file's name and head (before Ray starts) and fixes how to read it; `read_feature_chunk` then yields tables with
the columns user, item and, as far as asked for, time, rating and split, whatever the file's format:

    Parquet, CSV, TSV (.tsv, .inter), JSON lines; each plain or gzipped (.gz), local or in object storage.

A column may carry a type suffix (`user_id:token`), as in RecBole's files. Ids of text files are integers where every
one is written as a plain integer, else strings. The first row of data is row 1 in messages of this module.
"""

import codecs
import io
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.prepare import ids

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".inter": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
BLOCK_BYTES = 8 << 20  # of text parsed at once
BATCH_ROWS = 1 << 19  # of Parquet read at once
INSTANT = pa.timestamp("us")
NULL_LINE = re.compile(rb"\n(?:\xef\xbb\xbf)?[ \t\r]*null")


@dataclass(frozen=True)
class RawFile:
    """How to read one raw file.

    Attributes:
        columns: role (user, item, time, rating, label) -> the column's name in this file.
        types: role -> type to read it as.
        split: the split that all its rows belong to (0 train, 1 valid, 2 test), or None.
        labels: text of a label -> split, for files with a label column.
    """

    uri: str
    format: str
    gzipped: bool
    columns: dict[str, str]
    types: dict[str, pa.DataType]
    split: int | None = None
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        return self.format != "parquet"


def inspect_tables(
    uri: str,
    roles: dict[str, str],
    format: str = "auto",
    split: int | None = None,
    labels: dict[str, int] | None = None,
) -> RawFile:
    """Check that a file exists, can be read and has the columns, with types that serve.

    Args:
        uri: the file.
        roles: role -> name of its column.
        format: as in the config; auto goes by the file's name.

    Raises:
        InputError: with the file, the column, what was found and what to do.
    """
    gzipped = uri.endswith(".gz")
    if format == "auto":
        extension = posixpath.splitext(uri.removesuffix(".gz"))[1].lower()
        if extension not in FORMATS:
            raise InputError(
                f"{uri}: the name does not tell the format (known: {', '.join(FORMATS)}, and each with .gz); "
                "set data.interactions.format"
            )
        format = FORMATS[extension]
    head = RawFile(uri, format, gzipped, {}, {}, split, labels or {})
    schema = _schema(head)
    columns = {role: _find_column(uri, name, schema.names) for role, name in roles.items()}
    types = {role: _read_type(head, role, name, schema.field(name).type) for role, name in columns.items()}
    return RawFile(uri, format, gzipped, columns, types, split, labels or {})


def read_table_file(file: RawFile) -> Iterator[pa.Table]:
    """Yield the file's rows as tables: user, item (integer or string), time (int64, float64 or timestamp[us]), split
    (int8) and rating (float64). Raises InputError for a null or unusable value (named by row) and a broken file."""
    first_row, batches = 1, _batches(file)
    while True:
        with _readable(file, first_row):
            table = next(batches, None)
            if table is None:
                return
            rows = _normalise(file, table, first_row)
        yield rows
        first_row += table.num_rows


def _find_column(uri: str, wanted: str, found: list[str]) -> str:
    matches = [name for name in found if name == wanted] or [n for n in found if n.partition(":")[0] == wanted]
    if len(matches) == 1:
        return matches[0]
    problem = "has no column" if not matches else f"has {len(matches)} columns named"
    hint = "name it under data.interactions"
    if len(found) == 1 and (mark := re.search(r"[;|\t,]", found[0])):
        hint = f"one column that holds {mark[0]!r}: CSV is separated by commas, TSV by tabs"
    raise InputError(f"{uri} {problem} {wanted!r}; columns found: {', '.join(found)} ({hint})")


def _read_type(file: RawFile, role: str, name: str, found: pa.DataType) -> pa.DataType:
    """The type to read a column as; refuses one that cannot play its role."""
    usable: pa.DataType | None
    if role in ("user", "item"):
        if file.format == "jsonl":  # JSON's own quotes tell integers from strings
            usable = pa.string() if pa.types.is_timestamp(found) else ids.plain_type(found)
        else:
            usable = pa.string() if file.is_text else ids.plain_type(found)
        need = "integers or strings"
    elif role == "time":
        number = pa.types.is_integer(found) or pa.types.is_floating(found)
        usable = found if number or pa.types.is_timestamp(found) or pa.types.is_date(found) else None
        need = "numbers or timestamps"
    elif role == "rating":
        number = pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
        usable, need = (pa.float64() if number else None), "numbers"
    else:
        label = ids.plain_type(found) is not None or pa.types.is_floating(found)
        usable, need = (pa.string() if file.format in ("csv", "tsv") else found) if label else None, "labels"
    if pa.types.is_null(found) and file.is_text:  # nothing in the file's head, so nothing known
        usable = pa.string() if role in ("user", "item", "label") else pa.float64()
    if usable is None:
        found_in = _not_a_number(file, name) if file.format in ("csv", "tsv") and pa.types.is_string(found) else ""
        raise InputError(f"{file.uri}: column {name!r} ({role}) has type {found}{found_in}; {need} are needed")
    return usable


def _not_a_number(file: RawFile, name: str) -> str:
    """Where a text column's first value lies that is no number; nothing if that is beyond the head of the file."""
    with (
        _readable(file),
        pa.csv.open_csv(_open(file), read_options=_csv_blocks(), parse_options=_csv_rows(file)) as csv,
    ):
        column = csv.read_next_batch().column(name)
        try:
            column.cast(pa.float64())
        except pa.ArrowInvalid:
            row = ids.first_refused(column, lambda part: part.cast(pa.float64()))
            return f" ({column[row].as_py()!r} in row {row + 1})"
    return ""


def _normalise(file: RawFile, table: pa.Table, first_row: int) -> pa.Table:
    out = {}
    for role, name in file.columns.items():
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # combine_chunks of no chunk at all
            column = pa.array([], column.type)
        if role in ("user", "item"):
            column = column.cast(file.types[role])
        bad, problem = ids.first_bad(column) if role in ("user", "item") else _first_bad(column)
        if bad is not None:
            raise InputError(f"{file.uri}: column {name!r} {problem} in row {first_row + bad}")
        if role in ("user", "item"):
            out[role] = ids.from_text(column) if file.format in ("csv", "tsv") else column
        elif role == "label":
            out["split"] = _label_splits(file, name, column, first_row)
        else:
            convert = _moment if role == "time" else _number
            try:
                out[role] = convert(column)
            except pa.ArrowInvalid as error:
                row = first_row + ids.first_refused(column, convert)
                raise InputError(
                    f"{file.uri}: column {name!r} ({role}) is out of range in row {row}: {error}"
                ) from error
    if file.split is not None:
        out["split"] = pa.array(np.full(table.num_rows, file.split, np.int8))
    return pa.table(out)


def _first_bad(column: pa.Array) -> tuple[int | None, str]:
    """Position of the first value that is no time, rating or label, and why; (None, "") if there is none."""
    missing, infinite = column.is_null(), None
    if pa.types.is_floating(column.type):
        missing = pc.or_(missing, pc.fill_null(pc.is_nan(column), False))
        infinite = _first(pc.is_inf(column))
    bad = _first(missing)
    if bad is not None:
        return bad, "is null or empty"
    return (None, "") if infinite is None else (infinite, "is infinite")


def _number(column: pa.Array) -> pa.Array:
    return column.cast(pa.float64())


def _moment(column: pa.Array) -> pa.Array:
    """Times as int64, float64 or timestamp[us]. Raises ArrowInvalid beyond their range, such as for nanoseconds that
    are marked as milliseconds."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if pa.types.is_floating(column.type):
        return column.cast(pa.float64())
    if column.type == pa.date32() or column.type == pa.date64():
        column = column.cast(pa.timestamp("ms"))
    within = pc.CastOptions(pa.timestamp("us", column.type.tz), allow_time_truncate=True)
    return column.cast(options=within).cast(INSTANT)


def _label_splits(file: RawFile, name: str, column: pa.Array, first_row: int) -> pa.Array:
    texts = pc.replace_substring_regex(column.cast(pa.string()), r"^(-?[0-9]+)\.0+$", r"\1")  # 1.0 is 1
    splits = np.full(len(texts), -1, np.int8)
    for text, split in file.labels.items():
        splits[pc.equal(texts, text).to_numpy(zero_copy_only=False)] = split
    bad = np.flatnonzero(splits < 0)
    if len(bad):
        raise InputError(
            f"{file.uri}: label {texts[bad[0]].as_py()!r} in column {name!r}, row {first_row + bad[0]}, is none of "
            f"data.split.train_label, valid_label, test_label ({', '.join(file.labels)})"
        )
    return pa.array(splits)


def _first(mask: pa.Array) -> int | None:
    """Position of the first true value."""
    found = pc.index(mask, pa.scalar(True)).as_py()
    return None if found < 0 else found


def _schema(file: RawFile) -> pa.Schema:
    with _readable(file):
        if file.format == "parquet":
            return pq.ParquetFile(_open(file)).schema_arrow
        _check_encoding(file)
        if file.format == "jsonl":
            with pa.json.open_json(_open(file), read_options=_json_blocks()) as reader:
                schema = reader.schema
        else:
            with pa.csv.open_csv(_open(file), read_options=_csv_blocks(), parse_options=_csv_rows(file)) as reader:
                schema = reader.schema
        schema.names  # noqa: B018 - raises here if they are not UTF-8
        return schema


def _check_encoding(file: RawFile) -> None:
    """Refuse text that Arrow would read as something else. Raises InputError."""
    head = _open(file).read(1 << 12)
    if head.startswith(b"\x1f\x8b"):
        raise InputError(f"{file.uri} is gzipped{' twice' if file.gzipped else ', but its name does not end in .gz'}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        raise InputError(f"{file.uri} has NUL bytes, as UTF-16 or a broken file has; write it as UTF-8")


def _batches(file: RawFile) -> Iterator[pa.Table]:
    names = list(dict.fromkeys(file.columns.values()))
    types = {name: file.types[role] for role, name in file.columns.items()}
    if file.format == "parquet":
        batches = pq.ParquetFile(_open(file)).iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False)
    elif file.format == "jsonl":
        rows = pa.json.ParseOptions(
            explicit_schema=pa.schema(list(types.items())), unexpected_field_behavior="ignore", newlines_in_values=False
        )
        batches = pa.json.open_json(_open(file), read_options=_json_blocks(), parse_options=rows)
    else:
        convert = pa.csv.ConvertOptions(column_types=types, include_columns=names)
        batches = pa.csv.open_csv(
            _open(file), read_options=_csv_blocks(), parse_options=_csv_rows(file), convert_options=convert
        )
    for batch in batches:
        yield pa.Table.from_batches([batch])


@contextmanager
def _readable(file: RawFile, first_row: int = 1) -> Iterator[None]:
    """What Arrow says of a broken file becomes an InputError that names it.

    Args:
        first_row: number of the first row of the block that is read; in it Arrow counts the rows of JSON from 0.
    """
    try:
        with formats.parsing(file.uri, f"readable as {file.format}"):
            yield
    except InputError as error:
        if file.format != "jsonl" or not isinstance(error.__cause__, pa.ArrowInvalid):
            raise
        text = re.sub(r"in row (\d+)$", lambda row: f"in row {first_row + int(row[1])}", str(error))
        raise InputError(text) from error.__cause__


class _Lines:
    """A stream of JSON lines that refuses a line with null, on which Arrow's parser crashes (pyarrow 26)."""

    closed = False

    def __init__(self, uri: str, stream: pa.NativeFile):
        self.uri, self.stream, self.line, self.begun = uri, stream, 1, b"\n"

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        text = self.begun + data
        found = NULL_LINE.search(text)
        if found:
            line = self.line + text.count(b"\n", 1, found.end())
            raise InputError(f"{self.uri}: line {line} is null; one JSON object a line is needed")
        self.line += text.count(b"\n", 1)
        self.begun = b"\n" + text[text.rfind(b"\n") + 1 :].lstrip(b" \t\r")[:8]
        return data


def _open(file: RawFile) -> pa.NativeFile:
    stream = storage.open_input(file.uri)
    source = pa.PythonFile(stream, mode="r")
    if file.gzipped:
        source = pa.CompressedInputStream(source, "gzip")
    if file.format == "jsonl":
        return pa.PythonFile(_Lines(file.uri, source), mode="r")
    # Parquet is read from its end, so it has to be unpacked whole.
    return pa.PythonFile(io.BytesIO(source.read()), mode="r") if file.gzipped and file.format == "parquet" else source


def _csv_blocks() -> pa.csv.ReadOptions:
    return pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)


def _csv_rows(file: RawFile) -> pa.csv.ParseOptions:
    tab = file.format == "tsv"
    return pa.csv.ParseOptions(delimiter="\t" if tab else ",", newlines_in_values=not tab)


def _json_blocks() -> pa.json.ReadOptions:
    return pa.json.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
