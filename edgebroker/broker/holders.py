"""Who holds bytes of the logs: groups and children that have not passed them yet, and who of them is given up.

A silent holder holds for `hold_ms`, and at most `hold_bytes` of a log. While producers are refused because the disk is
full, the one that has been silent longest is given up; when it comes back it gets a gap. Who is connected is never
given up, nor who was heard a moment ago: a terminal that is started again must find its records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import msgspec

from edgebroker.broker.core import Core
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.common.config import StorageConfig
from edgebroker.common.runtime.scheduler import Scheduler, in_turns
from edgebroker.storage.engine import Log

_logger = logging.getLogger(__name__)

# Nobody who was heard so short a time ago is given up.
GIVE_UP_SECONDS = 600.0
LIST_SECONDS = 1.0
SLICE = 64

Kind = Literal["group", "child"]


class Holder(msgspec.Struct, kw_only=True):
    """A group or child, and the sealed segments that it has not passed: their bytes and logs. `silent_seconds`: since
    it was heard (0: it is connected). A child has an `uid`. `given_up`: it holds nothing any more, until it is heard
    again."""

    kind: Kind
    name: str
    uid: str = ""
    bytes: int
    logs: int
    silent_seconds: float
    given_up: bool = False

    def sentence(self) -> str:
        """For an operator."""
        silent = f"silent for {self.silent_seconds:.0f} s" if self.silent_seconds else "connected"
        return f"{self.kind} {self.name} ({silent}): {self.bytes:,} bytes"


class _Place(NamedTuple):
    kind: Kind
    key: str
    name: str
    offset: int
    silent: float


class Holders:
    """Owned by the loop thread."""

    def __init__(self, core: Core, downstream: Downstream, config: StorageConfig, scheduler: Scheduler) -> None:
        self._core, self._downstream, self.config, self._scheduler = core, downstream, config, scheduler
        self._given_up: set[tuple[Kind, str]] = set()
        self._known: list[Holder] = []
        self._known_at = -LIST_SECONDS
        # Who waits for the list that is being made.
        self._waiting: list[Callable[[list[Holder]], None]] = []

    def floor(self, log: Log, now: float) -> int | None:
        """The offset that everybody has passed who holds something; None when nobody has read the log."""
        places = list(self._places(log, now))
        holding = [place.offset for place in places if self._holds(log, place)]
        if holding or not places:
            return min(holding, default=None)
        return log.durable_end

    def give_up(self, now: float) -> bool:
        """Let the one go that has been silent longest, of those that hold bytes back; False when there is none."""
        known = self.known(now)
        silent = [one for one in known if one.bytes and not one.given_up and one.silent_seconds >= GIVE_UP_SECONDS]
        if not silent:
            return False
        longest = max(silent, key=lambda one: one.silent_seconds)
        self._given_up.add((longest.kind, longest.uid or longest.name))
        longest.given_up = True
        self._core.metrics.holders_given_up += 1
        _logger.warning("given up because the disk is full: %s", longest.sentence())
        return True

    def known(self, now: float) -> list[Holder]:
        """Everybody, who holds most first, as of a moment ago; what is older is looked at again meanwhile."""
        if now - self._known_at >= LIST_SECONDS and not self._waiting:
            self.look(lambda found: None)
        return self._known

    def sentences(self, now: float) -> list[str]:
        """Who holds most, for people."""
        return [one.sentence() for one in self.known(now) if one.bytes][:3]

    def look(self, done: Callable[[list[Holder]], None]) -> None:
        """Look at everybody, a few at a time: a hub has many."""
        self._waiting.append(done)
        if len(self._waiting) > 1:
            return
        found: dict[tuple[Kind, str], Holder] = {}

        def looked() -> None:
            waiting, self._waiting = self._waiting, []
            self._known = sorted(found.values(), key=lambda one: -one.bytes)
            self._known_at = self._scheduler.now()
            for callback in waiting:
                callback(self._known)

        in_turns(self._scheduler, self._steps(found), looked)

    def _steps(self, found: dict[tuple[Kind, str], Holder]) -> Iterator[None]:
        for log in list(self._core.engine.logs()):
            for rank, place in enumerate(list(self._places(log, self._scheduler.now()))):
                self._add(found, log, place)
                if rank % SLICE == 0:
                    yield
            yield

    def _add(self, found: dict[tuple[Kind, str], Holder], log: Log, place: _Place) -> None:
        held, key = log.held_bytes(place.offset), (place.kind, place.key)
        holder = found.get(key)
        if holder is None:
            uid, silent = place.key if place.kind == "child" else "", round(place.silent, 1)
            holder = found[key] = Holder(
                kind=place.kind, name=place.name, uid=uid, bytes=0, logs=0, silent_seconds=silent
            )
        holder.bytes += held
        holder.logs += held > 0
        holder.silent_seconds = min(holder.silent_seconds, round(place.silent, 1))
        holder.given_up = holder.given_up or (held > 0 and not self._holds(log, place))

    def _holds(self, log: Log, place: _Place) -> bool:
        key = (place.kind, place.key)
        if not place.silent:
            self._given_up.discard(key)
            return True
        hold_seconds = (log.settings.hold_ms or self.config.hold_ms) / 1000
        most = log.settings.hold_bytes or self.config.hold_bytes
        within = place.silent < hold_seconds and not (most and log.held_bytes(place.offset) > most)
        return within and key not in self._given_up

    def _places(self, log: Log, now: float) -> Iterator[_Place]:
        for name, offset, silent in self._core.groups.places(log, now):
            yield _Place("group", name, name, offset, silent)
        for uid, name, offset, silent in self._downstream.places(log, now):
            yield _Place("child", uid, name or uid, offset, silent)
