"""Getting a certificate: what a machine with a token does, and a node whose certificate is to be renewed.

    connect to a node, without trust  ->  its root certificate: does the pin fit?  ->  connect again, with trust in it
    ->  POST /v1/trust/join, with a proof of the token that is of no use for another key or another fleet  ->  the files

Nothing of the token is said before it is known whose node that is. Blocks; runs in the helper process.
"""

from __future__ import annotations

import http.client
import ssl
from contextlib import closing
from typing import TypeVar

import msgspec

from edgebroker.common import json
from edgebroker.common.errors import TrustError, UnreachableError
from edgebroker.common.runtime.durable import write_durable
from edgebroker.trust import certificates
from edgebroker.trust.contexts import client_context, unverified_context
from edgebroker.trust.directory import PUBLIC_MODE, TrustDirectory
from edgebroker.trust.keys import digest, make_key, read_key, write_key
from edgebroker.trust.messages import (
    JOIN_PATH,
    ROOT_PATH,
    Certified,
    Chain,
    Join,
    JoinRefusedError,
    JoinRequest,
    RevokedAnswer,
)
from edgebroker.trust.node_name import issuer_in
from edgebroker.trust.records import verify_records
from edgebroker.trust.token import PIN_BYTES, JoinToken, parse_token, proof

T = TypeVar("T")
TIMEOUT_SECONDS = 20.0
MOST_BYTES = 64 << 10


def join(directory: TrustDirectory, wanted: Join) -> Certified:
    """Get a certificate and store it. Raises JoinRefusedError, TrustError, UnreachableError when no address answers."""
    token = parse_token(wanted.token) if wanted.token else None
    directory.create()
    if not directory.key.exists():
        write_key(directory.key, make_key())
    failures: list[str] = []
    for address in wanted.addresses:
        try:
            root = _trusted_root(directory, address, token, wanted.fleet)
            certified = _ask(directory, address, root, token, wanted)
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{address}: {_why(error)}")
            continue
        _store(directory, root, certified, wanted)
        return certified
    raise UnreachableError(
        "; ".join(failures) or "no address of a node of the fleet is known: set pipe.parents or pipe.registry"
    )


def _trusted_root(directory: TrustDirectory, address: str, token: JoinToken | None, fleet: str) -> bytes:
    """The root certificate: as stored, else as the node says it and the token confirms it."""
    if directory.root.exists():
        root = directory.root.read_bytes()
    elif token is None:
        raise TrustError("this node has no certificate of a fleet; join it again with a token (edgebroker join TOKEN)")
    else:
        with closing(_connection(address, unverified_context())) as connection:
            root = _exchange(connection, "GET", ROOT_PATH, b"", Chain).root
    [certificate] = certificates.from_pem(root)
    if token is not None and digest(certificates.public_key(certificate))[:PIN_BYTES] != token.pin:
        raise TrustError(f"{address} is of another fleet than the token, which was not shown to it")
    if fleet and certificates.fleet_of(certificate) != fleet:
        raise TrustError(
            f"{address} is of the fleet {certificates.fleet_of(certificate)}, not of {fleet} (trust.fleet)"
        )
    return root


def _ask(directory: TrustDirectory, address: str, root: bytes, token: JoinToken | None, wanted: Join) -> Certified:
    key = read_key(directory.key)
    csr = certificates.make_request(key)
    with closing(_connection(address, client_context(root))) as connection:
        connection.connect()
        sock = connection.sock
        assert isinstance(sock, ssl.SSLSocket)
        shown = sock.getpeercert(binary_form=True)
        assert shown is not None
        if issuer_in(sock.getpeercert()) in wanted.retired:
            raise OSError(f"{address} has a certificate of an issuer that is retired")
        server = digest(certificates.key_of_certificate(shown))
        request = JoinRequest(
            csr=csr, uid=wanted.uid, name=wanted.name, level=wanted.level, region=wanted.region, server=server
        )
        if token is not None:
            shown_proof = proof(token.key, csr, server, *request.claims())
            request = msgspec.structs.replace(request, token=token.id, proof=shown_proof)
        try:
            return _exchange(connection, "POST", JOIN_PATH, msgspec.json.encode(request), Certified)
        except JoinRefusedError as refused:
            if refused.code != "REVOKED":
                raise
            state = _revoked_state(root, wanted, refused.said)
            if state is None:
                raise JoinRefusedError(f"{address} says that this node was revoked, and does not prove it") from None
            raise JoinRefusedError(str(refused), "ERASE" if state.erase else "REVOKED") from None


def _revoked_state(root: bytes, wanted: Join, data: bytes) -> _State | None:
    """What is signed about a node that was revoked; None when that is not signed, or is not the last word."""
    try:
        said = json.decode(data, RevokedAnswer)
        found = json.decode(said.record.value, _State)
    except msgspec.DecodeError:
        return None
    good = verify_records(root, {said.record.issuer: said.issuer}, [said.record]) == [True]
    good = good and said.record.key == f"revoked/{wanted.uid}" and said.record.issuer not in wanted.retired
    return found if good and found.state == "revoked" and found.serial >= wanted.serial else None


def _store(directory: TrustDirectory, root: bytes, certified: Certified, wanted: Join) -> None:
    """Check what came, and take it into use."""
    leaf, issuer = certificates.from_pem(certified.chain)[:2]
    [authority] = certificates.from_pem(root)
    name = certificates.node_of(leaf)
    mine = digest(read_key(directory.key).public_key()) == digest(certificates.public_key(leaf))
    if not (mine and certificates.signed_by(leaf, issuer) and certificates.signed_by(issuer, authority)):
        raise TrustError("the certificate that came is not for this node, or not of this fleet")
    if (name.uid, name.level, name.region) != (wanted.uid, wanted.level, wanted.region):
        raise TrustError(f"the certificate that came is for {name}")
    if not directory.root.exists():
        write_durable(directory.root, root, mode=PUBLIC_MODE)
    directory.write_certificate(certified.issued, certified.chain)
    directory.forget_token()


def _connection(address: str, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection(address, timeout=TIMEOUT_SECONDS, context=context)


def _exchange(connection: http.client.HTTPSConnection, method: str, path: str, body: bytes, kind: type[T]) -> T:
    headers = {"content-type": "application/json"} if body else {}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read(MOST_BYTES)
    if response.status == 200:
        try:
            return json.decode(data, kind)
        except msgspec.DecodeError as error:
            raise TrustError(f"{connection.host} does not answer as a node does: {error}") from error
    code, why = _said(data)
    if response.status == 403:
        raise JoinRefusedError(why, code if code in ("HELD", "REVOKED") else "JOIN_REFUSED", data)
    raise http.client.HTTPException(why or f"it answered {response.status}")


class _State(msgspec.Struct):
    state: str = ""
    erase: bool = False
    serial: int = 0


class _Said(msgspec.Struct):
    error: str = ""
    code: str = ""


def _said(data: bytes) -> tuple[str, str]:
    try:
        said = json.decode(data, _Said)
    except msgspec.DecodeError:
        return "", ""
    return said.code, said.error


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"no TLS: {error.reason or error}".lower().replace("_", " ")
    return str(getattr(error, "strerror", None) or error)
