"""The loop: one thread, one selector, timers, and a door for other threads.

A turn is: wait, run what is ready, run what other threads posted, run due timers, give those who wait for their turn
the time of one millisecond, then the end-of-turn callbacks (the group commit). Callbacks must not wait for anything;
one that takes more than 20 ms is counted and logged.

Nobody has the loop for himself: whoever has more to do than his share of a turn (wire/session, http/server) does the
rest with call_in_turn(), where all who wait share that millisecond. What is ready takes ten milliseconds of a turn at
most; the rest of it is run in the next one.
"""

from __future__ import annotations

import heapq
import logging
import selectors
import socket
from collections import deque
from collections.abc import Callable

from edgebroker.common.runtime.clock import Clock

log = logging.getLogger(__name__)

SLOW_SECONDS = 0.02
LOG_SLOW_EVERY_SECONDS = 1.0
READY_SECONDS, TURNS_SECONDS = 0.01, 0.001
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

Ready = Callable[[int], None]


class TimerHandle:
    """A timer; cancel() may be called at any time."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def __lt__(self, other: TimerHandle) -> bool:
        return self.due < other.due

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """The Scheduler of common/runtime/scheduler.py. Only call_soon_threadsafe may be called by other threads.

    slow_level: how it is logged that a callback took more than 20 ms."""

    def __init__(self, clock: Clock, *, slow_level: int = logging.WARNING) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[TimerHandle] = []
        self._posted: deque[Callable[[], None]] = deque()
        self._turns: deque[Callable[[], None]] = deque()
        self._ready: deque[tuple[selectors.SelectorKey, int]] = deque()
        self._end_of_turn: list[Callable[[], None]] = []
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, READ, self._drain_wakeups)
        self._wake_pending = False
        self._stopping = False
        self._now = clock.monotonic()
        self._slow_logged, self._slow_level = 0.0, slow_level
        self.slow_callbacks = self.failed_callbacks = 0
        self.iterations = 0

    # ---- the scheduler ----

    def now(self) -> float:
        return self._now

    def clock_now(self) -> float:
        """Monotonic seconds at this moment: to measure within a turn, and for loops whose turns may be long apart."""
        return self._clock.monotonic()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> TimerHandle:
        timer = TimerHandle(self._clock.monotonic() + seconds, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def call_in_turn(self, callback: Callable[[], None]) -> None:
        """Run a callback when those who asked before had their turn: for the rest of what is more than a share."""
        self._turns.append(callback)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self._posted.append(callback)
        if not self._wake_pending:
            self._wake_pending = True
            try:
                self._waker.send(b"x")
            except (BlockingIOError, OSError):
                pass  # a full pipe wakes as well; a closed one has no reader to wake

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, READ, lambda mask: callback())

    def remove_reader(self, fd: int) -> None:
        self._selector.unregister(fd)

    def at_end_of_iteration(self, callback: Callable[[], None]) -> None:
        self._end_of_turn.append(callback)

    def remove_end_of_iteration(self, callback: Callable[[], None]) -> None:
        self._end_of_turn = [one for one in self._end_of_turn if one != callback]

    # ---- descriptors ----

    def register(self, fd: int, events: int, ready: Ready) -> None:
        self._selector.register(fd, events, ready)

    def modify(self, fd: int, events: int, ready: Ready) -> None:
        self._selector.modify(fd, events, ready)

    def unregister(self, fd: int) -> None:
        self._selector.unregister(fd)

    # ---- running ----

    def run(self) -> None:
        """Turn until stop()."""
        while not self._stopping:
            self.turn()

    def stop(self) -> None:
        self._stopping = True

    def turn(self, timeout: float | None = None) -> None:
        """One turn; waits at most `timeout` seconds for something to do (None: until there is)."""
        timers = self._timers
        while timers and timers[0].callback is None:
            heapq.heappop(timers)
        if self._posted or self._turns or self._ready:
            timeout = 0.0
        elif timers:
            due = max(0.0, timers[0].due - self._clock.monotonic())
            timeout = due if timeout is None else min(timeout, due)
        if not self._ready:
            self._ready.extend(self._selector.select(timeout))
        self._now = began = self._clock.monotonic()
        if self._ready:
            began = self._run_ready(began)
        if self._posted:
            count = len(self._posted)
            for _ in range(count):
                self._guarded(self._posted.popleft())
            began = self._watch(began, "what was posted for an iteration", count)
        while timers and timers[0].due <= self._now:
            callback = heapq.heappop(timers).callback
            if callback is not None:
                self._guarded(callback)
                began = self._watch(began, "a timer", 1, callback)
        if self._turns:
            began = self._run_turns(began)
        for callback in self._end_of_turn:
            self._guarded(callback)
        self._watch(began, "the end of an iteration", 1)
        self.iterations += 1

    def _run_ready(self, began: float) -> float:
        until = began + READY_SECONDS
        while self._ready and began < until:
            key, mask = self._ready.popleft()
            try:
                key.data(mask)
            except Exception:
                self._failed(key.data)
            began = self._watch(began, "an event", 1)
        return began

    def _run_turns(self, began: float) -> float:
        until = began + TURNS_SECONDS
        for _ in range(len(self._turns)):
            self._guarded(self._turns.popleft())
            began = self._watch(began, "a turn", 1)
            if began >= until:
                break
        return began

    def _guarded(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            self._failed(callback)

    def _failed(self, callback: object) -> None:
        """A defect in one callback must not end the node: it is logged and counted, the others go on."""
        self.failed_callbacks += 1
        log.exception("%s failed", getattr(callback, "__qualname__", callback))

    def _watch(self, began: float, what: str, count: int, callback: object = None) -> float:
        now = self._clock.monotonic()
        if now - began > SLOW_SECONDS * max(1, count):
            self.slow_callbacks += 1
            if now - self._slow_logged > LOG_SLOW_EVERY_SECONDS:
                self._slow_logged = now
                log.log(self._slow_level, "%s kept the loop for %.0f ms", what, (now - began) * 1000)
                log.debug("it was %s", getattr(callback, "__qualname__", what))
        return now

    def _drain_wakeups(self, mask: int) -> None:
        try:
            self._woken.recv(4096)
        except BlockingIOError:
            pass
        # Only after the pipe is empty: cleared earlier, a wake-up sent in between would be swallowed while the flag
        # says that one is under way. What was posted until here runs later in this turn.
        self._wake_pending = False

    def close(self) -> None:
        self._selector.close()
        self._woken.close()
        self._waker.close()
