"""The admin interface over HTTP: every endpoint, and every way to talk to it badly."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.network.http import server as http_server
from edgebroker.version import __version__
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, numbered, running
from tests.kit.waiting import wait_for


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with running(tmp_path_factory.mktemp("http") / "data") as found:
        client = found.raw("client-7")
        client.publish("t", numbered(0, 10))
        client.subscribe("t", "g")
        client.ack(client.deliver().head, 4)
        yield found


class Raw:
    """HTTP by hand over one connection."""

    def __init__(self, broker: RunningBroker, path: Path | None = None, *, pipe: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self.socket.settimeout(SECONDS)
        listeners = broker.broker.listeners
        self.socket.connect(str(path) if path else listeners.pipe_address if pipe else listeners.http_address)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def response(self, head_only: bool = False) -> tuple[int, dict[str, str], object]:
        line = self._file.readline().decode()
        assert line.startswith("HTTP/1.1 "), line
        headers = {}
        while (header := self._file.readline().decode().strip()) != "":
            name, _, value = header.partition(": ")
            headers[name.lower()] = value
        body = b"" if head_only else self._file.read(int(headers["content-length"]))
        return int(line.split()[1]), headers, json.loads(body or b"null")

    def ended(self) -> bool:
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
CREATE = b"POST /v1/topics HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_health_and_readiness(broker: RunningBroker) -> None:
    assert broker.http("GET", "/healthz") == (200, {"status": "ok"})
    status, ready = broker.http("GET", "/readyz")
    assert (status, ready["status"], ready["checks"]) == (200, "ok", {"started": "ok", "storage": "ok"})


def test_node(broker: RunningBroker) -> None:
    status, node = broker.http("GET", "/v1/node")
    assert status == 200
    assert node["version"] == __version__
    assert len(bytes.fromhex(node["uid"])) == 16
    assert node["level"] == "root"
    assert node["connections"] == 1
    assert node["storage"]["engine"] == "segment"
    assert node["counters"]["records_published"] == 10
    assert node["loop"]["iterations"] > 0
    again = broker.http("GET", "/v1/node")[1]
    assert again["uptime_seconds"] >= node["uptime_seconds"]
    assert again["counters"]["http_requests"] == node["counters"]["http_requests"] + 1


def test_topics(broker: RunningBroker) -> None:
    status, topics = broker.http("GET", "/v1/topics")
    assert status == 200
    assert "t" in [topic["name"] for topic in topics["topics"]]
    status, topic = broker.http("GET", "/v1/topics/t")
    assert status == 200
    assert topic["settings"]["kind"] == "stream"
    [partition] = topic["partitions"]
    assert (partition["log_start"], partition["durable_end"], partition["records_in"]) == (0, 10, 10)
    assert partition["origin"] == broker.http("GET", "/v1/node")[1]["uid"]
    assert broker.http("GET", "/v1/topics/nowhere")[0] == 404


def test_groups_and_clients(broker: RunningBroker) -> None:
    status, groups = broker.http("GET", "/v1/groups")
    assert status == 200
    assert [group["name"] for group in groups["groups"]] == ["g"]
    status, group = broker.http("GET", "/v1/groups/g")
    [partition] = group["partitions"]
    assert (partition["committed"], partition["durable_end"], partition["lag"]) == (4, 10, 6)
    assert partition["member"]["client_id"] == "client-7"
    assert partition["member"]["in_flight"] == 6
    assert broker.http("GET", "/v1/groups/nobody")[0] == 404
    status, clients = broker.http("GET", "/v1/clients")
    [client] = clients["clients"]
    assert (client["client_id"], client["group"], client["backlog_bytes"]) == ("client-7", "g", 0)
    assert client["bytes_in"] > 0


def test_create(broker: RunningBroker) -> None:
    settings = {"partitions": 3, "kind": "table", "retention_ms": 1000, "on_damage": "skip"}
    status, made = broker.http("POST", "/v1/topics", {"name": "made", **settings})
    assert status == 201
    assert len(made["partitions"]) == 3
    assert made["settings"] | settings == made["settings"]
    assert broker.http("GET", "/v1/topics/made")[1] == made


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"name": "a b"}, "topic names"),
        ({"name": "x.dlq"}, "reserved"),
        ({"name": "__x"}, "reserved"),
        ({"name": ""}, "topic names"),
        ({"name": 5}, "Expected `str`"),
        ({}, "missing required field"),
        ({"name": "n", "partitions": 0}, "partitions: 1 to 1024"),
        ({"name": "n", "partitions": 1025}, "partitions: 1 to 1024"),
        ({"name": "n", "segment_bytes": 1}, "segment_bytes: 65536"),
        ({"name": "n", "retention_ms": -1}, "retention_ms: 0 to"),
        ({"name": "n", "message_ttl_ms": 1 << 63}, "message_ttl_ms: 0 to"),
        ({"name": "n", "kind": "queue"}, "Invalid enum value"),
        ({"name": "n", "retention": 5}, "unknown field"),
        (["n"], "Expected `object`"),
    ],
)
def test_create_errors(broker: RunningBroker, body: object, words: str) -> None:
    status, answer = broker.http("POST", "/v1/topics", body)
    assert status == 400
    assert words in answer["error"]
    assert broker.http("GET", "/v1/topics/n")[0] == 404


def test_alter(broker: RunningBroker) -> None:
    broker.create("altered", retention_ms=5)
    status, topic = broker.http("PATCH", "/v1/topics/altered", {"retention_bytes": 1 << 30, "urgent": True})
    assert status == 200
    assert topic["settings"]["retention_bytes"] == 1 << 30
    assert topic["settings"]["retention_ms"] == 5
    assert broker.http("GET", "/v1/topics/altered")[1]["settings"]["urgent"] is True
    for body, words in (
        ({"partitions": 2}, "fixed when it is created"),
        ({"kind": "table"}, "fixed when it is created"),
        ({"retention_ms": -5}, "retention_ms: 0 to"),
        ({"on_damage": "panic"}, "Invalid enum value"),
        ({"bogus": 1}, "unknown field"),
        ([], "Expected `object`"),
        ("x", "Expected `object`"),
    ):
        status, answer = broker.http("PATCH", "/v1/topics/altered", body)
        assert (status, words in answer["error"]) == (400, True), answer
    assert broker.http("PATCH", "/v1/topics/nowhere", {})[0] == 404
    assert broker.http("GET", "/v1/topics/altered")[1]["settings"] == topic["settings"]


def test_settings_survive_a_restart(tmp_path: Path) -> None:
    with running(tmp_path / "data") as first:
        first.create("t", partitions=2)
        first.http("PATCH", "/v1/topics/t", {"retention_ms": 77})
    with running(tmp_path / "data") as second:
        assert second.http("GET", "/v1/topics/t")[1]["settings"]["retention_ms"] == 77


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/node", 404),
        ("GET", "/v1", 404),
        ("PUT", "/v1/topics/t", 405),
        ("POST", "/healthz", 405),
        ("PUT", "/v1/topics", 405),
        ("GET", "/v1/node/more", 404),
        ("HEAD", "/v1/node", 200),
        ("HEAD", "/readyz", 200),
        ("GET", "/healthz?verbose=1", 200),
        ("GET", "/v1/topics/t/", 200),
        ("GET", "/v1/topics/%74", 200),
    ],
)
def test_paths_and_methods(broker: RunningBroker, method: str, path: str, status: int) -> None:
    assert broker.http(method, path)[0] == status


def test_the_unix_socket_is_for_its_owner(broker: RunningBroker) -> None:
    path = broker.broker.listeners.socket_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert call(f"unix:{path}", "GET", "/v1/node")["uid"] == broker.broker.engine.node_uid
    with pytest.raises(EdgeBrokerError, match="no topic nowhere"):
        call(f"unix:{path}", "GET", "/v1/topics/nowhere")
    with Raw(broker, path) as raw:
        raw.send(GET)
        assert raw.response()[0] == 200


def test_keep_alive_and_close(broker: RunningBroker) -> None:
    with Raw(broker) as raw:
        for _ in range(5):
            raw.send(GET)
            assert raw.response()[0] == 200
        raw.send(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        status, headers, _ = raw.response()
        assert (status, headers["connection"]) == (200, "close")
        assert raw.ended()
    with Raw(broker) as raw:
        raw.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert raw.response()[0] == 200
        assert raw.ended()


def test_pipelining(broker: RunningBroker) -> None:
    create = CREATE + b"Content-Length: %d\r\n\r\n%s"
    body = b'{"name": "pipelined"}'
    with Raw(broker) as raw:
        raw.send(GET + create % (len(body), body) + GET + create % (len(body), body) + GET)
        assert [raw.response()[0] for _ in range(5)] == [200, 201, 200, 409, 200]
    with Raw(broker) as raw:
        for byte in GET + create % (2, b"{}"):
            raw.send(bytes([byte]))
        assert [raw.response()[0] for _ in range(2)] == [200, 400]


@pytest.mark.parametrize(
    "bad",
    [
        b"nonsense\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",  # no Host
        b"GET /healthz HTTP/1.1\r\nHost x\r\n\r\n",
        CREATE + b"Content-Length: x\r\n\r\n",
        CREATE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
    ],
    ids=range(6),
)
@pytest.mark.parametrize("before", [b"", GET, GET.replace(b"GET", b"HEAD")], ids=["first", "after GET", "after HEAD"])
def test_malformed_requests(broker: RunningBroker, bad: bytes, before: bytes) -> None:
    with Raw(broker) as raw:
        if before:
            raw.send(before)
            assert raw.response(head_only=before.startswith(b"HEAD"))[0] == 200
        raw.send(bad)
        status, headers, answer = raw.response()
        assert status in (400, 501)
        assert isinstance(answer, dict)
        assert answer["error"]
        assert headers["connection"] == "close"
        assert raw.ended()
    assert broker.http("GET", "/healthz")[0] == 200


def test_oversize_heads_and_bodies(broker: RunningBroker) -> None:
    with Raw(broker) as raw:
        raw.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000)
        assert raw.response()[0] == 431
        assert raw.ended()
    limit = 64 << 10
    head = CREATE + b"Content-Length: %d\r\n\r\n"
    with Raw(broker) as raw:
        raw.send(head % limit + b" " * limit)
        assert raw.response()[0] == 400  # it is read, and it is no JSON
        raw.send(head % (limit + 1) + b" " * (limit + 1))
        assert raw.response()[0] == 413
        assert raw.ended()


def test_a_peer_that_leaves_in_the_middle(broker: RunningBroker) -> None:
    for part in (
        GET[:10],
        CREATE + b"Content-Length: 10\r\n\r\n{",
    ):
        with Raw(broker) as raw:
            raw.send(part)
            raw.socket.shutdown(socket.SHUT_WR)
            while raw._file.readline():
                pass
    assert broker.http("GET", "/healthz")[0] == 200
    assert broker.raw("after").publish("t", batch_of(b"v")).offset == 10


def test_a_handler_that_fails_after_it_has_answered(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends: a second answer would be taken for that of the next request."""
    handler = broker.broker._http.handler

    def answered_and_failed(request: Any, reply: Any) -> None:
        handler(request, reply)
        raise ValueError

    with Raw(broker) as raw:
        raw.send(GET)
        assert raw.response()[0] == 200
        monkeypatch.setattr(broker.broker._http, "handler", answered_and_failed)
        raw.send(GET)
        assert raw.response()[0] == 200
        assert raw.ended()


def test_a_topic_deleted_while_topics_are_listed(broker: RunningBroker) -> None:
    names = [f"t{number:03}" for number in range(60)]
    for name in names:
        broker.create(name)
    with Raw(broker) as raw:
        raw.send(b"GET /v1/topics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert broker.http("DELETE", f"/v1/topics/{names[-1]}")[0] == 200
        assert raw.response()[0] == 200


def test_a_poll_of_the_pipe_that_is_nested_too_deeply(broker: RunningBroker) -> None:
    body = b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    poll = b"POST /v1/pipe HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with Raw(broker, pipe=True) as raw:
        raw.send(poll % len(body) + body)
        assert raw.response()[0] == 400


def connections(broker: RunningBroker) -> list[Any]:
    return list(broker.broker._http.connections)


def test_pipelined_requests_take_their_turns(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    server, seen = broker.broker._http, list[int]()
    handler = server.handler

    def handle(request: Any, reply: Any) -> None:
        seen.append(broker.broker.loop.iterations)
        handler(request, reply)

    monkeypatch.setattr(server, "handler", handle)
    with Raw(broker) as raw:
        raw.send(GET * 300)
        assert [raw.response()[0] for _ in range(300)] == [200] * 300
    assert max(Counter(seen).values()) <= 2, "one as it comes, one more at the end of that iteration"


def test_a_body_in_tiny_chunks(broker: RunningBroker) -> None:
    body = b'{"name": "chunked"}' + b" " * 200
    with Raw(broker) as raw:
        raw.send(CREATE + b"Transfer-Encoding: chunked\r\n\r\n")
        raw.send(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert raw.response()[0] == 201
        raw.send(GET)
        assert raw.response()[0] == 200


def test_requests_one_behind_the_other_take_no_more_memory(broker: RunningBroker) -> None:
    """However many come while each of them is answered at once."""
    requests = 20_000
    most = 0
    with Raw(broker) as raw:
        sender = threading.Thread(target=lambda: raw.send(GET * requests))
        sender.start()
        for _ in range(requests):
            assert raw.response()[0] == 200
            if not _ % 100:
                sizes = broker.call(lambda: [one._reader.size + len(one._early) for one in connections(broker)])
                most = max(most, *sizes)
        sender.join()
    assert most <= http_server.MAX_BODY_BYTES * 2


def test_what_comes_while_a_request_is_answered_stays_with_the_peer(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, held = broker.broker._http, list[Any]()
    handler = server.handler
    monkeypatch.setattr(server, "handler", lambda request, reply: held.append((request, reply)))
    requests, padded = 3000, GET[:-2] + b"X: " + b"x" * 8000 + b"\r\n\r\n"
    with Raw(broker) as raw:
        sender = threading.Thread(target=lambda: raw.send(padded * requests))
        sender.start()
        wait_for(lambda: any(one.transport.paused for one in broker.call(lambda: connections(broker))), "it waits")
        one = next(one for one in broker.call(lambda: connections(broker)) if one.transport.paused)
        assert one._reader.size + len(one._early) <= http_server.MAX_BODY_BYTES * 2
        assert sender.is_alive(), "the peer cannot send everything"
        monkeypatch.setattr(server, "handler", handler)
        (request, reply), *others = held
        assert not others
        broker.call(lambda: handler(request, reply))
        assert all(raw.response()[0] == 200 for _ in range(requests))
        sender.join()


def test_answers_that_the_peer_does_not_take_are_not_made(broker: RunningBroker) -> None:
    broker.create("wide", partitions=300)
    ask = b"GET /v1/topics/wide HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with Raw(broker) as raw:
        raw.send(ask * 200)
        wait_for(lambda: any(one.transport.backlog for one in broker.call(lambda: connections(broker))), "it is full")
        size = len(json.dumps(broker.http("GET", "/v1/topics/wide")[1]))
        for _ in range(50):
            backlogs = broker.call(lambda: [one.transport.backlog for one in connections(broker)])
            assert max(backlogs) < 2 * size
        assert all(raw.response()[0] == 200 for _ in range(200))
