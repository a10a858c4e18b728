"""A tree under what peers, disks and histories can do to it at the wrong moment."""

from __future__ import annotations

import gc
import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from edgebroker.broker.feed.child_stream import IDLE_SECONDS
from edgebroker.broker.mirror.upstream import SILENT_SECONDS
from edgebroker.common.errors import Code
from edgebroker.common.types import TopicSettings
from edgebroker.network.http.peers import KEEPALIVE_SECONDS
from edgebroker.network.io.transport import Transport
from edgebroker.pipe.candidates import LONGEST_PAUSE
from edgebroker.pipe.stream import HEADER_BYTES, Kind, LogPosition
from tests.kit.brokers import SECONDS, RunningBroker
from tests.kit.trees import Tree, chain, digest, end, follows, line, pipe, polled, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

POLL = "POST /v1/pipe HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


def with_another_past(tree: Tree, *children: str, count: int = 14) -> None:
    """ROOT goes on behind record 5, its children follow; then it is put back, and goes on differently, unseen."""
    root = tree.start("root")
    publish(root, "t", 0, 5)
    tree.stop("root")
    tree.keep("root")
    upper = tree.start("root")
    for name in children:
        lower = tree.start(name, next(reversed(tree.nodes)))
        follows(upper, lower, "t")
        upper = lower
    for number in range(10):
        publish(tree.nodes["root"], "t", 5 + number, 1)
    for name in children:
        follows(tree.nodes["root"], tree.nodes[name], "t")
    tree.stop("root")
    tree.put_back("root")
    root = tree.start("root", pipe__max_children=0)
    for number in range(count):
        publish(root, "t", 1000 + number, 1)
    tree.stop("root")


def place(node: RunningBroker, group: str) -> int:
    return int(node.http("GET", f"/v1/groups/{group}")[1]["partitions"][0]["committed"])


def test_a_grandchild_does_not_mix_histories(tree: Tree) -> None:
    """The node in the middle cuts while its child stands behind the cut and waits for more."""
    with_another_past(tree, "l2", "l3")
    root = tree.start("root")
    follows(root, tree.nodes["l2"], "t")
    follows(root, tree.nodes["l3"], "t")
    wait_for(lambda: chain(tree.nodes["l3"], "t") == chain(root, "t"), "the same history")
    for name in ("l3", "l2", "root"):
        tree.stop(name)
    assert len({digest(tree, name, "t") for name in ("root", "l2", "l3")}) == 1


def test_the_parents_end_is_no_boundary_here(tree: Tree) -> None:
    """Then its log is certainly another one, however short."""
    root = tree.start("root")
    publish(root, "t", 0, 5)
    tree.stop("root")
    tree.keep("root")
    root, child = tree.start("root"), tree.start("l2", "root")
    publish(root, "t", 5, 10)
    follows(root, child, "t")
    tree.stop("root")
    tree.put_back("root")
    root = tree.start("root", pipe__max_children=0)
    publish(root, "t", 100, 3)
    tree.stop("root")
    root = tree.start("root")
    follows(root, child, "t")
    assert chain(child, "t") == chain(root, "t")


def hold_cuts(node: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The disk takes its time over cuts: what is asked for is kept here."""
    held: list[tuple[Any, ...]] = []
    monkeypatch.setattr(node.broker.engine, "truncate", lambda *asked: held.append(asked))
    return held


def test_an_acknowledgement_while_a_log_is_being_cut(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    with_another_past(tree, "l2")
    child = tree.nodes["l2"]
    client = child.raw("till")
    client.subscribe("t", "tills")
    head = client.deliver().head
    while head.last < 14:
        head = client.deliver().head
    held = hold_cuts(child, monkeypatch)
    tree.start("root")
    wait_for(lambda: held, "the cut is asked for")
    assert client.acked(head, 15) is Code.STALE
    monkeypatch.undo()
    child.call(lambda: child.broker.engine.truncate(*held[0]))  # type: ignore[attr-defined]
    follows(tree.nodes["root"], child, "t")
    assert place(child, "tills") <= 5
    head = client.deliver().head
    while head.last < 18:
        head = client.deliver().head
    assert client.acked(head, 19) is Code.OK


def test_a_cut_that_fails_leaves_the_readers_reading(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    with_another_past(tree, "l2")
    child = tree.nodes["l2"]
    client = child.raw("till")
    client.subscribe("t", "tills")
    client.deliver()
    held = hold_cuts(child, monkeypatch)
    tree.start("root")
    wait_for(lambda: held, "the cut is asked for")
    tree.stop("root")
    child.call(lambda: held[0][2](Code.READ_ONLY, "as told by the test"))
    states = lambda: [cursor.state for one in child.broker.sessions for cursor in one.cursors.values()]  # noqa: E731
    wait_for(lambda: child.call(states) == ["live"], "its readers go on with what there is")
    monkeypatch.undo()
    root = tree.start("root")
    follows(root, child, "t")


def test_a_topic_that_cannot_be_taken_holds_no_other_up(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "good", 0, 3)
    root.create("bad", partitions=2)
    publish(root, "bad", 0, 3)
    child = tree.start("l2", "root")
    follows(root, child, "good")
    follows(root, child, "bad")
    tree.stop("l2")
    shutil.rmtree(tree.directory / "l2" / "topics" / "bad" / "1")
    child = tree.start("l2", "root")
    for number in range(3):
        publish(root, "good", 3 + number, 1)
        follows(root, child, "good")
    assert child.counters()["pipe_polls_sent"] < 10


def test_a_log_without_its_beginning(tree: Tree) -> None:
    """And without anything that would tell the chain: it is fetched again, and not asked about for ever."""
    root = tree.start("root")
    for number in range(6):
        publish(root, "t", number * 100, 100, size=300)
    child = tree.start("l2", "root")
    follows(root, child, "t")
    tree.stop("l2")
    directory = tree.directory / "l2" / "topics" / "t" / "0"
    min(directory.glob("*.log")).unlink()
    for path in [*directory.glob("*.index"), *(tree.directory / "l2").glob("meta.db*")]:
        path.unlink()
    child = tree.start("l2", "root")
    wait_for(lambda: chain(child, "t") == chain(root, "t") and end(child, "t") == 600, "it was recreated")
    assert child.counters()["pipe_polls_sent"] < 20
    tree.stop("l2")
    tree.stop("root")
    assert digest(tree, "root", "t") == digest(tree, "l2", "t")


def test_a_new_history_and_a_log_that_begins_further_on(tree: Tree) -> None:
    """Both come in one answer: what is taken over of the one is not lost with the other."""
    root, child = tree.start("root"), tree.start("l2", "root")
    publish(root, "t", 0, 5)
    follows(root, child, "t")
    tree.stop("l2")
    for number in range(5):
        publish(root, "t", 100 * number, 100, size=300)
    tree.stop("root")
    root = tree.start("root", storage__retention_bytes=70_000)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    answers: list[Code] = []
    change = lambda old: replace(old, epochs=[*old.epochs, (2, log.durable_end)])  # noqa: E731
    root.call(lambda: root.broker.engine.change_identities("t", [change], lambda code, _: answers.append(code)))
    wait_for(lambda: answers, "a new history")
    publish(root, "t", 0, 5)
    wait_for(lambda: log.log_start > 5, "retention")
    child = tree.start("l2", "root")
    follows(root, child, "t")
    assert child.broker.engine.log("t", 0).epoch == 2  # type: ignore[union-attr]


def test_what_belongs_to_a_node_is_fed_to_nobody(tree: Tree) -> None:
    root = tree.start("root")
    made: list[Code] = []
    for topic in ("__x", "t.dlq"):
        root.call(
            lambda topic=topic: root.broker.engine.create_topic(
                topic, TopicSettings(), lambda code, _: made.append(code)
            )
        )
    wait_for(lambda: len(made) == 2, "topics of the node itself")
    publish(root, "other", 0, 1)
    for topic in ("__x", "t.dlq", "other"):
        log = root.broker.engine.log(topic, 0)
        assert log is not None
        lines = [[topic, 0, log.identity.log_id, 1, 0, log.identity.chain]]
        with polled(root, topics=["*.dlq", "__*", "x*"], logs=lines) as answer:
            found = b""
            while b"NOT_CARRIED" not in found:
                found += answer.read1(4000)


@pytest.mark.parametrize(
    "changes", [{"topics": ["q*"] * 1001}, {"logs": [["t", 0, "ab" * 16, 1, 0, 0, -1]]}, {"uid": "?"}]
)
def test_polls_that_cannot_be(tree: Tree, changes: dict[str, object]) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 3)
    child = tree.start("l2", "root")
    follows(root, child, "t")
    with polled(root, **changes) as answer:
        assert answer.status == 400
    publish(root, "t", 3, 1)
    follows(root, child, "t")


def test_what_comes_while_it_is_answered_is_not_kept(tree: Tree) -> None:
    root = tree.start("root")
    body = json.dumps({"version": 1, "uid": "ee" * 16, "name": "x", "level": "local", "topics": ["x"], "logs": []})
    with socket.create_connection(root.broker.listeners.pipe_address, SECONDS) as peer:
        peer.sendall((POLL % len(body)).encode() + body.encode())
        assert peer.recv(1 << 16).startswith(b"HTTP/1.1 200")
        with pytest.raises(OSError):
            for _ in range(1000):
                peer.sendall(bytes(1 << 16))
    wait_for(lambda: not root.broker.downstream.children, "it is gone")


def test_an_idle_line_costs_little(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent with nothing to say speaks before the kernel probes whether it is there, and begins in one packet."""
    assert IDLE_SECONDS < KEEPALIVE_SECONDS < SILENT_SECONDS
    root, sent, send = tree.start("root"), list[bytes](), Transport.send

    def recorded(transport: Transport, data: bytes | memoryview) -> None:
        sent.append(bytes(data))
        send(transport, data)

    monkeypatch.setattr(Transport, "send", recorded)
    with polled(root) as answer:
        assert answer.status == 200
        wait_for(lambda: root.broker.downstream.children, "it is answered")
    assert len(sent) == 1 and root.broker.engine.node_uid.encode() in sent[0]


MUTE = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@contextmanager
def saying(tree: Tree, name: str, answer: bytes) -> Iterator[list[socket.socket]]:
    """A parent that answers every request alike, and keeps the connections."""
    listener, kept = socket.create_server(("127.0.0.1", 0)), list[socket.socket]()

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
                kept.append(peer)
                peer.recv(1 << 16)
                peer.sendall(answer)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    tree._ports[name] = listener.getsockname()[1]
    yield kept
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for peer in kept:
        peer.close()


def test_a_parent_that_says_nothing(tree: Tree) -> None:
    """Not even HELLO: given up after a minute."""
    with saying(tree, "mute", MUTE) as kept:
        child = tree.start("l2", "mute")
        wait_for(lambda: child.broker.mirroring.upstream._status == 200, "it answers")  # type: ignore[union-attr]
        child.advance(58.0)
        wait_for(lambda: len(kept) > 1, "another attempt")
        assert "silent" in pipe(child)["parent"]["error"]


def test_a_parent_that_puts_its_child_off_for_good(tree: Tree) -> None:
    """It is asked again all the same: what said so may be a proxy that is misconfigured."""
    with saying(tree, "later", b"HTTP/1.1 503 x\r\nretry-after: 99999999999\r\ncontent-length: 0\r\n\r\n") as kept:
        child = tree.start("l2", "later")
        wait_for(lambda: "503" in pipe(child)["parent"]["error"], "it answers")
        child.advance(LONGEST_PAUSE + 1.0)
        wait_for(lambda: len(kept) > 1, "another attempt")


def test_a_line_stands_at_the_end_of_what_is_stored(tree: Tree) -> None:
    """Something is being stored when a log is to be taken up again: that is waited for."""
    root, child = tree.start("root"), tree.start("l2", "root")
    publish(root, "t", 0, 5)
    follows(root, child, "t")
    upstream, log = child.broker.mirroring.upstream, child.broker.engine.log("t", 0)
    assert upstream is not None and log is not None
    child.call(lambda: setattr(log, "rolling", True))
    publish(root, "t", 5, 5)
    wait_for(lambda: log.staged_end == 10, "it is staged")
    child.call(lambda: (upstream.begin(), upstream._mirrors._retry(log)))
    child.call(lambda: setattr(log, "rolling", False))
    publish(root, "t", 10, 3)
    child.advance(1.0)
    follows(root, child, "t")
    assert child.counters()["pipe_lost"] == 0


def test_the_cap_outlives_the_connection(tree: Tree) -> None:
    root = tree.start("root")
    for number in range(12):
        publish(root, "t", number * 100, 100, size=9000)
    child = tree.start("l2", "root", pipe__bytes_per_second=20_000)
    upstream = child.broker.mirroring.upstream
    assert upstream is not None

    def taken() -> int:
        follower = upstream._follower
        return follower.bytes_taken + sum(len(one.partial) for one in follower.lines.values())

    for _ in range(4):
        wait_for(lambda: upstream._throttled, "the bucket is empty")
        before = child.counters()["pipe_polls_sent"]
        child.call(lambda: upstream.again("the line drops"))
        child.advance(3.0)
        wait_for(lambda before=before: child.counters()["pipe_polls_sent"] > before, "it goes on")  # type: ignore[misc]
    assert child.call(taken) < 20_000 * 12 + (100 << 10)
    assert line(child, "t")["state"] == "live"


def test_many_cold_logs_cost_little_memory(tree: Tree) -> None:
    """A child that takes nothing: a few pieces wait for it, not one for each log."""
    topics = [f"t{number}" for number in range(20)]
    root = tree.start("root", storage__segment_bytes=16 << 20)
    for topic in topics:
        publish(root, topic, 0, 100, size=5000)
    tree.stop("root")
    for path in (tree.directory / "root" / "topics").rglob("*.index"):
        path.unlink()  # as after a crash: what is in the logs has to be looked for on the disk
    root = tree.start("root", storage__segment_bytes=16 << 20, storage__verify_bytes_per_second=1)
    logs = [root.broker.engine.log(topic, 0) for topic in topics]
    lines = [[log.topic, 0, log.identity.log_id, 1, 0, log.identity.chain] for log in logs if log is not None]
    known = {topic: root.call(lambda topic=topic: root.broker.downstream.info(topic).digest) for topic in topics}  # type: ignore[misc]
    body = {
        "version": 1,
        "uid": "ee" * 16,
        "name": "x",
        "level": "local",
        "topics": ["*"],
        "logs": lines,
        "known": known,
    }
    data = json.dumps(body).encode()
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(root.broker.listeners.pipe_address)
        peer.sendall((POLL % len(data)).encode() + data)

        def held() -> list[int]:
            cursors = [cursor for child in root.broker.downstream.children for cursor in child.feed.cursors.values()]
            return [len(c.piece.source) for c in cursors if c.piece and isinstance(c.piece.source, memoryview)]

        wait_for(lambda: root.call(held), "something was read for it")
        root.advance(5.0)
        assert len(root.call(held)) <= 2


def test_a_topic_that_has_more_partitions_at_the_parent(tree: Tree) -> None:
    """What it says of their snapshots is not about those that are here."""
    root, child = tree.start("root"), tree.start("l2", "root")
    publish(root, "t", 0, 5)
    follows(root, child, "t")
    info = root.call(lambda: root.broker.downstream.info("t"))
    part = replace(info.partitions[0], snapshot=(0, 5))
    other = replace(info, settings=replace(info.settings, partitions=2), partitions=[part, part])
    child.call(lambda: child.broker.mirroring.upstream._mirrors.offered(other))  # type: ignore[union-attr]
    publish(root, "t", 5, 1)
    follows(root, child, "t")
    assert not child.broker.loop.failed_callbacks
    assert "name_clash" in child.http("GET", "/v1/node")[1]["problems"]


def test_retention_overtakes_a_child(tree: Tree) -> None:
    """It is told that what it wants is gone, and goes on behind that, however slow it is."""
    root = tree.start("root", storage__retention_bytes=200_000)
    child = tree.start("l2", "root", pipe__bytes_per_second=4096)
    publish(root, "t", 0, 5)
    follows(root, child, "t")
    for number in range(60):
        publish(root, "t", number * 20, 20, size=1000)
    wait_for(lambda: root.broker.engine.log("t", 0).log_start > 5, "retention")  # type: ignore[union-attr]

    def arrived() -> bool:
        child.advance(20.0)
        return end(child, "t") == end(root, "t")

    wait_for(arrived, "it arrives at the end")
    log = child.broker.engine.log("t", 0)
    assert log is not None
    assert (log.log_start, log.identity.gaps != [], log.corrupt_ranges) == (0, True, [])


def kinds(answer: http.client.HTTPResponse) -> Iterator[int]:
    """The kinds of the frames of an answer, as they come."""
    data = b""
    while more := answer.read1(1 << 16):
        data += more
        while len(data) >= HEADER_BYTES + int.from_bytes(data[:4], "big"):
            yield data[4]
            data = data[HEADER_BYTES + int.from_bytes(data[:4], "big") :]


def test_a_line_that_falls_silent_is_alive(tree: Tree) -> None:
    """However long ago the answer began: the child hears of the parent 45 seconds after the last record."""
    root = tree.start("root")
    publish(root, "t", 0, 1)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    lines = [["t", 0, log.identity.log_id, 1, 0, log.identity.chain]]
    known = {"t": root.call(lambda: root.broker.downstream.info("t").digest)}
    with polled(root, topics=["t"], logs=lines, known=known) as answer:
        found = kinds(answer)
        assert [next(found), next(found)] == [Kind.HELLO, Kind.DATA]
        root.advance(5.0)
        publish(root, "t", 1, 1)
        assert next(found) == Kind.DATA
        root.advance(41.0)
        root.advance(5.0)
        assert next(found) == Kind.IDLE
        root.advance(70.0)
        assert list(found) == [Kind.IDLE], "the answer is over"


def test_damage_that_nobody_has_noticed_is_no_other_past(tree: Tree) -> None:
    """A child whose place lies behind it keeps what it has, for that may be all that is left."""
    root = tree.start("root")
    for number in range(12):
        publish(root, "t", number, 1, size=300)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    with min((tree.directory / "root" / "topics" / "t" / "0").glob("*.log")).open("r+b") as file:
        file.seek(200)
        file.write(b"~")
    lines = [["t", 0, log.identity.log_id, 1, 5, 4711]]
    with polled(
        root, topics=["t"], logs=lines, known={"t": root.call(lambda: root.broker.downstream.info("t").digest)}
    ) as answer:
        found = b""
        while b"DAMAGED" not in found:
            assert b"DIVERGED" not in found
            found += answer.read1(4000)
    wait_for(lambda: log.corrupt_ranges, "the node knows of it")


def test_what_a_poll_brought_goes_with_its_answer(tree: Tree) -> None:
    """Without the collector: a child that polls again and again must not fill the memory until that comes by."""
    root = tree.start("root")
    publish(root, "t", 0, 3)
    logs = [[f"lost-{number}", 0, "cd" * 16, 1, 0, 0] for number in range(500)]
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with polled(root, logs=logs):
                pass
        wait_for(lambda: not root.call(lambda: list(root.broker._http.connections)), "the connections are over")
        assert not [one for one in gc.get_objects() if isinstance(one, LogPosition)]
    finally:
        gc.enable()
