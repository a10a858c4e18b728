"""What clients can make of a node: as many topics, groups and connections as its limits say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.broker.sessions import sessions
from edgebroker.broker.sessions.native import CONNECTS_A_SECOND, CONNECTS_AT_ONCE
from edgebroker.cli.main import main
from edgebroker.client.consume import subscriber
from edgebroker.common.errors import Code
from edgebroker.common.types import Start
from edgebroker.network.wire import frames
from edgebroker.storage.metadata import granted as granted_ids
from tests.kit.brokers import RunningBroker, batch_of, running
from tests.kit.raw_client import RawClient
from tests.kit.trees import Tree, follows
from tests.kit.waiting import wait_for

LIMITS = {"limits.max_partitions": 3, "limits.max_groups": 2}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", LIMITS) as found:
        yield found


def problem(broker: RunningBroker) -> str:
    found: str = broker.http("GET", "/v1/node")[1]["problems"].get("limits", "")
    return found


def test_partitions(broker: RunningBroker, capsys: pytest.CaptureFixture[str]) -> None:
    client = broker.raw()
    broker.create("two", partitions=2)
    assert client.publish("one", batch_of(b"a")).code is Code.OK
    said = "this node may have 3 partitions; delete topics that have no use, or raise limits.max_partitions"
    answer = client.publish("more", batch_of(b"a"))
    assert (answer.code, answer.message) == (Code.OVERLOADED, f"topic more cannot be created: {said}")
    status, body = broker.http("POST", "/v1/topics", {"name": "more"})
    assert (status, body["error"]) == (503, f"topic more cannot be created: {said}")
    assert client.publish("one", batch_of(b"b")).code is Code.OK, "what is there goes on"
    assert problem(broker) == "limits.max_partitions: topic more was not created (2 since the start)"
    assert broker.counters()["limits_reached"] == {"max_partitions": 2}
    assert main(["status", "--admin", "{}:{}".format(*broker.broker.listeners.http_address)]) == 0
    assert "limits.max_partitions" in capsys.readouterr().out
    assert broker.http("DELETE", "/v1/topics/one?confirm=one")[0] == 200
    assert broker.raw("other").publish("more", batch_of(b"a")).code is Code.OK
    broker.advance(61.0)
    assert problem(broker) == ""


def test_groups(broker: RunningBroker) -> None:
    broker.create("t")
    for name in ("a", "b"):
        assert broker.raw(name).subscribe("t", name, start=Start.COMMITTED).code is Code.OK
    refused = broker.raw("c").subscribe("t", "c", start=Start.COMMITTED)
    assert refused.code is Code.OVERLOADED
    assert refused.message == (
        "group c cannot begin: this node may have 2 groups; delete some that have no use (edgebroker group delete), "
        "or raise limits.max_groups"
    )
    assert broker.raw("reader").subscribe("t", "", start=Start.EARLIEST).code is Code.OK, "a reader begins no group"
    assert broker.raw("second").subscribe("t", "a", start=Start.COMMITTED).code is Code.OK
    assert problem(broker) == "limits.max_groups: group c was not begun (1 since the start)"


def test_a_consumer_that_was_refused_tries_again(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subscriber, "REFUSED_SECONDS", 0.05)
    broker.create("t")
    for name in ("b", "a"):
        other = broker.raw(name)
        assert other.subscribe("t", name, start=Start.COMMITTED).code is Code.OK
    with broker.producer() as producer, broker.consumer(["t"], "c", start="earliest") as consumer:
        producer.send("t", b"there").result(10.0)
        wait_for(lambda: "cannot subscribe yet: OVERLOADED: group c cannot begin" in caplog.text, "it was refused")
        assert consumer.poll(0.0) == []
        broker.drop(other)
        wait_for(lambda: broker.http("DELETE", "/v1/groups/a")[0] == 200, "the group has no members")
        assert [record.value for record in consumer.poll(10.0)] == [b"there"]


def test_subscribed_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts once for each consumer; what a consumer gives back is free again."""
    with running(tmp_path / "data", {"limits.max_subscribed_partitions": 40}) as broker:
        for topic in ("prices", "items"):
            broker.create(topic, partitions=10)
        first = broker.raw("first")
        assert first.subscribe("prices").code is Code.OK
        assert first.subscribe("prices").code is Code.OK, "said again, it is no more"
        assert first.subscribe("prices", partition=3).code is Code.OK
        assert first.subscribe("items").code is Code.OK
        assert broker.raw("second").subscribe("prices").code is Code.OK
        refused = broker.raw("third").subscribe("prices")
        assert (refused.code, refused.message) == (
            Code.OVERLOADED,
            "10 partitions more are too many: all consumers together may subscribe to 40, those of one address of "
            "another machine to a quarter of that; subscribe to fewer topics, or raise "
            "limits.max_subscribed_partitions",
        )
        assert problem(broker) == (
            "limits.max_subscribed_partitions: third did not get 10 partitions more (1 since the start)"
        )
        first.leave("items")
        assert broker.raw("fourth").subscribe("items", "").code is Code.OK
        broker.drop(first)
        wait_for(lambda: broker.call(lambda: broker.broker.core.membership.wanted) == 20, "what it had is free")
        assert broker.http("DELETE", "/v1/topics/items?confirm=items")[0] == 200
        assert broker.call(lambda: broker.broker.core.membership.wanted) == 10


def test_subscribed_partitions_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine has a quarter of them, so that it cannot take all."""
    with running(tmp_path / "data", {"limits.max_subscribed_partitions": 80}) as broker:
        broker.create("prices", partitions=10)
        for number in range(4):
            assert broker.raw(f"local-{number}").subscribe("prices").code is Code.OK
        monkeypatch.setattr(sessions, "is_local", lambda peer: False)
        assert broker.raw("strange").subscribe("prices").code is Code.OVERLOADED
        assert broker.raw("strange").subscribe("prices", partition=0).code is Code.OVERLOADED, "those count as its own"


def test_committed_offsets(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"limits.max_committed_offsets": 15}) as broker:
        broker.create("prices", partitions=10)
        broker.create("items", partitions=5)
        assert broker.raw("a").subscribe("prices", "tills").code is Code.OK
        wait_for(lambda: broker.call(lambda: broker.broker.core.groups.offsets) == 10, "the group has begun")
        refused = broker.raw("b").subscribe("prices", "labels")
        assert (refused.code, refused.message) == (
            Code.OVERLOADED,
            "group labels cannot begin in 10 partitions: this node may have 15 committed offsets; delete groups that "
            "have no use (edgebroker group delete), or raise limits.max_committed_offsets",
        )
        assert broker.raw("c").subscribe("prices", "tills").code is Code.OK, "it has begun there"
        assert broker.raw("d").subscribe("items", "tills").code is Code.OK
        assert broker.raw("e").subscribe("prices", "").code is Code.OK, "a reader has none"
        assert "group labels did not begin in 10 partitions" in problem(broker)


def test_connections_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's are counted; those of this machine share limits.max_connections only."""
    with running(tmp_path / "data", {"limits.per_address_connections": 2}) as broker:
        for number in range(4):
            broker.raw(f"local-{number}")
        monkeypatch.setattr(sessions, "is_local", lambda peer: False)
        with pytest.raises((OSError, EOFError)):
            broker.raw("strange")
        assert problem(broker).startswith("limits.per_address_connections: a connection from 127.0.0.1 was refused")
        assert broker.counters()["connections_refused"] == 1


def test_what_comes_from_the_parent_is_not_limited(tree: Tree) -> None:
    root = tree.start("root")
    for name in ("a", "b", "c"):
        root.raw(name).publish(name, batch_of(b"v"))
    hub = tree.start("l2", "root", limits__max_partitions=1)
    for name in ("a", "b", "c"):
        follows(root, hub, name)


def producer(broker: RunningBroker, client_id: str) -> RawClient:
    client = broker.raw(client_id, granted=False)
    client.connect(client_id, flags=frames.WANT_PRODUCER)
    return client


def test_producer_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was connected longest ago is forgotten, and keeps the id that it holds; who is connected stays."""
    monkeypatch.setattr(granted_ids, "MOST_PRODUCERS", 3)
    with running(tmp_path / "data") as broker:
        there, first = producer(broker, "there"), producer(broker, "first")
        own = (first.grants.producer_id, first.grants.producer_epoch)
        assert first.publish("t", batch_of(b"a", producer_id=own[0], producer_epoch=own[1], base_sequence=0))[1] == 0
        first.close()
        wait_for(lambda: not broker.call(lambda: broker.broker.core.producers.connected("first")), "it has gone")
        for number in range(5):
            producer(broker, f"other-{number}").close()
            name = f"other-{number}"
            wait_for(lambda: not broker.call(lambda: broker.broker.core.producers.connected(name)), "it has gone")  # noqa: B023
        thief = broker.raw("thief", granted=False)
        claimed = {"producer_id": there.grants.producer_id, "producer_epoch": 30_000}
        assert thief.connect("thief", flags=frames.WANT_PRODUCER, **claimed).producer_id != there.grants.producer_id
    with running(tmp_path / "data") as broker:
        assert broker.call(lambda: broker.broker.engine.producers.of("first")) is None
        assert broker.call(lambda: broker.broker.engine.producers.of("there")) is not None
        granted = broker.raw("first", granted=False).connect(
            "first", flags=frames.WANT_PRODUCER, producer_id=own[0], producer_epoch=own[1]
        )
        assert (granted.producer_id, granted.producer_epoch) == own


def test_a_log_that_never_grows_takes_no_space_ahead(broker: RunningBroker) -> None:
    assert broker.raw().publish("t", batch_of(b"v")).code is Code.OK
    (segment,) = (Path(broker.config.node.data_dir) / "topics" / "t" / "0").glob("*.log")
    assert segment.stat().st_blocks * 512 <= 8192


def test_connecting_again_and_again(broker: RunningBroker) -> None:
    """Each may ask about a thousand topics: beyond a hundred, one waits for the next."""
    client, count = broker.raw("again"), 300
    for correlation in range(100, 100 + count):
        client.send(frames.write_connect(correlation, frames.Connect(1, 0, "again", b"", -1, -1, [])))
    client.answer(100 + CONNECTS_AT_ONCE - 2)
    assert broker.raw("honest").publish("one", batch_of(b"v")).code is Code.OK
    (session,) = [one for one in broker.broker.sessions if one.client_id == "again"]
    assert broker.call(lambda: session._holds) == 1, "it waits"
    for _ in range(count):
        broker.advance(1 / CONNECTS_A_SECOND)
    client.answer(100 + count - 1)
