"""How bytes get over a connected socket: four calls that never wait. What happens to the bytes on the way is the
channel's own business; a transport (transport.py) decides which bytes, and when.

Where the socket cannot go on now, recv_into() and send() raise BlockingIOError; what is wrong with the connection is
an OSError.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from edgebroker.network.io.sendpath import send_cached

DEAD_HOST_SECONDS = 30
# struct ucred: process, user, group.
_PEER = struct.Struct("iII")
_PASSWD = Path("/etc/passwd")

# Why send_file() sent less than it was asked to; the numbers are those of send_cached().
WANTS_ROOM = 1
"""The socket takes no more for now."""
WANTS_DISK = 2
"""The next bytes are not in the page cache: have them read, then send them as bytes."""


class Channel(Protocol):
    """One connected socket. Owned by the loop thread. `identity`: who the peer is, where the channel itself knows it:
    "unix:NAME" on a unix socket, the name in its certificate under TLS, "" where it does not."""

    identity: str

    @property
    def pending(self) -> bool:
        """Has something arrived that can be received although the descriptor does not say so?"""

    def recv_into(self, buffer: memoryview) -> int:
        """Receive what is there; 0 when the peer has closed its side."""

    def send(self, parts: Sequence[bytes | memoryview], *, more: bool = False) -> int:
        """Send as much of these as the socket takes, in their order. Returns how many bytes; `more` follows at once."""

    def send_file(self, fd: int, position: int, length: int) -> tuple[int, int]:
        """Send as much of a file's bytes as the socket takes, of pages in the page cache only.

        Returns how many bytes, and what the rest waits for: WANTS_ROOM or WANTS_DISK (0: nothing is left).
        """

    def close(self) -> None:
        """Give the descriptor back."""

    def fileno(self) -> int:
        """The descriptor to wait for."""

    def hold_back(self, unsent: int) -> None:
        """Let the kernel queue no more than this in front of what is on its way: what is sent later waits less."""

    @property
    def unacknowledged(self) -> int:
        """Bytes that the kernel took and the peer's has not acknowledged."""


class SocketChannel:
    """What channels over a socket have in common."""

    __slots__ = ("_fd", "_socket", "close", "fileno", "identity")

    def __init__(self, sock: socket.socket, identity: str) -> None:
        sock.setblocking(False)
        self._socket, self._fd, self.identity = sock, sock.fileno(), identity
        self.close, self.fileno = sock.close, sock.fileno

    def hold_back(self, unsent: int) -> None:
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent)
        except OSError:
            pass  # not TCP: nothing is far away

    @property
    def unacknowledged(self) -> int:
        try:
            return int.from_bytes(fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except OSError:
            return 0


class PlainChannel(SocketChannel):
    """The bytes as they are."""

    __slots__ = ("recv_into",)
    pending = False

    def __init__(self, sock: socket.socket, identity: str = "") -> None:
        super().__init__(sock, identity)
        self.recv_into = sock.recv_into

    def send(self, parts: Sequence[bytes | memoryview], *, more: bool = False) -> int:
        if len(parts) == 1:  # the cheaper call, for what is sent most often
            return self._socket.send(parts[0], socket.MSG_MORE if more else 0)
        return self._socket.sendmsg(parts, (), socket.MSG_MORE) if more else self._socket.sendmsg(parts)

    def send_file(self, fd: int, position: int, length: int) -> tuple[int, int]:
        return send_cached(self._fd, fd, position, length)


def tuned(sock: socket.socket, quiet_seconds: int = DEAD_HOST_SECONDS // 2) -> PlainChannel:
    """The channel of a TCP connection, see tune()."""
    tune(sock, quiet_seconds)
    return PlainChannel(sock)


def tune(sock: socket.socket, quiet_seconds: int = DEAD_HOST_SECONDS // 2) -> None:
    """Small frames go out at once; a host that vanished is noticed by the kernel within DEAD_HOST_SECONDS when there is
    something on its way to it (TCP_USER_TIMEOUT), else half of that after `quiet_seconds` of silence (keepalive)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, quiet_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_HOST_SECONDS // 6)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_HOST_SECONDS * 1000)


def local(sock: socket.socket) -> PlainChannel:
    """The channel of a unix socket: the kernel says which user the peer was when it connected (SO_PEERCRED)."""
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return PlainChannel(sock, f"unix:{_user_name(uid)}")


def _user_name(uid: int) -> str:
    """As /etc/passwd has it, else the number: to ask a directory service could take its time."""
    try:
        lines = _PASSWD.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, number, *_ = [*line.split(":"), "", ""]
        if number == str(uid):
            return name
    return str(uid)
