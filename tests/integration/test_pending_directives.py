"""What the root directs arrives below, over lost nodes and restarts, or is reported."""

from __future__ import annotations

from typing import Any

import pytest

from edgebroker.cli.main import main
from tests.integration.test_fleet_evidence import silent
from tests.integration.test_registry import until
from tests.kit.brokers import RunningBroker
from tests.kit.trees import Tree, follows, publish, run
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

ORDER = "5" * 32


def grown(tree: Tree) -> RunningBroker:
    """Root, hub and terminal have topic t, and the root knows both."""
    root = tree.start("root")
    publish(root, "t", 0, 5)
    follows(root, tree.start("l2", "root"), "t")
    follows(root, tree.start("local", "l2"), "t")
    until(tree, lambda: silent(root, "local") == -1, "the root knows the terminal")
    return root


def order(root: RunningBroker, uid: str, topic: str = "t") -> int:
    return root.http("POST", "/v1/resyncs", {"type": "resync", "id": ORDER, "uid": uid, "topic": topic})[0]


def orders(root: RunningBroker) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = root.http("GET", "/v1/resyncs")[1]["pending"]
    return found


def states(node: RunningBroker) -> list[str]:
    return [one["state"] for one in node.http("GET", "/v1/resyncs")[1]["resyncs"]]


def test_an_order_for_a_node_that_is_away_waits_for_it(tree: Tree) -> None:
    """Over a restart of the root as well."""
    root = grown(tree)
    uid = tree.nodes["local"].broker.engine.node_uid
    tree.stop("local")
    assert order(root, uid) == 200
    assert [(one["name"], one["topic"]) for one in orders(root)] == [("local", "t")]
    tree.stop("root")
    root = tree.start("root")
    assert [one["uid"] for one in orders(root)] == [uid]
    local = tree.start("local", "l2")
    until(
        tree, lambda: [one["state"] for one in local.http("GET", "/v1/resyncs")[1]["resyncs"]] == ["done"], "it comes"
    )
    until(tree, lambda: not orders(root), "the root knows")


def test_a_refusal_is_an_answer(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree)
    assert order(root, tree.nodes["local"].broker.engine.node_uid, "nothing") == 200
    until(tree, lambda: not orders(root), "it is answered")
    found = run(root, capsys, "tree", "--all")[1]
    (told,) = next(one["resyncs"] for one in found if one["name"] == "local")
    assert told[2] == "failed: nothing is not mirrored at this node"


def test_the_command_ends_when_a_node_is_lost(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody waits two hours for who is gone; its order stays."""
    root = grown(tree)
    tree.stop("local")
    wait_for(lambda: silent(root, "local") >= 0, "it is gone")
    root.advance(90.0)
    assert main(["resync", "--topic", "t", "--node", "local", "--admin", tree.admin("root")]) == 1
    assert "not reached, silent for 90 s" in capsys.readouterr().out.replace("91 s", "90 s").replace("2 min", "90 s")
    assert main(["resync", "--status", "--admin", tree.admin("root")]) == 0
    assert "local" in capsys.readouterr().out
