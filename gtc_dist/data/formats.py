"""Read and write Parquet tables and `.npy` arrays at a URI.

Arrays are written in parts, so they may be larger than memory. No pickle: arrays of Python objects are refused.
"""

import hashlib
import math
import os
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gtc_dist.data import storage
from gtc_dist.data.storage_errors import is_connection_error
from gtc_dist.errors import InputError, Unreachable

ROW_GROUP = 1 << 18
VECTOR_ROW_GROUP = 1 << 13  # for tables with vectors: a reader of a few rows fetches one such group
VECTOR_PAGE_BYTES = 8 << 20  # one page per row group: small pages are two to three times slower


@contextmanager
def parsing(uri: str, expected: str) -> Iterator[None]:
    """Context manager that turns Arrow's errors about a file's content into an InputError, `<uri> is not <expected>`.

    Raises Unreachable if the connection to an object store breaks; other errors of disk and network pass unchanged.
    """
    try:
        yield
    except (InputError, Unreachable):
        raise
    except Exception as error:
        if not storage.is_local(uri) and is_connection_error(error):
            raise Unreachable(f"cannot reach the object store to read {uri}: {error}") from error
        failed = isinstance(error, OSError) and error.errno is not None
        if failed or not isinstance(error, pa.ArrowException | OSError | KeyError | ValueError):
            raise
        message = str(error).replace("\0", "\\0")
        raise InputError(f"{uri} is not {expected} (repair it or write it again): {message}") from error


def read_lines(uri: str) -> list[str]:
    r"""Lines of a UTF-8 text file, as an editor counts them: they end in \n, \r\n or \r. Other characters that
    str.splitlines takes for ends stay in a line, since an id or a title may have them. Raises InputError."""
    with parsing(uri, "UTF-8 text"):
        return lines_of(storage.read_bytes(uri).decode("utf-8-sig"))


def lines_of(text: str) -> list[str]:
    """The lines of a text, as `read_lines`."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def write_table(uri: str, table: pa.Table) -> storage.WrittenFile:
    """Write a Parquet file.

    Tables with vectors (fixed-size lists) are stored without compression, because vectors do not compress, and in short
    row groups, so that `read_vectors` can fetch a few rows.
    """
    vectors = any(pa.types.is_fixed_size_list(field.type) for field in table.schema)
    layout: dict[str, Any] = {"row_group_size": ROW_GROUP, "compression": "zstd"}
    if vectors:
        layout = {
            "row_group_size": VECTOR_ROW_GROUP,
            "compression": "none",
            "use_dictionary": False,
            "write_statistics": False,
            "data_page_size": VECTOR_PAGE_BYTES,
        }
    with storage.create(uri) as file:
        pq.write_table(table, pa.PythonFile(file, mode="w"), **layout)
    return file.written


def read_table(uri: str, columns: list[str] | None = None, sha256: str | None = None) -> pa.Table:
    """Read a Parquet file. Raises InputError if its SHA-256 differs (None: no check)."""
    data = storage.read_bytes(uri)
    storage.check_sha256(uri, data, sha256)
    with parsing(uri, "a readable Parquet file"):
        return pq.read_table(pa.BufferReader(data), columns=columns)


def read_vectors(uri: str, column: str, start: int, stop: int) -> np.ndarray:
    """Read rows [start, stop) of a column of vectors, [n, width]; fetches only the row groups with these rows."""
    with storage.open_input(uri, buffered=False) as stream, parsing(uri, "a readable Parquet file"):
        file = pq.ParquetFile(stream, pre_buffer=True)
        bounds = np.cumsum([0] + [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
        groups = np.flatnonzero((bounds[:-1] < stop) & (bounds[1:] > start))
        values = file.read_row_groups(groups.tolist(), columns=[column], use_threads=False)[column]
    parts = [c.flatten().to_numpy(zero_copy_only=False).reshape(len(c), -1) for c in values.chunks]
    return np.concatenate(parts)[start - bounds[groups[0]] : stop - bounds[groups[0]]]


def write_array(uri: str, array: np.ndarray) -> storage.WrittenFile:
    """Write a `.npy` file in parts, so that a memory-mapped array may be larger than memory."""
    array = np.atleast_1d(array)
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    if array.dtype.hasobject:
        raise ValueError(f"{uri}: an array of {array.dtype} cannot be written")
    rows = max(storage.PART_BYTES // max(array[:1].nbytes, 1), 1)
    with storage.create(uri) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(array) if array.size else 0, rows):
            file.write(np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8).data)
    return file.written


def read_array(uri: str, sha256: str | None = None) -> np.ndarray:
    """Read a `.npy` file without a second copy in memory. Raises InputError if its SHA-256 differs (None: no check)."""
    digest = hashlib.sha256()
    with storage.open_input(uri, buffered=False) as file:
        try:
            shape, fortran, dtype = read_array_header(file)
        except ValueError as error:
            raise InputError(f"{uri} is not a plain .npy array: {error}") from error
        start = file.tell()
        if file.seek(0, os.SEEK_END) - start < math.prod(shape) * dtype.itemsize:
            raise InputError(f"{uri} is not a plain .npy array: it ends before its last row")
        array = np.empty(shape, dtype, order="F" if fortran else "C")
        file.seek(start if sha256 is None else 0)
        if sha256 is not None:
            digest.update(file.read(start))
        if array.size:
            flat = memoryview(array.reshape(-1, order="A").view(np.uint8))
            for start in range(0, len(flat), storage.PART_BYTES):
                part = flat[start : start + storage.PART_BYTES]
                if file.readinto(part) < len(part):
                    raise InputError(f"{uri} is not a plain .npy array: it ends before its last row")
                digest.update(part) if sha256 is not None else None
    if sha256 is not None:
        storage.check_digest(uri, digest.hexdigest(), sha256)
    return array


def read_array_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read shape, Fortran order and dtype from the header of a `.npy` file; the file is left at the start of its data.

    Raises:
        ValueError: no valid header, or an array of Python objects.
    """
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = reader(file)
    except (SyntaxError, TypeError, tokenize.TokenError) as error:  # numpy parses the header as Python
        raise ValueError(f"its header is invalid: {error}") from error
    if any(size < 0 for size in shape):
        raise ValueError(f"its header has the shape {shape}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are refused; save a matrix of numbers")
    return shape, fortran, dtype
