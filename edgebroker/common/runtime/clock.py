"""Time, from one place, so that tests can turn the clock themselves."""

import time
from typing import Protocol


class Clock(Protocol):
    """What the rest of the program may know about time. Both calls are cheap and callable from any thread."""

    def monotonic(self) -> float:
        """Seconds that never jump: the only time that timeouts and ages are counted in."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970 as the machine believes: for display and for stamps, never for order."""


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


def sleep(seconds: float) -> None:
    """Block the calling thread: for the command line and client back-off, never on the loop."""
    time.sleep(seconds)


def second_of_day(wall_ms: int) -> float:
    """How far the day has come at a wall clock time, in this machine's time zone."""
    local = time.localtime(wall_ms / 1000)
    return local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec + wall_ms % 1000 / 1000
