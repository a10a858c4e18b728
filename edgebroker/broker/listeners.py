"""Where a node listens: each door on its own, for those that it is meant for.

listen.tcp, listen.unix       clients; on the unix socket the kernel says which user they are
listen.http, listen.socket    administration, of this machine only
listen.pipe                   the nodes below
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from edgebroker.broker.access.bans import Bans
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.sessions.sessions import Sessions
from edgebroker.broker.trust.node_trust import NodeTrust
from edgebroker.common.config import DEVELOPMENT, Config, is_loopback, split_list
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.network.http.server import HttpServer
from edgebroker.network.io.channel import Channel, PlainChannel, local, tune, tuned
from edgebroker.network.io.listener import Listener, Opened, is_local, listen, listen_unix, plainly
from edgebroker.network.io.loop import Loop
from edgebroker.storage.commit.open_files import most_open

# Descriptors that connections do not take, beside those of segments: they are for the metadata and what is read. The
# unix socket may go further, so that an operator gets in when others have taken those.
KEPT, KEPT_FROM_SOCKET = 96, 16
# The user of the process and root administrate; the group of the process may be clients.
ADMIN_MODE, CLIENTS_MODE = 0o600, 0o660
WARN_SECONDS = 3600.0
HOW_TO_JOIN = "join a fleet (edgebroker join TOKEN), or create one at the root (edgebroker fleet init NAME)"

log = logging.getLogger(__name__)


def names_of(config: Config) -> frozenset[str]:
    """The names by which a node may be called over HTTP, in lower case."""
    reached = config.pipe.address.rpartition(":")[0].strip("[]")
    names = [config.node.name, os.uname().nodename, reached, *split_list(config.listen.names)]
    return frozenset(name.lower() for name in names if name)


class Listeners:
    """Owned by the loop thread. `socket_path` and `clients_path` are the unix sockets: in the data directory, under
    systemd in the runtime directory. Children use `pipe_address`; ("", 0): this node takes none."""

    def __init__(self, loop: Loop, metrics: Metrics, config: Config, trust: NodeTrust, bans: Bans) -> None:
        self._loop, self._metrics, self._config, self._trust, self._bans = loop, metrics, config.listen, trust, bans
        self._insecure = trust.insecure
        self.socket_path, self.clients_path = Path(config.listen.socket), Path(config.listen.unix)
        self._listeners: list[Listener] = []
        self._sockets: list[Path] = []
        # Opens again what waits for a certificate.
        self._waiting: list[Callable[[], None]] = []
        self.tcp_address = self.http_address = self.pipe_address = ("", 0)
        self._pipe: HttpServer | None = None

    def open(self, sessions: Sessions, http: HttpServer, pipe: HttpServer) -> None:
        """Listen; `http` serves administration, `pipe` the nodes below. Raises EdgeBrokerError when an address cannot
        be had; a unix socket that cannot be created is a warning."""

        def accept(channel: Channel, peer: str) -> None:
            if not sessions.accept(channel, peer):
                for listener in clients:
                    listener.rest()

        clients: list[Listener] = []
        self._pipe = pipe

        def open_tcp(address: str) -> None:
            listener = self._listen_tcp("listen.tcp", address, self._for_clients(accept))
            self.tcp_address = listener.address
            clients[:] = [listener]

        def open_pipe(address: str) -> None:
            self.pipe_address = self._listen_tcp("listen.pipe", address, self._for_nodes(pipe.accept)).address

        web = self._listen_tcp("listen.http", self._config.http, plainly(http.accept))
        self.http_address = web.address
        self._open_when_allowed("tcp", self._config.tcp, open_tcp)
        if self._config.pipe:
            self._open_when_allowed("pipe", self._config.pipe, open_pipe)
        if self._insecure:
            self._warn()
        self._listen_unix("listen.unix", self.clients_path, CLIENTS_MODE, accept, KEPT + most_open())
        self._listen_unix("listen.socket", self.socket_path, ADMIN_MODE, http.accept, KEPT_FROM_SOCKET)

    def _open_when_allowed(self, key: str, address: str, open_at: Callable[[str], None]) -> None:
        """At once, or when this node has a certificate."""
        if is_loopback(address) or self._trust.name is not None or self._insecure:
            open_at(address)
            return
        port = address.rpartition(":")[2]
        log.warning("listen.%s = %s waits for a certificate: %s", key, address, HOW_TO_JOIN)
        if key == "tcp":
            open_at(f"127.0.0.1:{port}")
        here = self._listeners[-1] if key == "tcp" else None

        def again() -> None:
            if here is not None:
                here.close()
                self._listeners.remove(here)
            open_at(address)
            log.info("listening on %s with TLS", address)

        self._waiting.append(again)

    def on_identity(self) -> None:
        """There is a certificate: nodes that came without have to come again."""
        if self._pipe is not None:
            self._pipe.shut_out(lambda identity: not identity)
        waiting, self._waiting = self._waiting, []
        for again in waiting:
            try:
                again()
            except EdgeBrokerError as error:
                log.error("%s", error)

    def _for_clients(self, accept: Callable[[Channel, str], None]) -> Opened:
        """TLS for other machines; programs of this one may do without."""

        def opened(sock: socket.socket, peer: str) -> None:
            handshakes = self._trust.handshakes
            if self._bans.refuses(peer):
                self._metrics.connections_refused += 1
                sock.close()
            elif handshakes is None:
                accept(tuned(sock), peer)
            else:
                tune(sock)
                plain = (lambda: accept(PlainChannel(sock), peer)) if is_local(peer) or self._insecure else None
                handshakes.serve(sock, peer, accept, plain)

        return opened

    def _for_nodes(self, accept: Callable[[Channel, str], None]) -> Opened:
        """TLS, in a fleet."""

        def opened(sock: socket.socket, peer: str) -> None:
            handshakes = self._trust.handshakes
            if handshakes is None:
                accept(PlainChannel(sock), peer)
            else:
                handshakes.serve(sock, peer, accept)

        return opened

    @property
    def has_socket(self) -> bool:
        """Is there a unix socket for administration?"""
        return self.socket_path in self._sockets

    def _warn(self) -> None:
        """At the start, and every hour: a node that everybody may use should be somebody's decision still."""
        self._loop.call_later(WARN_SECONDS, self._warn)
        for key in ("tcp", "pipe"):
            address = getattr(self._config, key)
            if address and not is_loopback(address) and self._trust.name is None:
                log.warning("listen.%s = %s is open to other machines without TLS (%s)", key, address, DEVELOPMENT)

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
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error.strerror)

    def _rested(self) -> None:
        self._metrics.accept_rests += 1
        log.warning("no room for more connections (descriptors or limits.max_connections); accepting again shortly")
