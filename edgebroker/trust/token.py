"""Join tokens: what an operator gives a machine so that it can become a node of the fleet.

EB1 and 80 letters of base32 (RFC 4648): 16 bytes of the pin, 8 of the token's id, 24 of its secret, 2 of a checksum.
Case does not matter, nor do spaces and dashes. The pin is the beginning of the SHA-256 over the public key of the root
certificate, which never changes: whoever has a token knows its fleet before it says anything to it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from typing import NamedTuple

from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import TrustError

PREFIX = "EB1"
# The token of an application: EBT.ID.SECRET.
APP_TOKEN = re.compile(rb"EBT\.([0-9a-f]{16})\.([A-Za-z0-9_-]{43})\Z")
PIN_BYTES, ID_BYTES, SECRET_BYTES, CHECK_BYTES = 16, 8, 24, 2


class JoinToken(NamedTuple):
    pin: bytes
    id: bytes
    secret: bytes

    @property
    def key(self) -> bytes:
        """What the fleet remembers of the secret."""
        return key_of(self.secret)

    def __str__(self) -> str:
        data = self.pin + self.id + self.secret
        return PREFIX + base64.b32encode(data + _check(data)).decode()


def make_token(pin: bytes) -> JoinToken:
    return JoinToken(pin[:PIN_BYTES], os.urandom(ID_BYTES), os.urandom(SECRET_BYTES))


def parse_token(text: str) -> JoinToken:
    """Raises TrustError for what is not a token, also when a letter of it is wrong."""
    plain = "".join(text.upper().split()).replace("-", "")
    try:
        data = base64.b32decode(plain.removeprefix(PREFIX))
    except (binascii.Error, ValueError):
        data = b""
    body, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
    if not plain.startswith(PREFIX) or len(body) != PIN_BYTES + ID_BYTES + SECRET_BYTES or check != _check(body):
        raise TrustError("this is not a join token, or not all of it: it begins with EB1 and has 83 letters and digits")
    return JoinToken(body[:PIN_BYTES], body[PIN_BYTES : PIN_BYTES + ID_BYTES], body[PIN_BYTES + ID_BYTES :])


def key_of(secret: bytes) -> bytes:
    """SHA-256: a secret of 192 random bits needs nothing slower."""
    return hashlib.sha256(secret).digest()


def proof(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA-256 over these, each with its length before it: made by whoever has the token."""
    return hmac.new(key, b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256").digest()


def _check(data: bytes) -> bytes:
    return crc32c(data).to_bytes(4, "big")[:CHECK_BYTES]
