"""Where a node listens: the binary protocol, HTTP, and the unix socket of the admin interface."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.sessions.sessions import Sessions
from edgebroker.common.config import ListenConfig, is_loopback
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.network.http.server import HttpServer
from edgebroker.network.io.listener import Listener, listen
from edgebroker.network.io.loop import Loop

log = logging.getLogger(__name__)


class Listeners:
    """Owned by the loop thread. `socket_path` is the unix socket of the admin interface."""

    def __init__(self, loop: Loop, metrics: Metrics, config: ListenConfig, socket_path: Path) -> None:
        self._loop, self._metrics, self._config, self.socket_path = loop, metrics, config, socket_path
        self._listeners: list[Listener] = []
        self.tcp_address = self.http_address = ("", 0)

    def open(self, sessions: Sessions, http: HttpServer) -> None:
        """Listen. Raises EdgeBrokerError when an address cannot be had."""
        for key, address in (("tcp", self._config.tcp), ("http", self._config.http)):
            if not is_loopback(address):
                log.warning(
                    "listen.%s = %s is reachable from other machines without TLS or authentication "
                    "(allow_insecure = true)",
                    key,
                    address,
                )

        def accept(sock: socket.socket, peer: str) -> None:
            if not sessions.accept(sock, peer):
                native.rest()

        tcp = _bind("listen.tcp", self._config.tcp)
        self.tcp_address = tcp.getsockname()[:2]
        native = Listener(self._loop, tcp, accept, self._rested)
        self._listeners.append(native)
        web = _bind("listen.http", self._config.http)
        self.http_address = web.getsockname()[:2]
        self._listeners.append(Listener(self._loop, web, http.accept, self._rested))
        unix = _bind_unix(self.socket_path)
        self._listeners.append(Listener(self._loop, unix, http.accept, self._rested))

    def close(self) -> None:
        """Accept nothing more."""
        for listener in self._listeners:
            listener.close()

    def _rested(self) -> None:
        self._metrics.accept_rests += 1
        log.warning("no room for more connections (descriptors or limits.max_connections); accepting again shortly")


def _bind(key: str, address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return listen(host.strip("[]"), int(port))
    except OSError as error:
        raise EdgeBrokerError(f"{key} = {address} cannot be used: {error.strerror}; choose another address") from error


def _bind_unix(path: Path) -> socket.socket:
    """The admin socket, for its owner only (0600); one left behind by a crash is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise EdgeBrokerError(f"the admin socket {path} cannot be created: {error}; set listen.socket") from error
    finally:
        os.umask(previous)
    sock.listen(64)
    return sock
