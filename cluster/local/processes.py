"""Look-ups of this machine's processes in /proc (Linux)."""

import contextlib
import os
from pathlib import Path


def process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def environment_of(pid: int) -> bytes:
    """Environment of a process as in /proc: NAME=value, separated by zero bytes; empty if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # the process ended, or belongs to another user
        return b""


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
