"""Deleting a topic: at its origin, at everybody below, whenever the power goes, and nowhere else."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from edgebroker.cli.main import main
from edgebroker.common.errors import AnswerError, Code
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage import files
from edgebroker.storage.rewrite.removal import FILE_NAME, read_tombstones, write_tombstones
from edgebroker.storage.types import Tombstone
from tests.kit.brokers import RunningBroker
from tests.kit.storage import TOPIC, StoreHarness, encode, pack
from tests.kit.trees import Tree, digest, end, follows, grown, line, pipe, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


def topics(node: RunningBroker) -> set[str]:
    return {topic["name"] for topic in node.http("GET", "/v1/topics")[1]["topics"]}


def delete(node: RunningBroker, topic: str) -> int:
    return node.http("DELETE", f"/v1/topics/{topic}")[0]


def test_a_topic_goes_with_all_that_belongs_to_it(tree: Tree) -> None:
    root = tree.start("root")
    for number in range(20):
        publish(root, "t", number * 10, 10, size=900)
    publish(root, "other", 0, 5)
    client = root.raw("reader")
    client.subscribe("t", "g")
    taken = client.deliver()
    assert client.acked(taken.head, 4) is Code.OK
    assert delete(root, "t") == 200
    assert topics(root) == {"other"}
    assert delete(root, "t") == 404
    assert root.http("GET", "/v1/groups/g")[1]["partitions"] == []
    assert client.acked(taken.head, 8) is Code.STALE
    assert [one.name for one in (tree.directory / "root" / "deleted").iterdir()] == ["1-t"]
    tree.stop("root")
    root = tree.start("root")
    assert topics(root) == {"other"}
    publish(root, "t", 0, 3)
    reader = root.raw("reader")
    reader.subscribe("t", "g")
    assert reader.deliver().offsets == [0, 1, 2]
    tree.stop("root")
    root = tree.start("root")
    assert end(root, "t") == 3


def test_a_consumer_is_told(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 5)
    with root.consumer(["t"], "g", timeout=5.0) as consumer:
        assert len(consumer.poll()) == 5
        assert delete(root, "t") == 200
        with pytest.raises(AnswerError, match="topic t was deleted"):
            while True:
                consumer.poll()


def test_what_is_being_published_is_answered(tree: Tree) -> None:
    """While a producer publishes as fast as it can: every record is acknowledged, or refused with a reason."""
    root = tree.start("root", topics__auto_create=False)
    root.create("t")
    with root.producer(timeout=10.0) as producer:
        sent = [producer.send("t", b"%d" % number) for number in range(2000)]
        assert delete(root, "t") == 200
        codes = set()
        for number in range(100):
            try:
                sent.append(producer.send("t", b"%d" % number))
            except AnswerError as error:
                codes.add(error.code)
        for one in sent:
            try:
                one.result(10.0)
            except AnswerError as error:
                codes.add(error.code)
    assert codes == {Code.UNKNOWN_TOPIC}


def test_everybody_below_deletes_it_too(tree: Tree) -> None:
    """Also who was away, and its children; what has the same name and is another log stays."""
    root = grown(tree)
    tree.start("pos", "l2")
    tree.start("local", "pos")
    for name in ("pos", "local"):
        follows(root, tree.nodes[name], "t")
    tree.stop("local")
    publish(tree.nodes["pos"], "own", 0, 3)
    assert delete(tree.nodes["l2"], "t") == 409
    assert delete(root, "t") == 200
    for name in ("l2", "pos"):
        wait_for(lambda name=name: "t" not in topics(tree.nodes[name]), f"{name} deletes it")  # type: ignore[misc]
        directory = tree.directory / name / "topics" / "t"
        wait_for(lambda directory=directory: not directory.exists(), "its files go")  # type: ignore[misc]
    assert "own" in topics(tree.nodes["pos"])
    publish(root, "t", 0, 7)
    follows(root, tree.nodes["pos"], "t")
    local = tree.start("local", "pos")
    follows(root, local, "t")
    assert end(local, "t") == 7
    assert line(local, "t")["state"] == "live"
    for name in list(tree.nodes):
        tree.stop(name)
    assert len({digest(tree, name, "t") for name in ("root", "l2", "pos", "local")}) == 1


def test_a_topic_that_a_parent_lacks_is_not_deleted(tree: Tree) -> None:
    """Only a tombstone deletes: not an empty parent, nor one that never had it."""
    grown(tree)
    tree.stop("root")
    shutil.rmtree(tree.directory / "root")
    tree.start("root")
    l2 = tree.nodes["l2"]
    wait_for(lambda: line(l2, "t")["state"] == "not_carried", "the parent does not have it")
    assert end(l2, "t") == 200


def told_by_another_hub(tree: Tree) -> RunningBroker:
    """Two hubs; the node below heard of the deletion of topic t from one, and follows the other, which did not."""
    root = tree.start("root")
    publish(root, "t", 0, 50)
    for name in ("a", "b"):
        follows(root, tree.start(name, "root", level="l2"), "t")
    pos = tree.start("pos", "a")
    follows(root, pos, "t")
    tree.stop("b")
    assert delete(root, "t") == 200
    wait_for(lambda: "t" not in topics(pos), "pos deletes it")
    tree.stop("root")
    tree.stop("pos")
    tree.start("b", "root", level="l2")
    pos = tree.start("pos", "b")
    wait_for(lambda: pipe(pos)["parent"]["connected"], "pos follows b")
    return pos


def test_a_parent_that_does_not_know_yet_brings_nothing_back(tree: Tree) -> None:
    pos = told_by_another_hub(tree)
    publish(tree.nodes["b"], "sign", 0, 1)
    follows(tree.nodes["b"], pos, "sign")
    assert "t" not in topics(pos)
    tree.start("root")
    wait_for(lambda: "t" not in topics(tree.nodes["b"]), "b deletes it")


def test_an_origin_that_was_restored_to_a_time_before(tree: Tree, tmp_path: Path) -> None:
    """It has the topic again, in a new history: so has everybody below."""
    assert end(revived(tree, tmp_path), "t") == 210


def revived(tree: Tree, tmp_path: Path) -> RunningBroker:
    """Topic t was deleted everywhere, and came back with a restored root: everybody below has its tombstone."""
    root = grown(tree)
    assert main(["backup", str(tmp_path / "copy"), "--admin", tree.admin("root")]) == 0
    assert delete(root, "t") == 200
    wait_for(lambda: "t" not in topics(tree.nodes["l2"]), "l2 deletes it")
    tree.stop("root")
    shutil.rmtree(tmp_path / "root")
    assert main(["restore", str(tmp_path / "copy"), "--data-dir", str(tmp_path / "root")]) == 0
    root = tree.start("root")
    root.advance(31.0)  # its children have said what they have
    publish(root, "t", 200, 10)
    follows(root, tree.nodes["l2"], "t")
    return root


def test_the_command_asks_first(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 5)
    assert main(["topic", "delete", "t", "--admin", tree.admin("root")]) == 2
    assert "5 records" in capsys.readouterr().err
    assert topics(root) == {"t"}
    assert main(["topic", "delete", "t", "--yes", "--admin", tree.admin("root")]) == 0
    assert topics(root) == set()


# ---- the store alone: whenever the power goes ----


def removal(harness: StoreHarness) -> tuple[list[str], list[Code]]:
    """Begin to delete the topic: what is told, step by step."""
    gone: list[str] = []
    done: list[Outcome] = []
    harness.delete(TOPIC, lambda logs: gone.extend(log.name for log in logs), lambda *told: done.append(told[0]))
    return gone, done


def test_before_the_tombstone_nothing_has_happened(harness: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("edgebroker.storage.rewrite.removal.write_tombstones", fail)
    gone, done = removal(harness)
    harness.until(lambda: done)
    assert (gone, done) == ([], [Outcome.READ_ONLY])
    assert len(harness.values()) == 30
    harness.restart()
    assert len(harness.values()) == 30


def test_behind_the_tombstone_the_topic_is_gone(harness: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory cannot be moved; the next start does it. Then the name is free."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "broken")

    log_id = harness.log().identity.log_id
    with monkeypatch.context() as patch:
        patch.setattr("edgebroker.storage.rewrite.removal.move_away", fail)
        gone, done = removal(harness)
        for _ in range(50):
            harness.loop.turn(0.005)
            harness.clock.advance(0.01)
        assert (gone, done) == ([f"{TOPIC}/0"], [Outcome.READ_ONLY])
        assert list(harness.store.topics()) == []
        harness.crash()
    assert harness.directory().exists()
    harness.open()
    assert list(harness.store.topics()) == []
    assert not harness.directory().exists()
    assert harness.store.tombstones[log_id] == Tombstone(TOPIC, 1)
    harness.create(TOPIC)
    harness.fill(3)
    harness.restart()
    assert len(harness.values()) == 3, "a topic of the same name is another one"


def test_what_was_staged_before_is_answered(harness: StoreHarness) -> None:
    """The files go when nobody writes to them any more; meanwhile the name is taken."""
    data, spans = pack([encode(b"late")])
    harness.engine.append(harness.log(), data, spans, AckLevel.DURABLE, False, -1)
    late = harness.log()
    gone, done = removal(harness)
    harness.until(lambda: gone)
    codes: list[Code] = []
    harness.store.create_topic(TOPIC, TopicSettings(), lambda code, message: codes.append(code))
    assert codes == ([Outcome.OVERLOADED] if not done else codes)
    for _ in range(50):
        harness.loop.turn(0.005)
        harness.clock.advance(0.01)
    assert done == [Outcome.OK]
    assert late.durable_end == 31
    assert (("durable", f"{TOPIC}/0", 31)) in harness.listener.events


def test_a_full_disk_is_no_reason_to_keep_a_topic(harness: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tombstone is written into the reserve."""
    real, full = files.write_durable, [True]

    def write(path: Path, data: bytes) -> None:
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, "full")
        real(path, data)

    (harness.path / "reserve").write_bytes(b"x")
    monkeypatch.setattr(files, "write_durable", write)
    _, done = removal(harness)
    for _ in range(50):
        harness.loop.turn(0.005)
        harness.clock.advance(0.01)
    assert done == [Outcome.OK]
    assert not (harness.path / "reserve").exists()


def test_tombstones_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_tombstones(tmp_path) == {}
    (tmp_path / FILE_NAME).write_bytes(b"{} 12345678\n")
    assert read_tombstones(tmp_path) == {}
    write_tombstones(tmp_path, {"1" * 32: Tombstone("t", 3)})
    assert read_tombstones(tmp_path) == {"1" * 32: Tombstone("t", 3)}
