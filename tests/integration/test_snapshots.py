"""Who writes a snapshot has its topic for itself: for how long, and what comes afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.broker.delivery.table_snapshots import IDLE_SECONDS
from edgebroker.common import batch
from edgebroker.common.errors import Code
from tests.kit.brokers import RunningBroker, running
from tests.kit.raw_client import RawClient

PATH = "/v1/topics/t/snapshot"
WRITER = "__snapshot-writer"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    """Time passes only when a test lets it."""
    settings = {"storage.engine": "memory", "limits.idle_timeout_ms": 1_000_000_000}
    with running(tmp_path / "data", settings) as found:
        found.create("t", kind="table", partitions=2)
        yield found


def publish(client: RawClient, partition: int = 0) -> Code:
    return client.publish("t", batch.encode([(b"key", b"value", 1)]), partition=partition).code


def begin(broker: RunningBroker, client_id: str = WRITER) -> str:
    status, begun = broker.http("POST", PATH, {"client_id": client_id})
    assert status == 201, begun
    return f"{PATH}/{begun['id']}"


def complete(broker: RunningBroker, path: str) -> object:
    """OK, or what refuses it."""
    status, answer = broker.http("POST", path)
    return Code.OK if status == 200 else Code[answer["code"]]


def test_the_topic_is_held_while_the_client_is_connected(broker: RunningBroker) -> None:
    """It reads what is live, however long that takes, and publishes nothing meanwhile."""
    writer, other = broker.raw(WRITER), broker.raw("other")
    path = begin(broker)
    for _ in range(3):
        broker.advance(IDLE_SECONDS * 0.9)
        assert publish(other) is Code.OVERLOADED
    for partition in range(2):
        assert publish(writer, partition) is Code.OK
    assert complete(broker, path) is Code.OK
    assert publish(other) is Code.OK


@pytest.mark.parametrize("connected", [True, False])
def test_it_is_given_up_once_the_client_is_gone_for_long(broker: RunningBroker, connected: bool) -> None:
    """Also when it has never come."""
    other = broker.raw("other")
    if connected:
        writer = broker.raw(WRITER)
    path = begin(broker)
    if connected:
        broker.advance(IDLE_SECONDS * 2)
        assert publish(writer) is Code.OK
        broker.drop(writer)
    broker.advance(2)
    broker.advance(IDLE_SECONDS * 0.8)
    assert publish(other) is Code.OVERLOADED
    broker.advance(IDLE_SECONDS * 0.4)
    assert publish(other) is Code.OK
    # What it would still publish could be older than that.
    late = broker.raw(WRITER)
    assert [publish(late, partition) for partition in range(2)] == [Code.FENCED] * 2
    assert complete(broker, path) is Code.FENCED
    again = broker.raw(f"{WRITER}-again")
    path = begin(broker, f"{WRITER}-again")
    assert (publish(again), publish(other)) == (Code.OK, Code.OVERLOADED)
    assert publish(late) is not Code.OK
    assert complete(broker, path) is Code.OK
    assert (publish(late), publish(other)) == (Code.FENCED, Code.OK)


def test_a_client_that_comes_back_in_time_goes_on(broker: RunningBroker) -> None:
    other = broker.raw("other")
    path = begin(broker)
    for _ in range(3):
        writer = broker.raw(WRITER)
        broker.advance(2)
        assert publish(writer) is Code.OK
        broker.drop(writer)
        broker.advance(IDLE_SECONDS * 0.8)
        assert publish(other) is Code.OVERLOADED
    assert publish(broker.raw(WRITER)) is Code.OK
    assert complete(broker, path) is Code.OK
