"""An HTTP/1.1 client on the loop, for talking to another node: one connection, one request at a time.

httptools reads the heads. A body is handed on piece by piece as it arrives, without a copy, and a chunked one is taken
apart here: it may be gigabytes of a log. Names are looked up by a thread of their own: a resolver may take its time.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable
from typing import Protocol

import httptools

from edgebroker.common.config import is_address
from edgebroker.common.errors import RemoteProtocolError
from edgebroker.common.runtime.threads import Worker
from edgebroker.network.io.channel import Channel
from edgebroker.network.io.loop import WRITE, Loop, TimerHandle
from edgebroker.network.io.transport import Transport
from edgebroker.network.wire.connection import ReceiveBuffer

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
RECEIVE_BYTES = 1 << 20
MAX_LINE_BYTES, MAX_HEAD_BYTES = 200, 16 << 10
_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})(?:[ \t]*;.*)?\Z")


Begin = Callable[[socket.socket, str, Callable[[Channel | None, str], None]], Callable[[str], None] | None]
"""Makes the channel of a connection to a host (an IP address): calls back with it, or with why there is none. Returns
what gives it up meanwhile; None when it is done."""


class HttpOwner(Protocol):
    """Who is told, on the loop. Methods may raise ProtocolError: the connection is closed then."""

    def on_connected(self) -> None: ...
    def on_response(self, status: int, retry_after: float) -> None:
        """A head came; `retry_after` in seconds, 0 when nothing is said about it."""

    def on_body(self, data: memoryview) -> None:
        """The next piece of the body; valid until it returns."""

    def on_complete(self) -> None:
        """The answer is over; the connection takes another request."""

    def on_lost(self, reason: str) -> None:
        """There is no connection (any more); called once for every open()."""


class ResponseHead:
    """The head of an answer, with the empty line at its end. Raises RemoteProtocolError."""

    def __init__(self, data: bytes) -> None:
        self.headers: dict[bytes, bytes] = {}
        parser = httptools.HttpResponseParser(self)
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise RemoteProtocolError("it changes the protocol, which it was not asked to") from None
        except httptools.HttpParserError as error:
            raise RemoteProtocolError(str(error)) from None
        self.status: int = parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    @property
    def chunked(self) -> bool:
        return self.headers.get(b"transfer-encoding", b"").lower() == b"chunked"

    @property
    def length(self) -> int:
        """Of the body; -1: as long as the connection stands."""
        if self.status in (204, 304):
            return 0
        return int(self.headers.get(b"content-length", b"-1"))

    @property
    def retry_after(self) -> float:
        value = self.headers.get(b"retry-after", b"")
        return float(value) if value.isdigit() else 0.0


class ChunkReader:
    """Takes a chunked body apart. `done` once the last chunk came."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._left = 0
        self._ending = self._last = False
        self.done = False

    def feed(self, data: memoryview, take: Callable[[memoryview], None]) -> None:
        """Hand on what is payload. Raises RemoteProtocolError for what is not a chunked body."""
        while len(data) and not self.done:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                self._left -= len(piece)
                self._ending = not self._left
                take(piece)
                continue
            end = bytes(data[: MAX_LINE_BYTES + 2]).find(b"\n")
            self._line += data[: end + 1] if end >= 0 else data
            if len(self._line) > MAX_LINE_BYTES:
                raise RemoteProtocolError("the parent sent a chunk without a size")
            if end < 0:
                return
            data = data[end + 1 :]
            line, self._line = bytes(self._line).strip(), bytearray()
            if self._last:
                self.done = not line  # lines before the empty one would be trailers
                continue
            if self._ending:
                self._ending = False  # the line break behind a chunk
                if line:
                    raise RemoteProtocolError("the parent sent a chunk longer than it said")
                continue
            size = _SIZE.match(line)
            if size is None:
                raise RemoteProtocolError("the parent sent a chunk without a size")
            self._left = int(size[1], 16)
            self._last = self._left == 0


class HttpClient:
    """Owned by the loop thread."""

    def __init__(self, loop: Loop, owner: HttpOwner, receive_bytes: int, begin: Begin) -> None:
        self._loop, self._owner = loop, owner
        self._receive_bytes, self._begin = receive_bytes, begin
        self._resolver: Worker | None = None
        self._connecting: socket.socket | None = None
        # Gives up a connection that stands, and whose channel is being made.
        self._give_up: Callable[[str], None] | None = None
        self._transport: Transport | None = None
        self._head, self._left = bytearray(), 0
        self._chunks: ChunkReader | None = None
        self._timer: TimerHandle | None = None
        self._address = self._host = ""
        self._addresses: list[str] = []
        # Of the last answer; and whether there was one on this connection.
        self.content_type = ""
        self._answered = True
        # Grows with every open() and every end: an answer that comes later is not for this request.
        self._attempt = 0
        self._opened = False

    @property
    def transport(self) -> Transport | None:
        """The connection, once there is one."""
        return self._transport

    @property
    def identity(self) -> str:
        """Who the peer is, by its certificate; "" without one, or a connection."""
        return self._transport.identity if self._transport is not None else ""

    def open(self, address: str) -> None:
        """Connect to HOST:PORT; on_connected() or on_lost() follows."""
        self._address = address
        self._attempt += 1
        self._opened = True
        self._timer = self._loop.call_later(CONNECT_SECONDS, lambda: self._end("the name is not found in time"))
        if not is_address(address):
            self._fail(f"{address!r} is not HOST:PORT")
            return
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            self._look_up(host, int(port), self._attempt)
            return
        self._addresses = [host]
        self._connect(int(port))

    def _look_up(self, host: str, port: int, attempt: int) -> None:
        if self._resolver is None:
            self._resolver = Worker("names")

        def work() -> None:
            try:
                found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
                self._loop.call_soon_threadsafe(lambda: self._looked_up(attempt, found, port, ""))
            except (OSError, UnicodeError) as error:
                why = f"{host} cannot be looked up: {getattr(error, 'strerror', None) or error}"
                self._loop.call_soon_threadsafe(lambda: self._looked_up(attempt, [], port, why))

        self._resolver.submit(work)

    def _looked_up(self, attempt: int, addresses: list[str], port: int, error: str) -> None:
        if attempt != self._attempt:
            return  # it is not waited for any more
        if error:
            self._end(error)
        else:
            self._addresses = addresses
            self._connect(port)

    def _connect(self, port: int) -> None:
        """Try the next of the addresses."""
        self._cancel()
        self._timer = self._loop.call_later(
            CONNECT_SECONDS, lambda: self._not_connected("no answer to the attempt to connect", port)
        )
        host = self._host = self._addresses.pop(0)
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        self._connecting = sock
        try:
            sock.connect((host, port))
        except BlockingIOError:
            pass
        except OSError as error:
            self._not_connected(error.strerror or str(error), port)
            return
        self._loop.register(sock.fileno(), WRITE, lambda mask: self._connected(sock, port))

    def _not_connected(self, reason: str, port: int) -> None:
        self._abandon()
        if self._addresses:
            self._connect(port)
        else:
            self._fail(reason)

    def _abandon(self) -> None:
        """Give up the connection that is being made, if there is one."""
        if self._give_up is not None:
            give_up, self._give_up = self._give_up, None
            self._attempt += 1  # what it says then is not for anybody
            give_up("given up")
        if self._connecting is not None:
            sock, self._connecting = self._connecting, None
            try:
                self._loop.unregister(sock.fileno())
            except (KeyError, ValueError):
                pass
            sock.close()

    def _fail(self, reason: str) -> None:
        """End the attempt in the next turn: the owner is never told from within open()."""
        attempt = self._attempt
        self._loop.call_later(0.0, lambda: self._end(reason) if attempt == self._attempt else None)

    def _connected(self, sock: socket.socket, port: int) -> None:
        if sock is not self._connecting:
            return  # given up earlier in this turn
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._not_connected(os.strerror(error), port)
            return
        self._loop.unregister(sock.fileno())
        self._connecting = None
        attempt = self._attempt

        def ready(channel: Channel | None, why: str) -> None:
            if attempt != self._attempt:
                if channel is not None:
                    channel.close()
                return
            self._give_up = None
            if channel is None:
                self._not_connected(why, port)
            else:
                self._begun(channel)

        give_up = self._begin(sock, self._host, ready)
        if self._transport is None and attempt == self._attempt:
            self._give_up = give_up

    def _begun(self, channel: Channel) -> None:
        self._cancel()
        # The buffer goes with the connection: this object and its owner are a circle, which the collector finds late.
        buffer = ReceiveBuffer(self._receive_bytes)
        self._transport = Transport(self._loop, channel, buffer, self, self._address)
        self._answered = False
        self._owner.on_connected()

    def request(self, method: str, path: str, body: bytes) -> None:
        """Send a request; on_response(), on_body() and on_complete() follow, or on_lost()."""
        assert self._transport is not None
        self._head, self._chunks, self._left = bytearray(), None, 0
        kind = "content-type: application/json\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._address}\r\ncontent-length: {len(body)}\r\n{kind}\r\n"
        self._timer = self._loop.call_later(ANSWER_SECONDS, lambda: self._unanswered(0))
        self._transport.send(head.encode("latin-1") + body)

    def say_alive(self) -> None:
        """Send an empty line, of which HTTP makes nothing: a peer that streams its answer learns that we are there."""
        if self._transport is not None:
            self._transport.send(b"\r\n")

    def _unanswered(self, before: int) -> None:
        """Not yet, as long as more of the request goes through."""
        transport = self._transport
        through = transport.bytes_out - transport.unacknowledged if transport is not None else 0
        if through > before:
            self._timer = self._loop.call_later(ANSWER_SECONDS, lambda: self._unanswered(through))
        else:
            self._end("the request is not answered")

    def close(self, reason: str) -> None:
        """End the connection, or the attempt; on_lost() is told."""
        self._end(reason)

    def stop(self) -> None:
        """End for good."""
        self._end("closed")
        if self._resolver is not None:
            self._resolver.stop(1.0)

    # ---- the transport's owner ----

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        data = buffer.room[:received]
        try:
            if self._chunks is not None:
                self._take_chunks(data)
            elif self._left:
                self._take_rest(data)
            else:
                self._head += data
                self._take_head()
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{self._address} does not speak HTTP as expected: {error}") from error

    def on_drained(self) -> None:
        pass

    def on_closed(self, reason: str) -> None:
        self._transport = None
        self._cancel()
        if not self._answered:
            reason = f"{reason} without an answer; is this the listen.pipe of a node, of the same fleet?"
        self._lost(reason)

    def _take_head(self) -> None:
        end = self._head.find(b"\r\n\r\n") + 4
        if len(self._head) > MAX_HEAD_BYTES and not 4 <= end <= MAX_HEAD_BYTES:
            raise RemoteProtocolError(f"a head of more than {MAX_HEAD_BYTES} bytes")
        if end < 4:
            return
        head, rest = ResponseHead(bytes(self._head[:end])), bytes(self._head[end:])
        self._head = bytearray()
        if head.status < 200:  # there is more to come
            self._head += rest
            self._take_head()
            return
        self._cancel()
        self.content_type = head.headers.get(b"content-type", b"").decode("latin-1")
        self._answered = True
        self._owner.on_response(head.status, head.retry_after)
        if self._transport is None:
            return  # the owner has had enough
        if head.chunked:
            self._chunks = ChunkReader()
            self._take_chunks(memoryview(rest))
        elif head.length:
            self._left = head.length
            self._take_rest(memoryview(rest))
        else:
            self._owner.on_complete()

    def _take_rest(self, data: memoryview) -> None:
        """A body of a known length, or one that ends with the connection."""
        piece = data[: self._left] if self._left > 0 else data
        if len(piece):
            self._left -= len(piece) if self._left > 0 else 0
            self._take(piece)
        if not self._left and self._transport is not None:
            self._owner.on_complete()

    def _take_chunks(self, data: memoryview) -> None:
        chunks = self._chunks
        assert chunks is not None
        chunks.feed(data, self._take)
        if chunks.done and self._transport is not None:
            self._chunks = None
            self._owner.on_complete()

    def _take(self, data: memoryview) -> None:
        if self._transport is not None:  # else the owner has had enough
            self._owner.on_body(data)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, reason: str) -> None:
        self._cancel()
        if self._transport is not None:
            self._transport.close(reason)
        else:
            self._abandon()
            self._lost(reason)

    def _lost(self, reason: str) -> None:
        self._attempt += 1
        if self._opened:
            self._opened = False
            self._owner.on_lost(reason)
