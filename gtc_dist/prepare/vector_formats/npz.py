"""Vectors in a `.npz` file with the arrays `ids` [n] and `vectors` [n, width], read block by block."""

import errno
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.prepare.vector_formats.feature_chunk import FeatureChunk, FeatureHead, check_matrix, rows_at_once

IDS, VECTORS = "ids.npy", "vectors.npy"  # members of the archive
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError)  # of zipfile


def inspect_npz(uri: str, modality: ModalityConfig) -> FeatureHead:
    """Read the ids and the header of the vectors. Raises InputError: a broken file, a missing or unsuitable array."""
    with _archive(uri) as archive:
        names = archive.namelist()
        for name in (IDS, VECTORS):
            if name not in names:
                found = ", ".join(other.removesuffix(".npy") for other in names) or "none"
                raise InputError(
                    f"{uri} has no array {name.removesuffix('.npy')!r}; arrays found: {found} (write it with "
                    "np.savez(path, ids=..., vectors=...))"
                )
        with archive.open(VECTORS) as file:
            shape, _, dtype = formats.read_array_header(file)
        rows, width = check_matrix(uri, shape, dtype, dtype.kind in "fiu")
        size = archive.getinfo(VECTORS).file_size
        if size < rows * width * dtype.itemsize:
            raise InputError(f"{uri} is truncated: {size} bytes of vectors, but their header declares {shape}")
        with archive.open(IDS) as file:
            ids = id_array(uri, np.lib.format.read_array(file, allow_pickle=False))
    if len(ids) != rows:
        raise InputError(f"{uri} has {len(ids)} ids, but {rows} vectors")
    return FeatureHead(rows, ids, width, dtype == np.float16)


def read_npz(chunk: FeatureChunk) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of a whole file; one block if the rows are not contiguous. Raises InputError: a broken file."""
    with _archive(chunk.uri) as archive, archive.open(VECTORS) as file:
        (rows, width), fortran, dtype = formats.read_array_header(file)
        step = rows if fortran else rows_at_once(width, dtype.itemsize)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            values = np.frombuffer(file.read(count * width * dtype.itemsize), dtype)
            yield chunk.first + start + np.arange(count), values.reshape((count, width), order="F" if fortran else "C")


def id_array(uri: str, array: np.ndarray) -> pa.Array:
    """Ids from an array. Raises InputError: not one integer or string per row."""
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise InputError(f"{uri} holds {array.dtype} of shape {array.shape}; expected one integer or string per row")
    return pa.array(array.astype(array.dtype.newbyteorder("="), copy=False))


@contextmanager
def _archive(uri: str) -> Iterator[zipfile.ZipFile]:
    """An open file. Raises InputError if it is not readable."""
    with formats.parsing(uri, "a readable .npz file"), storage.open_input(uri) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (*BROKEN, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a broken archive: a place before 0
                raise
            raise ValueError(str(error) or type(error).__name__) from error
