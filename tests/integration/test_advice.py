"""What a node advises is safe to follow as it stands: on a node in that state, each piece of advice ends the problem,
and nothing that was acknowledged is lost."""

from __future__ import annotations

import re
import shutil
import sqlite3
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest

from edgebroker.broker.observe.problems import ADVICE
from edgebroker.cli.main import main
from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.pipe import fleet
from edgebroker.storage.log.reader import SegmentRead
from edgebroker.storage.metadata import meta_db
from edgebroker.storage.metadata.registry import RegistryStore
from edgebroker.storage.types import GroupOffset
from tests.integration.test_holders import BUDGET, GIVE_UP_SECONDS, fill
from tests.integration.test_registry import batch as batch_of_reports
from tests.integration.test_registry import root_of
from tests.integration.test_repair import flip, logs_of
from tests.integration.test_topic_delete import told_by_another_hub
from tests.integration.test_topic_undelete import problems, promoted_by_mistake
from tests.kit.brokers import RunningBroker, numbered
from tests.kit.trees import Tree, end, follows, grown, publish, reported
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

ROW = "Item,Price\n"


class Scene(NamedTuple):
    """A node by name, and what stands for the capital words of the commands."""

    node: str
    words: dict[str, str]
    kept: tuple[str, str, int] | None = None
    """Node, topic, and how many records of it have to be there in the end."""


def commands(problem: str) -> list[str]:
    """The commands that the advice names."""
    found = re.findall(r"edgebroker ((?:[a-z-]+ )*[a-z-]+(?: (?:--[a-z-]+|[A-Z-]+|skip))*)", ADVICE[problem])
    return [re.split(" here| says", command)[0] for command in found]


def carry_out(tree: Tree, scene: Scene, command: str) -> int:
    words = [scene.words.get(word, word) for word in command.split()]
    publishes = words[0] == "publish"
    if publishes:
        words += ["--server", tree.nodes[scene.node].server, "--quiet"]
    return main([*words, "--admin", tree.admin(scene.node)])


def is_over(tree: Tree, scene: Scene, problem: str) -> None:
    """The problem is gone, and the records are there."""

    def look() -> bool:
        for node in list(tree.nodes.values()):
            node.advance(3.0)
        return problem not in problems_of(tree.nodes[scene.node])

    wait_for(look, f"{problem} ends")
    if scene.kept is not None:
        name, topic, count = scene.kept
        wait_for(lambda: end(tree.nodes[name], topic) == count, f"{topic} is at {name}")


def has(tree: Tree, name: str, problem: str) -> None:
    def look() -> bool:
        for node in list(tree.nodes.values()):
            node.advance(1.0)
        return problem in problems_of(tree.nodes[name])

    wait_for(look, f"{name} says {problem}")


def problems_of(node: RunningBroker) -> set[str]:
    """The missing parent included."""
    return {*problems(node), *node.http("GET", "/readyz")[1]["warnings"]}


# ---- nodes in a state ----


def damaged(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    """Of an origin; a child has it."""
    root = tree.start("root")
    for number in range(40):
        publish(root, "t", number * 10, 10, size=900)
    follows(root, tree.start("l2", "root"), "t")
    tree.stop("root")
    flip(logs_of(tree, "root")[1])
    root = tree.start("root", storage__verify_bytes_per_second=0)
    has(tree, "root", "damaged")
    wait_for(lambda: root.broker.downstream.peers(), "its child is there, from this address")
    return Scene("root", {"NODE": tree.address("l2"), "TOPIC": "t"}, ("root", "t", 400))


def disk_full(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    """A child and a group are gone for good, both hold the same; another group has read everything."""
    root = tree.start("root", **BUDGET)
    for number in range(10):
        publish(root, "t", number * 10, 10, size=1000)
    follows(root, tree.start("l2", "root"), "t")
    root.advance(121.0)
    tree.stop("l2")
    reader = root.raw("gone")
    reader.subscribe("t", "dead-group")
    assert reader.acked(reader.deliver().head, 1) is Code.OK
    root.drop(reader)
    fill(root)
    has(tree, "root", "disk_full")
    with root.consumer(["t"], "tills", start="earliest", timeout=10.0) as consumer:
        for record in consumer.poll(1.0):
            consumer.ack(record)
    return Scene("root", {"NAME": "l2", "GROUP": "dead-group"})


def fleet_full(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    root = root_of(tree)
    mp.setattr(fleet, "MAX_NODES", 2 + fleet.KEPT_FOR_CHILDREN)
    reports = [
        {
            "report": {
                "uid": f"{number:032x}", "name": f"till-{number}", "level": "local", "version": "1", "boot": "0" * 16,
                "number": 1, "parent": "f" * 32,
            },
            "silent": 8 * 86_400.0,
        }
        for number in range(3)
    ]  # fmt: skip
    assert reported(root, batch_of_reports(*reports))[0] == 200
    has(tree, "root", "fleet_full")
    return Scene("root", {"TIME": "7d"})


def history_lost(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    root = tree.start("root")
    publish(root, "t", 0, 10)
    child = tree.start("l2", "root")
    follows(root, child, "t")
    tree.stop("root")
    tree.keep("root")
    root = tree.start("root")
    publish(root, "t", 10, 10)
    follows(root, child, "t")
    tree.stop("root")
    tree.put_back("root")
    tree.start("root")
    has(tree, "root", "history_lost")
    return Scene("root", {"NODE": tree.address("l2"), "TOPIC": "t"})


def name_clash(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    promoted_by_mistake(tree)
    return Scene("l2", {"TOPIC": "t", "NEW-NAME": "t.hub"}, ("l2", "t.hub", 201))


def not_mirrored(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    """The node was told that the topic is deleted, and its parent has it."""
    told_by_another_hub(tree)
    has(tree, "pos", "not_mirrored")
    return Scene("pos", {"TOPIC": "t"}, ("pos", "t", 50))


def removed_early(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    root = tree.start("root", **BUDGET)
    root.create("t")
    with root.consumer(["t"], "tills", start="earliest", timeout=10.0) as consumer:
        for number in range(90):
            publish(root, "t", number * 10, 10, size=1000)
            for record in consumer.poll(1.0):
                consumer.ack(record)
            root.advance(1.1)
    has(tree, "root", "removed_early")
    return Scene("root", {})


def replaced(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    root = tree.start("root")
    publish(root, "t", 0, 10)
    follows(root, tree.start("l2", "root"), "t")
    tree.stop("root")
    shutil.rmtree(tree.directory / "root")
    publish(tree.start("root"), "t", 500, 30)
    has(tree, "l2", "replaced")
    return Scene("l2", {"TOPIC": "t"}, ("l2", "t", 30))


def resync(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    """It has no room for the copy."""
    grown(tree)
    tree.stop("l2")
    hub = tree.start("l2", "root", storage__max_bytes=250_000, storage__hard_free_bytes=0, storage__soft_free_bytes=0)
    body = {"type": "resync", "id": "5" * 32, "uid": hub.broker.engine.node_uid, "topic": "t"}
    assert hub.http("POST", "/v1/resyncs", body)[0] == 200
    has(tree, "l2", "resync")
    return Scene("l2", {}, ("l2", "t", 200))


def snapshot_failed(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    root = tree.start("root")
    root.create("t", kind="table")
    assert root.raw("wrong").publish("t", batch.encode([(None, b"no key", 1)])).code is Code.OK
    for number in range(90):
        rows: list[tuple[bytes | None, bytes | None, int]] = [(b"%d" % key, bytes(1000), 1) for key in range(10)]
        assert root.raw(f"p{number}").publish("t", batch.encode(rows)).code is Code.OK
    tree.stop("root")
    tree.start("root", **BUDGET)
    has(tree, "root", "snapshot_failed")
    file = tree.directory / "content.csv"
    file.write_text(ROW + "".join(f"{key},1\n" for key in range(10)))
    return Scene("root", {"TOPIC": "t", "FILE": str(file), "COLUMN": "Item"})


def two_origins(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    grown(tree)
    hub = tree.nodes["l2"]
    assert hub.http("POST", "/v1/promote", {"level": "l2"})[0] == 200
    has(tree, "l2", "two_origins")
    return Scene("l2", {}, ("root", "t", 200))


def trust(tree: Tree, mp: pytest.MonkeyPatch) -> Scene:
    """The certificate of a node is damaged."""
    root = tree.start("root", **{"trust.fleet": "acme"})
    wait_for(lambda: root.http("GET", "/v1/trust")[1]["node"], "the fleet is created")
    wanted = {"tokens": [{"levels": ["l2"], "uses": 2}]}
    token = root.http("POST", "/v1/trust/tokens", wanted)[1]["tokens"][0]
    hub = tree.start("l2", "root")
    hub.http("POST", "/v1/trust/join", {"token": token})
    wait_for(lambda: hub.http("GET", "/v1/trust")[1]["node"], "it joins")
    publish(root, "t", 0, 10)
    follows(root, hub, "t")
    tree.stop("l2")
    (tree.directory / "l2" / "trust" / "node.crt").write_bytes(b"\0" * 100)
    tree.start("l2", "root")
    has(tree, "l2", "trust")
    publish(root, "t", 10, 10)
    return Scene("l2", {"TOKEN": token}, ("l2", "t", 20))


COMMANDS: dict[str, Callable[[Tree, pytest.MonkeyPatch], Scene]] = {
    "damaged": damaged,
    "disk_full": disk_full,
    "fleet_full": fleet_full,
    "history_lost": history_lost,
    "name_clash": name_clash,
    "not_mirrored": not_mirrored,
    "replaced": replaced,
    "resync": resync,
    "snapshot_failed": snapshot_failed,
    "trust": trust,
    "two_origins": two_origins,
}
# The others are ended by hand: at the disk, the line, the configuration, with a restart.
BY_HAND = {
    "certificate", "clock", "descriptors", "disk_stalled", "limits", "metadata", "not_carried", "parent", "read_only",
    "registry", "removed_early", "superseded", "unserved_topics",
}  # fmt: skip


def test_no_advice_is_forgotten() -> None:
    assert {*COMMANDS, *BY_HAND} == {*ADVICE}
    assert {problem for problem in ADVICE if commands(problem)} == {*COMMANDS}


@pytest.mark.parametrize(
    ("problem", "command"), [(problem, command) for problem in COMMANDS for command in commands(problem)]
)
def test_every_command_ends_its_problem(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, problem: str, command: str
) -> None:
    scene = COMMANDS[problem](tree, monkeypatch)
    assert carry_out(tree, scene, command) == 0
    if problem == "resync":  # that one only says more; then there is room
        return
    if command.startswith("topic accept") and problem == "history_lost":
        tree.nodes["root"].advance(1.0)  # what was given up is retained aside at the child
    if command == "child forget NAME":
        assert carry_out(tree, scene, "group delete GROUP") == 0  # the other one holds the same
    if command == "group delete GROUP":
        assert carry_out(tree, scene, "child forget NAME") == 0
    if command.startswith("promote"):
        tree.stop("l2")
        tree.start("l2", "root")
    is_over(tree, scene, problem)


# ---- what is ended by hand ----


def test_space_and_a_larger_budget(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """`disk_full`, `removed_early`, `resync` and `snapshot_failed` end with a larger storage.max_bytes."""
    for scene_of in (disk_full, removed_early, resync, snapshot_failed):
        scene = scene_of(tree, monkeypatch)
        parents = ["root"] if scene.node == "l2" else []
        tree.stop(scene.node)
        tree.start(scene.node, *parents, **{**BUDGET, "storage__max_bytes": 0})
        is_over(tree, scene, scene_of.__name__)
        if scene.node == "root":
            assert tree.nodes["root"].raw("again").publish("t", numbered(0, 1)).code is Code.OK
        tree.close()
        for name in ("root", "l2"):
            shutil.rmtree(tree.directory / name, ignore_errors=True)


def test_giving_up_holders_needs_nobody(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows no advice at all gets rid of the dead ones too, by and by."""
    scene = disk_full(tree, monkeypatch)
    tree.nodes["root"].advance(GIVE_UP_SECONDS)
    is_over(tree, scene, "disk_full")


def test_the_parent_comes_back(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 10)
    follows(root, tree.start("l2", "root"), "t")
    tree.stop("root")
    has(tree, "l2", "parent")
    assert tree.nodes["l2"].raw("till").subscribe("t", "tills").code is Code.OK, "it serves what it has"
    tree.start("root")
    is_over(tree, Scene("l2", {}, ("l2", "t", 10)), "parent")


def test_the_promoted_node_is_followed(tree: Tree) -> None:
    """`superseded`: started below the promoted one, with a lower level; it has what was published there."""
    grown(tree)
    tree.stop("root")
    hub = tree.nodes["l2"]
    assert hub.http("POST", "/v1/promote", {"level": "root"})[0] == 200
    publish(hub, "t", 200, 5)
    tree.start("root")
    has(tree, "root", "superseded")
    tree.stop("root")
    tree.start("root", "l2", level="l3")
    is_over(tree, Scene("root", {}, ("root", "t", 205)), "superseded")


def test_what_the_parent_does_not_carry_stays(tree: Tree) -> None:
    """`not_carried`: nothing is to be done at the node, and nothing happens to its copy."""
    grown(tree)
    tree.stop("root")
    tree.start("other", level="root")
    tree.stop("l2")
    tree.start("l2", "other")
    has(tree, "l2", "not_carried")
    tree.nodes["l2"].advance(4000.0)
    assert end(tree.nodes["l2"], "t") == 200
    tree.stop("l2")
    tree.start("root")
    tree.start("l2", "root")
    is_over(tree, Scene("l2", {}, ("l2", "t", 200)), "not_carried")


def test_a_restart_ends_read_only(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 10)
    committer = root.broker.engine._committer  # type: ignore[attr-defined]
    root.call(lambda: setattr(committer, "read_only", "t/0: Input/output error"))
    has(tree, "root", "read_only")
    assert root.raw("refused").publish("t", numbered(0, 1)).code is Code.READ_ONLY
    tree.stop("root")
    tree.start("root")
    is_over(tree, Scene("root", {}, ("root", "t", 10)), "read_only")


def test_a_disk_that_answers_again(tree: Tree) -> None:
    """`disk_stalled`: a read hangs; meanwhile what is in memory is delivered."""
    root = tree.start("root", storage__read_timeout_ms=100)
    publish(root, "t", 0, 10)
    reader = root.broker.engine._reader  # type: ignore[attr-defined]
    begun, hangs = threading.Event(), threading.Event()

    def job() -> SegmentRead:
        begun.set()
        hangs.wait(30.0)
        return SegmentRead()

    root.call(lambda: reader.submit(job, lambda found: None))
    assert begun.wait(10.0), "one that is late before it begins is left out"
    has(tree, "root", "disk_stalled")
    client = root.raw("till")
    client.subscribe("t", "tills")
    assert client.deliver().offsets == list(range(10))
    hangs.set()
    is_over(tree, Scene("root", {}, ("root", "t", 10)), "disk_stalled")


def test_a_metadata_file_that_can_be_written_again(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 10)
    with monkeypatch.context() as patch:

        def full(*arguments: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        patch.setattr(meta_db.MetaDatabase, "_apply", full)
        log = root.broker.engine.log("t", 0)
        assert log is not None
        offset = GroupOffset(log.identity.log_id, log.epoch, 5)
        root.call(lambda: root.broker.engine.commit_offset(("tills", "t", 0), offset))
        has(tree, "root", "metadata")
    is_over(tree, Scene("root", {}, ("root", "t", 10)), "metadata")
    tree.stop("root")
    lines = tree.start("root").http("GET", "/v1/groups/tills")[1]["partitions"]
    assert lines[0]["committed"] == 5


def test_a_registry_that_can_be_written_again(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = root_of(tree)
    with monkeypatch.context() as patch:

        def full(*arguments: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        patch.setattr(RegistryStore, "_apply", full)
        assert root.http("PUT", "/v1/registry/root/drain")[0] == 503
        has(tree, "root", "registry")
    is_over(tree, Scene("root", {}), "registry")


def test_a_topic_whose_directory_can_be_read_again(tree: Tree) -> None:
    """`unserved_topics`: the rights of a directory, then a restart."""
    root = tree.start("root")
    publish(root, "t", 0, 10)
    tree.stop("root")
    identity = tree.directory / "root" / "topics" / "t" / "0" / "identity"
    identity.rename(identity.with_name("kept"))
    identity.mkdir()
    tree.start("root")
    has(tree, "root", "unserved_topics")
    tree.stop("root")
    identity.rmdir()
    identity.with_name("kept").rename(identity)
    tree.start("root")
    is_over(tree, Scene("root", {}, ("root", "t", 10)), "unserved_topics")


def test_removed_early_is_told_for_an_hour(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = removed_early(tree, monkeypatch)

    def look() -> bool:
        tree.nodes["root"].advance(3601.0)  # and again: what was due may have been removed behind the jump
        return "removed_early" not in problems_of(tree.nodes[scene.node])

    wait_for(look, "it is told no more")
