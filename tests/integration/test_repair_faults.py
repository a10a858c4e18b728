"""Repair when things go wrong in the middle of it, and the damage that a log's end may have."""

from __future__ import annotations

import errno
import json
import socket
import threading
from pathlib import Path

import pytest

from edgebroker.broker.feed import ranges
from edgebroker.common import records
from edgebroker.common.errors import Code
from edgebroker.storage import files
from edgebroker.storage.rewrite import rewriter
from edgebroker.storage.types import UNKNOWN_CHAIN, CorruptRange
from tests.integration.test_repair import cut_short, flip, logs_of, lose, repair
from tests.kit.brokers import RunningBroker, numbered
from tests.kit.storage import StoreHarness, encode, store_settings
from tests.kit.trees import RAW, Tree, batch, digest, end, follows, grown, line, publish, reported
from tests.kit.waiting import wait_for
from tests.unit.storage.test_mirror_store import batches, bytes_of, identity_of, mirror, take


def stored(tmp_path: Path, count: int, **settings: object) -> StoreHarness:
    """A mirror of batches 0 to `count`, stopped; five in a segment unless said."""
    harness = StoreHarness(tmp_path / "data", store_settings(**{"segment_bytes": 1000, **settings}))  # type: ignore[arg-type]
    mirror(harness, identity_of())
    for one in batches(0, count):
        take(harness, one)
    harness.close()
    return harness


def spoil(harness: StoreHarness, *numbers: int) -> None:
    for number in numbers:
        mark = b"%d-1." % number
        path = next(path for path in harness.logs() if mark in path.read_bytes())
        path.write_bytes(path.read_bytes().replace(mark, b"%d-9." % number, 1))


def hurt(tmp_path: Path, *numbers: int, count: int = 30, **settings: object) -> StoreHarness:
    harness = stored(tmp_path, count, **settings)
    spoil(harness, *numbers)
    harness.open()
    harness.tick_until(lambda: harness.log().corrupt_ranges)
    return harness


def fetched(harness: StoreHarness) -> bytes:
    first, following = harness.log().to_repair()
    return b"".join(batches(first, following - first))


def test_a_file_that_was_repaired_and_a_corrupt_range_that_was_not_forgotten(tmp_path: Path) -> None:
    """The power went between the new file and meta.db."""
    harness = hurt(tmp_path, 12, 13)
    assert harness.log().corrupt_ranges == [CorruptRange(12, 14)]
    results: list[object] = []
    committer = harness.store._committer
    original = committer.call
    committer.call = lambda work, done: original(work, results.append)  # type: ignore[method-assign]
    harness.store.repair(harness.log(), fetched(harness), lambda *answer: None)
    harness.until(lambda: results)
    committer.call = original  # type: ignore[method-assign]
    harness.restart()
    assert bytes_of(harness) == b"".join(batches(0, 30)), "the file is whole"
    assert harness.log().corrupt_ranges == [CorruptRange(12, 14)]
    assert repair(harness, b"".join(batches(12, 2))) == (14, "")
    assert (harness.log().corrupt_ranges, bytes_of(harness)) == ([], b"".join(batches(0, 30)))
    harness.close()


def test_a_stop_waits_for_what_the_commit_thread_does(tmp_path: Path) -> None:
    harness = stored(tmp_path, 5)
    harness.open()
    begun, gate = threading.Event(), threading.Event()
    told: list[object] = []

    def work() -> None:
        begun.set()
        gate.wait()

    harness.store._committer.call(work, told.append)
    assert begun.wait(10)
    assert not harness.store.flush()
    gate.set()
    harness.until(lambda: told)
    harness.until(harness.store.flush)
    harness.close()


@pytest.mark.parametrize("damage", ["cut off", "empty", "overwritten"])
def test_the_end_of_the_log(tmp_path: Path, damage: str) -> None:
    harness = stored(tmp_path, 23)
    path = harness.logs()[-1]
    data = path.read_bytes()
    path.write_bytes({"cut off": data[:200], "empty": b"", "overwritten": b"\x55" * len(data)}[damage])
    harness.open()
    harness.tick_until(lambda: harness.log().corrupt_ranges)
    if damage == "overwritten":  # the checkpoint certifies its end: the active segment is sealed before it is repaired
        assert repair(harness, fetched(harness))[0] == -1
        harness.tick()
    assert repair(harness, fetched(harness)) == (23, "")
    for one in batches(23, 7):
        take(harness, one)
    values = [b"%d-1" % offset for offset in range(30)]
    for _ in range(2):
        assert (harness.log().corrupt_ranges, [value.rstrip(b".") for value in harness.values()]) == ([], values)
        harness.restart()
    harness.close()


def test_what_does_not_continue_the_end_is_not_put_in(tmp_path: Path) -> None:
    harness = stored(tmp_path, 23)
    path = harness.logs()[-1]
    path.write_bytes(path.read_bytes()[:200])
    harness.open()
    other = b"".join(records.restamp(encode(b"other".ljust(100, b".")), offset, 1) for offset in (21, 22))
    assert repair(harness, other) == (-1, "offset 21: the chain after what was fetched differs")
    assert (harness.log().corrupt_ranges, list(harness.directory().glob("*.tmp"))) == ([CorruptRange(21, 23)], [])
    assert repair(harness, fetched(harness)) == (23, "")
    harness.close()


def test_what_was_repaired_is_found_by_time(tmp_path: Path) -> None:
    def one(offset: int) -> bytes:
        return records.restamp(encode((b"%d-1" % offset).ljust(100, b"."), timestamp=1000 + offset), offset, 1)

    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000))
    mirror(harness, identity_of())
    for offset in range(30):
        take(harness, one(offset))
    harness.close()
    cut_short(harness.logs()[2])
    harness.open()
    harness.tick_until(lambda: harness.log().corrupt_ranges)
    harness.read(10)  # a reader builds the index of what is left
    first, following = harness.log().to_repair()
    assert repair(harness, b"".join(one(offset) for offset in range(first, following))) == (following, "")
    for _ in range(2):
        assert [harness.offset_at(1000 + offset) for offset in range(30)] == list(range(30))
        harness.restart()
    harness.close()


def test_what_was_repaired_is_removed_by_age(tmp_path: Path) -> None:
    harness = stored(tmp_path, 7, retention_ms=60_000)
    lose(harness.logs()[0])  # only the active segment is left
    harness.open()
    harness.tick_until(lambda: harness.log().corrupt_ranges)
    assert repair(harness, fetched(harness)) == (5, "")
    for one in batches(7, 20):
        take(harness, one)
    assert len(harness.segments()) > 4
    for _ in range(15):  # the clock counts ten minutes after the start
        harness.tick(61.0)
    assert len(harness.segments()) == 1
    harness.close()


def test_damage_that_is_found_meanwhile_stays_known(tmp_path: Path) -> None:
    harness = hurt(tmp_path, 12)
    answers: list[object] = []
    harness.store.repair(harness.log(), fetched(harness), lambda *answer: answers.append(answer))
    harness.log().add_corrupt_range(CorruptRange(3, 4))  # as a reader does
    harness.tick_until(lambda: answers)
    assert (answers, harness.log().corrupt_ranges) == ([(13, "")], [CorruptRange(3, 4)])
    harness.close()


def test_no_room_for_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    harness = hurt(tmp_path, 12)
    with monkeypatch.context() as patch:
        patch.setattr(files, "append_copy", full)
        assert repair(harness, fetched(harness)) == (-1, "no space left")
    assert not list(harness.directory().glob("*.tmp"))
    harness.store._committer.disk_full = "no space"
    assert repair(harness, fetched(harness)) == (-1, "prices/0: the disk is full: no space")
    harness.store._committer.disk_full = ""
    assert repair(harness, fetched(harness)) == (13, "")
    harness.close()


def test_a_read_that_was_asked_for_before_invents_no_damage(tmp_path: Path) -> None:
    harness = hurt(tmp_path, 12, 13, count=600, segment_bytes=60_000)
    harness.read(0)
    gate = threading.Event()
    harness.store._reader._worker.submit(gate.wait)
    answers: list[object] = []
    harness.engine.read_cold(harness.log(), 351, 1000, answers.append)
    assert repair(harness, batches(12, 1)[0]) == (13, "")  # the first of two: all that follows it moves
    gate.set()
    harness.until(lambda: answers)
    assert harness.log().corrupt_ranges == [CorruptRange(13, 14)]
    assert repair(harness, fetched(harness)) == (14, "")
    assert bytes_of(harness) == b"".join(batches(0, 600))
    harness.close()


def test_more_is_lost_than_was_known(tmp_path: Path) -> None:
    """A corrupt range of one record, behind which the rest of the file is bad by now as well."""
    harness = hurt(tmp_path, 12)
    assert harness.log().corrupt_ranges == [CorruptRange(12, 13)]
    spoil(harness, 13, 14)
    assert repair(harness, batches(12, 1)[0]) == (13, "")
    assert harness.log().corrupt_ranges == [CorruptRange(13, 15)]
    assert repair(harness, fetched(harness)) == (15, "")
    assert bytes_of(harness) == b"".join(batches(0, 30))
    harness.close()


def test_missing_segments_come_back_as_segments(tmp_path: Path) -> None:
    harness = stored(tmp_path, 100)
    for path in harness.logs()[1:-2]:
        lose(path)
    harness.open()
    harness.tick_until(lambda: harness.log().corrupt_ranges)
    while harness.log().corrupt_ranges:
        first, following = harness.log().to_repair()
        assert repair(harness, b"".join(batches(first, min(5, following - first))))[1] == ""
    assert max(segment.size for segment in harness.segments()) < 2000
    harness.tick_until(lambda: harness.store.status().unverified_segments == 0)
    assert bytes_of(harness) == b"".join(batches(0, 100))
    harness.restart()
    assert (len(harness.values()), harness.log().corrupt_ranges) == (100, [])
    harness.close()


# ---- between nodes ----


def damaged_root(tree: Tree) -> RunningBroker:
    grown(tree)
    tree.stop("root")
    flip(logs_of(tree, "root")[0])
    root = tree.start("root", storage__verify_bytes_per_second=0)
    log = root.broker.engine.log("t", 0)
    wait_for(lambda: log is not None and log.corrupt_ranges, "the damage is found")
    return root


@pytest.mark.slow
def test_children_keep_what_their_origin_lost_at_its_end(tree: Tree) -> None:
    grown(tree)
    child = tree.nodes["l2"]
    tree.stop("root")
    before = digest(tree, "l2", "t")
    cut_short(logs_of(tree, "root")[-1])
    root = tree.start("root")
    publish(root, "t", 200, 1)
    follows(root, child, "t")
    assert child.counters()["log_truncations"] == 0
    status, answer = root.http("POST", "/v1/repair", {"from": tree.address("l2"), "topic": "t"})
    assert (status, answer["error"]) == (200, "")
    publish(root, "t", 201, 1)
    follows(root, child, "t")
    assert digest(tree, "root", "t") == digest(tree, "l2", "t") != before


@pytest.mark.slow
def test_damage_that_nothing_certifies_cuts_no_child(tree: Tree) -> None:
    """With meta.db gone as well the origin does not know the chain at its end: it cannot call a child diverged."""
    grown(tree)
    child = tree.nodes["l2"]
    tree.stop("root")
    for path in (tree.directory / "root").glob("meta.db*"):
        path.unlink()
    for path in logs_of(tree, "root"):
        path.with_suffix(".index").unlink(missing_ok=True)
    flip(logs_of(tree, "root")[1])
    root = tree.start("root")
    log = root.broker.engine.log("t", 0)
    assert log is not None and log.corrupt_ranges and log.chain_at(log.durable_end) is None
    wait_for(lambda: line(child, "t")["state"] == "damaged", "it is not compared")
    assert (child.counters()["log_truncations"], end(child, "t")) == (0, 200)
    status, answer = root.http("POST", "/v1/repair", {"from": tree.address("l2"), "topic": "t"})
    assert (status, answer["error"]) == (200, "")
    tree.stop("root")
    root = tree.start("root")
    publish(root, "t", 200, 1)
    follows(root, child, "t")
    assert (child.counters()["log_truncations"], line(child, "t")["state"]) == (0, "live")
    assert digest(tree, "root", "t") == digest(tree, "l2", "t")


@pytest.mark.slow
def test_neighbours_that_are_no_help_do_not_end_repair(tree: Tree) -> None:
    root = damaged_root(tree)
    with socket.create_connection(root.broker.listeners.http_address) as connection:
        for source in ("127.0.0.1:99999", "127.0.0.1:\u00b2", "127.0.0.1:0", ":80", "nowhere"):
            body = json.dumps({"from": source}, ensure_ascii=False).encode()
            connection.sendall(
                b"POST /v1/repair HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            assert b" 400 " in connection.recv(10_000), source
    hub = {**RAW, "name": "far", "level": "l3", "address": "255.255.255.255:80"}
    assert reported(root, batch({"report": hub}))[0] == 200
    status, answer = root.http("POST", "/v1/repair", {"from": "far"})
    assert (status, "unreachable" in answer["error"] or "denied" in answer["error"]) == (409, True)
    wait_for(lambda: root.broker.downstream.peers(), "its child is there, from this address")
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers: list[object] = []
        source = f"127.0.0.1:{server.getsockname()[1]}"
        asked = threading.Thread(target=lambda: answers.append(root.http("POST", "/v1/repair", {"from": source})))
        asked.start()
        peer, _ = server.accept()
        with peer:
            peer.recv(10_000)
            peer.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n")
            wait_for(lambda: not root.advance(61.0) and answers, "it is given up")
        asked.join()
    assert answers[0][0] == 409 and "does not go on" in answers[0][1]["error"]  # type: ignore[index]
    wait_for(lambda: root.broker.downstream.peers(), "its child is back")
    assert root.http("POST", "/v1/repair", {"from": tree.address("l2"), "topic": "t"})[0] == 200


@pytest.mark.slow
def test_a_child_that_asks_while_repair_fails(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = damaged_root(tree)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    tree.stop("l2")
    gate = threading.Event()

    def slow(*arguments: object) -> None:
        gate.wait()
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(rewriter, "repair_segment", slow)
    answers: list[object] = []
    root.broker.loop.call_soon_threadsafe(
        lambda: root.broker.engine.repair(log, b"x", lambda *answer: answers.append(answer))
    )
    wait_for(lambda: log.rewriting, "it is begun")
    child = tree.start("l2", "root")
    wait_for(lambda: line(child, "t")["state"] not in ("", "live"), "it is refused")
    gate.set()
    wait_for(lambda: answers, "it is over")
    wait_for(lambda: line(child, "t")["state"] == "live", "it is told so, although there is nothing new")
    publish(root, "t", 200, 1)
    follows(root, child, "t")


def test_ranges_are_read_a_few_at_a_time(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 5)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    wanted = {"topic": "t", "partition": 0, "log_id": log.identity.log_id, "first": 0, "next": 5}
    body = json.dumps(wanted).encode()

    def ask() -> bytes:
        with socket.create_connection(root.broker.listeners.pipe_address) as connection:
            connection.sendall(
                b"POST /v1/pipe/range HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
            answer = b""
            while piece := connection.recv(10_000):
                answer += piece
            return answer

    for _ in range(ranges.MOST_AT_ONCE + 1):
        assert b" 200 " in ask(), "those that are over do not count"
    monkeypatch.setattr(ranges, "MOST_AT_ONCE", 0)
    answer = ask()
    assert b" 503 " in answer and b"retry-after: 5" in answer


def test_a_log_that_does_not_know_its_chain_goes_on(tmp_path: Path) -> None:
    """As behind damage that nothing certifies; a start, which reads all of it again, knows."""
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000))
    harness.create()
    values = harness.fill(7, size=100)
    log = harness.log()
    log.chain = log.durable_chain = log.active.end_chain = UNKNOWN_CHAIN
    values += harness.fill(20, size=100)
    assert len(harness.segments()) > 3
    assert (harness.store.refusal(), harness.values(), log.chain_at(27)) == (None, values, None)
    harness.restart()
    assert harness.values() == values
    assert harness.log().chain_at(27) == records.chain(bytes_of(harness), harness.log().identity.chain)
    harness.close()


def test_an_origin_gets_its_lost_end_back_from_a_child(tree: Tree) -> None:
    """The disk of ROOT is put back to yesterday; nobody has published since. A node with another log is no help."""
    root = tree.start("root")
    for number in range(10):
        publish(root, "t", number * 10, 10, size=900)
    follows(root, tree.start("l2", "root"), "t")
    tree.stop("root")
    tree.keep("root")
    root = tree.start("root")
    for number in range(10, 40):
        publish(root, "t", number * 10, 10, size=900)
    l2 = tree.nodes["l2"]
    follows(root, l2, "t")
    tree.stop("root")
    tree.put_back("root")
    root = tree.start("root")
    wait_for(lambda: "history_lost" in root.http("GET", "/v1/node")[1]["problems"], "ROOT is told")
    assert "repair --from" in root.http("GET", "/v1/node")[1]["problems"]["history_lost"]
    assert root.raw("p").publish("t", numbered(0, 1)).code is Code.HISTORY_LOST
    other = tree.start("other", level="root")
    publish(other, "t", 0, 400)
    status, answer = root.http("POST", "/v1/repair", {"from": tree.address("other")})
    assert (status, "404" in answer["error"]) == (409, True)
    status, answer = root.http("POST", "/v1/repair", {"from": tree.address("l2")})
    assert (status, answer) == (200, {"repaired": {"t/0": 300}, "error": ""})
    assert end(root, "t") == 400
    assert "history_lost" not in root.http("GET", "/v1/node")[1]["problems"]
    publish(root, "t", 400, 20)
    follows(root, l2, "t")
    assert l2.counters()["log_truncations"] == 0
    for name in ("root", "l2"):
        tree.stop(name)
    assert digest(tree, "root", "t") == digest(tree, "l2", "t")
    root = tree.start("root")
    assert end(root, "t") == 420
