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


def begin(broker: RunningBroker, client_id: str = WRITER, *, keys: int) -> str:
    """The path of a snapshot that will have so many keys."""
    status, begun = broker.http("POST", PATH, {"client_id": client_id})
    assert status == 201, begun
    path = f"{PATH}/{begun['id']}"
    assert declare(broker, path, keys=keys) is Code.OK
    return path


def declare(broker: RunningBroker, path: str, **plan: object) -> object:
    status, answer = broker.http("PUT", path, {"source": "content", **plan})
    return Code.OK if status == 200 else Code.__members__.get(answer["code"], answer["code"])


def complete(broker: RunningBroker, path: str) -> object:
    """OK, or what refuses it."""
    status, answer = broker.http("POST", path)
    return Code.OK if status == 200 else Code.__members__.get(answer["code"], answer["code"])


def test_the_topic_is_held_while_the_client_is_connected(broker: RunningBroker) -> None:
    """It reads what is live, however long that takes, and publishes nothing meanwhile."""
    writer, other = broker.raw(WRITER), broker.raw("other")
    path = f"{PATH}/{broker.http('POST', PATH, {'client_id': WRITER})[1]['id']}"
    for _ in range(3):
        broker.advance(IDLE_SECONDS * 0.9)
        assert [publish(writer), publish(other)] == [Code.OVERLOADED] * 2
    assert declare(broker, path, keys=2) is Code.OK
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
    path = begin(broker, keys=1)
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
    path = begin(broker, f"{WRITER}-again", keys=1)
    assert (publish(again), publish(other)) == (Code.OK, Code.OVERLOADED)
    assert publish(late) is not Code.OK
    assert complete(broker, path) is Code.OK
    assert (publish(late), publish(other)) == (Code.FENCED, Code.OK)


def test_a_client_that_comes_back_in_time_goes_on(broker: RunningBroker) -> None:
    other = broker.raw("other")
    path = begin(broker, keys=4)
    for _ in range(3):
        writer = broker.raw(WRITER)
        broker.advance(2)
        assert publish(writer) is Code.OK
        broker.drop(writer)
        broker.advance(IDLE_SECONDS * 0.8)
        assert publish(other) is Code.OVERLOADED
    assert publish(broker.raw(WRITER)) is Code.OK
    assert complete(broker, path) is Code.OK


@pytest.mark.parametrize(
    ("plan", "allowed"),
    [
        ({"keys": 90, "deleted": 10}, True),
        ({"keys": 89, "deleted": 11}, False),
        ({"keys": 89, "deleted": 11, "allow_deletes": 11}, True),
        ({"keys": 89, "deleted": 12, "allow_deletes": 11}, False),
        ({"keys": 9900, "deleted": 100}, True),
        ({"keys": 9900, "deleted": 101}, False),
        ({"keys": 0, "deleted": 1000}, False),
    ],
)
def test_what_deletes_too_much_is_refused(broker: RunningBroker, plan: dict[str, int], allowed: bool) -> None:
    """Before anything is published."""
    path = f"{PATH}/{broker.http('POST', PATH, {'client_id': WRITER})[1]['id']}"
    writer = broker.raw(WRITER)
    assert (declare(broker, path, **plan) is Code.OK) == allowed
    assert (publish(writer) is Code.OK) == allowed


def test_a_topic_may_allow_more(broker: RunningBroker) -> None:
    assert broker.http("PATCH", "/v1/topics/t", {"max_delete_percent": 50})[0] == 200
    assert broker.http("PATCH", "/v1/topics/t", {"max_delete_percent": 101})[0] == 400
    path = begin(broker, keys=0)
    assert declare(broker, path, keys=50, deleted=50) is Code.OK
    assert declare(broker, path, keys=49, deleted=51) is not Code.OK


def test_a_snapshot_that_is_not_what_was_declared_is_none(broker: RunningBroker) -> None:
    path, writer = begin(broker, keys=3), broker.raw(WRITER)
    assert publish(writer) is Code.OK
    assert complete(broker, path) is not Code.OK
    assert broker.http("GET", "/v1/topics/t")[1]["partitions"][0]["snapshot"] is None
    assert publish(broker.raw("other")) is Code.OK
