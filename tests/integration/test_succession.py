"""The root is lost: a hub that kept a copy of the registry is promoted, and the tree goes on below it."""

from __future__ import annotations

from typing import Any

import pytest

from edgebroker.cli.main import main
from edgebroker.pipe.report import ResyncDirective
from tests.integration.test_registry import joins, nodes, parent, pass_time, root_of, until
from tests.integration.test_topic_undelete import problems
from tests.kit.brokers import RunningBroker
from tests.kit.trees import Tree, follows, pipe, publish, run

pytestmark = pytest.mark.slow


def grown(tree: Tree) -> RunningBroker:
    """ROOT with its registry, two hubs, a store below the first, a terminal below that; all of it by the registry."""
    root = root_of(tree)
    publish(root, "t", 0, 100)
    for hub in ("hub-a", "hub-b"):
        joins(tree, hub, "root", level="l2", **{"node.region": "eu"})
    joins(tree, "store", "hub-a", level="pos", **{"node.region": "eu/1"})
    joins(tree, "till", "store", level="local", **{"node.region": "eu/1"})
    return root


def standby(node: RunningBroker) -> dict[str, Any]:
    found: dict[str, Any] = node.http("GET", "/v1/registry/standby")[1]
    return found


def in_step(tree: Tree, *hubs: str) -> None:
    """The hubs have the copy that the root has now."""
    pass_time(tree, 6.0)
    root = tree.nodes["root"].broker.tree.registrar
    assert root is not None
    until(
        tree,
        lambda: (
            {tree.nodes[hub].broker.tree.standby.digest for hub in hubs} == {root.copy.digest}
            and root.topology.standbys == {tree.nodes[hub].broker.engine.node_uid for hub in ("hub-a", "hub-b")}
        ),
        "the copies",
    )


def test_a_standby_takes_over(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """Registry, pins, drains, removals, directives and children: all of it goes on below the new root."""
    root = grown(tree)
    uids = {name: node.broker.engine.node_uid for name, node in tree.nodes.items()}
    assert run(root, capsys, "node", "pin", "store", "hub-a") == (0, {})
    in_step(tree, "hub-a", "hub-b")
    until(tree, lambda: tree.address("hub-b") in pipe(tree.nodes["hub-a"])["parent"]["candidates"], "peers", 10.0)
    assert {hub["name"] for hub in standby(tree.nodes["hub-b"])["hubs"]} == {"hub-a", "hub-b"}
    tree.stop("till")
    directive = ResyncDirective(id="5" * 32, uid=uids["till"], topic="t")
    root.call(lambda: root.broker.tree.pending.give(directive, 9e5, lambda *told: None))
    assert run(root, capsys, "node", "drain", "hub-b") == (0, {})
    assert run(root, capsys, "node", "undrain", "hub-b") == (0, {})
    in_step(tree, "hub-a", "hub-b")
    tree.stop("root")

    hub = tree.nodes["hub-b"]
    assert hub.http("POST", "/v1/promote", {"level": "root"})[0] == 200
    publish(hub, "t", 100, 5)
    until(tree, lambda: parent(tree.nodes["hub-a"]) == "hub-b", "the other hub follows", step=1.0)
    follows(hub, tree.nodes["store"], "t")
    until(tree, lambda: nodes(hub).get("store", {"silent_seconds": 0})["silent_seconds"] < 0, "the store reports")
    assert nodes(hub)["store"]["pins"] == [uids["hub-a"]]
    assert nodes(hub)["till"]["silent_seconds"] > 0, "who was away is listed"
    assert [one["id"] for one in hub.http("GET", "/v1/resyncs")[1]["pending"]] == ["5" * 32]
    till = joins_again(tree, hub, "till", "store")
    follows(hub, till, "t")
    until(tree, lambda: hub.http("GET", "/v1/resyncs")[1]["pending"] == [], "the directive arrives")

    tree.stop("hub-b")
    hub = tree.start("hub-b", level="l2", pipe__registry=tree.address("root"), **{"node.region": "eu"})
    until(tree, lambda: parent(tree.nodes["hub-a"]) == "hub-b", "after its restart too")
    assert nodes(hub)["store"]["pins"] == [uids["hub-a"]]
    publish(hub, "t", 105, 5)
    follows(hub, till, "t")


def joins_again(tree: Tree, root: RunningBroker, name: str, seed: str) -> RunningBroker:
    node = tree.start(name, level="local", pipe__registry=tree.address(seed), **{"node.region": "eu/1"})
    until(tree, lambda: nodes(root).get(name, {"silent_seconds": 0})["silent_seconds"] < 0, name)
    return node


def test_children_of_a_superseded_root_go_to_the_new_one(tree: Tree) -> None:
    """The old root was only cut off: a hub that stayed with it must not stay behind with it."""
    root = grown(tree)
    in_step(tree, "hub-a", "hub-b")
    until(tree, lambda: tree.address("hub-b") in pipe(tree.nodes["hub-a"])["parent"]["candidates"], "peers", 10.0)
    hub = tree.nodes["hub-b"]
    assert hub.http("POST", "/v1/promote", {"level": "root"})[0] == 200
    publish(hub, "t", 100, 5)
    until(tree, lambda: "superseded" in problems(root), "the old root knows", step=1.0)
    until(tree, lambda: parent(tree.nodes["hub-a"]) == "hub-b", "its child goes on elsewhere")
    follows(hub, tree.nodes["till"], "t")


def test_who_is_told_of_a_promotion_goes_only_where_the_registry_sent_it(tree: Tree) -> None:
    grown(tree)
    hub = tree.nodes["hub-a"]
    in_step(tree, "hub-a")
    for address in ("127.0.0.1:1", tree.address("till")):
        assert hub.pipe("POST", "/v1/promoted", {"address": address}) == (200, {})
    assert parent(hub) == "root"
    tree.stop("root")
    assert hub.pipe("POST", "/v1/promoted", {"address": tree.address("till")}) == (200, {})
    assert tree.address("till") not in pipe(hub)["parent"]["candidates"]


def test_promote_shows_what_would_be_lost(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree)
    in_step(tree, "hub-a", "hub-b")
    tree.stop("hub-b")
    publish(root, "t", 100, 7)
    follows(root, tree.nodes["hub-a"], "t")
    tree.stop("root")
    hub = tree.start("hub-b", level="l2", pipe__registry=tree.address("root"))

    def says(name: str) -> str:
        assert main(["promote", "--admin", tree.admin(name)]) == 2
        return capsys.readouterr().err

    assert "hub-a has 7 records MORE, which would be lost: promote that node instead" in says("hub-b")
    told = says("hub-a")
    assert "hub-b has nothing that is not here" in told
    assert "A copy of the registry is here; it is kept here from then on" in told
    tree.stop("hub-a")
    assert f"hub-a at {tree.address('hub-a')} does not answer: what it has is not known" in says("hub-b")
    assert hub.broker.engine.node_uid


def test_named_standbys_only(tree: Tree) -> None:
    root = root_of(tree, registry__standbys="hub-b")
    for hub in ("hub-a", "hub-b"):
        joins(tree, hub, "root", level="l2")
    until(tree, lambda: standby(tree.nodes["hub-b"])["root"] == root.broker.engine.node_uid, "the copy")
    assert standby(tree.nodes["hub-a"]) == {"root": "", "hubs": []}
