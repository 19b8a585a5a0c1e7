"""What the readers of vector files share: what a file says of itself, the part that a task reads, and an invalid row.

Each reader is a module with two functions:

    inspect_X(uri, modality) -> FeatureHead             checks a file, not each vector; raises InputError
    read_X(chunk) -> Iterator[(row numbers, vectors)]   blocks int64 [n], numbers [n, width]; raises BadRow, InputError
"""

from dataclasses import dataclass

import pyarrow as pa

from gtc_dist.errors import InputError

CHUNK_BYTES = 32 << 20  # read at once


@dataclass(frozen=True)
class FeatureHead:
    """One file of vectors.

    Attributes:
        ids: item id of each row, or None if the row number is the id.
        width: of the vectors; None if the file has none.
        is_half: all values are float16.
        columns: of a table: those with the vectors, and the types to read them as.
        step: rows that a task reads; None: all.
        ids_from_text: the ids come from text without types, so strings may be integers.
    """

    rows: int
    ids: pa.Array | None
    width: int | None
    is_half: bool = False
    columns: pa.Schema | None = None
    step: int | None = None
    ids_from_text: bool = False


def check_matrix(uri: str, shape: tuple[int, ...], type: object, is_number: bool) -> tuple[int, int]:
    """Rows and width of a matrix of vectors. Raises InputError: it is none."""
    if not is_number:
        raise InputError(f"{uri} holds {type} values; features must be float or integer numbers")
    if len(shape) != 2 or shape[1] == 0:
        raise InputError(f"{uri} has shape {tuple(shape)}; features must be a matrix with one row per item")
    return shape[0], shape[1]


def rows_at_once(width: int, value_bytes: int) -> int:
    """Rows of a matrix that make a block of `CHUNK_BYTES`."""
    return max(CHUNK_BYTES // (width * value_bytes), 1)


@dataclass(frozen=True)
class FeatureChunk:
    """Rows [start, stop) of a file; `first` is the number of its first row in the modality."""

    modality: str
    uri: str
    format: str
    width: int
    dtype: str  # of the output: float16 or float32
    first: int
    start: int
    stop: int
    columns: pa.Schema | None = None  # as in the head


class BadRow(Exception):
    """An invalid row; the driver, which knows the ids, names its item.

    Args:
        row: number in the modality.
        problem: what follows `the vector of item 7`.
    """

    def __init__(self, row: int, problem: str):
        self.row, self.problem = int(row), problem
