"""What a node remembers of its children: it holds early retention back, and certifies what they had."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import pytest

from edgebroker.storage.metadata.children import read_children, write_children
from edgebroker.storage.types import REMEMBER_SECONDS, ChildPosition
from tests.kit.brokers import JSON, SECONDS, RunningBroker
from tests.kit.trees import Tree, chain, digest, end, follows, grown, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

PLACES = {("t", 0): {"aa": ChildPosition("ab" * 16, 1, 7, 40.0), "bb": ChildPosition("ab" * 16, 2, 9, 99.5)}}


def floor(node: RunningBroker, topic: str = "t") -> int | None:
    log = node.broker.engine.log(topic, 0)
    assert log is not None
    return node.call(lambda: node.broker.events.retention_floor(log))


def stored(node: RunningBroker) -> int:
    """The place of the only child in the file."""
    found = read_children(Path(node.config.node.data_dir) / "children.snap", 0.0)
    return next((place.offset for place in found.get(("t", 0), {}).values()), -1)


def test_there_and_back(tmp_path: Path) -> None:
    """By another run's clock; who was not seen for a month is forgotten."""
    path = tmp_path / "children.snap"
    assert read_children(path, 0.0) == {}
    write_children(path, PLACES, 100.0)
    assert read_children(path, 1060.0) == {
        ("t", 0): {"aa": ChildPosition("ab" * 16, 1, 7, 1000.0), "bb": ChildPosition("ab" * 16, 2, 9, 1059.5)}
    }
    write_children(path, PLACES, 50.0 + REMEMBER_SECONDS)
    assert list(read_children(path, 0.0)["t", 0]) == ["bb"]


@pytest.mark.parametrize("damage", [b"", b"{}\n", b'{"children":[]}\n00000000\n', b"\xff\n00000000\n"])
def test_a_file_that_is_not_whole(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "children.snap").write_bytes(damage)
    assert read_children(tmp_path / "children.snap", 0.0) == {}


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "stored now and then"])
def test_early_retention_waits_for_a_child_over_a_restart(tree: Tree, stopped: bool) -> None:
    root = grown(tree)
    root.advance(121.0)
    wait_for(lambda: floor(root) == 200, "it has asked again")
    tree.stop("l2")
    publish(root, "t", 200, 10)
    snapshot = tree.directory / "root" / "children.snap"
    if not stopped:
        root.advance(61.0)
        wait_for(lambda: stored(root) == 200, "it is stored")
        kept = snapshot.read_bytes()
    tree.stop("root")
    if not stopped:
        snapshot.write_bytes(kept)
    root = tree.start("root")
    assert floor(root) == 200
    root.advance(7 * 24 * 3600.0 + 1)
    assert floor(root) == 210, "nobody waits for it for ever"
    root.advance(REMEMBER_SECONDS)
    assert floor(root) is None


def test_nothing_is_stored_while_nothing_changes(tree: Tree) -> None:
    root = grown(tree)
    snapshot = tree.directory / "root" / "children.snap"
    polls = root.counters()["pipe_polls"]
    root.advance(121.0)
    wait_for(lambda: root.counters()["pipe_polls"] > polls, "it polls again")
    wait_for(lambda: floor(root) == 200, "it has asked again")
    root.advance(61.0)
    wait_for(lambda: stored(root) == 200, "it is stored")
    before = snapshot.stat().st_ino
    for _ in range(3):
        polls = root.counters()["pipe_polls"]
        root.advance(121.0)
        wait_for(lambda polls=polls: root.counters()["pipe_polls"] > polls, "it polls again")  # type: ignore[misc]
    assert snapshot.stat().st_ino == before


def test_a_lost_end_is_no_torn_tail(tree: Tree) -> None:
    """Without meta.db only the child's place tells that something was there: it is fetched from the child."""
    root = grown(tree)
    root.advance(121.0)
    wait_for(lambda: floor(root) == 200, "it has asked again")
    tree.stop("root")
    for path in (tree.directory / "root").glob("meta.db*"):
        path.unlink()
    last = max((tree.directory / "root" / "topics" / "t" / "0").glob("*.log"))
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])
    root = tree.start("root")
    log = root.broker.engine.log("t", 0)
    assert log is not None and log.corrupt_ranges and end(root, "t") == 200
    wait_for(lambda: root.broker.downstream.peers(), "its child is there, from this address")
    status, answer = root.http("POST", "/v1/repair", {"from": tree.address("l2"), "topic": "t"})
    assert (status, answer["error"]) == (200, "")
    tree.stop("root")
    root = tree.start("root")
    publish(root, "t", 200, 1)
    tree.nodes["l2"].advance(31.0)
    follows(root, tree.nodes["l2"], "t")
    assert tree.nodes["l2"].counters()["log_truncations"] == 0
    assert digest(tree, "root", "t") == digest(tree, "l2", "t")


def test_a_loss_that_was_accepted_is_not_missed(tree: Tree) -> None:
    """The place of a child that did not come back since belongs to the history that is over."""
    root = tree.start("root")
    publish(root, "t", 0, 10)
    tree.stop("root")
    tree.keep("root")
    root = tree.start("root")
    publish(root, "t", 10, 10)
    for name, level in (("l2", "l2"), ("other", "l2")):
        follows(root, tree.start(name, "root", level=level), "t")
    root.advance(121.0)
    wait_for(lambda: floor(root) == 20, "they have asked again")
    tree.stop("l2")
    tree.stop("root")
    kept = (tree.directory / "root" / "children.snap").read_bytes()
    tree.put_back("root")
    root = tree.start("root")
    tree.nodes["other"].advance(31.0)
    wait_for(lambda: "history_lost" in root.http("GET", "/v1/node")[1]["problems"], "the other one is ahead")
    assert root.http("POST", "/v1/topics/t/accept")[0] == 200
    follows(root, tree.nodes["other"], "t")
    tree.stop("root")
    (tree.directory / "root" / "children.snap").write_bytes(kept)
    root = tree.start("root")
    assert (root.broker.engine.log("t", 0).corrupt_ranges, end(root, "t")) == ([], 10)  # type: ignore[union-attr]


def test_what_was_not_compared_does_not_count(tree: Tree) -> None:
    """Anybody may say that he has more; only a place where the chains are the same is one."""
    root = tree.start("root")
    publish(root, "t", 0, 10)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    for offset, value, points in ((1000, 1, [[10, 1]]), (10, 1, []), (10, chain(root, "t"), [])):
        lines = [["t", 0, log.identity.log_id, 1, offset, value, 0, points]]
        body = {"version": 1, "uid": "ee" * 16, "name": "x", "level": "local", "topics": ["t"], "logs": lines}
        polls = root.counters()["pipe_polls"]
        connection = http.client.HTTPConnection(*root.broker.listeners.pipe_address, timeout=SECONDS)
        connection.request("POST", "/v1/pipe", json.dumps(body), JSON)
        assert connection.getresponse().status == 200
        wait_for(lambda polls=polls: root.counters()["pipe_polls"] > polls, "it is judged")  # type: ignore[misc]
        if value != 1:
            wait_for(lambda: floor(root) == 10, "this one has it")
        else:
            assert floor(root) is None
        connection.close()


def test_a_cut_takes_back_what_a_child_had(tree: Tree) -> None:
    """It needs again what comes behind the cut, also while it is away."""
    root = tree.start("root")
    publish(root, "t", 0, 5)
    tree.stop("root")
    tree.keep("root")
    root = tree.start("root")
    upper, lower = tree.start("l2", "root"), tree.start("l3", "l2")
    publish(root, "t", 5, 10)
    follows(root, upper, "t")
    follows(root, lower, "t")
    upper.advance(121.0)
    wait_for(lambda: floor(upper) == 15, "it has asked again")
    tree.stop("l3")
    tree.stop("root")
    tree.put_back("root")
    root = tree.start("root", listen__pipe="127.0.0.1:0")
    for number in range(20):
        publish(root, "t", 100 + number, 1)
    tree.stop("l2")
    upper = tree.start("l2", "root")
    assert floor(upper) == 15
    follows(root, upper, "t")
    assert floor(upper) == 5
