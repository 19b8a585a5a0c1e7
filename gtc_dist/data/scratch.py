"""Intermediate arrays of prepare on local disk.

What grows with the interactions or with the items' content is kept in memory-mapped files here and handled in blocks, so
that memory is bounded by `prepare.memory_gib`. The folder goes when the context ends, also after an error.
"""

import tempfile
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

    def __enter__(self) -> "Scratch":
        self._temporary = tempfile.TemporaryDirectory(prefix="gtc-prepare-", dir=self.parent)
        self.path = Path(self._temporary.name)
        return self

    def __exit__(self, *_) -> None:
        self._temporary.cleanup()

    def array(self, shape: int | tuple[int, ...], dtype) -> np.ndarray:
        """A new array on disk, zeros; plain empty memory where it has no entries."""
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        self._count += 1
        shape = (shape,) if isinstance(shape, int) else shape
        return np.lib.format.open_memmap(self.path / f"{self._count:06d}.npy", "w+", np.dtype(dtype), shape)

    def rows(self, row_bytes: int) -> int:
        """Rows of a block, where a row takes `row_bytes` in memory with all its temporaries."""
        return max(self.memory_bytes // max(row_bytes, 1), 1)
