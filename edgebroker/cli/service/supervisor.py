"""The node's side of systemd's protocol (sd_notify(3), sd_watchdog_enabled(3)): READY, STATUS, WATCHDOG and the like,
datagrams to $NOTIFY_SOCKET. Without one every call does nothing.

MAINPID is never sent: in the one-file form the program is a child of its loader, which systemd watches, and a unit
whose main process is not a child of systemd is not started again after a crash. For the same reason WATCHDOG_PID,
which names the loader there, is not looked at.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from edgebroker.broker.observe import health as health
from edgebroker.common.clock import Clock
from edgebroker.common.scheduler import Scheduler

# Each log that was opened during a start buys this much time for the next one.
EXTENSION_SECONDS = 300


class Systemd(health.Supervisor):
    """Callable from any thread; a message that cannot be sent is lost, never an error."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        micros = environment.get("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(micros) / 1e6 if micros.isdigit() and address else 0.0

    def _say(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                pass

    def starting(self, done: int, total: int) -> None:
        """The start may take longer, as long as it goes on."""
        self._say(
            f"STATUS=checking logs: {done} of {total} topics", f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1_000_000}"
        )

    def ready(self) -> None:
        self._say("READY=1", "STATUS=ready")

    def status(self, line: str) -> None:
        self._say("STATUS=" + line.replace("\n", " "))

    def reloaded(self) -> None:
        """The status line is as it was."""
        self._say("READY=1")

    def reloading(self, clock: Clock) -> None:
        self._say("RELOADING=1", f"MONOTONIC_USEC={int(clock.monotonic() * 1e6)}")

    def stopping(self) -> None:
        self._say("STOPPING=1", "STATUS=stopping: storing what is left")

    def feed_watchdog(self, scheduler: Scheduler) -> None:
        """Say WATCHDOG=1 from the loop itself, three times within the time allowed: a loop that stands still is killed
        and started again."""
        if not self.watchdog_seconds:
            return
        self._say("WATCHDOG=1")
        scheduler.call_later(self.watchdog_seconds / 3, lambda: self.feed_watchdog(scheduler))
