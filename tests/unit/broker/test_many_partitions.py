"""A member may hold thousands of partitions: what is done about all of them is done in many turns, and others go on.

Turns are as short as can be here: one step in each, beyond two partitions that are dealt with at once.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebroker.broker.delivery import membership, push
from edgebroker.broker.delivery.state import Group
from edgebroker.common import batch
from edgebroker.common.messages import Holding, Wanted
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import Start, TopicSettings
from tests.kit.memory_core import TOPIC, MemoryCore, MemorySession

GROUP, PARTITIONS = "labels", 40
OPERATIONS = ("join", "again", "vanish", "leave", "publish", "acknowledge", "turn", "turns")


class Stand:
    """A broker with one topic of many partitions, and who uses it."""

    def __init__(self) -> None:
        self.world = MemoryCore()
        self.core, self.scheduler = self.world.core, self.world.scheduler
        done: list[Outcome] = []
        wanted = TopicSettings(partitions=PARTITIONS)
        self.core.engine.create_topic(TOPIC, wanted, lambda outcome, _: done.append(outcome))
        self.world.run()
        assert done == [Outcome.OK]
        self.publisher = self.world.session("till")
        self.members: list[MemorySession] = []
        self.published = Counter[int]()

    @property
    def group(self) -> Group:
        return self.core.groups.group(GROUP, self.scheduler.now())

    def join(self, start: Start = Start.EARLIEST) -> MemorySession:
        member = self.world.session(f"labels-{len(self.members)}")
        self.members.append(member)
        member.join(GROUP, self.scheduler.now(), start)
        return member

    def publish(self, partition: int) -> None:
        number = sum(self.published.values())
        data = batch.encode([(None, b"%d:%d" % (partition, self.published[partition]), 1000)])
        self.publisher.publish(number, data, partition=partition)
        self.published[partition] += 1

    def turn(self) -> None:
        self.scheduler.turn()
        self.core.membership.rebalance()
        self.core.push.end_iteration()

    def turns(self, count: int = 400) -> None:
        for _ in range(count):
            self.turn()

    def committed(self) -> dict[int, int]:
        return {key[1]: found.next_offset for key, found in self.group.committed_offsets.items()}


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    short_turns(monkeypatch)
    return Stand()


def short_turns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(membership, "SLICE_SECONDS", -1.0)
    patch.setattr(membership, "AT_ONCE", 2)
    patch.setattr(push, "SLICE_SECONDS", -1.0)
    patch.setattr(push, "TURN_SECONDS", -1.0)


def test_partitions_are_handed_out_over_many_turns(stand: Stand) -> None:
    member = stand.join()
    stand.turn()
    assert len(member.cursors) == 0
    stand.turns(10)
    assert 0 < len(member.cursors) < PARTITIONS
    stand.turns()
    assert len(member.cursors) == PARTITIONS


def test_latest_is_when_it_was_said(stand: Stand) -> None:
    stand.publish(PARTITIONS - 1)
    stand.turns()
    member = stand.join(Start.LATEST)
    stand.turn()
    stand.publish(PARTITIONS - 1)
    stand.turns()
    assert member.values == [(1, b"39:1")]
    assert stand.committed()[PARTITIONS - 1] == 1


def test_what_is_said_about_what_it_holds_counts_for_all_of_it(stand: Stand) -> None:
    member = stand.join()
    for partition in range(PARTITIONS):
        stand.publish(partition)
    stand.turns()
    member.acknowledge_all()
    assert set(stand.committed().values()) == {1}
    member.values.clear()
    member.held.clear()
    member.join(GROUP, stand.scheduler.now(), Start.EARLIEST)
    stand.publish(PARTITIONS - 1)
    stand.turns(3)
    last = ((TOPIC, PARTITIONS - 1), Holding.ASSIGNED)
    assert last not in member.held and b"39:1" not in [value for _, value in member.values], "the lease is over"
    stand.turns()
    expected = [*(b"%d:0" % n for n in range(PARTITIONS)), b"39:1"]
    assert last in member.held and sorted(str(value) for _, value in member.values) == sorted(map(str, expected))


def test_what_is_given_back_before_it_comes_does_not_come(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "AT_ONCE", 100)  # it is not looked at again before all are given
    member = stand.join()
    stand.turns(5)
    assert 0 < len(member.cursors) < PARTITIONS - 1
    last = Wanted(TOPIC, PARTITIONS - 1, Start.COMMITTED, bytes(16), -1, 0)
    stand.core.membership.leave(member, stand.group, [last])
    stand.turns()
    assert set(member.cursors) == {(TOPIC, number) for number in range(PARTITIONS - 1)}


def test_who_vanishes_leaves_nothing_behind(stand: Stand) -> None:
    """In the middle of being given its partitions; the next one gets all, with what was in flight."""
    for partition in range(PARTITIONS):
        stand.publish(partition)
    stand.turns()
    first = stand.join()
    stand.turns(PARTITIONS // 2)
    assert 0 < len(first.cursors) < PARTITIONS
    first.leave()
    second = stand.join(Start.COMMITTED)
    for _ in range(PARTITIONS):  # one at a time: at one of them the other member may have fallen silent
        stand.turns(100)
        second.acknowledge_all()
    assert not first.cursors and len(second.cursors) == PARTITIONS
    assert sorted(value for _, value in second.values) == sorted(b"%d:0" % n for n in range(PARTITIONS))


def test_who_comes_back_at_once_begins_where_it_says(stand: Stand) -> None:
    """What it held is not free yet, but nobody's."""
    first = stand.join(Start.EARLIEST)
    stand.turns()
    for partition in range(PARTITIONS):
        stand.publish(partition)
    stand.turns()
    first.acknowledge_all()
    first.leave()
    second = stand.join(Start.EARLIEST)
    stand.turns()
    assert len(second.values) == PARTITIONS


def test_a_node_that_stops_deals_with_the_rest_at_once(stand: Stand) -> None:
    member = stand.join()
    stand.turn()
    stand.core.membership.freeze()
    assert len(member.cursors) == PARTITIONS
    assert [holding for _, holding in member.held] == [Holding.ASSIGNED] * PARTITIONS
    member.leave()
    stand.turns()
    assert stand.committed() == dict.fromkeys(range(PARTITIONS), 0)


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 1 << 16)), max_size=40))
def test_whatever_falls_into_the_middle(operations: list[tuple[str, int]]) -> None:
    """In the end every partition has one holder, each member its share, and every record was handled."""
    with pytest.MonkeyPatch.context() as patch:
        short_turns(patch)
        stand = Stand()
        for operation, choice in operations:
            member = stand.members[choice % len(stand.members)] if stand.members else None
            if operation == "join" and len(stand.members) < 4:
                stand.join(list(Start)[choice % 2])
            elif operation == "publish":
                stand.publish(choice % PARTITIONS)
            elif operation == "turn":
                stand.turn()
            elif operation == "turns":
                stand.turns(choice % 30)
            elif member is not None and operation == "again":
                member.join(GROUP, stand.scheduler.now(), Start.EARLIEST)
            elif member is not None and operation == "acknowledge":
                member.acknowledge_all()
            elif member is not None and operation in ("vanish", "leave"):
                stand.members.remove(member)
                member.leave()
        if not stand.members:
            stand.join(Start.COMMITTED)
        for _ in range(4):
            stand.turns()
            for member in stand.members:
                member.acknowledge_all()
        held = [len(member.cursors) for member in stand.members]
        assert sum(held) == PARTITIONS and max(held) - min(held) <= 1
        holders = {key: cursor for member in stand.members for key, cursor in member.cursors.items()}
        assert holders == stand.group.holders
        assert list(stand.group.members) == stand.members
        assert stand.core.membership.wanted == PARTITIONS * len(stand.members)
        assert stand.committed() == {partition: stand.published[partition] for partition in range(PARTITIONS)}
        assert stand.core.groups.offsets == PARTITIONS
