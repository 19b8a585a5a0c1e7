"""Lines of workers on the command's terminal: no prefix, no escape sequences, nothing that Ray logs about itself."""

import subprocess
import sys

from gtc_dist.launch import worker_output

COMMAND = """
import sys
import threading

from gtc_dist.launch import ray_cluster
from gtc_dist.preflight import ray_start

ray_start.SLOW_SECONDS = 50  # no line about a busy machine


class Watched:
    "A stream that sets an event when a line was written to it."

    def __init__(self, stream, end):
        self.stream, self.end, self.seen = stream, end, threading.Event()

    def write(self, text):
        self.stream.write(text)
        if self.end in text:
            self.seen.set()

    def flush(self):
        self.stream.flush()


ray_cluster.connect()
sys.stdout, sys.stderr = Watched(sys.stdout, "epoch 1/2"), Watched(sys.stderr, "disk is slow")
import ray


class Speaker:
    def speak(self):
        print("[2026-11-27 23:23:05,188 E 5799 5828] core_worker.cc:2465: Actor with class name: 'PreemptionWatcher'")
        print("[###   ] epoch 1/2", flush=True)
        print("warning: the disk is slow", file=sys.stderr, flush=True)


class SplitCoordinator(Speaker):
    pass


for speaker in (SplitCoordinator, Speaker):
    ray.get(ray.remote(speaker).remote().speak.remote())
assert sys.stdout.seen.wait(30) and sys.stderr.seen.wait(30)
"""


WARNING = """Failed to send resource request for train-19696893. If this only happens transiently, it's safe to ignore.
Traceback (most recent call last):
  File "autoscaling_coordinator_client.py", line 58, in send_resource_request
    ray.get(
ray.exceptions.GetTimeoutError: Get timed out: some object(s) not ready."""


def test_a_harmless_warning_of_ray_is_dropped_with_its_traceback(monkeypatch):
    printed = []
    monkeypatch.setattr(worker_output, "print_to_stdstream", lambda batch, **_: printed.extend(batch["lines"]))
    mine = ["Traceback (most recent call last):", "  raise KeyError", "KeyError"]
    worker_output.print_lines({"lines": ["before", *WARNING.splitlines(), "after", *mine]})
    assert printed == ["before", "after", *mine]


def test_lines_of_ranks_are_printed_plainly():
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[###   ] epoch 1/2\n"
    assert done.stderr == "warning: the disk is slow\n"
