"""A copy of a running node, put back: the same logs, in a new history; or under another node, as a mirror."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from tests.integration.test_topic_undelete import problems
from tests.kit.brokers import RunningBroker, numbered
from tests.kit.trees import Tree, chain, digest, end, follows, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else captured.err


def test_root_is_put_back(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree.start("root")
    for number in range(12):
        publish(root, "prices", number * 10, 10, size=1500)
    client = root.raw("till")
    client.subscribe("prices", "tills")
    head = client.deliver().head
    assert client.acked(head, 7) is Code.OK
    child = tree.start("l2", "root")
    follows(root, child, "prices")
    copy = tmp_path / "copy"
    made = run(capsys, "backup", str(copy), "--admin", tree.address("root"))
    assert made["logs"] == 1
    assert "not empty" in run(capsys, "backup", str(copy), "--admin", tree.address("root"), code=2)
    log_id = root.broker.engine.log("prices", 0).identity.log_id  # type: ignore[union-attr]
    publish(root, "prices", 1000, 5)
    follows(root, child, "prices")
    tree.stop("root")
    shutil.rmtree(tree.directory / "root")
    put_back = ("restore", str(copy), "--data-dir", str(tree.directory / "root"))
    why = run(capsys, *put_back, "--compare", tree.address("l2"), code=1)
    assert f"{tree.address('l2')} has 5 records that the backup lacks. Nothing was restored: promote" in why
    assert not (tree.directory / "root").exists()
    run(capsys, *put_back, "--compare", tree.address("l2"), "--accept-loss")
    root = tree.start("root")
    log = root.broker.engine.log("prices", 0)
    assert log is not None
    assert (log.durable_end, log.identity.log_id, log.epoch, log.identity.restored) == (120, log_id, 2, False)
    assert root.http("GET", "/v1/groups/tills")[1]["partitions"][0]["committed"] == 7
    assert root.raw("producer").publish("prices", numbered(2000, 3)).offset == 120
    follows(root, child, "prices")
    assert chain(child, "prices") == chain(root, "prices")
    tree.stop("root")
    root = tree.start("root")
    assert root.broker.engine.log("prices", 0).epoch == 2, "once"  # type: ignore[union-attr]
    for name in ("l2", "root"):
        tree.stop(name)
    assert digest(tree, "root", "prices") == digest(tree, "l2", "prices")


def restored(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[RunningBroker, RunningBroker]:
    """A root that was restored without a word about its child, which has five records more."""
    root = tree.start("root")
    publish(root, "prices", 0, 20)
    child = tree.start("l2", "root")
    follows(root, child, "prices")
    run(capsys, "backup", str(tmp_path / "copy"), "--admin", tree.address("root"))
    publish(root, "prices", 20, 5)
    follows(root, child, "prices")
    tree.stop("root")
    shutil.rmtree(tree.directory / "root")
    run(capsys, "restore", str(tmp_path / "copy"), "--data-dir", str(tree.directory / "root"))
    return tree.start("root"), child


def test_what_children_have_beyond_the_copy_comes_back(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is truncated and nothing published until that is decided, over restarts; then all of it is there."""
    root, child = restored(tree, tmp_path, capsys)
    for again in range(2):
        wait_for(lambda: "history_lost" in problems(tree.nodes["root"]), "it is told")
        root.advance(60.0)
        assert root.raw(f"producer{again}").publish("prices", numbered(0, 1)).code is Code.HISTORY_LOST
        assert (end(root, "prices"), end(child, "prices")) == (20, 25)
        if not again:
            tree.stop("root")
            root = tree.start("root")
    assert main(["repair", "--from", tree.address("l2"), "--admin", tree.address("root")]) == 0
    assert end(root, "prices") == 25
    assert root.raw("producer").publish("prices", numbered(0, 1)).offset == 25
    follows(root, child, "prices")
    assert chain(child, "prices") == chain(root, "prices")
    assert child.counters()["log_truncations"] == 0


def test_the_loss_is_accepted_and_counted(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, child = restored(tree, tmp_path, capsys)
    wait_for(lambda: "history_lost" in problems(root), "it is told")
    assert main(["topic", "accept", "prices", "--admin", tree.address("root")]) == 0
    follows(root, child, "prices")
    assert (end(root, "prices"), end(child, "prices")) == (20, 20)
    assert child.counters()["records_truncated"] == 5
    assert root.raw("producer").publish("prices", numbered(0, 1)).offset == 20
    follows(root, child, "prices")

    def seen() -> bool:
        for node in (child, root):
            node.advance(2.0)
        nodes = root.http("GET", "/v1/tree/nodes")[1]["nodes"]
        return bool(nodes) and nodes[0]["truncated_records"] == 5

    wait_for(seen, "the tree says so")
    assert root.http("GET", "/v1/tree")[1]["truncated_records"] == 5


def test_a_copy_that_nobody_is_ahead_of(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its children get half a minute to say what they have; then it is written to."""
    root = tree.start("root")
    publish(root, "prices", 0, 20)
    run(capsys, "backup", str(tmp_path / "copy"), "--admin", tree.address("root"))
    tree.stop("root")
    shutil.rmtree(tree.directory / "root")
    run(capsys, "restore", str(tmp_path / "copy"), "--data-dir", str(tree.directory / "root"))
    root = tree.start("root")
    early = root.raw("producer").publish("prices", numbered(0, 1))
    assert (early.code, "its children are asked first" in early.message) == (Code.OVERLOADED, True)
    publish(root, "new", 0, 1)
    root.advance(31.0)
    assert root.raw("other").publish("prices", numbered(0, 1)).offset == 20


def test_a_terminal_begins_with_a_copy_of_its_parent(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree.start("root")
    for number in range(12):
        publish(root, "prices", number * 10, 10, size=1500)
    run(capsys, "backup", str(tmp_path / "copy"), "--admin", tree.address("root"))
    run(capsys, "restore", str(tmp_path / "copy"), "--data-dir", str(tree.directory / "pos"), "--preload")
    publish(root, "prices", 120, 2)
    terminal = tree.start("pos", "root")
    assert terminal.broker.engine.node_uid != root.broker.engine.node_uid
    assert end(terminal, "prices") >= 120
    follows(root, terminal, "prices")
    terminal.advance(1.0)
    wait_for(lambda: 0 < terminal.counters()["pipe_bytes_in"] < 1000, "only what is newer came")


def test_while_it_is_written_to_and_removed_from(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever moment is copied is a log that opens, without a gap."""
    root = tree.start("root", storage__retention_bytes=300_000)
    stop = threading.Event()

    def write() -> None:
        with root.producer() as producer:
            number = 0
            while not stop.is_set():
                producer.send("prices", b"%d" % number + b"." * 2000, partition=0)
                number += 1
                if number % 50 == 0:
                    producer.flush(10.0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_for(lambda: end(root, "prices") > 300, "there is something to copy")
        for number in range(5):
            run(capsys, "backup", str(tmp_path / f"copy{number}"), "--admin", tree.address("root"))
    finally:
        stop.set()
        writer.join(20.0)
    tree.stop("root")
    for number in range(5):
        shutil.rmtree(tree.directory / "root")
        run(capsys, "restore", str(tmp_path / f"copy{number}"), "--data-dir", str(tree.directory / "root"))
        root = tree.start("root")
        log = root.broker.engine.log("prices", 0)
        assert log is not None
        made = json.loads((tmp_path / f"copy{number}" / "BACKUP").read_text())
        assert (log.durable_end, log.corrupt_ranges) == (made["logs"]["prices/0"]["end"], [])
        reader = root.raw("reader")
        reader.subscribe("prices", "")
        following = log.log_start
        while following < log.durable_end:
            head = reader.deliver().head
            following = head.last + 1
        tree.stop("root")


def test_what_is_no_backup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd").mkdir()
    assert "not a complete backup" in run(
        capsys, "restore", str(tmp_path / "odd"), "--data-dir", str(tmp_path / "new"), code=2
    )
    assert not (tmp_path / "new").exists()
