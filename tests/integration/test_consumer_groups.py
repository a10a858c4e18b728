"""The public Consumer as a member of a group: sharing, callbacks, pausing, failing, its own places, refreshes, age."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgebroker import Consumer, Record
from edgebroker.client.refresh import Refresh
from edgebroker.common import batch
from edgebroker.common.errors import AnswerError, Code, EdgeBrokerError, ResetRequiredError
from edgebroker.common.types import Position, TopicPartition
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, config_for, numbered, running, take

PARTITIONS = 4


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", {"delivery.backoff_ms": 20, "delivery.max_attempts": 3}) as found:
        yield found


def fill(broker: RunningBroker, count: int, topic: str = "t", partitions: int = 1) -> None:
    """`count` records in each partition, one to a batch."""
    client = broker.raw("fill")
    for partition in range(partitions):
        client.publish(topic, *(numbered(rank, 1) for rank in range(count)), partition=partition)


def until(done: Callable[[], bool], *consumers: Consumer, ack: bool = True) -> list[Record]:
    """Poll until something holds; the records that came meanwhile, acknowledged."""
    found: list[Record] = []
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{len(found)} records came"
        for consumer in consumers:
            records = consumer.poll(0.02)
            found += records
            if records and ack:
                consumer.ack(records[-1])
    return found


def offsets(records: Sequence[Record]) -> list[int]:
    return [record.offset for record in records]


def place(broker: RunningBroker, group: str, partition: int = 0) -> dict[str, Any]:
    places = broker.http("GET", f"/v1/groups/{group}")[1].get("partitions", [])
    nowhere: dict[str, Any] = {"committed": -1, "refresh": None, "member": None}
    return places[partition] if partition < len(places) else nowhere


def test_threads_share_a_topic(broker: RunningBroker) -> None:
    """A consumer for each thread: every record is handled once, in order per partition."""
    broker.create("t", partitions=PARTITIONS)
    handled: dict[int, list[tuple[str, int]]] = {number: [] for number in range(PARTITIONS)}
    total, enough = 200, threading.Event()
    consumers = [broker.consumer(["t"], "g", client_id=f"thread-{rank}") for rank in range(3)]

    def read(consumer: Consumer) -> None:
        for record in consumer:
            handled[record.partition].append((consumer.client_id, record.offset))
            if sum(map(len, handled.values())) >= total:
                enough.set()

    threads = [threading.Thread(target=read, args=(consumer,)) for consumer in consumers]
    for thread in threads:
        thread.start()
    until(lambda: sum(len(consumer.assignment) for consumer in consumers) == PARTITIONS)
    fill(broker, total // PARTITIONS, partitions=PARTITIONS)
    assert enough.wait(SECONDS)
    for consumer in consumers:
        consumer.close()
    for thread in threads:
        thread.join(SECONDS)
    for partition in handled.values():
        assert [offset for _, offset in partition] == list(range(total // PARTITIONS))
    assert len({name for partition in handled.values() for name, _ in partition}) == 3


def test_callbacks_of_assignment_and_revocation(broker: RunningBroker) -> None:
    broker.create("t", partitions=2)
    fill(broker, 3, partitions=2)
    told: list[tuple[str, str, int]] = []

    def teller(name: str, what: str) -> Callable[[Sequence[TopicPartition]], None]:
        return lambda partitions: told.extend((name, what, partition.partition) for partition in partitions)

    def member(name: str) -> Consumer:
        return broker.consumer(
            ["t"], "g", client_id=name, on_assigned=teller(name, "+"), on_revoked=teller(name, "-"), auto_ack=False
        )

    first = member("first")
    records = take(first, 6)
    assert sorted(told) == [("first", "+", 0), ("first", "+", 1)]
    told.clear()
    second = member("second")
    until(lambda: bool(told), first, second, ack=False)
    assert [entry[:2] for entry in told] == [("first", "-")]
    lost = told[0][2]
    # What was handed out and is not acknowledged holds the partition back.
    assert second.poll(0.1) == [] and second.assignment == set()
    for record in records:
        first.ack(record)
    until(lambda: ("second", "+", lost) in told, first, second)
    assert second.assignment == {TopicPartition("t", lost)}
    second.close()
    until(lambda: told[-1] == ("first", "+", lost), first)
    assert len(first.assignment) == 2
    first.close()


def test_a_lost_connection_is_a_revocation(broker: RunningBroker) -> None:
    fill(broker, 1)
    told: list[str] = []
    consumer = broker.consumer(
        ["t"], "g", on_assigned=lambda _: told.append("+"), on_revoked=lambda _: told.append("-")
    )
    take(consumer, 1)
    broker.call(lambda: [session.transport.close("test") for session in list(broker.broker.sessions)])
    until(lambda: told == ["+", "-", "+"], consumer)
    consumer.close()


def test_paused_partitions_wait_and_stay(tmp_path: Path) -> None:
    """Longer than the delivery timeout: what waits in a paused partition is not overdue."""
    settings = {"delivery.timeout_ms": 300, "limits.heartbeat_ms": 100, "limits.idle_timeout_ms": 10_000}
    with running(tmp_path / "data", settings) as broker:
        broker.create("t", partitions=2)
        fill(broker, 2, partitions=2)
        consumer = broker.consumer(["t"], "g", auto_ack=False)
        consumer.pause("t", 1)
        seen = until(lambda: broker.counters()["in_progress_acks"] >= 8, consumer)
        assert {record.partition for record in seen} == {0}
        assert broker.counters()["delivery_timeouts"] == 0
        consumer.resume("t", 1)
        assert [(record.partition, record.offset) for record in take(consumer, 2)] == [(1, 0), (1, 1)]
        consumer.close()


def test_a_long_handler_keeps_its_lease(tmp_path: Path) -> None:
    settings = {"delivery.timeout_ms": 300, "limits.heartbeat_ms": 100, "limits.idle_timeout_ms": 10_000}
    with running(tmp_path / "data", settings) as broker:
        fill(broker, 1)
        consumer = broker.consumer(["t"], "g", auto_ack=False)
        (record,) = take(consumer, 1)
        sweeps = broker.broker.loop.iterations
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            consumer.in_progress()
            threading.Event().wait(0.05)
        assert broker.broker.loop.iterations > sweeps
        consumer.ack(record)
        consumer.commit(SECONDS)
        assert place(broker, "g")["committed"] == 1
        assert broker.counters()["delivery_timeouts"] == 0
        consumer.close()


def test_nack_comes_again_alone_then_as_a_dead_letter(broker: RunningBroker) -> None:
    fill(broker, 6)
    consumer = broker.consumer(["t"], "g", auto_ack=False)
    records = take(consumer, 6)
    consumer.nack(records[2], "cannot")
    for _ in range(2):
        (again,) = take(consumer, 1)
        assert again.offset == 2
        consumer.nack(again, "still cannot")
    assert offsets(take(consumer, 3)) == [3, 4, 5]
    with broker.consumer(["t.dlq"]) as letters:
        (letter,) = take(letters, 1)
    said = {name: value for name, value in letter.headers if value is not None}
    assert letter.value == records[2].value
    assert (said["eb-dlq-offset"], said["eb-dlq-attempts"], said["eb-dlq-group"]) == (b"2", b"3", b"g")
    assert said["eb-dlq-reason"] == b"still cannot"
    consumer.close()


def test_run_with_retry(broker: RunningBroker) -> None:
    fill(broker, 8)
    handled: list[int] = []

    def handle(records: list[Record]) -> None:
        for record in records:
            if record.offset == 4:
                raise ValueError("no fours")
            handled.append(record.offset)
        if handled[-1] == 7:
            consumer.close()

    consumer = broker.consumer(["t"], "g")
    consumer.run(handle, batch_size=1, retry=True)
    assert handled == [0, 1, 2, 3, 5, 6, 7]
    assert broker.counters()["dead_letters"] == 1


def test_acknowledging_what_is_not_held_any_more(broker: RunningBroker) -> None:
    """A record of a lease that is over neither moves the group nor hides its repetition."""
    fill(broker, 4)
    consumer = broker.consumer(["t"], "g", auto_ack=False)
    records = take(consumer, 4)
    assert broker.http("POST", "/v1/groups/g/offsets", {"topic": "t", "to": "1"})[0] == 200
    again = take(consumer, 3)
    assert offsets(again) == [1, 2, 3]
    consumer.ack(again[0])
    consumer.commit(SECONDS)
    assert place(broker, "g")["committed"] == 2
    consumer.ack(records[3])  # the same offset was handed out again: it is done
    consumer.commit(SECONDS)
    assert place(broker, "g")["committed"] == 4
    consumer.close()


def test_close_is_no_failure(broker: RunningBroker) -> None:
    fill(broker, 4)
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        consumer.ack(take(consumer, 4)[0])
    assert (place(broker, "g")["attempts"], place(broker, "g")["committed"]) == (0, 1)
    with broker.consumer(["t"], "g") as consumer:
        assert len(consumer.poll(SECONDS)) == 3, "all of them at once, not the first one alone"
    assert broker.counters()["redeliveries"] == 0


def test_a_position_file(broker: RunningBroker, tmp_path: Path) -> None:
    fill(broker, 6)
    path = tmp_path / "position"
    with broker.consumer(["t"], position_file=path, auto_ack=False) as consumer:
        consumer.ack(take(consumer, 6)[3])
        consumer.commit(SECONDS)
        (line,) = json.loads(path.read_bytes())["positions"]
        assert (line["topic"], line["partition"], line["next_offset"]) == ("t", 0, 4)
    with broker.consumer(["t"], "g", position_file=path) as consumer:
        assert offsets(take(consumer, 2)) == [4, 5]
    path.write_text("{")
    with pytest.raises(EdgeBrokerError, match="restore it together with the data"):
        broker.consumer(["t"], position_file=path)


def test_a_position_wins_over_the_group(broker: RunningBroker) -> None:
    fill(broker, 6)
    with broker.consumer(["t"], "g") as consumer:
        consumer.ack(take(consumer, 6)[-1])
        kept = consumer.positions()["t", 0]
    with broker.consumer(["t"], "g", positions={("t", 0): kept._replace(next_offset=2)}) as consumer:
        assert offsets(take(consumer, 4)) == [2, 3, 4, 5]


def test_a_position_beyond_the_end_waits(broker: RunningBroker) -> None:
    fill(broker, 3)
    log_id = bytes.fromhex(broker.http("GET", "/v1/topics/t")[1]["partitions"][0]["log_id"])
    with broker.consumer(["t"], "g", positions={("t", 0): Position(log_id, 1, 5)}) as consumer:
        until(lambda: broker.refused(Code.BEHIND) > 0, consumer)
        assert place(broker, "g")["member"]["state"] == "behind"
        client = broker.raw("more")
        client.publish("t", numbered(3, 1), numbered(4, 1))
        until(lambda: place(broker, "g")["member"]["state"] == "live", consumer)
        client.publish("t", numbered(5, 1))
        assert offsets(take(consumer, 1)) == [5]


class Store:
    """A staging store in memory: what readers see is `visible`."""

    def __init__(self) -> None:
        self.visible: dict[bytes | None, bytes | None] = {}
        self.staged: dict[bytes | None, bytes | None] = {}
        self.begun: list[str] = []
        self.switched: list[str] = []
        self.progress: list[float] = []

    def begin(self, refresh: Refresh) -> int:
        self.begun.append(refresh.reset_id)
        self.staged = {}
        return refresh.from_offset

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        self.staged.update((record.key, record.value) for record in records)
        self.progress.append(refresh.progress)

    def switch(self, refresh: Refresh) -> None:
        self.visible, self.switched = self.staged, [*self.switched, refresh.reset_id]


def test_a_refresh_through_staging(broker: RunningBroker) -> None:
    broker.create("t", kind="table")
    client = broker.raw("writer")
    client.publish("t", *(batch.encode([(b"k%d" % rank, b"v", 1)]) for rank in range(5)))
    store = Store()
    consumer = broker.consumer(["t"], "g", staging=store, window_records=2)
    until(lambda: place(broker, "g")["committed"] == 5, consumer)
    consumer.refresh("t", 0)
    until(lambda: (place(broker, "g")["refresh"] or {}).get("state") == "ready", consumer)
    assert store.visible == {b"k%d" % rank: b"v" for rank in range(5)}
    assert store.switched == store.begun and len(store.begun) == 1
    assert store.progress == sorted(store.progress) and store.progress[-1] == 1.0
    assert broker.counters()["refreshes_done"] == 1
    client.publish("t", batch.encode([(b"k5", b"v", 1)]))
    assert offsets(take(consumer, 1)) == [5]
    consumer.close()


def test_a_refresh_without_staging_raises(broker: RunningBroker) -> None:
    fill(broker, 2)
    consumer = broker.consumer(["t"], "g")
    consumer.ack(take(consumer, 2)[-1])
    assert broker.http("POST", "/v1/groups/g/refresh", {"topic": "t"})[0] == 200
    with pytest.raises(ResetRequiredError, match="staging"):
        take(consumer, 1)
    consumer.close()


def test_asking_for_what_cannot_be_refreshed(broker: RunningBroker) -> None:
    fill(broker, 1)
    consumer = broker.consumer(["t"], "g", staging=Store())
    take(consumer, 1)
    with pytest.raises(AnswerError, match="STALE"):
        consumer.refresh("t", 7)
    consumer.close()


def test_a_record_outlives_its_own_time(tmp_path: Path) -> None:
    """The header eb-ttl-ms counts from the append at this node; what is fresh is handed out."""
    with running(tmp_path / "data", {"storage.engine": "memory"}) as broker:
        client = broker.raw("writer")
        client.publish("t", batch_of(b"short", headers=[("eb-ttl-ms", b"1")]), batch_of(b"plain"))
        client.publish(
            "t", batch_of(b"long", headers=[("eb-ttl-ms", b"3600000")]), batch_of(b"odd", headers=[("eb-ttl-ms", b"x")])
        )
        born = broker.broker.engine.partitions("t")[0].born[0]  # type: ignore[attr-defined]
        until(lambda: time.monotonic() > born + 0.01)
        with broker.consumer(["t"], auto_ack=False) as consumer:
            records = take(consumer, 3)
            assert [record.value for record in records] == [b"plain", b"long", b"odd"]
            assert consumer.expired == 1


def test_members_in_processes_of_their_own_go_on_after_a_restart(tmp_path: Path) -> None:
    """The broker restarts on the same port; members come back and nothing acknowledged is handled again."""
    config = config_for(tmp_path / "data")
    broker = RunningBroker(config)
    fill(broker, 5)
    consumer = broker.consumer(["t"], "g", auto_ack=False)
    consumer.ack(take(consumer, 5)[2])
    consumer.commit(SECONDS)
    host, port = broker.broker.listeners.tcp_address
    broker.stop()
    broker = RunningBroker(config_for(tmp_path / "data", {"listen.tcp": f"{host}:{port}"}))
    assert offsets(take(consumer, 2)) == [3, 4]
    consumer.close()
    broker.stop()
