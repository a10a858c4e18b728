"""Records of the topic __trust: what is signed, and whether it is by whom it has to be.

A record says something about a kind and a name (its key: `revoked/UID`, `issuer/2`). Its value is JSON with a
`serial`, which grows; its header `sig` has the number of the issuer (u16, big-endian) and a signature over key and
value. A record `issuer/N` needs no header: it is the issuer's certificate, which the root has signed.
"""

from __future__ import annotations

from edgebroker.common.errors import TrustError
from edgebroker.trust import certificates
from edgebroker.trust.keys import PublicKey, verified
from edgebroker.trust.messages import SignedRecord

_PURPOSE = b"edgebroker __trust 1\0"


def signed_text(key: str, value: bytes) -> bytes:
    """What the signature of a record is over."""
    name = key.encode()
    return _PURPOSE + len(name).to_bytes(4, "big") + name + value


def verify_records(root: bytes, issuers: dict[int, bytes], records: list[SignedRecord]) -> list[bool]:
    """Which of these are signed as they should be, by issuers that are known, or that come in these records."""
    [authority] = certificates.from_pem(root)
    keys: dict[int, PublicKey] = {}
    for number, pem in issuers.items():
        _take_issuer(keys, authority, number, pem)
    found = []
    for record in records:
        kind, _, name = record.key.partition("/")
        if kind == "issuer":
            number = int(name) if name.isdecimal() else 0
            found.append(_take_issuer(keys, authority, number, record.value))
            continue
        key = keys.get(record.issuer)
        found.append(key is not None and verified(key, record.signature, signed_text(record.key, record.value)))
    return found


def _take_issuer(keys: dict[int, PublicKey], authority: certificates.Certificate, number: int, pem: bytes) -> bool:
    """Remember the key of an issuer, if the root signed it as this number."""
    try:
        [certificate] = certificates.from_pem(pem)
        if not certificates.signed_by(certificate, authority) or certificates.number_of(certificate) != number:
            return False
        keys[number] = certificates.public_key(certificate)
    except (TrustError, ValueError):
        return False
    return True
