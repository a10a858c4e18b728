"""Whether a release is signed by whom it has to be: minisign's format, prehashed (https://jedisct1.github.io/minisign/).

FILE.minisig    untrusted comment: ...
                base64: "ED", id of the key (8 bytes), Ed25519 over BLAKE2b-512 of FILE (64)
                trusted comment: edgebroker version=0.2.0 data_format=1
                base64: Ed25519 over the signature before and the trusted comment (64)
"""

from __future__ import annotations

import binascii
import hashlib
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.names import printable
from edgebroker.trust.keys import is_signed_by

MOST_BYTES = 4096
_TRUSTED = "trusted comment: "
_ID_BYTES, _SIGNATURE_BYTES = 8, 64


class SignedRelease(NamedTuple):
    """What the signature says that the file is."""

    version: str
    data_format: int


def check_signature(program: Path, signature: Path, keys: Sequence[str]) -> SignedRelease:
    """Is this program signed by one of these keys (minisign's base64)? Raises EdgeBrokerError when it is not."""
    try:
        with signature.open("rb") as file:
            lines = file.read(MOST_BYTES).decode().splitlines()
    except FileNotFoundError as error:
        raise EdgeBrokerError(
            f"{signature} is missing: download it with the release, or name it with --signature FILE"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeBrokerError(f"{signature} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        packed, comment, sealed = b64decode(lines[1], validate=True), lines[2], b64decode(lines[3], validate=True)
    except (IndexError, binascii.Error) as error:
        raise EdgeBrokerError(f"{signature} is not a signature of minisign") from error
    kind, key_id, signed = packed[:2], packed[2 : 2 + _ID_BYTES], packed[2 + _ID_BYTES :]
    if kind != b"ED" or len(signed) != _SIGNATURE_BYTES or not comment.startswith(_TRUSTED):
        raise EdgeBrokerError(f"{signature} is not a signature of minisign in its present form")
    key = next((one[2 + _ID_BYTES :] for one in map(b64decode, keys) if one[2 : 2 + _ID_BYTES] == key_id), None)
    if key is None:
        raise EdgeBrokerError(f"{signature} is by key {key_id[::-1].hex().upper()}, which this release does not know")
    said = comment.removeprefix(_TRUSTED)
    digest = hashlib.blake2b()
    with program.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if not is_signed_by(key, signed, digest.digest()) or not is_signed_by(key, sealed, signed + said.encode()):
        raise EdgeBrokerError(f"{signature} does not fit: the file was changed, or is another one; download both again")
    return _parse(said)


def _parse(said: str) -> SignedRelease:
    name, *pairs = said.split() or [""]
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if name != "edgebroker" or not found.get("version") or not found.get("data_format", "").isdecimal():
        raise EdgeBrokerError(f"the signature is for something else: {printable(said[:100])!r}")
    return SignedRelease(found["version"], int(found["data_format"]))
