"""What the admin interface does not let in: requests of pages, of other names, without an end, and of too many."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.network.http import server as http_server
from edgebroker.network.http.router import BY_ANY_NAME
from tests.integration.test_http import GET, Raw, connections
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for

BODY = b'{"name": "made-by-a-page"}'
OWN = "127.0.0.1:7421"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    settings = {"node.name": "hub-7", "listen.names": "edge.example, Other.Example", "pipe.address": "lan.example:7421"}
    with running(tmp_path_factory.mktemp("front") / "data", settings) as found:
        yield found


def answered(broker: RunningBroker, line: str, *headers: str, body: bytes = b"", pipe: bool = False) -> tuple[int, str]:
    """The status, and the error that is answered."""
    head = "".join(f"{text}\r\n" for text in (f"{line} HTTP/1.1", *headers, f"Content-Length: {len(body)}", ""))
    with Raw(broker, pipe=pipe) as raw:
        raw.send(head.encode("latin-1") + body)
        status, _, answer = raw.response()
    assert isinstance(answer, dict)
    return status, answer.get("error", "")


@pytest.mark.parametrize(
    "name",
    [OWN, "localhost:9", "LOCALHOST", "10.1.2.3:7421", "[::1]:7421", "[fe80::1]", "hub-7:7421", "HUB-7",
     "edge.example:80", "other.example", "lan.example:7421", socket.gethostname()],
)  # fmt: skip
def test_names_by_which_a_node_may_be_called(broker: RunningBroker, name: str) -> None:
    assert answered(broker, "GET /v1/node", f"Host: {name}")[0] == 200


@pytest.mark.parametrize("name", ["evil.example:7421", "127.0.0.1.evil.example", "hub-7.evil.example", "0x7f.1"])
def test_a_page_that_was_bound_to_this_address_afterwards(broker: RunningBroker, name: str) -> None:
    status, error = answered(broker, "GET /v1/node", f"Host: {name}")
    assert status == 403
    assert error == (
        f"{name} is not a name of this node; use its address, or add the name to listen.names in its configuration"
    )
    # Nodes and monitoring have names of theirs for it; a page says Origin with every POST.
    assert answered(broker, "GET /healthz", f"Host: {name}")[0] == 200
    for path in ("/v1/pipe", "/v1/registry", "/v1/registry/copy", "/v1/promoted", "/v1/tree/reports"):
        headers = (f"Host: {name}", f"Origin: http://{name}", "Content-Type: application/json")
        assert answered(broker, f"POST {path}", *headers, body=b"{}", pipe=True) == (
            403,
            f"this is for nodes and programs, not for pages (origin: http://{name})",
        )


def test_no_get_is_open_to_any_name_but_health_and_metrics(broker: RunningBroker) -> None:
    router = broker.broker._http.handler.__self__  # type: ignore[attr-defined]
    found = [route for places in router._places.values() for place in places for route in place.routes.values()]
    open_to_all = {route.path for route in found if route.method == "GET" and route.right in BY_ANY_NAME}
    assert open_to_all == {"/healthz", "/readyz", "/metrics"}


@pytest.mark.parametrize(
    "header",
    ["Origin: http://evil.example", "Origin: null", "Origin: http://127.0.0.1:80", "Origin: http://localhost:7421",
     "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site"],
)  # fmt: skip
def test_a_page_of_another_site(broker: RunningBroker, header: str) -> None:
    headers = (f"Host: {OWN}", header, "Content-Type: application/json")
    for line in ("POST /v1/topics", "GET /v1/node", "DELETE /v1/topics/t", "POST /v1/promote", "GET /healthz"):
        status, error = answered(broker, line, *headers, body=BODY if line.startswith("POST") else b"")
        assert (status, error.startswith("a page of another site made this request (")) == (403, True), line
    assert broker.http("GET", "/v1/topics")[1]["topics"] == []


def test_a_page_of_its_own(broker: RunningBroker) -> None:
    for header in (f"Origin: http://{OWN}", "Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: none"):
        assert answered(broker, "GET /v1/node", f"Host: {OWN}", header)[0] == 200


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("Content-Type: text/plain", ", not text/plain"),
        ("Content-Type: application/x-www-form-urlencoded", ", not application/x-www-form-urlencoded"),
        ("X-Nothing: said", "; nothing says so"),
    ],
)
def test_bodies_that_any_page_may_send(broker: RunningBroker, header: str, said: str) -> None:
    for line in ("POST /v1/topics", "POST /v1/topics/t/accept", "PATCH /v1/topics/t", "POST /v1/pipe"):
        status, error = answered(broker, line, f"Host: {OWN}", header, body=BODY, pipe=line.endswith("pipe"))
        assert (status, error) == (415, f"the body must be JSON (content-type: application/json){said}"), line
    assert broker.http("GET", "/v1/topics")[1]["topics"] == []


def test_a_body_of_two_lengths(broker: RunningBroker) -> None:
    with Raw(broker) as raw:
        raw.send(
            b"POST /v1/topics HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 6\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/node HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        status, _, answer = raw.response()
        assert (status, answer["error"]) == (
            400,
            "this is not an HTTP/1.1 request: Transfer-Encoding can't be present with Content-Length",
        )
        assert raw.ended()


def test_a_request_that_does_not_come_to_its_end(broker: RunningBroker) -> None:
    body = b"POST /v1/topics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    with Raw(broker) as idle, Raw(broker) as head, Raw(broker) as long:
        idle.send(GET)
        assert idle.response()[0] == 200
        head.send(b"GET /hea")
        long.send(body)
        wait_for(lambda: len(broker.call(lambda: broker.broker.sessions.receiving._unfinished)) == 2, "they have begun")
        for _ in range(3):
            head.send(b"l")
            long.send(b" ")
            broker.advance(http_server.HEAD_SECONDS / 3 + 1)
        assert head.ended(), "bytes now and then do not keep it"
        long.send(b" ")
        broker.advance(http_server.BODY_SECONDS)
        assert long.ended()
        idle.send(GET)
        assert idle.response()[0] == 200


def test_places_are_kept_for_the_unix_socket_and_for_others(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(http_server, "MAX_SOCKET_CONNECTIONS", 4)
    monkeypatch.setattr(http_server, "MAX_OF_AN_ADDRESS", 2)
    wait_for(lambda: not broker.call(lambda: connections(broker)), "the others have gone")
    path = Path(broker.config.node.data_dir) / "ctl.sock"
    taken = [Raw(broker) for _ in range(8)]
    try:
        for one in taken:
            one.send(b"GET /")
        wait_for(lambda: len(broker.call(lambda: connections(broker))) == 8, "all are taken")
        with Raw(broker) as other:
            assert other.ended()
        assert call(f"unix:{path}", "GET", "/healthz") == {"status": "ok"}
        by_socket = [Raw(broker, path) for _ in range(4)]
        taken += by_socket
        wait_for(lambda: len(broker.call(lambda: connections(broker))) == 12, "those of the socket are taken")
        with Raw(broker, path) as other:
            assert other.ended()
        server = broker.broker._http
        assert broker.call(lambda: server._is_full("127.0.0.1"))
    finally:
        for one in taken:
            one.__exit__()
    wait_for(lambda: not broker.call(lambda: connections(broker)), "they have gone")
    assert broker.http("GET", "/healthz")[0] == 200


def test_one_address_off_the_machine_does_not_take_the_places_of_all(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_OF_AN_ADDRESS", 2)
    taken = [Raw(broker) for _ in range(3)]
    try:
        for one in taken:
            one.send(b"GET /")
        wait_for(lambda: len(broker.call(lambda: connections(broker))) == 3, "they are taken")

        def of(peer: str) -> bool:
            for one in connections(broker):
                one.transport.peer = peer
            return broker.broker._http._is_full("10.0.0.9")

        assert broker.call(lambda: of("10.0.0.9:5000"))
        assert not broker.call(lambda: of("10.0.0.8:5000"))
        assert not broker.call(lambda: of("127.0.0.1:5000"))
    finally:
        for one in taken:
            one.__exit__()
