"""Waiting for what other threads and processes do."""

from __future__ import annotations

from collections.abc import Callable

from edgebroker.common.runtime.clock import SystemClock, sleep

CLOCK = SystemClock()
SECONDS = 30.0
"""After which a test gives up."""


def wait_for(condition: Callable[[], object], what: str = "the condition", seconds: float = SECONDS) -> float:
    """Look again and again until the condition holds; how long it took. TimeoutError says what did not happen."""
    begun = CLOCK.monotonic()
    while not condition():
        if CLOCK.monotonic() - begun > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        sleep(0.005)
    return CLOCK.monotonic() - begun
