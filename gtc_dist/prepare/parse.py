"""Parse one raw interaction file into normalised Arrow tables.

`inspect_table` checks a file's columns and types before Ray starts. `read_table_file`, run in a Ray task, yields tables
with the columns user and item and, if configured, time, rating and split.

Column names may have a type suffix (`user_id:token`), as in RecBole's files. Ids of CSV and TSV files are integers if
all ids of a block are canonical decimal integers, else strings. Messages count data rows from 1.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.errors import InputError
from gtc_dist.prepare import ids
from gtc_dist.prepare.interaction_file import (
    InteractionFile,
    format_of,
    numbered_batches,
    read_first_block,
    read_schema,
    readable,
)

TIMESTAMP = pa.timestamp("us")


def inspect_table(
    uri: str,
    roles: dict[str, str],
    format: str = "auto",
    split: int | None = None,
    labels: dict[str, int] | None = None,
) -> InteractionFile:
    """Check that a file is readable and has the columns with usable types.

    Args:
        uri: the file.
        roles: role -> name of its column.
        format: as in the configuration; auto depends on the file's name.

    Raises:
        InputError: names the file, the column, the problem and the remedy.
    """
    format = format_of(uri) if format == "auto" else format
    file = InteractionFile(uri, format, uri.endswith(".gz"), {}, {}, split, labels or {})
    schema = read_schema(file)
    columns = {role: _find_column(uri, name, schema.names) for role, name in roles.items()}
    types = {role: _read_type(file, role, name, schema.field(name).type) for role, name in columns.items()}
    return replace(file, columns=columns, types=types)


def read_table_file(file: InteractionFile) -> Iterator[pa.Table]:
    """Yield the file's rows as tables: user, item (integer or string), time (int64, float64 or timestamp[us]), split
    (int8) and rating (float64).

    Raises:
        InputError: a null or invalid value (its row is named), or a broken file.
    """
    for first_row, table in numbered_batches(file):
        with readable(file, first_row):
            rows = _normalise(file, table, first_row)
        yield rows


def _find_column(uri: str, wanted: str, found: list[str]) -> str:
    matches = [name for name in found if name == wanted] or [n for n in found if n.partition(":")[0] == wanted]
    if len(matches) == 1:
        return matches[0]
    problem = "has no column" if not matches else f"has {len(matches)} columns named"
    hint = "name it under data.interactions"
    if len(found) == 1 and (mark := re.search(r"[;|\t,]", found[0])):
        hint = f"one column that holds {mark[0]!r}: CSV is separated by commas, TSV by tabs"
    raise InputError(f"{uri} {problem} {wanted!r}; columns found: {', '.join(found)} ({hint})")


def _read_type(file: InteractionFile, role: str, name: str, found: pa.DataType) -> pa.DataType:
    """The type to read a column as. Raises InputError if its type does not fit the role."""
    usable: pa.DataType | None
    number = pa.types.is_integer(found) or pa.types.is_floating(found)
    if role in ("user", "item"):
        if file.format == "jsonl":  # Arrow reads strings that look like timestamps as such
            usable = pa.string() if pa.types.is_timestamp(found) else ids.plain_type(found)
        else:
            usable = pa.string() if file.is_text else ids.plain_type(found)
        expected = "integers or strings"
    elif role == "time":
        usable = found if number or pa.types.is_timestamp(found) or pa.types.is_date(found) else None
        expected = "numbers or timestamps"
    elif role == "rating":
        usable, expected = (pa.float64() if number or pa.types.is_decimal(found) else None), "numbers"
    else:
        label = ids.plain_type(found) is not None or pa.types.is_floating(found)
        usable, expected = (found if file.has_typed_ids else pa.string()) if label else None, "labels"
    if pa.types.is_null(found) and file.is_text:  # the first block has no value, so the type is unknown
        usable = pa.string() if role in ("user", "item", "label") else pa.float64()
    if usable is None:
        example = "" if file.has_typed_ids or not pa.types.is_string(found) else _first_non_number(file, name)
        raise InputError(f"{file.uri}: column {name!r} ({role}) has type {found}{example}; expected {expected}")
    return usable


def _first_non_number(file: InteractionFile, name: str) -> str:
    """The first value of a text column that is not a number, and its row; empty if it is not in the first block."""
    column = read_first_block(file).column(name)
    try:
        column.cast(pa.float64())
    except pa.ArrowInvalid:
        row = ids.first_refused(column, lambda part: part.cast(pa.float64()))
        return f" ({column[row].as_py()!r} in row {row + 1})"
    return ""


def _normalise(file: InteractionFile, table: pa.Table, first_row: int) -> pa.Table:
    """Columns named by role, in their normalised types. Raises InputError for a null or invalid value."""
    out = {}
    for role, name in file.columns.items():
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # combine_chunks of a column without chunks
            column = pa.array([], column.type)
        if role in ("user", "item"):
            column = column.cast(file.types[role])
        bad, problem = ids.first_bad(column) if role in ("user", "item") else _first_bad(column)
        if bad is not None:
            raise InputError(f"{file.uri}: column {name!r} {problem} in row {first_row + bad}")
        if role in ("user", "item"):
            out[role] = column if file.has_typed_ids else ids.from_text(column)
        elif role == "label":
            out["split"] = _label_splits(file, name, column, first_row)
        else:
            convert = _to_time if role == "time" else _to_float
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
    """Position of the first null, NaN or infinite time, rating or label, and the problem; (None, "") if none is."""
    missing, infinite = column.is_null(), None
    if pa.types.is_floating(column.type):
        missing = pc.or_(missing, pc.fill_null(pc.is_nan(column), False))
        infinite = _first_true(pc.is_inf(column))
    bad = _first_true(missing)
    if bad is not None:
        return bad, "is null or empty"
    return (None, "") if infinite is None else (infinite, "is infinite")


def _first_true(mask: pa.Array) -> int | None:
    found = pc.index(mask, pa.scalar(True)).as_py()
    return None if found < 0 else found


def _to_float(column: pa.Array) -> pa.Array:
    return column.cast(pa.float64())


def _to_time(column: pa.Array) -> pa.Array:
    """Times as int64, float64 or timestamp[us]. Raises ArrowInvalid for times out of range, such as nanoseconds that
    are declared as milliseconds."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if pa.types.is_floating(column.type):
        return column.cast(pa.float64())
    if column.type == pa.date32() or column.type == pa.date64():
        column = column.cast(pa.timestamp("ms"))
    microseconds = pc.CastOptions(pa.timestamp("us", column.type.tz), allow_time_truncate=True)
    return column.cast(options=microseconds).cast(TIMESTAMP)


def _label_splits(file: InteractionFile, name: str, column: pa.Array, first_row: int) -> pa.Array:
    """Split of each row, int8. Raises InputError for an unknown label."""
    texts = pc.replace_substring_regex(column.cast(pa.string()), r"^(-?[0-9]+)\.0+$", r"\1")  # 1.0 equals 1
    splits = np.full(len(texts), -1, np.int8)
    for text, split in file.labels.items():
        splits[pc.equal(texts, text).to_numpy(zero_copy_only=False)] = split
    bad = np.flatnonzero(splits < 0)
    if len(bad):
        raise InputError(
            f"{file.uri}: label {texts[bad[0]].as_py()!r} in column {name!r}, row {first_row + bad[0]}, is not in "
            f"data.split.labels ({', '.join(file.labels)})"
        )
    return pa.array(splits)
