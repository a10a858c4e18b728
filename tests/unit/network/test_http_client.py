"""The HTTP client of the pipe: chunks of any cut, what is no chunk, answers that come when nobody waits any more."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from edgebroker.common.errors import RemoteProtocolError
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.network.http import client as httpclient
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.client import ChunkReader
from edgebroker.network.http.peers import Peers
from edgebroker.network.http.server import HttpServer, Response
from edgebroker.network.io.listener import Listener, listen, plainly
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.receiving import Receiving
from edgebroker.network.wire.connection import ReceiveBuffer

CHUNKED = b"5\r\nhello\r\n1;name=value\r\n \r\n0A\r\n0123456789\r\n0\r\ntrailer: x\r\n\r\n"


@pytest.fixture
def loop() -> Iterator[Loop]:
    found = Loop(SystemClock())
    yield found
    found.close()


def turn_until(loop: Loop, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        loop.turn(0.01)


class Owner:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.body = b""

    def on_connected(self) -> None:
        self.log.append("connected")

    def on_response(self, status: int, retry_after: float) -> None:
        self.log.append(f"{status} {retry_after:g}")

    def on_body(self, data: memoryview) -> None:
        self.body += data

    def on_complete(self) -> None:
        self.log.append("complete")

    def on_lost(self, reason: str) -> None:
        self.log.append(f"lost: {reason}")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_may_be_cut_anywhere(size: int) -> None:
    found, reader = bytearray(), ChunkReader()
    for position in range(0, len(CHUNKED), size):
        assert not reader.done
        reader.feed(memoryview(CHUNKED[position : position + size]), found.extend)
    assert (bytes(found), reader.done) == (b"hello 0123456789", True)


@pytest.mark.parametrize("data", [b"-5\r\nabc", b"+5\r\n", b"0x5\r\n", b"1_0\r\n", b"\r\n", b"5 5\r\n", b"5\r\nhelloX\r\n", b"f" * 300])  # fmt: skip  # noqa: E501
def test_what_is_no_chunk(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ChunkReader().feed(memoryview(data), lambda piece: None)


def serve(*answers: bytes) -> tuple[int, list[bytes]]:
    """A server that gives each request of one connection the next answer, and then closes it."""
    listener, asked = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def run() -> None:
        peer, _ = listener.accept()
        for answer in answers:
            asked.append(peer.recv(1 << 16))
            for position in range(0, len(answer), 5):
                peer.sendall(answer[position : position + 5])
        peer.close()
        listener.close()

    threading.Thread(target=run, daemon=True).start()
    return listener.getsockname()[1], asked


def test_requests_on_one_connection(loop: Loop) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    busy = b"HTTP/1.1 503 Busy\r\nretry-after: 7\r\ncontent-length: 4\r\n\r\nbusy"
    port, asked = serve(head + CHUNKED, busy, head + CHUNKED)
    owner = Owner()
    client = Peers(loop, open=True).client(owner)
    client.open(f"127.0.0.1:{port}")
    for number in range(3):
        turn_until(loop, lambda number=number: owner.log.count("complete") == number and "connected" in owner.log)  # type: ignore[misc]
        client.request("POST", "/x", b"body")
    turn_until(loop, lambda: any(line.startswith("lost") for line in owner.log))
    assert owner.log[:-1] == ["connected", "200 0", "complete", "503 7", "complete", "200 0", "complete"]
    assert owner.body == b"hello 0123456789busyhello 0123456789"
    assert all(request.startswith(b"POST /x HTTP/1.1\r\n") and request.endswith(b"body") for request in asked)
    client.stop()
    assert len([line for line in owner.log if line.startswith("lost")]) == 1


def test_a_connection_that_ends_within_a_chunk(loop: Loop) -> None:
    port, _ = serve(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\nhal")
    owner = Owner()
    client = Peers(loop, open=True).client(owner)
    client.open(f"127.0.0.1:{port}")
    turn_until(loop, lambda: owner.log)
    client.request("GET", "/", b"")
    turn_until(loop, lambda: len(owner.log) == 3)
    assert (owner.body, owner.log[-1]) == (b"hal", "lost: the peer closed the connection")


def test_nobody_there(loop: Loop) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    owner = Owner()
    client = Peers(loop, open=True).client(owner)
    client.open(f"127.0.0.1:{port}")
    turn_until(loop, lambda: owner.log)
    assert owner.log == ["lost: Connection refused"]


def test_the_next_address_of_a_name(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name stands for several addresses, and not everybody listens at the first one."""
    port, asked = serve(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    addresses = ["::1", "255.255.255.255", "127.0.0.1"]  # refused later, refused at once, served

    def found(*arguments: object, **named: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    owner = Owner()
    client = Peers(loop, open=True).client(owner)
    client.open(f"hub.example:{port}")
    turn_until(loop, lambda: owner.log)
    assert owner.log == ["connected"]
    client.request("GET", "/", b"")
    turn_until(loop, lambda: "complete" in owner.log)
    assert b"hub.example" in asked[0]
    client.stop()
    addresses = ["::1", "255.255.255.255"]
    owner = Owner()
    client = Peers(loop, open=True).client(owner)
    client.open(f"hub.example:{port}")
    turn_until(loop, lambda: owner.log)
    assert len(owner.log) == 1 and owner.log[0].startswith("lost: ")
    client.stop()


def test_a_name_that_is_found_too_late(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt is over; what comes of it afterwards is nobody's connection."""
    monkeypatch.setattr(httpclient, "CONNECT_SECONDS", 0.05)
    listener = socket.create_server(("127.0.0.1", 0))
    port, advance, real = listener.getsockname()[1], threading.Event(), socket.getaddrinfo

    def late(*rest: object, **options: object) -> object:
        advance.wait(10.0)
        return real("127.0.0.1", port, type=socket.SOCK_STREAM)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    owner = Owner()
    client = Peers(loop, open=True).client(owner)
    client.open(f"slow.example:{port}")
    turn_until(loop, lambda: owner.log)
    client.open(f"slow.example:{port}")
    advance.set()
    turn_until(loop, lambda: "connected" in owner.log)
    for _ in range(20):
        loop.turn(0.01)
    assert owner.log == ["lost: the name is not found in time", "connected"]
    client.stop()
    listener.close()


def test_questions_leave_nothing_behind(loop: Loop) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    told: list[int] = []
    before = threading.active_count()
    for number in range(5):
        HttpCall(
            Peers(loop, open=True),
            f"localhost:{port}",
            "GET",
            "/healthz",
            b"",
            lambda status, body, error: told.append(status),
        )
        turn_until(loop, lambda number=number: len(told) > number)  # type: ignore[misc]
    assert told == [0] * 5
    assert threading.active_count() <= before + 1


def test_a_finished_request_holds_no_buffer_until_the_collector_comes(loop: Loop) -> None:
    """A node lets the collector come rarely: 64 KiB for each request of a day would be a leak to whoever watches it."""
    server = HttpServer(loop, Receiving(loop, 1 << 20), lambda request, reply: reply(Response(200, {})), lambda: None)
    sock = listen("127.0.0.1", 0)
    listener = Listener(loop, sock, plainly(server.accept), lambda: None)
    address = f"127.0.0.1:{sock.getsockname()[1]}"

    def buffers() -> int:
        return sum(type(one) is ReceiveBuffer for one in gc.get_objects())

    def ask() -> None:
        told: list[int] = []
        HttpCall(Peers(loop, open=True), address, "GET", "/", b"", lambda status, body, error: told.append(status))
        turn_until(loop, lambda: told == [200])

    gc.collect()
    gc.disable()
    try:
        ask()
        before = buffers()
        for _ in range(3):
            ask()
        assert buffers() == before
    finally:
        gc.enable()
        listener.close()
        server.close()
