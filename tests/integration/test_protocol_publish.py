"""Publishing over the wire against a real broker: levels, duplicates, compression, limits, back-pressure."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.broker.sessions import native
from edgebroker.common import batch, codecs
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import AckLevel
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import FrameType
from edgebroker.storage.rewrite.creation import TopicCreation
from tests.kit.brokers import RunningBroker, batch_of, numbered, running
from tests.kit.raw_client import write_publish
from tests.kit.waiting import wait_for


@pytest.fixture(params=["segment", "memory"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", {"storage.engine": request.param}) as found:
        yield found


def resealed(data: bytes, position: int, change: bytes) -> bytes:
    """The batch with other bytes at a position and a CRC that matches again."""
    data = data[:position] + change + data[position + len(change) :]
    return data[:17] + struct.pack(">I", crc32c(data[21:])) + data[21:]


def values(broker: RunningBroker, topic: str) -> list[bytes | None]:
    """Everything a new group reads before the end that is durable now."""
    client = broker.raw("reader")
    end = broker.http("GET", f"/v1/topics/{topic}")[1]["partitions"][0]["durable_end"]
    client.subscribe(topic, f"reader-{client.socket.fileno()}")
    found: list[bytes | None] = []
    while len(found) < end:
        found += [record.value for record in client.deliver().records]
    return found


@pytest.mark.parametrize("level", [AckLevel.WRITTEN, AckLevel.DURABLE])
def test_an_acknowledged_batch_is_there(broker: RunningBroker, level: AckLevel) -> None:
    client = broker.raw()
    assert client.publish("t", batch_of(b"a", b"b"), level=level)[:2] == (Code.OK, 0)
    assert client.publish("t", batch_of(b"c"), level=level)[:2] == (Code.OK, 2)
    client.publish("t", batch_of(b"d"), level=AckLevel.DURABLE)
    assert values(broker, "t") == [b"a", b"b", b"c", b"d"]


def test_level_none_is_stored_and_not_answered(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", batch_of(b"first"))
    for rank in range(5):
        client.publish("t", batch_of(b"%d" % rank), level=AckLevel.NONE, wait=False)
    client.publish("t", b"garbage", level=AckLevel.NONE, wait=False)
    client.publish("t", batch_of(b"x"), partition=7, level=AckLevel.NONE, wait=False)
    assert client.publish("t", batch_of(b"last"))[:2] == (Code.OK, 6)
    assert client.silent(FrameType.ACK)
    assert values(broker, "t") == [b"first", b"0", b"1", b"2", b"3", b"4", b"last"]


def test_a_frame_of_several_batches_is_taken_whole_or_not_at_all(broker: RunningBroker) -> None:
    client = broker.raw()
    assert client.publish("t", batch_of(b"a"), batch_of(b"b", b"c"), batch_of(b"d"))[:2] == (Code.OK, 0)
    bad = batch_of(b"x")[:-1] + b"\xff"
    assert client.publish("t", batch_of(b"e"), bad).code is Code.INVALID_BATCH
    assert client.publish("t", batch_of(b"f"))[:2] == (Code.OK, 4)
    assert values(broker, "t") == [b"a", b"b", b"c", b"d", b"f"]


def test_frames_sent_together_are_answered_one_by_one(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", batch_of(b"first"))
    client.publish("u", batch_of(b"first"))
    out, expected = [], {}
    ends = {"t": 1, "u": 1}
    for correlation in range(1000, 1300):
        topic = "tu"[correlation // 7 % 2]
        out.append(write_publish(correlation, frames.publish_prefix(2, topic, 0), numbered(correlation, 3)))
        expected[correlation] = ends[topic]
        ends[topic] += 3
    client.send(*out)
    answers = {correlation: client.answer(correlation) for correlation in expected}
    assert {correlation: answer.offset for correlation, answer in answers.items()} == expected
    assert all(answer.code is Code.OK for answer in answers.values())


def test_published_bytes_and_frames_are_counted_once(broker: RunningBroker) -> None:
    client = broker.raw()
    out, size = [], 0
    for correlation, topic in enumerate(["t", "u"] * 50):
        one = numbered(correlation, 2)
        size += len(one)
        out.append(write_publish(1000 + correlation, frames.publish_prefix(2, topic, 0), one))
    client.send(*out)
    for correlation in range(100):
        assert client.answer(1000 + correlation).code is Code.OK
    counters = broker.counters()
    assert counters["publish_frames"] == 100
    assert counters["records_published"] == 200
    assert size <= counters["bytes_published"] <= sum(map(len, out))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_is_sent_at_once_to_new_topics_is_stored_in_order(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """More frames than are taken at a time, in a turn each, or all in one; creating a topic may take no time at all."""
    monkeypatch.setattr(native, "SHARE_SECONDS", share)
    client, count = broker.raw(), 200
    client.send(
        *(
            write_publish(1000 + rank, frames.publish_prefix(2, "tu"[rank % 2], 0), numbered(rank, 1))
            for rank in range(count)
        )
    )
    answers = [client.answer(1000 + rank) for rank in range(count)]
    assert [(answer.code, answer.offset) for answer in answers] == [(Code.OK, rank // 2) for rank in range(count)]
    wait_for(lambda: not next(iter(broker.broker.sessions)).transport.paused, "it is read again")


def test_each_of_many_frames_is_answered_whose_topics_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store says so before its call returns: the publisher is held and released while its frame is handled."""
    monkeypatch.setattr(native, "SHARE_SECONDS", 0.0)
    monkeypatch.setattr(TopicCreation, "_refusal", lambda creation, name: (Outcome.OVERLOADED, "it is being deleted"))
    with running(tmp_path / "data") as broker:
        client = broker.raw()
        client.send(
            *(
                write_publish(1000 + rank, frames.publish_prefix(2, "tu"[rank % 2], 0), numbered(rank, 1))
                for rank in range(200)
            )
        )
        answered = [client.take(FrameType.ACK).correlation for _ in range(200)]
        assert answered == [*range(1000, 1200)]


def test_an_empty_frame_is_refused(broker: RunningBroker) -> None:
    client = broker.raw()
    client.publish("t", batch_of(b"a"))
    assert client.publish("t").code is Code.INVALID_BATCH


def test_a_duplicate_gets_the_old_offset_and_is_stored_once(broker: RunningBroker) -> None:
    client = broker.raw()
    grants = client.connect("idempotent", flags=frames.WANT_PRODUCER)
    assert grants.producer_id >= 0
    assert grants.producer_epoch == 0

    def one(sequence: int, *payload: bytes) -> bytes:
        return batch_of(*payload, producer_id=grants.producer_id, producer_epoch=0, base_sequence=sequence)

    sent = [one(0, b"a", b"b"), one(2, b"c"), one(3, b"d", b"e")]
    assert [client.publish("t", data).offset for data in sent] == [0, 2, 3]
    for data, offset in zip(sent, (0, 2, 3), strict=True):
        assert client.publish("t", data)[:2] == (Code.OK, offset)
    # Several in one buffer, duplicates of what is not durable yet among them.
    fresh = one(5, b"f")
    prefix = frames.publish_prefix(2, "t", 0)
    client.send(*(write_publish(900 + rank, prefix, data) for rank, data in enumerate([fresh, fresh, sent[0]])))
    assert [client.answer(900 + rank)[:2] for rank in range(3)] == [(Code.OK, 5), (Code.OK, 5), (Code.OK, 0)]
    assert values(broker, "t") == [b"a", b"b", b"c", b"d", b"e", b"f"]


def test_the_same_sequence_with_other_bytes_is_no_duplicate(broker: RunningBroker) -> None:
    client = broker.raw()
    producer = client.connect("p", flags=frames.WANT_PRODUCER)
    ids = {"producer_id": producer.producer_id, "producer_epoch": producer.producer_epoch}
    client.publish("t", batch_of(b"a", base_sequence=0, **ids))
    assert client.publish("t", batch_of(b"b", base_sequence=0, **ids)).code is Code.OUT_OF_ORDER
    assert client.publish("t", batch_of(b"c", base_sequence=7, **ids)).code is Code.OUT_OF_ORDER
    assert values(broker, "t") == [b"a"]


@pytest.mark.parametrize("codec", ["gzip", "lz4", "zstd"])
def test_compressed_batches(broker: RunningBroker, codec: codecs.CodecName) -> None:
    client = broker.raw()
    payload = [b"%d" % rank * 50 for rank in range(100)]
    assert client.publish("t", batch_of(*payload, codec=codec))[:2] == (Code.OK, 0)
    # Compressed and plain ones mixed in one buffer keep their order, for one partition.
    prefix = frames.publish_prefix(2, "t", 0)
    mixed = [batch_of(b"plain"), batch_of(b"packed", codec=codec), batch_of(b"plain 2"), batch_of(b"p 2", codec=codec)]
    client.send(*(write_publish(900 + rank, prefix, data) for rank, data in enumerate(mixed)))
    assert [client.answer(900 + rank).offset for rank in range(4)] == [100, 101, 102, 103]
    assert values(broker, "t") == [*payload, b"plain", b"packed", b"plain 2", b"p 2"]


@pytest.mark.parametrize("codec", [1, 3, 4])
def test_a_bomb_is_refused_and_the_connection_goes_on(tmp_path: Path, codec: int) -> None:
    with running(tmp_path / "data", {"limits.max_inflated_bytes": 1 << 20}) as broker:
        client = broker.raw()
        name = {bits: name for name, bits in codecs.CODEC_BITS.items()}[codec]
        bomb = batch_of(b"\0" * (2 << 20), codec=name)
        assert len(bomb) < 10_000
        answer = client.publish("t", bomb)
        assert answer.code is Code.TOO_LARGE
        assert str(1 << 20) in answer.message
        assert client.publish("t", batch_of(b"good", codec=name))[:2] == (Code.OK, 0)


def test_compressed_nonsense_is_refused(broker: RunningBroker) -> None:
    client = broker.raw()
    good = batch_of(*[b"value" * 20] * 20, codec="zstd")
    cut = good[: len(good) - 4]
    cut = resealed(cut, 8, struct.pack(">i", len(cut) - 12))
    assert client.publish("t", cut).code is Code.INVALID_BATCH
    wrong_count = resealed(resealed(good, 57, struct.pack(">i", 21)), 23, struct.pack(">i", 20))
    assert client.publish("t", wrong_count).code is Code.INVALID_BATCH
    assert client.publish("t", good)[:2] == (Code.OK, 0)


def test_auto_create_off(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"topics.auto_create": False}) as broker:
        client = broker.raw()
        answer = client.publish("t", batch_of(b"a"))
        assert answer.code is Code.UNKNOWN_TOPIC
        assert "edgebroker topic create t" in answer.message
        assert client.connect(topics=["t"]).topics[0][1:3] == (Code.UNKNOWN_TOPIC, 0)
        broker.create("t", partitions=3)
        assert client.publish("t", batch_of(b"a"), partition=2)[:2] == (Code.OK, 0)
        assert client.connect(topics=["t"]).topics[0][1:3] == (Code.OK, 3)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "ü", "x.dlq", "__offsets", "a" * 201, "a b"])
def test_names_that_are_refused(broker: RunningBroker, name: str) -> None:
    client = broker.raw()
    answer = client.publish(name, batch_of(b"a"))
    assert answer.code is Code.UNKNOWN_TOPIC
    assert repr(name) in answer.message
    assert broker.http("GET", "/v1/topics")[1] == {"topics": []}
    assert client.publish("a" * 200, batch_of(b"a")).code is Code.OK


def test_partitions_that_do_not_exist(broker: RunningBroker) -> None:
    client = broker.raw()
    assert client.publish("new", batch_of(b"a"), partition=1).code is Code.UNKNOWN_TOPIC
    assert broker.http("GET", "/v1/topics")[1] == {"topics": []}
    broker.create("t", partitions=2)
    answer = client.publish("t", batch_of(b"a"), partition=2)
    assert answer.code is Code.UNKNOWN_TOPIC
    assert "2 partitions" in answer.message
    assert client.publish("t", batch_of(b"a"), partition=0xFFFFFFFF).code is Code.UNKNOWN_TOPIC
    assert client.publish("t", batch_of(b"a"), partition=1).code is Code.OK


def test_a_frame_that_is_too_large_is_skipped(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"limits.max_batch_bytes": 8192, "limits.max_record_bytes": 1024}) as broker:
        client = broker.raw()
        client.publish("t", batch_of(b"before"))
        limit = client.grants.max_frame if client.grants else 0
        prefix = frames.publish_prefix(2, "t", 0)
        for size in (limit - 16 - len(prefix) + 1, 100_000, 3 << 20):
            # Valid frames around it in the same buffer are not touched by the skipping.
            client.send(
                write_publish(1, prefix, batch_of(b"left")),
                write_publish(2, prefix, b"x" * size),
                write_publish(3, prefix, batch_of(b"right")),
            )
            assert client.answer(2).code is Code.TOO_LARGE
            assert [client.answer(1).code, client.answer(3).code] == [Code.OK, Code.OK]
        assert broker.refused(Code.TOO_LARGE) == 3
        assert broker.counters()["frames_refused"] == 3
        assert values(broker, "t") == [b"before", *[b"left", b"right"] * 3]


def test_a_record_or_batch_that_is_too_large(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"limits.max_batch_bytes": 8192, "limits.max_record_bytes": 1024}) as broker:
        client = broker.raw()
        assert client.publish("t", batch_of(b"x" * 1100)).code is Code.TOO_LARGE
        assert client.publish("t", batch_of(b"x" * 1100, codec="zstd")).code is Code.TOO_LARGE
        assert client.publish("t", batch_of(*[b"x" * 900] * 10)).code is Code.TOO_LARGE
        assert client.publish("t", batch_of(*[b"x" * 900] * 8))[:2] == (Code.OK, 0)


def test_control_batches_are_not_for_clients(broker: RunningBroker) -> None:
    client = broker.raw()
    control = resealed(batch_of(b"a"), 21, struct.pack(">h", batch.CONTROL_BIT))
    assert client.publish("t", control).code is Code.INVALID_BATCH
    transactional = resealed(batch_of(b"a"), 21, struct.pack(">h", 0x10))
    assert client.publish("t", transactional).code is Code.INVALID_BATCH


def test_a_flood_is_held_back_and_all_of_it_is_acknowledged(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"limits.staged_high_bytes": 1 << 20}) as broker:
        held: list[int] = []
        publishing = broker.broker.core.publishing
        broker.call(lambda: broker.broker.loop.at_end_of_iteration(lambda: held.append(publishing.waiting_bytes)))
        clients = [broker.raw(f"flood-{rank}") for rank in range(4)]
        clients[0].publish("t", batch_of(b"first"))
        prefix = frames.publish_prefix(2, "t", 0)
        frame_count = 40
        for rank, client in itertools.product(range(frame_count), clients):
            client.send(write_publish(1000 + rank, prefix, batch_of(b"%d" % rank + b"." * 100_000)))
        offsets = [client.answer(1000 + rank).offset for client in clients for rank in range(frame_count)]
        assert sorted(offsets) == list(range(1, 1 + 4 * frame_count))
        for start in range(0, len(offsets), frame_count):
            mine = offsets[start : start + frame_count]
            assert mine == sorted(mine)
        # A publisher may finish the buffer that it was reading when the mark was passed, no more.
        assert max(held) > 1 << 20
        assert max(held) <= (1 << 20) + 4 * (2 << 20)
        assert broker.http("GET", "/v1/node")[1]["publish_waiting_bytes"] == 0
