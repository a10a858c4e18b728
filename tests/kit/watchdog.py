"""Fails a test in which one callback kept a loop for more than 50 ms of processor time.

Processor time, and without what the collector took, which finds a test run's objects: another program on the machine
changes nothing. Callbacks that other threads posted are counted together, 50 ms for each.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from edgebroker.network.io.loop import Loop

# More than the loop warns of (20 ms): a slower machine runs the tests, too.
ALLOWED_SECONDS = 0.05
found: list[str] = []
_collecting = _collected = 0.0


def install() -> None:
    """Watch every loop of this process."""
    watch = Loop._watch

    def watched(self: Any, began: float, name: str, count: int) -> float:
        global _collected
        now = time.thread_time()
        before, self.cpu_before = getattr(self, "cpu_before", None), now
        if before is not None and now - before - _collected > ALLOWED_SECONDS * max(1, count):
            found.append(f"{name} took {(now - before - _collected) * 1000:.0f} ms")
        _collected = 0.0
        return watch(self, began, name, count)

    Loop._watch = watched  # type: ignore[method-assign]
    gc.callbacks.append(_collector)


def _collector(phase: str, _: dict[str, int]) -> None:
    global _collecting, _collected
    if phase == "start":
        _collecting = time.thread_time()
    else:
        _collected += time.thread_time() - _collecting
