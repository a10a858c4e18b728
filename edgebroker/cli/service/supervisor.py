"""Notifications to systemd (sd_notify(3), sd_watchdog_enabled(3)): READY, STATUS, WATCHDOG and others, as datagrams to
$NOTIFY_SOCKET. Without that variable every call does nothing.

MAINPID is never sent: in the one-file form the program is a child of its loader, which systemd watches, and systemd
does not restart a unit after a crash when its main process is not a child of systemd. For the same reason WATCHDOG_PID,
which names the loader there, is ignored.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from edgebroker.broker.observe import health
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler

# Opening a log extends the start timeout by this much, so that a long recovery is not killed.
EXTENSION_SECONDS = 300


class Systemd(health.Supervisor):
    """Callable from any thread. A notification that cannot be sent is dropped without an error."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        micros = environment.get("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(micros) / 1e6 if micros.isdigit() and address else 0.0

    def _notify(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                pass

    def starting(self, done: int, total: int) -> None:
        """Extend the timeout of a start that makes progress."""
        self._notify(
            f"STATUS=checking logs: {done} of {total} topics", f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1_000_000}"
        )

    def ready(self) -> None:
        self._notify("READY=1", "STATUS=ready")

    def status(self, line: str) -> None:
        self._notify("STATUS=" + line.replace("\n", " "))

    def reloaded(self) -> None:
        """The reload has ended; the status line stays."""
        self._notify("READY=1")

    def reloading(self, clock: Clock) -> None:
        self._notify("RELOADING=1", f"MONOTONIC_USEC={int(clock.monotonic() * 1e6)}")

    def stopping(self) -> None:
        self._notify("STOPPING=1", "STATUS=stopping: syncing the logs")

    def feed_watchdog(self, scheduler: Scheduler) -> None:
        """Send WATCHDOG=1 from the loop, three times per period, so that systemd restarts a node with a stuck loop."""
        if not self.watchdog_seconds:
            return
        self._notify("WATCHDOG=1")
        scheduler.call_later(self.watchdog_seconds / 3, lambda: self.feed_watchdog(scheduler))
