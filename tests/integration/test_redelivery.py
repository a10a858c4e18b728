"""Records that could not be handled come again: in order, alone, after a pause, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.common.errors import Code
from edgebroker.common.types import Start
from edgebroker.network.wire.frames import FrameType
from tests.kit.brokers import RunningBroker, batch_of, member, numbered, running
from tests.kit.raw_client import RawClient

# Time passes only when a test lets it. 100 s of pause, doubled up to 350 s; a delivery is overdue after 1000 s.
SETTINGS = {
    "storage.engine": "memory",
    "delivery.timeout_ms": 1_000_000,
    "delivery.backoff_ms": 100_000,
    "delivery.max_backoff_ms": 350_000,
    "delivery.max_attempts": 0,
    "limits.idle_timeout_ms": 1_000_000_000,
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    """With ten records in one batch."""
    with running(tmp_path / "data", SETTINGS) as found:
        found.raw("producer").publish("t", numbered(0, 10))
        yield found


def line_of(broker: RunningBroker) -> dict[str, Any]:
    found: dict[str, Any] = broker.http("GET", "/v1/groups/g")[1]["partitions"][0]
    return found


def place_of(broker: RunningBroker) -> tuple[int, int]:
    """Where the group stands, and how often that record has failed."""
    line = line_of(broker)
    return line["committed"], line["attempts"]


def test_a_negative_acknowledgement(broker: RunningBroker) -> None:
    client = member(broker)
    first = client.deliver().head
    assert client.nack(first, 3, "no such article") is Code.OK
    # Everything before it is done with; nothing behind it comes before it.
    line = line_of(broker)
    assert (line["committed"], line["attempts"], line["reason"]) == (3, 1, "no such article")
    holder = line["member"]
    assert (holder["state"], holder["isolated"], holder["in_flight"]) == ("backoff", True, 0)
    assert "3" in holder["why"]
    assert "no such article" in holder["why"]
    broker.raw("producer").publish("t", batch_of(b"new"))
    assert client.silent(FrameType.DELIVER)
    client.notices()
    broker.advance(110)
    # Alone: its batch travels, but the others in it are not handed over.
    again = client.deliver()
    assert (again.head.first, again.head.last, again.offsets) == (3, 3, [3])
    lease = client.assigned()
    assert (lease.offset, lease.lease, lease.generation) == (3, again.head.lease, first.generation)
    assert lease.lease != first.lease
    assert line_of(broker)["member"]["state"] == "live"
    assert client.silent(FrameType.DELIVER)
    # The old lease is void.
    assert client.acked(first, 10) is Code.STALE
    assert client.nack(first, 3) is Code.STALE
    assert client.acked(again.head, 4) is Code.OK
    # It is done: what follows comes as always, under the same lease.
    assert place_of(broker) == (4, 0)
    assert line_of(broker)["reason"] == ""
    rest = client.deliver()
    assert (rest.offsets[0], rest.head.lease) == (4, again.head.lease)
    counters = broker.counters()
    assert (counters["negative_acks"], counters["redeliveries"], counters["dead_letters"]) == (1, 1, 0)


def test_the_first_record_in_flight_fails(broker: RunningBroker) -> None:
    client = member(broker)
    assert client.nack(client.deliver().head, 0) is Code.OK
    assert line_of(broker)["reason"] == "the handler failed"
    assert place_of(broker) == (0, 1)


def test_a_negative_acknowledgement_of_the_same_record_counts_on(broker: RunningBroker) -> None:
    client = member(broker)
    assert client.nack(client.deliver().head, 5) is Code.OK
    for attempts in (2, 3, 4):
        broker.advance(360)
        delivered = client.deliver()
        assert delivered.offsets == [5]
        assert client.nack(delivered.head, 5, f"attempt {attempts}") is Code.OK
        assert place_of(broker) == (5, attempts)
        assert line_of(broker)["reason"] == f"attempt {attempts}"
    # Another record begins again.
    broker.advance(360)
    assert client.acked(client.deliver().head, 6) is Code.OK
    assert client.nack(client.deliver().head, 7) is Code.OK
    assert place_of(broker) == (7, 1)


def test_pauses_double_up_to_the_longest(broker: RunningBroker) -> None:
    client = member(broker)
    head = client.deliver().head
    for pause in (100, 200, 350, 350):
        assert client.nack(head, 0) is Code.OK
        broker.advance(pause - 20)
        assert client.silent(FrameType.DELIVER)
        broker.advance(40)
        head = client.deliver().head


def test_no_pause_at_all(tmp_path: Path) -> None:
    with running(tmp_path / "data", {**SETTINGS, "delivery.backoff_ms": 0}) as broker:
        broker.raw("producer").publish("t", numbered(0, 10))
        client = member(broker)
        for attempts in range(1, 50):
            assert client.nack(client.deliver().head, 0) is Code.OK
            assert place_of(broker) == (0, attempts)


def fail(broker: RunningBroker, client: RawClient, how: str) -> RawClient:
    """Take the next delivery and fail with it; who goes on."""
    head = client.deliver().head
    if how == "negative":
        assert client.nack(head, 0) is Code.OK
    elif how == "timeout":
        broker.advance(1001)
        assert client.silent(FrameType.DELIVER)
    elif how == "leave":
        client.leave("t")
        client.subscribe("t", "g", start=Start.COMMITTED)
    elif how == "again":
        client.subscribe("t", "g", start=Start.COMMITTED)
    else:
        standby = member(broker, "standby")
        broker.drop(client)
        client = standby
    return client


@pytest.mark.parametrize(
    "steps",
    [
        # What failed is known only when it was named, or when it was alone.
        [("timeout", 0), ("timeout", 1), ("timeout", 2)],
        [("close", 0), ("close", 1), ("close", 2)],
        [("negative", 1), ("timeout", 2), ("close", 3), ("negative", 4)],
        [("timeout", 0), ("close", 1), ("negative", 2)],
        # To give back is no failure, whether it was alone or not.
        [("leave", 0), ("timeout", 0), ("leave", 0), ("again", 0), ("negative", 1), ("leave", 1), ("again", 1)],
        [("again", 0), ("close", 0), ("negative", 1)],
    ],
    ids=lambda steps: " ".join(how for how, _ in steps),
)
def test_what_counts_as_an_attempt(broker: RunningBroker, steps: list[tuple[str, int]]) -> None:
    client = member(broker)
    for how, attempts in steps:
        client = fail(broker, client, how)
        broker.advance(360)
        assert place_of(broker) == (0, attempts), how
    failed = any(how not in ("leave", "again") for how, _ in steps)
    assert client.deliver().offsets == ([0] if failed else list(range(10)))


@pytest.mark.parametrize(("counted", "seconds"), [(False, 0), (True, 110)])
def test_only_a_counted_disconnect_has_a_pause(broker: RunningBroker, counted: bool, seconds: int) -> None:
    first, second, third = (member(broker, name) for name in ("first", "second", "third"))
    first.deliver()
    broker.drop(first)
    assert second.deliver().offsets == [0]  # at once
    if counted:
        broker.drop(second)
        assert third.silent(FrameType.DELIVER)
        broker.advance(seconds)
        assert third.deliver().offsets == [0]


def test_behind_a_failure_the_window_opens_bit_by_bit(broker: RunningBroker) -> None:
    client = member(broker, records=3)
    assert client.nack(client.deliver().head, 1) is Code.OK
    broker.advance(110)
    expected = [[1], [2, 3], [4, 5, 6], [7, 8, 9]]
    for offsets in expected:
        delivered = client.deliver()
        assert delivered.offsets == offsets
        assert client.acked(delivered.head, delivered.head.last + 1) is Code.OK


@pytest.mark.parametrize("start", [Start.OFFSET, Start.LATEST, Start.EARLIEST])
def test_going_elsewhere_forgets_the_failure(broker: RunningBroker, start: Start) -> None:
    client = member(broker)
    assert client.nack(client.deliver().head, 3) is Code.OK
    client.notices()
    client.subscribe("t", "g", start=start, value=6)
    offset = {Start.OFFSET: 6, Start.LATEST: 10, Start.EARLIEST: 0}[start]
    assert client.assigned().offset == offset
    if offset < 10:
        assert client.deliver().offsets == list(range(offset, 10))
    assert place_of(broker) == (offset, 0)
    assert line_of(broker)["reason"] == ""
    # Nor does its pause come after it.
    client.subscribe("t", "g", start=Start.COMMITTED)
    assert client.assigned().offset == offset


def test_joining_again_does_not_shorten_the_pause(broker: RunningBroker) -> None:
    client = member(broker)
    assert client.nack(client.deliver().head, 3) is Code.OK
    for start, value in [(Start.COMMITTED, 0), (Start.OFFSET, 3)]:
        client.subscribe("t", "g", start=start, value=value)
        assert client.silent(FrameType.DELIVER)
    broker.drop(client)
    other = member(broker, "other")
    assert other.silent(FrameType.DELIVER)
    broker.advance(110)
    assert other.deliver().offsets == [3]
    assert place_of(broker) == (3, 1)


def test_partitions_fail_independently(broker: RunningBroker) -> None:
    broker.create("u", partitions=3)
    producer, client = broker.raw("u-producer"), broker.raw()
    client.subscribe("u", "g")
    for partition in range(3):
        producer.publish("u", numbered(0, 3), partition=partition)
    heads = {delivered.head.partition: delivered.head for delivered in (client.deliver() for _ in range(3))}
    assert client.nack(heads[1], 1) is Code.OK
    for partition in (0, 2):
        assert client.acked(heads[partition], 3) is Code.OK
        producer.publish("u", numbered(3, 2), partition=partition)
        assert client.deliver().offsets == [3, 4]
    assert client.silent(FrameType.DELIVER)


def test_attempts_survive_a_restart(tmp_path: Path) -> None:
    settings = {**SETTINGS, "storage.engine": "segment", "delivery.max_attempts": 4}
    with running(tmp_path / "data", settings) as broker:
        broker.raw("producer").publish("t", numbered(0, 10))
        client = member(broker)
        assert client.nack(client.deliver().head, 3) is Code.OK
        broker.advance(110)
        assert client.nack(client.deliver().head, 3) is Code.OK
    with running(tmp_path / "data", settings) as broker:
        assert place_of(broker) == (3, 2)
        client = member(broker)
        delivered = client.deliver()  # nobody knows any more when it failed: no pause
        assert delivered.offsets == [3]
        # That the node stops is no failure of its clients.
    with running(tmp_path / "data", settings) as broker:
        assert place_of(broker) == (3, 2)
        client = member(broker)
        assert client.nack(client.deliver().head, 3) is Code.OK
        assert place_of(broker) == (3, 3)
        broker.advance(360)
        assert client.nack(client.deliver().head, 3) is Code.OK
        assert client.deliver().offsets == list(range(4, 10))
        assert broker.counters()["dead_letters"] == 1
