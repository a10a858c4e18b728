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
from tests.kit.brokers import numbered
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
    run(capsys, "restore", str(copy), "--data-dir", str(tree.directory / "root"))
    root = tree.start("root")
    log = root.broker.engine.log("prices", 0)
    assert log is not None
    assert (log.durable_end, log.identity.log_id, log.epoch) == (120, log_id, 2)
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
