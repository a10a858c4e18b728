"""Whether the node is well: what /readyz answers, what is logged when that changes, what the supervisor is told.

A node without its parent is degraded, never not ready: a store goes on selling while the WAN is down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from edgebroker.broker.observe.problems import ADVICE, BLOCKING

log = logging.getLogger(__name__)

Problems = Callable[[], dict[str, str]]


class Supervisor:
    """The service manager of the process (systemd). This one is a no-op."""

    def starting(self, done: int, total: int) -> None:
        """So many of the topics are open: the start goes on."""

    def status(self, line: str) -> None:
        """How the node is, in one line; called whenever that changes."""


class Verdict(msgspec.Struct):
    """`status`: ok, degraded or not ready; the checks by name; warnings by the name of the problem."""

    status: str
    checks: dict[str, str]
    warnings: dict[str, str]


class Health:
    """Owned by the loop thread. `ready` says that the node is started and not stopping, `missing_parent` why the parent
    is not connected ("" when it is, or none is configured)."""

    def __init__(
        self,
        ready: Callable[[], bool],
        problems: Problems,
        missing_parent: Callable[[], str],
        supervisor: Supervisor,
    ) -> None:
        self._ready, self._problems, self._supervisor = ready, problems, supervisor
        self._missing_parent = missing_parent
        self._known: dict[str, str] = {}
        self._line = ""

    def problems(self) -> dict[str, str]:
        """What is wrong now, by name, the missing parent included."""
        found, why = self._problems(), self._missing_parent()
        if why:
            found["parent"] = f"not connected: {why}"
        return found

    def verdict(self) -> Verdict:
        """The answer of /readyz."""
        problems = self.problems()
        blocking = {name: problems.pop(name) for name in BLOCKING if name in problems}
        checks = {
            "started": "ok" if self._ready() else "stopping or starting",
            "storage": "; ".join(f"{name}: {why}" for name, why in blocking.items()) or "ok",
        }
        ok = self._ready() and not blocking
        status = ("degraded" if problems else "ok") if ok else "not ready"
        return Verdict(status, checks, problems)

    def check(self) -> None:
        """Log what has become wrong, or was resolved, since the last check."""
        now = self.problems()
        for name, why in now.items():
            if name not in self._known:
                level = logging.ERROR if name in BLOCKING else logging.WARNING
                log.log(level, "%s: %s; do: %s", name, why, ADVICE[name], extra={"problem": name})
        for name in self._known.keys() - now.keys():
            log.info("resolved: %s", name, extra={"problem": name})
        self._known = now
        line = "ready" if not now else "; ".join(f"{name}: {why}" for name, why in now.items())[:200]
        if line != self._line:
            self._line = line
            self._supervisor.status(line)
