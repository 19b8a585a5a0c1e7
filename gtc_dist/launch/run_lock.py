"""One command at a time writes to a run folder.

The command that trains renews `lease.json` in the run folder every few seconds. Another one that finds it, on the same
machine, looks whether that process is alive; on another machine, it waits until the lease has not been renewed for a
while. So the run of a command that was killed can be gone on with, and that of one that works is refused. No clocks are
compared. A command that finds its lease in other hands (it was cut off from the storage for long) ends at once.
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
SETTLE_SECONDS = 2.0  # from the first write to the first look at who has it: two commands may have started at once


@contextmanager
def hold_run_lock(run: str) -> Iterator[None]:
    """Hold the lease of the run folder `run`; the process ends where another command has taken it.

    Raises:
        InputError: another command holds it.
    """
    uri = storage.join(run, LOCK_FILE)
    _await(run, uri)
    made = storage.missing_parents(run)
    mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}
    over = threading.Event()
    storage.write_json(uri, {**mine, "renewed": 0})
    if (found := _read(uri)) and found["id"] != mine["id"]:  # both found nothing
        raise _refused(run, found)

    def renew() -> None:
        times = 0
        while not over.wait(RENEW_SECONDS if times else SETTLE_SECONDS):
            times += 1
            with suppress(Exception):  # no object store for the moment, or no permission; tried again
                found = _read(uri)
                if found and found["id"] != mine["id"]:
                    print(f"{_taken(run, found)}; this one ends", file=sys.stderr, flush=True)
                    _end()
                    return
                if not over.is_set():
                    storage.write_json(uri, {**mine, "renewed": times})

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(OSError, InputError):
            if (_read(uri) or mine)["id"] == mine["id"]:
                storage.remove_tree(uri)
            if not storage.listing(run):
                storage.remove_tree(run)  # a folder that nothing came into
            for folder in made:
                folder.rmdir()  # never one that holds something, such as a run that began meanwhile


def _await(run: str, uri: str) -> None:
    """Return when nobody holds the lease. Raises InputError where someone does."""
    found = _read(uri)
    if found is None:
        return
    if found["host"] == socket.gethostname():
        if _began(found["pid"]) == found["began"]:
            raise _refused(run, found)
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
        now = _read(uri)
        if now is None:
            return
        if now != found:
            raise _refused(run, now)


def _read(uri: str) -> dict | None:
    """The lease; None where there is none that can be read."""
    try:
        found = storage.read_json(uri)
    except (FileNotFoundError, InputError):
        return None
    return found if isinstance(found, dict) and {"id", "host", "pid", "began"} <= found.keys() else None


def _began(pid: int) -> float | None:
    """When a process of this machine began; tells it from a later one with its number. None: there is none."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError, TypeError):
        return None


def _taken(run: str, found: dict) -> str:
    return f"{run} is being trained by process {found['pid']} on {found['host']}"


def _refused(run: str, found: dict) -> InputError:
    return InputError(f"{_taken(run, found)}; wait for it, or choose another run.name")


def _end() -> None:
    os._exit(1)
