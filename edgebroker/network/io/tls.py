"""TLS on the loop: handshakes that nobody waits for, and the channel that they end in.

    accept -> wait for a whole ClientHello (peeked: nothing is kept for it here) -> wait for one of 64 places
           -> handshake, a step each time the socket can go on -> who is it -> TlsChannel

A handshake that has begun costs 46 KiB and a millisecond of processor time, so that only so many are under way; who
waits costs a descriptor. Only this module imports ssl, and only nodes that need it import this module.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from edgebroker.network.io.channel import WANTS_DISK, WANTS_ROOM, SocketChannel, tune
from edgebroker.network.io.listener import host_of, is_local
from edgebroker.network.io.loop import READ, WRITE, Loop, TimerHandle
from edgebroker.network.io.sendpath import resident

RECORD_BYTES = 16 << 10
# In one call, to encrypt and decrypt: a quarter of a millisecond.
MOST_BYTES = 256 << 10
HANDSHAKE_SECONDS = 5.0
MOST_AT_ONCE, MOST_OF_A_HOST = 64, 4
MOST_WAITING, MOST_WAITING_OF_A_HOST = 1024, 64
# The first bytes of a TLS record: its kind (22: handshake), version, length.
_HEAD_BYTES, _HANDSHAKE, _LONGEST_HELLO = 5, 0x16, 16 << 10
# Bytes of stored data on their way through the cipher; of the loop thread alone.
_BUFFER = memoryview(bytearray(64 << 10))

Context = Callable[[], ssl.SSLContext]
"""The settings of the next handshake: certificates may have been renewed."""
Identify = Callable[[ssl.SSLSocket], str]
"""Who the peer is, "" when it showed no certificate. Raises PeerRefusedError."""


Named = Callable[[object], object]
"""Who a certificate is for, as ssl describes it (getpeercert); None for one that does not count."""


class PeerRefusedError(Exception):
    """The peer is not let in; the text says why."""


class TlsChannel(SocketChannel):
    """Bytes under TLS. `identity` is what the peer's certificate says it is.

    A record that the socket did not take as a whole has to be given to OpenSSL again, unchanged: it is kept here, and
    counts as sent once it is. Whoever sends offers the same bytes again, as transports do.
    """

    __slots__ = ("_stuck", "_tls")

    def __init__(self, sock: ssl.SSLSocket, identity: str) -> None:
        super().__init__(sock, identity)
        self._tls = sock
        self._stuck = b""

    @property
    def pending(self) -> bool:
        return self._tls.pending() > 0

    def recv_into(self, buffer: memoryview) -> int:
        received, room = 0, min(len(buffer), MOST_BYTES)
        while received < room:
            try:
                size = self._tls.recv_into(buffer[received:room])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not received:
                    raise BlockingIOError from None
                break
            except ssl.SSLError as error:
                raise _as_os_error(error) from error
            if not size:
                break
            received += size
        return received

    def send(self, parts: Sequence[bytes | memoryview], *, more: bool = False) -> int:
        sent = 0
        try:
            if self._stuck:
                stuck, self._stuck = self._stuck, b""
                self._write(stuck)
                sent = len(stuck)
            for record in _records(parts, sent):
                self._write(record)
                sent += len(record)
                if sent >= MOST_BYTES:
                    break
        except BlockingIOError:
            if not sent:
                raise
        return sent

    def send_file(self, fd: int, position: int, length: int) -> tuple[int, int]:
        sent = 0
        while sent < length:
            if sent >= MOST_BYTES:
                return sent, WANTS_ROOM  # in the next iteration
            if self._stuck:
                stuck, self._stuck = self._stuck, b""
                records: Sequence[bytes | memoryview] = [stuck]
            else:
                size = min(len(_BUFFER), length - sent)
                if not resident(fd, position + sent, size):
                    return sent, WANTS_DISK
                size = os.preadv(fd, [_BUFFER[:size]], position + sent)
                if not size:
                    return sent, WANTS_DISK
                records = list(_records([_BUFFER[:size]], 0))
            for record in records:
                try:
                    self._write(record)
                except BlockingIOError:
                    return sent, WANTS_ROOM
                sent += len(record)
        return sent, 0

    def _write(self, record: bytes | memoryview) -> None:
        try:
            self._tls.send(record)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._stuck = bytes(record)
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise _as_os_error(error) from error


def _records(parts: Sequence[bytes | memoryview], skip: int) -> Iterator[bytes | memoryview]:
    """What follows the first `skip` bytes of these, in pieces that fill a record each as far as there is something."""
    small: list[bytes | memoryview] = []
    size = 0
    for part in parts:
        if skip >= len(part):
            skip -= len(part)
            continue
        view = memoryview(part)[skip:]
        skip = 0
        while len(view):
            piece, view = view[: RECORD_BYTES - size], view[RECORD_BYTES - size :]
            small.append(piece)
            size += len(piece)
            if size == RECORD_BYTES:
                yield small[0] if len(small) == 1 else b"".join(small)
                small, size = [], 0
    if small:
        yield small[0] if len(small) == 1 else b"".join(small)


def _as_os_error(error: ssl.SSLError) -> OSError:
    return OSError(errno.EPROTO, f"TLS: {_why(error)}")


def _why(error: OSError) -> str:
    """In words: of OpenSSL's message only the reason."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of the peer is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return str(error.reason).lower().replace("_", " ")
    return error.strerror or str(error) or "the peer closed the connection"


def open_channel(sock: socket.socket, context: ssl.SSLContext, named: Named) -> TlsChannel:
    """Begin TLS on a connection of ours, and wait for it as long as the timeout of the socket says. Owns the socket.
    Raises OSError."""
    try:
        wrapped = context.wrap_socket(sock)
    except TimeoutError as error:
        sock.close()
        raise OSError(errno.ETIMEDOUT, "no TLS handshake in time") from error
    except OSError as error:
        sock.close()
        raise OSError(errno.EPROTO, f"TLS is not possible: {_why(error)}") from error
    tune(wrapped)
    name = named(wrapped.getpeercert())
    if name is None:
        wrapped.close()
        raise OSError(errno.EPROTO, "TLS is not possible: the certificate of the peer is not that of a node")
    return TlsChannel(wrapped, str(name))


class _Handshake:
    """One that is under way, of either side; done() is called once, with the channel or with why there is none."""

    def __init__(
        self, loop: Loop, sock: ssl.SSLSocket, identify: Identify, done: Callable[[TlsChannel | None, str], None]
    ) -> None:
        self._loop, self._socket, self._identify, self._done = loop, sock, identify, done
        self._fd, self._interest = sock.fileno(), 0
        self._timer = loop.call_later(HANDSHAKE_SECONDS, lambda: self.end("no TLS handshake in time"))
        self._over = False
        self.step(0)

    def step(self, mask: int) -> None:
        if self._over:
            return
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            self._wait(READ)
        except ssl.SSLWantWriteError:
            self._wait(WRITE)
        except OSError as error:
            self.end(_why(error))
        else:
            try:
                identity = self._identify(self._socket)
            except PeerRefusedError as refused:
                self.end(str(refused))
                return
            self._finish()
            self._done(TlsChannel(self._socket, identity), "")

    def _wait(self, interest: int) -> None:
        if interest != self._interest:
            if self._interest:
                self._loop.modify(self._fd, interest, self.step)
            else:
                self._loop.register(self._fd, interest, self.step)
            self._interest = interest

    def _finish(self) -> None:
        self._over = True
        self._timer.cancel()
        if self._interest:
            self._loop.unregister(self._fd)
            self._interest = 0

    def end(self, why: str) -> None:
        """Give it up."""
        if not self._over:
            self._finish()
            self._socket.close()
            self._done(None, why)


class _Arrival:
    """A connection whose peer has not said anything yet, or not all of its ClientHello."""

    def __init__(self, host: Handshakes, sock: socket.socket, peer: str, plain: Callable[[], None] | None) -> None:
        self._host, self.socket, self.peer, self._plain = host, sock, peer, plain
        self._needed = _HEAD_BYTES
        self._registered = False
        self.timer: TimerHandle = host.loop.call_later(
            HANDSHAKE_SECONDS, lambda: self.refuse("it says nothing, or not all of its ClientHello")
        )
        sock.setblocking(False)
        self._want(_HEAD_BYTES)

    def _want(self, size: int) -> None:
        """Be called when so many bytes have come, or no more will."""
        self._needed = size
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
        if not self._registered:
            self._host.loop.register(self.socket.fileno(), READ, self._ready)
            self._registered = True

    def leave_loop(self) -> None:
        self.timer.cancel()
        if self._registered:
            self._host.loop.unregister(self.socket.fileno())
            self._registered = False

    def _ready(self, mask: int) -> None:
        try:
            data = self.socket.recv(self._needed, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError as error:
            self.refuse(error.strerror or "the connection is lost")
            return
        if data and data[0] != _HANDSHAKE:
            if self._plain is None:
                self.refuse("it does not speak TLS")
                return
            self.leave_loop()
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            self._host.left(self)
            self._plain()
        elif len(data) < self._needed:  # there are no more to come: else this would not have been called
            self.refuse("it closed the connection before its ClientHello")
        elif self._needed == _HEAD_BYTES:
            length = int.from_bytes(data[3:5], "big")
            if not 0 < length <= _LONGEST_HELLO:
                self.refuse("it does not speak TLS")
                return
            self._want(_HEAD_BYTES + length)
        else:
            self.leave_loop()
            self._host.greeted(self)

    def refuse(self, why: str) -> None:
        self.leave_loop()
        self.socket.close()
        self._host.left(self)
        self._host.refused(self.peer, why)


class Handshakes:
    """All handshakes of a node. Owned by the loop thread.

    `server` and `client` give the contexts of the next ones; `identify` says who a peer is; `refused` is told of peers
    that were not let in, and why.
    """

    def __init__(
        self,
        loop: Loop,
        server: Context,
        client: Context,
        identify: Identify,
        refused: Callable[[str, str], None],
    ) -> None:
        self.loop, self._server, self._client, self._identify, self.refused = loop, server, client, identify, refused
        self._accepted: dict[_Arrival, Callable[[TlsChannel, str], None]] = {}
        self._waiting: Counter[str] = Counter()
        # Those that said ClientHello, until there is a place for them.
        self._greeted: deque[_Arrival] = deque()
        self._under_way: Counter[str] = Counter()

    def serve(
        self,
        sock: socket.socket,
        peer: str,
        accepted: Callable[[TlsChannel, str], None],
        plain: Callable[[], None] | None = None,
    ) -> None:
        """Have a peer that connected say who it is; accepted() when it has. `plain` is called instead when it does not
        speak TLS; without one it is refused."""
        host = host_of(peer)
        full = len(self._accepted) >= MOST_WAITING
        if full or (self._waiting[host] >= MOST_WAITING_OF_A_HOST and not is_local(peer)):
            sock.close()
            self.refused(peer, "too many connections wait for their handshake")
            return
        self._waiting[host] += 1
        arrival = _Arrival(self, sock, peer, plain)
        self._accepted[arrival] = accepted

    def connect(self, sock: socket.socket, done: Callable[[TlsChannel | None, str], None]) -> Callable[[str], None]:
        """Begin TLS on a connection of ours: done() with the channel, or with why there is none. Returns a function
        that gives it up."""
        sock.setblocking(False)
        wrapped = self._client().wrap_socket(sock, do_handshake_on_connect=False)
        return _Handshake(self.loop, wrapped, self._identify, done).end

    # ---- what arrivals say ----

    def left(self, arrival: _Arrival) -> Callable[[TlsChannel, str], None]:
        """It does not wait any more."""
        host = host_of(arrival.peer)
        self._waiting[host] -= 1
        if not self._waiting[host]:
            del self._waiting[host]
        return self._accepted.pop(arrival)

    def greeted(self, arrival: _Arrival) -> None:
        """Its ClientHello is here."""
        self._greeted.append(arrival)
        self._begin_next()

    def _begin_next(self) -> None:
        """Begin those for which there is a place, the first first."""
        for _ in range(len(self._greeted)):
            if self._under_way.total() >= MOST_AT_ONCE:
                return
            arrival = self._greeted.popleft()
            if self._under_way[host_of(arrival.peer)] >= MOST_OF_A_HOST:
                self._greeted.append(arrival)
            else:
                self._begin(arrival)

    def _begin(self, arrival: _Arrival) -> None:
        accepted, peer = self.left(arrival), arrival.peer
        host = host_of(peer)
        self._under_way[host] += 1

        def done(channel: TlsChannel | None, why: str) -> None:
            self._under_way[host] -= 1
            if not self._under_way[host]:
                del self._under_way[host]
            if channel is None:
                self.refused(peer, why)
            else:
                accepted(channel, peer)
            if self._greeted:
                self.loop.call_in_turn(self._begin_next)

        arrival.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        try:
            wrapped = self._server().wrap_socket(arrival.socket, server_side=True, do_handshake_on_connect=False)
        except OSError as error:  # it is gone
            arrival.socket.close()
            done(None, _why(error))
        else:
            _Handshake(self.loop, wrapped, self._identify, done)

    def close(self) -> None:
        """Drop who waits."""
        for arrival in list(self._accepted):
            arrival.leave_loop()
            arrival.socket.close()
        self._accepted.clear()
        self._greeted.clear()
