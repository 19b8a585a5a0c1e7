"""Read and check the raw feature files of one modality, in chunks of rows.

`inspect_features` reads headers and ids before Ray starts and cuts the files into chunks; each Ray task runs
`read_feature_chunk` on one chunk. A `.npy` file is read by byte range, so a task fetches only its rows.

Rows are numbered from 0 over all files of a modality. For a `.npy` file without an id file, the row number is the item
id.
"""

import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.raw import ids as id_columns

CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class FeatureChunk:
    """Rows [start, stop) of a `.npy` file, or all rows of a Parquet file; `first` is the number of its first row."""

    modality: str
    uri: str
    width: int
    dtype: str  # of the output: float16 or float32
    first: int
    start: int = 0
    stop: int = 0
    column: str | None = None  # Parquet: the column with the vectors


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
    kinds = {posixpath.splitext(uri)[1].lower() for uri in uris}
    if kinds == {".npy"}:
        source = _inspect_npy(name, modality, raw, uris)
    elif kinds <= {".parquet", ".pq"}:
        source = _inspect_parquet(name, modality, uris)
    elif kinds <= {".npy", ".parquet", ".pq"}:
        raise InputError(
            f"data.features.{name}.path names .npy and Parquet files ({', '.join(uris[:3])}); use one format"
        )
    else:
        uri = next(uri for uri in uris if not uri.lower().endswith((".npy", ".parquet", ".pq")))
        raise InputError(f"data.features.{name}.path: {uri} is neither .npy nor .parquet")
    if not source.rows:
        raise InputError(f"data.features.{name}: {', '.join(uris[:3])} hold no vector")
    if modality.pca is not None and modality.pca > source.width:
        raise InputError(f"data.features.{name}.pca is {modality.pca}, but the vectors have only {source.width} values")
    if source.ids is not None:
        _check_ids(source)
    return source


class _BadRow(Exception):
    """An invalid row; the driver, which knows the ids, names its item."""

    def __init__(self, row: int, problem: str):
        self.row, self.problem = row, problem


def read_feature_chunk(chunk: FeatureChunk) -> Iterator[pa.Table]:
    """Yield tables with the columns row: int64 (number in the modality) and vector: fixed_size_list[width].

    Skips rows without a vector. The first invalid row ends the chunk with a table of bad_row and problem.
    """
    try:
        for rows, vectors in _read_parquet(chunk) if chunk.column else _read_npy(chunk):
            with np.errstate(over="ignore"):  # float64 values out of range become infinite, which the check finds
                vectors = vectors.astype(chunk.dtype, copy=False)
            finite = np.isfinite(vectors).all(axis=1)
            if not finite.all():
                bad = np.flatnonzero(~finite)[0]
                column = np.flatnonzero(~np.isfinite(vectors[bad]))[0]
                raise _BadRow(rows[bad], f"has a value that is not finite ({vectors[bad, column]}, position {column})")
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            yield pa.table({"row": rows, "vector": pa.FixedSizeListArray.from_arrays(flat, chunk.width)})
    except _BadRow as bad:
        yield pa.table({"bad_row": [int(bad.row)], "problem": [bad.problem]})


def _inspect_npy(name: str, modality: ModalityConfig, raw: str, uris: list[str]) -> FeatureSource:
    if len(uris) > 1:
        raise InputError(f"data.features.{name}.path names {len(uris)} .npy files ({uris[0]}, ...); one is expected")
    uri = uris[0]
    shape, fortran, dtype, offset = _npy_header(uri)
    if dtype.kind not in "fiu":
        raise InputError(f"{uri} holds {dtype} values; features must be float or integer numbers")
    if len(shape) != 2 or shape[1] == 0:
        raise InputError(f"{uri} has shape {shape}; features must be a matrix with one row per item")
    rows, width = shape
    expected = offset + rows * width * dtype.itemsize
    size = storage.file_signatures([uri])[0][1]
    if size < expected:
        raise InputError(f"{uri} is truncated: {size} bytes, but its header declares {expected}")
    ids = ids_uri = None
    if modality.ids is not None:
        ids_uri = storage.join(raw, modality.ids)
        ids = _read_ids(ids_uri, modality.id_column, f"data.features.{name}.ids")
        if len(ids) != rows:
            raise InputError(f"{ids_uri} has {len(ids)} ids, but {uri} has {rows} rows")
    # In Fortran order a row is not contiguous. From object storage, one request for all rows replaces one per column.
    step = rows if fortran and not storage.is_local(uri) else max(CHUNK_BYTES // (width * dtype.itemsize), 1)
    out_dtype = "float16" if dtype == np.float16 else "float32"
    chunks = [
        FeatureChunk(name, uri, width, out_dtype, start, start, min(start + step, rows))
        for start in range(0, rows, max(step, 1))
    ]
    ids_from_text = (ids_uri or "").endswith(".txt")
    return FeatureSource(name, uris, rows, width, out_dtype, ids, chunks, ids_uri, ids_from_text)


def _npy_header(uri: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype, and offset of the data in bytes."""
    with storage.open_input(uri) as file:
        try:
            return *formats.read_array_header(file), file.tell()
        except ValueError as error:
            raise InputError(f"{uri} is not a readable .npy file: {error}") from error


def _read_npy(chunk: FeatureChunk) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    shape, fortran, dtype, offset = _npy_header(chunk.uri)
    row_bytes = shape[1] * dtype.itemsize
    rows = np.arange(chunk.start, chunk.stop)
    if storage.is_local(chunk.uri):
        matrix = np.load(storage.absolute(chunk.uri), mmap_mode="r", allow_pickle=False)
        yield rows, matrix[chunk.start : chunk.stop]
        return
    fs, path = storage.filesystem(chunk.uri)
    data = fs.cat_file(path, start=offset + chunk.start * row_bytes, end=offset + chunk.stop * row_bytes)
    order = "F" if fortran else "C"  # in Fortran order the chunk has all rows
    yield rows, np.frombuffer(data, dtype).reshape((len(rows), shape[1]), order=order)


def _read_ids(uri: str, column: str, key: str) -> pa.Array:
    """Item ids from a .npy, .parquet or .txt file, one per row; `key` names the file in errors."""
    extension = posixpath.splitext(uri)[1].lower()
    try:
        if len(storage.glob(uri)) > 1:
            raise InputError(f"{uri} names several files; one is expected")
        if extension == ".npy":
            array = formats.read_array(uri)
            if array.ndim != 1 or array.dtype.kind not in "iuU":
                raise InputError(
                    f"{uri} holds {array.dtype} of shape {array.shape}; expected one integer or string per row"
                )
            return pa.array(array.astype(array.dtype.newbyteorder("="), copy=False))
        if extension in (".parquet", ".pq"):
            with storage.open_input(uri) as stream, _parquet_file(uri, stream, column) as file:
                return _id_column(uri, column, file.read([column])[column])
        if extension != ".txt":
            raise InputError(f"{uri} is not a .npy, .txt or .parquet file")
        return pa.array(storage.read_bytes(uri).decode("utf-8-sig").splitlines(), pa.string())
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: {uri} is not UTF-8 text: {error}") from error
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def _inspect_parquet(name: str, modality: ModalityConfig, uris: list[str]) -> FeatureSource:
    if modality.ids is not None:
        raise InputError(f"data.features.{name}.ids is for .npy files; Parquet files have the ids in id_column")
    with ThreadPoolExecutor(8) as pool:
        heads = list(pool.map(lambda uri: _parquet_head(uri, modality), uris))
    columns = [ids for ids, _, _ in heads]
    types = {uri: type for uri, (_, type, _) in zip(uris, heads, strict=True)}
    width = next((width for _, _, width in heads if width is not None), None)
    first = np.cumsum([0] + [len(ids) for ids in columns]).tolist()
    rows = first.pop()
    if width is None:
        raise InputError(f"data.features.{name}: {', '.join(uris[:3])} hold no vector")
    out_dtype = "float16" if set(types.values()) == {pa.float16()} else "float32"
    id_type = id_columns.common_type(column.type for column in columns)
    ids = pa.concat_arrays(
        [id_columns.cast(c, id_type, f"item ids of {uri}") for uri, c in zip(uris, columns, strict=True)]
    )
    chunks = [
        FeatureChunk(name, uri, width, out_dtype, row, column=modality.vector_column)
        for uri, row in zip(uris, first, strict=True)
    ]
    return FeatureSource(name, uris, rows, width, out_dtype, ids, chunks)


def _parquet_head(uri: str, modality: ModalityConfig) -> tuple[pa.Array, pa.DataType, int | None]:
    """The ids of a file, the value type of its vectors, and their width (None if the file has no vector)."""
    id_column, vector_column = modality.id_column, modality.vector_column
    with storage.open_input(uri) as stream, _parquet_file(uri, stream, id_column, vector_column) as file:
        vector = file.schema_arrow.field(vector_column).type
        width = _vector_width(uri, vector_column, vector, file)
        return _id_column(uri, id_column, file.read([id_column])[id_column]), vector.value_type, width


@contextmanager
def _parquet_file(uri: str, stream, *columns: str) -> Iterator[pq.ParquetFile]:
    """An open file that has each column exactly once. Raises InputError if it is not readable."""
    with formats.parsing(uri, "a readable Parquet file"), pq.ParquetFile(stream) as file:
        names = file.schema_arrow.names
        for column in columns:
            if names.count(column) != 1:
                found = f"{names.count(column)} columns named" if column in names else "no column"
                raise InputError(f"{uri} has {found} {column!r}; columns found: {', '.join(names)}")
        yield file


def _id_column(uri: str, column: str, values: pa.ChunkedArray) -> pa.Array:
    type = id_columns.plain_type(values.type)
    if type is None:
        raise InputError(f"{uri}: column {column!r} has type {values.type}; expected integers or strings")
    return pa.concat_arrays(values.cast(type).chunks) if values.num_chunks else pa.array([], type)


def _vector_width(uri: str, column: str, type: pa.DataType, file: pq.ParquetFile) -> int | None:
    """Width of the vectors: from the type, else from the first vector; None if there is none."""
    lists = pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
    if not lists or not (pa.types.is_floating(type.value_type) or pa.types.is_integer(type.value_type)):
        raise InputError(f"{uri}: column {column!r} has type {type}; expected lists of numbers")
    if pa.types.is_fixed_size_list(type):
        return type.list_size or None
    for batch in file.iter_batches(batch_size=64, columns=[column]):
        for vector in batch[column]:
            if vector.is_valid and len(vector):
                return len(vector)
    return None


def _read_parquet(chunk: FeatureChunk) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    row = chunk.first
    with storage.open_input(chunk.uri) as stream, _parquet_file(chunk.uri, stream, chunk.column) as file:
        batch_rows = max(CHUNK_BYTES // (4 * chunk.width), 1)
        for batch in file.iter_batches(batch_size=batch_rows, columns=[chunk.column], use_threads=False):
            vectors = batch[chunk.column]
            rows = row + np.flatnonzero(vectors.is_valid().to_numpy(zero_copy_only=False))
            vectors = vectors.drop_null()
            lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
            if (lengths != chunk.width).any():
                bad = np.flatnonzero(lengths != chunk.width)[0]
                raise _BadRow(rows[bad], f"has {lengths[bad]} values, but others have {chunk.width}")
            flat = vectors.flatten().cast(pa.float32() if chunk.dtype == "float32" else pa.float16(), safe=False)
            yield rows, flat.to_numpy(zero_copy_only=False).reshape(len(rows), chunk.width)  # nulls become NaN
            row += len(batch)


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
