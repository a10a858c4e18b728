"""Publishing at a steady rate."""

from __future__ import annotations

from edgebroker.common.runtime.clock import SystemClock, sleep


class Pace:
    """A number of records a second, counted from the start; rate 0 never waits."""

    def __init__(self, rate: float) -> None:
        self._rate, self._clock = rate, SystemClock()
        self._began = self._clock.monotonic()

    def wait(self, number: int) -> None:
        """Block until record `number` is due."""
        if self._rate > 0:
            ahead = self._began + number / self._rate - self._clock.monotonic()
            if ahead > 0.001:
                sleep(ahead)
