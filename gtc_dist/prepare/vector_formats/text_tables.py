"""Vectors in CSV, TSV and JSON lines; plain or gzipped.

A file is read in blocks, twice: for its ids before Ray starts, and for its vectors in one task.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.config_data import ModalityConfig
from gtc_dist.errors import InputError
from gtc_dist.prepare.vector_formats import vector_columns
from gtc_dist.prepare.vector_formats.feature_chunk import BadRow, FeatureChunk, FeatureHead
from gtc_dist.raw.interaction_file import InteractionFile, format_of, numbered_batches, read_schema, with_separator
from gtc_dist.raw.row_checks import is_number


def inspect_text_table(uri: str, modality: ModalityConfig) -> FeatureHead:
    """The ids and columns of a file. Raises InputError: a broken file, a missing column or one of another type, a first
    vector that is not numbers."""
    found, is_typed = read_schema(text_table(uri, pa.schema([]))), format_of(uri) == "jsonl"
    columns = vector_columns.find_columns(uri, modality, found)
    if len(columns) > 1 or "*" in modality.vector_column:
        columns, width = pa.schema([(column, pa.float64()) for column in columns.names]), len(columns)
    else:
        type = _vector_type(uri, columns.field(0)) if is_typed else pa.string()
        columns = pa.schema([(modality.vector_column, type)])
        width = _first_width(uri, columns)
    id_type = _id_type(uri, found.field(modality.id_column)) if is_typed else pa.string()
    blocks = numbered_batches(text_table(uri, pa.schema([(modality.id_column, id_type)])))
    ids = pa.concat_arrays([pa.array([], id_type), *(chunk for _, block in blocks for chunk in block[0].chunks)])
    return FeatureHead(len(ids), ids, width, columns=columns, ids_from_text=not is_typed)


def read_text_table(chunk: FeatureChunk) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of a whole file. Raises BadRow, InputError."""
    for first_row, block in numbered_batches(text_table(chunk.uri, chunk.columns)):
        columns = [pa.concat_arrays(block[name].chunks) for name in chunk.columns.names]
        yield vector_columns.matrix(columns, chunk.first + first_row - 1, chunk.width, chunk.dtype)


def text_table(uri: str, columns: pa.Schema) -> InteractionFile:
    """How to read columns of a table as their types. Raises InputError: a broken file."""
    types = dict(zip(columns.names, columns.types, strict=True))
    file = InteractionFile(uri, format_of(uri), uri.endswith(".gz"), {name: name for name in types}, types)
    return with_separator(file)


def _is_text(type: pa.DataType) -> bool:
    """Whether a column of JSON holds text; Arrow reads text that looks like times as such."""
    return pa.types.is_string(type) or pa.types.is_timestamp(type)


def _id_type(uri: str, field: pa.Field) -> pa.DataType:
    """The type to read the ids of JSON lines as."""
    if _is_text(field.type) or pa.types.is_null(field.type):
        return pa.string()
    if not pa.types.is_integer(field.type):
        raise InputError(f"{uri}: column {field.name!r} has type {field.type}; expected integers or strings")
    return field.type


def _vector_type(uri: str, field: pa.Field) -> pa.DataType:
    """The type to read the vectors of JSON lines as; a column of nulls or of empty lists has no type yet."""
    if _is_text(field.type):
        return pa.string()
    of = field.type.value_type if vector_columns.is_list(field.type) else pa.null()
    is_vector = vector_columns.is_list(field.type) or pa.types.is_null(field.type)
    if not is_vector or not (is_number(of) or pa.types.is_null(of)):
        raise InputError(f"{uri}: column {field.name!r} has type {field.type}; expected lists of numbers")
    return pa.list_(pa.float64())


def _first_width(uri: str, columns: pa.Schema) -> int | None:
    """Width of the first vector, None without one. Raises InputError: it is a text without numbers."""
    for first_row, block in numbered_batches(text_table(uri, columns)):
        for column in block[0].chunks:
            is_list = vector_columns.is_list(column.type)
            given = pc.greater(pc.list_value_length(column), 0) if is_list else vector_columns.has_vector(column)
            place = pc.index(given, pa.scalar(True)).as_py()
            if place < 0:
                continue
            vector = column.slice(place, 1)
            lists = vector if is_list else vector_columns.split_text(vector)
            width = len(lists[0])
            try:
                vector_columns.matrix([vector], 0, width, "float32")
            except BadRow:
                raise InputError(
                    f"{uri}: column {columns.names[0]!r} has {vector_columns.shown(vector[0])} in row "
                    f"{first_row + place}; expected numbers separated by spaces, commas or |, or vector_column as a "
                    'pattern such as "v*" for one column of numbers per dimension'
                ) from None
            return width
    return None
