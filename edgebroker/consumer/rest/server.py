"""Where an application answers over HTTP: an address, of this machine unless allowed otherwise, and a unix socket."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from edgebroker.common.errors import EdgeBrokerError
from edgebroker.consumer.rest.answers import problem
from edgebroker.network.http.router import Route, Router
from edgebroker.network.http.server import PHRASES, Failed, HttpServer, Response, encoded
from edgebroker.network.io.listener import Listener, listen, listen_unix, plainly
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.receiving import Receiving

log = logging.getLogger(__name__)

SOCKET, SOCKET_MODE = "http.sock", 0o660
# Of requests that are not complete, all connections together; and descriptors that are not for connections.
RECEIVE_BYTES, KEPT_DESCRIPTORS = 8 << 20, 64
SWEEP_SECONDS = 1.0
PROBLEM = "application/problem+json"


class RestServer:
    """Belongs to the loop thread. `names` are those by which this machine may be called, in lower case."""

    def __init__(self, loop: Loop, routes: Sequence[Route], names: frozenset[str]) -> None:
        self._loop, self._receiving = loop, Receiving(loop, RECEIVE_BYTES)
        router = Router(routes, lambda request, right: None, names)
        self._server = HttpServer(loop, self._receiving, router.handle, self._count, router.body_limit, _encoded)
        self._listeners: list[Listener] = []
        self._socket: Path | None = None
        self.requests = 0

    def open(self, address: str, socket: Path) -> tuple[str, int]:
        """Listen; "" is no address. Returns host and port. Raises EdgeBrokerError when the address cannot be had."""
        found = ("", 0)
        if address:
            host, _, port = address.rpartition(":")
            try:
                listener = Listener(
                    self._loop,
                    listen(host.strip("[]"), int(port)),
                    plainly(self._server.accept),
                    _rested,
                    KEPT_DESCRIPTORS,
                )
            except OSError as error:
                raise EdgeBrokerError(
                    f"http = {address} cannot be used: {error.strerror}; choose another address, or none, with --http"
                ) from error
            self._listeners.append(listener)
            found = listener.address
        try:
            unix = listen_unix(socket, SOCKET_MODE)
        except OSError as error:
            log.warning("the socket %s cannot be created: %s; going on without it", socket, error.strerror or error)
        else:
            self._socket = socket
            self._listeners.append(Listener(self._loop, unix, plainly(self._server.accept), _rested))
        self._sweep()
        return found

    def close(self) -> None:
        """Accept nothing more, and end every connection."""
        for listener in self._listeners:
            listener.close()
        self._server.close()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    def _sweep(self) -> None:
        self._loop.call_later(SWEEP_SECONDS, self._sweep)
        self._receiving.sweep()

    def _count(self) -> None:
        self.requests += 1


def _rested() -> None:
    log.warning("no room for more connections (descriptors); accepting again shortly")


def _encoded(response: Response) -> tuple[bytes, str]:
    """Errors as RFC 9457 has them."""
    if isinstance(response.body, Failed):
        return problem(
            response.status, PHRASES.get(response.status, ""), response.body.error, response.body.code
        ), PROBLEM
    return encoded(response)
