"""Read and check the raw vectors of one modality, in chunks of rows.

`inspect_features` reads headers and ids before Ray starts and cuts the files into chunks; each Ray task runs
`read_feature_chunk` on one chunk. The formats are in vector_formats/.

Rows are numbered from 0 over all files of a modality. Where neither the file nor an id file has ids, the row number is
the item id.
"""

import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.prepare.vector_formats.feature_chunk import BadRow, FeatureChunk, FeatureHead
from gtc_dist.prepare.vector_formats.npy import inspect_npy, read_npy
from gtc_dist.prepare.vector_formats.npz import id_array, inspect_npz, read_npz
from gtc_dist.prepare.vector_formats.parquet import inspect_parquet_vectors, read_id_column, read_parquet_vectors
from gtc_dist.prepare.vector_formats.pt import inspect_pt, read_pt
from gtc_dist.prepare.vector_formats.text_tables import inspect_text_table, read_text_table
from gtc_dist.raw import ids as id_columns
from gtc_dist.raw.interaction_file import FORMATS

TEXT_FORMATS = ("csv", "tsv", "jsonl")
VECTOR_READERS = {
    "npy": (inspect_npy, read_npy),
    "npz": (inspect_npz, read_npz),
    "pt": (inspect_pt, read_pt),
    "parquet": (inspect_parquet_vectors, read_parquet_vectors),
    **dict.fromkeys(TEXT_FORMATS, (inspect_text_table, read_text_table)),
}
TABLES = {extension: format for extension, format in FORMATS.items() if format in VECTOR_READERS}
VECTOR_FORMATS = {".npy": "npy", ".npz": "npz", ".pt": "pt", **TABLES}  # by extension


@dataclass(frozen=True)
class FeatureSource:
    """The raw features of one modality, [rows, width].

    Attributes:
        ids: item id of each row, or None if the row number is the id.
        ids_uri: separate file with the ids, if any.
        ids_from_text: the ids come from a text file, so strings may be integers.
    """

    name: str
    uris: list[str]
    rows: int
    width: int
    dtype: str
    ids: pa.Array | None
    chunks: list[FeatureChunk]
    ids_uri: str | None = None
    ids_from_text: bool = False

    @property
    def files(self) -> list[str]:
        return self.uris + ([self.ids_uri] if self.ids_uri else [])

    def id_of(self, row: int):
        return row if self.ids is None else self.ids[row].as_py()

    def locate(self, row: int) -> tuple[str, int]:
        """The file that has a row, and the row's number in the file, from 1."""
        uri = next(chunk.uri for chunk in reversed(self.chunks) if chunk.first <= row)
        first = next(chunk.first for chunk in self.chunks if chunk.uri == uri)
        return uri, row - first + 1

    def all_ids(self) -> pa.Array:
        """Item id of each row: integers if those of a text file are all written like numbers."""
        if self.ids is None:
            return pa.array(np.arange(self.rows))
        return id_columns.from_text(self.ids) if self.ids_from_text else self.ids


def inspect_features(name: str, modality: ModalityConfig, raw: str) -> FeatureSource:
    """Check one modality's files. Raises InputError: missing file or column, wrong type or shape, invalid ids."""
    try:
        uris = storage.glob(storage.join(raw, modality.path))
    except InputError as error:
        raise InputError(f"data.features.{name}.path: {error}") from error
    found = {_format_of(name, uri): uri for uri in uris}
    if len(found) > 1:
        shown = ", ".join(f"{format} ({uri})" for format, uri in found.items())
        raise InputError(f"data.features.{name}.path names files of several formats: {shown}; use one format")
    (format,) = found
    if modality.ids is not None and format != "npy":
        raise InputError(f"data.features.{name}.ids is for .npy files; {uris[0]} has the ids in it, or needs none")
    inspect, _ = VECTOR_READERS[format]
    with ThreadPoolExecutor(8) as pool:
        heads = list(pool.map(partial(inspect, modality=modality), uris))
    source = _join(name, format, uris, heads)
    if modality.ids is not None:
        source = _with_ids(source, storage.join(raw, modality.ids), modality.id_column)
    if not source.rows:
        raise InputError(f"data.features.{name}: {', '.join(uris[:3])} hold no vector")
    if modality.pca is not None and modality.pca > source.width:
        raise InputError(f"data.features.{name}.pca is {modality.pca}, but the vectors have only {source.width} values")
    if source.ids is not None:
        _check_ids(source)
    return source


def read_feature_chunk(chunk: FeatureChunk) -> Iterator[pa.Table]:
    """Yield tables with the columns row: int64 (number in the modality) and vector: fixed_size_list[width].

    Skips rows without a vector. The first invalid row ends the chunk with a table of bad_row and problem.
    """
    _, read = VECTOR_READERS[chunk.format]
    try:
        for rows, vectors in read(chunk):
            with np.errstate(over="ignore"):  # float64 values out of range become infinite, which the check finds
                vectors = vectors.astype(chunk.dtype, copy=False)
            finite = np.isfinite(vectors).all(axis=1)
            if not finite.all():
                bad = np.flatnonzero(~finite)[0]
                column = np.flatnonzero(~np.isfinite(vectors[bad]))[0]
                raise BadRow(rows[bad], f"has a value that is not finite ({vectors[bad, column]}, position {column})")
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            yield pa.table({"row": rows, "vector": pa.FixedSizeListArray.from_arrays(flat, chunk.width)})
    except BadRow as bad:
        yield pa.table({"bad_row": [bad.row], "problem": [bad.problem]})


def _format_of(name: str, uri: str) -> str:
    """The format that a file's name indicates. Raises InputError."""
    extension = posixpath.splitext(uri.removesuffix(".gz"))[1].lower()
    format = VECTOR_FORMATS.get(extension)
    if format is None:
        known = ", ".join(VECTOR_FORMATS)
        raise InputError(f"data.features.{name}.path: {uri} has an unknown extension; vectors are in {known}")
    if uri.endswith(".gz") and format not in TEXT_FORMATS:
        raise InputError(f"data.features.{name}.path: {uri} is gzipped, which only text may be; unpack it")
    return format


def _join(name: str, format: str, uris: list[str], heads: list[FeatureHead]) -> FeatureSource:
    """The files of a modality as one source. Raises InputError: no vector, files that do not go together."""
    if len(uris) > 1 and any(head.ids is None for head in heads):
        raise InputError(
            f"data.features.{name}.path names {len(uris)} .{format} files without ids ({uris[0]}, ...); one is expected"
        )
    for uri, head in zip(uris, heads, strict=True):
        if head.columns is not None and head.columns.names != heads[0].columns.names:
            raise InputError(
                f"{uri} has the vectors in other columns than {uris[0]}; write all files with the same columns"
            )
    width = next((head.width for head in heads if head.width is not None), None)
    if width is None:
        raise InputError(f"data.features.{name}: {', '.join(uris[:3])} hold no vector")
    first = np.cumsum([0] + [head.rows for head in heads]).tolist()
    out_dtype = "float16" if all(head.is_half for head in heads) else "float32"
    chunks = [
        FeatureChunk(
            name, uri, format, width, out_dtype, row + start, start, min(start + step, head.rows), head.columns
        )
        for uri, head, row in zip(uris, heads, first, strict=False)
        for step in [head.step or max(head.rows, 1)]
        for start in range(0, max(head.rows, 1), step)
    ]
    ids, is_text = None, any(head.ids_from_text for head in heads)
    if heads[0].ids is not None:
        type = id_columns.common_type(head.ids.type for head in heads)
        ids = pa.concat_arrays(
            [id_columns.cast(head.ids, type, f"item ids of {uri}") for uri, head in zip(uris, heads, strict=True)]
        )
    return FeatureSource(name, uris, first[-1], width, out_dtype, ids, chunks, ids_from_text=is_text)


def _with_ids(source: FeatureSource, uri: str, column: str) -> FeatureSource:
    """A source with the ids of a file of their own. Raises InputError."""
    ids = _read_ids(uri, column, f"data.features.{source.name}.ids")
    if len(ids) != source.rows:
        raise InputError(f"{uri} has {len(ids)} ids, but {source.uris[0]} has {source.rows} rows")
    return replace(source, ids=ids, ids_uri=uri, ids_from_text=uri.endswith(".txt"))


def _read_ids(uri: str, column: str, key: str) -> pa.Array:
    """Item ids from a .npy, .parquet or .txt file, one per row; `key` names the file in errors."""
    extension = posixpath.splitext(uri)[1].lower()
    try:
        if len(storage.glob(uri)) > 1:
            raise InputError(f"{uri} names several files; one is expected")
        if extension == ".npy":
            return id_array(uri, formats.read_array(uri))
        if extension in (".parquet", ".pq"):
            return read_id_column(uri, column)
        if extension != ".txt":
            raise InputError(f"{uri} is not a .npy, .txt or .parquet file")
        return pa.array(formats.read_lines(uri), pa.string())
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def _check_ids(source: FeatureSource) -> None:
    """Raises InputError for an invalid id or one that occurs twice."""
    bad, problem = id_columns.first_bad(source.ids)
    if bad is not None:
        uri, row = source.locate(bad)
        raise InputError(f"{source.ids_uri or uri}: the item id of row {row} {problem}")
    counts = pc.value_counts(source.ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        first = repeated[0].as_py()
        raise InputError(
            f"{', '.join(source.uris[:3])}: item {first['values']!r} has {first['counts']} vectors "
            f"({len(repeated)} items have more than one); each item must have one"
        )
