"""Out-of-core arrays of prepare on local disk.

Arrays that grow with the interactions or with the items' content are memory-mapped files, processed in blocks, so that
memory is bounded by `prepare.memory_gib`. The folder is removed when the context ends, also after an error.

Mapped pages count as memory of the process until the operating system reclaims them, which it does late. `blocks`
releases the pages after each block, so that the resident memory of the process stays bounded as well.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from mmap import MADV_DONTNEED, mmap
from pathlib import Path

import numpy as np

from gtc_dist.errors import InputError


class Scratch:
    """A temporary folder of memory-mapped arrays.

    Args:
        folder: existing local folder for it; None: the system's temporary folder.
        memory_bytes: memory of one block with its temporaries; determines the size of blocks.

    Raises:
        InputError: the folder does not exist.
    """

    def __init__(self, folder: str | None = None, memory_bytes: int = 1 << 30):
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"prepare.scratch {folder} is not a folder on this machine; create it, or name another")
        self.parent, self.memory_bytes = folder, memory_bytes
        self._count = 0
        self._mapped: list[weakref.ref[mmap]] = []

    def __enter__(self) -> "Scratch":
        self._temporary = tempfile.TemporaryDirectory(prefix="gtc-prepare-", dir=self.parent)
        self.path = Path(self._temporary.name)
        return self

    def __exit__(self, *_) -> None:
        self._temporary.cleanup()

    def array(self, shape: int | tuple[int, ...], dtype) -> np.ndarray:
        """A new array of zeros on disk; an array without entries is in memory.

        The disk space is allocated at once, because a full disk under a mapped page kills the process silently.

        Raises:
            InputError: not enough disk space.
        """
        shape, dtype = (shape,) if isinstance(shape, int) else shape, np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if not size:
            return np.zeros(shape, dtype)
        path = self._new_path()
        with open(path, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise self._disk_full(size, error) from error
        return self._map(path, dtype, shape)

    def growing(self, dtype) -> "GrowingColumn":
        """A new column on disk of unknown length."""
        return GrowingColumn(self, self._new_path(), np.dtype(dtype))

    def discard(self, *arrays: np.ndarray | None) -> None:
        """Free the disk space of arrays that are no longer needed; ignores None and arrays outside this scratch."""
        for array in arrays:
            if isinstance(array, np.memmap) and Path(array.filename).parent == self.path:
                Path(array.filename).unlink(missing_ok=True)

    def rows(self, row_bytes: int) -> int:
        """Rows per block, if a row with all its temporaries takes `row_bytes` of memory."""
        return max(self.memory_bytes // max(row_bytes, 1), 1)

    def blocks(self, total: int, row_bytes: int) -> Iterator[slice]:
        """Split [0, total) into blocks of `rows(row_bytes)` rows; releases mapped pages after each."""
        size = self.rows(row_bytes)
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))
            self.release()

    def release(self) -> None:
        """Return the mapped pages of all arrays to the operating system; the contents stay in the files."""
        self._mapped = [reference for reference in self._mapped if reference() is not None]
        for reference in self._mapped:
            if (mapping := reference()) is not None:
                mapping.madvise(MADV_DONTNEED)

    def _new_path(self) -> Path:
        self._count += 1
        return self.path / f"{self._count:06d}.bin"

    def _map(self, path: Path, dtype: np.dtype, shape: int | tuple[int, ...]) -> np.ndarray:
        array = np.memmap(path, dtype, "r+", shape=shape)
        self._mapped.append(weakref.ref(array._mmap))
        return array

    def _disk_full(self, size: int, error: OSError) -> InputError:
        return InputError(
            f"no space for {size / 1e9:.1f} GB of intermediate data in {self.path.parent} ({error.strerror}); "
            "name a larger disk in prepare.scratch"
        )


class GrowingColumn:
    """Append buffer on disk that becomes an array."""

    def __init__(self, scratch: Scratch, path: Path, dtype: np.dtype):
        self.scratch, self.path, self.dtype, self.rows = scratch, path, dtype, 0
        self._file = open(path, "wb")  # noqa: SIM115 - open between calls

    def append(self, values: np.ndarray) -> None:
        """Append values. Raises InputError if the disk is full."""
        values = np.ascontiguousarray(values, self.dtype)
        try:
            self._file.write(values.data)
        except OSError as error:
            raise self.scratch._disk_full(values.nbytes, error) from error
        self.rows += len(values)

    def finish(self) -> np.ndarray:
        """The column as a memory-mapped array."""
        self._file.close()
        return self.scratch._map(self.path, self.dtype, (self.rows,)) if self.rows else np.zeros(0, self.dtype)


class Buckets:
    """Rows partitioned into buckets on disk, to sort, group or shuffle more rows than fit in memory.

    Rows keep their order within a bucket.

    Args:
        sizes: largest number of rows of each bucket.
        columns: dtype of each column, or (dtype, width) for a column of vectors.
    """

    def __init__(self, scratch: Scratch, sizes: np.ndarray, columns: Sequence):
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.ends = self.starts[:-1].copy()
        self.columns = [
            scratch.array((int(self.starts[-1]), column[1]), column[0])
            if isinstance(column, tuple)
            else scratch.array(int(self.starts[-1]), column)
            for column in columns
        ]

    def __len__(self) -> int:
        return len(self.ends)

    def add(self, bucket: np.ndarray, *columns: np.ndarray) -> None:
        """Append each row to its bucket."""
        key_type = np.uint16 if len(self) <= 1 << 16 else np.int64  # numpy sorts 16-bit integers by radix
        order = np.argsort(bucket.astype(key_type), kind="stable")
        counts = np.bincount(bucket, minlength=len(self))
        stops = np.cumsum(counts)
        for values, out in zip(columns, self.columns, strict=True):
            values = values[order]
            for b in np.flatnonzero(counts):
                out[self.ends[b] : self.ends[b] + counts[b]] = values[stops[b] - counts[b] : stops[b]]
        self.ends += counts

    def bucket(self, number: int) -> list[np.ndarray]:
        """The columns of one bucket, as views: assignments change the data on disk."""
        return [column[self.starts[number] : self.ends[number]] for column in self.columns]
