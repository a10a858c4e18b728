"""What cannot be removed is held by somebody with a name: who is gone holds up nobody else for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgebroker.broker.holders import GIVE_UP_SECONDS
from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from tests.kit.brokers import RunningBroker, numbered, running
from tests.kit.trees import Tree, end, follows, line, publish, run
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

BUDGET = {
    "storage__max_bytes": 600_000,
    "storage__soft_free_bytes": 0,
    "storage__hard_free_bytes": 0,
    "limits__idle_timeout_ms": 10_000_000,
}


@pytest.fixture
def root(tree: Tree) -> Iterator[RunningBroker]:
    """With a child that has all of topic t, and is gone."""
    root = tree.start("root", **BUDGET)
    for number in range(10):
        publish(root, "t", number * 10, 10, size=1000)
    follows(root, tree.start("l2", "root"), "t")
    root.advance(121.0)
    wait_for(lambda: holder(root)["bytes"] == 0, "it has asked again")
    tree.stop("l2")
    return root


def holder(node: RunningBroker) -> dict[str, object]:
    found: list[dict[str, object]] = node.http("GET", "/v1/holders")[1]["holders"]
    return found[0] if found else {"bytes": -1}


def problems(node: RunningBroker) -> dict[str, str]:
    found: dict[str, str] = node.http("GET", "/v1/node")[1]["problems"]
    return found


def fill(node: RunningBroker) -> int:
    """Publish until producers are refused; how many records were taken."""
    client, taken = node.raw("filler"), 0
    for number in range(100):
        if client.publish("t", numbered(number, 10, 1000)).code is Code.DISK_FULL:
            break
        taken += 10
        node.advance(1.1)
    node.drop(client)
    return taken


def test_a_dead_child_is_named_and_given_up(
    tree: Tree, root: RunningBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = fill(root)
    assert taken > 200
    told = problems(root)["disk_full"]
    assert "child l2 (silent for" in told
    assert "bytes; " not in told or "held:" in told
    assert "storage.max_bytes is 600,000 bytes" in told
    status, children = run(root, capsys, "child", "list")
    assert (status, [one["name"] for one in children], children[0]["bytes"] > 300_000) == (0, ["l2"], True)
    root.advance(GIVE_UP_SECONDS)
    root.advance(1.1)
    wait_for(lambda: refreshed(root, "disk_full" not in problems(root)), "writing goes on")
    assert root.counters()["holders_given_up"] == 1
    assert "removed_early" in problems(root)
    publish(root, "t", 0, 1)
    child = tree.start("l2", "root")
    follows(root, child, "t")
    assert child.broker.engine.log("t", 0).identity.gaps != []  # type: ignore[union-attr]


def refreshed(node: RunningBroker, result: bool) -> bool:
    """The result; a second passes before the next look."""
    node.advance(1.1)
    return result


def test_a_child_that_is_gone_for_good_is_forgotten(root: RunningBroker, tree: Tree) -> None:
    fill(root)
    assert main(["child", "forget", "nobody", "--admin", tree.admin("root")]) == 1
    assert main(["child", "forget", "l2", "--admin", tree.admin("root")]) == 0
    root.advance(1.1)
    assert holder(root) == {"bytes": -1}
    # Nobody has read what is there now: it stays, and producers wait.
    assert "disk_full" in problems(root)


def test_who_is_connected_is_never_given_up(tree: Tree, root: RunningBroker) -> None:
    with root.consumer(["t"], "tills", start="earliest", timeout=10.0) as consumer:
        consumer.poll(1.0)
        fill(root)
        root.advance(GIVE_UP_SECONDS)
        for _ in range(5):
            root.advance(1.1)
        assert "disk_full" in problems(root)
        assert "group tills (connected)" in problems(root)["disk_full"]
        assert root.broker.engine.log("t", 0).log_start == 0  # type: ignore[union-attr]


def test_a_silent_holder_holds_as_long_and_as_much_as_the_topic_says(root: RunningBroker) -> None:
    fill(root)
    assert root.http("PATCH", "/v1/topics/t", {"hold_bytes": 100_000})[0] == 200
    wait_for(lambda: refreshed(root, "disk_full" not in problems(root)), "writing goes on")
    assert root.counters()["holders_given_up"] == 0


def test_everything_is_kept_where_that_is_wanted(tree: Tree) -> None:
    root = tree.start("root", storage__on_full="refuse", **BUDGET)
    publish(root, "t", 0, 10, size=1000)
    follows(root, tree.start("l2", "root"), "t")
    fill(root)
    root.advance(121.0)
    follows(root, tree.nodes["l2"], "t")
    for _ in range(5):
        root.advance(1.1)
    assert "disk_full" in problems(root)
    assert root.broker.engine.log("t", 0).log_start == 0  # type: ignore[union-attr]


def test_active_segments_that_all_have_read_go(tree: Tree) -> None:
    """The budget is smaller than the active segments together."""
    settings = {"storage.max_bytes": 500_000, "storage.segment_bytes": 1 << 20, "storage.soft_free_bytes": 0,
                "storage.hard_free_bytes": 0}  # fmt: skip
    with running(tree.directory / "alone", settings) as node:
        for _ in range(6):
            for topic in ("a", "b", "c"):
                client = node.raw("producer")
                for number in range(5):
                    published(node, client, topic, number)
                node.drop(client)
                with node.consumer([topic], "g", start="earliest", timeout=10.0) as consumer:
                    goal = node.broker.engine.log(topic, 0).durable_end  # type: ignore[union-attr]
                    wait_for(lambda consumer=consumer, goal=goal: read(consumer) >= goal, "it reads")  # type: ignore[misc]
                    consumer.commit()
        assert "removed_early" in problems(node)
        assert "disk_full" not in problems(node)


def published(node: RunningBroker, client: object, topic: str, number: int) -> None:
    def try_again() -> bool:
        node.advance(1.1)
        code = client.publish(topic, numbered(number * 10, 10, 1000)).code  # type: ignore[attr-defined]
        assert code in (Code.OK, Code.DISK_FULL)
        return bool(code is Code.OK)

    wait_for(try_again, "it is taken")


def read(consumer: object) -> int:
    records = consumer.poll(0.1)  # type: ignore[attr-defined]
    if records:
        consumer.ack(records[-1])  # type: ignore[attr-defined]
    return max(consumer.next_offsets().values(), default=-1)  # type: ignore[attr-defined]


def test_the_line_of_a_child(tree: Tree, root: RunningBroker) -> None:
    child = tree.start("l2", "root")
    follows(root, child, "t")
    assert line(child, "t")["state"] == "live"
    assert end(child, "t") == 100
    # It may have lost its connection when the clock went on.
    wait_for(lambda: holder(root)["silent_seconds"] == 0, "it is connected")
