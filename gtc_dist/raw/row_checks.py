"""Values of raw interactions by role: which cannot be used and why, and the usable ones in their normalised types.

Roles: user, item, time, rating, weight, event, label. Columns of CSV and TSV arrive as bytes, others in a type of the
file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.raw import ids
from gtc_dist.raw.interaction_file import InteractionFile

TIMESTAMP = pa.timestamp("us")
NOT_UTF8 = "is not UTF-8 text (write the file as UTF-8)"
Convert = Callable[[pa.Array], pa.Array]


@dataclass(frozen=True)
class UsableValues:
    """Values of a column that can be used.

    values: [n], ids as text or integers of the file's type, times int64, float64 or timestamp[us], ratings and weights
    of rows and events float64, splits int8. at: int64 [n], their positions in the column. problems: what is wrong with
    the others, and their positions.
    """

    values: pa.Array
    at: np.ndarray
    problems: list[tuple[str, np.ndarray]]


def usable_values(file: InteractionFile, role: str, column: pa.Array) -> UsableValues:
    """Check and convert a column."""
    at, problems = np.arange(len(column)), []
    for problem, find, then in _checks(file, role, column.type):
        bad = find(column)
        if len(bad):
            problems.append((problem, at[bad]))
            kept = np.delete(np.arange(len(column)), bad)
            at, column = at[kept], column.take(pa.array(kept))
        column = then(column)
    return UsableValues(column, at, problems)


def _checks(file: InteractionFile, role: str, type: pa.DataType) -> list[tuple[str, Callable, Convert]]:
    """What may be wrong in a column: words for it, a function that finds positions, and what then becomes of the other
    values."""
    is_text = pa.types.is_binary(type)
    checks: list[tuple[str, Callable, Convert]] = [("is null", _where(pc.is_null), _unchanged)]
    if is_text:
        checks.append((NOT_UTF8, refused(_to_text), _to_text))
        checks.append(("is empty", _where(lambda text: pc.equal(text, "")), _unchanged))
    if role in ("user", "item"):
        plain = file.types[role]
        if ids.is_text(plain):
            if not is_text:
                checks.append((NOT_UTF8, refused(lambda text: text.validate(full=True)), lambda text: text.cast(plain)))
                checks.append(("is empty", _where(lambda text: pc.equal(text, pa.scalar("", text.type))), _unchanged))
            nul = _where(lambda text: pc.match_substring(text, "\0"))
            checks.append(("holds a NUL byte", nul, _unchanged))
        return checks if ids.is_text(plain) else [*checks, ("", _nowhere, lambda column: column.cast(plain))]
    if role in ("event", "label"):
        key, meanings, type = "data.split.labels", file.labels, pa.int8()
        if role == "event":
            key, meanings, type = "data.interactions.event_weights", file.events, pa.float64()
        known, meaning = pa.array(list(meanings), pa.string()), pa.array(list(meanings.values()), type)
        unknown = _where(lambda text: pc.invert(pc.is_in(_label_text(text), known)))
        problem = f"is not in {key} ({', '.join(known.to_pylist())})"
        return [*checks, (problem, unknown, lambda text: meaning.take(pc.index_in(_label_text(text), known)))]
    convert = time_converter(file.types["time"]) if role == "time" else _to_float
    if is_text and role == "time" and not is_number(file.types["time"]):
        has_zone = file.types["time"].tz is not None
        problem = f"has {'no' if has_zone else 'a'} time zone, other times have {'one' if has_zone else 'none'}"
        other = time_converter(pa.timestamp("us", None if has_zone else "UTC"))
        checks.append((problem, _refused_but_accepted(convert, other), _unchanged))
    what = "a timestamp" if role == "time" and not is_number(file.types["time"]) else "a number"
    checks += [
        (f"is not {what}" if is_text else "is out of range", refused(convert), convert),
        ("is NaN", _of_floats(pc.is_nan), _unchanged),
        ("is infinite", _of_floats(pc.is_inf), _unchanged),
    ]
    if role == "weight":
        checks.append(("is not above 0", _where(lambda weights: pc.less_equal(weights, 0.0)), _unchanged))
    return checks


def refused(convert: Convert) -> Callable[[pa.Array], np.ndarray]:
    """Function that finds the values for which `convert` raises ArrowInvalid: positions int64."""
    return lambda column: ids.refused_positions(column, convert)


def _refused_but_accepted(convert: Convert, other: Convert) -> Callable[[pa.Array], np.ndarray]:
    """Function that finds the values for which `convert` raises ArrowInvalid, and `other` does not."""

    def find(column: pa.Array) -> np.ndarray:
        positions = refused(convert)(column)
        return np.delete(positions, refused(other)(column.take(pa.array(positions))))

    return find


def time_converter(type: pa.DataType) -> Convert:
    """Function that turns times of a file, whose type is this one, into int64, float64 or timestamp[us]. It raises
    ArrowInvalid for what is no time, and for times out of range, such as nanoseconds that are declared as milliseconds.
    """
    return _to_number if is_number(type) else lambda column: _to_timestamp(column, type)


def is_number(type: pa.DataType) -> bool:
    return pa.types.is_integer(type) or pa.types.is_floating(type)


def _to_number(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        return column.cast(pa.float64())
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        if not pa.types.is_string(column.type):
            raise
        return _to_float(column)


def _to_timestamp(column: pa.Array, type: pa.DataType) -> pa.Array:
    if pa.types.is_string(column.type):
        zone = getattr(type, "tz", None)
        try:
            column = column.cast(pa.timestamp("us", zone))
        except pa.ArrowInvalid:
            column = pc.utf8_trim_whitespace(column).cast(pa.timestamp("ns", zone))
    if column.type == pa.date32() or column.type == pa.date64():
        column = column.cast(pa.timestamp("ms"))
    microseconds = pc.CastOptions(pa.timestamp("us", column.type.tz), allow_time_truncate=True)
    return column.cast(options=microseconds).cast(TIMESTAMP)


def _to_float(column: pa.Array) -> pa.Array:
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        if not pa.types.is_string(column.type):
            raise
        return pc.utf8_trim_whitespace(column).cast(pa.float64())


def _to_text(column: pa.Array) -> pa.Array:
    return column.cast(pa.string())


def _label_text(column: pa.Array) -> pa.Array:
    """Labels and kinds of events as text; 1.0 equals 1."""
    return pc.replace_substring_regex(column.cast(pa.string()), r"^(-?[0-9]+)\.0+$", r"\1")


def _unchanged(column: pa.Array) -> pa.Array:
    return column


def _nowhere(column: pa.Array) -> np.ndarray:
    return np.empty(0, np.int64)


def _where(mask_of: Callable[[pa.Array], pa.Array]) -> Callable[[pa.Array], np.ndarray]:
    """Function that finds the positions of a mask's true values, int64."""

    def find(column: pa.Array) -> np.ndarray:
        mask = mask_of(column)
        if not pc.any(mask).as_py():  # hardly a block has one
            return np.empty(0, np.int64)
        return np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False))

    return find


def _of_floats(mask_of: Callable[[pa.Array], pa.Array]) -> Callable[[pa.Array], np.ndarray]:
    found = _where(mask_of)
    return lambda column: found(column) if pa.types.is_floating(column.type) else _nowhere(column)
