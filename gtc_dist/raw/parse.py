"""Parse one raw interaction file into normalised Arrow tables.

`inspect_table` checks a file's columns, types and first rows before Ray starts. `read_table_file`, run in a Ray task,
yields tables with the columns user and item and, if configured, time, rating, weight, event and split.

Column names may have a type suffix (`user_id:token`), as in RecBole's files. Ids of CSV and TSV files are integers if
all ids of a block are canonical decimal integers, else strings.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from gtc_dist.errors import InputError
from gtc_dist.raw import ids
from gtc_dist.raw.bad_rows import BadRows, first_line
from gtc_dist.raw.interaction_file import (
    InteractionFile,
    format_of,
    guessed_separator,
    numbered_batches,
    read_first_block,
    read_schema,
    readable,
)
from gtc_dist.raw.json_rows import checked_json_tables, schema_of_most_lines
from gtc_dist.raw.row_checks import is_number, refused, time_converter, usable_values

SAMPLE_VALUES = 1000  # values that decide whether a text column holds numbers or timestamps
TIME_TYPES = (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))


def inspect_table(uri: str, roles: dict[str, str], format: str = "auto", **options) -> InteractionFile:
    """Check that a file is readable and has the columns with usable types, and the first rows of a text file.

    Args:
        uri: the file.
        roles: role -> name of its column.
        format: as in the configuration; auto depends on the file's name.
        options: further attributes of `InteractionFile`.

    Raises:
        InputError: names the file, the column or the rows, the problem and the remedy.
    """
    format = format_of(uri) if format == "auto" else format
    file = InteractionFile(uri, format, uri.endswith(".gz"), {}, {}, **options)
    schema = _schema(file, list(roles.values()))
    columns = {role: _find_column(file, name, schema.names) for role, name in roles.items()}
    types = {role: _read_type(file, role, name, schema.field(name).type) for role, name in columns.items()}
    file = replace(file, columns=columns, types=types)
    if file.names and first_line(file).split(file.delimiter) == list(file.names):
        raise InputError(f"{uri} has a header line, which names its columns; remove data.interactions.columns")
    if file.is_text and not file.skip:
        bad = BadRows(file)
        tables = checked_tables(file, bad)
        next(tables, None)
        if bad.count:  # then all bad rows of the file are worth a look
            while not bad.are_enough and next(tables, None) is not None:
                pass
            bad.refuse()
    return file


def read_table_file(file: InteractionFile) -> Iterator[pa.Table]:
    """Yield the file's rows as tables: user, item (integer or string), time (int64, float64 or timestamp[us]), split
    (int8), rating, weight and event (float64); and, at the end, a table of the rows left out (`bad_rows.REJECTED`).

    Raises:
        InputError: bad rows, unless they are left out, or a broken file.
    """
    bad = BadRows(file)
    for table in checked_tables(file, bad):
        if file.skip or not bad.count:
            yield table
        elif bad.are_enough:
            break
    if not file.skip:
        bad.refuse()
    elif bad.count:
        yield bad.table()


def checked_tables(file: InteractionFile, bad: BadRows) -> Iterator[pa.Table]:
    """Tables of the usable rows; the others go to `bad`. Raises InputError for a broken file."""
    if file.format == "jsonl":
        yield from checked_json_tables(file, bad, functools.partial(_normalise, file))
        return
    for first_row, numbers, table in tables_of_fitting_rows(file, bad):
        with readable(file, first_row):
            rows = _normalise(file, table, numbers, bad)
        yield rows


def tables_of_fitting_rows(file: InteractionFile, bad: BadRows) -> Iterator[tuple[int, np.ndarray, pa.Table]]:
    """Tables of CSV, TSV or Parquet, each after the number of its first row and the numbers of all as in `BadRows`,
    int64 [rows]. Rows of CSV and TSV with another number of columns go to `bad`; the values of the others are bytes.
    Raises InputError for a broken file."""
    misfits, drained = [] if file.is_csv else None, 0
    header = int(file.is_csv and not file.names)
    for first_row, table in itertools.chain(numbered_batches(file, misfits), [(0, None)]):
        for row in (misfits or [])[drained:]:
            columns = "1 column" if row.actual_columns == 1 else f"{row.actual_columns} columns"
            bad.add(row.number, f"has {columns}, expected {row.expected_columns}")
        drained = len(misfits or [])
        if table is not None:
            numbers = first_row + header + np.arange(table.num_rows)
            if misfits:
                before = np.array([row.number for row in misfits]) - header - 1 - np.arange(len(misfits))
                numbers += np.searchsorted(before, numbers - header - 1, side="right")
            yield first_row, numbers, table


def _schema(file: InteractionFile, names: list[str]) -> pa.Schema:
    """Column names and types of a file; those of most lines where the first lines of JSON do not fit each other."""
    try:
        return read_schema(file)
    except InputError:
        schema = schema_of_most_lines(file, names) if file.format == "jsonl" else None
        if schema is None:
            raise
        return schema


def _find_column(file: InteractionFile, wanted: str, found: list[str]) -> str:
    matches = [name for name in found if name == wanted] or [n for n in found if n.partition(":")[0] == wanted]
    if len(matches) == 1:
        return matches[0]
    problem = "has no column" if not matches else f"has {len(matches)} columns named"
    hint = "name it under data.interactions"
    if mark := guessed_separator(found):
        hint = f"one column that holds {mark!r}: CSV is separated by commas, TSV by tabs; set "
        hint += f"data.interactions.separator={mark!r}"
    elif file.is_csv and not file.names and any(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in found):
        hint = "looks like a file without a header line; name its columns: data.interactions.columns=[user_id, item_id"
        hint += ", ...]"
    raise InputError(f"{file.uri} {problem} {wanted!r}; columns found: {', '.join(found)} ({hint})")


def _read_type(file: InteractionFile, role: str, name: str, found: pa.DataType) -> pa.DataType:
    """The type to read a column as. Raises InputError if its type does not fit the role."""
    usable: pa.DataType | None
    number = is_number(found)
    is_time = number or pa.types.is_timestamp(found) or pa.types.is_date(found)
    if file.is_csv:  # everything is text, and every value is checked
        if role == "time":
            return found if is_time else _type_of_times(file, name)
        return pa.float64() if role in ("rating", "weight") else pa.string()
    if role in ("user", "item"):
        if file.format == "jsonl":  # Arrow reads strings that look like timestamps as such
            usable = pa.string() if pa.types.is_timestamp(found) else ids.plain_type(found)
        else:
            usable = ids.plain_type(found)
        expected = "integers or strings"
    elif role == "time":
        usable, expected = found if is_time else None, "numbers or timestamps"
    elif role in ("rating", "weight"):
        usable, expected = (pa.float64() if number or pa.types.is_decimal(found) else None), "numbers"
    else:
        label = ids.plain_type(found) is not None or pa.types.is_floating(found)
        usable, expected = found if label else None, "labels"
    if pa.types.is_null(found) and file.is_text:  # the first block has no value, so the type is unknown
        usable = pa.string() if role in ("user", "item", "label", "event") else pa.float64()
    if usable is None:
        raise InputError(f"{file.uri}: column {name!r} ({role}) has type {found}; expected {expected}")
    return usable


def _type_of_times(file: InteractionFile, name: str) -> pa.DataType:
    """The type that most values at the head of a text column have, where some are no times. Raises InputError if none
    is a time."""
    column = read_first_block(file).column(name).slice(0, SAMPLE_VALUES).cast(pa.string()).drop_null()
    failures = [len(refused(time_converter(type))(column)) for type in TIME_TYPES]
    if len(column) and min(failures) == len(column) and not file.skip:
        raise InputError(
            f"{file.uri}: column {name!r} (time): {column[0].as_py()!r} is not a time that can be read; write times as "
            "numbers, such as seconds since 1970, or as 2024-05-31 10:00:00 or 2024-05-31T10:00:00Z"
        )
    return TIME_TYPES[int(np.argmin(failures))]


def _normalise(file: InteractionFile, table: pa.Table, numbers: np.ndarray, bad: BadRows) -> pa.Table:
    """Columns named by role, in their normalised types, of the usable rows; the others go to `bad`, by these numbers
    int64 [rows]."""
    found, problems = {}, {}
    for role, name in file.columns.items():
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # combine_chunks of a column without chunks
            column = pa.array([], column.type)
        found[role] = usable_values(file, role, column)
        for problem, positions in found[role].problems:
            for position in positions.tolist():
                problems.setdefault(position, f"column {name!r} ({role}){_shown(column[position])} {problem}")
    for position, problem in sorted(problems.items()):
        bad.add(int(numbers[position]), problem)
    good = np.delete(np.arange(table.num_rows), np.fromiter(problems, np.int64, len(problems)))
    out = {}
    for role, usable in found.items():
        values = usable.values
        if len(usable.at) > len(good):
            values = values.take(pa.array(np.searchsorted(usable.at, good)))
        is_text_id = role in ("user", "item") and not file.has_typed_ids
        out["split" if role == "label" else role] = ids.from_text(values) if is_text_id else values
    if file.split is not None:
        out["split"] = pa.array(np.full(len(good), file.split, np.int8))
    return pa.table(out)


def _shown(scalar: pa.Scalar) -> str:
    """A value for a message; nothing where the problem says it all."""
    try:
        value = scalar.as_py()
    except (OverflowError, ValueError):  # a time that Python does not hold
        return ""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    is_plain = value is None or value == "" or (isinstance(value, float) and not np.isfinite(value))
    return "" if is_plain else f": {value if isinstance(value, int | float) else str(value)!r}"
