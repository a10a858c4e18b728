"""A consumer waits for topics that its broker does not have yet, and the operator sees who waits for what."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.main import main
from edgebroker.client.consumer import Consumer
from edgebroker.common.errors import AnswerError, Code
from edgebroker.network.wire import frames
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, running, take
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


def put(broker: RunningBroker, topic: str, value: bytes, partition: int = 0) -> None:
    assert broker.raw(f"put-{topic}").publish(topic, batch_of(value), partition=partition).code is Code.OK


def awaited(broker: RunningBroker) -> dict[str, int]:
    found: dict[str, int] = broker.http("GET", "/v1/node")[1]["awaited_topics"]
    return found


def values(consumer: Consumer, count: int) -> list[bytes]:
    return [record.value or b"" for record in take(consumer, count)]


def test_the_records_come_when_the_topic_is_there(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    put(broker, "here", b"1")
    with caplog.at_level(logging.WARNING), broker.consumer(["here", "late", "later"], "g") as consumer:
        assert values(consumer, 1) == [b"1"], "nothing waits for what is missing"
        assert awaited(broker) == {"late": 1, "later": 1}
        clients = broker.http("GET", "/v1/clients")[1]["clients"]
        assert [client["waits_for"] for client in clients if client["group"] == "g"] == [["late", "later"]]
        assert main(["status", "--admin", "{}:{}".format(*broker.broker.listeners.http_address)]) == 0
        assert "waiting   1 client for topic late, which is not here\n" in capsys.readouterr().out
        put(broker, "late", b"2")
        assert values(consumer, 1) == [b"2"]
        wait_for(lambda: awaited(broker) == {"later": 1}, "nobody waits for what is here")
        put(broker, "later", b"3")
        assert values(consumer, 1) == [b"3"]
        put(broker, "here", b"4")
        assert values(consumer, 1) == [b"4"]
        consumer.commit()
    assert f"topics late, later do not exist at {broker.server} yet; waiting for them" in caplog.text
    with broker.consumer(["here", "late", "later"], "g", timeout=5.0) as consumer:
        put(broker, "later", b"5")
        assert values(consumer, 1) == [b"5"], "the rest is committed"


def test_where_to_start_counts_from_when_the_topic_is_there(broker: RunningBroker) -> None:
    with broker.consumer(["late"], "g", start="latest") as consumer:
        wait_for(lambda: awaited(broker) == {"late": 1}, "it waits")
        put(broker, "late", b"1")
        wait_for(lambda: not awaited(broker), "it found the topic")
        wait_for(lambda: consumer.poll(0.01) == [] and consumer.next_offsets() == {("late", 0): 1}, "it is at the end")
        put(broker, "late", b"2")
        assert values(consumer, 1) == [b"2"]


def test_waiting_goes_on_after_a_reconnect(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        server = broker.broker.listeners.tcp_address
        consumer = Consumer(broker.server, ["late", "here"], "g")
        put(broker, "here", b"1")
        assert values(consumer, 1) == [b"1"]
        consumer.commit()
    with running(tmp_path / "data", {"listen.tcp": "{}:{}".format(*server)}) as broker, consumer:
        wait_for(lambda: awaited(broker) == {"late": 1}, "it waits again")
        put(broker, "late", b"2")
        assert values(consumer, 1) == [b"2"]


def test_a_topic_that_was_deleted_is_waited_for_by_who_polls_on(broker: RunningBroker) -> None:
    put(broker, "here", b"1")
    put(broker, "gone", b"1")
    with broker.consumer(["here", "gone"]) as consumer:
        assert values(consumer, 2) == [b"1", b"1"]
        assert broker.http("DELETE", "/v1/topics/gone?confirm=gone")[0] == 200
        with pytest.raises(AnswerError, match="topic gone was deleted"):
            values(consumer, 1)
        put(broker, "here", b"2")
        assert values(consumer, 1) == [b"2"], "the other topic goes on, and nothing comes twice"
        put(broker, "gone", b"3")
        assert values(consumer, 1) == [b"3"]


def test_more_topics_than_one_question_holds(broker: RunningBroker) -> None:
    put(broker, "here", b"1")
    names = [f"missing-{number}" for number in range(frames.MOST_TOPICS + 5)]
    with broker.consumer([*names, "here"], "g") as consumer:
        assert values(consumer, 1) == [b"1"]
        put(broker, names[-1], b"2")
        put(broker, names[0], b"3")
        assert sorted(values(consumer, 2)) == [b"2", b"3"]


def test_a_partition_that_does_not_exist_is_no_topic_to_wait_for(broker: RunningBroker) -> None:
    put(broker, "here", b"1")
    with broker.consumer(["here", "late"]) as consumer:
        assert values(consumer, 1) == [b"1"]
        consumer.seek("here", 7, "earliest")
        with pytest.raises(AnswerError, match="topic here partition 7 does not exist"):
            values(consumer, 1)


def test_the_command_line_says_what_it_waits_for(broker: RunningBroker) -> None:
    command = [sys.executable, "-m", "edgebroker", "consume", "late", "--server", broker.server, "--count", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        assert program.stderr.readline() == (
            f"edgebroker: topic late does not exist at {broker.server} yet; waiting for it\n"
        )
        put(broker, "late", b"value")
        out, errors = program.communicate(timeout=SECONDS)
        assert (out, errors, program.returncode) == ("value\n", "", 0)
