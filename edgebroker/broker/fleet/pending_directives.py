"""Directives for nodes below: kept until they answer, over lost lines and restarts.

    given -> stored -> sent down, and again every few seconds -> the node's report names it -> over

A node that refuses says so in its report as well. A directive has a time; when that is over and the node did not
answer, it is given up. That it reaches a node twice has no other effect: it has an id.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import Worker
from edgebroker.pipe.fleet import Fleet
from edgebroker.pipe.report import Report, ResyncDirective
from edgebroker.storage.checksummed import read_if_whole, write_checked

FILE_NAME = "directives"
TICK_SECONDS = 5.0
MOST_PENDING = 70_000
# The resyncs of one directive, a topic each, have ids that follow each other.
IDS_EACH = 1 << 20


class StoredDirective(msgspec.Struct):
    """`left`: seconds until it is given up."""

    directive: ResyncDirective
    left: float


class PendingDirective(msgspec.Struct):
    """One without an answer yet. `silent_seconds`: since the node was heard; -1: it is connected, or unknown."""

    id: str
    uid: str
    name: str
    topic: str
    seconds_left: float
    silent_seconds: float


class PendingDirectives:
    """Owned by the loop thread. `send` passes one on; False when the way is cut."""

    def __init__(
        self, directory: Path, scheduler: Scheduler, fleet: Fleet, send: Callable[[ResyncDirective], bool]
    ) -> None:
        self._path, self._scheduler, self._fleet, self._send = directory / FILE_NAME, scheduler, fleet, send
        # Until when, by the scheduler's clock.
        self._pending: dict[str, tuple[ResyncDirective, float]] = {}
        self._waiting: list[Done] = []
        self._writing = self._changed = False
        # Grows with every change.
        self.version = 0
        self._worker: Worker | None = None

    def start(self) -> None:
        """Go on with what an earlier run left. Blocks for a moment."""
        now = self._scheduler.now()
        for stored in read_if_whole(self._path, list[StoredDirective], []):
            self._pending[stored.directive.id] = (stored.directive, now + stored.left)
        self._scheduler.call_later(TICK_SECONDS, self._tick)

    def stop(self) -> None:
        """Store what is left."""
        if self._changed or self._pending:
            self._write()
        if self._worker is not None:
            self._worker.stop(5.0)

    def give(self, directive: ResyncDirective, seconds: float, done: Done) -> None:
        """Send a directive to a node for so many seconds: done once that is stored. NOT_FOUND: no such node is known;
        OVERLOADED: there are too many."""
        if directive.uid not in self._fleet.members:
            done(Outcome.NOT_FOUND, f"no node {directive.uid} is known below this one")
        elif len(self._pending) >= MOST_PENDING:
            done(
                Outcome.OVERLOADED,
                f"{MOST_PENDING} directives wait for an answer; try again when some of them are answered",
            )
        else:
            self._pending[directive.id] = (directive, self._scheduler.now() + seconds)
            self._waiting.append(partial(self._stored, directive, done))
            self._store()

    def _stored(self, directive: ResyncDirective, done: Done, outcome: Outcome, message: str) -> None:
        """Sent once it is stored; what cannot be stored is not given."""
        if outcome is Outcome.OK:
            self._send(directive)
        else:
            self._pending.pop(directive.id, None)
        done(outcome, message)

    def adopt(self, stored: list[StoredDirective]) -> None:
        """Go on with what another node sent until now."""
        now = self._scheduler.now()
        for one in stored:
            self._pending.setdefault(one.directive.id, (one.directive, now + one.left))
        self._store()

    def stored(self) -> list[StoredDirective]:
        """Those without an answer, as they are stored."""
        now = self._scheduler.now()
        return [StoredDirective(directive, max(0.0, until - now)) for directive, until in self._pending.values()]

    def describe(self) -> list[PendingDirective]:
        """Those that were not answered yet."""
        now = self._scheduler.now()
        found = []
        for directive, until in self._pending.values():
            member = self._fleet.members.get(directive.uid)
            silent = self._fleet.silent_for(member, now) if member is not None else -1.0
            name = member.name if member is not None else directive.uid
            found.append(
                PendingDirective(
                    directive.id, directive.uid, name, directive.topic, round(until - now, 1), round(silent, 1)
                )
            )
        return found

    def _tick(self) -> None:
        self._scheduler.call_later(TICK_SECONDS, self._tick)
        now = self._scheduler.now()
        for directive, until in list(self._pending.values()):
            member = self._fleet.members.get(directive.uid)
            if now >= until or (member is not None and answers(member.report(), directive)):
                del self._pending[directive.id]
                self._store()
            elif member is not None:
                self._send(directive)

    def _store(self) -> None:
        self._changed = True
        self.version += 1
        if not self._writing:
            self._write()

    def _write(self) -> None:
        """All of them; who waits meanwhile is in the next one."""
        rows = self.stored()
        waiting, self._waiting = self._waiting, []
        self._writing, self._changed = True, False
        if self._worker is None:
            self._worker = Worker("directives")

        def work() -> None:
            error = ""
            try:
                write_checked(self._path, rows)
            except OSError as caught:
                error = f"the directive cannot be stored: {caught.strerror}"
            self._scheduler.call_soon_threadsafe(lambda: self._written(waiting, error))

        self._worker.submit(work)

    def _written(self, waiting: list[Done], error: str) -> None:
        self._writing = False
        for done in waiting:
            done(Outcome.READ_ONLY if error else Outcome.OK, error)
        if self._changed:
            self._write()


def answers(report: Report, directive: ResyncDirective) -> bool:
    """Does a node's report tell what became of a directive?"""
    first = int(directive.id, 16)
    return any(0 <= int(one.id, 16) - first < IDS_EACH for one in report.resyncs)
