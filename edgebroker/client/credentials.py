"""Who a client is at brokers of other machines: the file that `edgebroker token create --app NAME` writes.

    EBT.ID.SECRET                     the token
    -----BEGIN CERTIFICATE----- ...   the certificate of the fleet: only nodes of it are spoken to, with TLS

The first line alone is enough for a broker of the same machine.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from edgebroker.common.errors import ArgumentError
from edgebroker.network.io.channel import Channel, PlainChannel, tuned
from edgebroker.trust.token import APP_TOKEN

if TYPE_CHECKING:
    import ssl

VARIABLE = "EDGEBROKER_CREDENTIALS"
MOST_BYTES = 64 << 10
_BEGIN = b"-----BEGIN CERTIFICATE-----"


class Credentials:
    """`token` goes to the broker with CONNECT; `root` is the certificate of the fleet (PEM), b"" where there is none.
    Raises ArgumentError for a certificate that cannot be used."""

    def __init__(self, token: bytes = b"", root: bytes = b"") -> None:
        self.token = token
        self._context: ssl.SSLContext | None = None
        if root:
            from edgebroker.trust.contexts import client_context

            try:
                self._context = client_context(root)
            except (OSError, ValueError) as error:
                raise ArgumentError(f"the certificate in the credentials cannot be read: {error}") from error

    @property
    def secure(self) -> bool:
        """Is TLS spoken?"""
        return self._context is not None

    def channel(self, sock: socket.socket) -> Channel:
        """What a connected socket becomes. Waits for the TLS handshake as long as the timeout of the socket says, and
        owns the socket from now on. Raises OSError for a peer that is not a node of the fleet."""
        if self._context is None or sock.family == socket.AF_UNIX:
            return PlainChannel(sock) if sock.family == socket.AF_UNIX else tuned(sock)
        from edgebroker.network.io.tls import open_channel
        from edgebroker.trust.node_name import name_in

        return open_channel(sock, self._context, name_in)


def read_credentials(path: str | Path) -> Credentials:
    """The credentials in a file; "" is that of $EDGEBROKER_CREDENTIALS, or none. Raises ArgumentError."""
    path = path or os.environ.get(VARIABLE, "")
    if not path:
        return Credentials()
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ArgumentError(f"credentials {str(path)!r} cannot be read: {error.strerror}") from error
    token, _, rest = data.partition(b"\n")
    root = rest.strip()
    if not APP_TOKEN.match(token.strip()) or (root and not root.startswith(_BEGIN)) or len(data) > MOST_BYTES:
        raise ArgumentError(
            f"credentials {str(path)!r} are not those of an application; write them with: edgebroker token create "
            "--app NAME"
        )
    return Credentials(token.strip(), root)
