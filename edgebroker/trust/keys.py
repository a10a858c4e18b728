"""Keys and signatures, by `cryptography`: ECDSA on P-256 with SHA-256 in a fleet, Ed25519 of releases."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from edgebroker.common.errors import TrustError
from edgebroker.common.runtime.durable import write_durable
from edgebroker.trust.directory import PRIVATE_MODE

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
_ECDSA = ec.ECDSA(hashes.SHA256())


def make_key() -> PrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: PrivateKey, passphrase: bytes = b"") -> bytes:
    """Encrypted when there is a passphrase."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def write_key(path: Path, key: PrivateKey, certificate: bytes = b"") -> None:
    """Store a key, and its certificate (PEM) behind it; durably, for the user of the process only."""
    write_durable(path, key_to_pem(key) + certificate, mode=PRIVATE_MODE)


def read_private(path: Path) -> bytes:
    """A file that only the user of the process may read. Raises TrustError."""
    try:
        mode, data = os.stat(path).st_mode, path.read_bytes()
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror}") from error
    if mode & 0o077:
        raise TrustError(f"{path} can be read by other users; run: chmod 600 {path}")
    return data


def read_key(path: Path, passphrase: bytes = b"") -> PrivateKey:
    """Raises TrustError when there is none, when others may read it, and when it is damaged."""
    try:
        key = serialization.load_pem_private_key(read_private(path), passphrase or None)
    except TypeError as error:
        raise TrustError(f"{path}: the key has {'no' if passphrase else 'a'} passphrase") from error
    except ValueError as error:
        raise TrustError(f"{path} does not hold a key, or the passphrase is wrong") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{path} does not hold a key of the right kind")
    return key


def spki(key: PublicKey) -> bytes:
    """The public key as certificates hold it (SubjectPublicKeyInfo, DER)."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def digest(key: PublicKey) -> bytes:
    """SHA-256 over the public key: 32 bytes."""
    return hashlib.sha256(spki(key)).digest()


def sign(key: PrivateKey, data: bytes) -> bytes:
    return key.sign(data, _ECDSA)


def verified(key: PublicKey, signature: bytes, data: bytes) -> bool:
    """Is this the key's signature of the data?"""
    try:
        key.verify(signature, data, _ECDSA)
    except InvalidSignature:
        return False
    return True


def is_signed_by(public: bytes, signature: bytes, data: bytes) -> bool:
    """Ed25519: is this the signature over data by the key with these 32 bytes?"""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
