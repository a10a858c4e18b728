"""Who changed what at this node, and who was refused: the topic __audit, and a line of the log for each.

A record is JSON: {"time", "principal", "address", "action", "object", "result"}. The topic is this node's own and keeps
64 MiB. There is one in a fleet only; without one a node is used by programs of its machine.

What comes often is recorded seldom: that a principal lacks a right, or is not known, once a minute for each, whatever
it asked for, and a hundred times a minute in all; the use of a token, once a day.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import msgspec

from edgebroker.broker.core import Core
from edgebroker.broker.publish.own import publish_own
from edgebroker.common.names import AUDIT_TOPIC, printable
from edgebroker.common.outcome import Outcome
from edgebroker.common.records import BatchBuilder
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.newest import Newest
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import TopicSettings

log = logging.getLogger(__name__)

SETTINGS = TopicSettings(retention_bytes=64 << 20, segment_bytes=8 << 20)
COLLECT_SECONDS, MOST_WAITING, MOST_TEXT = 0.5, 1000, 300
REFUSED_SECONDS, USED_SECONDS, MOST_REFUSED = 60.0, 86_400.0, 100
MOST_REMEMBERED = 4096


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`time` in ms since 1970; `result`: OK, or the code of a refusal."""

    time: int
    principal: str
    address: str
    action: str
    object: str
    result: str


class Audit:
    """Owned by the loop thread. `has_fleet` tells whether the node belongs to one."""

    def __init__(self, core: Core, scheduler: Scheduler, clock: Clock, has_fleet: Callable[[], bool]) -> None:
        self._core, self._scheduler, self._clock, self._has_fleet = core, scheduler, clock, has_fleet
        self._waiting: deque[AuditRecord] = deque()
        self._dropped = 0
        self._busy = False
        # Refusals that were recorded since then.
        self._refused, self._refused_since = 0, 0.0
        self._seldom = Newest[tuple[str, str, str], float](MOST_REMEMBERED)

    def record(self, principal: str, address: str, action: str, what: str, result: str = "OK") -> None:
        """Somebody did something, or was not let."""
        if not self._has_fleet():
            return
        who, action, what = (printable(text)[:MOST_TEXT] for text in (principal, action, what))
        log.info("%s (%s): %s %s: %s", who, address, action, what, result)
        if len(self._waiting) >= MOST_WAITING:
            self._dropped += 1
            return
        made = AuditRecord(
            time=self._clock.wall_ms(), principal=who, address=address, action=action, object=what, result=result
        )
        self._waiting.append(made)
        if not self._busy:
            self._busy = True
            self._scheduler.call_later(COLLECT_SECONDS, self._publish)

    def refused(self, principal: str, address: str, action: str, what: str) -> None:
        """A right is missing, or who it is is not known: once a minute for each."""
        if not self._is_due(REFUSED_SECONDS, principal or address, action, ""):
            return
        now = self._scheduler.now()
        if now - self._refused_since >= REFUSED_SECONDS:
            self._refused_since, self._refused = now, 0
        self._refused += 1
        if self._refused <= MOST_REFUSED:
            self.record(principal, address, action, what, "UNAUTHORISED")
        elif self._refused == MOST_REFUSED + 1:
            log.warning("more than %d kinds of refusals within a minute; further ones are counted only", MOST_REFUSED)

    def used(self, principal: str, address: str, token_id: str) -> None:
        """A token was used: once a day."""
        if self._is_due(USED_SECONDS, principal, "use", token_id):
            self.record(principal, address, "use", f"token {token_id}")

    def _is_due(self, seconds: float, *key: str) -> bool:
        now, name = self._scheduler.now(), (key[0], key[1], key[2])
        if name in self._seldom and now - self._seldom[name] < seconds:
            return False
        self._seldom.put(name, now)
        return True

    def _publish(self) -> None:
        """Store what was collected; the topic comes with the first record."""
        if self._core.engine.log(AUDIT_TOPIC, 0) is None:
            self._core.engine.create_topic(AUDIT_TOPIC, SETTINGS, self._created)
        else:
            self._created(Outcome.OK, "")

    def _created(self, outcome: Outcome, why: str) -> None:
        if outcome not in (Outcome.OK, Outcome.NAME_CLASH):
            self._stored(outcome, why)
            return
        builder = BatchBuilder()
        for one in self._waiting:
            builder.append(msgspec.json.encode(one), None, one.time)
        self._waiting.clear()
        publish_own(self._core.publishing, "audit", AUDIT_TOPIC, builder.build(), self._stored)

    def _stored(self, outcome: Outcome, why: str) -> None:
        self._busy = False
        if outcome is not Outcome.OK:
            log.error("the audit cannot be stored: %s; its lines are in this log only", why)
            self._waiting.clear()
        if self._dropped:
            log.error("%d lines of the audit are in this log only: too many at a time", self._dropped)
            self._dropped = 0
        if self._waiting:
            self._busy = True
            self._scheduler.call_later(COLLECT_SECONDS, self._publish)
