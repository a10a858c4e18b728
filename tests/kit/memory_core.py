"""The core without any protocol: sessions in memory over an engine in memory, on time that stands still."""

from __future__ import annotations

from edgebroker.broker.core import Core, build_core
from edgebroker.broker.delivery.leases import LeaseLimits
from edgebroker.broker.delivery.state import Cursor, Group
from edgebroker.broker.ports import Key
from edgebroker.broker.publish.publishing import PublishLimits
from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.messages import AckKind, ConsumerAck, GapReason, Holding, PublishRun, Wanted
from edgebroker.common.outcome import Outcome
from edgebroker.common.spans import ANSWER, SPAN, pack_span
from edgebroker.common.types import AckLevel, Start, TopicSettings
from edgebroker.storage.memory import MemoryEngine
from edgebroker.storage.types import FileSlice, GroupOffset
from tests.kit.clock import ManualClock, ManualScheduler
from tests.kit.core_listener import CoreListener

TOPIC = "prices"
WINDOW = (100, 1 << 20)


class MemorySession:
    """A publisher and a member in one, which keeps what it is told."""

    def __init__(self, core: Core, client_id: str) -> None:
        self._core, self.client_id, self.producer_id = core, client_id, -1
        self._group: Group | None = None
        self.cursors: dict[Key, Cursor] = {}
        self.writable = True
        self.answers: dict[int, tuple[Code, int]] = {}
        self.refusals: list[tuple[Outcome, str]] = []
        self.values: list[tuple[int, bytes | None]] = []
        self.held: list[tuple[Key, Holding]] = []
        self.gaps: list[tuple[int, int, GapReason]] = []
        self.states: list[Outcome] = []
        self.refreshes: list[GroupOffset] = []
        self.on_hold = 0
        core.producers.arrived(client_id)

    # ---- what the session asks of the core ----

    def publish(self, number: int, data: bytes, topic: str = TOPIC, partition: int = 0) -> None:
        run = PublishRun(AckLevel.DURABLE, topic, partition, memoryview(data), pack_span(number, 0, len(data)))
        self._core.publishing.submit(self, run)

    def join(self, group: str, now: float, start: Start = Start.COMMITTED) -> None:
        wanted = [Wanted(TOPIC, -1, start, bytes(16), 0, 0)]
        self._group = self._core.groups.group(group, now)
        self._core.membership.subscribe(self, self._group, wanted, 7, WINDOW)

    def acknowledge(self, offset: int, kind: AckKind = AckKind.CUMULATIVE) -> bool:
        cursor = self.cursors[TOPIC, 0]
        ack = ConsumerAck(kind, TOPIC, 0, cursor.generation, cursor.lease, offset, "no such till")
        return self._core.membership.acknowledge(self, cursor.group, ack)

    def acknowledge_all(self) -> None:
        """Whatever is in flight."""
        for (topic, partition), cursor in list(self.cursors.items()):
            if cursor.in_flight:
                end = cursor.next_offset
                ack = ConsumerAck(AckKind.CUMULATIVE, topic, partition, cursor.generation, cursor.lease, end, "")
                self._core.membership.acknowledge(self, cursor.group, ack)

    def leave(self) -> None:
        if self._group is not None:
            self._core.membership.vanished(self, self._group)
        self._core.producers.gone(self.client_id)

    # ---- Publisher ----

    def answered(self, spans: bytes, answers: bytes) -> None:
        for (number, _, _), (offset, code, _) in zip(SPAN.iter_unpack(spans), ANSWER.iter_unpack(answers), strict=True):
            self.answers[number] = Code(code), offset

    def refused(self, spans: bytes, outcome: Outcome, why: str) -> None:
        self.refusals += [(outcome, why)] * (len(spans) // SPAN.size)

    def rejected(self, spans: bytes, code: int, why: str) -> None:
        for number, _, _ in SPAN.iter_unpack(spans):
            self.answers[number] = Code(code), -1

    def hold(self) -> None:
        self.on_hold += 1

    def release(self) -> None:
        self.on_hold -= 1

    # ---- Member ----

    def deliver(self, cursor: Cursor, first: int, next_offset: int, data: memoryview, age_ms: int) -> None:
        for record in batch.decode(data):
            if first <= record.offset < next_offset:
                self.values.append((record.offset, record.value))

    def deliver_file(self, cursor: Cursor, first: int, next_offset: int, piece: FileSlice, age_ms: int) -> None:
        raise AssertionError("the memory engine has no files")

    def gap(self, cursor: Cursor, first: int, next_offset: int, reason: GapReason) -> None:
        self.gaps.append((first, next_offset, reason))

    def assigned(self, cursor: Cursor, holding: Holding) -> None:
        self.held.append((cursor.key, holding))

    def state(self, cursor: Cursor, outcome: Outcome, why: str) -> None:
        self.states.append(outcome)

    def announce_refresh(self, cursor: Cursor, committed: GroupOffset) -> None:
        self.refreshes.append(committed)


class MemoryCore(CoreListener):
    """A core over an engine in memory, on time that stands still."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.scheduler = ManualScheduler(self.clock)
        engine = MemoryEngine(self.scheduler, self.clock, max_batch=1 << 20, max_record=1 << 20, window=20)
        publish = PublishLimits(1 << 20, 1 << 19, 1 << 20, 1 << 22, 1000, True, False, 5.0, TopicSettings())
        leases = LeaseLimits(timeout=30.0, backoff=0.0, max_backoff=0.0, max_attempts=2)
        self.core = build_core(engine, self.scheduler, self.clock, publish, leases)
        engine.open(self)

    def session(self, client_id: str) -> MemorySession:
        return MemorySession(self.core, client_id)

    def run(self) -> None:
        for _ in range(20):
            self.scheduler.turn()
            self.core.membership.rebalance()
            self.core.push.end_iteration()
