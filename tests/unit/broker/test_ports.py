"""The core knows sessions by its ports only: a second kind of session, in memory, publishes and consumes with it.

Nothing here, and nothing that the core loads, comes from network/: no frame, no socket, no byte of a protocol.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from edgebroker.broker.core import Core, build_core
from edgebroker.broker.delivery.leases import LeaseLimits
from edgebroker.broker.delivery.state import Cursor
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

TOPIC, GROUP = "prices", "labels"
WINDOW = (100, 1 << 20)


class MemorySession:
    """A publisher and a member in one, which keeps what it is told."""

    def __init__(self, core: Core, client_id: str) -> None:
        self._core, self.client_id, self.producer_id = core, client_id, -1
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

    def publish(self, number: int, data: bytes, topic: str = TOPIC) -> None:
        run = PublishRun(AckLevel.DURABLE, topic, 0, memoryview(data), pack_span(number, 0, len(data)))
        self._core.publishing.submit(self, run)

    def join(self, group: str, now: float) -> None:
        wanted = [Wanted(TOPIC, -1, Start.COMMITTED, bytes(16), 0, 0)]
        self._core.membership.subscribe(self, self._core.groups.group(group, now), wanted, 7, WINDOW)

    def acknowledge(self, offset: int, kind: AckKind = AckKind.CUMULATIVE) -> bool:
        cursor = self.cursors[TOPIC, 0]
        ack = ConsumerAck(kind, TOPIC, 0, cursor.generation, cursor.lease, offset, "no such till")
        return self._core.membership.acknowledge(self, cursor.group, ack)

    def leave(self) -> None:
        for cursor in list(self.cursors.values()):
            self._core.membership.vanished(self, cursor.group)
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


class World(CoreListener):
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


@pytest.fixture
def world() -> Iterator[World]:
    yield World()


def of(*values: bytes) -> bytes:
    return batch.encode([(None, value, 1000 + rank) for rank, value in enumerate(values)])


def test_a_publish_creates_the_topic_and_is_answered_with_its_offset(world: World) -> None:
    till = world.session("till-7")
    till.publish(1, of(b"one", b"two"))
    assert till.on_hold == 0
    world.run()
    till.publish(2, of(b"three"))
    world.run()
    assert till.answers == {1: (Code.OK, 0), 2: (Code.OK, 2)}
    assert not till.refusals


def test_a_member_is_pushed_to_and_acknowledges(world: World) -> None:
    till, labels = world.session("till-7"), world.session("labels-1")
    till.publish(1, of(b"one", b"two"))
    world.run()
    labels.join(GROUP, world.scheduler.now())
    world.run()
    assert labels.held == [((TOPIC, 0), Holding.ASSIGNED)]
    assert labels.values == [(0, b"one"), (1, b"two")]
    till.publish(2, of(b"three"))
    world.run()
    assert labels.values[2:] == [(2, b"three")]
    assert labels.acknowledge(3)
    log = world.core.engine.log(TOPIC, 0)
    assert log is not None
    committed = world.core.groups.group(GROUP, world.scheduler.now()).committed(log)
    assert committed is not None
    assert committed.next_offset == 3


def test_what_a_member_did_not_acknowledge_goes_to_the_next_one(world: World) -> None:
    till, first, second = (world.session(name) for name in ("till-7", "labels-1", "labels-2"))
    till.publish(1, of(b"one", b"two"))
    world.run()
    first.join(GROUP, world.scheduler.now())
    world.run()
    assert first.acknowledge(1)
    first.leave()
    second.join(GROUP, world.scheduler.now())
    world.run()
    assert second.values == [(1, b"two")]
    assert not first.cursors


def test_a_record_that_is_refused_twice_becomes_a_dead_letter(world: World) -> None:
    till, labels = world.session("till-7"), world.session("labels-1")
    till.publish(1, of(b"bad", b"good"))
    world.run()
    labels.join(GROUP, world.scheduler.now())
    world.run()
    for _ in range(2):
        assert labels.acknowledge(0, AckKind.NEGATIVE)
        world.run()
    world.core.publishing.stop()  # its thread, which encodes the dead letter, has done so
    world.run()
    assert world.core.metrics.dead_letters == 1
    dead = world.core.engine.log(f"{TOPIC}.dlq", 0)
    assert dead is not None
    assert dead.durable_end == 1
    assert labels.values[-1] == (1, b"good")


def test_a_refusal_is_an_outcome(world: World) -> None:
    till = world.session("till-7")
    till.publish(1, of(b"x"), topic="not a name!")
    assert [outcome for outcome, _ in till.refusals] == [Outcome.NOT_FOUND]
    till.publish(2, of(b"x"))
    world.core.publishing.draining = True
    till.publish(3, of(b"x"))
    world.run()
    assert till.refusals[1][0] is Outcome.SHUTTING_DOWN


def test_an_anonymous_member_reads_alone(world: World) -> None:
    till, one, other = (world.session(name) for name in ("till-7", "a", "b"))
    till.publish(1, of(b"x"))
    world.run()
    one.join("", world.scheduler.now())
    other.join("", world.scheduler.now())
    world.run()
    assert one.values == other.values == [(0, b"x")]


def test_the_core_loads_nothing_of_a_protocol() -> None:
    program = (
        "import sys, edgebroker.broker.core; print(*[m for m in sys.modules if m.startswith('edgebroker.network')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_leaving_what_does_not_exist_is_not_remembered(world: World) -> None:
    till, labels = world.session("till-7"), world.session("labels-1")
    till.publish(1, of(b"one"))
    world.run()
    labels.join(GROUP, world.scheduler.now())
    group = world.core.groups.group(GROUP, world.scheduler.now())
    lines = [Wanted(topic, number, Start.COMMITTED, bytes(16), 0, 0) for topic in (TOPIC, "no") for number in range(9)]
    world.core.membership.leave(labels, group, lines)
    assert group.members[labels].left == {(TOPIC, 0)}
