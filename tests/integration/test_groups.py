"""A group whose partitions the broker assigns, over the wire: who gets which partition, and how one changes hands."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, Holding, Wanted
from edgebroker.common.types import Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import FrameType, Intent, Subscribe
from tests.kit.brokers import RunningBroker, numbered, running
from tests.kit.raw_client import Notice, RawClient


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", {"storage.engine": "memory"}) as found:
        yield found


def holders(broker: RunningBroker, group: str = "g") -> dict[tuple[str, int], str]:
    """Who holds what, as an operator sees it."""
    lines = broker.http("GET", f"/v1/groups/{group}")[1]["partitions"]
    return {(line["topic"], line["partition"]): line["member"]["client_id"] for line in lines if line["member"]}


def shares(broker: RunningBroker) -> dict[str, int]:
    return dict(Counter(holders(broker).values()))


def crew(broker: RunningBroker, *names: str, topic: str = "t") -> list[RawClient]:
    """Members of g that want a topic, in this order."""
    members = [broker.raw(name) for name in names]
    for member in members:
        assert member.subscribe(topic, "g", start=Start.COMMITTED).code is Code.OK
    return members


def kinds(notices: list[Notice]) -> list[tuple[Holding, int]]:
    return [(notice.holding, notice.partition) for notice in notices]


def test_members_come_and_go(broker: RunningBroker) -> None:
    broker.create("t", partitions=7)
    before: dict[tuple[str, int], str] = {}
    members: dict[str, RawClient] = {}
    joins = [("a", [7]), ("b", [3, 4]), ("c", [2, 2, 3]), ("d", [1, 2, 2, 2])]
    for name, expected in joins:
        members[name] = crew(broker, name)[0]
        after = holders(broker)
        assert sorted(Counter(after.values()).values()) == expected
        # Only what the newcomer got has moved.
        assert {after[key] for key in before if after[key] != before[key]} <= {name}
        before = after
    for how, name, expected in [("leave", "b", [2, 2, 3]), ("close", "d", [3, 4]), ("close", "a", [7])]:
        if how == "leave":
            members[name].leave("t")
        else:
            broker.drop(members[name])
        after = holders(broker)
        assert sorted(Counter(after.values()).values()) == expected
        assert {before[key] for key in before if after[key] != before[key]} == {name}
        before = after


def test_more_members_than_partitions(broker: RunningBroker) -> None:
    broker.create("t", partitions=2)
    members = crew(broker, *"abcd")
    assert sorted(shares(broker).values()) == [1, 1]
    line = broker.http("GET", "/v1/groups/g")[1]["partitions"][0]
    assert line["standbys"] == 3
    idle = [member for member in members if not member.notices()]
    assert len(idle) == 2
    for member in members:
        if member not in idle:
            broker.drop(member)
    assert {member.assigned().partition for member in idle} == {0, 1}


def test_two_topics_count_together(broker: RunningBroker) -> None:
    broker.create("t", partitions=3)
    broker.create("u", partitions=3)
    crew(broker, "only-t")
    lines = [Wanted(topic, -1, Start.COMMITTED, NO_LOG_ID, -1, 0) for topic in ("t", "u")]
    both = broker.raw("both")
    both.subscribe_raw(Subscribe(Intent.JOIN, "g", 0, 0, lines))
    # Three of t stay where they are: the other has its three of u.
    assert holders(broker) == {("t", n): "only-t" for n in range(3)} | {("u", n): "both" for n in range(3)}
    crew(broker, "third", topic="u")
    # A partition moves only to somebody who holds two fewer.
    assert shares(broker) == {"only-t": 3, "both": 2, "third": 1}
    both.leave("u")
    assert shares(broker) == {"only-t": 2, "both": 1, "third": 3}


def test_pins_make_eligible_for_a_single_partition(broker: RunningBroker) -> None:
    broker.create("t", partitions=4)
    pinned, other = broker.raw("pinned"), broker.raw("other")
    for partition in (1, 2):
        pinned.subscribe("t", "g", partition=partition)
    assert holders(broker) == {("t", 1): "pinned", ("t", 2): "pinned"}
    crew(broker, "topic")
    assert holders(broker) == {("t", 0): "topic", ("t", 1): "pinned", ("t", 2): "pinned", ("t", 3): "topic"}
    # Two that pin the same: one of them holds it, the other gets it when that one goes.
    other.subscribe("t", "g", partition=1)
    assert holders(broker) == {("t", 0): "topic", ("t", 1): "other", ("t", 2): "pinned", ("t", 3): "topic"}
    other.leave("t", 1)
    assert holders(broker)["t", 1] == "pinned"
    # Who wants the topic after all is divided with everybody.
    pinned.subscribe("t", "g")
    assert shares(broker) == {"topic": 2, "pinned": 2}


def in_hands(broker: RunningBroker) -> tuple[RawClient, RawClient, dict[int, Notice]]:
    """Two partitions with records 0 to 9, all of them in the hands of `old` when `new` joins; what is revoked of it."""
    broker.create("t", partitions=2)
    producer = broker.raw("producer")
    for partition in range(2):
        producer.publish("t", numbered(0, 10), partition=partition)
    old = crew(broker, "old")[0]
    for _ in range(2):
        assert old.deliver().offsets == list(range(10))
    held = {notice.partition: notice for notice in old.notices()}
    new = crew(broker, "new")[0]
    return old, new, held


def test_a_partition_is_handed_over_when_nothing_is_in_flight(broker: RunningBroker) -> None:
    old, new, held = in_hands(broker)
    going = old.notice()
    assert going.holding is Holding.REVOKING
    lease = held[going.partition]
    assert (going.lease, going.generation) == (lease.lease, lease.generation)
    # The old holder gets nothing more of it, the new one nothing yet.
    for partition in range(2):
        broker.raw("producer").publish("t", numbered(10, 2), partition=partition)
    more = old.deliver()
    assert (more.head.partition, more.offsets) == (1 - going.partition, [10, 11])
    assert old.silent(FrameType.DELIVER)
    assert new.silent(FrameType.DELIVER)
    assert new.notices() == []
    # What it has in its hands it may still acknowledge, bit by bit; the last bit hands the partition over.
    for offset in (4, 9):
        assert old.acked(lease, offset) is Code.OK
        assert new.notices() == []
    assert holders(broker)["t", going.partition] == "old"
    assert old.acked(lease, 10) is Code.OK
    assert kinds(old.notices()) == [(Holding.REVOKED, going.partition)]
    taken = new.assigned()
    assert (taken.partition, taken.offset) == (going.partition, 10)
    assert taken.generation > lease.generation
    assert taken.lease not in (lease.lease, 0)
    assert new.deliver().offsets == [10, 11]
    assert old.acked(lease, 10) is Code.STALE
    assert broker.counters()["revocations"] == 1


def test_release_gives_back_what_is_in_flight(broker: RunningBroker) -> None:
    old, new, held = in_hands(broker)
    going = old.notice().partition
    assert old.acked(held[going], 3) is Code.OK
    assert old.release("t", 1 - going).code is Code.OK  # that one is not being revoked: nothing happens
    assert old.notices() == []
    assert old.release("t", going).code is Code.OK
    assert kinds(old.notices()) == [(Holding.REVOKED, going)]
    # It was no failure: the rest comes at once and not one by one.
    assert new.assigned()[-1] == 3
    assert new.deliver().offsets == list(range(3, 10))
    assert old.acked(held[going], 10) is Code.STALE
    line = broker.http("GET", "/v1/groups/g")[1]["partitions"][going]
    assert (line["attempts"], line["reason"], line["committed"]) == (0, "", 3)
    assert broker.counters()["redeliveries"] == 0


def test_a_negative_acknowledgement_while_it_is_revoked(broker: RunningBroker) -> None:
    old, new, held = in_hands(broker)
    going = old.notice().partition
    assert old.nack(held[going], 3, "no") is Code.OK
    assert kinds(old.notices()) == [(Holding.REVOKED, going)]
    broker.advance(10)
    assert new.assigned()[-1] == 3
    assert new.deliver().offsets == [3]
    assert broker.http("GET", "/v1/groups/g")[1]["partitions"][going]["attempts"] == 1


def test_joining_again_while_it_is_revoked_begins_a_new_lease(broker: RunningBroker) -> None:
    old, new, held = in_hands(broker)
    going = old.notice().partition
    old.subscribe("t", "g", partition=going, start=Start.COMMITTED)
    assert old.acked(held[going], 10) is Code.STALE
    # It begins again and is revoked again.
    again = old.deliver()
    assert (again.head.partition, again.offsets) == (going, list(range(10)))
    assert kinds(old.notices()) == [(Holding.ASSIGNED, going), (Holding.REVOKING, going)]
    assert old.acked(again.head, 10) is Code.OK
    assert new.assigned()[-1] == 10


def test_the_newcomer_goes_before_it_got_anything(broker: RunningBroker) -> None:
    old, new, held = in_hands(broker)
    going = old.notice().partition
    new.leave("t")
    assert old.acked(held[going], 10) is Code.OK
    assert shares(broker) == {"old": 2}
    broker.raw("producer").publish("t", numbered(10, 1), partition=going)
    assert old.deliver().offsets == [10]
    assert new.silent(FrameType.DELIVER)


@pytest.mark.parametrize("partition", [-1, 0])
def test_leaving_gives_back_at_once_and_is_no_failure(broker: RunningBroker, partition: int) -> None:
    broker.raw().publish("t", numbered(0, 10))
    old, new = crew(broker, "old", "new")
    head = old.deliver().head
    assert old.acked(head, 2) is Code.OK
    assert old.leave("t", partition).code is Code.OK
    assert new.deliver().offsets == list(range(2, 10))
    assert old.acked(head, 10) is Code.STALE
    assert broker.counters()["redeliveries"] == 0
    # It says so itself and need not be told.
    assert [notice.holding for notice in old.notices()] == [Holding.ASSIGNED]
    new.leave("t")
    assert old.silent(FrameType.DELIVER)
    # Whoever left may come again.
    old.subscribe("t", "g", start=Start.COMMITTED)
    assert old.deliver().offsets == list(range(2, 10))


def test_the_last_member_leaves_a_single_partition(broker: RunningBroker) -> None:
    broker.raw().publish("t", numbered(0, 3))
    only = crew(broker, "only")[0]
    only.deliver()
    only.leave("t", 0)
    assert holders(broker) == {}
    other = crew(broker, "other")[0]
    assert other.deliver().offsets == [0, 1, 2]
    assert only.silent(FrameType.DELIVER)


def test_a_closed_connection_frees_at_once(broker: RunningBroker) -> None:
    old, new, held = in_hands(broker)
    going = old.notice().partition
    assert old.acked(held[going], 4) is Code.OK
    assert old.acked(held[1 - going], 7) is Code.OK
    old.close()
    # It may have died of one of the two records that it would have handled next: each comes as the only one in the
    # new member's hands, without a pause.
    found: dict[int, list[int]] = {}
    for _ in range(2):
        delivered = new.deliver()
        found[delivered.head.partition] = delivered.offsets
        assert new.silent(FrameType.DELIVER)
        assert new.acked(delivered.head, delivered.head.last + 1) is Code.OK
    assert found == {going: [4], 1 - going: [7]}
    assert sorted(new.deliver().offsets[0] for _ in range(2)) == [5, 8]
    lines = broker.http("GET", "/v1/groups/g")[1]["partitions"]
    assert [line["attempts"] for line in lines] == [0, 0]


def test_one_connection_one_group(broker: RunningBroker) -> None:
    broker.raw().publish("t", numbered(0, 1))
    client = crew(broker, "client")[0]
    for intent in Intent:
        assert client.subscribe_raw(Subscribe(intent, "other", 0, 0, [])).code is Code.STALE
    assert client.leave("t").code is Code.STALE  # said for the other group, as that was the last one named
    assert holders(broker) == {("t", 0): "client"}
    assert broker.http("GET", "/v1/groups/other")[0] == 404


def test_nothing_to_join_is_no_request(broker: RunningBroker) -> None:
    client = broker.raw()
    assert client.subscribe_raw(Subscribe(Intent.LEAVE, "g", 0, 0, [])).code is Code.OK
    client.send(frames.write_subscribe(9, Subscribe(Intent.JOIN, "g", 0, 0, [])))
    assert client.ended()


def test_what_the_broker_says_of_itself_is_not_for_clients(broker: RunningBroker) -> None:
    """A broker's SUBSCRIBE from a client is read as a client's, and is none."""
    client = broker.raw()
    line = frames.Assignment("t", 0, Holding.ASSIGNED, 1, 0)
    client.send(frames.write_assigned(frames.Assigned("g", 1, [line])))
    assert client.ended()


def test_the_kernel_is_told_to_notice_a_host_that_vanished(broker: RunningBroker) -> None:
    broker.raw()
    with broker.consumer(["t"], "g") as consumer:
        broker.create("t")
        link = consumer._subscriber.link
        while link._transport is None:
            assert not consumer.poll(0.01)
        sides = [session.transport._channel._socket for session in broker.call(lambda: list(broker.broker.sessions))]
        for sock in (*sides, link._transport._channel._socket):
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count, user = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT,
                )
            )  # fmt: skip
            assert idle + interval * count == 30
            assert user == 30_000
