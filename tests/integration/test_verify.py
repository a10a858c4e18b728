"""`edgebroker verify --against`: two nodes are compared by what lies on their disks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgebroker.broker.feed import digests
from edgebroker.cli.main import main
from edgebroker.common import batch, crc32c
from tests.integration.test_repair import flip, logs_of
from tests.kit.trees import Tree, follows, grown, publish
from tests.kit.waiting import wait_for


def verify(tree: Tree, here: str, there: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any]:
    code = main(["verify", "--admin", tree.admin(here), "--against", tree.address(there), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def change(path: Path, *numbers: int) -> None:
    """Other values in some of a segment's batches, with a CRC that fits: no check of the bytes alone sees that."""
    data, position, number = bytearray(path.read_bytes()), 0, 0
    while position < len(data):
        size = batch.read_header(data, position).size
        if number in numbers:
            data[position + size - 10] ^= 0x01
            crc = crc32c.crc32c(bytes(data[position + 21 : position + size]))
            data[position + 17 : position + 21] = crc.to_bytes(4, "big")
        position, number = position + size, number + 1
    path.write_bytes(data)


def edges(path: Path) -> list[int]:
    """The offsets at which a segment's batches begin."""
    data, position, found = path.read_bytes(), 0, []
    while position < len(data):
        header = batch.read_header(data, position)
        found.append(header.base_offset)
        position += header.size
    return found


@pytest.mark.slow
def test_the_same(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree)
    publish(root, "u", 0, 3)
    follows(root, tree.nodes["l2"], "u")
    code, found = verify(tree, "l2", "root", capsys)
    assert (code, found["same"], found["differing"], found["damaged"]) == (0, True, {}, [])
    assert found["compared"] == {"t/0": [0, 200], "u/0": [0, 3]}
    assert found["bytes"] > sum(path.stat().st_size for path in logs_of(tree, "l2")[:-1])
    publish(root, "v", 0, 1, partition=0)
    assert main(["verify", "--admin", tree.admin("l2"), "--against", tree.address("root"), "--topic", "t"]) == 0
    assert "t/0: 200 records from offset 0: the same" in capsys.readouterr().out
    assert main(["verify", "--admin", tree.admin("l2"), "--against", tree.address("root"), "--topic", "x"]) != 0
    assert "topic 'x' exists at neither node" in capsys.readouterr().err


@pytest.mark.slow
def test_what_only_one_has_is_told(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree)
    root.broker.downstream.second_of_day = lambda: 12 * 3600.0  # type: ignore[method-assign]
    tree.stop("l2")
    tree.start("l2", "root", pipe__hours="01:00-02:00")
    publish(root, "t", 200, 5)
    publish(root, "v", 0, 1)
    wait_for(lambda: "v/0" in verify(tree, "l2", "root", capsys)[1]["compared"], "the new topic is there, empty")
    code, found = verify(tree, "l2", "root", capsys)
    there = tree.address("root")
    assert (code, found["same"], found["compared"]["t/0"]) == (0, True, [0, 200])
    assert found["left_out"] == [
        f"t/0: records 200 to 204 are only at {there}",
        f"v/0: records 0 to 0 are only at {there}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 64 << 20])
def test_what_differs_is_named(
    tree: Tree, most: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when each digest goes over little more than a batch."""
    monkeypatch.setattr(digests, "MOST_BYTES", most)
    monkeypatch.setattr(digests, "PIECE_BYTES", 1 if most == 1 else digests.PIECE_BYTES)
    grown(tree)
    tree.stop("l2")
    first, second = logs_of(tree, "l2")[0], logs_of(tree, "l2")[1]
    starts = [*edges(first), *edges(second), *edges(logs_of(tree, "l2")[2])]
    count = len(edges(first))
    change(first, 2, 3)
    change(second, 0)
    tree.start("l2", "root")
    code, found = verify(tree, "root", "l2", capsys, "--topic", "t")
    apart = [[starts[2], starts[4]], [starts[count], starts[count + 1]]]
    expected = apart if most == 1 else [[starts[2], starts[count + 1]]]
    assert (code, found["same"], found["differing"], found["damaged"]) == (1, False, {"t/0": expected}, [])
    assert verify(tree, "l2", "root", capsys)[1]["differing"] == {"t/0": expected}
    assert main(["verify", "--admin", tree.admin("l2"), "--against", tree.address("root")]) == 1
    shown = capsys.readouterr().out
    assert f"t/0: records {starts[2]} to {expected[0][1] - 1} DIFFER" in shown and "NOT the same" in shown


@pytest.mark.slow
def test_damage_is_found_and_named(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    grown(tree)
    tree.stop("root")
    damaged = logs_of(tree, "root")[1]
    first, following = edges(damaged)[:2]
    flip(damaged, 0.01)
    root = tree.start("root")
    code, found = verify(tree, "l2", "root", capsys)
    assert (code, found["same"]) == (1, False)
    assert found["differing"] == {"t/0": [[first, following]]}
    assert found["damaged"] == [[f"t/0 at {tree.address('root')}", first, following]]
    wait_for(lambda: root.broker.downstream.peers(), "its child is there, from this address")
    assert root.http("POST", "/v1/repair", {"from": tree.address("l2")})[0] == 200
    wait_for(lambda: verify(tree, "l2", "root", capsys)[1]["same"], "it is the same again")


def test_what_cannot_be_compared(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 5)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    wanted = {"topic": "t", "partition": 0, "log_id": log.identity.log_id, "first": 0, "next": 5}
    for changes, status in (
        ({"topic": "u"}, 404), ({"log_id": "00" * 16}, 404), ({"next": 6}, 409), ({"first": 5}, 409),
        ({"first": -1}, 400), ({"odd": 1}, 400), ({}, 200),
    ):  # fmt: skip
        assert root.pipe("POST", "/v1/pipe/digest", {**wanted, **changes})[0] == status
    assert root.broker.digests.running == 0
    monkeypatch.setattr(digests, "MOST_AT_ONCE", 0)
    assert root.pipe("POST", "/v1/pipe/digest", wanted)[0] == 503
