"""What long steps say of how far they are, for the person who watches."""

import sys
import time
from collections.abc import Callable

ProgressCallback = Callable[[str], None]

SECONDS = 10.0  # between lines about the same step


def no_progress(message: str) -> None:
    """Takes what there is to say where nobody watches."""


class ProgressPrinter:
    """Lines on stderr with the seconds since the start: one for each finished step, and while a step takes long, one
    every few seconds."""

    def __init__(self):
        self.start = self.last = time.monotonic()

    def __call__(self, message: str) -> None:
        self.last = time.monotonic()
        print(f"[{self.last - self.start:6.1f} s] {message}", file=sys.stderr, flush=True)

    def often(self, message: str) -> None:
        """To be called with every block; prints if the last line is some seconds old."""
        if time.monotonic() - self.last >= SECONDS:
            self(f"... {message}")
