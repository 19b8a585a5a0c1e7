"""Intermediate arrays of prepare on local disk.

What grows with the interactions or with the items' content is kept in memory-mapped files here and handled in blocks,
so that memory is bounded by `prepare.memory_gib`. The folder goes when the context ends, also after an error.

A mapped page counts as memory of the process until the system takes it back, which it does late. `blocks` hands pages
back after each block, so that what a person sees of the process stays bounded too.
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
        folder: existing local folder to make it in; None: the system's temporary folder.
        memory_bytes: what one blocked step may hold in memory at a time; blocks are sized by it.

    Raises:
        InputError: the folder does not exist.
    """

    def __init__(self, folder: str | None = None, memory_bytes: int = 1 << 30):
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"prepare.scratch {folder} is no folder on this machine; make it, or name another")
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
        """A new array on disk, zeros; plain empty memory where it has no entries.

        Raises:
            InputError: the disk has no room for it. (Room is taken at once: a full disk under a mapped page would end
            the process without a word.)
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
                raise self._no_room(size, error) from error
        return self._map(path, dtype, shape)

    def growing(self, dtype) -> "Growing":
        """A new column on disk whose length is not known yet."""
        return Growing(self, self._new_path(), np.dtype(dtype))

    def discard(self, *arrays: np.ndarray | None) -> None:
        """Free the disk space of arrays from here that nobody reads any more; others (and None) are left alone."""
        for array in arrays:
            if isinstance(array, np.memmap) and Path(array.filename).parent == self.path:
                Path(array.filename).unlink(missing_ok=True)

    def rows(self, row_bytes: int) -> int:
        """Rows of a block, where a row takes `row_bytes` in memory with all its temporaries."""
        return max(self.memory_bytes // max(row_bytes, 1), 1)

    def blocks(self, total: int, row_bytes: int) -> Iterator[slice]:
        """Blocks of `rows(row_bytes)` rows that together are [0, total)."""
        size = self.rows(row_bytes)
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))
            self.release()

    def release(self) -> None:
        """Hand the mapped pages of all arrays back to the system; their contents stay in the files."""
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

    def _no_room(self, size: int, error: OSError) -> InputError:
        return InputError(
            f"no room for {size / 1e9:.1f} GB of intermediate data in {self.path.parent} ({error.strerror}); "
            "name a larger disk in prepare.scratch"
        )


class Growing:
    """A column that is appended to and then becomes an array."""

    def __init__(self, scratch: Scratch, path: Path, dtype: np.dtype):
        self.scratch, self.path, self.dtype, self.rows = scratch, path, dtype, 0
        self._file = open(path, "wb")  # noqa: SIM115 - open between calls

    def append(self, values: np.ndarray) -> None:
        """Raises InputError where the disk is full."""
        values = np.ascontiguousarray(values, self.dtype)
        try:
            self._file.write(values.data)
        except OSError as error:
            raise self.scratch._no_room(values.nbytes, error) from error
        self.rows += len(values)

    def finish(self) -> np.ndarray:
        self._file.close()
        return self.scratch._map(self.path, self.dtype, (self.rows,)) if self.rows else np.zeros(0, self.dtype)


class Buckets:
    """Rows dealt to buckets that lie one after the other in scratch: the way to sort, group or shuffle more rows than
    fit in memory. Rows keep their order within a bucket.

    Args:
        sizes: rows that each bucket will get, at most.
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
        """Put each row into its bucket."""
        kind = np.uint16 if len(self) <= 1 << 16 else np.int64  # numpy sorts 16 bits by radix
        order = np.argsort(bucket.astype(kind), kind="stable")
        counts = np.bincount(bucket, minlength=len(self))
        stops = np.cumsum(counts)
        for values, out in zip(columns, self.columns, strict=True):
            values = values[order]
            for b in np.flatnonzero(counts):
                out[self.ends[b] : self.ends[b] + counts[b]] = values[stops[b] - counts[b] : stops[b]]
        self.ends += counts

    def bucket(self, number: int) -> list[np.ndarray]:
        """The columns of one bucket: parts of the arrays in scratch, so what is assigned to them stays."""
        return [column[self.starts[number] : self.ends[number]] for column in self.columns]
