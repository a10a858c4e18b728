"""Repair from a peer: corrupt ranges are fetched again from a neighbour, one after the other.

A mirror asks its parent by itself; any node asks the peer that an operator names (POST /v1/repair), so that an origin
is repaired from a child. The engine verifies what arrives and puts it in place; until then readers wait, or skip the
range, as the topic says. An origin that lost the end of a log (HISTORY_LOST) fetches that as well: it is appended if it
leads to the child's header chain checksum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from edgebroker.broker.core import Core
from edgebroker.broker.feed.ranges import MOST_BYTES, RangeRequest
from edgebroker.common.batch import EXPLANATION, STORED_BATCH_BYTES, Reason
from edgebroker.common.outcome import Done as OutcomeOf
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.call import HttpCall, OnResponse
from edgebroker.network.http.peers import Peers
from edgebroker.storage.engine import Log, MirrorEngine
from edgebroker.storage.log import segscan
from edgebroker.storage.types import Change, begin_history

log = logging.getLogger(__name__)

SWEEP_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0
MOST_LOST_BYTES = 64 << 20
WAIT_SECONDS = 0.02
# A fetch is given up when nothing came for so long, and when it takes so long in all.
SILENCE_SECONDS, FETCH_SECONDS = 60.0, 3600.0


class RepairRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"source": "from"}):
    """The body of POST /v1/repair: a node of the tree (name, uid or address), and which topic (all without one)."""

    source: str
    topic: str = ""


Done = Callable[[dict[str, int], str], None]


class Repairs:
    """Owned by the loop thread. `parent` tells where this node's parent is, "" while it has none."""

    def __init__(self, core: Core, engine: MirrorEngine, peers: Peers, parent: Callable[[], str]) -> None:
        self._engine, self._metrics, self._parent = engine, core.metrics, parent
        self._peers, self._loop = peers, peers.loop
        self._publishing = core.publishing
        self._busy: HttpCall | None = None
        # Logs for which the parent was of no help, and when it is asked again.
        self._pauses: dict[Log, tuple[float, float]] = {}

    def start(self) -> None:
        self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Repair what this node mirrors, from its parent."""
        self._loop.call_later(SWEEP_SECONDS, self._sweep)
        source, now = self._parent(), self._loop.now()
        if self._busy is not None or not source:
            return
        for partition in self._engine.logs():
            mirrored = partition.identity.origin != self._engine.node_uid
            if mirrored and partition.corrupt_ranges and now >= self._pauses.get(partition, (0.0, 0.0))[1]:
                self._repair(source, [partition], lambda repaired, error: None)
                return

    def repair(self, request: RepairRequest, done: Done) -> None:
        """Repair from a neighbour: done({log: offsets that are whole again}, error)."""
        if self._busy is not None:
            done({}, "a repair is under way already; try again in a moment")
            return
        damaged = [one for one in self._engine.logs() if one.corrupt_ranges and request.topic in ("", one.topic)]
        lost = [one for one in self._publishing.lost if request.topic in ("", one.topic)]

        def then(repaired: dict[str, int], error: str) -> None:
            if error or not lost:
                done(repaired, error)
            else:
                self._recover(request.source, lost, repaired, done)

        self._repair(request.source, damaged, then)

    # ---- the lost end of a log that this node writes ----

    def _recover(self, source: str, lost: list[Log], repaired: dict[str, int], done: Done) -> None:
        """Fetch what this node does not have any more, one log after the other."""
        if not lost:
            done(repaired, "")
            return
        partition, known = lost[0], self._publishing.lost[lost[0]]
        first, found = partition.durable_end, bytearray()

        def fetch(following: int) -> None:
            self._busy = self._ask(source, _range(partition, following, known.end), fetched)

        def fetched(status: int, data: bytes, error: str) -> None:
            self._busy = None
            found.extend(data if not error else b"")
            if not error and len(found) > MOST_LOST_BYTES:
                error = f"more than {MOST_LOST_BYTES >> 20} MiB were lost: promote that node instead"
            if error:
                failed(error)
                return
            scanned = segscan.scan(found, first, partition.chain, 0, STORED_BATCH_BYTES)
            good, reason, following, chain = scanned[:4]
            if good != len(found) or not data:
                failed(EXPLANATION.get(Reason(reason), "nothing came"))
            elif following < known.end:
                fetch(following)
            elif chain != known.chain or partition.durable_end != first:
                failed("its records do not lead to what its log ends with: accept the loss, or promote that node")
            else:
                append()

        def append() -> None:
            """As the copy would have gone on, when the log was restored from one: in the history before."""
            copied = partition.identity.copied(first)
            if copied is partition.identity:
                take(Outcome.OK, "")
            else:
                self._change(partition, lambda old: replace(old, epochs=copied.epochs), take)

        def take(outcome: Outcome, message: str) -> None:
            if outcome is not Outcome.OK:
                failed(message)
                return
            taken = 0
            while taken < len(found):
                with memoryview(found)[taken:] as left:
                    size, reason = self._engine.append_numbered(partition, left)
                if not size:
                    failed(f"{EXPLANATION.get(Reason(reason), 'it is not a batch')} at byte {taken}")
                    return
                taken += size
            stored()

        def stored() -> None:
            if partition.durable_end < known.end:
                self._loop.call_later(WAIT_SECONDS, stored)
                return
            if partition.identity.restored:
                self._change(partition, lambda old: begin_history(old, partition.durable_end), found_again)
            else:
                found_again(Outcome.OK, "")

        def found_again(outcome: Outcome, message: str) -> None:
            if outcome is not Outcome.OK:
                failed(message)
                return
            self._metrics.records_repaired += known.end - first
            repaired[partition.name] = repaired.get(partition.name, 0) + known.end - first
            log.warning("%s: records %d to %d are back, from %s", partition.name, first, known.end - 1, source)
            self._publishing.loss_accepted(partition)
            self._recover(source, lost[1:], repaired, done)

        def failed(why: str) -> None:
            self._metrics.repair_failures += 1
            done(repaired, f"{partition.name} cannot be recovered from {source}: {why}")

        fetch(first)

    def _change(self, partition: Log, change: Change, then: OutcomeOf) -> None:
        """Change the identity of one log of a topic."""
        keep: Change = lambda old: old  # noqa: E731
        logs = self._engine.partitions(partition.topic)
        self._engine.change_identities(partition.topic, [change if one is partition else keep for one in logs], then)

    def _ask(self, source: str, wanted: RangeRequest, told: OnResponse) -> HttpCall:
        return HttpCall(
            self._peers,
            source,
            "POST",
            "/v1/pipe/range",
            msgspec.json.encode(wanted),
            told,
            most_bytes=MOST_BYTES + (16 << 20),
            silence=SILENCE_SECONDS,
            limit=FETCH_SECONDS,
        )

    # ---- damage ----

    def _repair(self, source: str, damaged: list[Log], done: Done) -> None:
        repaired: dict[str, int] = {}
        errors: list[str] = []
        waiting = list(damaged)

        def following() -> None:
            self._busy = None
            while waiting and not waiting[0].corrupt_ranges:
                self._pauses.pop(waiting.pop(0), None)
            if not waiting:
                done(repaired, "; ".join(errors))
                return
            partition = waiting[0]
            self._busy = self._ask(
                source,
                _range(partition, *partition.to_repair()),
                lambda status, data, error: fetched(partition, data, error),
            )

        def fetched(partition: Log, data: bytes, error: str) -> None:
            if error or not data:
                failed(partition, error or "nothing came")
                return
            first = partition.corrupt_ranges[0].first if partition.corrupt_ranges else -1
            self._engine.repair(partition, data, lambda end, error: put_in(partition, first, end, error))

        def put_in(partition: Log, first: int, end: int, error: str) -> None:
            if error:
                failed(partition, error)
                return
            self._metrics.records_repaired += end - first
            repaired[partition.name] = repaired.get(partition.name, 0) + end - first
            log.warning("%s: records %d to %d are whole again, from %s", partition.name, first, end - 1, source)
            following()

        def failed(partition: Log, error: str) -> None:
            self._metrics.repair_failures += 1
            pause = min(LONGEST_PAUSE_SECONDS, 2 * max(SWEEP_SECONDS, self._pauses.get(partition, (0.0, 0.0))[0]))
            self._pauses[partition] = (pause, self._loop.now() + pause)
            errors.append(f"{partition.name}: {error}")
            log.warning("%s cannot be repaired from %s: %s", partition.name, source, error)
            waiting.pop(0)
            following()

        following()


def _range(partition: Log, first: int, following: int) -> RangeRequest:
    return RangeRequest(
        topic=partition.topic,
        partition=partition.partition,
        log_id=partition.identity.log_id,
        first=first,
        next=following,
    )
