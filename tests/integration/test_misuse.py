"""What callers get wrong: one sentence, in their own thread, and everything else goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from tests.kit.brokers import SECONDS, RunningBroker, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with running(tmp_path_factory.mktemp("misuse") / "data") as found:
        found.create("t")
        yield found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ack": "all"}, "ack 'all' is unknown; use one of none, written, durable, replicated"),
        ({"ack": 2}, "ack 2 is unknown"),
        ({"compression": "snappy"}, "compression 'snappy' is unknown; use one of"),
        ({"batch_records": 0}, "batch_records is a whole number from 1 to 1000000, not 0"),
        ({"batch_records": 1.5}, "batch_records is a whole number, not 1.5"),
        ({"batch_bytes": -1}, "batch_bytes is a whole number from 1"),
        ({"linger_ms": -1}, "linger_ms is a number of milliseconds from 0 on, not -1"),
        ({"linger_ms": "5"}, "linger_ms is a number of milliseconds, not '5'"),
        ({"max_unacked": 0}, "max_unacked is a whole number from 1"),
        ({"max_unacked_bytes": 0}, "max_unacked_bytes is a whole number from 1"),
        ({"timeout": float("nan")}, "timeout is a number of seconds from 0 on, not nan; None stands for no limit"),
        ({"client_id": "x" * 300}, "client_id is up to 200 bytes of printable text"),
        ({"client_id": "a\nb"}, "client_id is up to 200 bytes of printable text"),
        ({"client_id": 5}, "client_id is a str, not 5"),
    ],
    ids=str,
)
def test_a_producer(arguments: dict[str, Any], said: str) -> None:
    refused(lambda: Producer("127.0.0.1:7420", **arguments), said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"topics": []}, "topics is empty; name at least one topic to consume"),
        ({"topics": "t"}, "topics is a sequence of names, not one name; write ['t']"),
        ({"topics": ["a b"]}, "topic names are 1 to 200 of"),
        ({"topics": ["x" * 201]}, "topic names are 1 to 200 of"),
        ({"topics": [5]}, "the name of a topic is a str, not 5"),
        ({"group": "a b"}, "group names are 1 to 200 of"),
        ({"start": "yesterday"}, "'yesterday': use earliest, latest, committed, an offset, or @TIME in ms since 1970"),
        ({"start": -1}, "-1: use earliest"),
        ({"start": 1 << 64}, "use earliest"),
        ({"start": "@soon"}, "use earliest"),
        ({"start": None}, "None: use earliest"),
        ({"window_records": -1}, "window_records is a whole number from 0"),
        ({"window_bytes": 1 << 40}, "window_bytes is a whole number from 0 to 4294967295"),
        ({"missing_topic": "ignore"}, "missing_topic='ignore': use wait or raise"),
        ({"timeout": -1}, "timeout is a number of seconds from 0 on, not -1"),
        ({"client_id": "x" * 300}, "client_id is up to 200 bytes"),
    ],
    ids=str,
)
def test_a_consumer(arguments: dict[str, Any], said: str) -> None:
    refused(lambda: Consumer("127.0.0.1:7420", **{"topics": ["t"], **arguments}), said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("", b"v"), "topic names are 1 to 200 of"),
        (("a/b", b"v"), "topic names are 1 to 200 of"),
        ((None, b"v"), "Argument 'topic' has incorrect type"),
        ((b"t", b"v"), "Argument 'topic' has incorrect type (expected str, got bytes)"),
        (("t", "text"), "Argument 'value' has incorrect type (expected bytes, got str)"),
        (("t", b"v", "key"), "Argument 'key' has incorrect type (expected bytes, got str)"),
        (("t", b"x" * (2 << 20)), "is too large: the broker allows 1048576"),
        (("t", b"v", None, {"partition": 1}), "topic t has no partition 1; it has 1, numbered from 0"),
        (("t", b"v", None, {"partition": -2}), "topic t has no partition -2"),
        (("t", b"v", None, {"timestamp": -5}), "a timestamp is milliseconds since 1970, from 0 on, not -5"),
        (("t", b"v", None, {"headers": [("\ud800", b"")]}), "is not text that UTF-8 can hold"),
        (("t", b"v", None, {"headers": [("a", "text")]}), "header"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_record(broker: RunningBroker, arguments: tuple[Any, ...], said: str) -> None:
    *plain, named = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with broker.producer() as producer:
        before = producer.send("t", b"before")
        refused(lambda: producer.send(*plain, **named), said)
        after = producer.send("t", b"after")
        assert after.result(SECONDS) == before.result(SECONDS) + 1


def test_times_to_wait(broker: RunningBroker) -> None:
    with broker.consumer(["t"]) as consumer, broker.producer() as producer:
        for wrong in (float("nan"), -1, "x"):
            for call in (lambda t=wrong: consumer.poll(t), lambda t=wrong: producer.flush(t)):
                refused(call, "timeout is a number of seconds")  # type: ignore[arg-type]


def test_a_callback_that_would_end_the_program(broker: RunningBroker) -> None:
    """It is called on the I/O thread, which others need."""

    def leave(sent: object) -> None:
        raise SystemExit

    with broker.producer() as producer:
        producer.send("t", b"v").add_done_callback(leave)
        producer.flush(SECONDS)
        assert producer.send("t", b"v").result(SECONDS) >= 0


def refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert said in str(error.value)
    assert "\n" not in str(error.value)
