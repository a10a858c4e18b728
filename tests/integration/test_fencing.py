"""Two origins of one log: the promoted node finds the old one, which takes no more records."""

from __future__ import annotations

from typing import Any

import pytest

from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from tests.integration.test_registry import until
from tests.integration.test_topic_undelete import problems
from tests.kit.brokers import RunningBroker, batch_of
from tests.kit.trees import Tree, end, follows, grown, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


def try_to_publish(node: RunningBroker) -> Any:
    client = node.raw("producer")
    found = client.publish("t", batch_of(b"one more"))
    node.drop(client)
    return found


def promoted(tree: Tree) -> RunningBroker:
    """The root is lost, the hub is promoted and writes."""
    grown(tree)
    hub = tree.nodes["l2"]
    tree.stop("root")
    assert hub.http("POST", "/v1/promote", {"level": "root"})[0] == 200
    publish(hub, "t", 200, 3)
    return hub


def test_an_old_root_that_comes_back_takes_no_records(tree: Tree) -> None:
    hub = promoted(tree)
    root = tree.start("root")
    until(tree, lambda: "superseded" in problems(root), "the old one knows", step=1.0)
    refused = try_to_publish(root)
    assert (refused.code, "is written by node l2 now" in refused.message) == (Code.NOT_ORIGIN, True)
    until(tree, lambda: "two_origins" in problems(hub), "the new one knows", step=1.0)
    assert f"root at {tree.address('root')}: t" in problems(hub)["two_origins"]
    publish(root, "own", 0, 1)  # a topic that the hub never had is still its own
    tree.stop("root")
    until(tree, lambda: "two_origins" not in problems(hub), "it is over", step=1.0)
    root = tree.start("root", "l2", level="l3")
    follows(hub, root, "t")
    assert end(root, "t") == 203
    assert "superseded" not in problems(root)


def test_over_a_restart_of_the_promoted_node(tree: Tree) -> None:
    promoted(tree)
    tree.stop("l2")
    root = tree.start("root")
    assert try_to_publish(root).code is Code.OK, "nobody has told it yet"
    tree.start("l2", "root")
    until(tree, lambda: "superseded" in problems(root), "the old one knows", step=1.0)
    assert try_to_publish(root).code is Code.NOT_ORIGIN


def test_a_promotion_that_is_undone_lifts_it(tree: Tree) -> None:
    grown(tree)
    root, hub = tree.nodes["root"], tree.nodes["l2"]
    assert hub.http("POST", "/v1/promote", {"level": "l2"})[0] == 200
    until(tree, lambda: "superseded" in problems(root), "the root knows", step=1.0)
    assert hub.http("DELETE", "/v1/promote")[0] == 200
    wait_for(lambda: problems(root) == {}, "the root writes again")
    assert try_to_publish(root).code is Code.OK


def test_who_is_of_no_such_history_is_left_alone(tree: Tree) -> None:
    root = grown(tree)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    request = {"uid": "a" * 32, "name": "x"}
    for logs in (
        [["t", 0, "b" * 32, 9]],
        [["t", 7, log.identity.log_id, 9]],
        [["u", 0, log.identity.log_id, 9]],
        [["t", 0, log.identity.log_id, log.identity.epoch]],
    ):
        assert root.pipe("POST", "/v1/fence", {**request, "logs": logs}) == (200, {"name": "root", "topics": []})
    assert root.pipe("POST", "/v1/fence", {**request, "logs": [["t", -1, "b", 9]]})[0] == 400
    assert problems(root) == {}
    assert try_to_publish(root).code is Code.OK


def test_the_command_shows_first_what_it_would_do(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    grown(tree)
    hub, command = tree.nodes["l2"], ["promote", "--admin", tree.admin("l2")]
    assert main(command) == 2
    assert (
        "the origin of 1 topic at level root. The parent root is CONNECTED: it is not lost" in capsys.readouterr().err
    )
    tree.stop("root")
    wait_for(lambda: "parent" in hub.http("GET", "/readyz")[1]["warnings"], "it is lost")
    assert main(command) == 2
    assert "is not connected, last contact" in capsys.readouterr().err
    assert hub.broker.mirroring.level == "l2"
    assert main([*command, "--yes"]) == 0
    assert hub.broker.mirroring.level == "root"
    publish(hub, "t", 200, 1)
