"""A client's connection to a broker: opened, kept alive, opened again. Runs on the client's I/O thread.

The owner is notified by connected() with what the broker granted, gets every event after that, and is notified by
disconnected(); the link then tries again with growing pauses until it is closed.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable
from math import inf
from typing import Protocol

from edgebroker.client.credentials import Credentials
from edgebroker.client.servers import PORT, Server, Servers
from edgebroker.common.config import is_loopback
from edgebroker.common.errors import (
    AnswerError,
    Code,
    EdgeBrokerError,
    ProtocolError,
    UnreachableError,
)
from edgebroker.network.io.loop import Loop, TimerHandle
from edgebroker.network.io.transport import Transport
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Connection, Event, Frame, ReceiveBuffer, Role
from edgebroker.network.wire.frames import Answer, Connect, FrameType, Grants

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
# Of several brokers a client prefers those that are named first: how often it looks for them, and how long.
RETURN_SECONDS, TRY_SECONDS = 300.0, 1.0
NEEDS_CREDENTIALS = (
    "a node of a fleet listens to programs of other machines only with credentials (edgebroker token create --app NAME)"
)
# DELIVER frames carry up to 1 MiB, or one batch of any size that a broker allows.
MAX_FRAME = (16 << 20) + 65536


class LinkOwner(Protocol):
    """What a link calls, on the I/O thread."""

    def connected(self, grants: Grants) -> None:
        """The broker accepted the client; requests may be sent."""

    def on_answer(self, correlation: int, answer: Answer) -> None:
        """An answer that no request() waits for."""

    def on_event(self, event: Event) -> None:
        """Anything but an answer."""

    def disconnected(self, reason: str) -> None:
        """The connection ended after connected(); requests are void. Another attempt follows."""

    def connect_failed(self, error: EdgeBrokerError, permanent: bool) -> None:
        """An attempt failed; another follows. `permanent`: waiting does not help."""


def default_client_id(kind: str) -> str:
    """A name for a client that was given none: unique, and it tells where the client runs."""
    return f"{kind}-{socket.gethostname()[:40]}-{os.getpid()}-{os.urandom(4).hex()}"


class Link:
    """One connection at a time to one of `servers`, which are tried in turn. `connect_body` gives what goes into
    CONNECT, at every attempt."""

    def __init__(
        self,
        loop: Loop,
        servers: Servers,
        client_id: str,
        owner: LinkOwner,
        *,
        credentials: Credentials,
        connect_body: Callable[[], Connect] | None = None,
    ) -> None:
        self._loop, self._servers, self.client_id, self._owner = loop, servers, client_id, owner
        self._credentials, self.token = credentials, credentials.token
        self._buffer = ReceiveBuffer()
        self._transport: Transport | None = None
        self._connection = Connection(Role.CLIENT, MAX_FRAME)
        self._pause = FIRST_PAUSE
        self._retry: TimerHandle | None = None
        self._heartbeat: TimerHandle | None = None
        self._return: TimerHandle | None = None
        self._closed = self._was_up = False
        self._connect_body = connect_body or self._plain_connect
        self._correlation = 0
        self._connect_correlation = 0
        self._once: set[int] = set()
        self._requests: dict[int, Callable[[Answer, memoryview], None]] = {}
        self.grants: Grants | None = None

    @property
    def up(self) -> bool:
        """Connected, and accepted by the broker."""
        return self.grants is not None and self._transport is not None

    @property
    def server(self) -> str:
        """HOST:PORT of the broker that is used, or tried, now."""
        return str(self._servers.current)

    @property
    def _is_far(self) -> bool:
        """Is the broker on another machine?"""
        server = self._servers.current
        return not server.path and not is_loopback(str(server))

    def next_correlation(self) -> int:
        """A number for a request, never used before on this link."""
        self._correlation += 1
        return self._correlation

    def open(self) -> None:
        """Try to connect now; on failure again later."""
        self._retry = None
        if self._closed:
            return
        try:
            channel = self._credentials.channel(_connect(self._servers.current, CONNECT_SECONDS))
        except OSError as error:
            # A name that worked before is one of a network that is away.
            unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
            problem = "there is no host of this name" if unknown else error.strerror or error
            self._failed(
                UnreachableError(f"no broker at {self.server}: {problem}"), permanent=unknown and not self._was_up
            )
            return
        self._connection = Connection(Role.CLIENT, MAX_FRAME)
        self._transport = Transport(self._loop, channel, self._buffer, self, self.server)
        self._connect_correlation = self.next_correlation()
        self._heartbeat = self._loop.call_later(CONNECT_SECONDS, self._unanswered)
        self._transport.send(frames.write_connect(self._connect_correlation, self._connect_body()))

    def send(self, data: bytes) -> bool:
        """False when there is no connection: the data is not kept."""
        if self._transport is None or self.grants is None:
            return False
        self._transport.send(data)
        return True

    def request(
        self, correlation: int, data: bytes, done: Callable[[Answer, memoryview], None], *, once: bool = True
    ) -> bool:
        """send() something that is answered; `done` gets the answer (every one, unless `once`)."""
        self._requests[correlation] = done
        if once:
            self._once.add(correlation)
        return self.send(data)

    def reconnect(self, reason: str, pause: float = 0.0) -> None:
        """Drop the connection and open another at once, or after a pause in seconds."""
        self._pause = pause
        if self._transport is not None:
            self._transport.close(reason)
        elif self._retry is None:
            self.open()

    def elsewhere(self, reason: str) -> None:
        """Use another broker, if there is one: what this one has does not do."""
        if self._servers.several:
            log.warning("%s: %s; trying another broker", self.server, reason)
            self._servers.go_on()
            self.reconnect(reason)

    def close(self) -> None:
        """Send what is queued and end for good."""
        self._closed = True
        for timer in (self._retry, self._heartbeat, self._return):
            if timer is not None:
                timer.cancel()
        if self._transport is not None:
            self._transport.close("closed by the client")

    def forked(self) -> None:
        """This is a child of the process that made it."""
        self._closed = True
        if self._transport is not None:
            self._transport.forked()
        self._loop.close()

    # ---- the transport's owner ----

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        if self.grants is None and bytes(buffer.room[:5]) == b"HTTP/":
            self._wrong_port()
            return
        try:
            for event in self._connection.receive(buffer, received):
                self._on_event(event)
        except ProtocolError as error:
            log.error("%s: %s", self.server, error)
            raise

    def on_drained(self) -> None:
        pass

    def on_closed(self, reason: str) -> None:
        was_up, self.grants, self._transport = self.grants is not None, None, None
        self._requests.clear()
        self._once.clear()
        for timer in (self._heartbeat, self._return):
            if timer is not None:
                timer.cancel()
        if was_up:
            self._owner.disconnected(reason)
        if not self._closed:
            hint = "" if was_up or self._credentials.secure or not self._is_far else f"; {NEEDS_CREDENTIALS}"
            self._failed(UnreachableError(f"the connection to {self.server} ended: {reason}{hint}"), reported=was_up)

    def _failed(self, error: EdgeBrokerError, *, reported: bool = False, permanent: bool = False) -> None:
        if not reported:
            self._owner.connect_failed(error, permanent and not self._servers.several)
        if self._closed or self._retry is not None:
            return
        if not reported and not self._servers.go_on():
            self._retry = self._loop.call_later(0.0, self.open)
            return
        self._retry = self._loop.call_later(self._pause * random.uniform(0.5, 1.0), self.open)
        self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, self._pause * 2))

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Frame) and event.type == FrameType.ACK:
            answer = frames.read_ack(event.body)
            if isinstance(answer, Answer):
                self._on_answer(event, answer)
            return
        if isinstance(event, Frame) and event.type == FrameType.HEARTBEAT and self.grants is None:
            return
        self._owner.on_event(event)

    def _on_answer(self, event: Frame, answer: Answer) -> None:
        if self.grants is None and event.correlation == self._connect_correlation:
            if answer.code is not Code.OK:
                self._owner.connect_failed(AnswerError(answer.code, answer.message), not answer.code.retryable)
                return
            self.grants = frames.read_grants(event.body, answer.extra_start)
            self._pause, self._was_up = FIRST_PAUSE, True
            self._servers.reached()
            if self._servers.better:
                self._return = self._loop.call_later(RETURN_SECONDS, self._try_better)
            if self._heartbeat is not None:
                self._heartbeat.cancel()
            self._beat()
            self._owner.connected(self.grants)
            return
        done = self._requests.get(event.correlation)
        if event.correlation in self._once:
            self._once.remove(event.correlation)
            del self._requests[event.correlation]
        if done is None:
            self._owner.on_answer(event.correlation, answer)
        else:
            done(answer, event.body)

    def _wrong_port(self) -> None:
        """What answers is a web server, perhaps the broker's own."""
        error = UnreachableError(
            f"{self.server} is an HTTP port; clients use the address in listen.tcp, port {PORT} by default (the admin "
            "interface is another one)"
        )
        self._owner.connect_failed(error, not self._servers.several)
        assert self._transport is not None
        self._transport.close(str(error))

    def _unanswered(self) -> None:
        """The peer accepted the connection and does not answer: it is not a broker, or one that hangs."""
        if self._transport is not None and self.grants is None:
            self._transport.close("CONNECT was not answered")

    def _try_better(self) -> None:
        """Go back to a broker that is preferred to this one, if it is there again."""
        for server in self._servers.better:
            try:
                _connect(server, TRY_SECONDS).close()
            except OSError:
                continue
            log.info("going back from %s to %s", self.server, server)
            self._servers.use(server)
            self.reconnect(f"{server} is there again")
            return
        self._return = self._loop.call_later(RETURN_SECONDS, self._try_better)

    def _beat(self) -> None:
        """Send a heartbeat, and end the connection when the broker has sent nothing for too long."""
        if self._transport is None or self.grants is None:
            return
        if self._loop.now() - self._transport.last_received > self.grants.idle_ms / 1000:
            self._transport.close("the broker sent nothing for too long")
            return
        self._transport.send(frames.write_heartbeat([]))
        self._heartbeat = self._loop.call_later(self.grants.heartbeat_ms / 2000, self._beat)

    @property
    def silent_seconds(self) -> float:
        """How long the broker has sent nothing; inf while it is not connected. Any thread."""
        transport = self._transport
        if transport is None or self.grants is None:
            return inf
        return self._loop.clock_now() - transport.last_received

    def _plain_connect(self) -> Connect:
        return Connect(frames.PROTOCOL_VERSION, 0, self.client_id, self.token, -1, -1, [])


def _connect(server: Server, seconds: float) -> socket.socket:
    """A connection to a broker. Raises OSError."""
    if not server.path:
        return socket.create_connection((server.host, server.port), seconds)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(server.path)
    except OSError:
        sock.close()
        raise
    return sock
