"""How a rank's process gives memory back to the system."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BYTES = 2**30  # a process keeps freed blocks, and free memory in total, up to this size


def keep_memory() -> None:
    """Make glibc keep freed blocks of any size for the next step. By default it returns large blocks to the system,
    which has to clear every page again: a tenth of a training step on a CPU. No effect with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, KEPT_BYTES)
