"""Vectors in Parquet files."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.prepare.vector_formats import feature_chunk, vector_columns
from gtc_dist.prepare.vector_formats.feature_chunk import FeatureChunk, FeatureHead
from gtc_dist.raw import ids as id_columns
from gtc_dist.raw.row_checks import is_number


def inspect_parquet_vectors(uri: str, modality: ModalityConfig) -> FeatureHead:
    """The ids and columns of a file. Raises InputError: a missing column, one of another type, invalid ids."""
    with _parquet_file(uri) as file:
        columns = vector_columns.find_columns(uri, modality, file.schema_arrow)
        ids = _ids_of(uri, modality.id_column, file)
        type = columns.types[0]
        if len(columns) > 1 or "*" in modality.vector_column:
            return FeatureHead(len(ids), ids, len(columns), set(columns.types) == {pa.float16()}, columns)
        width = _list_width(uri, modality.vector_column, type, file)
        return FeatureHead(len(ids), ids, width, type.value_type == pa.float16(), columns)


def read_parquet_vectors(chunk: FeatureChunk) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of a whole file. Raises BadRow, InputError."""
    row, names = chunk.first, chunk.columns.names
    with _parquet_file(chunk.uri) as file:
        batch_rows = max(feature_chunk.CHUNK_BYTES // (4 * chunk.width), 1)
        for batch in file.iter_batches(batch_size=batch_rows, columns=names, use_threads=False):
            yield vector_columns.matrix([batch[name] for name in names], row, chunk.width, chunk.dtype)
            row += len(batch)


def read_id_column(uri: str, column: str) -> pa.Array:
    """The ids in a column of a file. Raises InputError."""
    with _parquet_file(uri) as file:
        vector_columns.check_columns(uri, [column], file.schema_arrow.names)
        return _ids_of(uri, column, file)


def _ids_of(uri: str, column: str, file: pq.ParquetFile) -> pa.Array:
    values = file.read([column])[column]
    type = id_columns.plain_type(values.type)
    if type is None:
        raise InputError(f"{uri}: column {column!r} has type {values.type}; expected integers or strings")
    return pa.concat_arrays(values.cast(type).chunks) if values.num_chunks else pa.array([], type)


@contextmanager
def _parquet_file(uri: str) -> Iterator[pq.ParquetFile]:
    """An open file. Raises InputError if it is not readable."""
    with storage.open_input(uri) as stream, formats.parsing(uri, "a readable Parquet file"):
        with pq.ParquetFile(stream) as file:
            yield file


def _list_width(uri: str, column: str, type: pa.DataType, file: pq.ParquetFile) -> int | None:
    """Width of the vectors: from the type, else from the first vector; None if there is none."""
    if not vector_columns.is_list(type) or not is_number(type.value_type):
        raise InputError(f"{uri}: column {column!r} has type {type}; expected lists of numbers")
    if pa.types.is_fixed_size_list(type):
        return type.list_size or None
    for batch in file.iter_batches(batch_size=64, columns=[column]):
        for vector in batch[column]:
            if vector.is_valid and len(vector):
                return len(vector)
    return None
