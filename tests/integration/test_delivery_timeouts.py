"""Members that hang: the delivery timeout, what restarts it, and who is given partitions afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.common.errors import Code
from edgebroker.common.messages import AckKind, Holding
from edgebroker.common.types import Start
from edgebroker.network.wire.frames import FrameType
from tests.kit.brokers import RunningBroker, numbered, running
from tests.kit.raw_client import Notice, RawClient

DAY_MS = 86_400_000
# Time passes only when a test lets it: a minute until a delivery is overdue, an hour of pause after a failure.
SETTINGS = {
    "storage.engine": "memory",
    "delivery.timeout_ms": 60_000,
    "delivery.backoff_ms": 3_600_000,
    "delivery.max_backoff_ms": 3_600_000,
    "limits.idle_timeout_ms": DAY_MS,
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", SETTINGS) as found:
        yield found


def group_of(broker: RunningBroker) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = broker.http("GET", "/v1/groups/g")[1]
    return found


def shares(broker: RunningBroker) -> dict[object, int]:
    lines = group_of(broker)["partitions"]
    return dict(Counter(line["member"]["client_id"] for line in lines if line["member"]))  # type: ignore[index]


def unresponsive(broker: RunningBroker) -> set[object]:
    return {member["client_id"] for member in group_of(broker)["members"] if member["unresponsive"]}


def member(broker: RunningBroker, name: str) -> RawClient:
    client = broker.raw(name)
    assert client.subscribe("t", "g", start=Start.COMMITTED).code is Code.OK
    return client


def alone_with(broker: RunningBroker, count: int = 10) -> tuple[RawClient, Notice]:
    """The only member of a group, with records 0 to count - 1 in its hands."""
    broker.raw("producer").publish("t", numbered(0, count))
    client = member(broker, "client")
    assert client.deliver().offsets == list(range(count))
    return client, client.assigned()


def two_members(broker: RunningBroker) -> tuple[RawClient, RawClient, Notice]:
    """One of them has all ten records of its partition in its hands (under this lease), the other has nothing to do."""
    broker.create("t", partitions=2)
    other, stuck = member(broker, "other"), member(broker, "stuck")
    lease = stuck.assigned()
    other.notices()
    broker.raw("producer").publish("t", numbered(0, 10), partition=lease.partition)
    assert stuck.deliver().offsets == list(range(10))
    return stuck, other, lease


@pytest.mark.parametrize("backoff_ms", [0, 3_600_000])
@pytest.mark.parametrize("heard", [AckKind.CUMULATIVE, AckKind.NEGATIVE, AckKind.IN_PROGRESS, "subscribe"])
def test_who_hangs_loses_the_partition_until_it_is_heard(tmp_path: Path, heard: AckKind | str, backoff_ms: int) -> None:
    with running(tmp_path / "data", {**SETTINGS, "delivery.backoff_ms": backoff_ms}) as broker:
        stuck, other, lease = two_members(broker)
        broker.advance(61)
        # It has nothing of it in its hands any more: nobody waits for it a second time.
        assert unresponsive(broker) == {"stuck"}
        assert shares(broker) == {"other": 2}
        assert stuck.notices()[-1].holding is Holding.REVOKED
        line = group_of(broker)["partitions"][lease.partition]
        assert (line["attempts"], line["reason"]) == (0, "not acknowledged in time")
        broker.advance(3601 if backoff_ms else 0)
        delivered = other.deliver()
        assert delivered.offsets == [0]  # it may have hung because of this one: alone, after the pause
        # A third one is served before who hangs.
        third = member(broker, "third")
        assert other.acked(delivered.head, 1) is Code.OK
        assert shares(broker) == {"other": 1, "third": 1}
        broker.drop(third)
        # Whatever it says, it is there again.
        if isinstance(heard, AckKind):
            assert stuck.acked(lease, 1, kind=heard) is Code.STALE
        else:
            assert stuck.subscribe("t", "g", start=Start.COMMITTED).code is Code.OK
        assert unresponsive(broker) == set()
        while shares(broker) != {"stuck": 1, "other": 1}:
            delivered = other.deliver()
            assert other.acked(delivered.head, delivered.head.last + 1) is Code.OK
        assert broker.counters()["delivery_timeouts"] == 1


def test_the_only_member_gets_it_again_itself(broker: RunningBroker) -> None:
    client, lease = alone_with(broker)
    assert client.acked(lease, 4) is Code.OK
    broker.advance(61)
    assert client.notices() == []
    assert client.silent(FrameType.DELIVER)
    broker.advance(3601)
    again = client.assigned()
    assert (again.offset, again.generation) == (4, lease.generation)
    assert client.deliver().offsets == [4]
    assert client.acked(lease, 10) is Code.STALE
    assert client.acked(again, 5) is Code.OK
    assert client.deliver().offsets == [5, 6]


def test_when_all_hang_the_partitions_are_held_all_the_same(broker: RunningBroker) -> None:
    stuck, other, lease = two_members(broker)
    broker.raw("producer").publish("t", numbered(0, 10), partition=1 - lease.partition)
    assert other.deliver().offsets == list(range(10))
    broker.advance(61)
    assert unresponsive(broker) == {"stuck", "other"}
    assert shares(broker) == {"stuck": 1, "other": 1}
    broker.advance(3601)
    assert (stuck.deliver().offsets, other.deliver().offsets) == ([0], [0])


def test_being_in_progress_and_acknowledging_restart_the_timeout(broker: RunningBroker) -> None:
    client, lease = alone_with(broker)
    for _ in range(5):
        broker.advance(40)
        assert client.in_progress(lease) is Code.OK
    for offset in range(1, 6):
        broker.advance(40)
        assert client.acked(lease, offset) is Code.OK
    broker.advance(40)
    counters = broker.counters()
    assert (counters["delivery_timeouts"], counters["in_progress_acks"]) == (0, 5)
    # A stale one restarts nothing, nor does what says nothing of this lease.
    assert client.acked(lease, 6, lease=lease.lease + 1, kind=AckKind.IN_PROGRESS) is Code.STALE
    assert client.acked(lease, 99) is Code.STALE
    broker.advance(21)
    assert broker.counters()["delivery_timeouts"] == 1
    assert client.in_progress(lease) is Code.STALE
    assert group_of(broker)["partitions"][0]["committed"] == 5


def test_the_timeout_runs_from_the_first_record_in_flight(broker: RunningBroker) -> None:
    client, _ = alone_with(broker)
    broker.advance(40)
    broker.raw("producer").publish("t", numbered(10, 1))
    assert client.deliver().offsets == [10]
    broker.advance(21)
    assert broker.counters()["delivery_timeouts"] == 1


def test_nothing_in_flight_is_never_overdue(broker: RunningBroker) -> None:
    client, lease = alone_with(broker)
    assert client.acked(lease, 10) is Code.OK
    assert client.in_progress(lease) is Code.OK
    broker.advance(600)
    broker.raw("producer").publish("t", numbered(10, 1))
    assert client.deliver().offsets == [10]
    broker.advance(40)
    assert client.acked(lease, 11) is Code.OK
    assert broker.counters()["delivery_timeouts"] == 0


def test_a_revoked_partition_does_not_wait_for_who_hangs(broker: RunningBroker) -> None:
    broker.create("t", partitions=2)
    producer = broker.raw("producer")
    old = member(broker, "old")
    for partition in range(2):
        producer.publish("t", numbered(0, 10), partition=partition)
        assert old.deliver().offsets == list(range(10))
    old.notices()
    new = member(broker, "new")
    going = old.notice(Holding.REVOKING).partition
    broker.advance(61)
    # It loses the other one, too: both were overdue.
    assert {notice.partition for notice in old.notices() if notice.holding is Holding.REVOKED} == {0, 1}
    assert shares(broker) == {"new": 2}
    broker.advance(3601)
    first = new.deliver()
    assert new.silent(FrameType.DELIVER), "one of the two is what it hung on: they come one after the other"
    assert new.acked(first.head, 1) is Code.OK
    assert {first.head.partition, new.deliver().head.partition} == {going, 1 - going}


def test_the_idle_clock_stands_still_for_who_has_records_in_its_hands(tmp_path: Path) -> None:
    with running(tmp_path / "data", {**SETTINGS, "limits.idle_timeout_ms": 30_000}) as broker:
        busy, lease = alone_with(broker)
        idle = broker.raw("idle")
        broker.advance(31)
        assert idle.ended()
        assert busy.in_progress(lease) is Code.OK
        broker.advance(31)
        broker.advance(28)
        assert busy.acked(lease, 10) is Code.OK
        # With nothing in its hands it has to show that it is there, like everybody.
        broker.advance(31)
        assert busy.ended()
        assert shares(broker) == {}
        # Nor does it help to hang: once the delivery is overdue the silence counts.
        stuck = member(broker, "stuck")
        broker.raw("producer").publish("t", numbered(10, 1))
        assert stuck.deliver().offsets == [10]
        broker.advance(61)
        broker.advance(2)
        assert stuck.ended()
        counters = broker.counters()
        assert (counters["delivery_timeouts"], counters["idle_timeouts"]) == (1, 5)  # two producers, too
