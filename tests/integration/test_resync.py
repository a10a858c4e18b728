"""Loading topics again over the tree: beside the old data, in one step, and whatever is killed meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from edgebroker.common.types import Start
from edgebroker.storage.rewrite import replace as replacement
from edgebroker.storage.rewrite.replace import FILE_NAME, exchange, finish_replacements, read_resyncs, write_resyncs
from edgebroker.storage.types import ResyncRow
from tests.kit.brokers import RunningBroker
from tests.kit.trees import Tree, digest, end, follows, grown, pipe, publish, run
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow
ID = "ab" * 16


def order(node: RunningBroker, topic: str = "t", at: RunningBroker | None = None, **more: object) -> tuple[int, Any]:
    uid = (at or node).broker.engine.node_uid
    return node.http("POST", "/v1/resyncs", {"type": "resync", "id": ID, "uid": uid, "topic": topic, **more})


def state(node: RunningBroker, reset_id: str = ID) -> tuple[str, str]:
    rows = [one for one in node.http("GET", "/v1/resyncs")[1]["resyncs"] if one["id"] == reset_id]
    return (rows[0]["state"], rows[0]["why"]) if rows else ("", "")


def until(node: RunningBroker, wanted: str, reset_id: str = ID) -> str:
    """Wait until the reset is in a state; what it says about it."""

    def look() -> bool:
        node.advance(1.0)
        return state(node, reset_id)[0] == wanted

    wait_for(look, f"{wanted}: {node.http('GET', '/v1/resyncs')[1]}")
    return state(node, reset_id)[1]


def logs(tree: Tree, name: str) -> set[int]:
    """The inodes of the log files of topic t."""
    return {path.stat().st_ino for path in (tree.directory / name / "topics" / "t").rglob("*.log")}


def same_everywhere(tree: Tree, *names: str) -> None:
    for name in list(tree.nodes):
        tree.stop(name)
    assert len({digest(tree, name, "t") for name in names}) == 1


def test_the_fresh_copy_takes_the_place_of_the_old_one(tree: Tree) -> None:
    """Readers and children go on where they were, and see every record once."""
    root = grown(tree)
    l2 = tree.nodes["l2"]
    pos = tree.start("pos", "l2")
    follows(root, pos, "t")
    reader = l2.raw("reader")
    reader.subscribe("t", "g")
    taken = reader.deliver()
    seen = list(taken.offsets)
    assert reader.acked(taken.head, 100) is Code.OK
    before = logs(tree, "l2")
    assert order(l2) == (200, {})
    assert until(l2, "done") == ""
    assert not logs(tree, "l2") & before, "every file is another one"
    publish(root, "t", 200, 20)
    follows(root, l2, "t")
    follows(root, pos, "t")
    while seen[-1] < 219:
        seen += reader.deliver().offsets
    assert [offset for offset in seen if offset >= 200] == list(range(200, 220))
    wait_for(lambda: not list((tree.directory / "l2" / "staging").iterdir()), "the old files are removed")
    assert l2.http("GET", "/v1/topics/t")[1]["partitions"][0]["damaged"] == []
    assert l2.counters()["log_truncations"] == pos.counters()["log_truncations"] == 0
    tree.stop("l2")
    l2 = tree.start("l2", "root")
    assert end(l2, "t") == 220
    assert state(l2) == ("done", "")
    same_everywhere(tree, "root", "l2", "pos")


def test_while_the_parent_is_published_to(tree: Tree) -> None:
    root = grown(tree)
    l2 = tree.nodes["l2"]
    with root.producer() as producer, l2.consumer(["t"], "g") as consumer:
        sent, seen = [], []
        assert order(l2) == (200, {})
        for number in range(400):
            sent.append(producer.send("t", b"%d" % number))
            if number % 10 == 0:
                l2.advance(0.1)
                seen += [record.offset for record in consumer.poll(0.01)]
        for one in sent:
            one.result(10.0)
        until(l2, "done")
        while not seen or seen[-1] < 599:
            seen += [record.offset for record in consumer.poll(5.0)]
    assert sorted(set(seen)) == list(range(600))
    follows(root, l2, "t")
    same_everywhere(tree, "root", "l2")


def test_damage_that_cannot_be_repaired_goes(tree: Tree) -> None:
    """A byte of a sealed segment is flipped, and the node does not know it yet."""
    root = grown(tree)
    tree.stop("l2")
    path = sorted((tree.directory / "l2" / "topics" / "t" / "0").glob("*.log"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    l2 = tree.start("l2", "root", storage__verify_bytes_per_second=1)
    assert order(l2) == (200, {})
    until(l2, "done")
    follows(root, l2, "t")
    same_everywhere(tree, "root", "l2")


def test_less_than_before_is_suspicious(tree: Tree) -> None:
    root = tree.start("root", storage__retention_bytes=70_000)
    for number in range(5):
        publish(root, "t", number * 10, 10, size=900)
    l2 = tree.start("l2", "root")
    follows(root, l2, "t")
    for number in range(5, 40):
        publish(root, "t", number * 10, 10, size=900)
        follows(root, l2, "t")
    wait_for(lambda: root.advance(1.0) or root.broker.engine.log("t", 0).log_start > 100, "the root removes some")  # type: ignore[func-returns-value,union-attr]
    assert l2.broker.engine.log("t", 0).log_start == 0  # type: ignore[union-attr]
    assert order(l2) == (200, {})
    assert "% of the 400 here" in until(l2, "shrunk")
    assert l2.broker.engine.log("t", 0).log_start == 0  # type: ignore[union-attr]
    assert order(l2, force=True) == (200, {})
    until(l2, "done")
    assert l2.broker.engine.log("t", 0).log_start > 100  # type: ignore[union-attr]


def test_it_is_held_until_its_hours(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    grown(tree)
    l2 = tree.nodes["l2"]
    second = [12 * 3600.0]
    monkeypatch.setattr("edgebroker.broker.mirror.resync.second_of_day", lambda wall_ms: second[0])
    before = logs(tree, "l2")
    assert order(l2, hours="25:00-26:00")[0] == 400
    assert order(l2, hours="02:00-04:00") == (200, {})
    assert "02:00-04:00" in until(l2, "held")
    assert logs(tree, "l2") == before
    second[0] = 3 * 3600.0
    until(l2, "done")
    assert not logs(tree, "l2") & before


def test_without_room_nothing_begins(tree: Tree) -> None:
    """And the node serves on; in place it needs none."""
    root = grown(tree)
    tree.stop("l2")
    l2 = tree.start("l2", "root", storage__max_bytes=300_000)
    assert order(l2) == (200, {})
    assert "NO_SPACE" in until(l2, "no_space")
    assert "NO_SPACE" in l2.http("GET", "/readyz")[1]["warnings"]["resync"]
    assert l2.counters()["refused_by_code"]["NO_SPACE"] == 1
    reader = l2.raw("reader")
    reader.subscribe("t", "g")
    assert reader.deliver().offsets
    assert l2.http("DELETE", f"/v1/resyncs/{ID}") == (200, {})
    assert state(l2) == ("failed", "aborted by an operator")
    assert l2.http("DELETE", f"/v1/resyncs/{ID}")[0] == 404
    before = logs(tree, "l2")
    status, _ = l2.http(
        "POST",
        "/v1/resyncs",
        {"type": "resync", "id": "cd" * 16, "uid": l2.broker.engine.node_uid, "topic": "t", "in_place": True},
    )
    assert status == 200
    wait_for(lambda: l2.advance(1.0) or state(l2, "cd" * 16)[0] == "done", "it begins again")  # type: ignore[func-returns-value]
    follows(root, l2, "t")
    assert not logs(tree, "l2") & before
    same_everywhere(tree, "root", "l2")


def test_another_log_needs_consent(tree: Tree) -> None:
    """The parent's topic was deleted with its disk, and made again: readers are refreshed when it is taken."""
    grown(tree)
    l2 = tree.nodes["l2"]
    tree.stop("root")
    shutil.rmtree(tree.directory / "root")
    root = tree.start("root")
    publish(root, "t", 0, 190, size=20)
    wait_for(lambda: pipe(l2)["parent"]["logs"][0]["state"] == "replaced", "the log is another one")
    assert order(l2) == (200, {})
    assert "--accept" in until(l2, "failed")
    assert end(l2, "t") == 200
    status, _ = l2.http(
        "POST",
        "/v1/resyncs",
        {"type": "resync", "id": "cd" * 16, "uid": l2.broker.engine.node_uid, "topic": "t", "accept": True},
    )
    assert status == 200
    wait_for(lambda: l2.advance(1.0) or state(l2, "cd" * 16)[0] == "done", "it is taken")  # type: ignore[func-returns-value]
    assert end(l2, "t") == 190
    publish(root, "t", 190, 5)
    follows(root, l2, "t")


def test_orders_that_make_no_sense(tree: Tree) -> None:
    root = grown(tree)
    l2 = tree.nodes["l2"]
    assert order(root)[0] == 409
    assert order(l2, "nothing")[0] == 404
    publish(l2, "own", 0, 3)
    assert order(l2, "own")[0] == 404
    assert order(l2, group="nobody")[0] == 404
    assert l2.http("POST", "/v1/resyncs", {"type": "resync", "id": "x"})[0] == 400
    status, answer = l2.http("POST", "/v1/resyncs", {"type": "resync", "id": ID, "uid": "9" * 32})
    assert (status, answer["code"]) == (404, "NOT_FOUND")
    assert order(l2) == (200, {})
    status, answer = order(l2, id="cd" * 16)
    assert (status, answer["code"]) == (503, "OVERLOADED")
    until(l2, "done")


def test_the_range_stays_at_the_parent_while_it_is_loaded(tree: Tree) -> None:
    """The child takes ten seconds for it; retention would have removed most of it meanwhile."""
    root = tree.start("root")
    for number in range(40):
        publish(root, "t", number * 10, 10, size=900)
    l2 = tree.start("l2", "root")
    follows(root, l2, "t")
    tree.stop("l2")
    l2 = tree.start("l2", "root", pipe__bytes_per_second=40_000)
    assert order(l2) == (200, {})
    wait_for(lambda: l2.advance(1.0) or len(pipe(root)["children"]) == 2, "the copy asks")  # type: ignore[func-returns-value]
    assert root.http("PATCH", "/v1/topics/t", {"retention_bytes": 70_000})[0] == 200
    for _ in range(5):
        root.advance(1.0)
    assert root.broker.engine.log("t", 0).log_start == 0  # type: ignore[union-attr]
    until(l2, "done")
    wait_for(lambda: root.advance(3601.0) or root.broker.engine.log("t", 0).log_start > 0, "then it goes")  # type: ignore[func-returns-value,union-attr]


# ---- whatever is killed ----


def test_a_stop_in_the_middle(tree: Tree) -> None:
    """The next start goes on with the same reset and what it had loaded."""
    root = grown(tree)
    tree.stop("l2")
    l2 = tree.start("l2", "root", pipe__bytes_per_second=30_000)
    assert order(l2) == (200, {})
    copy = tree.directory / "l2" / "staging" / ID / "topics" / "t" / "0"

    def some() -> bool:
        l2.advance(1.0)
        return sum(path.stat().st_size for path in copy.glob("*.log")) > 20_000

    wait_for(some, "something is loaded")
    assert state(l2)[0] == "loading"
    tree.stop("l2")
    loaded = sum(path.stat().st_size for path in copy.glob("*.log"))
    assert loaded < 180_000
    l2 = tree.start("l2", "root")
    assert state(l2)[0] == "loading"
    until(l2, "done")
    assert root.counters()["pipe_bytes_out"] > 0
    follows(root, l2, "t")
    same_everywhere(tree, "root", "l2")


@pytest.mark.parametrize("step", ["before", "between", "behind"])
def test_a_crash_in_the_middle_of_the_switch(tree: Tree, step: str) -> None:
    """Two renames: whichever of them was done, the start ends with the fresh copy, whole."""
    root = grown(tree)
    l2 = tree.nodes["l2"]
    reader = l2.raw("reader")
    reader.subscribe("t", "g")
    assert reader.acked(reader.deliver().head, 3) is Code.OK
    tree.stop("l2")
    directory = tree.directory / "l2"
    live, staged = directory / "topics" / "t", directory / "staging" / ID / "topics" / "t"
    shutil.copytree(live, staged)
    write_resyncs(directory, [ResyncRow(id=ID, topic="t", phase="switching", targets=[200])])
    fresh = {path.stat().st_ino for path in staged.rglob("*.log")}
    if step == "between":
        live.rename(staged.parent.parent / replacement.OLD)
    elif step == "behind":
        exchange(live, staged)
    l2 = tree.start("l2", "root")
    assert logs(tree, "l2") == fresh
    assert state(l2) == ("done", "")
    assert end(l2, "t") == 200
    reader = l2.raw("reader")
    reader.subscribe("t", "g", start=Start.COMMITTED)
    assert reader.deliver().head.first == 3
    publish(root, "t", 200, 5)
    follows(root, l2, "t")
    same_everywhere(tree, "root", "l2")


def test_a_switch_that_fails_is_undone(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grown(tree)
    l2 = tree.nodes["l2"]
    before = logs(tree, "l2")
    real, failing = replacement.files.move, [True]

    def fail(source: Path, target: Path) -> None:
        if failing and "staging" in source.parts and target.name == "t":
            failing.clear()
            raise OSError(5, "broken")
        real(source, target)

    monkeypatch.setattr(replacement.files, "move", fail)
    assert order(l2) == (200, {})
    until(l2, "done")
    assert not failing, "the first attempt failed"
    assert not logs(tree, "l2") & before
    publish(root, "t", 200, 5)
    follows(root, l2, "t")
    same_everywhere(tree, "root", "l2")


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_resyncs(tmp_path) == []
    (tmp_path / FILE_NAME).write_bytes(b"[] 00000000\n")
    assert read_resyncs(tmp_path) == []
    rows = [ResyncRow(id=ID, topic="t", phase="loading", targets=[1, 2])]
    write_resyncs(tmp_path, rows)
    assert read_resyncs(tmp_path) == rows
    assert finish_replacements(tmp_path, rows) == ([], rows)


# ---- over the tree ----


def test_a_region_in_waves(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """Ordered at ROOT, two at a time; a node that is away is named."""
    root = grown(tree)
    names = [f"pos-{number}" for number in range(3)]
    for name in names:
        tree.start(name, "l2", level="pos", **{"node.region": "eu/north"})
        follows(root, tree.nodes[name], "t")
    tree.start("other", "l2", level="pos", **{"node.region": "eu/south"})
    follows(root, tree.nodes["other"], "t")
    wait_for(lambda: _turn(tree, 1.0) or len(root.http("GET", "/v1/tree/nodes")[1]["nodes"]) == 5, "all are known")
    before = {name: logs(tree, name) for name in [*names, "other"]}
    status, found = run(
        root, capsys, "resync", "--topic", "t", "--region", "eu/north", "--wave", "2", "--timeout", "40s"
    )
    assert (status, found) == (0, dict.fromkeys(names, "done"))
    for name in names:
        assert not logs(tree, name) & before[name]
    assert logs(tree, "other") == before["other"]
    client = tree.nodes["pos-0"].raw("reader")
    client.subscribe("t", "g")
    client.deliver()
    status, found = run(
        root, capsys, "resync", "--topic", "t", "--group", "nobody", "--node", "pos-0", "--timeout", "0s"
    )
    assert (status, found) == (1, {"pos-0": "requested, not reported yet"})
    tree.stop("pos-1")
    status, found = run(root, capsys, "resync", "--topic", "t", "--node", "pos-1", "--timeout", "1s")
    assert status == 1
    assert main(["resync", "--topic", "t", "--node", "nobody", "--admin", tree.admin("root")]) == 1
    assert "no node below" in capsys.readouterr().err


def _turn(tree: Tree, seconds: float) -> None:
    for node in tree.nodes.values():
        node.advance(seconds)


def test_all_topics_of_a_node(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree)
    publish(root, "u", 0, 30)
    l2 = tree.nodes["l2"]
    follows(root, l2, "u")
    assert run(l2, capsys, "resync", "--timeout", "40s") == (0, {"l2": "done"})
    rows = l2.http("GET", "/v1/resyncs")[1]["resyncs"]
    assert [(row["topic"], row["state"]) for row in rows] == [("t", "done"), ("u", "done")]
    assert main(["resync", "--status", "--admin", tree.admin("l2")]) == 0
    assert "done" in capsys.readouterr().out


def test_a_group_over_the_tree(tree: Tree, tmp_path: Path) -> None:
    """The order reaches the node, and the group there is told to load the topic again."""
    root = grown(tree)
    l2 = tree.nodes["l2"]
    client = l2.raw("labels")
    client.subscribe("t", "g")
    taken = client.deliver()
    assert client.acked(taken.head, 10) is Code.OK
    wait_for(lambda: _turn(tree, 1.0) or root.http("GET", "/v1/tree/nodes")[1]["nodes"], "the node is known")
    assert order(root, at=l2, group="g") == (200, {})
    wait_for(lambda: state(l2)[0] == "refreshing", "the group is being refreshed")
    assert l2.counters()["refreshes_begun"] == 1
    assert order(l2, group="g") == (200, {})
    assert l2.counters()["refreshes_begun"] == 1, "the same order again begins nothing"


def test_a_copy_that_cannot_be_opened_again(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reset fails, with the reason; the next one begins with a directory of its own."""
    grown(tree)
    l2 = tree.nodes["l2"]

    def fail(self: object) -> object:
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr("edgebroker.storage.metadata.metadata.Metadata.load", fail)
        assert order(l2) == (200, {})
        assert "broken" in until(l2, "failed")
    assert order(l2, id="cd" * 16) == (200, {})
    until(l2, "done", "cd" * 16)
