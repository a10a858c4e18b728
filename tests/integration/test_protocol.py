"""Every answer code that this release can give is provoked once over raw sockets and shows in the counters."""

from __future__ import annotations

import json
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.broker.sessions import native
from edgebroker.common import batch, codecs
from edgebroker.common.batch import Reason
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, GapReason, Wanted
from edgebroker.common.types import Start
from edgebroker.network.io.transport import HIGH_BYTES
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import RECEIVE_BYTES
from edgebroker.network.wire.frames import Connect, FrameType, Intent, Reset, Subscribe
from tests.kit.brokers import RawClient, RunningBroker, batch_of, config_for, numbered, running
from tests.kit.waiting import wait_for


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


def resealed(data: bytes, position: int, layout: str, *values: int) -> bytes:
    """The batch with other fields and a CRC that matches again."""
    change = struct.pack(layout, *values)
    data = data[:position] + change + data[position + len(change) :]
    return data[:17] + struct.pack(">I", crc32c(data[21:])) + data[21:]


GOOD = batch_of(b"a", b"b", b"c")
BAD: dict[Reason, bytes] = {
    Reason.TRUNCATED: GOOD[:-1],
    Reason.BAD_LENGTH: GOOD[:8] + struct.pack(">i", 10) + GOOD[12:],
    Reason.BAD_MAGIC: GOOD[:16] + b"\x01" + GOOD[17:],
    Reason.BAD_CRC: GOOD[:-1] + bytes([GOOD[-1] ^ 1]),
    Reason.BAD_ATTRIBUTES: resealed(GOOD, 21, ">h", 0x10),
    Reason.BAD_CODEC: resealed(GOOD, 21, ">h", 2),
    Reason.BAD_COUNT: resealed(GOOD, 57, ">i", 4),
    Reason.BAD_PRODUCER: resealed(GOOD, 43, ">q", 5),
    Reason.BAD_RECORD: resealed(GOOD, 61, ">B", 126),
    Reason.BAD_TIMESTAMP: resealed(batch.encode([(None, b"a", 0), (None, b"b", 5)]), 27, ">q", (1 << 63) - 1),
    Reason.TOO_LARGE: batch_of(b"x" * (1 << 20)),
    Reason.ZEROES: bytes(100),
}


@pytest.mark.parametrize("reason", BAD, ids=lambda reason: reason.name)
def test_a_bad_batch_is_refused_with_its_reason(broker: RunningBroker, reason: Reason) -> None:
    client = broker.raw()
    client.publish("t", GOOD)
    answer = client.publish("t", BAD[reason])
    assert answer.code is reason.code
    assert answer.offset == -1
    assert answer.message
    assert broker.refused(reason.code) == 1
    assert client.publish("t", GOOD)[:2] == (Code.OK, 3)


def test_snappy_is_named_as_unsupported(broker: RunningBroker) -> None:
    client = broker.raw()
    answer = client.publish("t", BAD[Reason.BAD_CODEC])
    assert answer.code is Code.UNSUPPORTED_CODEC
    assert "zstd" in answer.message


def test_unknown_topic(broker: RunningBroker) -> None:
    client = broker.raw()
    for answer in (client.subscribe("nowhere"), client.publish("a b", GOOD)):
        assert answer.code is Code.UNKNOWN_TOPIC
    assert broker.refused(Code.UNKNOWN_TOPIC) == 2
    broker.create("t", partitions=2)
    for group in ("a b", "a/b", "ü", "g" * 201):
        answer = client.subscribe("t", group)
        assert answer.code is Code.INVALID_REQUEST
        assert repr(group) in answer.message
    for partition in (2, -2, 1 << 30):
        assert client.subscribe("t", partition=partition).code is Code.UNKNOWN_TOPIC
    assert client.subscribe("t", partition=1).code is Code.OK


def test_not_origin(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        broker.raw().publish("t", GOOD)
    identity = tmp_path / "data" / "topics" / "t" / "0" / "identity"
    fields = json.loads(identity.read_bytes().split(b"\n")[0])
    fields["origin"] = "ab" * 16
    line = json.dumps(fields).encode()
    identity.write_bytes(line + b"\n%08x\n" % crc32c(line))
    with running(tmp_path / "data") as broker:
        client = broker.raw()
        answer = client.publish("t", GOOD)
        assert answer.code is Code.NOT_ORIGIN
        assert "ab" * 16 in answer.message
        assert broker.refused(Code.NOT_ORIGIN) == 1
        client.subscribe("t")
        assert client.deliver().offsets == [0, 1, 2]


def test_name_clash(broker: RunningBroker) -> None:
    broker.create("t")
    status, answer = broker.http("POST", "/v1/topics", {"name": "t"})
    assert (status, answer["code"]) == (409, "NAME_CLASH")


def test_unsupported_version(broker: RunningBroker) -> None:
    client = broker.raw(granted=False)
    connect = frames.Connect(99, 0, "new", b"", -1, -1, [])
    client.send(frames.write_connect(5, connect))
    answer = client.answer(5)
    assert answer.code is Code.UNSUPPORTED_VERSION
    assert "99" in answer.message
    assert client.ended()
    assert broker.refused(Code.UNSUPPORTED_VERSION) == 1


def test_a_refresh_is_for_who_holds_the_partition(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", GOOD)
    stranger = Reset(b"\x07" * 16, bytes(16), "t", 0, 0, 3)
    for answer in (client.ask_reset("t"), client.accept(stranger), client.answer(client.send_ready(stranger, 3))):
        assert answer.code is Code.STALE
    client.subscribe("t")
    head = client.deliver().head
    for answer in (client.accept(stranger), client.answer(client.send_ready(stranger, 3))):
        assert answer.code is Code.FENCED
        assert stranger.reset_id.hex() in answer.message
    # Neither did anything to the lease.
    assert client.acked(head, 3) is Code.OK


def test_disk_full(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"storage.max_bytes": 1 << 20}) as broker:
        client = broker.raw()
        client.subscribe_raw(Subscribe(Intent.LEAVE, "g", 0, 0, []))
        answer, stored = client.publish("t", numbered(0, 100, 1000)), 0
        while answer.code is Code.OK:
            assert stored < 20 << 20, "however fast the disk is"
            stored += 100_000
            answer = client.publish("t", numbered(0, 100, 1000))
        assert answer.code is Code.DISK_FULL
        assert answer.code.retryable
        assert "disk" in answer.message
        assert broker.refused(Code.DISK_FULL) == 1
        status, ready = broker.http("GET", "/readyz")
        assert status == 503
        assert "disk_full" in ready["checks"]["storage"]
        # Consumers go on.
        client.subscribe("t", "g")
        assert client.deliver().offsets[0] == 0


def test_behind_until_the_log_has_passed_the_position(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", GOOD)
    correlation = client.next_correlation()
    wanted = Wanted("t", 0, Start.OFFSET, NO_LOG_ID, -1, 5)
    client.send(frames.write_subscribe(correlation, Subscribe(Intent.JOIN, "g", 0, 0, [wanted])))
    assert client.answer(correlation).code is Code.OK
    answer = client.answer(correlation)
    assert (answer.code, answer.offset) == (Code.BEHIND, 5)
    assert broker.refused(Code.BEHIND) == 1
    client.publish("t", batch_of(b"3"))
    assert client.silent(FrameType.DELIVER)
    assert broker.http("GET", "/v1/groups/g")[1]["partitions"][0]["member"]["state"] == "behind"
    client.publish("t", batch_of(b"4", b"5", b"6"))
    assert client.deliver().offsets == [5, 6]


def test_stale_acknowledgements_change_nothing(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", GOOD)
    client.subscribe("t", records=2)
    head = client.deliver().head
    assert (head.first, head.last) == (0, 1)
    for kind in (AckKind.CUMULATIVE, AckKind.NEGATIVE, AckKind.IN_PROGRESS):
        assert client.acked(head, 1, kind=kind, lease=head.lease + 1) is Code.STALE
        assert client.acked(head, 1, kind=kind, generation=head.generation + 1) is Code.STALE
        assert client.acked(head, 1, kind=kind, topic="u") is Code.STALE
        assert client.acked(head, 1, kind=kind, partition=3) is Code.STALE
    for outside in (3, -1):  # not in flight
        assert client.acked(head, outside) is Code.STALE
    for outside in (2, -1):  # nothing of the kind can have failed
        assert client.nack(head, outside) is Code.STALE
    assert broker.refused(Code.STALE) == 16
    assert broker.counters()["stale_acks"] == 10  # those that name a partition which is held
    assert broker.http("GET", "/v1/groups/group")[1]["partitions"][0]["committed"] == 0
    assert client.subscribe_raw(Subscribe(Intent.JOIN, "other", 0, 0, [])).code is Code.STALE
    good = client.ack(head, 2)
    assert good is not None
    assert good[:2] == (Code.OK, 2)
    assert client.acked(head, 1) is Code.STALE
    assert client.nack(head, 1) is Code.STALE


def idempotent(client: RawClient, client_id: str) -> tuple[int, int]:
    grants = client.connect(client_id, flags=frames.WANT_PRODUCER)
    return grants.producer_id, grants.producer_epoch


def test_a_producer_id_is_usable_only_by_whom_it_was_granted(broker: RunningBroker) -> None:
    """Ids are no secret: they stand in every batch that is delivered."""
    owner, stranger = broker.raw(), broker.raw()
    producer_id, epoch = idempotent(owner, "till-7")

    def one(sequence: int) -> bytes:
        return batch_of(b"v", producer_id=producer_id, producer_epoch=epoch, base_sequence=sequence)

    assert owner.publish("t", one(0)).code is Code.OK
    for codec in ("none", "gzip"):
        forged = batch_of(b"forged", producer_id=producer_id, producer_epoch=epoch, base_sequence=1, codec=codec)
        assert stranger.publish("t", forged).code is Code.FENCED
    for known in ("", "till-8"):  # a name that is new, and one that has an id of its own
        name = known or "new"
        own = idempotent(stranger, known) if known else (-1, -1)
        claimed = stranger.connect(name, flags=frames.WANT_PRODUCER, producer_id=producer_id, producer_epoch=epoch)
        assert claimed.producer_id != producer_id and own[0] in (-1, claimed.producer_id)
        assert stranger.publish("t", forged).code is Code.FENCED
    assert stranger.publish("t", batch_of(b"anonymous")).code is Code.OK
    assert owner.publish("t", one(1)).code is Code.OK
    # One that asks for no id any more has none.
    owner.connect("till-7")
    assert owner.publish("t", one(2)).code is Code.FENCED


def test_out_of_order_and_fenced(broker: RunningBroker) -> None:
    first, second = broker.raw(), broker.raw()
    producer_id, epoch = idempotent(first, "till-7")

    def one(epoch: int, sequence: int) -> bytes:
        return batch_of(b"v", producer_id=producer_id, producer_epoch=epoch, base_sequence=sequence)

    assert first.publish("t", one(epoch, 1)).code is Code.OUT_OF_ORDER
    assert first.publish("t", one(epoch, 0)).code is Code.OK
    assert idempotent(second, "till-7") == (producer_id, epoch + 1)
    assert second.publish("t", one(epoch + 1, 5)).code is Code.OUT_OF_ORDER
    assert second.publish("t", one(epoch + 1, 0)).code is Code.OK
    assert first.publish("t", one(epoch, 1)).code is Code.FENCED
    assert (broker.refused(Code.OUT_OF_ORDER), broker.refused(Code.FENCED)) == (2, 1)
    # A client that was here before keeps its epoch; one that asks for a new one gets it.
    again = second.connect("till-7", flags=frames.WANT_PRODUCER, producer_id=producer_id, producer_epoch=epoch + 1)
    assert (again.producer_id, again.producer_epoch) == (producer_id, epoch + 1)
    flags = frames.WANT_PRODUCER | frames.NEW_EPOCH
    again = second.connect("till-7", flags=flags, producer_id=producer_id, producer_epoch=epoch + 1)
    assert (again.producer_id, again.producer_epoch) == (producer_id, epoch + 2)


@pytest.mark.parametrize("claim", [(5, -1), (-1, 5), (-7, -7), (5, 32767)])
def test_a_producer_is_granted_only_what_it_can_use(broker: RunningBroker, claim: tuple[int, int]) -> None:
    client = broker.raw()
    flags = frames.WANT_PRODUCER | (frames.NEW_EPOCH if claim[1] == 32767 else 0)
    grants = client.connect("new", flags=flags, producer_id=claim[0], producer_epoch=claim[1])
    assert grants.producer_id >= 0
    assert 0 <= grants.producer_epoch < 32767
    data = batch_of(b"a", producer_id=grants.producer_id, producer_epoch=grants.producer_epoch, base_sequence=0)
    assert client.publish("t", data)[:2] == (Code.OK, 0)


def test_shutting_down(tmp_path: Path) -> None:
    broker = RunningBroker(config_for(tmp_path / "data"))
    try:
        client, reader = broker.raw(), broker.raw("reader")
        client.publish("t", GOOD)
        here, sent = threading.Event(), threading.Event()

        def stop() -> None:
            here.set()
            assert sent.wait(10.0)
            broker.broker.stop()

        broker.broker.loop.call_soon_threadsafe(stop)
        assert here.wait(10.0)
        client.publish("t", GOOD, wait=False)  # arrives in the turn in which the node stops
        sent.set()
        answer = client.answer()
        assert answer.code is Code.SHUTTING_DOWN
        assert answer.code.retryable
        for each in (client, reader):
            farewell = each.answer(0)
            assert farewell.code is Code.SHUTTING_DOWN
            assert each.ended()
        assert broker.broker.core.metrics.refused_by_code["SHUTTING_DOWN"] == 1
    finally:
        assert broker.stop()
    with running(tmp_path / "data") as again:
        assert again.raw().publish("t", GOOD)[:2] == (Code.OK, 3)


def damaged(directory: Path) -> None:
    """A stopped broker's data with one bad byte in the middle of its first sealed segment."""
    settings = {"storage.segment_bytes": 64 << 10}
    with running(directory, settings) as broker:
        client = broker.raw()
        for first in range(0, 400, 10):
            assert client.publish("t", numbered(first, 10, 500)).code is Code.OK
    segments = sorted((directory / "topics" / "t" / "0").glob("*.log"))
    assert len(segments) > 2
    data = bytearray(segments[0].read_bytes())
    data[data.index(b"....", len(data) // 2)] ^= 0x40
    segments[0].write_bytes(data)


def read_to(client: RawClient, offsets: list[int], stop: int) -> None:
    """Acknowledge and collect what is delivered until an offset was seen."""
    while not offsets or offsets[-1] < stop:
        delivered = client.deliver()
        offsets += delivered.offsets
        client.ack(delivered.head, delivered.head.last + 1, wait=False)


def test_damaged_waits_and_goes_on_when_told_to_skip(tmp_path: Path) -> None:
    damaged(tmp_path / "data")
    with running(tmp_path / "data") as broker:
        client = broker.raw()
        client.subscribe("t")
        told = client.answer()
        offsets: list[int] = []
        assert told.code is Code.DAMAGED
        assert told.code.retryable
        corrupt = told.offset
        assert 0 < corrupt < 400
        read_to(client, offsets, corrupt - 1)
        assert offsets == list(range(corrupt))
        assert broker.refused(Code.DAMAGED) == 1
        assert "t/0" in broker.http("GET", "/readyz")[1]["warnings"]["damaged"]
        # Publishing behind it changes nothing for this reader.
        assert client.publish("t", GOOD).code is Code.OK
        assert broker.http("GET", "/v1/groups/group")[1]["partitions"][0]["member"]["state"] == "damaged"
        assert broker.http("PATCH", "/v1/topics/t", {"on_damage": "skip"})[0] == 200
        gap = client.deliver().head
        assert (gap.first, gap.gaps[0].reason) == (corrupt, GapReason.DAMAGED)
        assert gap.gaps[0][:2] == (gap.first, gap.last)
        read_to(client, offsets, 402)
        assert offsets == [*range(corrupt), *range(gap.last + 1, 403)]
        assert broker.counters()["gaps"] == 1


def test_compression_codes_are_those_of_the_format() -> None:
    assert codecs.CODEC_BITS == {"none": 0, "gzip": 1, "lz4": 3, "zstd": 4}


def test_the_frames_of_one_client_are_handled_in_several_iterations(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, and what follows them as well; the others get their turn in between."""
    seen: list[tuple[int, int]] = []
    handle = native.Session._handle

    def noted(session: native.Session, event: Any) -> None:
        seen.append((broker.broker.loop.iterations, getattr(event, "correlation", 0)))
        handle(session, event)

    broker.create("t")
    client = broker.raw()
    monkeypatch.setattr(native, "SHARE_SECONDS", 0.0)
    monkeypatch.setattr(native.Session, "_handle", noted)
    asked = [client.next_correlation() for _ in range(95)]
    line = Wanted("nowhere", -1, Start.EARLIEST, NO_LOG_ID, -1, 0)
    wanted = Subscribe(Intent.JOIN, "g", 0, 0, [line])
    client.send(*(frames.write_subscribe(one, wanted) for one in asked))
    assert [client.answer(one).code for one in asked] == [Code.UNKNOWN_TOPIC] * 95
    assert client.publish("t", GOOD).code is Code.OK
    assert [correlation for _, correlation in seen if correlation in asked] == asked
    assert max(Counter(iteration for iteration, _ in seen).values()) <= 20
    session = next(iter(broker.broker.sessions))
    assert not session._connection.waiting
    assert not session._deferred


def test_of_several_lines_about_a_partition_the_last_one_counts(broker: RunningBroker) -> None:
    broker.create("t", partitions=2)
    for partition in (0, 1):
        broker.raw().publish("t", numbered(0, 10), partition=partition)

    def line(partition: int, offset: int) -> Wanted:
        return Wanted("t", partition, Start.OFFSET, NO_LOG_ID, -1, offset)

    for lines, expected in (
        ([line(0, 1), line(-1, 2), line(0, 3), line(0, 4)], {0: 4, 1: 2}),
        ([line(0, 1), line(1, 2), line(-1, 3)], {0: 3, 1: 3}),
        ([line(-1, 1), line(-1, 2), *[line(1, 3)] * 1000, line(1, 4)], {0: 2, 1: 4}),
    ):
        client = broker.raw()
        assert client.subscribe_raw(Subscribe(Intent.JOIN, "", 5, 0, lines)).code is Code.OK
        found = [client.assigned() for _ in expected]
        assert {one.partition: one.offset for one in found} == expected


def test_who_does_not_take_the_answers_is_not_worked_for(broker: RunningBroker) -> None:
    """What was sent waits, one piece of it here and the rest with the client; nothing is lost, and the order holds."""
    broker.create("t")
    client, count = broker.raw(receive_buffer=4096), 60_000
    ack = ConsumerAck(AckKind.CUMULATIVE, "t", 0, 1, 99, 5)
    data = b"".join(frames.write_consumer_ack(1000 + rank, ack) for rank in range(count))
    sender = threading.Thread(target=lambda: client.send(data))
    sender.start()
    [session] = broker.call(lambda: list(broker.broker.sessions))
    wait_for(lambda: session._drain_first, "it takes no more")
    assert session.transport.backlog < HIGH_BYTES + 64 * 200
    assert session._connection.held <= RECEIVE_BYTES
    assert broker.raw("honest").publish("t", GOOD).code is Code.OK
    for rank in range(count):
        assert client.answer(1000 + rank).code is Code.STALE
    sender.join()
    assert client.publish("t", GOOD).code is Code.OK
    wait_for(lambda: not session._connection.waiting and not session.transport.paused, "it is read again")


def test_frames_that_are_not_complete_take_so_much_of_all_connections(tmp_path: Path) -> None:
    """Those that were begun first go; who sends whole frames goes on, and is told nothing."""
    limit = 8 << 20
    with running(tmp_path / "data", {"limits.receive_bytes": limit}) as broker:
        honest = broker.raw("honest")
        broker.create("t")
        size = (1 << 20) + 4096
        head = frames.HEADER.pack(size, FrameType.PUBLISH, 0, 0, 7) + frames.publish_prefix(2, "t", 0)
        hostile = []
        for rank in range(12):
            client = broker.raw(f"hostile-{rank}")
            client.send(head + bytes(1 << 20))
            hostile.append(client)
            assert honest.publish("t", GOOD).code is Code.OK
        receiving = broker.broker.sessions.receiving
        wait_for(lambda: receiving.closed >= 5, "the oldest were closed")
        assert broker.call(lambda: receiving.bytes) <= limit  # not in the midst of a turn
        assert all(client.ended() for client in hostile[:5])
        broker.advance(1.1)
        problem = broker.http("GET", "/v1/node")[1]["problems"]["limits"]
        assert problem.startswith(
            "limits.receive_bytes: connections were closed that did not complete what they began ("
        )
        broker.advance(61.0)
        assert all(client.ended() for client in hostile), "the others did not come to their end in time"
        assert broker.raw("later").publish("t", GOOD).code is Code.OK
        assert (receiving.bytes, broker.http("GET", "/v1/node")[1]["problems"]) == (0, {})


def test_what_one_frame_may_name(broker: RunningBroker) -> None:
    """More ends the connection: one frame has to be short work."""
    broker.create("t")
    line = Wanted("t", -1, Start.EARLIEST, NO_LOG_ID, -1, 0)
    for most, write in (
        (frames.MOST_TOPICS, lambda count: frames.write_connect(9, Connect(1, 0, "c", b"", -1, -1, ["t"] * count))),
        (frames.MOST_LINES, lambda count: frames.write_subscribe(9, Subscribe(Intent.JOIN, "g", 0, 0, [line] * count))),
        (frames.MOST_ENDS, lambda count: frames.write_heartbeat([("t", 0, 5)] * count)),
    ):
        client = broker.raw()
        client.send(write(most))
        assert client.publish("t", GOOD).code is Code.OK
        client.send(write(most + 1))
        assert client.ended()
