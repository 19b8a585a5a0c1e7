"""Adds up wall seconds by part of a step."""

import time


class Stopwatch:
    """Seconds by part; one part runs at a time."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._part, self._since = None, 0.0

    def part(self, name: str | None) -> None:
        """End the running part and start another (None: none)."""
        now = time.perf_counter()
        if self._part is not None:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = name, now

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken
