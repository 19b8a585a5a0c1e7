"""Progress of long computations on stderr: a callback that takes messages, a printer, and the time left."""

import sys
import time
from collections.abc import Callable

ProgressCallback = Callable[[str], None]
ShareDone = Callable[[float], None]  # called with the share of a step that is done, from 0 to 1

SECONDS = 10.0  # between lines of the same step


def no_progress(message: str) -> None:
    """Progress callback that does nothing."""


class ProgressPrinter:
    """Progress callback that prints to stderr, with the seconds since the start: a line per finished step, and a line
    every SECONDS within a long step."""

    def __init__(self):
        self.start = self.last = time.monotonic()

    def __call__(self, message: str) -> None:
        self.last = time.monotonic()
        print(f"[{self.last - self.start:6.1f} s] {message}", file=sys.stderr, flush=True)

    def often(self, message: str) -> None:
        """Print a message if the last line is older than SECONDS; to be called for every block of a long step."""
        if time.monotonic() - self.last >= SECONDS:
            self(f"... {message}")


class TimeLeft:
    """Progress of a step of which the share that is done is known: about every SECONDS a line with the share and the
    time left, judged by the time so far. On a terminal one line is drawn again every second instead.

    Args:
        what: what is being done, such as `lists of 1,000 users`.
    """

    def __init__(self, what: str):
        self.what, self.start = what, time.monotonic()
        self.last, self.live, self.drawn = self.start, sys.stderr.isatty(), False

    def __call__(self, done: float) -> None:
        """Args: done: the share, from 0 to 1."""
        now = time.monotonic()
        is_due = now - self.last >= (1.0 if self.live else SECONDS)
        if done <= 0 or not (is_due or (done >= 1 and self.drawn)):
            return
        self.last, elapsed = now, now - self.start
        line = f"{self.what}: {done:.1%} done after {duration(elapsed)}"
        line += f", {duration(elapsed / done * (1 - done))} left" if done < 1 else ""
        end = "" if self.live and done < 1 else "\n"
        print(f"\r{line:<78}" if self.live else line, end=end, file=sys.stderr, flush=True)
        self.drawn = done < 1


def duration(seconds: float) -> str:
    """Such as 1h02m, 5m03s, 12s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
