"""Vectors in a `.npy` matrix, read by byte range, so that a task fetches only its rows."""

from collections.abc import Iterator

import numpy as np

from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.prepare.vector_formats.feature_chunk import FeatureChunk, FeatureHead, check_matrix, rows_at_once


def inspect_npy(uri: str, modality: ModalityConfig) -> FeatureHead:
    """Check the header. Raises InputError: no matrix of numbers, a truncated file."""
    shape, fortran, dtype, offset = _header(uri)
    rows, width = check_matrix(uri, shape, dtype, dtype.kind in "fiu")
    expected = offset + rows * width * dtype.itemsize
    size = storage.file_signatures([uri])[0][1]
    if size < expected:
        raise InputError(f"{uri} is truncated: {size} bytes, but its header declares {expected}")
    # In Fortran order a row is not contiguous. From object storage, one request for all rows replaces one per column.
    step = None if fortran and not storage.is_local(uri) else rows_at_once(width, dtype.itemsize)
    return FeatureHead(rows, None, width, dtype == np.float16, step=step)


def read_npy(chunk: FeatureChunk) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The chunk's rows as one block."""
    shape, fortran, dtype, offset = _header(chunk.uri)
    row_bytes = shape[1] * dtype.itemsize
    rows = chunk.first + np.arange(chunk.stop - chunk.start)
    if storage.is_local(chunk.uri):
        matrix = np.load(storage.absolute(chunk.uri), mmap_mode="r", allow_pickle=False)
        yield rows, matrix[chunk.start : chunk.stop]
        return
    fs, path = storage.filesystem(chunk.uri)
    data = fs.cat_file(path, start=offset + chunk.start * row_bytes, end=offset + chunk.stop * row_bytes)
    order = "F" if fortran else "C"  # in Fortran order the chunk has all rows
    yield rows, np.frombuffer(data, dtype).reshape((len(rows), shape[1]), order=order)


def _header(uri: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype, and offset of the data in bytes."""
    with storage.open_input(uri) as file:
        try:
            return *formats.read_array_header(file), file.tell()
        except ValueError as error:
            raise InputError(f"{uri} is not a readable .npy file: {error}") from error
