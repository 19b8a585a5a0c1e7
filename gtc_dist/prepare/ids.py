"""Ids of users and items: integers or strings of any width, kept in the Arrow type that they came in."""

from collections.abc import Callable, Mapping

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


def first_bad(column: pa.Array) -> tuple[int | None, str]:
    """Position of the first id that cannot be kept, and why; (None, "") if all can."""
    missing = column.is_null()
    if is_text(column.type):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            return first_refused(column, lambda part: part.validate(full=True)), "is not UTF-8 text"
        missing = pc.or_(missing, pc.fill_null(pc.equal(column, pa.scalar("", column.type)), False))
    bad = pc.index(missing, pa.scalar(True)).as_py()
    if bad >= 0:
        return bad, "is null or empty"
    bad = pc.index(pc.match_substring(column, "\0"), pa.scalar(True)).as_py() if is_text(column.type) else -1
    return (bad, "holds a NUL byte") if bad >= 0 else (None, "")


def first_refused(column: pa.Array, convert: Callable[[pa.Array], object]) -> int:
    """Position of the first value for which `convert` raises ArrowInvalid, given that it does for the column."""
    low, high = 0, len(column)  # column[:low] passes, column[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            convert(column.slice(low, middle - low))
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


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


class Vocabulary:
    """Ids that grow as columns come in, each with a code: the order in which it came.

    A column may have another type than those before it. Codes stay as they are when the ids seen so far turn into a
    wider type or, once a column of strings comes, into strings: an integer from a text file is written plainly there,
    so its text is known.

    Args:
        what: names the ids in errors, such as `user ids`.
    """

    def __init__(self, what: str):
        self.what = what
        self.ids: pa.Array | None = None
        self.types: dict[str, pa.DataType] = {}  # file -> type of its ids

    def __len__(self) -> int:
        return 0 if self.ids is None else len(self.ids)

    def add(self, columns: list[tuple[str, pa.ChunkedArray]]) -> np.ndarray:
        """Codes (int32) of the ids of (file, column) pairs, one after the other. Raises InputError: as `cast`."""
        for file, column in columns:
            if not is_text(self.types.setdefault(file, column.type)):  # a text file's ids are strings if some are
                self.types[file] = column.type
        held = self._held_type()
        chunks = [chunk for _, column in columns for chunk in cast(column, held, self._typed()).chunks]
        known = pa.array([], held) if self.ids is None else cast(self.ids, held, self._typed())
        encoded = pa.chunked_array(chunks, held).combine_chunks().dictionary_encode()
        found = positions(encoded.dictionary, known).copy()
        new = np.flatnonzero(found < 0)
        found[new] = len(known) + np.arange(len(new), dtype=np.int32)
        self.ids = pa.concat_arrays([known, encoded.dictionary.take(pa.array(new))])
        return found[encoded.indices.to_numpy()]

    def finish(self) -> tuple[pa.Array, np.ndarray]:
        """Sorted ids in the files' common type, and each code's position among them (int32).

        Raises:
            InputError: some files have integers and others strings (one of each is named).
        """
        ids = cast(self.ids, common_type(dict(sorted(self.types.items())), self.what), self._typed())
        order = pc.sort_indices(ids)
        place = np.empty(len(ids), np.int32)
        place[order.to_numpy()] = np.arange(len(ids), dtype=np.int32)
        return ids.take(order), place

    def _typed(self) -> str:
        """The ids' name with a file for each of their types."""
        files = {type: file for file, type in sorted(self.types.items(), reverse=True)}
        return f"{self.what} ({', '.join(f'{type} in {file}' for type, file in files.items())})"

    def _held_type(self) -> pa.DataType:
        """One type for all ids so far, also for those that `finish` will refuse to mix."""
        texts = {file: type for file, type in self.types.items() if is_text(type)}
        return common_type(texts or self.types, self.what)


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
