"""HTTP/1.1 on the loop, by h11: small requests, small JSON answers, on a TCP port and on a unix socket.

h11 is imported with the first connection. Limits: head 16 KiB (h11's own), body 64 KiB, one request at a time for a
connection, 75 s idle, 256 connections.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from edgebroker.network.connection import ReceiveBuffer
from edgebroker.network.loop import Loop
from edgebroker.network.transport import Transport

if TYPE_CHECKING:
    import h11

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 10
MAX_CONNECTIONS = 256
IDLE_SECONDS = 75.0
SWEEP_SECONDS = 5.0


class Request(NamedTuple):
    method: str
    path: str
    body: bytes


class Response(NamedTuple):
    status: int
    body: object


Reply = Callable[[Response], None]
Handler = Callable[[Request, Reply], None]


class HttpServer:
    """Hands requests to one handler, which replies now or later, exactly once."""

    def __init__(self, loop: Loop, handler: Handler, on_request: Callable[[], None]) -> None:
        self.loop, self.handler, self.on_request = loop, handler, on_request
        self.buffer: ReceiveBuffer | None = None
        self.connections: dict[HttpConnection, None] = {}
        loop.call_later(SWEEP_SECONDS, self._sweep)

    def accept(self, sock: socket.socket, peer: str) -> None:
        if len(self.connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        if self.buffer is None:
            self.buffer = ReceiveBuffer(MAX_BODY_BYTES)
        self.connections[HttpConnection(self, sock, peer)] = None

    def close(self) -> None:
        for connection in list(self.connections):
            connection.transport.close("the node is stopping")

    def _sweep(self) -> None:
        self.loop.call_later(SWEEP_SECONDS, self._sweep)
        for connection in list(self.connections):
            if self.loop.now() - connection.transport.last_received > IDLE_SECONDS:
                connection.transport.close("idle")


class HttpConnection:
    """One connection: feeds h11, answers, closes when either side wants to."""

    def __init__(self, server: HttpServer, sock: socket.socket, peer: str) -> None:
        import h11

        assert server.buffer is not None
        self._server, self._h11 = server, h11
        self._protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=16 << 10)
        self._request: h11.Request | None = None
        self._body = bytearray()
        self.transport = Transport(server.loop, sock, server.buffer, self, peer)

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        self._protocol.receive_data(bytes(buffer.room[:received]))
        self._advance()

    def on_drained(self) -> None:
        pass

    def on_closed(self, reason: str) -> None:
        self._server.connections.pop(self, None)

    def _advance(self) -> None:
        h11 = self._h11
        while not self.transport.closed:
            try:
                event = self._protocol.next_event()
            except h11.RemoteProtocolError as error:
                self._reply(Response(error.error_status_hint, {"error": str(error)}), close=True)
                return
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Request):
                self._request, self._body = event, bytearray()
            elif isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > MAX_BODY_BYTES:
                    self._reply(Response(413, {"error": f"a body may take {MAX_BODY_BYTES} bytes"}), close=True)
                    return
            elif isinstance(event, h11.EndOfMessage):
                self._dispatch()
            elif isinstance(event, h11.ConnectionClosed):
                self.transport.close("the peer closed the connection")
                return

    def _dispatch(self) -> None:
        assert self._request is not None
        request = Request(self._request.method.decode(), self._request.target.decode("latin-1"), bytes(self._body))
        self._server.on_request()
        try:
            self._server.handler(request, self._reply)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            self._reply(Response(500, {"error": "an internal error; see the log of the node"}))

    def _reply(self, response: Response, close: bool = False) -> None:
        if self.transport.closed:
            return
        h11 = self._h11
        if isinstance(response.body, str):
            body, kind = response.body.encode(), "text/plain; charset=utf-8"
        else:
            body, kind = json.dumps(response.body).encode() + b"\n", "application/json"
        headers = [("content-type", kind), ("content-length", str(len(body)))]
        if close:
            headers.append(("connection", "close"))
        try:
            data = self._protocol.send(h11.Response(status_code=response.status, headers=headers)) or b""
            head_only = self._request is not None and self._request.method == b"HEAD"
            if not head_only:
                data += self._protocol.send(h11.Data(data=body)) or b""
            data += self._protocol.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError as error:
            self.transport.close(str(error))
            return
        self.transport.send(data)
        if self._protocol.our_state is h11.MUST_CLOSE or close:
            self.transport.close_when_drained("answered")
            return
        if self._protocol.our_state is h11.DONE and self._protocol.their_state is h11.DONE:
            self._protocol.start_next_cycle()
            self._request = None
            self._server.loop.call_soon_threadsafe(self._advance)
