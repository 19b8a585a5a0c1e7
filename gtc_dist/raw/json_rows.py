"""JSON lines whose bad rows are found one by one.

Arrow parses JSON fast, but stops at the first value of another type. So a file in which it finds one, and a file whose
bad rows are left out, are read by Python.
"""

import io
import json
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.json

from gtc_dist.errors import InputError
from gtc_dist.raw.bad_rows import BadRows, json_lines
from gtc_dist.raw.interaction_file import JSON_ARRAY, InteractionFile, numbered_batches, readable
from gtc_dist.raw.row_checks import NOT_UTF8, is_number

LINES = 1 << 16  # of a table
SAMPLE_LINES = 1000  # lines that decide what the columns hold
JSON_KINDS = {bool: "true or false", list: "a list", dict: "an object", str: "text", int: "a number", float: "a number"}


def checked_json_tables(
    file: InteractionFile, bad: BadRows, normalise: Callable[[pa.Table, np.ndarray, BadRows], pa.Table]
) -> Iterator[pa.Table]:
    """Tables of the usable rows; the others go to `bad`, by their number among the lines that are not blank.

    Args:
        normalise: checks and converts a table, given its rows' numbers and where bad rows go.

    Raises:
        InputError: a broken file in which no single row is to blame.
    """
    if file.skip:
        yield from _line_by_line(file, bad, normalise)
        return
    try:
        for first_row, table in numbered_batches(file):
            with readable(file, first_row):
                rows = normalise(table, first_row + np.arange(table.num_rows), bad)
            yield rows
    except InputError:
        again = BadRows(file)
        for _ in _line_by_line(file, again, normalise):
            if again.are_enough:
                break
        again.refuse()
        raise


def schema_of_most_lines(file: InteractionFile, names: list[str]) -> pa.Schema | None:
    """Column names and types of the lines at the head of a file whose columns `names` hold values of the same kinds as
    most others'; None if no line is a JSON object."""
    groups: dict[tuple, list[bytes]] = {}
    with readable(file):
        for number, text in islice(json_lines(file), SAMPLE_LINES):
            if number == 1 and JSON_ARRAY.match(text.rstrip() + b"{"):  # its last line may be an object
                return None
            found, problem = _parse(text)
            if not problem:
                groups.setdefault(tuple(type(found.get(name)) for name in names), []).append(text.strip())
        if not groups:
            return None
        lines = max(groups.values(), key=len)
        return pa.json.read_json(io.BytesIO(b"\n".join(lines))).schema


def _line_by_line(file: InteractionFile, bad: BadRows, normalise: Callable) -> Iterator[pa.Table]:
    with readable(file):
        lines = enumerate((text for _, text in json_lines(file)), start=1)
        schema = pa.schema([(name, file.types[role]) for role, name in file.columns.items()])
        while block := list(islice(lines, LINES)):
            rows, numbers = [], []
            for number, text in block:
                row, problem = _read_line(file, text)
                if problem:
                    bad.add(number, problem)
                else:
                    rows.append(row)
                    numbers.append(number)
            yield normalise(pa.Table.from_pylist(rows, schema), np.array(numbers, np.int64), bad)


def _read_line(file: InteractionFile, text: bytes) -> tuple[dict, str]:
    """Values by column, and what is wrong; "" if nothing is."""
    found, problem = _parse(text)
    if problem:
        return {}, problem
    row = {}
    for role, name in file.columns.items():
        value, kind = found.get(name), file.types[role]
        wanted = (int | float if role != "user" and role != "item" else int) if is_number(kind) else str
        if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
            what = "a fraction" if isinstance(value, float) and wanted is int else JSON_KINDS.get(value.__class__, "")
            return {}, f"column {name!r} ({role}) is {what}; the rows before have {_kind(wanted)}"
        try:
            row[name] = pa.scalar(value, pa.string() if pa.types.is_temporal(kind) else kind).cast(kind).as_py()
        except (pa.ArrowInvalid, OverflowError):
            return {}, f"column {name!r} ({role}): {value!r} is out of range"
    return row, ""


def _parse(text: bytes) -> tuple[dict, str]:
    """The object of a line, and what is wrong; "" if nothing is."""
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError:
        return {}, NOT_UTF8
    except ValueError as error:
        return {}, f"is not JSON ({getattr(error, 'msg', error)})"
    except RecursionError:
        return {}, "is not JSON (nested too deep)"
    if not isinstance(found, dict):
        return {}, f"is {JSON_KINDS.get(type(found), 'null')}; expected a JSON object"
    return found, ""


def _object(pairs: list[tuple]) -> dict:
    """Raises ValueError for a key that is there twice, as Arrow does."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} is there twice")
    return found


def _kind(wanted: type) -> str:
    return "text" if wanted is str else "integers" if wanted is int else "numbers"
