"""A record that failed too often goes into TOPIC.dlq, durably, before its group goes on; nothing else moves."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgebroker.broker.delivery.dead_letters import HEADERS
from edgebroker.common import batch, codecs
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code
from edgebroker.common.messages import AckKind, GapReason
from edgebroker.common.outcome import Outcome
from edgebroker.common.records import Record, restamp
from edgebroker.common.types import AckLevel, Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import FrameType
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, numbered, running
from tests.kit.raw_client import RawClient
from tests.kit.waiting import wait_for

# Two attempts without a pause between them; time passes only when a test lets it.
SETTINGS = {
    "delivery.timeout_ms": 1_000_000,
    "delivery.backoff_ms": 0,
    "delivery.max_attempts": 2,
    "limits.idle_timeout_ms": 1_000_000_000,
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", SETTINGS) as found:
        yield found


def line_of(broker: RunningBroker, group: str = "g", topic: str = "t") -> dict[str, Any]:
    lines = broker.http("GET", f"/v1/groups/{group}")[1]["partitions"]
    return next(line for line in lines if line["topic"] == topic)


def member(
    broker: RunningBroker, group: str = "g", topic: str = "t", name: str = "client", partition: int = -1
) -> RawClient:
    client = broker.raw(name)
    assert client.subscribe(topic, group, start=Start.COMMITTED, partition=partition).code is Code.OK
    return client


def give_up(client: RawClient, offset: int, reason: str = "no", attempts: int = 2) -> None:
    """Refuse a record until the broker has had enough; everything before it in the delivery is acknowledged."""
    for _ in range(attempts):
        head = client.deliver().head
        while not head.first <= offset <= head.last:
            head = client.deliver().head  # sent before the one that is refused, or behind it before it was
        assert client.nack(head, offset, reason) is Code.OK


def letters(broker: RunningBroker, count: int = 1, topic: str = "t.dlq") -> list[Record]:
    """The dead letters there are, read without a group."""
    reader = broker.raw("reader")
    wait_for(lambda: reader.subscribe(topic, "").code is Code.OK)  # the first letter makes the topic
    found: list[Record] = []
    while len(found) < count:
        found += reader.deliver().records
    assert reader.silent(FrameType.DELIVER)
    broker.drop(reader)
    return found


def said(letter: Record) -> dict[str, str]:
    """What the broker says in a letter, behind the headers that the record had."""
    own = letter.headers[-len(HEADERS) :]
    assert tuple(name for name, _ in own) == HEADERS
    return {name.removeprefix("eb-dlq-"): (value or b"").decode() for name, value in own}


@contextmanager
def held_commits(broker: RunningBroker) -> Iterator[None]:
    """Nothing becomes durable."""
    gate, here = threading.Event(), threading.Event()

    def wait() -> None:
        here.set()
        assert gate.wait(SECONDS)

    committer = broker.broker.engine._committer  # type: ignore[attr-defined]
    broker.call(lambda: committer.call(wait, lambda _: None))
    assert here.wait(SECONDS)
    try:
        yield
    finally:
        gate.set()


def test_a_letter_is_the_record_and_what_happened_to_it(broker: RunningBroker) -> None:
    producer = broker.raw("producer")
    own = [("trace", b"\x00\xff"), ("empty", b""), ("null", None)]
    producer.publish("t", batch.encode([(b"key-%d" % n, b"value-%d" % n, 1000 + n) for n in range(5)], headers=own))
    client = member(broker)
    before = time.time_ns() // 1_000_000
    give_up(client, 2, "no such article ü")
    # Order is kept: the record behind it comes next, and everything behind that as always.
    assert client.deliver().offsets == [3, 4]
    assert (line_of(broker)["committed"], line_of(broker)["attempts"], line_of(broker)["reason"]) == (3, 0, "")
    [letter] = letters(broker)
    assert (letter.offset, letter.key, letter.value, letter.timestamp) == (0, b"key-2", b"value-2", 1002)
    assert list(letter.headers[:3]) == own
    facts = said(letter)
    assert before <= int(facts.pop("time")) <= time.time_ns() // 1_000_000
    assert facts == {
        "topic": "t", "partition": "0", "offset": "2", "group": "g", "attempts": "2", "reason": "no such article ü",
    }  # fmt: skip
    settings = broker.http("GET", "/v1/topics/t.dlq")[1]["settings"]
    assert (settings["kind"], settings["partitions"], settings["retention_ms"]) == ("stream", 1, 0)
    assert broker.counters()["dead_letters"] == 1


def test_partitions_groups_and_readers_share_one_topic_of_letters(broker: RunningBroker) -> None:
    broker.create("t", partitions=3)
    producer = broker.raw("producer")
    for partition in range(3):
        producer.publish("t", numbered(10 * partition, 2), partition=partition)
    expected = []
    for group in ("g", "h", ""):
        client = broker.raw(f"reader of {group}")
        client.subscribe("t", group)
        heads = {head.partition: head for head in (client.deliver().head for _ in range(3))}
        for partition in (2, 0, 1):
            assert client.nack(heads[partition], 1) is Code.OK
            assert client.nack(client.deliver().head, 1) is Code.OK
            expected.append((str(partition), group or "-"))
        broker.drop(client)
    found = [said(letter) for letter in letters(broker, 9)]
    assert [(facts["partition"], facts["group"]) for facts in found] == expected
    assert {facts["offset"] for facts in found} == {"1"}


def test_a_letter_that_fails_becomes_one_itself(broker: RunningBroker) -> None:
    topic = "t" * 200
    broker.raw("producer").publish(topic, numbered(0, 1))
    give_up(member(broker, topic=topic), 0)
    letters(broker, topic=f"{topic}.dlq")
    give_up(member(broker, topic=f"{topic}.dlq", name="undertaker"), 0)
    [letter] = letters(broker, topic=f"{topic}.dlq.dlq")
    names = [name for name, _ in letter.headers]
    assert names == [*HEADERS, *HEADERS]
    assert said(letter)["topic"] == f"{topic}.dlq"


@pytest.mark.parametrize("codec", codecs.CODEC_BITS)
def test_a_record_of_a_batch_of_any_compression(broker: RunningBroker, codec: codecs.CodecName) -> None:
    values = [b"%d" % n * 50 for n in range(100)]
    assert broker.raw("producer").publish("t", batch_of(*values, codec=codec)).code is Code.OK
    client = member(broker)
    give_up(client, 57)
    [letter] = letters(broker)
    assert (letter.value, letter.timestamp) == (values[57], 1057)
    assert client.deliver().offsets == list(range(58, 100))


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_the_largest_record_that_there_can_be(tmp_path: Path, codec: codecs.CodecName) -> None:
    settings = {**SETTINGS, "limits.max_record_bytes": 8192, "limits.max_batch_bytes": 8192}
    with running(tmp_path / "data", settings) as broker:
        producer = broker.raw("producer")
        size = 8192
        while producer.publish("t", batch_of(b"x" * size, codec=codec)).code is not Code.OK:
            size -= 1
        assert size > 8000
        producer.publish("t", numbered(1, 1))
        client = member(broker)
        give_up(client, 0, "ü" * 100)
        assert client.deliver().offsets == [1]
        [letter] = letters(broker)
        assert letter.value == b"x" * size
        assert said(letter)["reason"] == "ü" * 100


@pytest.mark.parametrize("attempts", [0, 5])
def test_a_record_that_is_rejected(tmp_path: Path, attempts: int) -> None:
    """At once, whatever the attempts are that others get; what follows is delivered without a pause."""
    settings = {**SETTINGS, "delivery.max_attempts": attempts, "delivery.backoff_ms": 5000}
    with running(tmp_path / "data", settings) as broker:
        broker.create("t")
        broker.raw("writer").publish("t", numbered(0, 4))
        with broker.consumer(["t"], "g", auto_ack=False) as consumer:
            records = consumer.poll(SECONDS)
            consumer.reject(records[1], "no number")
            rest: list[Record] = []
            while not rest or rest[-1].offset < 3:
                rest += (more := consumer.poll(SECONDS))
                consumer.ack(more[-1])
            assert [record.offset for record in rest] == [2, 3]
        (letter,) = letters(broker)
        assert letter.value == records[1].value
        assert (said(letter)["attempts"], said(letter)["reason"]) == ("1", "no number")
        assert line_of(broker)["committed"] == 4


def test_what_is_rejected_is_a_letter_also_when_its_consumer_has_gone(broker: RunningBroker) -> None:
    broker.create("t")
    broker.raw("writer").publish("t", numbered(0, 3))
    client = member(broker)
    head = client.deliver().head
    assert client.acked(head, 0, kind=AckKind.REJECT, reason="no") is Code.OK
    broker.drop(client)
    wait_for(lambda: line_of(broker)["committed"] == 1, "the letter is stored")
    assert member(broker).deliver().head.first == 1


def test_max_attempts_zero_never_gives_up(tmp_path: Path) -> None:
    with running(tmp_path / "data", {**SETTINGS, "delivery.max_attempts": 0}) as broker:
        broker.raw("producer").publish("t", numbered(0, 3))
        client = member(broker)
        give_up(client, 1, attempts=12)
        assert client.deliver().offsets == [1]
        assert line_of(broker)["attempts"] == 12
        assert broker.http("GET", "/v1/topics/t.dlq")[0] == 404


@pytest.mark.parametrize("how", ["timeout", "close"])
def test_records_that_kill_or_block_their_consumers_end_there_too(broker: RunningBroker, how: str) -> None:
    broker.raw("producer").publish("t", numbered(0, 3))
    client = member(broker)
    for expected in ([0, 1, 2], [0], [0], [1, 2]):  # the first time nobody knows which of them it was
        assert client.deliver().offsets == expected
        if how == "timeout":
            broker.advance(1001)
        else:
            broker.drop(client)
            client = member(broker)
    reasons = {"timeout": "not acknowledged in time", "close": "the consumer disconnected"}
    assert said(letters(broker)[0])["reason"] == reasons[how]


@pytest.mark.parametrize("level", list(AckLevel))
def test_clients_cannot_write_letters(broker: RunningBroker, level: AckLevel) -> None:
    broker.raw("producer").publish("t", numbered(0, 1))
    give_up(member(broker), 0)
    letters(broker)
    producer = broker.raw("producer")
    for topic in ("t.dlq", "new.dlq"):
        if level is AckLevel.NONE:
            producer.publish(topic, numbered(0, 1), level=level, wait=False)
            assert producer.silent(FrameType.ACK)
        else:
            answer = producer.publish(topic, numbered(0, 1), level=level)
            assert answer.code is Code.UNKNOWN_TOPIC
            assert "dead letters" in answer.message
    assert len(letters(broker)) == 1
    status, answer = broker.http("POST", "/v1/topics", {"name": "new.dlq"})
    assert (status, "dead letters" in answer["error"]) == (400, True)


def test_the_place_moves_when_the_letter_is_durable(broker: RunningBroker) -> None:
    producer = broker.raw("producer")
    producer.publish("t", numbered(0, 3))
    broker.raw("other").publish("u", numbered(0, 1))
    give_up(member(broker, topic="u"), 0)
    give_up(member(broker, group="first"), 0)  # t.dlq is there
    letters(broker)
    client = member(broker)
    with held_commits(broker):
        give_up(client, 0)
        wait_for(lambda: line_of(broker)["member"]["state"] == "dead_lettering")
        broker.advance(30)
        line = line_of(broker)
        assert (line["committed"], line["attempts"]) == (0, 2)
        assert client.silent(FrameType.DELIVER)
    assert client.deliver().offsets == [1, 2]
    assert len(letters(broker, 2)) == 2


@pytest.mark.parametrize("outcome", [Outcome.DISK_FULL, Outcome.READ_ONLY])
@pytest.mark.parametrize("exists", [False, True])
def test_what_cannot_be_written_makes_the_partition_wait(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, exists: bool
) -> None:
    broker.create("t", partitions=2)
    producer = broker.raw("producer")
    for partition in range(2):
        producer.publish("t", numbered(0, 3), partition=partition)
    if exists:
        give_up(member(broker, group="first", partition=0), 0)
        letters(broker)
    client = broker.raw("client")
    correlation = client.next_correlation() + 1
    client.subscribe("t", "g", partition=0)
    monkeypatch.setattr(broker.broker.engine, "refusal", lambda **options: (outcome, "as told by the test"))
    give_up(client, 0, "bad")
    told = client.answer(correlation)
    assert told.code is outcome.code
    assert told.offset == 0
    assert "t/0" in told.message
    line = line_of(broker)
    assert (line["committed"], line["attempts"], line["reason"]) == (0, 2, "bad")
    assert line["member"]["state"] == "dead_lettering"
    assert "t.dlq" in line["member"]["why"]
    assert client.silent(FrameType.DELIVER)
    # It tries again every second, and says so each time; other partitions go on.
    broker.advance(2)
    assert client.answer(correlation).code is outcome.code
    client.subscribe("t", "g", partition=1)
    delivered = client.deliver()
    assert (delivered.head.partition, delivered.offsets) == (1, [0, 1, 2])
    assert broker.counters()["dead_letter_failures"] >= 2
    monkeypatch.undo()
    broker.advance(2)
    assert client.deliver().offsets == [1, 2]
    assert said(letters(broker, 2 if exists else 1)[-1])["reason"] == "bad"


@pytest.mark.parametrize("how", ["close", "leave", "move", "again"])
def test_what_happens_meanwhile(broker: RunningBroker, how: str) -> None:
    """The holder goes, or is moved, while its record is on its way into the letters."""
    broker.raw("producer").publish("t", numbered(0, 5))
    client = member(broker)
    with held_commits(broker):
        give_up(client, 1)
        if how == "close":
            broker.drop(client)
        elif how == "leave":
            client.leave("t")
        elif how == "again":
            client.subscribe("t", "g", start=Start.COMMITTED)
        if how in ("close", "leave"):
            client = member(broker, name="other")
        assert line_of(broker)["member"]["state"] == "dead_lettering"
        assert client.silent(FrameType.DELIVER)
        if how == "move":
            move = ("POST", "/v1/groups/g/offsets", {"topic": "t", "to": "3"})
            thread = threading.Thread(target=broker.http, args=move)
            thread.start()
            wait_for(lambda: line_of(broker)["committed"] == 3)
    if how == "move":
        assert client.deliver().offsets == [3, 4]
        thread.join(SECONDS)
        assert line_of(broker)["committed"] == 3
    else:
        assert client.deliver().offsets == [2, 3, 4]
    assert said(letters(broker)[0])["offset"] == "1"


def test_a_group_that_is_deleted_meanwhile_does_not_come_back(broker: RunningBroker) -> None:
    broker.raw("producer").publish("t", numbered(0, 5))
    client = member(broker)
    with held_commits(broker):
        give_up(client, 1)
        client.leave("t")
        assert broker.http("DELETE", "/v1/groups/g")[0] == 200
    letters(broker)
    assert broker.http("GET", "/v1/groups")[1] == {"groups": []}
    assert broker.call(broker.broker.engine.group_offsets) == {}


@pytest.mark.parametrize("on_damage", ["wait", "skip"])
def test_a_record_that_is_damaged_by_now(tmp_path: Path, on_damage: str) -> None:
    directory = tmp_path / "data"
    with running(directory, {**SETTINGS, "delivery.max_attempts": 0}) as broker:
        producer = broker.raw("producer")
        broker.create("t", on_damage=on_damage, segment_bytes=64 << 10)
        for first in range(0, 400, 10):
            producer.publish("t", numbered(first, 10, 500))
        give_up(member(broker), 3)
    segment = min((directory / "topics" / "t" / "0").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[data.index(b"....")] ^= 0x40
    segment.write_bytes(data)
    with running(directory, SETTINGS) as broker:
        client = broker.raw()
        correlation = client.next_correlation() + 1
        client.subscribe("t", "g", start=Start.COMMITTED)
        if on_damage == "wait":
            assert client.answer(correlation).code is Code.DAMAGED
            assert broker.http("PATCH", "/v1/topics/t", {"on_damage": "skip"})[0] == 200
            broker.advance(2)
        gap = client.deliver().head
        assert [(first, last, reason) for first, last, reason in gap.gaps] == [(gap.first, 9, GapReason.DAMAGED)]
        assert client.deliver().offsets[0] == 10
        assert broker.http("GET", "/v1/topics/t.dlq")[0] == 404
        assert broker.counters()["dead_letters"] == 0


@pytest.mark.parametrize("on_damage", ["wait", "skip"])
def test_a_record_that_cannot_be_decoded(broker: RunningBroker, on_damage: str) -> None:
    """What a mirror takes over is checked by its CRC only: such a record waits for the operator, and says so."""
    broker.create("t", on_damage=on_damage)
    broker.raw("producer").publish("t", numbered(0, 1))
    log = broker.broker.engine.log("t", 0)
    assert log is not None
    bad = bytearray(restamp(batch_of(b"bad"), 1, log.epoch))
    bad[batch.HEADER_BYTES] = 0x7E  # a record longer than its batch
    struct.pack_into(">I", bad, 17, crc32c(bad[21:]))
    taken = broker.call(lambda: broker.broker.engine.append_numbered(log, memoryview(bytes(bad))))
    assert taken == (len(bad), 0)
    broker.raw("producer").publish("t", numbered(2, 1))
    client = broker.raw("client")
    correlation = client.next_correlation() + 1
    client.subscribe("t", "g")
    for _ in range(2):
        head = frames.read_deliver(memoryview(client.take(FrameType.DELIVER).body))
        while not head.first <= 1 <= head.last:
            head = frames.read_deliver(memoryview(client.take(FrameType.DELIVER).body))
        assert client.nack(head, 1) is Code.OK
    if on_damage == "wait":
        told = client.answer(correlation)
        assert (told.code, "on_damage = skip" in told.message) == (Code.CORRUPT, True)
        assert line_of(broker)["member"]["state"] == "dead_lettering"
        assert broker.http("PATCH", "/v1/topics/t", {"on_damage": "skip"})[0] == 200
        broker.advance(2)
    assert client.deliver().offsets == [2]
    assert broker.counters()["dead_letters"] == 0
