"""The fleet view tells what it knows, and since when: who is frozen, cut off, killed or stopped is silent soon."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from edgebroker.broker.feed.downstream import SILENT_SECONDS
from edgebroker.broker.fleet.inbox import GRACE_SECONDS
from edgebroker.broker.mirror.upstream import ALIVE_SECONDS
from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from tests.integration.test_registry import until
from tests.kit.brokers import RunningBroker, batch_of, running
from tests.kit.trees import Tree, follows, publish, run
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


def silent(node: RunningBroker, name: str) -> float:
    """Seconds for which a node is silent, as another one sees it; -1: it is connected, -2: it is not known."""
    found = [one for one in node.http("GET", "/v1/tree/nodes")[1]["nodes"] if one["name"] == name]
    return float(found[0]["silent_seconds"]) if found else -2.0


def grown(tree: Tree, *levels: str) -> RunningBroker:
    """A chain of nodes that have all of topic t, each heard by the one above it."""
    root = above = tree.start("root")
    publish(root, "t", 0, 5)
    before = "root"
    for level in levels:
        node = tree.start(level, before)
        follows(root, node, "t")
        node.advance(ALIVE_SECONDS)
        wait_for(lambda above=above: alive(above), "it says that it is there")  # type: ignore[misc]
        above, before = node, level
    until(tree, lambda: silent(root, levels[-1]) == -1, "the root knows the last one")
    return root


def alive(node: RunningBroker) -> bool:
    return any(child.alive_at for child in node.call(lambda: list(node.broker.downstream.children)))


def test_a_frozen_child_is_silent_and_found_again(tree: Tree) -> None:
    """It does not end its connection: it only says nothing."""
    root = grown(tree, "l2")
    root.advance(SILENT_SECONDS + 1.1)
    wait_for(lambda: silent(root, "l2") >= SILENT_SECONDS, "it is silent")
    tree.nodes["l2"].advance(ALIVE_SECONDS)
    wait_for(lambda: silent(root, "l2") == -1, "it is back")


def test_a_child_that_freezes_right_after_its_poll(tree: Tree) -> None:
    """It has said nothing in this answer, but in the one before."""
    root = grown(tree, "l2")
    polls = root.counters()["pipe_polls"]
    root.advance(121.0)
    wait_for(lambda: root.counters()["pipe_polls"] > polls, "it polls again")
    assert not alive(root)
    root.advance(SILENT_SECONDS + 1.1)
    wait_for(lambda: silent(root, "l2") >= SILENT_SECONDS, "it is silent")


def test_the_root_learns_at_once_whom_a_hub_lost(tree: Tree) -> None:
    root = grown(tree, "l2", "l3", "pos")
    tree.nodes["l3"].advance(SILENT_SECONDS + 1.1)
    wait_for(lambda: silent(root, "pos") >= SILENT_SECONDS, "it is silent at the root")
    assert silent(root, "l3") == -1


def test_a_clean_stop_says_goodbye(tree: Tree) -> None:
    root = grown(tree, "l2", "l3")
    tree.stop("l3")
    wait_for(lambda: silent(root, "l3") >= 0, "it is silent at the root")
    tree.stop("l2")
    wait_for(lambda: silent(root, "l2") >= 0, "it is silent")
    tree.start("l2", "root")
    wait_for(lambda: silent(root, "l2") == -1, "it is back")


def test_who_was_killed_is_silent_after_its_grace(tree: Tree) -> None:
    root = grown(tree, "l2")
    l2 = tree.nodes["l2"]
    l2.call(l2.broker.mirroring.upstream.stop)  # type: ignore[union-attr]
    wait_for(lambda: not root.http("GET", "/v1/pipe")[1]["children"], "the line is down")
    root.advance(GRACE_SECONDS - 3)
    assert silent(root, "l2") == -1, "it may come back in a moment"
    root.advance(4)
    root.advance(1.1)
    wait_for(lambda: silent(root, "l2") >= GRACE_SECONDS, "it is silent")


def test_the_lag_of_a_silent_node_grows(tree: Tree) -> None:
    """Unless it has everything that there is."""
    root = grown(tree, "l2")
    tree.stop("l2")
    wait_for(lambda: silent(root, "l2") >= 0, "it is silent")
    root.advance(300.0)
    assert lag(root) < 60
    publish(root, "t", 5, 1)
    root.advance(300.0)
    assert lag(root) >= 590


def lag(node: RunningBroker) -> float:
    return float(node.http("GET", "/v1/tree/nodes")[1]["nodes"][0]["lag_seconds"])


def test_the_verdict_tells_the_age_of_its_evidence(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree, "l2", "l3")
    root.advance(5.0)
    assert main(["tree", "--admin", tree.admin("root")]) == 0
    told = capsys.readouterr().out
    assert "every node is connected, without lag, and has applied everything, as of " in told
    found = run(root, capsys, "tree")[1]
    assert found["evidence_seconds"] >= 5.0 + SILENT_SECONDS


def test_wait_counts_the_lowest_level_that_there_is(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree, "l2", "pos")
    admin = ["--admin", tree.admin("root")]
    root.advance(400.0)  # it knows all nodes by now
    for node in ("pos", "l2"):
        tree.nodes[node].advance(ALIVE_SECONDS)
    assert main(["wait", "--topic", "t", "--mirrored", "--timeout", "10s", *admin]) == 0
    assert "1 of 1 pos nodes have replicated t" in capsys.readouterr().err
    assert main(["wait", "--topic", "t", "--mirrored", "--label", "level=l2", "--timeout", "10s", *admin]) == 0
    assert main(["wait", "--topic", "t", "--label", "pos", "--timeout", "10s", *admin]) == 2
    assert "not NAME=VALUE" in capsys.readouterr().err


def test_a_node_that_knows_no_parent_is_degraded(tree: Tree) -> None:
    node = tree.start("pos", pipe__registry="127.0.0.1:9")
    node.advance(11.0)
    wait_for(lambda: "no parent is known" in str(node.http("GET", "/readyz")[1]["warnings"]), "it says so")
    assert node.http("GET", "/readyz")[1]["status"] == "degraded"


# ---- what is not a node ----


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 5\r\n\r\nhello", "text/html: not a node"),
        (b"", "without an answer; is this the listen.pipe of a node, of the same fleet?"),
    ],
)
def test_a_parent_that_is_something_else_is_named(tree: Tree, answer: bytes, says: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    with running(tree.directory / "pos", {"node.level": "pos", "pipe.parents": f"127.0.0.1:{port}"}) as node:
        wait_for(lambda: says in str(node.http("GET", "/readyz")[1]["warnings"]), "the parent is named as what it is")
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10.0)


def test_empty_lines_before_a_request_are_none_of_it(tree: Tree) -> None:
    """RFC 9112, 2.2; in whatever pieces they come, and between two requests."""
    root = tree.start("root")
    host, port = root.broker.listeners.http_address
    with socket.create_connection((host, port), 10.0) as client:
        for pieces in (
            [b"\r\n", b"\r", b"\nGET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"],
            [b"\r\nGET /healthz HTTP/1.1\r\n", b"host: x\r\n\r\n\r\n"],
        ):
            for piece in pieces:
                client.sendall(piece)
                os.sched_yield()
            data = b""
            while b'{"status":"ok"}' not in data:
                data += client.recv(65536)
            assert data.startswith(b"HTTP/1.1 200")


# ---- what a replica does not write ----


def test_a_test_message_at_a_till_blocks_no_topic(tree: Tree) -> None:
    """The topic comes from above when it is published there."""
    root = tree.start("root")
    settings = {"node.level": "pos", "node.name": "pos", "pipe.parents": tree.address("root")}
    with running(tree.directory / "pos", settings) as node:
        wait_for(lambda: node.http("GET", "/v1/pipe")[1]["parent"]["connected"], "connected")
        refused = node.raw("till").publish("promo", batch_of(b"{}"))
        assert (refused.code, "not at the parent of this node yet" in refused.message) == (Code.UNKNOWN_TOPIC, True)
        publish(root, "promo", 0, 3)
        follows(root, node, "promo")
        refused = node.raw("till-2").publish("promo", batch_of(b"{}"))
        assert refused.code is Code.NOT_ORIGIN
        assert f"root at {tree.address('root')}" in refused.message
        assert node.http("POST", "/v1/topics", {"name": "own"})[0] == 201
        assert node.raw("till-3").publish("own", batch_of(b"{}")).code is Code.OK


def test_the_check_of_the_fleet(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = grown(tree, "l2", "pos")
    check = ["check", "fleet", "--admin", tree.admin("root")]
    assert main(check) == 0
    assert "EDGEBROKER FLEET OK: 2 nodes, as of" in capsys.readouterr().out
    tree.stop("pos")
    wait_for(lambda: silent(root, "pos") >= 0, "it is silent")
    assert main(check) == 1
    assert "of 2 nodes 1 silent: pos" in capsys.readouterr().out
    assert main([*check, "--critical", "1"]) == 2
    assert main([*check, "--label", "level=local"]) == 3
    assert main(["check", "fleet", "--admin", "127.0.0.1:9"]) == 2
