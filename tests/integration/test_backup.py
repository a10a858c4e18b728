"""A copy of a running node, put back: the same logs, in a new history; or under another node, as a mirror."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.commands import backup
from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from tests.integration.test_topic_undelete import problems
from tests.kit.brokers import RunningBroker, numbered, running
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
    made = run(capsys, "backup", str(copy), "--admin", tree.admin("root"))
    assert made["logs"] == 1
    assert "not empty" in run(capsys, "backup", str(copy), "--admin", tree.admin("root"), code=2)
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
    run(capsys, "backup", str(tmp_path / "copy"), "--admin", tree.admin("root"))
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
    assert main(["repair", "--from", tree.address("l2"), "--admin", tree.admin("root")]) == 0
    assert end(root, "prices") == 25
    assert root.raw("producer").publish("prices", numbered(0, 1)).offset == 25
    follows(root, child, "prices")
    assert chain(child, "prices") == chain(root, "prices")
    assert child.counters()["log_truncations"] == 0


def test_the_loss_is_accepted_and_counted(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, child = restored(tree, tmp_path, capsys)
    wait_for(lambda: "history_lost" in problems(root), "it is told")
    assert main(["topic", "accept", "prices", "--admin", tree.admin("root")]) == 0
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
    run(capsys, "backup", str(tmp_path / "copy"), "--admin", tree.admin("root"))
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
    run(capsys, "backup", str(tmp_path / "copy"), "--admin", tree.admin("root"))
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
            run(capsys, "backup", str(tmp_path / f"copy{number}"), "--admin", tree.admin("root"))
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningBroker, Path]]:
    """A node, and a copy of it."""
    directory = tmp_path_factory.mktemp("made")
    with running(directory / "node") as node:
        publish(node, "prices", 0, 20)
        host, port = node.broker.listeners.http_address
        assert main(["backup", str(directory / "copy"), "--admin", f"{host}:{port}", "--json"]) == 0
        yield node, directory / "copy"


def altered(copy: Path, **changes: Any) -> None:
    manifest = json.loads((copy / "BACKUP").read_text())
    (copy / "BACKUP").write_text(json.dumps({**manifest, **changes}))


LOG = "topics/prices/0"
SEGMENT = f"{LOG}/{0:020}.log"


def as_link(copy: Path, name: str) -> None:
    """Something of the copy lies elsewhere, and a link leads there."""
    (copy / name).rename(copy.with_name("elsewhere"))
    (copy / name).symlink_to(copy.with_name("elsewhere"))


def as_fifo(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a log beside the directory": (
        lambda copy: altered(copy, logs={"../../victim": {"end": 1, "bytes": 1}}), "'../../victim' is not the name of"),
    "a log at an absolute path": (
        lambda copy: altered(copy, logs={"/etc/0": {"end": 1, "bytes": 1}}), "'/etc/0' is not the name of a log"),
    "a partition that climbs": (
        lambda copy: altered(copy, logs={"t/..": {"end": 1, "bytes": 1}}), "'t/..' is not the name of a log"),
    "a log that is not there": (
        lambda copy: altered(copy, logs={"gone/0": {"end": 1, "bytes": 1}}), "not a complete backup"),
    "another kind of manifest": (lambda copy: altered(copy, logs=[]), "not a complete backup: BACKUP: Expected"),
    "numbers that are none": (
        lambda copy: altered(copy, logs={"prices/0": {"end": "x", "bytes": []}}), "not a complete backup: BACKUP:"),
    "deep nesting": (lambda copy: (copy / "BACKUP").write_text("[" * 100_000), "not a complete backup: BACKUP:"),
    "a file of another name": (
        lambda copy: (copy / LOG / "authorized_keys").write_text("x"), "'authorized_keys' is not the name of"),
    "a segment that is a link": (lambda copy: as_link(copy, SEGMENT), f"{SEGMENT} is a link"),
    "a segment that is a pipe": (lambda copy: as_fifo(copy, SEGMENT), f"{SEGMENT} is not a regular file"),
    "an identity that is a link": (lambda copy: as_link(copy, f"{LOG}/identity"), "identity is a link"),
    "a topic that is a link": (lambda copy: as_link(copy, "topics/prices"), "topics/prices is a link"),
    "topics that are a link": (lambda copy: as_link(copy, "topics"), "topics is a link"),
    "a node that is a link": (lambda copy: as_link(copy, "node"), "node is a link"),
    "offsets that are a pipe": (lambda copy: as_fifo(copy, "offsets.snap"), "offsets.snap is not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_copy_of_a_hostile_medium(
    made: tuple[RunningBroker, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """It is refused in one sentence before anything is written."""
    spoil, said = HOSTILE[name]
    copy = tmp_path / "medium" / "copy"
    shutil.copytree(made[1], copy)
    spoil(copy)
    code = main(["restore", str(copy), "--data-dir", str(tmp_path / "new" / "data")])
    error = capsys.readouterr().err
    assert (code in (2, 4), said in error, error.count("\n"), "Traceback" in error) == (True, True, 1, False), error
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["medium"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("topic", "../../../out", "is not the name of a log"),
        ("partition", "../0", "is not the name of a log"),
        ("file", "../../../identity", "is not the name of a segment file"),
        ("file", "authorized_keys", "is not the name of a segment file"),
    ],
)
def test_a_backup_of_a_hostile_node(
    made: tuple[RunningBroker, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    field: str,
    value: str,
    said: str,
) -> None:
    host, port = made[0].broker.listeners.http_address
    answer = call(f"{host}:{port}", "GET", "/v1/backup")
    log = answer["logs"][0]
    (log["segments"][0] if field == "file" else log)[field] = value
    monkeypatch.setattr(backup, "call", lambda *_: answer)
    assert main(["backup", str(tmp_path / "copy"), "--admin", "hostile:1"]) == 4
    error = capsys.readouterr().err
    assert (said in error, error.count("\n")) == (True, 1), error
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"identity"}
    assert [path.name for path in tmp_path.iterdir()] in ([], ["copy"])
