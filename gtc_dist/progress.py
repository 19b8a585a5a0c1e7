"""Progress of long computations: a callback that takes messages, and a printer on stderr."""

import sys
import time
from collections.abc import Callable

ProgressCallback = Callable[[str], None]

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
