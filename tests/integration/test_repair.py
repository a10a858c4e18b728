"""Damaged records come back from a neighbour, byte for byte; nothing that does not fit is put in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgebroker.client.consume.decoding import check_dense
from edgebroker.client.consumer import Consumer
from edgebroker.common import records
from edgebroker.common.errors import DamagedBatchError
from edgebroker.storage.types import CorruptRange
from tests.kit.storage import StoreHarness, encode, store_settings
from tests.kit.trees import Tree, digest, end, follows, grown, line, publish
from tests.kit.waiting import wait_for
from tests.unit.storage.test_mirror_store import batches, bytes_of, identity_of, mirror, take


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x40
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose(path: Path) -> None:
    path.unlink()
    path.with_suffix(".index").unlink(missing_ok=True)


DAMAGE: dict[str, Callable[[list[Path]], None]] = {
    "a byte": lambda logs: flip(logs[1]),
    "several": lambda logs: [flip(path, at) for path in logs[:-1] for at in (0.1, 0.5, 0.9)] and None,
    "the first byte": lambda logs: flip(logs[1], 0.0),
    "the end of a segment": lambda logs: cut_short(logs[2]),
    "a segment": lambda logs: lose(logs[2]),
    "the first segment": lambda logs: lose(logs[0]),
    "three segments": lambda logs: [lose(path) for path in logs[1:4]] and None,
}


def rot(path: Path, at: int) -> None:
    """A bit flips under a node that has the file open, and has verified it."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x40]))


def logs_of(tree: Tree, name: str) -> list[Path]:
    return sorted((tree.directory / name / "topics" / "t" / "0").glob("*.log"))


def bytes_in(tree: Tree, name: str) -> bytes:
    return b"".join(path.read_bytes() for path in logs_of(tree, name))


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_mirror_repairs_itself(tree: Tree, damage: str) -> None:
    root = tree.start("root")
    for number in range(40):
        publish(root, "t", number * 10, 10, size=900)
    child = tree.start("l2", "root")
    follows(root, child, "t")
    tree.stop("l2")
    before = digest(tree, "l2", "t")
    DAMAGE[damage](logs_of(tree, "l2"))
    assert digest(tree, "l2", "t") != before
    child = tree.start(
        "l2",
        "root",
        storage__verify_bytes_per_second=0,
        limits__idle_timeout_ms=86_400_000,
        delivery__timeout_ms=86_400_000,
    )
    reader = child.raw("till")
    reader.subscribe("t", "tills")

    def whole() -> bool:
        child.advance(6.0)
        log = child.broker.engine.log("t", 0)
        assert log is not None
        return not log.corrupt_ranges and log.durable_end == 400 and digest(tree, "l2", "t") == before

    wait_for(whole, f"it is repaired: {child.broker.engine.log('t', 0).corrupt_ranges}")  # type: ignore[union-attr]
    offsets: list[int] = []
    while not offsets or offsets[-1] < 399:
        offsets += reader.deliver().offsets
    assert offsets == list(range(400)), "readers waited, and got everything"
    publish(root, "t", 400, 1)
    follows(root, child, "t")
    tree.stop("l2")
    child = tree.start("l2", "root")
    assert child.broker.engine.log("t", 0).corrupt_ranges == []  # type: ignore[union-attr]
    follows(root, child, "t")
    assert child.counters()["log_truncations"] == child.counters()["logs_recreated"] == 0
    assert bytes_in(tree, "l2") == bytes_in(tree, "root")


@pytest.mark.slow
def test_an_origin_repairs_from_its_child(tree: Tree) -> None:
    grown(tree)
    tree.stop("root")
    before = digest(tree, "root", "t")
    flip(logs_of(tree, "root")[0])
    root = tree.start("root", storage__verify_bytes_per_second=0)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    wait_for(lambda: log.corrupt_ranges, "the damage is found")
    wait_for(lambda: root.broker.downstream.peers(), "its child is there, from this address")
    assert root.http("POST", "/v1/repair", {"from": "nowhere"})[0] == 400
    status, answer = root.http("POST", "/v1/repair", {"from": "127.0.0.1:1"})
    assert (status, "refused" in answer["error"]) == (409, True)
    status, answer = root.http("POST", "/v1/repair", {"from": "203.0.113.9:7421"})
    assert (status, "a node of this tree" in answer["error"]) == (400, True)
    lost = log.corrupt_ranges[0]
    status, answer = root.http("POST", "/v1/repair", {"from": tree.address("l2"), "topic": "t"})
    assert (status, answer) == (200, {"repaired": {"t/0": lost.next - lost.first}, "error": ""})
    assert digest(tree, "root", "t") == before
    assert root.http("POST", "/v1/repair", {"from": tree.address("l2")}) == (200, {"repaired": {}, "error": ""})


@pytest.mark.slow
def test_a_damaged_parent_is_no_help(tree: Tree) -> None:
    """Both lost the same: the child says so and waits, and what comes behind it still arrives."""
    grown(tree)
    for name in ("l2", "root"):
        tree.stop(name)
        flip(logs_of(tree, name)[0])
    root = tree.start("root", storage__verify_bytes_per_second=0)
    child = tree.start("l2", "root", storage__verify_bytes_per_second=0)
    wait_for(lambda: root.broker.engine.log("t", 0).corrupt_ranges, "the parent knows")  # type: ignore[union-attr]
    wait_for(lambda: child.broker.engine.log("t", 0).corrupt_ranges, "the child knows")  # type: ignore[union-attr]

    def tried() -> bool:
        child.advance(6.0)
        return bool(child.counters()["repair_failures"])

    wait_for(tried, "it asks")
    publish(root, "t", 200, 1)
    follows(root, child, "t")
    assert line(child, "t")["state"] == "live"
    assert end(child, "t") == 201


@pytest.fixture
def hurt(tmp_path: Path) -> Iterator[StoreHarness]:
    """A mirror of thirty batches in segments of some nine, of which number 12 is damaged."""
    found = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000))
    mirror(found, identity_of())
    for one in batches(0, 30):
        take(found, one)
    found.close()
    path = next(path for path in found.logs() if b"12-1." in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(b"12-1.", b"12-9."))
    found.open()
    found.tick_until(lambda: found.log().corrupt_ranges)
    assert found.log().corrupt_ranges == [CorruptRange(12, 13)]
    yield found
    found.close()


def repair(harness: StoreHarness, data: bytes) -> tuple[int, str]:
    answers: list[tuple[int, str]] = []
    harness.store.repair(harness.log(), data, lambda end, error: answers.append((end, error)))
    for _ in range(300):
        if answers:
            return answers[0]
        harness.loop.turn(0.005)
        harness.clock.advance(0.01)
    raise AssertionError("waited in vain")


def test_the_very_bytes_come_back(hurt: StoreHarness) -> None:
    assert hurt.log().to_repair() == (12, 13)
    assert repair(hurt, batches(12, 1)[0]) == (13, "")
    assert bytes_of(hurt) == b"".join(batches(0, 30))
    assert (hurt.log().corrupt_ranges, len(hurt.values())) == ([], 30)
    hurt.restart()
    assert (hurt.log().corrupt_ranges, len(hurt.values())) == ([], 30)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense" * 20,
        batches(13, 1)[0],
        batches(11, 1)[0],
        batches(12, 1)[0][:-1],
        batches(12, 1, epoch=2)[0],
        b"".join(batches(12, 2)),
        records.restamp(encode(b"another one".ljust(100, b".")), 12, 1),
        records.restamp(encode(b"two", b"of them"), 12, 1),
    ],
)
def test_what_does_not_fit_is_not_put_in(hurt: StoreHarness, data: bytes) -> None:
    before = bytes_of(hurt)
    offset, error = repair(hurt, data)
    assert (offset, bool(error)) == (-1, True)
    assert (bytes_of(hurt), hurt.log().corrupt_ranges) == (before, [CorruptRange(12, 13)])
    assert not list(hurt.directory().glob("*.tmp"))
    assert repair(hurt, batches(12, 1)[0]) == (13, "")


def test_a_range_that_nobody_has(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    root = tree.start("root")
    publish(root, "t", 0, 5)
    log_id = root.broker.engine.log("t", 0).identity.log_id  # type: ignore[union-attr]
    wanted = {"topic": "t", "partition": 0, "log_id": log_id, "first": 0, "next": 5}
    for changes, status in (
        ({"topic": "u"}, 404), ({"log_id": "00" * 16}, 404), ({"next": 6}, 409), ({"first": 5}, 409),
        ({"first": -1}, 400), ({"odd": 1}, 400),
    ):  # fmt: skip
        assert root.pipe("POST", "/v1/pipe/range", {**wanted, **changes})[0] == status
    tree.close()


@pytest.mark.slow
@pytest.mark.parametrize("group", ["tills", ""])
def test_what_rots_under_a_running_node_reaches_no_handler(tree: Tree, group: str) -> None:
    """It was verified when it was written. The consumer finds it corrupt and asks again; the node repairs it."""
    grown(tree)
    node = tree.nodes["l2"]
    rot(logs_of(tree, "l2")[1], 30_000)
    seen: list[int] = []

    def arrived(consumer: Consumer) -> bool:
        node.advance(5.0)
        for record in (found := consumer.poll(0.05)):
            seen.append(record.offset)
        if found:
            consumer.ack(found[-1])
        return len(seen) >= 200

    # All is acknowledged at once: nothing in front of the damage is delivered again.
    with Consumer(node.server, ["t"], group, start="earliest", auto_ack=False, window_records=20) as consumer:
        wait_for(lambda: arrived(consumer), "everything arrives")
    assert seen == list(range(200))
    assert node.counters()["records_repaired"] > 0
    assert bytes_in(tree, "l2") == bytes_in(tree, "root")


def test_a_delivery_is_dense() -> None:
    """Base offsets lie outside of the CRC: one that changed would make a consumer leave records out."""
    pieces = [records.restamp(encode(*[b"v"] * 10), offset, 1) for offset in (100, 110, 120)]
    check_dense(b"".join(pieces), 105, 125)
    moved = records.restamp(pieces[1], 110 + (1 << 14), 1)
    for wrong in ([pieces[0], moved, pieces[2]], [moved, pieces[2]], pieces[:2], []):
        with pytest.raises(DamagedBatchError):
            check_dense(b"".join(wrong), 105, 125)


@pytest.mark.slow
def test_what_rots_under_a_running_node_goes_to_no_child(tree: Tree) -> None:
    root = grown(tree)
    node = tree.nodes["l2"]
    rot(logs_of(tree, "l2")[1], 30_000)
    child = tree.start("l3", "l2")

    def arrived() -> bool:
        for each in (node, child):
            each.advance(5.0)
        return end(child, "t") == end(root, "t")

    wait_for(arrived, "everything arrives")
    assert node.counters()["records_repaired"] > 0
    assert bytes_in(tree, "l3") == bytes_in(tree, "l2") == bytes_in(tree, "root")
