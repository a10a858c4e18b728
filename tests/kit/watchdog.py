"""Fails a test in which one callback kept a loop for too long: 200 ms of processor time, or $EB_LOOP_MS.

The aim is 20 ms (`make test-watchdog`); a slow machine has to pass the tests, too. Processor time, and without what the
collector took, which finds a test run's objects: another program on the machine changes nothing. Callbacks that other
threads posted are counted together, as much for each.
"""

from __future__ import annotations

import gc
import os
import time
from threading import get_ident
from typing import Any

from edgebroker.network.io.loop import Loop

ALLOWED_SECONDS = float(os.environ.get("EB_LOOP_MS", "200")) / 1000
found: list[str] = []
# By thread: when a collection began, and what collections took since the loop of the thread was looked at.
_began: dict[int, float] = {}
_collected: dict[int, float] = {}


def install() -> None:
    """Watch every loop of this process. What a test does between two turns of its loop is not a callback's."""
    watch, turn = Loop._watch, Loop.turn

    def turned(self: Any, timeout: float | None = None) -> None:
        self.watched = time.thread_time()
        _collected.pop(get_ident(), None)
        turn(self, timeout)

    def watched(self: Any, began: float, what: str, count: int, callback: object = None) -> float:
        now, collected = time.thread_time(), _collected.pop(get_ident(), 0.0)
        taken, self.watched = now - self.watched - collected, now
        if taken > ALLOWED_SECONDS * max(1, count):
            found.append(f"{getattr(callback, '__qualname__', what)} took {taken * 1000:.0f} ms")
        return watch(self, began, what, count, callback)

    Loop._watch, Loop.turn = watched, turned  # type: ignore[method-assign]
    gc.callbacks.append(_collector)


def _collector(phase: str, _: dict[str, int]) -> None:
    thread = get_ident()
    if phase == "start":
        _began[thread] = time.thread_time()
    else:
        _collected[thread] = _collected.get(thread, 0.0) + time.thread_time() - _began.pop(thread, time.thread_time())
