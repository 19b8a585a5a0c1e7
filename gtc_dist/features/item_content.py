"""Raw content of items: texts in the columns of tables, pictures in a folder or named by a column."""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.raw import ids as id_columns
from gtc_dist.raw.bad_rows import BadRows
from gtc_dist.raw.interaction_file import InteractionFile, format_of, numbered_batches, read_schema, with_separator
from gtc_dist.raw.parse import tables_of_fitting_rows
from gtc_dist.raw.row_checks import NOT_UTF8

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ItemContent:
    """Content of items, held in memory; pictures by their URI or as the bytes of a file.

    ids: [n], each once. content: strings or bytes [n], null where an item has none. uris: files that were read.
    """

    ids: pa.Array
    content: pa.Array
    uris: list[str]


def read_texts(pattern: str, id_column: str, columns: list[str]) -> ItemContent:
    """Texts of items: the columns of a row joined by a space, null where all of them are empty.

    Args:
        pattern: CSV, TSV, JSON lines or Parquet files, a name or a glob.

    Raises:
        InputError: no such file or column, a null or repeated id, a column that is not text.
    """
    uris = storage.glob(pattern)
    parts = [part for uri in uris for part in _read(uri, id_column, columns, "text", (pa.types.is_string,))]
    ids = _unique_ids([part[0] for part in parts], uris)
    space = pa.scalar(" ", pa.large_string())
    filled = [[pc.fill_null(column, "") for column in texts] for _, texts in parts]
    joined = [pc.binary_join_element_wise(*texts, space) for texts in filled]
    texts = pc.utf8_trim_whitespace(pa.chunked_array(joined, pa.large_string()))
    return ItemContent(ids, pc.if_else(pc.equal(texts, ""), None, texts).combine_chunks(), uris)


def read_picture_column(pattern: str, id_column: str, column: str) -> ItemContent:
    """Pictures named by a column of tables: URIs, paths relative to the table's folder, or the bytes of picture files.

    Raises:
        InputError: as `read_texts`.
    """
    uris, types = storage.glob(pattern), (pa.types.is_string, pa.types.is_binary)
    ids, pictures = [], []
    for uri in uris:
        folder = posixpath.dirname(storage.absolute(uri))
        for found, (values,) in _read(uri, id_column, [column], "picture", types):
            ids.append(found)
            if pa.types.is_large_string(values.type):
                named = [storage.join(folder, name) if name and name.strip() else None for name in values.to_pylist()]
                values = pa.chunked_array([pa.array(named, pa.large_string())])
            pictures.append(values)
    kinds = {values.type for values in pictures if values.null_count < len(values)} or {pa.large_string()}
    if len(kinds) > 1:
        raise InputError(f"{pattern}: column {column!r} has names in some files and bytes in others; use one kind")
    (kind,) = kinds
    chunks = [pa.nulls(len(v), kind) if v.null_count == len(v) else v.combine_chunks() for v in pictures]
    joined = pa.chunked_array(chunks, kind)
    return ItemContent(_unique_ids(ids, uris), joined.combine_chunks(), uris)


def read_ids(uri: str, column: str) -> pa.Array:
    """Ids of a file: its lines (.txt), or a column of a table. Raises InputError."""
    if uri.endswith(".txt"):
        lines = [line for line in formats.read_lines(uri) if line.strip()]
        return id_columns.from_text(pa.array(lines, pa.large_string()))
    parts = [ids for ids, _ in _read(uri, column, [], "", ())]
    type = id_columns.common_type(part.type for part in parts) if parts else pa.int64()
    return pa.concat_arrays([pa.array([], type), *(chunk.cast(type) for part in parts for chunk in part.chunks)])


def find_pictures(folder: str) -> ItemContent:
    """Pictures of a folder and the folders in it; a file's name without its extension is the item's id.

    Raises:
        InputError: no picture, or two of one item.
    """
    names = sorted(name for name in storage.listing(folder) if posixpath.splitext(name)[1].lower() in PICTURES)
    if not names:
        raise InputError(f"{folder} has no picture ({', '.join(PICTURES)})")
    uris = [storage.join(storage.absolute(folder), name) for name in names]
    stems = pa.array([posixpath.splitext(posixpath.basename(name))[0] for name in names], pa.large_string())
    ids = _unique_ids([pa.chunked_array([id_columns.from_text(stems)])], uris)
    return ItemContent(ids, pa.array(uris, pa.large_string()), uris)


def _read(
    uri: str, id_column: str, columns: list[str], kind: str, accepted: tuple
) -> Iterator[tuple[pa.ChunkedArray, list[pa.ChunkedArray]]]:
    """Ids and the columns of a table, block by block; strings as large strings."""
    file = with_separator(InteractionFile(uri, format_of(uri), uri.endswith(".gz"), {}, {}))
    schema = read_schema(file)
    for name in (id_column, *columns):
        if name not in schema.names:
            raise InputError(f"{uri} has no column {name!r}; columns found: {', '.join(schema.names)}")
    types = {name: schema.field(name).type for name in (id_column, *columns)}
    if file.format in ("csv", "tsv"):
        types = dict.fromkeys(types, pa.string())
    elif file.format == "jsonl":  # Arrow reads strings that look like timestamps as such
        untyped = (pa.types.is_timestamp, pa.types.is_null)  # a block of nulls says nothing of what follows
        types = {name: pa.string() if any(is_(type) for is_ in untyped) else type for name, type in types.items()}
    if id_columns.plain_type(types[id_column]) is None:
        raise InputError(f"{uri}: column {id_column!r} has type {types[id_column]}; expected integers or strings")
    for name in columns:
        plain = pa.string() if pa.types.is_large_string(types[name]) else types[name]
        plain = pa.binary() if pa.types.is_large_binary(plain) else plain
        if not any(fits(plain) for fits in accepted) and not pa.types.is_null(plain):
            raise InputError(f"{uri}: column {name!r} has type {types[name]}; expected a {kind}")
    file = replace(file, columns={name: name for name in types}, types=types)
    if file.is_csv:
        yield from _read_csv(file, id_column, columns)
        return
    for first_row, table in numbered_batches(file):
        plain = id_columns.plain_type(types[id_column])
        found = pa.concat_arrays([pa.array([], plain), *(chunk.cast(plain) for chunk in table[id_column].chunks)])
        bad, problem = id_columns.first_bad(found)
        if bad is not None:
            raise InputError(f"{uri}: column {id_column!r} {problem} in row {first_row + bad}")
        yield pa.chunked_array([found]), [_large(table[name]) for name in columns]


def _read_csv(
    file: InteractionFile, id_column: str, columns: list[str]
) -> Iterator[tuple[pa.ChunkedArray, list[pa.ChunkedArray]]]:
    """The same of CSV and TSV, all whose bad rows are named at the end."""
    bad = BadRows(file)
    for _, numbers, table in tables_of_fitting_rows(file, bad):
        problems: dict[int, str] = {}
        found = table[id_column].combine_chunks()
        masks = {"is empty": pc.equal(found, b""), "holds a NUL byte": pc.match_substring(found, "\0")}
        for problem, wrong in masks.items():
            problems |= dict.fromkeys(np.flatnonzero(wrong).tolist(), f"column {id_column!r} {problem}")
        for name in table.column_names:
            wrong = id_columns.refused_positions(table[name].combine_chunks(), lambda part: part.cast(pa.string()))
            problems |= dict.fromkeys(wrong.tolist(), f"column {name!r} {NOT_UTF8}")
        for place, problem in sorted(problems.items()):
            bad.add(int(numbers[place]), problem)
        if not bad.count:
            ids = pa.chunked_array([id_columns.from_text(found.cast(pa.string()))])
            yield ids, [table[name].cast(pa.large_string()) for name in columns]
    bad.refuse("")


def _large(column: pa.ChunkedArray) -> pa.ChunkedArray:
    is_bytes = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    return column.cast(pa.large_binary() if is_bytes else pa.large_string())


def _unique_ids(columns: list[pa.ChunkedArray], uris: list[str]) -> pa.Array:
    """All ids in one type. Raises InputError for one that is there twice."""
    type = id_columns.common_type(column.type for column in columns) if columns else pa.int64()
    ids = pa.concat_arrays([pa.array([], type), *(chunk.cast(type) for column in columns for chunk in column.chunks)])
    counts = pc.value_counts(ids)
    repeated = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise InputError(
            f"{len(repeated)} items are more than once in {', '.join(uris[:3])}, such as {repeated[0].as_py()!r}; keep "
            "one row of each"
        )
    if not len(ids):
        raise InputError(f"{', '.join(uris[:3])} has no item")
    return ids
