"""Whether the node is well: what /readyz answers, what is logged when that changes, what the supervisor is told.

A node without its parent is degraded, never not ready: a store goes on selling while the WAN is down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from edgebroker.broker.observe.problems import ADVICE, BLOCKING

log = logging.getLogger(__name__)

Problems = Callable[[], dict[str, str]]


class Parent(Protocol):
    """The pipe to the parent, as far as it is known here."""

    last_error: str

    @property
    def connected(self) -> bool: ...


class Supervisor:
    """Who watches over the process (systemd). This one is told everything and does nothing."""

    def starting(self, done: int, total: int) -> None:
        """So many of the topics are open: the start goes on."""

    def status(self, line: str) -> None:
        """How the node is, in one line; told whenever that changes."""


class Health:
    """Owned by the loop thread. `ready` says that the node is started and not stopping."""

    def __init__(
        self,
        ready: Callable[[], bool],
        problems: Problems,
        parent: Callable[[], Parent | None],
        supervisor: Supervisor,
    ) -> None:
        self._ready, self._problems, self._parent, self._supervisor = ready, problems, parent, supervisor
        self._known: dict[str, str] = {}
        self._line = ""

    def problems(self) -> dict[str, str]:
        """What is wrong now, by name, the missing parent included."""
        found, parent = self._problems(), self._parent()
        if parent is not None and not parent.connected and parent.last_error:  # none: the first attempt is under way
            found["parent"] = f"not connected: {parent.last_error}"
        return found

    def verdict(self) -> dict[str, object]:
        """The answer of /readyz: `status` ok, degraded or not ready, the checks by name, and warnings."""
        problems = self.problems()
        blocking = {name: problems.pop(name) for name in BLOCKING if name in problems}
        checks = {
            "started": "ok" if self._ready() else "stopping or starting",
            "storage": "; ".join(f"{name}: {why}" for name, why in blocking.items()) or "ok",
        }
        ok = self._ready() and not blocking
        status = ("degraded" if problems else "ok") if ok else "not ready"
        return {"status": status, "checks": checks, "warnings": problems}

    def look(self) -> None:
        """Log what has become wrong or well again since the last look."""
        now = self.problems()
        for name, why in now.items():
            if name not in self._known:
                level = logging.ERROR if name in BLOCKING else logging.WARNING
                log.log(level, "%s: %s; do: %s", name, why, ADVICE[name], extra={"problem": name})
        for name in self._known.keys() - now.keys():
            log.info("%s is over", name, extra={"problem": name})
        self._known = now
        line = "ready" if not now else "; ".join(f"{name}: {why}" for name, why in now.items())[:200]
        if line != self._line:
            self._line = line
            self._supervisor.status(line)
