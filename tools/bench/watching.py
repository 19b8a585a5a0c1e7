"""Run commands and watch them from outside: seconds until they print something, their total time and memory."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import psutil


def printed(text: str) -> Callable[[str], bool]:
    """Condition for `seconds_until`: the output contains `text`."""
    return lambda output: text in output


def seconds_until(words: list[str], awaited: dict[str, Callable[[str], bool]]) -> dict[str, float]:
    """Seconds until each condition on the output of a command holds; then the command is killed, and its children end.

    Args:
        words: command.
        awaited: name -> condition on the whole output so far.
    """
    with tempfile.TemporaryFile("w+") as log:
        start, times = time.perf_counter(), {}
        process = psutil.Popen(words, stdout=log, stderr=log)
        while len(times) < len(awaited):
            time.sleep(0.2)
            output = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
            met = [name for name, is_met in awaited.items() if name not in times and is_met(output)]
            times |= dict.fromkeys(met, time.perf_counter() - start)
            if process.poll() is not None:
                sys.exit(f"{' '.join(words)} ended with status {process.returncode}: {output[-2000:]}")
        children = process.children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(children, timeout=120)
    return times


def run_watched(words: list[str]) -> dict:
    """Run a command; returns its seconds and the peak memory of all its processes.

    Memory is the proportional set size: a shared page counts by its share in each process. Memory-mapped files are
    counted apart, since the kernel can reclaim their pages at any time.
    """
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=sys.stderr)
    root, peaks = psutil.Process(process.pid), {"all": 0.0, "largest": 0.0, "files": 0.0}
    while process.poll() is None:
        memory = [memory_of(p) for p in family(root)]
        used = [m["Pss_Anon"] + m["Pss_Shmem"] for m in memory]
        files = [m["Pss_File"] for m in memory]
        for name, value in (("all", sum(used)), ("largest", max(used, default=0)), ("files", sum(files))):
            peaks[name] = max(peaks[name], value / 1024)
        time.sleep(1)
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with status {process.returncode}")
    result = {"seconds": time.perf_counter() - start, "peak_mib_all_processes": peaks["all"]}
    return result | {"peak_mib_largest_process": peaks["largest"], "peak_mib_mapped_files": peaks["files"]}


def family(root: psutil.Process) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(process: psutil.Process) -> dict[str, int]:
    """Proportional set size of a process in KiB, by kind; zeros for one that has ended."""
    found = dict.fromkeys(("Pss_Anon", "Pss_Shmem", "Pss_File"), 0)
    try:
        with open(f"/proc/{process.pid}/smaps_rollup") as file:
            for line in file:
                name = line.split(":")[0]
                if name in found:
                    found[name] = int(line.split()[1])
    except OSError:
        pass
    return found


def peak_mib() -> float:
    """Peak resident set size of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
