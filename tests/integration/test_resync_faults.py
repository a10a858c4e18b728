"""What deleting a topic and loading it again must not do, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgebroker.broker.mirror.fresh_copy import FreshCopy
from edgebroker.cli.main import main
from edgebroker.common.outcome import Outcome
from edgebroker.storage import files
from edgebroker.storage.identity import read_identity
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.rewrite import removal
from edgebroker.storage.rewrite.removal import read_tombstones, write_tombstones
from edgebroker.storage.rewrite.replace import write_resyncs
from edgebroker.storage.types import CorruptRange, ResyncRow, Tombstone
from tests.integration.test_resync import ID, order, state, until
from tests.integration.test_topic_delete import revived, topics
from tests.kit.storage import TOPIC, StoreHarness, store_settings
from tests.kit.trees import Tree, end, follows, grown, line, pipe, publish
from tests.kit.waiting import wait_for

OTHER = "cd" * 16


def settle(harness: StoreHarness, iterations: int = 60) -> None:
    for _ in range(iterations):
        harness.loop.turn(0.005)
        harness.clock.advance(0.01)


def turn(harness: StoreHarness, condition: Any) -> None:
    for _ in range(400):
        if condition():
            return
        harness.loop.turn(0.005)
        harness.clock.advance(0.01)
    raise AssertionError("waited in vain")


# ---- tombstones of two topics at once


def test_two_topics_deleted_at_once(harness: StoreHarness) -> None:
    """The second list of tombstones is made before the first one is stored, and replaces it."""
    harness.create("other")
    ids = {harness.log(name).identity.log_id for name in (TOPIC, "other")}
    done: list[Outcome] = []
    for name in (TOPIC, "other"):
        harness.delete(name, lambda logs: None, lambda *told: done.append(told[0]))
    settle(harness)
    assert done == [Outcome.OK, Outcome.OK]
    assert set(read_tombstones(harness.path)) == ids


def test_two_topics_deleted_at_once_and_a_crash(harness: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.create("other")
    with monkeypatch.context() as patch:
        patch.setattr(
            "edgebroker.storage.rewrite.removal.move_away", lambda *a: (_ for _ in ()).throw(OSError(5, "cut"))
        )
        gone: list[str] = []
        for name in (TOPIC, "other"):
            harness.delete(name, lambda logs: gone.extend(x.name for x in logs), lambda *told: None)
        settle(harness)
        assert len(gone) == 2, "everybody was told"
        harness.crash()
    harness.open()
    assert list(harness.store.topics()) == []


# ---- a topic whose directory could not be moved


def test_a_topic_made_again_over_what_could_not_be_moved(
    harness: StoreHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.close()
    harness.open(store_settings(segment_bytes=1000, retention_bytes=1500))
    harness.tick_until(lambda: harness.log().log_start > 0)
    with monkeypatch.context() as patch:
        patch.setattr(
            "edgebroker.storage.rewrite.removal.move_away", lambda *a: (_ for _ in ()).throw(OSError(5, "cut"))
        )
        done: list[Outcome] = []
        harness.delete(TOPIC, lambda logs: None, lambda *told: done.append(told[0]))
        settle(harness)
        assert done == [Outcome.READ_ONLY]
    code = harness.create(TOPIC)
    if code is Outcome.OK:
        harness.fill(3)
    harness.restart()
    if TOPIC in list(harness.store.topics()):
        log = harness.log()
        assert not log.corrupt_ranges, "what was deleted is in the new log"
        assert log.durable_end == 3


# ---- a topic called "old"


def test_a_topic_called_old(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "old", 0, 20)
    l2 = tree.start("l2", "root")
    follows(root, l2, "old")
    assert order(l2, "old")[0] == 200
    until(l2, "done")


def test_a_topic_called_old_and_a_crash(harness: StoreHarness) -> None:
    harness.create("old")
    harness.crash()
    staged = harness.path / "staging" / ID / "topics" / "old"
    shutil.copytree(harness.path / "topics" / "old", staged)
    write_resyncs(harness.path, [ResyncRow(id=ID, topic="old", phase="switching", targets=[0])])
    harness.open()
    assert "old" in list(harness.store.topics())


# ---- starts that are refused


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_start_does_not_depend_on_a_removal(
    harness: StoreHarness, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    log_id = harness.log().identity.log_id
    harness.create("other")
    harness.crash()
    write_tombstones(harness.path, {log_id: Tombstone(TOPIC, 1)})

    def fail(source: Path, target: Path) -> None:
        raise OSError(number, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(removal.files, "move", fail)
        harness.open()
    assert list(harness.store.topics()) == ["other"]


def test_a_start_does_not_depend_on_a_switch(harness: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.crash()
    staged = harness.path / "staging" / ID / "topics" / TOPIC
    shutil.copytree(harness.path / "topics" / TOPIC, staged)
    write_resyncs(harness.path, [ResyncRow(id=ID, topic=TOPIC, phase="switching", targets=[0])])

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "move", fail)
        harness.open()
    assert len(harness.values()) == 30


def test_a_start_does_not_depend_on_the_copy(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the store of the copy cannot be made."""
    grown(tree)
    tree.stop("l2")
    write_resyncs(tree.directory / "l2", [ResyncRow(id=ID, topic="t", phase="loading", targets=[200])])
    real = files.make_directory

    def full(path: Path) -> None:
        if "staging" in path.parts and not path.exists():
            raise OSError(errno.ENOSPC, "full")
        real(path)

    monkeypatch.setattr(files, "make_directory", full)
    l2 = tree.start("l2", "root")
    assert end(l2, "t") == 200


# ---- in place, and a crash in the middle


def test_corrupt_ranges_of_a_log_that_was_recreated(harness: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when the files are recreated and what was noted about them is not stored yet."""
    log = harness.log()
    log.add_corrupt_range(CorruptRange(5, 9))
    harness.store._checkpoints.corrupt_ranges_changed(log)
    harness.stored()
    with monkeypatch.context() as patch:
        reached: list[int] = []

        def dies(self: PartitionLog, *a: object, **k: object) -> list[Any]:
            reached.append(1)
            raise RuntimeError("the power is cut here")

        patch.setattr(PartitionLog, "rewritten", dies)
        harness.engine.recreate(log, lambda old: old, lambda *told: None)  # type: ignore[attr-defined]
        turn(harness, lambda: reached)
        harness.crash()
    harness.open()
    assert harness.log().durable_end == 0
    assert harness.log().corrupt_ranges == []


# ---- the fresh copy cannot be opened


def _staged(harness: StoreHarness, tmp_path: Path, settings: Any = None) -> Path:
    """The same log in another store, closed."""
    staged = harness.path / "staging" / ID / "topics" / TOPIC
    other = StoreHarness(tmp_path / "copy", settings or store_settings(segment_bytes=1000))
    identity = read_identity(harness.directory())
    done: list[Outcome] = []
    other.store.create_mirror(TOPIC, [identity], lambda code, why: done.append(code))
    other.until(lambda: done)
    for path in harness.logs():
        data = path.read_bytes()
        while data:
            size = 12 + int.from_bytes(data[8:12], "big")
            taken, reason = other.engine.append_numbered(other.log(), memoryview(data[:size]))
            assert taken == size, reason
            other.durable()
            data = data[size:]
    other.close()
    staged.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "copy" / "topics" / TOPIC, staged)
    return staged


def test_a_copy_that_cannot_be_opened(harness: StoreHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a switch that failed the log goes on where its files are."""
    harness.fill(2)
    staged = _staged(harness, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            harness.store._opener, "reopen", lambda *a: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many"))
        )
        done: list[Outcome] = []
        harness.store.replacement.replace(TOPIC, staged, lambda *told: done.append(told[0]))
        turn(harness, lambda: done)
    assert done == [Outcome.OVERLOADED]
    harness.fill(5)
    assert len(harness.values()) == 37
    harness.restart()
    assert not harness.log().corrupt_ranges
    assert len(harness.values()) == 37


# ---- a cold read while the switch is under way


def test_a_read_in_the_middle_of_the_switch(
    harness: StoreHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files have been exchanged, and the loop does not know it yet: no reader is told of damage."""
    staged = _staged(harness, tmp_path, store_settings(segment_bytes=400))
    harness.restart()
    log = harness.log()
    real, go = harness.store._opener.reopen, threading.Event()
    exchanged = threading.Event()

    def slow(*a: Any) -> Any:
        exchanged.set()
        go.wait(10)
        return real(*a)

    monkeypatch.setattr(harness.store._opener, "reopen", slow)
    done: list[Outcome] = []
    harness.store.replacement.replace(TOPIC, staged, lambda *told: done.append(told[0]))
    turn(harness, exchanged.is_set)
    sizes = {segment.path: segment.size for segment in log.segments[:-1]}
    found: list[Any] = []
    try:
        for segment in log.segments[:-1]:
            harness.engine.read_cold(log, segment.end_offset - 1, 1 << 20, found.append)
        deadline = time.monotonic() + 3.0
        while len(found) < len(sizes) and time.monotonic() < deadline:
            harness.loop.turn(0.01)
        answered = len(found)
    finally:
        for path, size in sizes.items():  # end what goes round and round
            if path.exists() and path.stat().st_size < size:
                os.truncate(path, size)
        go.set()
        turn(harness, lambda: done)
    assert answered == len(sizes), "the reader thread never comes back"
    assert [one.corrupt for one in found if one.corrupt] == []


# ---- who is told DELETED of a log that lives


@pytest.mark.slow
def test_a_log_that_came_back_is_not_called_deleted_while_it_is_repaired(tree: Tree, tmp_path: Path) -> None:
    root = revived(tree, tmp_path)
    l2 = tree.nodes["l2"]
    pos = tree.start("pos", "l2")
    follows(root, pos, "t")
    tree.stop("pos")
    log = l2.broker.engine.log("t", 0)
    assert log is not None
    l2.call(lambda: setattr(log, "rewriting", True))  # as while it is cut, repaired, recreated, switched
    pos = tree.start("pos", "l2")
    wait_for(lambda: line(pos, "t")["state"] != "live", "it was answered")
    time.sleep(0.3)
    l2.call(lambda: setattr(log, "rewriting", False))
    publish(root, "t", 210, 10)
    time.sleep(2.0)
    assert "t" in topics(pos), "it was deleted, and does not come back"


@pytest.mark.slow
def test_an_old_tombstone_deletes_no_newer_history(tree: Tree, tmp_path: Path) -> None:
    """Hub b knows the deletion and was cut off when the topic came back; a terminal fails over to it."""
    root = grown(tree)
    follows(root, tree.start("b", "root", level="l2"), "t")
    assert main(["backup", str(tmp_path / "copy"), "--admin", tree.admin("root")]) == 0
    assert root.http("DELETE", "/v1/topics/t")[0] == 200
    for name in ("l2", "b"):
        wait_for(lambda name=name: "t" not in topics(tree.nodes[name]), f"{name} deletes it")  # type: ignore[misc]
    tree.stop("b")
    tree.stop("root")
    shutil.rmtree(tmp_path / "root")
    assert main(["restore", str(tmp_path / "copy"), "--data-dir", str(tmp_path / "root")]) == 0
    root = tree.start("root")
    root.advance(31.0)  # its children have said what they have
    publish(root, "t", 200, 10)
    follows(root, tree.nodes["l2"], "t")
    pos = tree.start("pos", "l2")
    follows(root, pos, "t")
    tree.stop("pos")
    tree.stop("root")
    tree.start("b", "root", level="l2")
    pos = tree.start("pos", "b")
    wait_for(lambda: pipe(pos)["parent"]["connected"], "pos follows b")
    publish(tree.nodes["b"], "sign", 0, 1)
    follows(tree.nodes["b"], pos, "sign")
    time.sleep(0.3)
    assert "t" in topics(pos), "a terminal deleted a log that lives"


# ---- another log without consent


@pytest.mark.slow
def test_a_copy_of_another_log_needs_consent(tree: Tree) -> None:
    """The parent is replaced between the order and the first byte of the copy."""
    grown(tree)
    before = tree.nodes["l2"].broker.engine.log("t", 0).identity.log_id  # type: ignore[union-attr]
    tree.stop("l2")
    tree.stop("root")
    write_resyncs(tree.directory / "l2", [ResyncRow(id=ID, topic="t", phase="loading", targets=[200])])
    shutil.rmtree(tree.directory / "root")
    root = tree.start("root")
    publish(root, "t", 0, 250)
    l2 = tree.start("l2", "root")
    wait_for(lambda: line(l2, "t")["state"] == "replaced" or state(l2)[0] == "done", "it is seen")
    for _ in range(100):
        l2.advance(1.0)
        time.sleep(0.01)
    assert l2.broker.engine.log("t", 0).identity.log_id == before  # type: ignore[union-attr]


# ---- what a copy leaves at the parent


@pytest.mark.slow
def test_a_reset_that_is_over_holds_nothing_back(tree: Tree) -> None:
    root = grown(tree)
    l2 = tree.nodes["l2"]
    assert order(l2)[0] == 200
    until(l2, "done")
    for number in range(5):
        publish(root, "t", 200 + number * 10, 10)
        follows(root, l2, "t")
    l2.call(lambda: l2.broker.mirroring.upstream.again("ask again"))  # type: ignore[union-attr]
    log = root.broker.engine.log("t", 0)
    assert log is not None

    def floor() -> int | None:
        return root.call(lambda: root.broker.events.retention_floor(log))

    wait_for(lambda: len(root.broker.downstream._asked[log]) >= 1, "it asks")
    root.advance(24 * 3600.0)
    wait_for(lambda: pipe(l2)["parent"]["connected"], "connected")
    l2.call(lambda: l2.broker.mirroring.upstream.again("ask again"))  # type: ignore[union-attr]
    time.sleep(1.0)
    assert floor() == 250, "the place of the copy holds early retention back for a week"


# ---- orders that were refused


@pytest.mark.slow
def test_an_order_that_was_refused_does_nothing(tree: Tree) -> None:
    root = grown(tree)
    publish(root, "u", 0, 5)
    l2 = tree.nodes["l2"]
    follows(root, l2, "u")
    assert order(l2, "u", id=OTHER, hours="00:00-00:01")[0] == 200
    status, answer = order(l2, "")
    assert (status, answer["code"]) == (503, "OVERLOADED")
    assert state(l2) == ("", ""), "and topic t is loaded again nevertheless"


@pytest.mark.slow
def test_an_order_that_was_not_stored_does_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    grown(tree)
    l2 = tree.nodes["l2"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "edgebroker.storage.rewrite.replace.write_resyncs", lambda *a: (_ for _ in ()).throw(OSError(28, "full"))
        )
        assert order(l2)[0] == 503
    for _ in range(30):
        l2.advance(1.0)
        time.sleep(0.02)
    assert state(l2)[0] == ""


# ---- made again while it is loaded


@pytest.mark.slow
def test_a_topic_made_again_with_other_partitions(tree: Tree) -> None:
    root = grown(tree)
    tree.stop("l2")
    l2 = tree.start("l2", "root", pipe__bytes_per_second=20_000)
    assert order(l2)[0] == 200
    until(l2, "loading")
    assert root.http("DELETE", "/v1/topics/t")[0] == 200
    root.create("t", partitions=2)
    wait_for(lambda: len(l2.broker.engine.partitions("t")) == 2, "l2 has the new one")
    for _ in range(100):
        l2.advance(1.0)
        if state(l2)[0] == "failed":
            break
        time.sleep(0.02)
    failed, l2.broker.loop.failed_callbacks = l2.broker.loop.failed_callbacks, 0
    assert (state(l2)[0], failed) == ("failed", 0)


# ---- deleted in the moment of the switch


@pytest.mark.slow
def test_a_topic_deleted_in_the_moment_of_the_switch(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tombstone takes the disk three seconds; meanwhile the hours of the switch begin."""
    root = grown(tree)
    l2 = tree.nodes["l2"]
    second = [12 * 3600.0]
    monkeypatch.setattr("edgebroker.broker.mirror.resync.second_of_day", lambda wall_ms: second[0])
    assert order(l2, hours="02:00-04:00")[0] == 200
    until(l2, "held")
    real = removal.write_tombstones

    def slow(path: Path, tombstones: Any) -> None:
        if path.name == "l2":
            time.sleep(3.0)
        real(path, tombstones)

    # The copy hears of it later than its node.
    monkeypatch.setattr(FreshCopy, "_delete", lambda self, topic, done, epochs: None)
    monkeypatch.setattr(removal, "write_tombstones", slow)
    assert root.http("DELETE", "/v1/topics/t")[0] == 200
    wait_for(lambda: line(l2, "t")["state"] == "moving", "l2 is deleting it")
    second[0] = 3 * 3600.0
    l2.advance(1.0)
    wait_for(lambda: "t" not in topics(l2), "it is deleted")
    publish(root, "u", 0, 5)
    deadline = time.monotonic() + 8
    while end(l2, "u") < 5 and time.monotonic() < deadline:
        l2.advance(1.0)
        time.sleep(0.05)
    failed, l2.broker.loop.failed_callbacks = l2.broker.loop.failed_callbacks, 0
    assert (end(l2, "u"), failed) == (5, 0), "nothing comes from the parent any more"


# ---- promoted in the moment of the switch


@pytest.mark.slow
def test_a_node_that_is_promoted_keeps_what_it_writes(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    grown(tree)
    l2 = tree.nodes["l2"]
    real, go = FreshCopy.has, [False]
    asked: list[int] = []

    def has(self: FreshCopy, ends: Any) -> bool:
        asked.append(1)
        return real(self, ends) and (len(asked) == 1 or go[0] or not self.records)

    def seen(self: FreshCopy, ends: Any) -> bool:
        # complete for the first look; behind while the pipe stands still, until the test says otherwise
        whole = real(self, ends)
        held = l2.broker.mirroring.resyncs is not None and l2.broker.mirroring.resyncs._busy
        return whole and (go[0] or not held)

    monkeypatch.setattr(FreshCopy, "has", seen)
    assert order(l2)[0] == 200
    for _ in range(200):
        l2.advance(0.5)
        if l2.broker.mirroring.resyncs is not None and l2.broker.mirroring.resyncs._held_since:
            break
        time.sleep(0.02)
    assert l2.http("POST", "/v1/promote", {"level": "root"})[0] == 200
    uid = l2.broker.engine.node_uid
    assert l2.broker.engine.log("t", 0).identity.origin == uid  # type: ignore[union-attr]
    go[0] = True
    time.sleep(1.0)
    assert l2.broker.engine.log("t", 0).identity.origin == uid, "it mirrors again, and nobody feeds it"  # type: ignore[union-attr]


# ---- deleted while it is repaired, changed, ...


@pytest.mark.slow
def test_a_topic_deleted_while_it_is_repaired(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child follows; afterwards other topics can still be repaired."""
    root = grown(tree)
    tree.stop("l2")
    path = sorted((tree.directory / "root" / "topics" / "t" / "0").glob("*.log"))
    tree.stop("root")
    data = bytearray(path[0].read_bytes())
    data[len(data) // 2] ^= 1
    path[0].write_bytes(data)
    root = tree.start("root")
    l2 = tree.start("l2", "root")
    wait_for(lambda: root.broker.engine.log("t", 0).corrupt_ranges, "the damage is found")  # type: ignore[union-attr]
    wait_for(lambda: pipe(l2)["parent"]["connected"], "l2 follows")
    from edgebroker.storage.rewrite import rewriter

    real_repair, real_write, begun = rewriter.repair_segment, removal.write_tombstones, threading.Event()

    def slow_write(path: Path, tombstones: Any) -> None:
        begun.set()
        time.sleep(1.0)
        real_write(path, tombstones)

    def slow_repair(target: Any, data: bytes) -> Any:
        time.sleep(1.0)  # children ask again meanwhile
        return real_repair(target, data)

    monkeypatch.setattr(removal, "write_tombstones", slow_write)
    monkeypatch.setattr(rewriter, "repair_segment", slow_repair)
    # The child hears of it later.
    l2.call(lambda: setattr(l2.broker.mirroring.upstream._mirrors, "_delete", lambda topic: None))  # type: ignore[union-attr]
    deleting = threading.Thread(target=lambda: root.http("DELETE", "/v1/topics/t"))
    deleting.start()
    assert begun.wait(10)
    repairing = threading.Thread(
        target=lambda: root.http("POST", "/v1/repair", {"from": tree.address("l2"), "topic": "t"}), daemon=True
    )
    repairing.start()
    deleting.join(8.0)
    time.sleep(1.0)
    failed, root.broker.loop.failed_callbacks = root.broker.loop.failed_callbacks, 0
    assert (failed, root.broker.mirroring.repairs._busy) == (0, None), "nothing is ever repaired again"


# ---- the pipe while a copy cannot catch up


@pytest.mark.slow
def test_other_topics_come_while_a_copy_cannot_catch_up(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the node has more than the copy may never come: its parent is another one, or lost it."""
    root = grown(tree)
    l2 = tree.nodes["l2"]
    publish(root, "u", 0, 1)
    follows(root, l2, "u")
    real = FreshCopy.has

    def behind(self: FreshCopy, ends: Any) -> bool:
        held = l2.broker.mirroring.resyncs is not None and l2.broker.mirroring.resyncs._busy
        return real(self, ends) and not held

    monkeypatch.setattr(FreshCopy, "has", behind)
    assert order(l2)[0] == 200
    held = 0
    waits = []
    deadline = time.monotonic() + 25
    sent = 1
    while time.monotonic() < deadline:
        if not held:
            l2.advance(0.5)
            held = l2.broker.mirroring.resyncs._held_since > 0  # type: ignore[union-attr]
            time.sleep(0.05)
            continue
        began = time.monotonic()
        publish(root, "u", sent, 1)
        sent += 1
        while end(l2, "u") < sent and time.monotonic() < deadline:
            time.sleep(0.01)
        waits.append(round(time.monotonic() - began, 1))
    assert max(waits) < 3.0, waits


# ---- the disk fills up while the copy is loaded


@pytest.mark.slow
def test_a_copy_that_fills_the_disk_gives_way(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    grown(tree)
    tree.stop("l2")
    l2 = tree.start("l2", "root", pipe__bytes_per_second=30_000)
    copy = tree.directory / "l2" / "staging" / ID / "topics" / "t" / "0"

    def space(path: Path) -> tuple[int, int]:
        if "l2" not in str(path):
            return 100 << 30, 1 << 40
        used = sum(one.stat().st_size for one in copy.glob("*.log")) if copy.exists() else 0
        return ((100 << 30) if used < 20_000 else (1 << 20)), 1 << 40

    monkeypatch.setattr(files, "free_space", space)
    assert order(l2)[0] == 200
    wait_for(lambda: l2.advance(0.2) or "disk_full" in l2.broker.problems(), "the disk is full")  # type: ignore[func-returns-value]
    # The copy begins again later, and gives way again.
    wait_for(lambda: l2.advance(5.0) or "disk_full" not in l2.broker.problems(), "the copy gives way")  # type: ignore[func-returns-value]


# ---- another parent while it is loaded


@pytest.mark.slow
def test_the_copy_follows_its_node_to_another_parent(tree: Tree) -> None:
    """What the registry says later is for the copy as well."""
    root = tree.start("root")
    for number in range(20):
        publish(root, "t", number * 10, 10, size=900)
    for name in ("a", "b"):
        follows(root, tree.start(name, "root", level="l2"), "t")
    pos = tree.start("pos", "a", pipe__bytes_per_second=30_000)
    follows(root, pos, "t")
    assert order(pos)[0] == 200
    until(pos, "loading")
    wait_for(lambda: pos.advance(0.2) or len(pipe(tree.nodes["a"])["children"]) == 2, "the copy asks")  # type: ignore[func-returns-value]

    def moved() -> None:
        pos.broker.mirroring.upstream.candidates.replace([tree.address("b")])  # type: ignore[union-attr]
        pos.broker.mirroring.upstream.again("the registry names another one")  # type: ignore[union-attr]

    pos.call(moved)
    tree.stop("a")
    publish(root, "t", 200, 10)
    follows(root, pos, "t")
    for _ in range(150):
        pos.advance(2.0)
        if state(pos)[0] == "done":
            break
        time.sleep(0.02)
    assert state(pos)[0] == "done", state(pos)


# ---- the loop while a copy is opened and closed


@pytest.mark.slow
def test_the_loop_does_not_wait_for_a_slow_disk(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync takes 200 ms on worn flash; rule 8: the loop does not wait for any."""
    grown(tree)
    l2 = tree.nodes["l2"]
    loop_thread = l2._thread
    real, waited = os.fsync, [0.0]

    def slow(fd: int) -> None:
        if threading.current_thread() is loop_thread:
            waited[0] += 0.2
        real(fd)

    monkeypatch.setattr(os, "fsync", slow)
    assert order(l2)[0] == 200
    until(l2, "done")
    assert waited[0] == 0.0, f"{waited[0] / 0.2:.0f} syncs on the loop"


# ---- what came of many topics


@pytest.mark.slow
def test_a_failure_is_not_forgotten_among_many(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree)
    l2 = tree.nodes["l2"]
    names = [f"u{number}" for number in range(6)]
    for name in names:
        publish(root, name, 0, 3)
        follows(root, l2, name)
    assert order(l2, "")[0] == 200
    assert l2.http("DELETE", f"/v1/resyncs/{ID}")[0] in (200, 503)
    wait_for(
        lambda: (
            l2.advance(0.3)
            or all(r["state"] in ("done", "failed") for r in l2.http("GET", "/v1/resyncs")[1]["resyncs"])
        ),  # type: ignore[func-returns-value]
        "all are over",
    )
    states = [row["state"] for row in l2.http("GET", "/v1/resyncs")[1]["resyncs"]]
    assert "failed" in states
    told = [one.state for one in l2.call(lambda: l2.broker.mirroring.resyncs.reports())]  # type: ignore[union-attr]
    assert "failed: aborted by an operator" in told, (states, told)


# ---- a switch that was begun, of a topic that was deleted


def test_a_deleted_topic_does_not_come_back_by_a_switch(harness: StoreHarness) -> None:
    log_id = harness.log().identity.log_id
    harness.crash()
    shutil.copytree(harness.path / "topics" / TOPIC, harness.path / "staging" / ID / "topics" / TOPIC)
    write_tombstones(harness.path, {log_id: Tombstone(TOPIC, 1)})
    write_resyncs(harness.path, [ResyncRow(id=ID, topic=TOPIC, phase="switching", targets=[30])])
    harness.open()
    assert list(harness.store.topics()) == []


# ---- what many resets leave, and a stop in the middle


@pytest.mark.slow
def test_many_resets_leave_nothing(tree: Tree) -> None:
    grown(tree)
    l2 = tree.nodes["l2"]

    def counts() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    found = []
    for number in range(6):
        reset_id = f"{number + 1:032x}"
        assert order(l2, id=reset_id)[0] == 200
        until(l2, "done", reset_id)
        time.sleep(0.3)
        found.append(counts())
    for number in range(6):
        reset_id = f"{number + 101:032x}"
        assert order(l2, id=reset_id, hours="00:00-00:01")[0] == 200
        until(l2, "held", reset_id)
        assert l2.http("DELETE", f"/v1/resyncs/{reset_id}")[0] == 200
        time.sleep(0.3)
        found.append(counts())
    assert found[-1][0] <= found[0][0] and found[-1][1] <= found[0][1] + 2, found


@pytest.mark.slow
def test_a_stop_while_the_copy_is_closed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is closed for its switch; the node waits for it."""
    grown(tree)
    l2 = tree.nodes["l2"]
    from edgebroker.storage.store import SegmentStore

    real, closing = SegmentStore.flush, [0.0]

    def flush(self: SegmentStore) -> bool:
        if "staging" in self._path.parts and (closing[0] == 0.0 or time.monotonic() < closing[0] + 2.0):
            closing[0] = closing[0] or time.monotonic()
            return False
        return real(self)

    monkeypatch.setattr(SegmentStore, "flush", flush)
    assert order(l2)[0] == 200
    wait_for(lambda: l2.advance(0.3) or closing[0], "it is being closed")  # type: ignore[func-returns-value]
    assert l2.broker.mirroring.resyncs is not None
    before = {thread.name for thread in threading.enumerate()}
    tree.stop("l2")
    time.sleep(0.5)
    lock = tree.directory / "l2" / "staging" / ID / "LOCK"
    l2 = tree.start("l2", "root")
    until(l2, "done")
    assert l2.broker.loop.failed_callbacks == 0, (before, lock)
