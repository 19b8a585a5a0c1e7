"""Vectors in the columns of tables: lists of numbers, text that holds numbers, or one column for each dimension."""

from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.config_data import ModalityConfig
from gtc_dist.errors import InputError
from gtc_dist.prepare.vector_formats.feature_chunk import BadRow
from gtc_dist.raw import ids as id_columns
from gtc_dist.raw.row_checks import is_number

SEPARATOR = r"\s*[,|]\s*|\s+"  # between the numbers of a text
BRACKETS = " \t\r\n[]()"  # around them


def find_columns(uri: str, modality: ModalityConfig, schema: pa.Schema) -> pa.Schema:
    """The column with the vectors; or those that match `vector_column` as a pattern, in the order of the file.

    Raises:
        InputError: the id column or the vectors are not there, a name is there twice, or a type does not fit.
    """
    names, pattern = schema.names, modality.vector_column
    if "*" not in pattern or pattern in names:
        check_columns(uri, [modality.id_column, pattern], names)
        return pa.schema([schema.field(pattern)])
    columns = list(dict.fromkeys(n for n in names if fnmatchcase(n, pattern) and n != modality.id_column))
    check_columns(uri, [modality.id_column, *(columns or [pattern])], names)
    for column in columns:
        if not _is_dimension(schema.field(column).type):
            raise InputError(
                f"{uri}: column {column!r} has type {schema.field(column).type}; expected numbers in all columns that "
                f"match {pattern!r}"
            )
    return pa.schema([schema.field(column) for column in columns])


def check_columns(uri: str, wanted: list[str], names: list[str]) -> None:
    """Raises InputError if the names of a file's columns do not have each wanted one exactly once."""
    for column in wanted:
        if names.count(column) != 1:
            found = f"{names.count(column)} columns named" if column in names else "no column"
            raise InputError(f"{uri} has {found} {column!r}; columns found: {', '.join(names)}")


def _is_dimension(type: pa.DataType) -> bool:
    """Whether a column can be one dimension; one of nulls has no type."""
    return is_number(type) or pa.types.is_null(type)


def is_list(type: pa.DataType) -> bool:
    return pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)


def split_text(texts: pa.Array) -> pa.Array:
    """The numbers of each text as a list of strings."""
    return pc.split_pattern_regex(pc.ascii_trim(texts, BRACKETS), SEPARATOR)


def has_vector(column: pa.Array) -> pa.Array:
    """Bool [n] of lists or texts: false for null and for a text of spaces."""
    if is_list(column.type):
        return column.is_valid()
    return pc.fill_null(pc.greater(pc.binary_length(pc.ascii_trim_whitespace(column)), 0), False)


def matrix(columns: list[pa.Array], first: int, width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers [n] and vectors [n, width] of the rows of a table that have a vector.

    Args:
        columns: one column of lists or texts; or `width` columns of numbers, all null for a row without a vector.
        first: number of the table's first row.
        dtype: float16 or float32; nulls become NaN.

    Raises:
        BadRow: a vector of another width, or a text that is not numbers.
    """
    type = pa.float16() if dtype == "float16" else pa.float32()
    if _is_dimension(columns[0].type):
        numbers = [column.cast(type, safe=False).to_numpy(zero_copy_only=False) for column in columns]
        given = ~np.logical_and.reduce([column.is_null().to_numpy(zero_copy_only=False) for column in columns])
        return first + np.flatnonzero(given), np.stack(numbers, axis=1)[given]
    (column,) = columns
    given = has_vector(column)
    rows, vectors = first + np.flatnonzero(given.to_numpy(zero_copy_only=False)), column.filter(given)
    vectors = vectors if is_list(vectors.type) else split_text(vectors)
    lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        bad = np.flatnonzero(lengths != width)[0]
        raise BadRow(rows[bad], f"has {lengths[bad]} values, but others have {width}")
    flat = vectors.flatten()
    try:
        return rows, _cast(flat, type).to_numpy(zero_copy_only=False).reshape(len(rows), width)
    except pa.ArrowInvalid:
        bad = int(id_columns.refused_positions(flat, lambda part: _cast(part, type))[0])
        raise BadRow(rows[bad // width], f"holds {shown(flat[bad])}, which is not a number") from None


def shown(text: pa.Scalar) -> str:
    """A text for a message: quoted, in one line, and not too long."""
    return repr(text.as_buffer().to_pybytes()[:60].decode(errors="replace"))


def _cast(values: pa.Array, type: pa.DataType) -> pa.Array:
    """Numbers or texts as floats; those out of range become infinite. Raises ArrowInvalid: not a number."""
    numbers = values if is_number(values.type) else values.cast(pa.float64())
    return numbers.cast(type, safe=False)
