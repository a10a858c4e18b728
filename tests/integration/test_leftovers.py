"""A loop over a consumer that is left in the middle of a delivery: the rest comes when it is asked again, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgebroker import Consumer, Record
from edgebroker.common.errors import Code
from edgebroker.common.types import TopicPartition
from tests.kit.brokers import SECONDS, RunningBroker, numbered, running
from tests.kit.waiting import wait_for


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    """With ten records in each of t's two partitions, in one batch: one delivery."""
    with running(tmp_path / "data", {"storage.engine": "memory", "delivery.backoff_ms": 0}) as found:
        found.create("t", partitions=2)
        client = found.raw("fill")
        for partition in range(2):
            client.publish("t", numbered(0, 10), partition=partition)
        yield found


def by_breaking(consumer: Consumer, count: int) -> list[Record]:
    seen: list[Record] = []
    for record in consumer:
        seen.append(record)
        if len(seen) == count:
            break
    return seen


def by_failing(consumer: Consumer, count: int) -> list[Record]:
    seen: list[Record] = []

    def handle() -> None:
        for record in consumer:
            seen.append(record)
            if len(seen) == count:
                raise KeyError("as told by the test")

    with pytest.raises(KeyError):
        handle()
    return seen


def places(records: list[Record]) -> list[tuple[int, int]]:
    return [(record.partition, record.offset) for record in records]


def committed(broker: RunningBroker) -> list[int]:
    lines = {line["partition"]: line["committed"] for line in broker.http("GET", "/v1/groups/g")[1]["partitions"]}
    return [lines[partition] for partition in range(2)]


@pytest.mark.parametrize("leave", [by_breaking, by_failing])
def test_the_rest_comes_to_the_next_loop(
    broker: RunningBroker, leave: Callable[[Consumer, int], list[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was left: within a piece, at its end, at the end of the delivery."""
    monkeypatch.setattr("edgebroker.client.consume.handed_out.MOST_RECORDS", 4)
    with broker.consumer(["t"], "g") as consumer:
        for count in (3, 1, 4, 2, 5):
            seen = places(leave(consumer, count))
            if count == 3:
                first = seen[0][0]
                expected = [(partition, offset) for partition in (first, 1 - first) for offset in range(10)]
            assert seen == expected[:count]
            del expected[:count]
        broker.raw("more").publish("t", numbered(10, 1), partition=1 - first)
        assert places(leave(consumer, 6)) == [*expected, (1 - first, 10)]


@pytest.mark.parametrize("leave", [by_breaking, by_failing])
def test_the_rest_comes_to_whoever_polls(broker: RunningBroker, leave: Callable[[Consumer, int], list[Record]]) -> None:
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        first = leave(consumer, 3)[0].partition
        assert places(consumer.poll(SECONDS)) == [(first, offset) for offset in range(3, 10)]
        assert places(consumer.poll(SECONDS)) == [(1 - first, offset) for offset in range(10)]
        assert consumer.poll(0.01) == []


def test_what_is_left_is_not_acknowledged(broker: RunningBroker) -> None:
    with broker.consumer(["t"], "g") as consumer:
        first = by_breaking(consumer, 3)[0].partition
        consumer.commit(SECONDS)
        assert (committed(broker)[first], committed(broker)[1 - first]) == (3, 0), "what was handed out, and no more"
        assert places(by_breaking(consumer, 8))[-1] == (1 - first, 0)
        consumer.commit(SECONDS)
        assert (committed(broker)[first], committed(broker)[1 - first]) == (10, 1)


@pytest.mark.parametrize("how", ["seek", "nack"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_is_left_is_void_when_its_partition_goes_elsewhere(
    broker: RunningBroker, how: str, elsewhere: bool
) -> None:
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        handled = consumer.poll(SECONDS)
        seen = by_breaking(consumer, 3)
        first = seen[0].partition
        rest = [(first, offset) for offset in range(3, 10)]
        if how == "seek":
            consumer.seek("t", 1 - first if elsewhere else first, 6)
        else:
            consumer.nack(handled[6] if elsewhere else seen[1])
        if elsewhere:
            assert places(consumer.poll(SECONDS)) == rest
        following = places(consumer.poll(SECONDS))
        expected = {"seek": [6, 7, 8, 9], "nack": [6] if elsewhere else [1]}[how]  # what failed comes alone
        assert following == [(1 - first if elsewhere else first, offset) for offset in expected]


@pytest.mark.parametrize(("how", "expected"), [("moved", 1), ("disconnected", 2)])
def test_what_is_left_is_void_when_its_lease_is_over(broker: RunningBroker, how: str, expected: int) -> None:
    broker.raw("fill").publish("u", numbered(0, 10))
    with broker.consumer(["u"], "g", auto_ack=False) as consumer:
        consumer.ack(by_breaking(consumer, 5)[1])
        consumer.commit(SECONDS)
        if how == "moved":
            assert broker.http("POST", "/v1/groups/g/offsets", {"topic": "u", "to": "1"})[0] == 200
        else:
            broker.call(lambda: [each.transport.close("test") for each in list(broker.broker.sessions)])
        wait_for(lambda: consumer.next_offsets().get(TopicPartition("u", 0)) == expected)
        again: list[Record] = []
        while len(again) < 10 - expected:
            again += consumer.poll(SECONDS)
            consumer.ack(again[-1])
        assert places(again) == [(0, offset) for offset in range(expected, 10)]


def test_what_is_left_of_a_partition_that_goes_is_handled_before(broker: RunningBroker) -> None:
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        seen = by_breaking(consumer, 3)
        first = seen[0].partition
        other = broker.raw("other")
        assert other.subscribe("t", "g", partition=first).code is Code.OK
        holders = (line["member"] for line in broker.http("GET", "/v1/groups/g")[1]["partitions"])
        assert [holder["partition"] for holder in holders if holder["revoking"]] == [first]
        consumer.ack(seen[0])
        consumer.commit(SECONDS)  # behind what the broker said about the partition
        rest = by_breaking(consumer, 7)
        assert places(rest) == [(first, offset) for offset in range(3, 10)]
        consumer.ack(rest[-1])
        assert other.assigned(first).offset == 10


@pytest.mark.parametrize("window", [0, 2])
def test_loops_that_end_with_a_delivery(broker: RunningBroker, window: int) -> None:
    """What was handed out is acknowledged when the next record is asked for, by whichever loop."""
    for number in range(6):
        broker.raw("fill").publish("v", numbered(number, 1))
    with broker.consumer(["v"], "g", window_records=window, timeout=SECONDS) as consumer:
        for number in range(6):
            assert places(by_breaking(consumer, 1)) == [(0, number)]

        def stored() -> list[int]:
            return [line["committed"] for line in broker.http("GET", "/v1/groups/g")[1]["partitions"]]

        wait_for(lambda: stored() == [5], "the last one was not followed by anything")
        consumer.commit(SECONDS)
        assert stored() == [6], "commit() says that it is handled"


def test_two_loops_at_a_time(broker: RunningBroker) -> None:
    """They share what comes: nothing is skipped when one of them is given up."""
    with broker.consumer(["t"], "g") as consumer:
        kept = iter(consumer)
        seen = [next(kept)]
        seen += by_breaking(consumer, 3)
        seen.append(next(kept))
        kept.close()  # type: ignore[attr-defined]
        seen += by_breaking(consumer, 15)
        first = seen[0].partition
        assert places(seen) == [(partition, offset) for partition in (first, 1 - first) for offset in range(10)]
