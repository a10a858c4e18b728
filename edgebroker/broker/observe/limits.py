"""Limits that were reached: how often each since the start, and as a problem for a minute after the last time."""

from __future__ import annotations

from edgebroker.broker.observe.metrics import Metrics
from edgebroker.common.runtime.scheduler import Scheduler

PROBLEM_SECONDS = 60.0


class ReachedLimits:
    """Owned by the loop thread."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self._scheduler, self._metrics = scheduler, metrics
        self._reached: dict[str, tuple[float, str]] = {}

    def reached(self, name: str, what: str, times: int = 1) -> None:
        """limits.NAME was reached; `what` happened because of it."""
        counts = self._metrics.limits_reached
        counts[name] = counts.get(name, 0) + times
        self._reached[name] = (self._scheduler.now(), what)

    def problems(self) -> dict[str, str]:
        since = self._scheduler.now() - PROBLEM_SECONDS
        counts = self._metrics.limits_reached
        lines = [
            f"limits.{name}: {what} ({counts[name]:,} since the start)"
            for name, (at, what) in sorted(self._reached.items())
            if at > since
        ]
        return {"limits": "; ".join(lines)} if lines else {}
