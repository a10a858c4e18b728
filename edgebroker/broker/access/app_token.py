"""The token of an application: EBT.ID.SECRET. 256 random bits need no slow digest; nodes know SHA-256 of the secret."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

from edgebroker.trust.token import APP_TOKEN

PREFIX = "EBT"


class AppToken(NamedTuple):
    """`digest` is hexadecimal."""

    id: str
    secret: str
    digest: str

    def __str__(self) -> str:
        return f"{PREFIX}.{self.id}.{self.secret}"


def make_app_token() -> AppToken:
    """A new one."""
    secret = secrets.token_urlsafe(32)
    return AppToken(secrets.token_hex(8), secret, _digest(secret.encode()))


def split_app_token(token: bytes) -> tuple[str, bytes] | None:
    """The id and the secret of what a client sent; None for what is no token."""
    found = APP_TOKEN.match(token)
    return (found[1].decode(), found[2]) if found is not None else None


def has_secret(secret: bytes, digest: str) -> bool:
    """Is this the secret with this digest? Takes as long for every wrong one."""
    return hmac.compare_digest(_digest(secret), digest)


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
