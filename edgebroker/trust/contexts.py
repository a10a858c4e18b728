"""The settings of TLS connections: `ssl` alone, for the serving process as well.

TLS 1.2 at least, the ciphers of OpenSSL, no renegotiation, no compression, no session tickets. Names and addresses are
not checked: stores renumber; who a node is stands in its certificate. When a certificate is valid is not checked by
OpenSSL but by broker/trust, which knows what to do when a clock is wrong.
"""

from __future__ import annotations

import ssl
from pathlib import Path

# X509_V_FLAG_NO_CHECK_TIME
NO_CHECK_TIME = 0x200000


def server_context(certificate: Path, key: Path, root: bytes) -> ssl.SSLContext:
    """Of a listener: a client may show a certificate, which has to be of the fleet then. Raises OSError for files that
    do not belong together."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, root)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0
    return context


def client_context(root: bytes, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Of a connection to a node of the fleet, with this certificate if there is one."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, root)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def unverified_context() -> ssl.SSLContext:
    """To ask somebody for the root certificate, which is checked by other means."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _context(protocol: int, root: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.verify_flags |= NO_CHECK_TIME
    context.load_verify_locations(cadata=root.decode("ascii"))
    return context
