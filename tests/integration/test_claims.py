"""A child that says it has more than the origin is believed when it shows it; anybody can say so."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from edgebroker.broker.publish.publishing import CLAIM_SECONDS
from edgebroker.common.errors import Code
from edgebroker.common.records import chain as chain_over
from tests.integration.test_topic_undelete import problems
from tests.integration.test_tree_faults import polled
from tests.kit.brokers import RunningBroker, batch_of, numbered
from tests.kit.trees import Tree, end, follows, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tree: Tree) -> Iterator[RunningBroker]:
    root = tree.start("root")
    publish(root, "prices", 0, 10)
    yield root


def stored(root: RunningBroker, base: int, *, epoch: int | None = None) -> bytes:
    """A batch as this node would have stored it at an offset."""
    log = root.broker.engine.log("prices", 0)
    assert log is not None
    made = bytearray(batch_of(b"price=1"))
    made[0:8] = base.to_bytes(8, "big")
    made[12:16] = (log.epoch if epoch is None else epoch).to_bytes(4, "big")
    return bytes(made)


def claim(root: RunningBroker, offset: int, chain: int, beyond: bytes = b"", uid: str = "ee" * 16) -> None:
    """The poll of a node that says it has the log up to an offset."""
    log = root.broker.engine.log("prices", 0)
    assert log is not None
    line: list[Any] = ["prices", 0, log.identity.log_id, log.epoch, offset, chain, 0, [], True]
    line.append(base64.b64encode(beyond).decode())
    with polled(root, logs=[line], topics=["prices"], uid=uid) as answer:
        assert answer.status == 200
        wait_for(lambda: b"BEHIND" in answer.read1(1 << 16), "it is told")


def test_an_invented_poll_does_not_stop_publishing(root: RunningBroker) -> None:
    """The log waits for what is to be shown, for a few seconds and once; then it goes on."""
    producer = root.raw("producer")
    claim(root, 1 << 40, 7)
    answer = producer.publish("prices", numbered(10, 1))
    assert (answer.code, "is asked to show it; try again soon" in answer.message) == (Code.OVERLOADED, True)
    assert producer.publish("items", numbered(0, 1)).code is Code.OK, "other logs are not concerned"
    root.advance(CLAIM_SECONDS)
    assert producer.publish("prices", numbered(10, 1)).offset == 10
    for number in range(5):
        claim(root, (1 << 40) + number, number, uid=f"{number:032x}")
        assert producer.publish("prices", numbered(11 + number, 1)).offset == 11 + number
    assert root.http("GET", "/readyz")[1] == {
        "status": "ok",
        "checks": {"started": "ok", "storage": "ok"},
        "warnings": {},
    }


def test_what_is_shown_has_to_fit(root: RunningBroker) -> None:
    log = root.broker.engine.log("prices", 0)
    assert log is not None
    before = log.chain_at(10)
    assert before is not None
    good = stored(root, 10)
    reached = chain_over(good, before)
    spoilt = good[:-1] + bytes([good[-1] ^ 1])
    for offset, chain, beyond in (
        (11, reached, b""),
        (11, reached, b"garbage"),
        (11, reached, good[:-1]),
        (11, reached, good + b"x"),
        (11, reached, spoilt),
        (11, reached ^ 1, good),
        (12, reached, stored(root, 11)),
        (10 + (1 << 40), 7, stored(root, 9)),
    ):
        claim(root, offset, chain, beyond)
        assert "history_lost" not in problems(root), (offset, beyond)
    claim(root, 11, reached, good)
    assert "history_lost" in problems(root)
    assert root.raw("producer").publish("prices", numbered(10, 1)).code is Code.HISTORY_LOST
    # A larger claim is believed no more than a first one.
    claim(root, 1 << 40, 7)
    assert "up to 11:" in problems(root)["history_lost"]


def test_many_logs_are_shown_in_several_polls(tree: Tree) -> None:
    """Together they are larger than what one poll shows: all are told before the time of the restored root is over."""
    root = tree.start("root")
    names = [f"t{number}" for number in range(8)]
    for name in names:
        publish(root, name, 0, 3)
    child = tree.start("l2", "root")
    for name in names:
        follows(root, child, name)
    tree.stop("root")
    tree.keep("root")
    root = tree.start("root")
    for name in names:
        assert root.raw(f"p-{name}").publish(name, batch_of(b"x" * 300_000)).code is Code.OK
        follows(root, child, name)
    tree.stop("root")
    tree.put_back("root")
    root = tree.start("root")
    wait_for(lambda: all(name in problems(root).get("history_lost", "") for name in names), "all are told")
    for name in names:
        assert root.raw(f"q-{name}").publish(name, numbered(0, 1)).code is Code.HISTORY_LOST
        assert (end(root, name), end(child, name)) == (3, 4)


def test_a_poll_with_too_much_to_show(root: RunningBroker) -> None:
    log = root.broker.engine.log("prices", 0)
    assert log is not None
    for beyond in (base64.b64encode(bytes((5 << 20) + 1)).decode(), "not base64", 7):
        line = ["prices", 0, log.identity.log_id, log.epoch, 99, 1, 0, [], True, beyond]
        body = {"version": 1, "uid": "ee" * 16, "name": "x", "level": "local", "topics": ["*"], "logs": [line]}
        status, answer = root.pipe("POST", "/v1/pipe", body)
        assert (status, answer["error"].startswith("the body is not as expected")) == (400, True), json.dumps(beyond)[
            :20
        ]
