"""Original ids of users and items: integers of any width or strings, as Arrow arrays of the type in the raw files.

Ids are never changed: where one source has text, all are text, an integer as it is written. So `007` and `7` are two
items, and `7` is the same item whether a file says that it is a number or not.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.errors import InputError

_SIGNED = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())


def plain_type(type: pa.DataType) -> pa.DataType | None:
    """The type in which ids of a column are kept: integer or string; None if the column cannot hold ids."""
    if pa.types.is_dictionary(type):
        return plain_type(type.value_type)
    if pa.types.is_integer(type) or pa.types.is_string(type) or pa.types.is_large_string(type):
        return type
    return pa.large_string() if pa.types.is_string_view(type) else None


def is_text(type: pa.DataType) -> bool:
    return not pa.types.is_integer(type)


def common_type(types: Iterable[pa.DataType]) -> pa.DataType:
    """The type that holds the ids of all files: the widest integer, or, where one has strings, strings."""
    found = set(types)
    if len(found) == 1:
        return found.pop()
    if any(map(is_text, found)):
        return pa.large_string()
    signed, unsigned = found & set(_SIGNED), found & set(_UNSIGNED)
    widest = max(t.bit_width for t in found)
    if not signed:
        return _UNSIGNED[_SIGNED_WIDTHS.index(widest)]
    if unsigned and max(t.bit_width for t in unsigned) == widest:
        widest = min(2 * widest, 64)
    return _SIGNED[_SIGNED_WIDTHS.index(widest)]


_SIGNED_WIDTHS = [8, 16, 32, 64]


def cast(column: pa.ChunkedArray | pa.Array, type: pa.DataType, title: str):
    """Cast ids without loss. Raises InputError (uint64 ids above the int64 range, together with negative ids)."""
    try:
        return column.cast(type)
    except pa.ArrowInvalid as error:
        raise InputError(f"{title} do not fit {type}: {error}") from error


def first_bad(column: pa.Array) -> tuple[int | None, str]:
    """Position of the first invalid id, and the problem; (None, "") if all ids are valid."""
    missing = column.is_null()
    if is_text(column.type):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            return int(refused_positions(column, lambda part: part.validate(full=True))[0]), "is not UTF-8 text"
        missing = pc.or_(missing, pc.fill_null(pc.equal(column, pa.scalar("", column.type)), False))
    bad = pc.index(missing, pa.scalar(True)).as_py()
    if bad >= 0:
        return bad, "is null or empty"
    bad = pc.index(pc.match_substring(column, "\0"), pa.scalar(True)).as_py() if is_text(column.type) else -1
    return (bad, "holds a NUL byte") if bad >= 0 else (None, "")


def refused_positions(column: pa.Array, convert: Callable[[pa.Array], object]) -> np.ndarray:
    """Positions of the values for which `convert` raises ArrowInvalid, int64 ascending."""
    found, parts = [], [(0, len(column))]
    while parts:
        low, high = parts.pop()
        try:
            convert(column.slice(low, high - low))
        except pa.ArrowInvalid:
            middle = (low + high) // 2
            parts += [(middle, high), (low, middle)] if high - low > 1 else []
            found += [low] if high - low == 1 else []
    return np.array(found, np.int64)


def from_text(texts: pa.Array) -> pa.Array:
    """Ids of a text file: int64 if every id is a canonical decimal integer, else unchanged strings.

    `007` is not canonical: as an integer it would be written as `7`.
    """
    try:
        require_canonical(texts)
    except pa.ArrowInvalid:
        return texts
    return texts.cast(pa.int64())


def require_canonical(texts: pa.Array) -> None:
    """Raises ArrowInvalid for text that is no canonical decimal integer, such as `007`."""
    same = pc.equal(texts.cast(pa.int64()).cast(texts.type), texts)
    if not pc.all(same, min_count=0).as_py():
        raise pa.ArrowInvalid("not canonical")


def encode(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Sorted unique ids, and the position of each row's id among them (int32)."""
    ids = sorted_unique(column)
    return ids, positions(column, ids)


class Vocabulary:
    """A growing set of ids; the code of an id is the number of ids that were added before it.

    Columns may have different types. Codes do not change when the known ids are cast to a wider integer type, or to
    strings: integers of a text file are as they were written (`from_text`), so their text is known.

    Args:
        title: name of the ids in errors, such as `user ids`.
    """

    def __init__(self, title: str):
        self.title = title
        self.ids: pa.Array | None = None
        self.types: dict[str, pa.DataType] = {}  # file -> type of its ids

    def __len__(self) -> int:
        return 0 if self.ids is None else len(self.ids)

    def add(self, columns: list[tuple[str, pa.ChunkedArray]]) -> np.ndarray:
        """Add the ids of (file, column) pairs; returns their codes, int32, concatenated. Raises InputError (`cast`)."""
        for file, column in columns:
            if not is_text(self.types.setdefault(file, column.type)):  # one string makes all ids of a file strings
                self.types[file] = column.type
        type = common_type(self.types.values())
        chunks = [chunk for _, column in columns for chunk in cast(column, type, self._title_with_types()).chunks]
        known = pa.array([], type) if self.ids is None else cast(self.ids, type, self._title_with_types())
        encoded = pa.chunked_array(chunks, type).combine_chunks().dictionary_encode()
        found = positions(encoded.dictionary, known).copy()
        new = np.flatnonzero(found < 0)
        found[new] = len(known) + np.arange(len(new), dtype=np.int32)
        self.ids = pa.concat_arrays([known, encoded.dictionary.take(pa.array(new))])
        return found[encoded.indices.to_numpy()]

    def finish(self, as_text: bool = False, as_integer: bool = False) -> tuple[pa.Array, np.ndarray]:
        """Sorted ids in the common type of the files, and the position of each code among them (int32).

        Args:
            as_text: strings, whatever the files have.
            as_integer: refuse strings.

        Raises:
            InputError: a string, with `as_integer`; it names the file and an id.
        """
        ids = self.ids
        if as_integer and is_text(ids.type):
            file = next(file for file, type in self.types.items() if is_text(type))
            number = ids.take(pa.array(refused_positions(ids, lambda part: require_canonical(part))[:1]))
            shown = f", such as {number[0].as_py()!r}" if len(number) else ""
            raise InputError(f"data.ids is integer, but {self.title} of {file} are text{shown}; set data.ids=text")
        if as_text and not is_text(ids.type):
            ids = cast(ids, pa.large_string(), self.title)
        order = pc.sort_indices(ids)
        position = np.empty(len(ids), np.int32)
        position[order.to_numpy()] = np.arange(len(ids), dtype=np.int32)
        return ids.take(order), position

    def _title_with_types(self) -> str:
        """The title, and one file for each id type."""
        files = {type: file for file, type in sorted(self.types.items(), reverse=True)}
        return f"{self.title} ({', '.join(f'{type} in {file}' for type, file in files.items())})"


def sorted_unique(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    ids = pc.unique(column)
    return ids.take(pc.sort_indices(ids))


def positions(column: pa.ChunkedArray | pa.Array, among: pa.Array) -> np.ndarray:
    """Position of each id of `column` in `among`, int32; -1 if absent.

    Integers of different width compare by value; integers and strings never match.
    """
    if is_text(column.type) != is_text(among.type):
        return np.full(len(column), -1, np.int32)
    if column.type != among.type:
        wide = _wider_type(column.type, among.type)
        column, among = column.cast(wide, safe=False), among.cast(wide, safe=False)
    found = pc.fill_null(pc.index_in(column, value_set=among), -1)
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    return found.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)


def comparable(a: pa.Array, b: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Two arrays of ids that `positions` compares as they are written: both as text where one is."""
    if is_text(a.type) == is_text(b.type):
        return a, b
    return a.cast(pa.large_string()), b.cast(pa.large_string())


def _wider_type(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if is_text(a):
        return pa.large_string()
    # int64 and uint64 have no common integer type; decimals compare exactly.
    return pa.decimal128(20) if pa.uint64() in (a, b) else pa.int64()
