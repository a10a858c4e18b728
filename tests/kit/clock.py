"""Time that a test turns by hand: a clock, and a scheduler that goes one iteration at a time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

START_WALL_MS = 1_800_000_000_000


class ManualClock:
    """Time stands still until it is told otherwise; both clocks may be turned apart."""

    def __init__(self, monotonic: float = 1000.0, wall_ms: int = START_WALL_MS) -> None:
        self.seconds, self.wall = monotonic, wall_ms

    def monotonic(self) -> float:
        return self.seconds

    def wall_ms(self) -> int:
        return self.wall

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        self.wall += int(seconds * 1000)


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualScheduler:
    """edgebroker.common.runtime.scheduler.Scheduler, one turn at a time. What a callback raises goes to the test."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        self.reset()

    def reset(self) -> None:
        self._timers: list[tuple[float, int, Timer]] = []
        self._posted: list[Callable[[], None]] = []
        self._end_of_turn: list[Callable[[], None]] = []

    def now(self) -> float:
        return self._clock.monotonic()

    def clock_now(self) -> float:
        return self._clock.monotonic()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.now() + seconds, next(self._numbers), timer))
        return timer

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self._posted.append(callback)

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...
    def remove_reader(self, fd: int) -> None: ...

    def at_end_of_iteration(self, callback: Callable[[], None]) -> None:
        self._end_of_turn.append(callback)

    def due(self) -> float:
        """When something is to be done next."""
        return self.now() if self._posted else self._timers[0][0]

    def turn(self) -> None:
        posted, self._posted = self._posted, []
        for callback in posted:
            callback()
        while self._timers and self._timers[0][0] <= self.now():
            due = heapq.heappop(self._timers)[2].callback
            if due is not None:
                due()
        for callback in self._end_of_turn:
            callback()
