"""The core knows sessions by its ports only: a second kind of session, in memory, publishes and consumes with it.

Nothing here, and nothing that the core loads, comes from network/: no frame, no socket, no byte of a protocol.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.messages import AckKind, Holding, Wanted
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import Start
from tests.kit.memory_core import TOPIC, MemoryCore

GROUP = "labels"


@pytest.fixture
def world() -> Iterator[MemoryCore]:
    yield MemoryCore()


def of(*values: bytes) -> bytes:
    return batch.encode([(None, value, 1000 + rank) for rank, value in enumerate(values)])


def test_a_publish_creates_the_topic_and_is_answered_with_its_offset(world: MemoryCore) -> None:
    till = world.session("till-7")
    till.publish(1, of(b"one", b"two"))
    assert till.on_hold == 0
    world.run()
    till.publish(2, of(b"three"))
    world.run()
    assert till.answers == {1: (Code.OK, 0), 2: (Code.OK, 2)}
    assert not till.refusals


def test_a_member_is_pushed_to_and_acknowledges(world: MemoryCore) -> None:
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


def test_what_a_member_did_not_acknowledge_goes_to_the_next_one(world: MemoryCore) -> None:
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


def test_a_record_that_is_refused_twice_becomes_a_dead_letter(world: MemoryCore) -> None:
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


def test_a_refusal_is_an_outcome(world: MemoryCore) -> None:
    till = world.session("till-7")
    till.publish(1, of(b"x"), topic="not a name!")
    assert [outcome for outcome, _ in till.refusals] == [Outcome.NOT_FOUND]
    till.publish(2, of(b"x"))
    world.core.publishing.draining = True
    till.publish(3, of(b"x"))
    world.run()
    assert till.refusals[1][0] is Outcome.SHUTTING_DOWN


def test_an_anonymous_member_reads_alone(world: MemoryCore) -> None:
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


def test_leaving_what_does_not_exist_is_not_remembered(world: MemoryCore) -> None:
    till, labels = world.session("till-7"), world.session("labels-1")
    till.publish(1, of(b"one"))
    world.run()
    labels.join(GROUP, world.scheduler.now())
    group = world.core.groups.group(GROUP, world.scheduler.now())
    lines = [Wanted(topic, number, Start.COMMITTED, bytes(16), 0, 0) for topic in (TOPIC, "no") for number in range(9)]
    world.core.membership.leave(labels, group, lines)
    assert group.members[labels].left == {(TOPIC, 0)}
