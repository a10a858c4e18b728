"""The public Consumer when a partition is taken from it: callbacks that fail, being silent, and coming back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edgebroker import Consumer
from edgebroker.common.types import TopicPartition
from tests.kit.brokers import SECONDS, RunningBroker, numbered, running
from tests.kit.waiting import wait_for

# Time passes only when a test lets it: a minute until a delivery is overdue.
SETTINGS = {
    "storage.engine": "memory",
    "delivery.timeout_ms": 60_000,
    "delivery.backoff_ms": 0,
    "limits.idle_timeout_ms": 86_400_000,
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    """With three records in each of t's partitions."""
    with running(tmp_path / "data", SETTINGS) as found:
        found.create("t", partitions=2)
        client = found.raw("fill")
        for partition in range(2):
            client.publish("t", numbered(0, 3), partition=partition)
        yield found


def unresponsive(broker: RunningBroker) -> list[str]:
    members = broker.http("GET", "/v1/groups/g")[1]["members"]
    return [member["client_id"] for member in members if member["unresponsive"]]


def fail_at_will(consumer: Consumer, how: str) -> None:
    """What a callback might do that ends with an exception."""
    if how == "commit":
        consumer.commit(0.02)
    else:
        raise {"error": ValueError, "interrupt": KeyboardInterrupt}[how]("as told by the test")


FAILURES = {"error": ValueError, "interrupt": KeyboardInterrupt, "commit": TimeoutError}


@pytest.mark.parametrize("how", FAILURES)
def test_a_callback_that_fails_does_not_keep_the_partition(
    broker: RunningBroker, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was pushed and not handed out holds nothing back, whatever becomes of the callback."""

    def revoked(partitions: Sequence[TopicPartition]) -> None:
        fail_at_will(consumer, how)

    with broker.consumer(["t"], "g", on_revoked=revoked, auto_ack=False) as consumer:
        wait_for(lambda: len(consumer.assignment) == 2)
        records = consumer.poll(SECONDS)
        going = 1 - records[0].partition
        other = broker.raw("other")
        other.subscribe("t", "g", partition=going)
        assert broker.http("GET", "/v1/groups/g")[1]["partitions"][going]["member"]["revoking"]
        consumer.ack(records[1])
        consumer.commit(SECONDS)  # behind what the broker said about the partition
        if how == "commit":  # nothing more is ever stored
            monkeypatch.setattr(broker.broker.engine, "when_stored", lambda callback: None)
            consumer.ack(records[2])
        with pytest.raises(FAILURES[how]):
            consumer.poll(SECONDS)
        assert other.assigned(going).offset == 0
        wait_for(lambda: consumer.assignment == {TopicPartition("t", records[0].partition)})


@pytest.mark.parametrize("how", ["", "error", "interrupt"])
def test_who_was_silent_for_too_long_gets_partitions_again(broker: RunningBroker, how: str) -> None:
    """It asks for records again: that it lost what it held does not keep it from being heard."""

    def revoked(partitions: Sequence[TopicPartition]) -> None:
        if how:
            fail_at_will(stuck, how)

    broker.create("u", partitions=2)
    other = broker.raw("other")
    other.subscribe("u", "g")
    stuck = broker.consumer(["u"], "g", client_id="stuck", on_revoked=revoked, auto_ack=False)
    wait_for(lambda: stuck.assignment)
    (lost,) = stuck.assignment
    other.notices()
    broker.raw("more").publish("u", numbered(0, 3), partition=lost.partition)
    assert len(stuck.poll(SECONDS)) == 3
    broker.advance(61)
    assert other.assigned().partition == lost.partition
    assert unresponsive(broker) == ["stuck"]
    if how:
        with pytest.raises(FAILURES[how]):
            stuck.poll(SECONDS)
    else:
        assert stuck.poll(0.0) == []
    wait_for(lambda: unresponsive(broker) == [])
    delivered = other.deliver().head
    other.ack(delivered, 1)
    wait_for(lambda: stuck.assignment)
    stuck.close()


def test_who_is_silent_while_a_partition_is_revoked_may_show_up(broker: RunningBroker) -> None:
    revoked: list[Sequence[TopicPartition]] = []
    with broker.consumer(["t"], "g", client_id="slow", auto_ack=False, on_revoked=revoked.append) as slow:
        held = {records[0].partition: records for records in (slow.poll(SECONDS), slow.poll(SECONDS))}
        broker.raw("other").subscribe("t", "g")
        lines = broker.http("GET", "/v1/groups/g")[1]["partitions"]
        (going,) = [line["partition"] for line in lines if line["member"]["revoking"]]
        slow.ack(held[1 - going][-1])
        slow.commit(SECONDS)
        broker.advance(61)
        assert unresponsive(broker) == ["slow"]

        def shown_up() -> bool:
            slow.poll(0.01)
            return not unresponsive(broker)

        wait_for(shown_up)
        assert revoked.count([TopicPartition("t", going)]) == 1, "it is told once"
