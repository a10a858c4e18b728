"""What the root decides: signed by the helper process, published in __trust, in force here; then the next.

One after the other, so that a decision is made of what those before it came to, and has a higher serial.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from edgebroker.broker.core import Core
from edgebroker.broker.publish.own import publish_own
from edgebroker.broker.trust.helper import TrustHelper
from edgebroker.broker.trust.trust_topic import HEADER, TrustRecord, TrustTopic
from edgebroker.common import records
from edgebroker.common.errors import ArgumentError
from edgebroker.common.names import TRUST_TOPIC
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.records import BatchBuilder
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler, Timer
from edgebroker.common.types import TopicSettings
from edgebroker.trust.messages import Sign, Signed

# Records of one batch; how long to wait for what is stored to be in force; decisions that may wait.
MOST_AT_ONCE, IN_FORCE_SECONDS, MOST_WAITING = 1000, 30.0, 256

Said = Sequence[tuple[str, TrustRecord]]


class _Decision(NamedTuple):
    """`batches` are made when their turn comes."""

    batches: Iterator[Said]
    done: Done


class TrustDecisions:
    """Owned by the loop thread."""

    def __init__(self, core: Core, scheduler: Scheduler, clock: Clock, helper: TrustHelper, topic: TrustTopic) -> None:
        self._core, self._scheduler, self._clock, self._helper, self._topic = core, scheduler, clock, helper, topic
        self._waiting: deque[_Decision] = deque()
        self._current: _Decision | None = None
        self._serial = 0
        # What is published, and not in force yet: keys and serials.
        self._awaited: dict[str, int] = {}
        self._timer: Timer | None = None
        topic.changed.append(self._changed)

    def publish(self, said: Said, done: Done) -> None:
        """Sign records and publish them: done(OK, "") once they are in force here. None: the issuer alone."""
        self.decide(iter([said]), done)

    @property
    def waiting(self) -> int:
        """Decisions whose turn has not come."""
        return len(self._waiting)

    def retire(self, before: int, done: Done) -> None:
        """Have the issuers before this one not believed any more: what is in force is signed again first."""

        def batches() -> Iterator[Said]:
            said = self._topic.said
            keys = [key for key in said if not key.startswith("retired/")]
            for first in range(0, len(keys), MOST_AT_ONCE):
                yield [(key, said[key]) for key in keys[first : first + MOST_AT_ONCE] if key in said]
            # Those that were retired before as well: the issuer that said so is one of them now.
            yield [(f"retired/{number}", TrustRecord(serial=0)) for number in range(1, before)]

        self.decide(batches(), done)

    def decide(self, batches: Iterator[Said], done: Done) -> None:
        """publish() these batches, one after the other. Each is made when its turn comes, of what is in force then; an
        ArgumentError that making it raises is INVALID."""
        if len(self._waiting) >= MOST_WAITING:
            done(Outcome.OVERLOADED, f"{MOST_WAITING} decisions wait; try again")
            return
        self._waiting.append(_Decision(batches, done))
        self._next()

    def _next(self) -> None:
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            self._go_on()

    def _go_on(self) -> None:
        assert self._current is not None
        try:
            batch = next(self._current.batches, None)
        except ArgumentError as error:
            self._end(Outcome.INVALID, str(error))
            return
        if batch is None:
            self._end(Outcome.OK, "")
        else:
            self._sign(batch)

    def _end(self, outcome: Outcome, why: str) -> None:
        assert self._current is not None
        done, self._current = self._current.done, None
        done(outcome, why)
        self._scheduler.call_later(0.0, self._next)

    def _sign(self, said: Said) -> None:
        made_ms = self._clock.wall_ms()
        first = max(made_ms, self._serial + 1, self._topic.newest_serial + 1)
        self._serial = first + len(said)
        numbered = [
            (key, msgspec.structs.replace(record, serial=first + rank, made_ms=made_ms))
            for rank, (key, record) in enumerate(said)
        ]
        rows = [(key, msgspec.json.encode(record)) for key, record in numbered]

        def told(signed: Signed | None, error: str, code: str) -> None:
            if signed is None:
                self._end(Outcome.CONFLICT, error)
                return
            builder = BatchBuilder()
            awaited = {key: record.serial for key, record in numbered}
            if self._topic.issuer(signed.issuer) != signed.certificate:
                key = f"issuer/{signed.issuer}"
                builder.append(signed.certificate, key.encode(), made_ms)
                awaited[key] = 0
            for (key, value), signature in zip(rows, signed.signatures, strict=True):
                header = signed.issuer.to_bytes(2, "big") + signature
                builder.append(value, key.encode(), made_ms, *records.encode_headers([(HEADER, header)]))
            if builder.count:
                self._publish(builder.build(), awaited)
            else:
                self._go_on()

        self._helper.do(Sign(records=rows), Signed, told)

    def _publish(self, data: bytes, awaited: dict[str, int]) -> None:
        def published(outcome: Outcome, why: str) -> None:
            if outcome is not Outcome.OK:
                self._end(outcome, why)
                return
            self._awaited = awaited
            self._timer = self._scheduler.call_later(IN_FORCE_SECONDS, self._late)
            self._changed(())

        def created(outcome: Outcome, message: str) -> None:
            if outcome in (Outcome.OK, Outcome.NAME_CLASH):
                publish_own(self._core.publishing, "trust", TRUST_TOPIC, data, published)
            else:
                self._end(outcome, message)

        if self._core.engine.log(TRUST_TOPIC, 0) is not None:
            created(Outcome.OK, "")
        else:
            self._core.engine.create_topic(TRUST_TOPIC, TopicSettings(kind="table", urgent=True), created)

    def _changed(self, keys: Sequence[str]) -> None:
        if self._timer is not None and all(self._topic.has(key, serial) for key, serial in self._awaited.items()):
            # When all have heard of it: what comes next may be made of it.
            self._timer.cancel()
            self._timer = None
            self._scheduler.call_later(0.0, self._go_on)

    def _late(self) -> None:
        self._timer = None
        self._go_on()
