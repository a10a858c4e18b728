"""The public Producer and Consumer against real brokers: what they promise when all is well."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from edgebroker import AnswerError, ArgumentError, Code, Consumer, Producer, Record, Sent, UnreachableError
from edgebroker.common import codecs
from edgebroker.common.batch import partition_for
from tests.kit.brokers import SECONDS, RunningBroker, running


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """One broker for the module: each test has topics and groups of its own."""
    with running(tmp_path_factory.mktemp("clients") / "data") as found:
        yield found


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[:150]


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def take(consumer: Consumer, count: int) -> list[Record]:
    """So many records, acknowledged as they come."""
    found: list[Record] = []
    deadline = time.monotonic() + SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} records came"
        records = consumer.poll(0.5)
        if records:
            found += records
            consumer.ack(records[-1])
    return found


def test_futures_tell_offsets(broker: RunningBroker, topic: str) -> None:
    with broker.producer() as producer:
        sent = [producer.send(topic, b"%d" % rank) for rank in range(2500)]
        assert [each.result(SECONDS) for each in sent] == list(range(2500))
        assert all(each.done() and each.exception() is None for each in sent)
        assert (sent[0].topic, sent[0].partition) == (topic, 0)
        last = producer.send_many(topic, [b"a", b"b", b"c"])
        assert last is not None
        assert last.result(SECONDS) == 2502
        assert producer.send_many(topic, []) is None


def test_callbacks_run_once_each(broker: RunningBroker, topic: str) -> None:
    seen: list[int] = []
    done = threading.Event()

    def note(sent: Sent) -> None:
        seen.append(sent.result())
        if len(seen) == 100:
            done.set()
        raise ValueError("a callback that fails harms nobody")

    with broker.producer() as producer:
        for rank in range(100):
            producer.send(topic, b"%d" % rank).add_done_callback(note)
        producer.flush(SECONDS)
        assert done.wait(SECONDS)
        late: list[Sent] = []
        sent = producer.send(topic, b"x")
        sent.result(SECONDS)
        sent.add_done_callback(late.append)
        assert late == [sent]
    assert seen == list(range(100))


def test_everything_of_a_record_arrives(broker: RunningBroker, topic: str) -> None:
    headers = [("trace", b"\x00\xff"), ("empty", b""), ("null", None), ("ünïcode", "ü".encode())]
    with broker.producer() as producer:
        producer.send(topic, b"value", b"key", headers=headers, timestamp=1234)
        producer.send(topic, None, b"key")
        producer.send(topic, b"", b"")
        before = time.time_ns() // 1_000_000
        producer.send(topic, b"now").result(SECONDS)
        after = time.time_ns() // 1_000_000
    with broker.consumer([topic]) as consumer:
        first, null, empty, now = take(consumer, 4)
    assert (first.key, first.value, first.timestamp, first.topic, first.partition) == (b"key", b"value", 1234, topic, 0)
    assert first.headers == tuple(headers)
    assert (null.key, null.value, empty.key, empty.value) == (b"key", None, b"", b"")
    assert now.key is None
    assert before <= now.timestamp <= after


@pytest.mark.parametrize("compression", codecs.CODEC_BITS)
@pytest.mark.parametrize("ack", ["written", "durable"])
def test_compressions_and_levels(broker: RunningBroker, topic: str, compression: codecs.CodecName, ack: str) -> None:
    values = [b"%d" % rank * 30 for rank in range(3000)]
    with broker.producer(compression=compression, ack=ack, batch_records=500) as producer:
        sent = [producer.send(topic, value) for value in values]
        assert [each.result(SECONDS) for each in sent] == list(range(3000))
    with broker.consumer([topic]) as consumer:
        assert [record.value for record in take(consumer, 3000)] == values


def test_level_none_is_done_at_once(broker: RunningBroker, topic: str) -> None:
    broker.create(topic)
    with broker.producer(ack="none") as producer:
        sent = [producer.send(topic, b"%d" % rank) for rank in range(50)]
        assert {each.result(SECONDS) for each in sent} == {-1}
        with broker.consumer([topic]) as consumer:
            assert [record.value for record in take(consumer, 50)] == [b"%d" % rank for rank in range(50)]


def test_linger_collects_and_flush_does_not_wait_for_it(broker: RunningBroker, topic: str) -> None:
    with broker.producer(linger_ms=60_000) as producer:
        sent = [producer.send(topic, b"%d" % rank) for rank in range(10)]
        assert not any(each.done() for each in sent)
        producer.flush(SECONDS)
        assert [each.result() for each in sent] == list(range(10))
        # result() of a record that lingers sends it.
        assert producer.send(topic, b"x").result(SECONDS) == 10
    with broker.producer(linger_ms=20) as producer:
        sent = [producer.send(topic, b"%d" % rank) for rank in range(10)]
        done = threading.Event()
        sent[-1].add_done_callback(lambda _: done.set())
        assert done.wait(SECONDS)
    with broker.consumer([topic]) as consumer:
        assert len(take(consumer, 21)) == 21


def test_keys_choose_partitions(broker: RunningBroker, topic: str) -> None:
    broker.create(topic, partitions=5)
    keys = [b"till-%d" % rank for rank in range(50)]
    with broker.producer() as producer:
        for key in keys:
            assert producer.send(topic, b"v", key).partition == partition_for(key, 5)
        assert producer.send(topic, b"v", partition=3).partition == 3
        with pytest.raises(ValueError, match="has no partition 5; it has 5, numbered from 0"):
            producer.send(topic, b"v", partition=5)
        producer.flush(SECONDS)
    with broker.consumer([topic]) as consumer:
        for record in take(consumer, 51):
            assert record.partition == (3 if record.key is None else partition_for(record.key, 5))


def test_arguments_that_make_no_sense(broker: RunningBroker, topic: str) -> None:
    with pytest.raises(ValueError, match="ack 'all'"):
        Producer(ack="all")
    with pytest.raises(ValueError, match="compression 'snappy'"):
        Producer(compression="snappy")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sequence of names"):
        Consumer(broker.server, topic)
    with pytest.raises(ValueError, match="at least one topic"):
        Consumer(broker.server, [])
    with pytest.raises(ValueError, match="use earliest"):
        Consumer(broker.server, [topic], start="yesterday")
    with pytest.raises(ValueError, match="missing_topic='ignore': use wait or raise"):
        Consumer(broker.server, [topic], missing_topic="ignore")  # type: ignore[arg-type]
    with broker.producer() as producer:
        with pytest.raises(ValueError, match="the broker allows"):
            producer.send(topic, b"x" * (2 << 20))
        with pytest.raises(TypeError):
            producer.send(topic, "text")  # type: ignore[arg-type]
        with pytest.raises(AnswerError) as refused:
            producer.send("a.dlq", b"v").result(SECONDS)
        assert refused.value.code is Code.UNKNOWN_TOPIC
        assert producer.send(topic, b"fine").result(SECONDS) == 0
    with pytest.raises(ArgumentError, match=r"group names are .* 'bad group!' is not"):
        Consumer(broker.server, [topic], "bad group!")
    for server in ("no where", "localhost:http", "localhost:0", ""):
        for client in (lambda server=server: Consumer(server, [topic]), lambda server=server: Producer(server)):
            with pytest.raises(ArgumentError, match=f"server '{server}' is not an address"):
                client()


def test_a_closed_producer_says_so(broker: RunningBroker, topic: str) -> None:
    producer = broker.producer()
    sent = producer.send(topic, b"v")
    producer.close()
    producer.close()
    assert sent.result() == 0
    for _ in range(3):
        with pytest.raises(ValueError, match="closed"):
            producer.send(topic, b"lost")
    with pytest.raises(ValueError, match="closed"):
        producer.send(topic + "-other", b"lost")


def test_many_threads_share_a_producer(broker: RunningBroker, topic: str) -> None:
    offsets: dict[int, list[int]] = {}

    with broker.producer(max_unacked=500, batch_records=50) as producer:

        def work(number: int) -> None:
            sent = [producer.send(topic, b"%d %d" % (number, rank)) for rank in range(1000)]
            offsets[number] = [each.result(SECONDS) for each in sent]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert producer.unacked == 0
    with broker.consumer([topic]) as consumer:
        records = take(consumer, 6000)
    assert [record.offset for record in records] == list(range(6000))
    for number, mine in offsets.items():
        assert mine == sorted(mine)
        assert [records[offset].value for offset in mine] == [b"%d %d" % (number, rank) for rank in range(1000)]


def test_no_broker(unused_port: int) -> None:
    with (
        Producer(f"127.0.0.1:{unused_port}", timeout=0.3) as producer,
        pytest.raises(UnreachableError, match="no broker at"),
    ):
        producer.send("t", b"v")
    with (
        Consumer(f"127.0.0.1:{unused_port}", ["t"], timeout=0.3) as consumer,
        pytest.raises(UnreachableError, match="no broker at"),
    ):
        consumer.poll()


def test_iteration_ends_on_close(broker: RunningBroker, topic: str) -> None:
    broker.create(topic)
    consumer = broker.consumer([topic])
    seen: list[bytes | None] = []
    thread = threading.Thread(target=lambda: seen.extend(record.value for record in consumer))
    thread.start()
    with broker.producer() as producer:
        producer.send(topic, b"v").result(SECONDS)
    deadline = time.monotonic() + SECONDS
    while not seen:
        assert time.monotonic() < deadline
    consumer.close()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert seen == [b"v"]
    assert consumer.poll(0.0) == []


def test_a_topic_that_does_not_exist(broker: RunningBroker, topic: str) -> None:
    with broker.consumer([topic], missing_topic="raise") as consumer, pytest.raises(AnswerError) as refused:
        consumer.poll(SECONDS)
    assert refused.value.code is Code.UNKNOWN_TOPIC
