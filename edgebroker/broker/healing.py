"""Healing: damaged records are fetched again from a neighbour, one hole after the other.

A mirror asks its parent by itself; any node asks whom an operator names (POST /v1/heal), so that an origin heals from a
child. What comes is checked and put in by the engine; until then readers wait, or skip, as the topic says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from edgebroker.broker.asking import Ask
from edgebroker.broker.metrics import Metrics
from edgebroker.broker.ranges import MOST_BYTES, RangeRequest
from edgebroker.network.loop import Loop
from edgebroker.storage.engine import Engine, Log

log = logging.getLogger(__name__)

SWEEP_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0
# A fetch is given up when nothing came for so long, and when it takes so long in all.
SILENCE_SECONDS, FETCH_SECONDS = 60.0, 3600.0


class HealRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"source": "from"}):
    """The body of POST /v1/heal: the neighbour's HTTP address, and which topic (all without one)."""

    source: str
    topic: str = ""


Done = Callable[[dict[str, int], str], None]


class Healing:
    """Owned by the loop thread. `parent` tells where this node's parent is, "" while it has none."""

    def __init__(self, engine: Engine, loop: Loop, metrics: Metrics, parent: Callable[[], str]) -> None:
        self._engine, self._loop, self._metrics, self._parent = engine, loop, metrics, parent
        self._busy: Ask | None = None
        # Logs for which the parent was of no help, and when it is asked again.
        self._pauses: dict[Log, tuple[float, float]] = {}

    def start(self) -> None:
        self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Heal what this node mirrors, from its parent."""
        self._loop.call_later(SWEEP_SECONDS, self._sweep)
        source, now = self._parent(), self._loop.now()
        if self._busy is not None or not source:
            return
        for partition in self._engine.logs():
            mirrored = partition.identity.origin != self._engine.node_uid
            if mirrored and partition.holes and now >= self._pauses.get(partition, (0.0, 0.0))[1]:
                self._heal(source, [partition], lambda healed, error: None)
                return

    def heal(self, request: HealRequest, done: Done) -> None:
        """Heal from a neighbour: done({log: offsets that are whole again}, error)."""
        if self._busy is not None:
            done({}, "something is being healed already; try again in a moment")
            return
        damaged = [one for one in self._engine.logs() if one.holes and request.topic in ("", one.topic)]
        self._heal(request.source, damaged, done)

    def _heal(self, source: str, damaged: list[Log], done: Done) -> None:
        healed: dict[str, int] = {}
        errors: list[str] = []
        waiting = list(damaged)

        def following() -> None:
            self._busy = None
            while waiting and not waiting[0].holes:
                self._pauses.pop(waiting.pop(0), None)
            if not waiting:
                done(healed, "; ".join(errors))
                return
            partition = waiting[0]
            self._busy = Ask(
                self._loop,
                source,
                "POST",
                "/v1/pipe/range",
                msgspec.json.encode(_first_hole(partition)),
                lambda status, data, error: fetched(partition, data, error),
                most_bytes=MOST_BYTES + (16 << 20),
                silence=SILENCE_SECONDS,
                limit=FETCH_SECONDS,
            )

        def fetched(partition: Log, data: bytes, error: str) -> None:
            if error or not data:
                failed(partition, error or "nothing came")
                return
            first = partition.holes[0].first if partition.holes else -1
            self._engine.heal(partition, data, lambda end, error: put_in(partition, first, end, error))

        def put_in(partition: Log, first: int, end: int, error: str) -> None:
            if error:
                failed(partition, error)
                return
            self._metrics.records_healed += end - first
            healed[partition.name] = healed.get(partition.name, 0) + end - first
            log.warning("%s: records %d to %d are whole again, from %s", partition.name, first, end - 1, source)
            following()

        def failed(partition: Log, error: str) -> None:
            self._metrics.healing_failures += 1
            pause = min(LONGEST_PAUSE_SECONDS, 2 * max(SWEEP_SECONDS, self._pauses.get(partition, (0.0, 0.0))[0]))
            self._pauses[partition] = (pause, self._loop.now() + pause)
            errors.append(f"{partition.name}: {error}")
            log.warning("%s cannot be healed from %s: %s", partition.name, source, error)
            waiting.pop(0)
            following()

        following()


def _first_hole(partition: Log) -> RangeRequest:
    first, following = partition.to_heal()
    return RangeRequest(
        topic=partition.topic,
        partition=partition.partition,
        log_id=partition.identity.log_id,
        first=first,
        next=following,
    )
