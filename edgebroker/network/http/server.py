"""HTTP/1.1 on the loop: small requests, small JSON answers, on a TCP port and on a unix socket.

The reader of requests is imported with the first connection. Limits: head 16 KiB, body 64 KiB (or as said for a path);
10 s for a head, 30 s and a second for each 64 KiB for a body, 75 s idle; 256 connections besides those that are being
streamed to, 64 of them from one address off the machine, and 64 more by the unix socket. The requests of a connection
are handled one after the other, each in its turn; what a peer sends before it has taken their answers waits: up to
80 KiB here, the rest with the peer. A streamed answer goes on for as long as its source has something to say; each
piece is a chunk, and may be stored bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from edgebroker.network.io.channel import Channel
from edgebroker.network.io.listener import UNIX, host_of
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.receiving import Receiving
from edgebroker.network.io.transport import FileRange, Transport
from edgebroker.network.wire.connection import ReceiveBuffer

if TYPE_CHECKING:
    from edgebroker.network.http.request_reader import ParsedRequest

log = logging.getLogger(__name__)

MAX_BODY_BYTES, MAX_EARLY_BYTES = 64 << 10, 16 << 10
TEXT_TYPE, BYTES_TYPE = "text/plain; charset=utf-8", "application/octet-stream"
MAX_CONNECTIONS, MAX_SOCKET_CONNECTIONS, MAX_OF_AN_ADDRESS = 256, 64, 64
# A request has to be complete so soon after its first byte; a body by more for every 64 KiB that it may have.
HEAD_SECONDS, BODY_SECONDS = 10.0, 30.0
IDLE_SECONDS = 75.0
SWEEP_SECONDS = 5.0
STUCK_SECONDS = 60.0
PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Request(NamedTuple):
    """`target` is the path with the query. Of the headers those that matter, "" when they were not sent: `fetch_site`
    is Sec-Fetch-Site, `last_event_id` Last-Event-ID, `token` that of Authorization: Bearer. `peer` is the address from
    which it came, without the port; "unix" for the unix socket. `identity`: who the peer is, as far as its connection
    says."""

    method: str
    target: str
    body: bytes
    content_type: str = ""
    host: str = ""
    origin: str = ""
    fetch_site: str = ""
    last_event_id: str = ""
    peer: str = ""
    identity: str = ""
    token: str = ""


class Failed(msgspec.Struct, omit_defaults=True):
    """Every answer that is an error: what is wrong and what to do, and a code for programs (common/outcome.py)."""

    error: str
    code: str = ""


class Response(NamedTuple):
    """`body`: a text, bytes, a Streamed, or a struct that becomes JSON. `content_type` of anything but a struct: "" is
    TEXT_TYPE of a text, else BYTES_TYPE."""

    status: int
    body: object
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = ""


class BodyWriter:
    """Where a streamed body goes. What the peer does not take yet waits: look at `backlog` first. The head of the
    answer goes out in one packet with what comes first."""

    def __init__(self, connection: HttpConnection, head: bytes) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._head = head

    @property
    def backlog(self) -> int:
        return self._transport.backlog

    @property
    def bytes_out(self) -> int:
        return self._transport.bytes_out

    @property
    def bytes_through(self) -> int:
        """What the peer's kernel has acknowledged."""
        return self._transport.bytes_out - self._transport.unacknowledged

    def hold_back(self, unsent: int) -> None:
        self._transport.hold_back(unsent)

    @property
    def closed(self) -> bool:
        return self._transport.closed

    @property
    def peer(self) -> str:
        return self._transport.peer

    def begun(self) -> None:
        """What comes first was sent, or is still to come: the head goes without it then."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.send(head)

    def send(self, data: bytes) -> None:
        head, self._head = self._head, b""
        self._transport.send(b"%b%x\r\n%b\r\n" % (head, len(data), data))

    def send_data(self, head: bytes, data: memoryview) -> None:
        """One piece of a head and bytes in memory."""
        self.begun()
        self._transport.send_parts((b"%x\r\n%b" % (len(head) + len(data), head), data, b"\r\n"))

    def send_file(self, head: bytes, extent: FileRange) -> None:
        """One piece of a head and stored bytes, which go from the file to the socket."""
        self.begun()
        self._transport.send_file(b"%x\r\n%b" % (len(head) + extent.length, head), extent)
        self._transport.send(b"\r\n")

    def supply(self, extent: FileRange, data: memoryview | None, error: str) -> None:
        """Bytes of an extent that were not in the page cache, or why they cannot be had."""
        self._transport.supply(extent, data, error)

    def end(self) -> None:
        """The answer is complete; the connection takes the next request."""
        self.begun()
        self._connection.end_stream()

    def cut(self, reason: str) -> None:
        self._transport.close(reason)


class Streamed(Protocol):
    """A body that is sent piece by piece."""

    def begin(self, out: BodyWriter) -> None: ...
    def on_drained(self) -> None:
        """The peer has taken everything so far."""

    def on_alive(self) -> None:
        """The peer sent an empty line: it is there."""

    def on_closed(self, reason: str) -> None:
        """The connection is over before end()."""


Reply = Callable[[Response], None]
Handler = Callable[[Request, Reply], None]


BodyLimit = Callable[[str, str], int]
"""How long the body of a request may be, from its method and target."""


class HttpServer:
    """Hands requests to one handler, which replies now or later, exactly once. `encode` makes body and content type of
    what is not streamed."""

    def __init__(
        self,
        loop: Loop,
        receiving: Receiving,
        handler: Handler,
        on_request: Callable[[], None],
        body_limit: BodyLimit = lambda method, target: MAX_BODY_BYTES,
        encode: Callable[[Response], tuple[bytes, str]] | None = None,
    ) -> None:
        self.encode = encode or encoded
        self.loop, self.receiving = loop, receiving
        self.handler, self.on_request, self.body_limit = handler, on_request, body_limit
        self.buffer: ReceiveBuffer | None = None
        self.connections: dict[HttpConnection, None] = {}
        loop.call_later(SWEEP_SECONDS, self._sweep)

    def accept(self, channel: Channel, peer: str) -> None:
        if len(self.connections) >= MAX_OF_AN_ADDRESS and self._is_full(host_of(peer)):
            channel.close()
            return
        if self.buffer is None:
            self.buffer = self.receiving.buffer(MAX_BODY_BYTES)
        self.connections[HttpConnection(self, channel, peer)] = None

    def _is_full(self, host: str) -> bool:
        """Have others taken what this one may have? The unix socket has places of its own."""
        hosts = [host_of(one.transport.peer) for one in self.connections if one.stream is None]
        of_socket = hosts.count(UNIX)
        if host == UNIX:
            return of_socket >= MAX_SOCKET_CONNECTIONS
        local = host == "::1" or host.startswith("127.")
        return len(hosts) - of_socket >= MAX_CONNECTIONS or (not local and hosts.count(host) >= MAX_OF_AN_ADDRESS)

    def shut_out(self, whose: Callable[[str], bool]) -> None:
        """Cut the connections of peers with these identities."""
        for connection in list(self.connections):
            if whose(connection.transport.identity):
                connection.transport.close("it is not let in any more")

    def close(self) -> None:
        for connection in list(self.connections):
            connection.transport.close("the node is stopping")

    def _sweep(self) -> None:
        self.loop.call_later(SWEEP_SECONDS, self._sweep)
        for connection in list(self.connections):
            transport, now = connection.transport, self.loop.now()
            if connection.stream is None and now - transport.last_received > IDLE_SECONDS:
                transport.close("idle")
            elif transport.backlog and now - transport.last_progress > STUCK_SECONDS:
                transport.close("send stalled: the peer is not reading")


class HttpConnection:
    """One connection: reads requests, answers them, closes when either side wants to."""

    def __init__(self, server: HttpServer, channel: Channel, peer: str) -> None:
        from edgebroker.network.http.request_reader import BadRequestError, RequestReader

        assert server.buffer is not None
        self._server, self._bad = server, BadRequestError
        self._reader = RequestReader(server.body_limit)
        self._request: ParsedRequest | None = None
        # A request is answered before what follows it is read; that waits here.
        self._reading, self._answering = True, False
        self._early = bytearray()
        self.stream: Streamed | None = None
        # In what of a request bytes were last counted: in its body, or in its head.
        self._stage: bool | None = None
        self.transport = Transport(server.loop, channel, server.buffer, self, peer)

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        data = bytes(buffer.room[:received])
        if self.stream is not None and not data.strip(b"\r\n"):
            self.stream.on_alive()
            return
        if self._reading:
            self._reader.feed(data)
            self._advance()
            self._count_bytes()
            return
        self._early += data
        self._count_bytes()
        if len(self._early) > MAX_EARLY_BYTES:
            if self.stream is not None:
                self.transport.close("the peer sends more while it is being answered")
            else:
                self.transport.pause()

    def _count_bytes(self) -> None:
        """Say how many bytes wait here, and for whom."""
        if self.transport.closed:
            return
        receiving, reader = self._server.receiving, self._reader
        size = len(self._early) + reader.size
        if not self._reading and size:
            receiving.waits(self.transport, size)
        elif size or reader.in_body:
            seconds = BODY_SECONDS + reader.limit / MAX_BODY_BYTES if reader.in_body else HEAD_SECONDS
            receiving.unfinished(self.transport, size, seconds, begun=reader.in_body is not self._stage)
            self._stage = reader.in_body
            return
        else:
            receiving.handled(self.transport)
        self._stage = None

    def on_drained(self) -> None:
        if self.stream is not None:
            self.stream.on_drained()
        else:
            self._read_on()

    def on_closed(self, reason: str) -> None:
        self._server.connections.pop(self, None)
        self._server.receiving.handled(self.transport)
        self._reader.end()
        self._early = bytearray()
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.on_closed(reason)

    def end_stream(self) -> None:
        self.stream = None
        if not self.transport.closed:
            self.transport.send(b"0\r\n\r\n")
            self._answered()

    def _read_on(self) -> None:
        """Read what came meanwhile, once the request is answered and the peer has taken the answer."""
        transport = self.transport
        if self._reading or self._answering or transport.backlog or transport.closed:
            return
        self._reading = True
        self._advance()
        self._count_bytes()

    def _advance(self) -> None:
        """Read up to the end of one request, if it is there."""
        try:
            request = self._reader.next()
            if request is None and self._early:
                # Not before: what is read here does not grow, however many requests come one behind the other.
                early, self._early = bytes(self._early), bytearray()
                self._reader.feed(early)
                self.transport.resume()
                request = self._reader.next()
        except self._bad as error:
            self._reading = False
            self._reply(Response(error.status, Failed(str(error))), close=True)
            return
        if request is not None:
            self._reading, self._answering, self._request = False, True, request
            self._dispatch(request)

    def _dispatch(self, parsed: ParsedRequest) -> None:
        kind, host, origin, site, last, who_asks = (
            parsed.headers.get(name, b"").decode("latin-1") for name in _OF_INTEREST
        )
        peer = host_of(self.transport.peer)
        scheme, _, token = who_asks.partition(" ")
        request = Request(
            parsed.method,
            parsed.target,
            parsed.body,
            kind,
            host,
            origin,
            site,
            last,
            peer,
            self.transport.identity,
            token.strip() if scheme.lower() == "bearer" else "",
        )
        self._server.on_request()
        try:
            self._server.handler(request, self._reply)
        except Exception:
            log.exception("%s %s failed", request.method, request.target)
            if not self._answering or self.stream is not None:
                self.transport.close("failed after it was answered")
                return
            self._reply(Response(500, Failed("an internal error; see the log of the node")))

    def _reply(self, response: Response, close: bool = False) -> None:
        if self.transport.closed:
            return
        if hasattr(response.body, "begin"):
            self._stream(response)
            return
        try:
            body, kind = self._server.encode(response)
        except Exception:
            log.exception("an answer of status %d cannot be sent", response.status)
            response = Response(500, Failed("an internal error; see the log of the node"))
            body, kind = self._server.encode(response)
        request = self._request
        close = close or request is None or not request.keeps
        more = (("connection", "close"),) if close else ()
        headers = (("content-type", kind), ("content-length", str(len(body))), *response.headers, *more)
        data = _head(response.status, headers)
        self.transport.send(data if request is not None and request.method == "HEAD" else data + body)
        self._answered(close)

    def _stream(self, response: Response) -> None:
        request = self._request
        assert request is not None
        if request.method == "HEAD":
            self._reply(Response(response.status, b"", response.headers, response.content_type), close=True)
            return
        if request.version != "1.1":
            self._reply(Response(505, Failed("a streamed answer needs HTTP/1.1")), close=True)
            return
        headers = (
            ("content-type", response.content_type or BYTES_TYPE),
            ("transfer-encoding", "chunked"),
            ("x-accel-buffering", "no"),  # nginx would keep the end of a burst back
            *response.headers,
            *((("connection", "close"),) if not request.keeps else ()),
        )
        stream: Streamed = response.body  # type: ignore[assignment]
        self.stream = stream
        out = BodyWriter(self, _head(response.status, headers))
        stream.begin(out)
        out.begun()

    def _answered(self, close: bool = False) -> None:
        request, self._request, self._answering = self._request, None, False
        if close or request is None or not request.keeps:
            self.transport.close_when_drained("answered")
        else:
            self._server.loop.call_in_turn(self._read_on)


_OF_INTEREST = (b"content-type", b"host", b"origin", b"sec-fetch-site", b"last-event-id", b"authorization")


def encoded(response: Response) -> tuple[bytes, str]:
    """The bytes of a body that is not streamed, and their content type."""
    if isinstance(response.body, str):
        return response.body.encode(), response.content_type or TEXT_TYPE
    if isinstance(response.body, bytes):
        return response.body, response.content_type or BYTES_TYPE
    return msgspec.json.encode(response.body) + b"\n", "application/json"


def _head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} {PHRASES.get(status, '')}\r\n{lines}\r\n".encode("latin-1")
