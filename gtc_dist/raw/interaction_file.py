"""Stream a raw interaction file as Arrow tables, whatever its format.

Formats: Parquet, CSV, TSV (.tsv, .inter) and JSON lines; plain or gzipped (.gz); local or in object storage.
"""

import codecs
import io
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.raw.csv_streams import UNIT, FittingRows, NotUtf8Error, OneByteSeparator, Utf8Stream

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
TEXT_BLOCK_BYTES = 8 << 20  # parsed at once
PARQUET_BATCH_ROWS = 1 << 19  # read at once
JSON_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
NULL_LINE = re.compile(rb"\n(?:\xef\xbb\xbf)?[ \t\r]*null")


@dataclass(frozen=True)
class InteractionFile:
    """How to read one raw file of interactions.

    Attributes:
        columns: role (user, item, time, rating, label) -> column name in this file.
        types: role -> Arrow type to read the column as.
        split: split of all rows (0 train, 1 valid, 2 test), or None.
        labels: label text -> split, for files with a label column.
        events: kind of event -> weight, for files with an event column.
        separator: text between the columns of CSV; "": that of the format.
        names: of the columns of CSV without a header line; (): the header names them.
        skip: leave bad rows out.
    """

    uri: str
    format: str
    gzipped: bool
    columns: dict[str, str]
    types: dict[str, pa.DataType]
    split: int | None = None
    labels: dict[str, int] = field(default_factory=dict)
    events: dict[str, float] = field(default_factory=dict)
    separator: str = ""
    names: tuple[str, ...] = ()
    skip: bool = False

    @property
    def is_csv(self) -> bool:
        return self.format in ("csv", "tsv")

    @property
    def delimiter(self) -> str:
        """Text between the columns of CSV or TSV."""
        return self.separator or ("\t" if self.format == "tsv" else ",")

    @property
    def is_text(self) -> bool:
        return self.format != "parquet"

    @property
    def has_typed_ids(self) -> bool:
        """Whether integers and strings are different in the file: JSON quotes strings, CSV and TSV do not."""
        return not self.is_csv


def format_of(uri: str) -> str:
    """The format that a file name indicates. Raises InputError for an unknown extension."""
    extension = posixpath.splitext(uri.removesuffix(".gz"))[1].lower()
    if extension not in FORMATS:
        raise InputError(
            f"{uri}: unknown file extension (known: {', '.join(FORMATS)}, each also with .gz); "
            "set data.interactions.format"
        )
    return FORMATS[extension]


def read_schema(file: InteractionFile) -> pa.Schema:
    """Column names and types; those of text files come from the first block. Raises InputError."""
    with readable(file):
        if file.format == "parquet":
            return pq.ParquetFile(open_stream(file)).schema_arrow
        _check_encoding(file)
        if file.format == "jsonl":
            with pa.json.open_json(open_stream(file), read_options=_json_options()) as reader:
                schema = reader.schema
        else:
            schema = _head_of_csv(file, lambda reader: reader.schema)
        schema.names  # noqa: B018 - raises for names that are not UTF-8
        return schema


def guessed_separator(names: list[str]) -> str:
    """What separates the columns where a reader found but one: a mark in its name, such as `;`; empty without one."""
    mark = re.search(r"::|[;|\t,]", names[0]) if len(names) == 1 else None
    return mark[0] if mark else ""


def with_separator(file: InteractionFile) -> InteractionFile:
    """The file with the separator that its header line shows, where that of its format gives but one column. Raises
    InputError."""
    return replace(file, separator=guessed_separator(read_schema(file).names)) if file.is_csv else file


def read_first_block(file: InteractionFile) -> pa.RecordBatch:
    """The first block of a CSV or TSV file, with inferred types; without rows if the file has none."""
    with readable(file):
        return _head_of_csv(file, lambda reader: next(reader, pa.RecordBatch.from_pylist([], reader.schema)))


def read_batches(file: InteractionFile, misfits: list | None = None) -> Iterator[pa.Table]:
    """Yield the columns of the file's roles, read as their types.

    Args:
        misfits: for CSV and TSV: takes the rows with another number of columns (`pyarrow.csv.InvalidRow`), which are
            left out; their `number` counts all rows, the header's too, from 1. The other rows' values then come as the
            bytes of the file, so that no value is an error. None: such a row and a value of another type are errors.
    """
    names = list(dict.fromkeys(file.columns.values()))
    types = {name: file.types[role] for role, name in file.columns.items()}
    if file.format == "parquet":
        reader = pq.ParquetFile(open_stream(file))
        batches = reader.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=names, use_threads=False)
    elif file.format == "jsonl":
        options = pa.json.ParseOptions(
            explicit_schema=pa.schema(list(types.items())), unexpected_field_behavior="ignore", newlines_in_values=False
        )
        batches = pa.json.open_json(open_stream(file), read_options=_json_options(), parse_options=options)
    else:
        types = types if misfits is None else dict.fromkeys(names, pa.binary())
        batches = _csv_batches(file, misfits, pa.csv.ConvertOptions(column_types=types, include_columns=names))
    for batch in batches:
        yield pa.Table.from_batches([batch])


def numbered_batches(file: InteractionFile, misfits: list | None = None) -> Iterator[tuple[int, pa.Table]]:
    """`read_batches` with the number of each table's first row, from 1, misfits not counted. Raises InputError for a
    broken file."""
    first_row, batches = 1, read_batches(file, misfits)
    while True:
        with readable(file, first_row):
            table = next(batches, None)
        if table is None:
            return
        yield first_row, table
        first_row += table.num_rows


@contextmanager
def readable(file: InteractionFile, first_row: int = 1) -> Iterator[None]:
    """Turn Arrow's errors about a broken file into an InputError with the file's name.

    Args:
        first_row: number of the first row of the current block; Arrow counts the rows of JSON from 0 in each block.
    """
    try:
        with formats.parsing(file.uri, f"readable as {file.format}"):
            yield
    except InputError as error:
        if file.format != "jsonl" or not isinstance(error.__cause__, pa.ArrowInvalid):
            raise
        text = re.sub(r"in row (\d+)$", lambda row: f"in row {first_row + int(row[1])}", str(error))
        raise InputError(text) from error.__cause__


def _check_encoding(file: InteractionFile) -> None:
    """Refuse text that Arrow would misread. Raises InputError."""
    head = open_stream(file).read(1 << 12)
    if head.startswith(b"\x1f\x8b"):
        raise InputError(f"{file.uri} is gzipped{' twice' if file.gzipped else ', but its name does not end in .gz'}")
    if file.format == "jsonl" and JSON_ARRAY.match(head):
        raise InputError(f"{file.uri} is one JSON array; write one object per line (JSON lines), without the brackets")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        raise InputError(f"{file.uri} has NUL bytes, as UTF-16 or a broken file has; write it as UTF-8")


class _JsonLines:
    """A stream of JSON lines that refuses a line with null, which crashes Arrow's parser (pyarrow 26)."""

    closed = False

    def __init__(self, uri: str, stream: pa.NativeFile):
        self.uri, self.stream, self.line, self.line_start = uri, stream, 1, b"\n"

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        text = self.line_start + data
        found = NULL_LINE.search(text)
        if found:
            line = self.line + text.count(b"\n", 1, found.end())
            raise InputError(f"{self.uri}: line {line} is null; expected one JSON object per line")
        self.line += text.count(b"\n", 1)
        self.line_start = b"\n" + text[text.rfind(b"\n") + 1 :].lstrip(b" \t\r")[:8]
        return data


def open_stream(file: InteractionFile) -> pa.NativeFile:
    """The bytes of a file, unpacked."""
    source = pa.PythonFile(storage.open_input(file.uri), mode="r")
    if file.gzipped:
        source = pa.CompressedInputStream(source, "gzip")
    if file.format == "jsonl":
        return pa.PythonFile(_JsonLines(file.uri, source), mode="r")
    if file.gzipped and file.format == "parquet":  # the footer is at the end, so the whole file must be unpacked
        return pa.PythonFile(io.BytesIO(source.read()), mode="r")
    return source


def _head_of_csv(file: InteractionFile, look: Callable[[pa.csv.CSVStreamingReader], Any]) -> Any:
    """What a look at a reader gives, misfits left out."""
    try:
        with _open_csv(file, []) as reader:
            return look(reader)
    except NotUtf8Error:
        with _open_csv(file, [], any_bytes=True) as reader:
            return look(reader)


def _csv_batches(
    file: InteractionFile, misfits: list | None, convert_options: pa.csv.ConvertOptions
) -> Iterator[pa.RecordBatch]:
    done = 0
    try:
        for batch in _open_csv(file, misfits, convert_options):
            yield batch
            done += batch.num_rows
    except NotUtf8Error:
        misfits.clear()
        for batch in _open_csv(file, misfits, convert_options, any_bytes=True):
            if batch.num_rows > done:
                yield batch.slice(done)
            done = max(done - batch.num_rows, 0)


def _open_csv(
    file: InteractionFile,
    misfits: list | None = None,
    convert_options: pa.csv.ConvertOptions | None = None,
    any_bytes: bool = False,
) -> pa.csv.CSVStreamingReader:
    """Args: misfits: as in `read_batches`. any_bytes: read with misfits what is not UTF-8, instead of NotUtf8Error."""
    delimiter, stream = file.delimiter, open_stream(file)
    if len(delimiter) > 1:
        stream, delimiter = pa.PythonFile(OneByteSeparator(stream, delimiter.encode()), mode="r"), UNIT.decode()
    if misfits is not None:
        rows = FittingRows(stream, delimiter, len(file.names), misfits) if any_bytes else Utf8Stream(stream)
        stream = pa.PythonFile(rows, mode="r")
    keep = None if misfits is None else lambda row: misfits.append(row) or "skip"
    return pa.csv.open_csv(
        stream,
        read_options=pa.csv.ReadOptions(
            use_threads=False, block_size=TEXT_BLOCK_BYTES, column_names=list(file.names) or None
        ),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if delimiter != UNIT.decode() else False,
            newlines_in_values=file.format == "csv",
            invalid_row_handler=keep,
        ),
        convert_options=convert_options,
    )


def _json_options() -> pa.json.ReadOptions:
    return pa.json.ReadOptions(use_threads=False, block_size=TEXT_BLOCK_BYTES)
