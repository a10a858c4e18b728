"""Directives arrive, or are given up with their time: over lost nodes, refusals, restarts and full disks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgebroker.broker.fleet import pending_directives as module
from edgebroker.broker.fleet.pending_directives import MOST_PENDING, PendingDirectives
from edgebroker.common.outcome import Outcome
from edgebroker.pipe.fleet import Fleet
from edgebroker.pipe.report import NodeState, Report, ResyncDirective, ResyncReport
from tests.kit.clock import ManualClock, ManualScheduler
from tests.kit.waiting import wait_for

TOP = "f" * 32


def uid(number: int) -> str:
    return f"{number:032x}"


class World:
    """Nodes that answer what reaches them, unless they are lost."""

    def __init__(self, path: Path, nodes: int) -> None:
        self.path, self.clock = path, ManualClock()
        self.scheduler = ManualScheduler(self.clock)
        self.fleet = Fleet(TOP)
        self.lost: set[str] = set()
        self.refusing: set[str] = set()
        self.got: dict[str, list[str]] = {}
        self.numbers: dict[str, int] = {}
        for number in range(nodes):
            self.say(uid(number))
        self.begin()

    def begin(self) -> None:
        self.pending = PendingDirectives(self.path, self.scheduler, self.fleet, self.send)
        self.pending.start()

    def send(self, order: ResyncDirective) -> bool:
        if order.uid in self.lost:
            return False
        self.got.setdefault(order.uid, []).append(order.id)
        state = "failed: it has no parent" if order.uid in self.refusing else "done"
        self.say(order.uid, ResyncReport(order.id, order.topic, state))
        return True

    def say(self, node: str, *resyncs: ResyncReport) -> None:
        number = self.numbers[node] = self.numbers.get(node, 0) + 1
        report = Report(
            uid=node, name=f"n{int(node, 16)}", level="local", version="1", boot="0" * 16, number=number,
            parent=TOP, resyncs=list(resyncs),
        )  # fmt: skip
        state = NodeState(report=msgspec.Raw(msgspec.json.encode(report)))
        self.fleet.take(state, node, self.scheduler.now())

    def give(self, number: int, node: str, seconds: float = 60.0) -> list[Outcome]:
        found: list[Outcome] = []
        order = ResyncDirective(id=uid(number << 24), uid=node, topic="t")
        self.pending.give(order, seconds, lambda outcome, message: found.append(outcome))
        return found

    def settle(self, condition: Callable[[], object]) -> None:
        def look() -> object:
            self.scheduler.turn()
            return condition()

        wait_for(look, "it is stored")

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.clock.advance(1.0)
            self.scheduler.turn()


def test_two_thousand_nodes_of_which_some_are_lost_and_some_refuse(tmp_path: Path) -> None:
    """Each is answered, or given up when its time is over."""
    world = World(tmp_path, 2000)
    world.lost = {uid(number) for number in range(0, 2000, 20)}
    world.refusing = {uid(number) for number in range(1, 2000, 20)}
    given = [world.give(number + 1, uid(number)) for number in range(2000)]
    world.settle(lambda: all(given))
    assert {one[0] for one in given} == {Outcome.OK}
    world.pass_time(6)
    left = world.pending.describe()
    assert {one.uid for one in left} == world.lost
    assert all(len(got) == 1 for got in world.got.values()), "who answered is not asked again"
    found = {uid(0), uid(20)}
    world.lost -= found
    world.pass_time(12)
    assert {one.uid for one in world.pending.describe()} == world.lost
    assert found <= set(world.got)
    world.pass_time(60)
    assert world.pending.describe() == []
    world.pending.stop()


def test_an_answer_to_what_can_be_no_directive(tmp_path: Path) -> None:
    """A report that tells of one is not taken, and holds no other up."""
    world = World(tmp_path, 2)
    world.lost = {uid(0)}
    given = [world.give(1, uid(0)), world.give(2, uid(1))]
    with pytest.raises(msgspec.DecodeError):
        world.say(uid(0), ResyncReport("prices", "prices", "done"))
    world.settle(lambda: all(given))
    world.pass_time(6)
    assert [one.uid for one in world.pending.describe()] == [uid(0)]
    world.pending.stop()


def test_directives_outlive_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.lost = {uid(0), uid(1)}
    given = [world.give(1, uid(0), 100.0), world.give(2, uid(1), 10.0)]
    world.settle(lambda: all(given))
    world.pass_time(5)
    world.pending.stop()
    world.begin()
    assert {one.uid: round(one.seconds_left) for one in world.pending.describe()} == {uid(0): 95, uid(1): 5}
    world.lost.clear()
    world.pass_time(12)
    assert world.pending.describe() == []
    assert world.got[uid(0)]
    world.pending.stop()


def test_what_cannot_be_stored_is_not_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    world = World(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_checked", fail)
        given = world.give(1, uid(0))
        world.settle(lambda: given)
    assert given == [Outcome.READ_ONLY]
    world.pending.stop()


def test_nobody_and_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 2)
    world.lost = {uid(0)}
    assert world.give(1, uid(7)) == [Outcome.NOT_FOUND]
    assert MOST_PENDING > 65_536
    monkeypatch.setattr(module, "MOST_PENDING", 1)
    world.give(2, uid(0))
    assert world.give(3, uid(1)) == [Outcome.OVERLOADED]
    world.pending.stop()
