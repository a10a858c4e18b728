"""Being pushed to, over the wire: starts, windows, acknowledgements, groups and standbys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, Wanted
from edgebroker.common.types import AckLevel, Start
from edgebroker.network.wire.frames import FrameType, Intent, Subscribe
from tests.kit.brokers import RawClient, RunningBroker, batch_of, numbered, running


@pytest.fixture(params=["segment", "memory"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", {"storage.engine": request.param}) as found:
        yield found


def place_of(broker: RunningBroker, group: str, topic: str = "t") -> dict[str, object]:
    places = broker.http("GET", f"/v1/groups/{group}")[1]["partitions"]
    return next(place for place in places if place["topic"] == topic)


def read(client: RawClient, count: int) -> list[int]:
    """Offsets as they are pushed, each delivery acknowledged."""
    found: list[int] = []
    while len(found) < count:
        delivered = client.deliver()
        found += delivered.offsets
        client.ack(delivered.head, delivered.head.last + 1, wait=False)
    return found


def test_push_on_arrival_to_every_group(broker: RunningBroker) -> None:
    producer = broker.raw("producer")
    broker.create("t")
    readers = [broker.raw(f"reader-{rank}") for rank in range(3)]
    for rank, reader in enumerate(readers):
        assert reader.subscribe("t", f"group-{rank}").code is Code.OK
    for rank in range(20):
        offset = producer.publish("t", batch_of(b"%d" % rank)).offset
        for reader in readers:
            delivered = reader.deliver()
            assert delivered.offsets == [offset]
            assert [record.value for record in delivered.records] == [b"%d" % rank]
            assert delivered.head.durable_end == offset + 1
            reader.ack(delivered.head, offset + 1, wait=False)
    assert broker.counters()["records_delivered"] == 60


def test_level_written_is_delivered_when_it_is_durable(broker: RunningBroker) -> None:
    producer, reader = broker.raw("producer"), broker.raw("reader")
    broker.create("t")
    reader.subscribe("t")
    for level in (AckLevel.NONE, AckLevel.WRITTEN):
        producer.publish("t", batch_of(b"v"), level=level, wait=level != AckLevel.NONE)
        assert len(reader.deliver().records) == 1


def test_a_window_of_one_record_with_large_batches(broker: RunningBroker) -> None:
    client = broker.raw()
    for first in (0, 100):
        client.publish("t", numbered(first, 100))
    client.subscribe("t", records=1)
    for offset in range(200):
        delivered = client.deliver()
        assert (delivered.head.first, delivered.head.last) == (offset, offset)
        assert delivered.offsets == [offset]
        assert [record.value for record in delivered.records] == [b"%d" % offset]
        if offset % 50 == 0:
            member = place_of(broker, "group")["member"]
            assert isinstance(member, dict)
            assert member["in_flight"] == 1
        client.ack(delivered.head, offset + 1, wait=False)
    assert client.silent(FrameType.DELIVER)


@pytest.mark.parametrize("window", [2, 7, 99, 100, 101, 150])
def test_windows_that_cut_through_batches(broker: RunningBroker, window: int) -> None:
    client = broker.raw()
    for first in range(0, 300, 100):
        client.publish("t", numbered(first, 100))
    client.subscribe("t", records=window)
    expected = acked = 0
    while expected < 300:
        head, records, _ = client.deliver()
        assert head.first == expected
        assert [record.offset for record in records] == list(range(head.first, head.last + 1))
        assert head.last + 1 - acked <= window
        expected = head.last + 1
        for acked in (head.first + (expected - head.first) // 2, expected):
            client.ack(head, acked, wait=False)


def test_a_window_of_bytes(broker: RunningBroker) -> None:
    client = broker.raw()
    for first in range(20):
        client.publish("t", numbered(first, 1, 10_000))
    client.subscribe("t", size=25_000)
    seen, in_flight = 0, 0
    while seen < 20:
        head, records, raw = client.deliver()
        in_flight += len(raw)
        assert in_flight <= 25_000
        seen += len(records)
        if in_flight > 10_000 or seen == 20:
            client.ack(head, head.last + 1)
            in_flight = 0


def test_a_batch_larger_than_the_window_still_comes(broker: RunningBroker) -> None:
    client = broker.raw()
    for first in (0, 1):
        client.publish("t", numbered(first, 1, 100_000))
    client.subscribe("t", size=1000)
    for offset in (0, 1):
        delivered = client.deliver()
        assert delivered.offsets == [offset]
        client.ack(delivered.head, offset + 1)


def test_cumulative_acknowledgement_inside_a_batch(broker: RunningBroker) -> None:
    client = broker.raw("first")
    client.publish("t", numbered(0, 10))
    client.subscribe("t", "g")
    head = client.deliver().head
    for offset in (3, 3, 7):
        answer = client.ack(head, offset)
        assert answer is not None
        assert answer[:2] == (Code.OK, offset)
        assert place_of(broker, "g")["committed"] == offset
    client.leave("t")
    again = broker.raw("second")
    again.subscribe("t", "g", start=Start.COMMITTED)
    delivered = again.deliver()
    assert delivered.offsets == [7, 8, 9]
    assert (delivered.head.first, delivered.head.last) == (7, 9)
    assert len(batch.decode(delivered.batches)) == 10  # whole stored batches travel


@pytest.mark.parametrize(("how", "expected"), [("leave", [4, 5, 6, 7, 8, 9]), ("close", [4])])
def test_a_standby_takes_over(broker: RunningBroker, how: str, expected: list[int]) -> None:
    holder, standby, third = broker.raw("holder"), broker.raw("standby"), broker.raw("third")
    holder.publish("t", numbered(0, 10))
    for client in (holder, standby, third):
        assert client.subscribe("t", "g", start=Start.COMMITTED).code is Code.OK
    head = holder.deliver().head
    holder.ack(head, 4)
    assert standby.silent(FrameType.DELIVER)
    assert place_of(broker, "g")["standbys"] == 2
    if how == "leave":
        holder.leave("t")
    else:
        holder.close()
    delivered = standby.deliver()
    assert delivered.offsets == expected
    assert delivered.head.generation > head.generation
    assert delivered.head.lease != head.lease
    assert third.silent(FrameType.DELIVER)
    assert standby.acked(head, 8) is Code.STALE  # under the lease of the holder that is gone
    standby.close()
    # Whoever vanishes with records in flight may have died of the first one: it comes alone now.
    assert third.deliver().offsets == [4]


def test_a_standby_that_leaves_is_forgotten(broker: RunningBroker) -> None:
    holder, standby, third = broker.raw("holder"), broker.raw("standby"), broker.raw("third")
    holder.publish("t", numbered(0, 3))
    for client in (holder, standby, third):
        client.subscribe("t", "g")
    standby.leave("t")
    holder.close()
    assert read(third, 3) == [0, 1, 2]
    assert standby.silent(FrameType.DELIVER)


def test_a_holder_that_subscribes_again_keeps_its_partition(broker: RunningBroker) -> None:
    holder, standby = broker.raw("holder"), broker.raw("standby")
    holder.publish("t", numbered(0, 10))
    holder.subscribe("t", "g")
    standby.subscribe("t", "g")
    first = holder.deliver().head
    assert holder.assigned()[-2:] == (first.lease, 0)
    assert holder.subscribe("t", "g", start=Start.OFFSET, value=5).code is Code.OK
    delivered = holder.deliver()
    assert delivered.offsets == [5, 6, 7, 8, 9]
    assert delivered.head.lease != first.lease
    assert delivered.head.generation == first.generation
    assert holder.assigned()[-2:] == (delivered.head.lease, 5)
    assert standby.silent(FrameType.DELIVER)
    assert standby.notices() == []
    holder.close()
    assert read(standby, 5) == [5, 6, 7, 8, 9]


def test_the_last_line_about_a_partition_counts(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", numbered(0, 10))
    log_id = bytes.fromhex(broker.http("GET", "/v1/topics/t")[1]["partitions"][0]["log_id"])
    everything = Wanted("t", -1, Start.EARLIEST, NO_LOG_ID, -1, 0)
    mine = Wanted("t", 0, Start.POSITION, log_id, 1, 6)
    assert client.subscribe_raw(Subscribe(Intent.JOIN, "g", 0, 0, [everything, mine])).code is Code.OK
    assert client.deliver().offsets == [6, 7, 8, 9]
    assert client.silent(FrameType.DELIVER)


def test_a_position_of_another_log_gets_reset(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", numbered(0, 10))
    partition = broker.http("GET", "/v1/topics/t")[1]["partitions"][0]
    assert client.subscribe("t", start=Start.POSITION, value=4, partition=0, log_id=b"\x07" * 16).code is Code.OK
    reset = client.reset()
    assert reset.log_id.hex() == partition["log_id"]
    assert (reset.topic, reset.partition, reset.from_offset, reset.target) == ("t", 0, 0, 10)
    assert client.silent(FrameType.DELIVER)
    assert broker.counters()["refreshes_announced"] == 1
    # It goes on in this log only through the refresh: a place of its own does not count before.
    client.subscribe("t", start=Start.POSITION, value=4, partition=0, log_id=reset.log_id)
    assert client.reset() == reset
    assert client.silent(FrameType.DELIVER)
    assert client.accept(reset).code is Code.OK
    assert client.deliver().offsets == list(range(10))


def test_starts(broker: RunningBroker) -> None:
    producer = broker.raw("producer")
    for offset in range(6):
        producer.publish("t", batch.encode([(None, b"v", 1000 * (1 + offset))]))
    cases: list[tuple[Start, int, list[int]]] = [
        (Start.EARLIEST, 0, [0, 1, 2, 3, 4, 5]),
        (Start.COMMITTED, 0, [0, 1, 2, 3, 4, 5]),
        (Start.OFFSET, 4, [4, 5]),
        (Start.OFFSET, -3, [0, 1, 2, 3, 4, 5]),
        (Start.TIME, 0, [0, 1, 2, 3, 4, 5]),
        (Start.TIME, 3500, [3, 4, 5]),
        (Start.TIME, 6000, [5]),
        (Start.TIME, 6001, []),
        (Start.LATEST, 0, []),
        (Start.OFFSET, 6, []),
    ]
    readers = []
    for rank, (start, value, expected) in enumerate(cases):
        reader = broker.raw(f"reader-{rank}")
        assert reader.subscribe("t", f"group-{rank}", start=start, value=value).code is Code.OK
        assert read(reader, len(expected)) == expected
        readers.append(reader)
    # A timed start is answered by another thread: the group has a place when it has begun.
    producer.publish("t", batch_of(b"new"))
    for reader in readers:
        assert read(reader, 1) == [6]


def test_a_group_that_was_told_where_to_begin_keeps_that_place(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", numbered(0, 5))
    client.subscribe("t", "late", start=Start.LATEST)
    client.close()
    other = broker.raw("other")
    other.publish("t", numbered(5, 2))
    other.subscribe("t", "late", start=Start.COMMITTED)
    assert other.deliver().offsets == [5, 6]


def test_a_group_offset_survives_reconnect_and_restart(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        client = broker.raw()
        client.publish("t", numbered(0, 10))
        client.subscribe("t", "g", start=Start.COMMITTED)
        client.ack(client.deliver().head, 6)
        client.close()
        again = broker.raw("again")
        again.subscribe("t", "g", start=Start.COMMITTED)
        assert again.deliver().offsets == [6]  # alone: the client before vanished with it
        again.leave("t")
    with running(tmp_path / "data") as broker:
        client = broker.raw()
        assert place_of(broker, "g")["committed"] == 6
        client.subscribe("t", "g", start=Start.COMMITTED)
        assert read(client, 4) == [6, 7, 8, 9]


def test_an_acknowledgement_is_answered_when_it_is_stored(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        client = broker.raw()
        client.publish("t", numbered(0, 10))
        client.subscribe("t", "g")
        head = client.deliver().head
        before = broker.http("GET", "/v1/node")[1]["storage"]["metadata_transactions"]
        answer = client.ack(head, 3)
        assert answer is not None
        assert answer[:2] == (Code.OK, 3)
        assert broker.http("GET", "/v1/node")[1]["storage"]["metadata_transactions"] > before
        # Without a correlation nothing is answered.
        client.ack(head, 4, wait=False)
        assert client.silent(FrameType.ACK)


def test_partitions_are_pushed_independently(broker: RunningBroker) -> None:
    broker.create("t", partitions=4)
    client = broker.raw()
    client.subscribe("t", records=1)
    for partition in range(4):
        client.publish("t", numbered(0, 2), partition=partition)
    heads = [client.deliver().head for _ in range(4)]
    assert sorted(head.partition for head in heads) == [0, 1, 2, 3]
    assert all(head.last == 0 for head in heads)
    client.ack(heads[2], 1)
    following = client.deliver().head
    assert (following.partition, following.first) == (heads[2].partition, 1)
    assert client.silent(FrameType.DELIVER)
