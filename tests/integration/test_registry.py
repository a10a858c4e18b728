"""A real tree that finds itself: nodes that are told their parents, moved, drained, removed, and seen from the top."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from edgebroker.storage.metadata.registry import NodeRow
from tests.kit.brokers import RunningBroker
from tests.kit.trees import RAW, Tree, batch, follows, pipe, publish, reported, run
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


def root_of(tree: Tree, **settings: object) -> RunningBroker:
    return tree.start("root", registry__enabled=True, **settings)


def told(tree: Tree, name: str, *seeds: str, level: str = "", **settings: object) -> RunningBroker:
    """A node that asks the registry through others."""
    settings["pipe.registry"] = ",".join(tree.address(seed) for seed in seeds)
    return tree.start(name, level=level, **settings)


def joins(tree: Tree, name: str, *seeds: str, level: str = "", **settings: object) -> RunningBroker:
    """The same, until the root knows it and it has a parent."""
    node = told(tree, name, *seeds, level=level, **settings)
    root = tree.nodes["root"]
    until(tree, lambda: nodes(root).get(name, {"silent_seconds": 0})["silent_seconds"] < 0 and parent(node), name)
    return node


def pass_time(tree: Tree, seconds: float, step: float = 1.0) -> None:
    """For all nodes, in steps that let them answer each other."""
    for _ in range(int(seconds / step)):
        for node in tree.nodes.values():
            node.advance(step)


def until(tree: Tree, condition: Any, what: str, step: float = 2.0) -> None:
    """Let time pass until something holds."""

    def look() -> object:
        pass_time(tree, step, step)
        return condition()

    wait_for(look, what)


def nodes(at: RunningBroker) -> dict[str, dict[str, Any]]:
    return {node["name"]: node for node in at.http("GET", "/v1/tree/nodes")[1]["nodes"]}


def parent(node: RunningBroker) -> str:
    found: dict[str, Any] = pipe(node)["parent"]
    return found["name"] if found["connected"] else ""


def test_a_tree_grows_from_seeds_alone(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """Every node is given one address to ask at; it finds the parent that it should have, also through others."""
    root = root_of(tree)
    publish(root, "prices", 0, 50)
    joins(tree, "l2", "root", **{"node.region": "eu"})
    joins(tree, "l3", "l2", **{"node.region": "eu/north"})
    joins(tree, "pos", "l3", **{"node.region": "eu/north/7", "node.labels": "format=express"})
    patient = {"delivery.timeout_ms": 10**7, "limits.idle_timeout_ms": 10**7}
    local = joins(tree, "till", "pos", level="local", **{"node.region": "eu/north/7"}, **patient)
    follows(root, local, "prices")
    assert [parent(tree.nodes[name]) for name in ("l2", "l3", "pos", "till")] == ["root", "l2", "l3", "pos"]
    client = local.raw("labels")
    client.subscribe("prices", "labels")
    taken = client.deliver()
    assert client.acked(taken.head, 30) is Code.OK
    until(tree, lambda: nodes(root).get("till", {}).get("waiting") == {"prices labels": 20}, "what is applied is known")
    found = nodes(root)
    assert {name: node["parent"] for name, node in found.items()} == {
        "l2": "root", "l3": "l2", "pos": "l3", "till": "pos",
    }  # fmt: skip
    assert found["pos"]["labels"] == {"format": "express"}
    assert all(node["silent_seconds"] < 0 and node["managed"] for node in found.values())
    _, summary = run(root, capsys, "tree")
    assert {level: counts["nodes"] for level, counts in summary["levels"].items()} == {
        "l2": 1, "l3": 1, "pos": 1, "local": 1,
    }  # fmt: skip
    assert summary["labels"]["region=eu"]["nodes"] == 4
    assert summary["labels"]["format=express"]["nodes"] == 1
    assert [node["name"] for node in summary["worst"]] == ["till"]
    status, waited = run(root, capsys, "wait", "--topic", "prices", "--timeout", "0s")
    assert (status, waited["nodes"], waited["done"]) == (1, 1, 0)
    assert "group labels is at 30" in waited["missing"][0]["why"]
    assert run(root, capsys, "wait", "--topic", "prices", "--offset", "30", "--timeout", "0s")[0] == 0
    assert run(root, capsys, "wait", "--topic", "prices", "--mirrored", "--timeout", "0s")[0] == 0
    assert run(root, capsys, "wait", "--topic", "prices", "--label", "region=us", "--timeout", "0s")[0] == 1
    assert client.acked(taken.head, 50) is Code.OK
    until(
        tree,
        lambda: run(root, capsys, "wait", "--topic", "prices", "--label", "region=eu/north", "--timeout", "0s")[0] == 0,
        "all is applied",
    )


def test_what_is_applied_is_told_from_what_is_stored(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """An application has acknowledged a new catalogue, and shows the one before until the store closes."""
    root = root_of(tree)
    publish(root, "prices", 0, 10)
    till = joins(tree, "till", "root", level="local")
    follows(root, till, "prices")

    def partition() -> dict[str, Any]:
        found: dict[str, Any] = till.http("GET", "/v1/groups/labels")[1]["partitions"][0]
        return found

    with till.consumer(["prices"], "labels", start="earliest") as consumer:
        while sum(consumer.next_offsets().values()) < 10:
            consumer.poll(0.1)
        consumer.applied("prices", 0, 4)
        consumer.commit(10.0)
        until(tree, lambda: partition()["applied"] == 4, "the node knows what is applied")
        assert (partition()["committed"], partition()["lag"]) == (10, 0)
        wait = ("wait", "--topic", "prices", "--timeout", "0s")
        until(
            tree,
            lambda: "labels has stored partition 0, and applied it up to 4" in str(run(root, capsys, *wait)[1]),
            "the root knows",
        )
        assert nodes(root)["till"]["waiting"] == {"prices labels": 6}
        capsys.readouterr()
        assert main(["group", "describe", "labels", "--admin", tree.admin("till")]) == 0
        assert "prices/0: stored up to 10, applied up to 4\n" in capsys.readouterr().out
        consumer.applied("prices", 0, 10)
        until(tree, lambda: run(root, capsys, *wait)[0] == 0, "it is applied")
        till.call(
            lambda: [one.transport.close("test") for one in till.broker.sessions if one.client_id == consumer.client_id]
        )
        till.call(till.broker.core.groups.find("labels").applied.clear)  # type: ignore[union-attr]
        until(tree, lambda: consumer.poll(0.05) == [] and partition()["applied"] == 10, "it says it again")


def test_a_node_starts_with_its_topology_and_its_data(tree: Tree) -> None:
    """No line, no registry, no parent: it serves what it has, and goes on by itself when they are back."""
    root = root_of(tree)
    publish(root, "prices", 0, 20)
    joins(tree, "l2", "root")
    pos = joins(tree, "pos", "l2")
    follows(root, pos, "prices")
    until(tree, lambda: pos.broker.engine.topology, "pos has been told its parents")  # type: ignore[attr-defined]
    expected = pos.broker.engine.topology  # type: ignore[attr-defined]
    assert expected == [tree.address("l2"), tree.address("root")]
    for name in ("pos", "l2", "root"):
        tree.stop(name)
    pos = tree.start("pos", **{"pipe.registry": "127.0.0.1:1"})
    assert pipe(pos)["parent"]["candidates"] == expected
    client = pos.raw("labels")
    client.subscribe("prices", "labels")
    assert len(client.deliver().offsets) == 20
    root = root_of(tree)
    publish(root, "prices", 20, 5)
    until(tree, lambda: parent(pos) == "root", "pos goes on at the next candidate")
    follows(root, pos, "prices")


def test_draining_and_pinning(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 20)
    for name in ("a", "b"):
        joins(tree, name, "root", level="l3", **{"node.region": "north"})
    pos = joins(tree, "pos", "root", **{"node.region": "north/1"})
    until(tree, lambda: len(pipe(pos)["parent"]["candidates"]) == 3 and parent(pos) in "ab", "pos has a parent", 10.0)
    first = parent(pos)
    other = "b" if first == "a" else "a"
    assert run(root, capsys, "node", "drain", first) == (0, {})
    until(tree, lambda: parent(pos) == other, "pos is moved")
    assert nodes(root)[first]["draining"] is True
    assert tree.address(first) not in pipe(pos)["parent"]["candidates"]
    assert run(root, capsys, "node", "undrain", first) == (0, {})
    until(
        tree, lambda: tree.address(first) in pipe(pos)["parent"]["candidates"], "the drained hub is a candidate again"
    )
    assert run(root, capsys, "node", "pin", "pos", "root") == (0, {})
    until(tree, lambda: parent(pos) == "root", "pos is pinned")
    publish(root, "prices", 20, 20)
    follows(root, pos, "prices")
    tree.stop("root")
    root = root_of(tree)
    until(tree, lambda: nodes(root).get("pos", {}).get("silent_seconds", 0) < 0, "pos is back")
    assert nodes(root)["pos"]["pins"] == [root.broker.engine.node_uid] or nodes(root)["pos"]["pins"]
    assert main(["node", "pin", "pos", "nobody", "--admin", tree.admin("root")]) == 1
    assert "knows no node nobody" in capsys.readouterr().err
    assert main(["node", "pin", "a", "pos", "--admin", tree.admin("root")]) == 1
    assert "must be above" in capsys.readouterr().err
    joins(tree, "till", "pos", level="local", **{"node.region": "south/2"})
    until(tree, lambda: "till" in nodes(root), "the till is known")
    assert main(["node", "pin", "till", "pos", "--admin", tree.admin("root")]) == 1
    assert "pos is in region 'north/1', till in 'south/2'" in capsys.readouterr().err
    assert main(["node", "drain", "a", "--admin", tree.admin("a")]) == 1
    assert "registry is not kept at this node" in capsys.readouterr().err


def test_a_lost_node_stays_listed_until_it_is_removed(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 20)
    l2 = joins(tree, "l2", "root")
    till = joins(tree, "till", "l2", level="local")
    follows(root, till, "prices")
    assert main(["node", "remove", "till", "--admin", tree.admin("root")]) == 1
    assert "connected; stop it first" in capsys.readouterr().err
    tree.stop("till")
    publish(root, "prices", 20, 20)
    until(tree, lambda: nodes(root)["till"]["silent_seconds"] > 100, "the till is missed", 4.0)
    until(tree, lambda: nodes(root)["till"]["lag_seconds"] > 30, "it is known how far it is behind", 4.0)
    assert "silent" in nodes(root)["till"]["states"]
    tree.stop("root")
    root = root_of(tree)
    assert nodes(root)["till"]["silent_seconds"] >= 0
    until(tree, lambda: nodes(root)["l2"]["silent_seconds"] < 0, "l2 is back")
    assert nodes(root)["till"]["silent_seconds"] > 100
    uid = nodes(root)["till"]["uid"]
    assert run(root, capsys, "node", "remove", uid) == (0, {})
    assert "till" not in nodes(root)
    tree.stop("l2")
    l2 = told(tree, "l2", "root")
    until(tree, lambda: nodes(root)["l2"]["silent_seconds"] < 0, "l2 is back again")
    assert "till" not in nodes(root)
    told(tree, "till", "l2", level="local")
    until(tree, lambda: "till" in nodes(root), "a node that comes back is listed again")
    assert l2.broker.tree.fleet.members


def test_a_name_that_two_nodes_use(tree: Tree) -> None:
    """The data goes on; the operator sees which two, until one of them is gone."""
    root = root_of(tree)
    publish(root, "prices", 0, 20)
    first = tree.start("one", "root", level="pos", **{"node.name": "till-1"})
    second = tree.start("two", "root", level="pos", **{"node.name": "till-1"})
    follows(root, second, "prices")
    found: list[dict[str, Any]] = []

    def both() -> bool:
        found[:] = root.http("GET", "/v1/tree/nodes?label=name=till-1")[1]["nodes"]
        return [node["problems"] for node in found] == [["name_in_use"], ["name_in_use"]]

    until(tree, both, "the name is seen twice")
    assert {node["uid"] for node in found} == {first.broker.engine.node_uid, second.broker.engine.node_uid}
    status, answer = root.http("PUT", "/v1/registry/till-1/drain")
    assert (status, first.broker.engine.node_uid in answer["error"]) == (409, True)
    tree.stop("one")
    until(tree, lambda: [node["problems"] for node in nodes(root).values()] == [[]], "one is left", 10.0)


def test_a_disk_that_was_cloned(tree: Tree) -> None:
    """Two machines with one identity: both are fed, and the operator sees it."""
    root = root_of(tree)
    publish(root, "prices", 0, 20)
    first = tree.start("one", "root", level="pos")
    follows(root, first, "prices")
    tree.stop("one")
    shutil.copytree(tree.directory / "one", tree.directory / "two", ignore=shutil.ignore_patterns("*.sock"))
    first, second = tree.start("one", "root", level="pos"), tree.start("two", "root", level="pos")
    assert first.broker.engine.node_uid == second.broker.engine.node_uid
    number = iter(range(100))

    def seen() -> bool:
        publish(root, "prices", 20 + next(number), 1)  # both have something to say
        found = nodes(root)
        return any("uid_in_use" in node["problems"] for node in found.values())

    until(tree, seen, "the clone is noticed", 11.0)
    follows(root, first, "prices")
    follows(root, second, "prices")


def test_an_empty_answer_changes_nothing(tree: Tree) -> None:
    """Nor one that lacks the parent that works, unless it says drain."""
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    pos = joins(tree, "pos", "root")
    follows(root, pos, "prices")
    uid, address = pos.broker.engine.node_uid, tree.address("root")

    def assign(candidates: list[str], drain: bool = False) -> list[str]:
        from edgebroker.pipe.report import ParentAssignment

        def work() -> list[str]:
            pos.broker.tree.directed([ParentAssignment(uid=uid, candidates=candidates, drain=drain)])
            return list(pos.broker.mirroring.upstream.candidates.addresses)  # type: ignore[union-attr]

        return pos.call(work)

    assert assign([]) == [address]
    assert assign(["127.0.0.1:1"]) == [address]
    assert assign(["127.0.0.1:1", address]) == ["127.0.0.1:1", address]
    assert parent(pos) == "root"
    assert assign([], drain=True) == []
    wait_for(lambda: not parent(pos), "pos lets go")
    assert pos.broker.engine.topology == []  # type: ignore[attr-defined]
    until(tree, lambda: parent(pos) == "root", "it asks again where to go", 5.0)


def test_a_registry_without_a_way(tree: Tree) -> None:
    """No registry anywhere: what is asked says so, and static parents work all the same."""
    root = tree.start("root")
    pos = tree.start("pos", "root")
    publish(root, "prices", 0, 5)
    follows(root, pos, "prices")
    report = json.loads(
        json.dumps({"uid": "1" * 32, "name": "x", "level": "local", "version": "1", "boot": "0" * 16, "number": 1})
    )
    status, answer = pos.pipe("POST", "/v1/registry", {"report": report})
    assert (status, "no registry" in answer["error"]) == (503, True)
    status, answer = root.pipe("POST", "/v1/registry", {"report": report, "path": []})
    assert status == 503
    assert root.pipe("POST", "/v1/registry", {"report": 5})[0] == 400
    assert root.pipe("POST", "/v1/tree/reports", {"sender": "x"})[0] == 400
    batch = {"sender": "1" * 32, "session": "s", "number": 4, "nodes": []}
    status, answer = reported(root, batch)
    assert (status, answer["code"]) == (409, "NEW_SESSION")
    odd = {"report": {**report, "level": "moon"}}
    batch = {"sender": "1" * 32, "session": "s", "number": 0, "nodes": [odd, {"report": {**report, "uid": "2" * 32}}]}
    assert reported(root, batch) == (200, {"elsewhere": []})
    assert "2" * 32 in root.broker.tree.fleet.members
    assert root.counters()["reports_refused"] == 1
    assert root.http("DELETE", "/v1/tree")[0] == 405
    assert root.http("GET", "/v1/tree/applied?topic=x&end=a:b")[0] == 400


def test_the_registry_is_part_of_a_backup(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    joins(tree, "l2", "root")
    assert run(root, capsys, "node", "drain", "l2") == (0, {})
    assert main(["backup", str(tmp_path / "copy"), "--admin", tree.admin("root")]) == 0
    tree.stop("l2")
    tree.stop("root")
    shutil.rmtree(tmp_path / "root")
    assert main(["restore", str(tmp_path / "copy"), "--data-dir", str(tmp_path / "root")]) == 0
    root = root_of(tree)
    assert nodes(root)["l2"]["draining"] is True
    assert nodes(root)["l2"]["silent_seconds"] >= 0


def test_a_damaged_registry_is_moved_aside(tree: Tree) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    joins(tree, "l2", "root")
    tree.stop("root")
    (tree.directory / "root" / "registry.db").write_bytes(b"no database" * 1000)
    root = root_of(tree)
    assert list((tree.directory / "root").glob("registry.db.corrupt-*"))
    until(tree, lambda: nodes(root).get("l2"), "l2 says again that it is there")
    assert root.http("GET", "/readyz")[1]["checks"]["storage"] == "ok"
    assert root.refused(Code.OK) == 0


def test_much_is_reported_in_pieces_and_again_to_a_parent_that_forgot(tree: Tree) -> None:
    """A hub passes on what 2,000 nodes below it said, to a root that is then restarted, and knows nothing."""
    root = tree.start("root")
    hub = tree.start("l2", "root")
    publish(root, "prices", 0, 5)
    follows(root, hub, "prices")
    reports = [
        {
            "report": {
                "uid": f"{number:032x}", "name": f"till-{number}", "level": "local", "version": "1", "boot": "0" * 16,
                "number": 1, "parent": hub.broker.engine.node_uid, "labels": {"filling": "x" * 40, "more": "y" * 40},
            }
        }
        for number in range(2000)
    ]  # fmt: skip
    for first in range(0, 2000, 250):
        batch = {"sender": f"{first:032x}", "session": "s", "number": 0, "nodes": reports[first : first + 250]}
        assert reported(hub, batch) == (200, {"elsewhere": []})
    until(tree, lambda: len(root.broker.tree.fleet.members) == 2001, "the root knows all of them")
    tree.stop("root")
    root = tree.start("root")
    assert not root.broker.tree.fleet.members
    until(tree, lambda: len(root.broker.tree.fleet.members) == 2001, "it knows them again")
    page = root.http("GET", "/v1/tree/nodes?label=level=local")[1]
    assert (len(page["nodes"]), page["after"]) == (500, page["nodes"][-1]["uid"])
    found = set()
    while page["after"]:
        found |= {node["uid"] for node in page["nodes"]}
        page = root.http("GET", f"/v1/tree/nodes?label=level=local&after={page['after']}")[1]
    assert len(found | {node["uid"] for node in page["nodes"]}) == 2000


# ---- what is malformed ----


def test_a_write_that_fails_leaves_no_transaction_open(tree: Tree) -> None:
    """Whatever a row holds: what is decided afterwards is stored."""
    root = root_of(tree)

    def spoil() -> None:
        assert root.broker.tree.registrar is not None
        root.broker.tree.registrar._store.changes.nodes["1" * 32] = NodeRow(b"{}", False, 1 << 70)

    root.call(spoil)
    until(tree, lambda: root.http("GET", "/readyz")[1]["warnings"].get("registry"), "it cannot be stored")

    def mend() -> None:
        assert root.broker.tree.registrar is not None
        root.broker.tree.registrar._store.changes.nodes["1" * 32] = None

    root.call(mend)
    assert root.http("PUT", "/v1/registry/root/drain") == (200, {})


@pytest.mark.parametrize("what", [{"silent": 1e16}, {"silent": 1e308}, {"behind": 1e300}, {"skew": 10**30}])
def test_a_number_beyond_reason(tree: Tree, what: dict[str, float]) -> None:
    root = root_of(tree)
    body = batch({"report": RAW, **what}, sender="2" * 32)
    assert reported(root, body)[0] == 400


def test_a_clock_beyond_reason(tree: Tree) -> None:
    root = root_of(tree)
    body = batch({"report": RAW})
    body["wall_ms"] = 10**400
    assert reported(root, body)[0] == 400


def test_pinned_to_a_node_of_no_level(tree: Tree) -> None:
    root = root_of(tree)
    reported(root, batch({"report": {**RAW, "level": "moon", "address": "x:1"}}))
    assert root.http("PUT", "/v1/registry/root/pins", {"parents": ["x"]})[0] == 404, "it was not taken at all"


def test_pinned_to_more_than_an_order_carries(tree: Tree) -> None:
    root = root_of(tree)
    for number in range(9):
        hub = {**RAW, "uid": f"{number + 16:032x}", "name": f"h{number}", "level": "l3", "address": f"hub-{number}:1"}
        assert reported(root, batch({"report": hub}, sender=str(hub["uid"])))[0] == 200
    pos = {**RAW, "level": "pos", "managed": True}
    assert reported(root, batch({"report": pos}))[0] == 200
    names = [f"h{number}" for number in range(9)]
    assert root.http("PUT", "/v1/registry/x/pins", {"parents": names})[0] == 409
    assert root.http("PUT", "/v1/registry/x/pins", {"parents": names[:8]})[0] == 200


def test_what_was_removed_and_is_back_can_be_lost_again(tree: Tree) -> None:
    """It was cut off with its hub, removed, and never stopped; then it dies, also over a restart of the registry."""
    root = root_of(tree)

    def say(**more: float) -> None:
        hub = {"report": {**RAW, "uid": "2" * 32, "name": "hub", "level": "l3"}}
        assert reported(root, batch(hub, {"report": RAW, **more}, sender="2" * 32))[0] == 200

    say(silent=60.0)
    assert root.http("DELETE", "/v1/registry/x")[0] == 200
    say(silent=61.0)
    assert "x" not in nodes(root)
    say()
    assert nodes(root)["x"]["silent_seconds"] < 0
    say(silent=100.0)
    assert nodes(root)["x"]["silent_seconds"] >= 100
    tree.stop("root")
    assert nodes(root_of(tree))["x"]["silent_seconds"] >= 100


def test_wait_for_a_partition_that_is_not_there(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    topics = [["prices", [0], [["g", [0], False]], 0]]
    assert reported(root, batch({"report": {**RAW, "topics": topics}}))[0] == 200
    wanted = ["wait", "--topic", "prices", "--partition", "9", "--timeout", "0s"]
    assert main([*wanted, "--admin", tree.admin("root")]) != 0
    assert "--partition 9" in capsys.readouterr().err


def test_applied_of_fewer_partitions_than_the_topic_has(tree: Tree) -> None:
    root = root_of(tree)
    topics = [["t", [5, 5], [["g", [5], False]], 0]]
    assert reported(root, batch({"report": {**RAW, "topics": topics}}))[0] in (200, 400)
    status, answer = root.http("GET", "/v1/tree/applied?topic=t&end=0:5&end=1:5")
    assert (status, answer.get("done", 0)) == (200, 0)


def test_a_negative_partition(tree: Tree) -> None:
    root = root_of(tree)
    topics = [["t", [5], [["g", [5], False]], 0]]
    assert reported(root, batch({"report": {**RAW, "topics": topics}}))[0] == 200
    assert root.http("GET", "/v1/tree/applied?topic=t&end=-5:5")[0] == 400
