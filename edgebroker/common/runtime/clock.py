"""Time, from one place, so that tests can turn the clock themselves."""

import time
from typing import Protocol

# 2026-01-01, before the first release: a clock that shows less was never set.
EARLIEST_WALL_MS = 1_767_225_600_000


def is_plausible(stamp_ms: int, now_ms: int, after_ms: int = 0) -> bool:
    """Whether a stamp of a wall clock is evidence: not before there was a release, not before the stamp of what came
    before it (`after_ms`), not after now. Whatever else was stamped is dated from when a plausible clock saw it."""
    return max(EARLIEST_WALL_MS, after_ms) <= stamp_ms <= now_ms


class Clock(Protocol):
    """What the rest of the program may know about time. Both calls are cheap and callable from any thread."""

    def monotonic(self) -> float:
        """Seconds that never jump: the only time that timeouts and ages are counted in."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970 as the machine believes: for display and for stamps, never for order."""


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)  # it is asked for each record of an iteration

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


def sleep(seconds: float) -> None:
    """Block the calling thread: for the command line and client back-off, never on the loop."""
    time.sleep(seconds)


def second_of_day(wall_ms: int) -> float:
    """How far the day has come at a wall clock time, in this machine's time zone."""
    local = time.localtime(wall_ms / 1000)
    return local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec + wall_ms % 1000 / 1000
