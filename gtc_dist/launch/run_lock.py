"""Run lock: one command at a time writes to a run folder.

The command that trains holds a lock file in the run folder and renews it every few seconds. Another command that finds
the file on the same machine checks whether the process that wrote it is alive; on another machine it waits until the
file has not been renewed for EXPIRES_SECONDS. So the run of a killed command can be resumed, and that of a running one
is refused. Clocks of different machines are never compared. A command whose lock was taken over (it could not reach the
storage for long) exits at once.
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from gtc_dist.checkpoint.run_folder import LOCK_FILE
from gtc_dist.data import storage
from gtc_dist.errors import InputError

RENEW_SECONDS = 15.0
EXPIRES_SECONDS = 60.0  # without a renewal
SETTLE_SECONDS = 2.0  # from writing the lock to checking who holds it: two commands may have started at once


@contextmanager
def hold_run_lock(run: str) -> Iterator[None]:
    """Hold the lock of the run folder `run`. The process exits if another command takes the lock over.

    Raises:
        InputError: another command holds the lock.
    """
    uri = storage.join(run, LOCK_FILE)
    _wait_until_free(run, uri)
    made = storage.missing_parents(run)
    pid = os.getpid()
    own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid, "began": _process_start(pid)}
    closing = threading.Event()
    storage.write_json(uri, {**own, "renewed": 0})
    if (found := _read_lock(uri)) and found["id"] != own["id"]:  # both commands found the folder free
        raise _refusal(run, found)

    def renew() -> None:
        renewals = 0
        while not closing.wait(RENEW_SECONDS if renewals else SETTLE_SECONDS):
            renewals += 1
            with suppress(Exception):  # storage unreachable or no permission for the moment: retried
                found = _read_lock(uri)
                if found and found["id"] != own["id"]:
                    print(f"{_holder(run, found)}; this command exits", file=sys.stderr, flush=True)
                    _exit()
                    return
                if not closing.is_set():
                    storage.write_json(uri, {**own, "renewed": renewals})

    thread = threading.Thread(target=renew, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()
        with suppress(OSError, InputError):
            if (_read_lock(uri) or own)["id"] == own["id"]:
                storage.remove_tree(uri)
            if not storage.listing(run):
                storage.remove_tree(run)  # nothing was written to it
            for folder in made:
                folder.rmdir()  # fails, as it should, on a folder that is not empty, such as of a run started meanwhile


def _wait_until_free(run: str, uri: str) -> None:
    """Return once nobody holds the lock. Raises InputError if a running command does."""
    found = _read_lock(uri)
    if found is None:
        return
    if found["host"] == socket.gethostname():
        if _process_start(found["pid"]) == found["began"]:
            raise _refusal(run, found)
        return
    print(
        f"{run} was being trained by process {found['pid']} on {found['host']}; waiting {EXPIRES_SECONDS:g} s to see "
        "whether it still is",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + EXPIRES_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(RENEW_SECONDS, EXPIRES_SECONDS) / 4)
        now = _read_lock(uri)
        if now is None:
            return
        if now != found:
            raise _refusal(run, now)


def _read_lock(uri: str) -> dict | None:
    """Content of the lock file; None if it is missing or unreadable."""
    try:
        found = storage.read_json(uri)
    except (FileNotFoundError, InputError):
        return None
    return found if isinstance(found, dict) and {"id", "host", "pid", "began"} <= found.keys() else None


def _process_start(pid: int) -> float | None:
    """Start time of a process of this machine, which distinguishes processes that reuse a pid; None if not alive."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError, TypeError):
        return None


def _holder(run: str, found: dict) -> str:
    return f"{run} is being trained by process {found['pid']} on {found['host']}"


def _refusal(run: str, found: dict) -> InputError:
    return InputError(f"{_holder(run, found)}; wait for it, or choose another run.name")


def _exit() -> None:
    os._exit(1)
