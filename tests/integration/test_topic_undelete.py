"""Deletion belongs to the origin: what another node began is not deleted, and what was deleted can be taken back."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgebroker.cli.main import main
from edgebroker.common.outcome import Outcome
from tests.integration.test_topic_delete import delete, told_by_another_hub, topics
from tests.kit.brokers import RunningBroker
from tests.kit.storage import TOPIC, StoreHarness, store_settings
from tests.kit.trees import Tree, end, follows, grown, line, publish, run
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


def problems(node: RunningBroker) -> dict[str, str]:
    found: dict[str, str] = node.http("GET", "/v1/node")[1]["problems"]
    return found


def promoted_by_mistake(tree: Tree) -> RunningBroker:
    """Root and a leaf below it go on with topic t; a hub was promoted, wrote a record of its own, and is below the root
    again."""
    grown(tree)
    follows(tree.nodes["root"], tree.start("local", "root"), "t")
    hub = tree.nodes["l2"]
    assert hub.http("POST", "/v1/promote", {"level": "l2"})[0] == 200
    publish(hub, "t", 200, 1)
    assert hub.http("DELETE", "/v1/promote")[0] == 200
    tree.stop("l2")
    hub = tree.start("l2", "root")
    wait_for(lambda: "name_clash" in problems(hub), "the clash is told")
    return hub


@pytest.mark.parametrize("how", ["delete", "rename"])
def test_a_hub_that_was_promoted_by_mistake_deletes_no_topic_of_the_root(tree: Tree, how: str) -> None:
    hub = promoted_by_mistake(tree)
    command = ["topic", "delete", "t"] if how == "delete" else ["topic", "rename", "t", "t.hub"]
    assert main([*command, "--yes", "--admin", tree.admin("l2")]) == 0
    follows(tree.nodes["root"], hub, "t")
    assert end(hub, "t") == 200
    if how == "rename":
        assert end(hub, "t.hub") == 201
    assert problems(hub) == {}
    tree.stop("local")
    local = tree.start("local", "l2", "root")
    publish(tree.nodes["root"], "t", 200, 5)
    follows(tree.nodes["root"], local, "t")
    tree.stop("local")
    local = tree.start("local", "root")
    publish(tree.nodes["root"], "t", 205, 5)
    follows(tree.nodes["root"], local, "t")
    assert set(problems(local)) == ({"not_carried"} if how == "rename" else set())


def test_a_child_that_followed_the_mistake_comes_back(tree: Tree) -> None:
    """It has the record of the hub's history: that is deleted with it, and the root's topic is fetched."""
    root = grown(tree)
    hub = tree.nodes["l2"]
    local = tree.start("local", "l2")
    assert hub.http("POST", "/v1/promote", {"level": "l2"})[0] == 200
    publish(hub, "t", 200, 1)
    follows(hub, local, "t")
    assert hub.http("DELETE", "/v1/promote")[0] == 200
    tree.stop("l2")
    hub = tree.start("l2", "root")
    wait_for(lambda: "name_clash" in problems(hub), "the clash is told")
    assert main(["topic", "rename", "t", "t.hub", "--yes", "--admin", tree.admin("l2")]) == 0
    follows(root, hub, "t")
    local.advance(31.0)
    follows(root, local, "t")
    follows(hub, local, "t.hub")
    assert (end(local, "t"), end(local, "t.hub")) == (200, 201)


def test_a_topic_comes_back_everywhere(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree)
    hub = tree.nodes["l2"]
    assert delete(root, "t") == 200
    wait_for(lambda: "t" not in topics(hub), "the hub deletes it")
    status, found = run(root, capsys, "topic", "list", "--deleted")
    assert (status, [one["topic"] for one in found["topics"]], found["refused"]) == (0, ["t"], [])
    assert run(root, capsys, "topic", "undelete", "t") == (0, {"topic": "t"})
    assert run(root, capsys, "topic", "list", "--deleted")[1] == {"topics": [], "refused": []}
    assert end(root, "t") == 200
    publish(root, "t", 200, 10)
    follows(root, hub, "t")
    tree.stop("root")
    root = tree.start("root")
    assert end(root, "t") == 210
    reader = root.raw("reader")
    reader.subscribe("t", "g")
    assert reader.deliver().offsets[0] == 0


def test_a_copy_goes_at_this_node_alone(tree: Tree) -> None:
    """The parent does not have it: no node below is told to delete anything."""
    root = grown(tree)
    hub, local = tree.nodes["l2"], tree.start("local", "l2")
    follows(hub, local, "t")
    assert hub.http("DELETE", "/v1/topics/t")[0] == 409
    other = tree.start("other", level="root")
    publish(other, "sign", 0, 1)
    tree.stop("l2")
    hub = tree.start("l2", "other")
    wait_for(lambda: line(hub, "t")["state"] == "not_carried", "the parent does not have it")
    assert "t" in problems(hub)["not_carried"]
    assert hub.http("DELETE", "/v1/topics/t")[0] == 200
    assert "t" not in topics(hub)
    assert problems(hub) == {}
    local.advance(31.0)
    wait_for(lambda: "not_carried" in problems(local), "the child is told that its parent does not have it")
    assert end(local, "t") == 200
    tree.stop("l2")
    hub = tree.start("l2", "root")
    follows(root, hub, "t")


def test_a_topic_that_is_refused_is_a_problem(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """The node was told that it is deleted, and its parent has it."""
    pos = told_by_another_hub(tree)
    wait_for(lambda: "not_mirrored" in problems(pos), "the refusal is told")
    assert run(pos, capsys, "topic", "list", "--deleted")[1]["refused"] == []  # its files are still here
    assert run(pos, capsys, "topic", "undelete", "t")[0] == 0
    follows(tree.nodes["b"], pos, "t")
    assert problems(pos) == {}


def test_a_copy_can_be_taken_back_under_another_name(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree)
    hub = tree.nodes["l2"]
    assert delete(root, "t") == 200
    wait_for(lambda: run(hub, capsys, "topic", "list", "--deleted")[1]["topics"], "the hub deletes it")
    assert run(hub, capsys, "topic", "undelete", "t", "--as", "rescued")[0] == 0
    assert end(hub, "rescued") == 200
    publish(hub, "rescued", 200, 3)
    tree.stop("l2")
    hub = tree.start("l2", "root")
    assert end(hub, "rescued") == 203
    assert main(["topic", "undelete", "t", "--as", "rescued", "--admin", tree.admin("l2")]) == 1
    assert main(["topic", "undelete", "u", "--admin", tree.admin("l2")]) == 1
    assert main(["topic", "undelete", "t", "--as", "a/b", "--admin", tree.admin("l2")]) == 1


def test_nothing_is_renamed_while_nothing_can_be_stored(tree: Tree) -> None:
    """It would be deleted, and on a full disk what is deleted goes first."""
    root = tree.start("root", storage__max_bytes=100_000, storage__soft_free_bytes=0, storage__hard_free_bytes=0)
    publish(root, "t", 0, 10, size=9_500)
    publish(root, "t", 10, 10, size=9_500)
    root.advance(1.1)
    wait_for(lambda: "disk_full" in problems(root), "the budget is used up")
    status, answer = root.http("POST", "/v1/topics/t/rename", {"name": "u"})
    assert (status, answer["code"]) == (503, "DISK_FULL")
    assert topics(root) == {"t"}
    assert end(root, "t") == 20


# ---- the store alone ----


def deleted(harness: StoreHarness) -> Path:
    """Delete the topic; where its files are."""
    done: list[Outcome] = []
    harness.store.removal.delete(TOPIC, {}, lambda logs: None, lambda *told: done.append(told[0]))
    settle(harness, done)
    assert done == [Outcome.OK]
    (directory,) = (harness.path / "deleted").iterdir()
    return directory


def settle(harness: StoreHarness, done: list[Outcome]) -> None:
    """Turn, and let time pass, until it is done."""
    while not done:
        harness.loop.turn(0.005)
        harness.clock.advance(0.01)


def tick(harness: StoreHarness, seconds: float) -> None:
    harness.clock.advance(seconds)
    for _ in range(5):
        harness.loop.turn(0.005)


def test_deleted_files_go_after_their_time(harness: StoreHarness) -> None:
    directory = deleted(harness)
    tick(harness, 23 * 3600)
    assert directory.exists()
    harness.restart()
    assert [one.topic for one in harness.store.removal.deleted_topics()] == [TOPIC]
    tick(harness, 2 * 3600)
    wait_for(lambda: not directory.exists(), "the files are removed")


def test_deleted_files_go_when_space_is_wanted(harness: StoreHarness) -> None:
    directory = deleted(harness)
    harness.store.reconfigure(store_settings(max_bytes=1000))
    tick(harness, 1.1)
    tick(harness, 1.1)
    wait_for(lambda: not directory.exists(), "the files are removed")


def test_a_crash_while_a_topic_is_taken_back(harness: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its directory is moved it is still deleted; it can be taken back afterwards."""
    deleted(harness)
    done: list[Outcome] = []

    def fail(*arguments: object) -> None:
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr("edgebroker.storage.files.move", fail)
        harness.store.removal.undelete(TOPIC, TOPIC, lambda *told: done.append(told[0]))
        settle(harness, done)
    assert done == [Outcome.READ_ONLY]
    harness.restart()
    assert list(harness.store.topics()) == []
    done.clear()
    harness.store.removal.undelete(TOPIC, TOPIC, lambda *told: done.append(told[0]))
    settle(harness, done)
    assert done == [Outcome.OK]
    assert len(harness.values()) == 30
    harness.fill(3)
    harness.restart()
    assert len(harness.values()) == 33
