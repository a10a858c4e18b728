"""An application as a process: one thread works, the loop watches it and takes signals.

loop: signals, the watch, timers          worker: Instance.run()          clients and outbox: threads of their own
"""

from __future__ import annotations

import logging

from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.runtime.threads import start_thread
from edgebroker.consumer.handling.watch import LOOK_SECONDS
from edgebroker.consumer.instance import Instance
from edgebroker.network.io.loop import Loop

log = logging.getLogger(__name__)


class StuckError(Exception):
    """A call does not end, and nothing ends it but the end of the process."""


class Service:
    """run() belongs to the main thread; stop() may be called by any, and by a signal handler."""

    def __init__(self, instance: Instance, stop_seconds: float) -> None:
        self._instance, self._stop_seconds = instance, stop_seconds
        self._loop = Loop(SystemClock(), slow_level=logging.DEBUG)
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Until stop(). Raises what Instance.run() raises, and StuckError."""
        start_thread("edgebroker-worker", self._work)
        self._loop.call_later(LOOK_SECONDS, self._look)
        self._loop.run()
        self._loop.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End: what has begun is finished, if that does not take too long."""
        self._loop.call_soon_threadsafe(self._stop)

    def _work(self) -> None:
        try:
            self._instance.run()
        except BaseException as error:
            self._failure = error
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _stop(self) -> None:
        self._instance.stop()
        self._loop.call_later(self._stop_seconds, self._leave)

    def _leave(self) -> None:
        log.warning("stopping takes longer than %g s: what is not stored yet comes again", self._stop_seconds)
        self._loop.stop()

    def _look(self) -> None:
        self._loop.call_later(LOOK_SECONDS, self._look)
        late = self._instance.watch.look()
        if late is None:
            return
        if late.stuck:
            self._failure = StuckError(f"{late.what} does not end: the process starts again")
            self._loop.stop()
        else:
            log.error("%s takes longer than %g s: it is told to end", late.what, late.seconds)
