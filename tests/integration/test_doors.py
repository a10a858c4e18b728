"""Each door is for one kind of peer: clients at a socket of this machine, administration through the tree."""

from __future__ import annotations

import getpass
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgebroker import Consumer, Producer
from edgebroker.broker.fleet import remote_calls
from edgebroker.cli.main import main
from edgebroker.common.errors import ArgumentError
from edgebroker.network.io import channel
from edgebroker.network.io.channel import local
from tests.kit.brokers import RunningBroker, running
from tests.kit.trees import Tree, follows, publish, run
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


# ---- clients of this machine ----


def test_clients_at_the_socket(broker: RunningBroker) -> None:
    path = Path(broker.config.node.data_dir) / "clients.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with Producer(f"unix:{path}") as producer:
        producer.send("t", b"1").result(10.0)
    with Consumer(f"127.0.0.1:1,unix:{path}", ["t"], start="earliest") as consumer:
        assert [record.value for record in consumer.poll(10.0)] == [b"1"]
        [session] = broker.broker.sessions
        assert session.transport.identity == f"unix:{getpass.getuser()}"


@pytest.mark.parametrize("server", ["unix:", "unix:" + "x" * 108, "unix:a\0b"])
def test_a_path_that_is_none(server: str) -> None:
    with pytest.raises(ArgumentError, match="write unix:PATH"):
        Producer(server)


def test_who_is_at_the_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel says so; who is not in /etc/passwd has a number."""
    names = tmp_path / "passwd"
    names.write_text(f"# x\n+::::::\nother:x:99:99::/:\nmine:x:{os.getuid()}:0::/:\n")
    for path, name in ((names, "mine"), (tmp_path / "none", str(os.getuid()))):
        monkeypatch.setattr(channel, "_PASSWD", path)
        here, there = socket.socketpair()
        with here, there:
            assert local(here).identity == f"unix:{name}"


def test_a_socket_that_cannot_be_does_not_stop_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(tmp_path / "data", {"listen.unix": "/proc/none/x.sock"}) as broker:
        assert broker.http("GET", "/healthz")[0] == 200
    assert "listen.unix: the socket /proc/none/x.sock cannot be created" in caplog.text


# ---- administration through the tree ----


@contextmanager
def made(directory: Path) -> Iterator[Tree]:
    """root - hub - till, all of them known at the root."""
    tree = Tree(directory)
    try:
        root = tree.start("root")
        publish(root, "prices", 0, 3)
        follows(root, tree.start("hub", "root", level="l2"), "prices")
        follows(root, tree.start("till", "hub", level="local", listen__pipe=""), "prices")
        wait_for(lambda: len(root.http("GET", "/v1/tree/nodes")[1]["nodes"]) == 2, "both report", 20.0)
        yield tree
    finally:
        tree.close()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    with made(tmp_path_factory.mktemp("chain")) as tree:
        yield tree


def test_commands_at_a_node_below(chain: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """Also at one that no other node can reach."""
    root, till = chain.nodes["root"], chain.nodes["till"]
    assert run(root, capsys, "--via", "till", "status")[1]["node"]["name"] == "till"
    assert run(root, capsys, "--via", till.broker.engine.node_uid, "pipe")[1]["parent"]["name"] == "hub"
    assert main(["--via=till", "topic", "create", "own", "--admin", root.admin]) == 0
    assert "own" in [topic["name"] for topic in till.http("GET", "/v1/topics")[1]["topics"]]
    assert root.http("GET", "/v1/via/till/v1/tree?label=level=local")[1]["node"] == "till"
    capsys.readouterr()
    for against in ("till", "hub", chain.address("hub")):
        found = run(root, capsys, "verify", "--against", against)[1]
        assert (found["same"], found["compared"]) == (True, {"prices/0": [0, 3]})


@pytest.mark.parametrize(
    ("method", "path", "status", "why"),
    [
        ("GET", "/v1/via/nobody/v1/node", 404, "no node nobody is known below; see edgebroker tree --all"),
        ("GET", "/v1/via/till", 404, "there is no /"),
        ("GET", "/v1/via/till/v1/none", 404, "there is no /v1/none"),
        ("DELETE", "/v1/via/till/v1/node", 405, "DELETE is not allowed for /v1/node; use GET, HEAD"),
        ("POST", "/v1/via/till/v1/pipe", 405, "POST is not allowed for /v1/pipe"),
        ("POST", "/v1/via/till/v1/topics", 400, "the body is not as expected"),
        ("POST", "/v1/via/till/v1/pipe/range", 409, "this is answered in a stream"),
    ],
)
def test_what_a_node_below_refuses(chain: Tree, method: str, path: str, status: int, why: str) -> None:
    body: object = None
    if path.endswith("range"):
        log = chain.nodes["till"].broker.engine.log("prices", 0)
        assert log is not None
        body = {"topic": "prices", "partition": 0, "log_id": log.identity.log_id, "first": 0, "next": 3}
    answered, answer = chain.nodes["root"].http(method, path, body)
    assert (answered, why in answer["error"]) == (status, True), answer


def test_a_node_that_does_not_answer(chain: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root, till = chain.nodes["root"], chain.nodes["till"]
    monkeypatch.setattr(remote_calls, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(till.broker.tree.remote, "handler", lambda request, reply: None)
    status, answer = root.http("GET", "/v1/via/till/v1/node")
    assert (status, answer["error"].startswith("till did not answer within 0.3 s")) == (503, True)


def test_an_answer_that_is_too_long(chain: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_calls, "MAX_ANSWER_BYTES", 200)
    status, answer = chain.nodes["root"].http("GET", "/v1/via/till/v1/node")
    assert (status, "200 go through the tree" in answer["error"]) == (409, True)


def test_so_many_are_answered_at_a_time(chain: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_calls, "MOST_ANSWERED", 0)
    assert chain.nodes["root"].http("GET", "/v1/via/till/v1/node")[0] == 503
    monkeypatch.setattr(remote_calls, "MOST_ASKED", 0)
    assert "wait for their answers" in chain.nodes["root"].http("GET", "/v1/via/till/v1/node")[1]["error"]


def test_an_answer_that_was_not_asked_for(chain: Tree) -> None:
    answer = {"id": "ab" * 16, "status": 200, "content_type": "", "body": ""}
    assert chain.nodes["root"].pipe("POST", "/v1/tree/answers", answer)[0] == 404
    for wrong in ({"status": 100}, {"content_type": "x\r\nset-cookie: y"}, {"id": "x"}):
        assert chain.nodes["root"].pipe("POST", "/v1/tree/answers", {**answer, **wrong})[0] == 400


def test_via_is_for_administration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--via", "till", "publish", "t"]) == 2
    assert "--via is for commands that ask only the admin interface" in capsys.readouterr().err
    assert main(["--via", "till", "statsu"]) == 2
    assert "did you mean 'status'" in capsys.readouterr().err


def test_a_command_says_through_whom_it_asked(chain: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = chain.nodes["root"]
    assert main(["--via", "nobody", "status", "--admin", root.admin]) != 0
    assert "no node nobody is known below" in capsys.readouterr().err
    assert main(["--via", "till", "topic", "list", "--admin", root.admin, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_node_that_is_not_connected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with made(tmp_path) as tree:
        root = tree.nodes["root"]
        assert main(["--via", "till", "check", "ready", "--admin", root.admin]) in (0, 1)
        tree.stop("till")
        wait_for(lambda: not tree.nodes["hub"].broker.downstream.children, "it is gone")
        for probe in ("live", "ready"):
            assert main(["--via", "till", "check", probe, "--admin", root.admin]) == 2
            assert "not connected now" in capsys.readouterr().out
        tree.stop("hub")
        wait_for(lambda: not root.broker.downstream.children, "it is gone")
        assert root.http("GET", "/v1/via/till/v1/node")[1]["error"].startswith("till is not connected")
