"""Accepting connections."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

from edgebroker.common.config import is_loopback
from edgebroker.network.io.channel import Channel, PlainChannel
from edgebroker.network.io.loop import READ, Loop

# The address of a peer at a unix socket.
UNIX = "unix"
Opened = Callable[[socket.socket, str], None]
"""Takes a connection that was accepted, and the address of its peer."""


class Listener:
    """Accepts connections. When descriptors run out it rests and says so instead of spinning; `kept` of those that the
    process may have, a quarter of them at most, are not for connections."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        accepted: Opened,
        resting: Callable[[], None],
        kept: int = 0,
    ) -> None:
        sock.setblocking(False)
        self._loop, self.socket, self._accepted, self._resting = loop, sock, accepted, resting
        self._kept = kept
        self._registered = False
        self._wait = 0.1
        self._register()

    def _register(self) -> None:
        if not self._registered and self.socket.fileno() >= 0:
            self._loop.register(self.socket.fileno(), READ, self._ready)
            self._registered = True

    def _ready(self, mask: int) -> None:
        for _ in range(64):
            try:
                sock, address = self.socket.accept()
            except BlockingIOError:
                self._wait = 0.1
                return
            except OSError:
                self.rest()
                return
            # The system gives the lowest free number: so many are in use.
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if sock.fileno() >= limit - min(self._kept, limit // 4):
                sock.close()
                self.rest()
                return
            peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else UNIX
            self._accepted(sock, peer)

    def rest(self) -> None:
        """Stop accepting for a moment (0.1 to 1 s): there is no room for another connection."""
        if self._registered:
            self._loop.unregister(self.socket.fileno())
            self._registered = False
            self._resting()
            self._loop.call_later(self._wait, self._register)
            self._wait = min(1.0, self._wait * 2)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of a TCP socket."""
        host, port = self.socket.getsockname()[:2]
        return host, port

    def close(self) -> None:
        if self._registered:
            self._loop.unregister(self.socket.fileno())
            self._registered = False
        self.socket.close()


def plainly(accept: Callable[[Channel, str], None], make: Callable[[socket.socket], Channel] = PlainChannel) -> Opened:
    """Takes connections with a channel of their own at once."""
    return lambda sock, peer: accept(make(sock), peer)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(1024)
    return sock


def listen_unix(path: Path, mode: int) -> socket.socket:
    """A listening unix socket with these permissions; one left behind by a crash is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o777 & ~mode)
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(previous)
    sock.listen(64)
    return sock


def host_of(peer: str) -> str:
    """The host of HOST:PORT; one without a port, and UNIX, as they are."""
    host, _, port = peer.rpartition(":")
    return host if host and port.isdigit() else peer


def is_local(peer: str) -> bool:
    """Is the peer, HOST:PORT, HOST or UNIX, a process of this machine?"""
    return peer == UNIX or is_loopback(f"{host_of(peer)}:0")
