"""What a worker thread is calling, and for how long: seen from another thread, which ends what takes too long.

The worker says once for many values what it calls; how far it is, is what is left in the iterator that it takes them
from. So watching costs nothing for each record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

LOOK_SECONDS = 0.25


class Todo(Protocol):
    """An iterator that knows how much is left: that of a list or of a range."""

    def __iter__(self) -> Iterator[object]: ...
    def __next__(self) -> object: ...
    def __length_hint__(self) -> int: ...


class Late(NamedTuple):
    """A call that takes longer than `seconds`. `stuck`: it was told to end a whole such time ago, and has not."""

    what: str
    seconds: float
    stuck: bool


class _Call:
    __slots__ = ("end", "left", "seconds", "since", "todo", "told", "what")

    def __init__(self, what: str, seconds: float, todo: Todo, end: Callable[[], None], since: float) -> None:
        self.what, self.seconds, self.todo, self.end, self.since = what, seconds, todo, end, since
        # It takes the first one at once.
        self.left, self.told = todo.__length_hint__() - 1, False


class Watch:
    """`now` tells monotonic seconds. begin() and end() are the worker's; look() is called by another thread, every
    LOOK_SECONDS."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self._call: _Call | None = None
        self._late_left = -1

    def begin(self, what: str, seconds: float, todo: Todo, end: Callable[[], None]) -> None:
        """Values of `todo` are handled from now on, each within so many seconds; `end` is called, by another thread,
        when one takes longer."""
        self._late_left = -1
        self._call = _Call(what, seconds, todo, end, self._now())

    def end(self) -> int:
        """They are handled: `end` is not called any more. How many values were left when it was; -1: it was not. May be
        repeated."""
        with self._lock:
            self._call = None
            return self._late_left

    def look(self) -> Late | None:
        """What takes too long, told twice: when it is told to end, and when that did not help."""
        with self._lock:
            call, now = self._call, self._now()
            if call is None:
                return None
            left = call.todo.__length_hint__()
            if left != call.left:
                call.left, call.since = left, now
                return None
            if now - call.since < call.seconds:
                return None
            call.since, stuck, call.told = now, call.told, True
            if not stuck:
                self._late_left = left
                call.end()
            return Late(call.what, call.seconds, stuck)
