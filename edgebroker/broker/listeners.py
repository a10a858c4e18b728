"""Where a node listens: the binary protocol, HTTP, and the unix socket of the admin interface."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.sessions.sessions import Sessions
from edgebroker.common.config import Config, is_loopback, split_list
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.network.http.server import HttpServer
from edgebroker.network.io.channel import Channel, PlainChannel, tuned
from edgebroker.network.io.listener import Listener, MakeChannel, listen, listen_unix
from edgebroker.network.io.loop import Loop
from edgebroker.storage.commit.open_files import most_open

# Descriptors that connections do not take, beside those of segments: they are for the metadata and what is read. The
# unix socket may go further, so that an operator gets in when others have taken those.
KEPT, KEPT_FROM_SOCKET = 96, 16

log = logging.getLogger(__name__)


def names_of(config: Config) -> frozenset[str]:
    """The names by which a node may be called over HTTP, in lower case."""
    reached = config.pipe.address.rpartition(":")[0].strip("[]")
    names = [config.node.name, os.uname().nodename, reached, *split_list(config.listen.names)]
    return frozenset(name.lower() for name in names if name)


class Listeners:
    """Owned by the loop thread. `socket_path` is the unix socket of the admin interface: in the data directory, under
    systemd in the runtime directory. Children use `pipe_address`."""

    def __init__(self, loop: Loop, metrics: Metrics, config: Config) -> None:
        self._loop, self._metrics, self._config = loop, metrics, config.listen
        self.socket_path = Path(config.listen.socket or Path(config.node.data_dir) / "ctl.sock")
        self.has_socket = False
        self._listeners: list[Listener] = []
        self.tcp_address = self.http_address = self.pipe_address = ("", 0)

    def open(self, sessions: Sessions, http: HttpServer, pipe: HttpServer) -> None:
        """Listen; `pipe` serves children only. Raises EdgeBrokerError when an address cannot be had."""
        config = self._config
        for key, address in (("tcp", config.tcp), ("http", config.http), ("pipe", config.pipe)):
            if address and not is_loopback(address):
                log.warning(
                    "listen.%s = %s is reachable from other machines without TLS or authentication "
                    "(allow_insecure = true)",
                    key,
                    address,
                )

        def accept(channel: Channel, peer: str) -> None:
            if not sessions.accept(channel, peer):
                native.rest()

        native = self._listen_tcp("listen.tcp", config.tcp, accept, tuned)
        web = self._listen_tcp("listen.http", config.http, http.accept, PlainChannel)
        self.tcp_address, self.http_address, self.pipe_address = native.address, web.address, web.address
        if config.pipe:
            self.pipe_address = self._listen_tcp("listen.pipe", config.pipe, pipe.accept, PlainChannel).address
        try:
            unix = listen_unix(self.socket_path)
        except OSError as error:
            log.warning(
                "the admin socket %s cannot be created: %s; going on without it, with http://%s:%d only; "
                "set listen.socket to another path",
                self.socket_path,
                error.strerror or error,
                *self.http_address,
            )
            return
        self.has_socket = True
        self._listeners.append(Listener(self._loop, unix, http.accept, self._rested, kept=KEPT_FROM_SOCKET))

    def _listen_tcp(
        self, key: str, address: str, accept: Callable[[Channel, str], None], channel: MakeChannel
    ) -> Listener:
        host, _, port = address.rpartition(":")
        try:
            sock = listen(host.strip("[]"), int(port))
        except OSError as error:
            why = error.strerror
            raise EdgeBrokerError(f"{key} = {address} cannot be used: {why}; choose another address") from error
        listener = Listener(self._loop, sock, accept, self._rested, channel, KEPT + most_open())
        self._listeners.append(listener)
        return listener

    def close(self) -> None:
        """Accept nothing more."""
        for listener in self._listeners:
            listener.close()
        if self.has_socket:
            self.socket_path.unlink(missing_ok=True)

    def _rested(self) -> None:
        self._metrics.accept_rests += 1
        log.warning("no room for more connections (descriptors or limits.max_connections); accepting again shortly")
