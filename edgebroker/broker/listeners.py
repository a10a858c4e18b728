"""Where a node listens: each door on its own, for those that it is meant for.

listen.tcp, listen.unix       clients; on the unix socket the kernel says which user they are
listen.http, listen.socket    administration, of this machine only
listen.pipe                   the nodes below
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.sessions.sessions import Sessions
from edgebroker.common.config import DEVELOPMENT, Config, is_loopback, split_list
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.network.http.server import HttpServer
from edgebroker.network.io.channel import Channel, local, tuned
from edgebroker.network.io.listener import Listener, Opened, listen, listen_unix, plainly
from edgebroker.network.io.loop import Loop
from edgebroker.storage.commit.open_files import most_open

# Descriptors that connections do not take, beside those of segments: they are for the metadata and what is read. The
# unix socket may go further, so that an operator gets in when others have taken those.
KEPT, KEPT_FROM_SOCKET = 96, 16
# The user of the process and root administrate; the group of the process may be clients.
ADMIN_MODE, CLIENTS_MODE = 0o600, 0o660
WARN_SECONDS = 3600.0

log = logging.getLogger(__name__)


def names_of(config: Config) -> frozenset[str]:
    """The names by which a node may be called over HTTP, in lower case."""
    reached = config.pipe.address.rpartition(":")[0].strip("[]")
    names = [config.node.name, os.uname().nodename, reached, *split_list(config.listen.names)]
    return frozenset(name.lower() for name in names if name)


class Listeners:
    """Owned by the loop thread. `socket_path` and `clients_path` are the unix sockets: in the data directory, under
    systemd in the runtime directory. Children use `pipe_address`; ("", 0): this node takes none."""

    def __init__(self, loop: Loop, metrics: Metrics, config: Config) -> None:
        self._loop, self._metrics, self._config = loop, metrics, config.listen
        self.socket_path, self.clients_path = Path(config.listen.socket), Path(config.listen.unix)
        self._listeners: list[Listener] = []
        self._sockets: list[Path] = []
        self.tcp_address = self.http_address = self.pipe_address = ("", 0)

    def open(self, sessions: Sessions, http: HttpServer, pipe: HttpServer) -> None:
        """Listen; `http` serves administration, `pipe` the nodes below. Raises EdgeBrokerError when an address cannot
        be had; a unix socket that cannot be created is a warning."""
        config = self._config
        self._warn()

        def accept(channel: Channel, peer: str) -> None:
            if not sessions.accept(channel, peer):
                native.rest()

        native = self._listen_tcp("listen.tcp", config.tcp, plainly(accept, tuned))
        web = self._listen_tcp("listen.http", config.http, plainly(http.accept))
        self.tcp_address, self.http_address = native.address, web.address
        if config.pipe:
            self.pipe_address = self._listen_tcp("listen.pipe", config.pipe, plainly(pipe.accept)).address
        self._listen_unix("listen.unix", self.clients_path, CLIENTS_MODE, accept, KEPT + most_open())
        self._listen_unix("listen.socket", self.socket_path, ADMIN_MODE, http.accept, KEPT_FROM_SOCKET)

    @property
    def has_socket(self) -> bool:
        """Is there a unix socket for administration?"""
        return self.socket_path in self._sockets

    def _warn(self) -> None:
        """At the start, and every hour: a node that everybody may use should be somebody's decision still."""
        for key in ("tcp", "pipe"):
            address = getattr(self._config, key)
            if address and not is_loopback(address):
                log.warning(
                    "listen.%s = %s is reachable from other machines without TLS or authentication (%s)",
                    key,
                    address,
                    DEVELOPMENT,
                )
                self._loop.call_later(WARN_SECONDS, self._warn)

    def _listen_unix(self, key: str, path: Path, mode: int, accept: Callable[[Channel, str], None], kept: int) -> None:
        try:
            sock = listen_unix(path, mode)
        except OSError as error:
            log.warning(
                "%s: the socket %s cannot be created: %s; going on without it; set %s to another path",
                key,
                path,
                error.strerror or error,
                key,
            )
            return
        self._sockets.append(path)
        self._listeners.append(Listener(self._loop, sock, plainly(accept, local), self._rested, kept))

    def _listen_tcp(self, key: str, address: str, opened: Opened) -> Listener:
        host, _, port = address.rpartition(":")
        try:
            sock = listen(host.strip("[]"), int(port))
        except OSError as error:
            why = error.strerror
            raise EdgeBrokerError(f"{key} = {address} cannot be used: {why}; choose another address") from error
        listener = Listener(self._loop, sock, opened, self._rested, KEPT + most_open())
        self._listeners.append(listener)
        return listener

    def close(self) -> None:
        """Accept nothing more."""
        for listener in self._listeners:
            listener.close()
        for path in self._sockets:
            path.unlink(missing_ok=True)

    def _rested(self) -> None:
        self._metrics.accept_rests += 1
        log.warning("no room for more connections (descriptors or limits.max_connections); accepting again shortly")
