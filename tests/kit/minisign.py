"""Signatures of releases, as minisign makes them."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class SigningKey:
    """A key of releases; `public` is what a build has of it."""

    def __init__(self) -> None:
        self._key, self._id = Ed25519PrivateKey.generate(), os.urandom(8)
        self.public = b64encode(b"Ed" + self._id + self._key.public_key().public_bytes_raw()).decode()

    def sign(self, program: Path, said: str, target: Path | None = None) -> Path:
        """Write the signature of a file beside it, or to another place."""
        signed = self._key.sign(hashlib.blake2b(program.read_bytes()).digest())
        sealed = self._key.sign(signed + said.encode())
        target = target or program.with_name(program.name + ".minisig")
        lines = ["untrusted comment: x", b64encode(b"ED" + self._id + signed).decode()]
        lines += [f"trusted comment: {said}", b64encode(sealed).decode()]
        target.write_text("\n".join(lines) + "\n")
        return target
