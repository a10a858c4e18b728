"""Accepting connections."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

from edgebroker.network.io.channel import Channel, PlainChannel
from edgebroker.network.io.loop import READ, Loop

MakeChannel = Callable[[socket.socket], Channel]


class Listener:
    """Accepts connections, with a channel each. When descriptors run out it rests and says so instead of spinning;
    `kept` of those that the process may have, a quarter of them at most, are not for connections."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        accepted: Callable[[Channel, str], None],
        resting: Callable[[], None],
        channel: MakeChannel = PlainChannel,
        kept: int = 0,
    ) -> None:
        sock.setblocking(False)
        self._loop, self.socket, self._accepted, self._resting = loop, sock, accepted, resting
        self._channel, self._kept = channel, kept
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
            peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "unix"
            self._accepted(self._channel(sock), peer)

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


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(1024)
    return sock


def listen_unix(path: Path) -> socket.socket:
    """A listening unix socket for its owner only (0600); one left behind by a crash is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(previous)
    sock.listen(64)
    return sock
