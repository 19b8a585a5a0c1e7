"""Ids of users and items: integers or strings of any width, kept in the Arrow type that they came in."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.errors import InputError

_SIGNED = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())


def plain_type(type: pa.DataType) -> pa.DataType | None:
    """The integer or string type in which ids of a column's type are kept; None if it cannot hold ids."""
    if pa.types.is_dictionary(type):
        return plain_type(type.value_type)
    if pa.types.is_integer(type) or pa.types.is_string(type) or pa.types.is_large_string(type):
        return type
    return pa.large_string() if pa.types.is_string_view(type) else None


def is_text(type: pa.DataType) -> bool:
    return not pa.types.is_integer(type)


def common_type(types: Mapping[str, pa.DataType], what: str) -> pa.DataType:
    """The one id type that holds those of all files: integers by the widest, strings by the larger offset.

    Args:
        types: file -> id type.
        what: names the ids in the error, such as `user ids`.

    Raises:
        InputError: some files have integers and others strings (one of each is named).
    """
    texts = [file for file, type in types.items() if is_text(type)]
    numbers = [file for file, type in types.items() if not is_text(type)]
    if texts and numbers:
        raise InputError(
            f"{what} are integers ({types[numbers[0]]}) in {numbers[0]} but strings in {texts[0]}; "
            "write them with one type"
        )
    found = set(types.values())
    if len(found) == 1:
        return found.pop()
    if texts:
        return pa.large_string()
    signed, unsigned = found & set(_SIGNED), found & set(_UNSIGNED)
    widest = max(t.bit_width for t in found)
    if not signed:
        return _UNSIGNED[_SIGNED_WIDTHS.index(widest)]
    if unsigned and max(t.bit_width for t in unsigned) == widest:
        widest = min(2 * widest, 64)
    return _SIGNED[_SIGNED_WIDTHS.index(widest)]


_SIGNED_WIDTHS = [8, 16, 32, 64]


def cast(column: pa.ChunkedArray | pa.Array, type: pa.DataType, what: str):
    """Cast ids without loss. Raises InputError (uint64 ids beyond int64 among signed ones)."""
    try:
        return column.cast(type)
    except pa.ArrowInvalid as error:
        raise InputError(f"{what} do not fit {type}: {error}") from error


def from_text(texts: pa.Array) -> pa.Array:
    """Ids of a text file: int64 if every one is an integer in its plain form, else the strings as they are.

    `007` is not plain: read as a number it would not come back the same, so such ids stay strings.
    """
    try:
        numbers = texts.cast(pa.int64())
        same = pc.equal(numbers.cast(texts.type), texts)
    except pa.ArrowInvalid:
        return texts
    return numbers if pc.all(same, min_count=0).as_py() else texts


def encode(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Sorted unique ids and, for each row, its id's position among them (int32)."""
    ids = sorted_unique(column)
    return ids, positions(column, ids)


def sorted_unique(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    ids = pc.unique(column)
    return ids.take(pc.sort_indices(ids))


def positions(column: pa.ChunkedArray | pa.Array, among: pa.Array) -> np.ndarray:
    """Position of each id of `column` in `among` as int32, -1 where it is not there.

    Integer ids of different width compare by value; integers and strings never match.
    """
    if is_text(column.type) != is_text(among.type):
        return np.full(len(column), -1, np.int32)
    if column.type != among.type:
        wide = _wide(column.type, among.type)
        column, among = column.cast(wide, safe=False), among.cast(wide, safe=False)
    found = pc.fill_null(pc.index_in(column, value_set=among), -1)
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    return found.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)


def _wide(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if is_text(a):
        return pa.large_string()
    # int64 and uint64 have no common integer type; decimals compare their values exactly.
    return pa.decimal128(20) if pa.uint64() in (a, b) else pa.int64()
