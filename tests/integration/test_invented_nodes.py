"""What nodes that somebody invents can make of a node: nothing is forgotten for them, and what they cost is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from edgebroker.broker.feed import downstream
from edgebroker.pipe.stream import LogPosition, Poll
from tests.integration.test_tree_faults import polled
from tests.kit.brokers import RunningBroker
from tests.kit.trees import Tree, publish

pytestmark = pytest.mark.slow
END = 10


@pytest.fixture
def root(tree: Tree) -> Iterator[RunningBroker]:
    root = tree.start("root", pipe__max_children=3)
    publish(root, "t", 0, END)
    yield root


def ask(root: RunningBroker, name: str, offset: int, **more: Any) -> None:
    """As a child's poll is taken, once it was compared."""
    log = root.broker.engine.log("t", 0)
    assert log is not None
    line = LogPosition("t", 0, log.identity.log_id, log.epoch, offset, 0)
    poll = Poll(uid=name.encode().hex().ljust(32, "0")[:32], name=name, level="l2", topics=["*"], logs=[line], **more)
    root.call(lambda: root.broker.downstream.asked(poll, log, line))


def places(root: RunningBroker) -> dict[str, int]:
    log = root.broker.engine.log("t", 0)
    assert log is not None
    now = root.broker.loop.now()
    return root.call(lambda: {name: offset for _, name, offset, _ in root.broker.downstream.places(log, now)})


def test_a_child_that_has_something_to_fetch_keeps_its_place(root: RunningBroker) -> None:
    ask(root, "store-17", 4)
    ask(root, "all of it", END)
    for number in range(20):
        ask(root, f"invented-{number}", 0)
    assert places(root) == {"store-17": 4, "invented-0": 0, "invented-1": 0}
    ask(root, "store-17", 7)
    assert places(root)["store-17"] == 7


def test_places_and_pins_of_all_logs(root: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downstream, "MOST_PLACES", 2)
    monkeypatch.setattr(downstream, "MOST_PINS", 2)
    for number in range(5):
        ask(root, f"child-{number}", number)
        ask(root, f"copy-{number}", number + 1, pin=True)
    assert places(root) == {"child-0": 0, "child-1": 1}
    log = root.broker.engine.log("t", 0)
    assert log is not None
    pins = root.broker.downstream._pins[log]
    assert [offset for offset, _ in pins.values()] == [1, 2]
    root.advance(downstream.PIN_SECONDS + 1.0)
    ask(root, "later", 5, pin=True)
    assert [offset for offset, _ in pins.values()] == [5], "what is over makes room"


def test_patterns_that_take_long_are_refused(root: RunningBroker) -> None:
    with polled(root, topics=["a*" * 100] * 30) as answer:
        assert answer.status == 400
        assert b"the patterns with wildcards have more than 4096 characters together" in answer.read()
    with polled(root, topics=["a*"] * 1000) as answer:
        assert answer.status == 200
