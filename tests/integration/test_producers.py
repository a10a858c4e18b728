"""A producer whose records are refused, and one whose topic is created again: no other record is stored twice, out of
order or in a partition that is not the one of its key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.client.producer import Producer
from edgebroker.common import batch
from edgebroker.common.errors import AnswerError, Code
from tests.kit.brokers import SECONDS, RunningBroker, running, take

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


def values(broker: RunningBroker, topic: str, count: int) -> list[bytes]:
    with broker.consumer([topic], start="earliest", timeout=10.0) as consumer:
        found = [record.value or b"" for record in take(consumer, count)]
        return found + [record.value or b"" for record in consumer.poll(0.2)]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_refusal_touches_no_other_record(broker: RunningBroker, compression: str) -> None:
    broker.create("sales", partitions=1)
    refused = []
    with broker.producer(compression=compression, batch_records=5) as producer:
        assert producer.send("bad.dlq", b"x").exception(SECONDS) is not None
        for number in range(3000):
            producer.send("sales", b"%d" % number)
            if number % 50 == 0:
                refused.append(producer.send("bad.dlq", b"x"))
    assert values(broker, "sales", 3000) == [b"%d" % number for number in range(3000)]
    assert [isinstance(sent.exception(), AnswerError) for sent in refused] == [True] * len(refused)


def test_what_follows_a_refused_batch_is_stored(broker: RunningBroker) -> None:
    """In the same partition, with other batches in flight behind it."""
    broker.create("t")
    with broker.producer(batch_records=1) as producer:
        sent = []
        for number in range(200):
            producer._sender.accumulator.limit_to(1 << 22, 1 << 22)
            value = b"%d" % number if number % 20 else b"." * (3 << 20)
            sent.append((value, producer.send("t", value)))
        producer.flush(SECONDS)
        stored = [value for value, one in sent if one.exception() is None]
        codes = {error.code for _, one in sent if isinstance(error := one.exception(), AnswerError)}
    assert codes == {Code.TOO_LARGE}
    assert len(stored) == 190
    assert values(broker, "t", 190) == stored


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 4)])
def test_a_topic_that_is_created_again(broker: RunningBroker, before: int, after: int) -> None:
    broker.create("t", partitions=before)
    with broker.producer() as old:
        assert old.send("t", b"first", b"key").result(SECONDS) == 0
        assert broker.http("DELETE", "/v1/topics/t?confirm=t")[0] == 200
        broker.create("t", partitions=after)
        with broker.producer() as new:
            sent = [(p, b"%d" % key) for key in range(40) for p in (old, new)]
            for one in [p.send("t", b"v", key) for p, key in sent]:
                one.result(SECONDS)
    where = defaultdict(set)
    with broker.consumer(["t"], start="earliest", timeout=10.0) as consumer:
        for record in take(consumer, 80):
            where[record.key].add(record.partition)
    assert len(where) == 40
    assert {len(partitions) for partitions in where.values()} == {1}


def test_records_that_wait_move_with_their_futures(tmp_path: Path) -> None:
    """They were sent while the broker was away, for partitions that it does not have any more."""
    called = []
    with running(tmp_path / "data") as broker:
        broker.create("t", partitions=4)
        tcp = "{}:{}".format(*broker.broker.listeners.tcp_address)
        producer = broker.producer()
        assert producer.send("t", b"first", partition=3).result(SECONDS) == 0
    keys = [key for number in range(20) if batch.partition_for(key := b"%d" % number, 4) != 3]
    waiting = [producer.send("t", key, key) for key in keys]
    for sent in waiting:
        sent.add_done_callback(lambda sent: called.append(sent.result()))
    chosen = producer.send("t", b"chosen", b"key", partition=3)
    with running(tmp_path / "data") as broker:
        assert broker.http("DELETE", "/v1/topics/t?confirm=t")[0] == 200
        broker.create("t", partitions=2)
    with running(tmp_path / "data", {"listen.tcp": tcp}) as broker, producer:
        offsets = [sent.result(SECONDS) for sent in waiting]
        assert sorted(called) == sorted(offsets)
        assert {sent.partition for sent in waiting} == {0, 1}
        with pytest.raises(AnswerError, match="topic t has no partition 3 any more; it has 2 now"):
            chosen.result(SECONDS)
        assert producer.send("t", b"x", partition=1).result(SECONDS) >= 0
        with broker.consumer(["t"], start="earliest", timeout=10.0) as consumer:
            found = {(record.partition, record.offset): record.value for record in take(consumer, len(keys) + 1)}
    assert [found[sent.partition, sent.result()] for sent in waiting] == keys


def test_unacknowledged_records_go_on_after_a_lost_connection(broker: RunningBroker) -> None:
    with broker.producer(ack="none", batch_records=1) as producer:
        for number in range(3):
            producer.send("t", b"%d" % number)
            producer.flush()
        values(broker, "t", 3)
        (client,) = [one for one in broker.call(lambda: list(broker.broker.sessions)) if one.producer_id >= 0]
        broker.call(lambda: client.transport.close("a test"))
        wait_until_stored(producer, broker, 4)


def wait_until_stored(producer: Producer, broker: RunningBroker, count: int) -> None:
    """What is sent into a connection that is over is lost at this level; what comes after it is not."""
    for _ in range(100):
        producer.send("t", b"again")
        producer.flush()
        if len(values(broker, "t", 3)) >= count:
            return
    raise AssertionError("nothing is stored any more")
