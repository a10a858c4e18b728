"""Functions of an application that are called at moments of its life, or every so many seconds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext

from edgebroker.common.runtime.clock import Clock
from edgebroker.consumer.database import AppDatabase, is_shortage
from edgebroker.consumer.declare.application import Hook
from edgebroker.consumer.handling.calls import Calls
from edgebroker.consumer.handling.errors import StoppedError, described

log = logging.getLogger(__name__)


class Hooks:
    """Belongs to the thread of the database. Raises sqlite3.Error when nothing can be stored."""

    def __init__(self, hooks: Sequence[Hook], calls: Calls, database: AppDatabase, clock: Clock) -> None:
        self._hooks, self._calls, self._database, self._clock = hooks, calls, database, clock
        self._due = {hook: clock.monotonic() + hook.seconds for hook in hooks if hook.seconds}

    @property
    def due(self) -> list[float]:
        """When those are to be called that are called again and again."""
        return list(self._due.values())

    def call_due(self) -> None:
        """Call those whose time has come."""
        for hook, due in self._due.items():
            if self._clock.monotonic() >= due:
                self._call(hook)
                self._due[hook] = self._clock.monotonic() + hook.seconds

    def call(self, moment: str) -> None:
        """Call those of a moment. What fails before the first record ends the application (StoppedError); later it is
        logged."""
        for hook in self._hooks:
            if hook.moment == moment:
                self._call(hook)

    def reset(self) -> None:
        """Call those that clear what handlers have made; within a transaction. Raises StoppedError when one fails: what
        it is to clear would be counted twice, so nothing is loaded again, and the next start tries."""
        for hook in self._hooks:
            if hook.moment == "reset":
                try:
                    self._calls.hook(hook.call, hook.name, wants_database=hook.wants_database, limited=False)
                except BaseException as error:
                    if is_shortage(error):
                        raise
                    raise StoppedError(f"{hook.name} failed: {described(error)}; nothing is loaded again") from error

    def _call(self, hook: Hook) -> None:
        limited = hook.moment != "start"
        try:
            with self._database.transaction() if hook.wants_database else nullcontext():
                self._calls.hook(hook.call, hook.name, wants_database=hook.wants_database, limited=limited)
        except BaseException as error:
            if is_shortage(error):
                raise
            why = f"{hook.name} failed: {described(error)}"
            if hook.moment == "start":
                raise StoppedError(why) from error
            log.error("%s", why)
