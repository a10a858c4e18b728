"""Clients while brokers die, hang, restart and refuse: nothing acknowledged is lost, nothing is stored twice."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from edgebroker import Consumer, Producer
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client import link
from edgebroker.common.errors import AnswerError, Code, UnreachableError
from tests.kit.brokers import SECONDS, RunningBroker, config_for, running


def values_of(server: str, topic: str, count: int) -> list[bytes | None]:
    with Consumer(server, [topic], start="earliest", timeout=SECONDS) as consumer:
        found: list[bytes | None] = []
        while len(found) < count:
            records = consumer.poll(SECONDS)
            assert records, f"{len(found)} of {count} records came"
            found += [record.value for record in records]
            consumer.ack(records[-1])
        assert consumer.poll(0.05) == []
    return found


def test_a_restart_in_the_middle_is_only_a_pause(tmp_path: Path) -> None:
    first = RunningBroker(config_for(tmp_path / "data"))
    with first.producer(batch_records=10) as producer:
        sent = [producer.send("t", b"%d" % rank) for rank in range(500)]
        sent[100].result(SECONDS)
        first.stop()
        sent += [producer.send("t", b"%d" % rank) for rank in range(500, 1000)]
        with running(tmp_path / "data", {"listen.tcp": first.server}) as second:
            assert [each.result(SECONDS) for each in sent] == list(range(1000))
            assert values_of(second.server, "t", 1000) == [b"%d" % rank for rank in range(1000)]


@pytest.mark.slow
def test_killed_while_publishing_with_a_consumer_attached(tmp_path: Path) -> None:
    """Five kills; every acknowledged record exists exactly once, in order, and the consumer sees them all."""
    count = 5000
    broker = BrokerProcess(tmp_path / "data")
    broker.start()
    seen: list[bytes | None] = []
    consumer = None
    try:
        with Producer(broker.server, batch_records=20, max_unacked=1000) as producer:
            producer.send("t", b"0").result(SECONDS)
            consumer = Consumer(broker.server, ["t"], "g")
            reading = consumer

            def read() -> None:
                for record in reading:
                    seen.append(record.value)

            reader = threading.Thread(target=read)
            reader.start()
            sent = []
            for rank in range(1, count):
                sent.append(producer.send("t", b"%d" % rank))
                if rank % (count // 5) == count // 10:
                    sent[-500].result(SECONDS)
                    broker.kill()
                    broker.start()
            assert [each.result(SECONDS) for each in sent] == list(range(1, count))
            deadline = time.monotonic() + SECONDS
            while len(set(seen)) < count:
                assert time.monotonic() < deadline, f"{len(set(seen))} of {count}"
        expected = [b"%d" % rank for rank in range(count)]
        assert values_of(broker.server, "t", count) == expected
        # At least once, in order: what comes again comes as a run from an acknowledged place.
        assert list(dict.fromkeys(seen)) == expected
        consumer.close()
        reader.join(SECONDS)
        assert not reader.is_alive()
    finally:
        if consumer is not None:
            consumer.close()
        broker.kill()


def test_a_second_producer_of_the_same_name_fences_the_first(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, broker.producer(client_id="till-1") as first:
        assert first.send("t", b"a").result(SECONDS) == 0
        with broker.producer(client_id="till-1") as second:
            assert second.send("t", b"b").result(SECONDS) == 1
            with pytest.raises(AnswerError, match="client_id") as fenced:
                first.send("t", b"c").result(SECONDS)
            assert fenced.value.code is Code.FENCED
            assert second.send("t", b"d").result(SECONDS) == 2
        assert values_of(broker.server, "t", 3) == [b"a", b"b", b"d"]


def test_unacknowledged_batches_time_out(tmp_path: Path) -> None:
    broker = RunningBroker(config_for(tmp_path / "data"))
    with broker.producer(timeout=0.5) as producer:
        assert producer.send("t", b"a").result(SECONDS) == 0
        broker.stop()
        sent = producer.send("t", b"b")
        with pytest.raises(TimeoutError):
            sent.result(0.05)
        with pytest.raises(UnreachableError, match=r"within 0\.5 s"):
            sent.result(SECONDS)
        assert isinstance(sent.exception(), UnreachableError)


def test_close_fails_what_could_not_be_sent(tmp_path: Path) -> None:
    broker = RunningBroker(config_for(tmp_path / "data"))
    producer = broker.producer(timeout=None)
    assert producer.send("t", b"a").result(SECONDS) == 0
    broker.stop()
    sent = [producer.send("t", b"b"), producer.send("t", b"c")]
    waiting: list[Exception | None] = []
    waiter = threading.Thread(target=lambda: waiting.append(sent[0].exception(SECONDS)))
    waiter.start()
    producer.close(timeout=0.1)
    waiter.join(SECONDS)
    assert isinstance(waiting[0], UnreachableError)
    for each in sent:
        with pytest.raises(UnreachableError, match="closed"):
            each.result()


def test_a_blocked_sender_is_woken_by_close(tmp_path: Path) -> None:
    broker = RunningBroker(config_for(tmp_path / "data"))
    producer = broker.producer(timeout=None, max_unacked=10, batch_records=1)
    producer.send("t", b"a").result(SECONDS)
    broker.stop()
    ended: list[str] = []

    def flood() -> None:
        try:
            for _ in range(100):
                producer.send("t", b"x")
        except ValueError as error:
            ended.append(str(error))

    thread = threading.Thread(target=flood)
    thread.start()
    deadline = time.monotonic() + SECONDS
    while producer.unacked < 10:
        assert time.monotonic() < deadline
    producer.close(timeout=0.05)
    thread.join(SECONDS)
    assert ended == ["the producer is closed"]


def test_disk_full_is_waited_out(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, broker.producer() as producer:
        assert producer.send("t", b"a").result(SECONDS) == 0
        committer = broker.broker.engine._committer  # type: ignore[attr-defined]
        broker.call(lambda: setattr(committer, "disk_full", "as told by the test"))
        sent = producer.send("t", b"b")
        with pytest.raises(TimeoutError):
            sent.result(0.3)
        broker.call(lambda: setattr(committer, "disk_full", ""))
        assert sent.result(SECONDS) == 1
        assert broker.refused(Code.DISK_FULL) >= 1


def test_a_broker_that_accepts_and_never_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        host, port = listener.getsockname()
        with Producer(f"{host}:{port}", timeout=0.5):
            for _ in range(2):
                silent, _ = listener.accept()
                with silent:
                    silent.settimeout(SECONDS)
                    while silent.recv(1000):
                        pass
