"""How this node reaches other nodes: under TLS with its certificate where it has one; else in the clear, which is for
loopback, and for development."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgebroker.network.http.client import RECEIVE_BYTES, HttpClient, HttpOwner
from edgebroker.network.io.channel import Channel, tune, tuned
from edgebroker.network.io.loop import Loop

if TYPE_CHECKING:
    from edgebroker.network.io.tls import Handshakes

# Longer than a parent with nothing to say is silent: a healthy line costs no probes.
KEEPALIVE_SECONDS = 50


class Peers:
    """Owned by the loop thread. `secure` makes TLS connections; `open` allows connections in the clear to anywhere."""

    def __init__(self, loop: Loop, *, open: bool) -> None:
        self.loop, self._open = loop, open
        self.secure: Handshakes | None = None
        # Why a node with this identity, which says that it has this uid, cannot be a parent; "" when it can.
        self.parent_refusal: Callable[[str, str], str] = lambda identity, uid: ""

    def client(self, owner: HttpOwner, receive_bytes: int = RECEIVE_BYTES) -> HttpClient:
        """A connection to a node that asks for one thing after the other."""
        return HttpClient(self.loop, owner, receive_bytes, self._begin)

    def _begin(
        self, sock: socket.socket, host: str, done: Callable[[Channel | None, str], None]
    ) -> Callable[[str], None] | None:
        """A connection stands: done() with its channel, now or later. Returns what gives it up meanwhile."""
        if self.secure is not None:
            tune(sock, KEEPALIVE_SECONDS)
            return self.secure.connect(sock, done)
        if not self._open and not ipaddress.ip_address(host).is_loopback:
            sock.close()
            done(None, "this node has no certificate, and asks no other machine without one: edgebroker join TOKEN")
        else:
            done(tuned(sock, KEEPALIVE_SECONDS), "")
        return None
