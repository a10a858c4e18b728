"""Issuing certificates, at the node that has the issuing key: tokens, who joined with them, who may renew.

joins.db (SQLite, synchronous FULL) has a row for each token and each node. A use of a token is counted before its
certificate is made: a crash in between costs nothing, since the same key gets its certificate without another use.
"""

from __future__ import annotations

import hmac
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.errors import TrustError
from edgebroker.common.levels import LEVELS
from edgebroker.common.names import printable
from edgebroker.common.runtime.durable import write_durable
from edgebroker.trust import certificates
from edgebroker.trust.directory import PRIVATE_MODE, PUBLIC_MODE, Issued, TrustDirectory
from edgebroker.trust.keys import (
    PrivateKey,
    PublicKey,
    digest,
    key_to_pem,
    make_key,
    read_key,
    read_private,
    sign,
    write_key,
)
from edgebroker.trust.messages import (
    Certified,
    FleetBook,
    JoinRefusedError,
    JoinRequest,
    LabelInfo,
    TokenInfo,
    TokenRequest,
    WaitingNode,
)
from edgebroker.trust.node_name import NodeName, contains, is_fleet_name
from edgebroker.trust.token import PIN_BYTES, make_token, proof

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    id BLOB PRIMARY KEY, key BLOB NOT NULL, levels TEXT NOT NULL, region TEXT NOT NULL, label TEXT NOT NULL,
    uses INTEGER NOT NULL, used INTEGER NOT NULL, expires_ms INTEGER NOT NULL, hold INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS nodes (
    uid TEXT PRIMARY KEY, key BLOB NOT NULL, level TEXT NOT NULL, region TEXT NOT NULL, name TEXT NOT NULL,
    token BLOB NOT NULL, joined_ms INTEGER NOT NULL, issued_ms INTEGER NOT NULL, state TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS keys ON nodes (key);
"""
_INSERT = "INSERT OR REPLACE INTO nodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
# Of a node: it waits for approval (a token with hold), may have certificates, or may not have any more.
HELD, JOINED, REVOKED = "held", "joined", "revoked"
MOST_TOKENS = 100_000
# Nodes and labels that are shown.
MOST_SHOWN = 100


class _Token(NamedTuple):
    key: bytes
    levels: str
    region: str
    uses: int
    used: int
    expires_ms: int
    hold: int


class _Node(NamedTuple):
    key: bytes
    level: str
    region: str
    token: bytes
    state: str


def create_fleet(directory: TrustDirectory, fleet: str, uid: str, now_ms: int) -> None:
    """Make a fleet, with this node as its root. Goes on where an earlier attempt ended. Raises TrustError."""
    if not is_fleet_name(fleet):
        raise TrustError(f"a fleet cannot be called {printable(fleet)!r}: use up to 63 of A-Z a-z 0-9 . _ -")
    directory.create()
    if directory.root.exists():
        known = certificates.fleet_of(_root(directory))
        if known != fleet:
            raise TrustError(f"this node belongs to the fleet {known} already")
        if directory.certificate.exists():
            return
        if not directory.root_key.exists():
            raise TrustError(f"this node has joined the fleet {known}; its root is another node")
    if not directory.root_key.exists():
        write_key(directory.root_key, make_key())
    root_key = read_key(directory.root_key)
    if not directory.root.exists():
        root = certificates.make_root(fleet, root_key, now_ms)
        write_durable(directory.root, certificates.to_pem(root), mode=PUBLIC_MODE)
    if not directory.issuer.exists():
        _make_issuer(directory, root_key, 1, now_ms)
    if not directory.key.exists():
        write_key(directory.key, make_key())
    issuer = Issuer(directory)
    renew_own(directory, issuer, uid, now_ms)
    issuer.close()


def renew_own(directory: TrustDirectory, issuer: Issuer, uid: str, now_ms: int) -> Certified:
    """Give the node that issues certificates one for itself, and take it into use."""
    found = directory.identity() if directory.certificate.exists() else None
    name = found[0] if found is not None else NodeName(issuer.fleet, "root", "", uid)
    certified = issuer.admit(name, read_key(directory.key).public_key(), now_ms)
    directory.write_certificate(certified.issued, certified.chain)
    return certified


def rotate(directory: TrustDirectory, now_ms: int) -> int:
    """Make another issuer, which signs from now on; its number. The root key has to be here. Raises TrustError."""
    if not directory.root_key.exists():
        raise TrustError(
            "the root key is not here: name the file that has it (edgebroker fleet rotate --root-key FILE)"
        )
    [issuer] = certificates.from_pem(read_private(directory.issuer))
    number = certificates.number_of(issuer) + 1
    _make_issuer(directory, read_key(directory.root_key), number, now_ms)
    return number


def export_root_key(directory: TrustDirectory, target: Path, passphrase: bytes) -> None:
    """Move the root key into a file that needs the passphrase: durable, and read back, before the key here is
    destroyed. Raises TrustError: there is none, or the file exists."""
    if target.exists():
        raise TrustError(f"{target} exists: name a file that does not")
    if not directory.root_key.exists():
        raise TrustError("the root key is not here; it was taken away, or this node is not the root of its fleet")
    key = read_key(directory.root_key)
    try:
        write_durable(target, key_to_pem(key, passphrase), mode=PRIVATE_MODE)
        _require_root_key(directory, target, passphrase)
    except OSError as error:
        raise TrustError(f"{target}: {error.strerror}; the root key is where it was") from error
    except TrustError:
        target.unlink()
        raise
    directory.forget_root_key()


def import_root_key(directory: TrustDirectory, source: Path, passphrase: bytes) -> None:
    """Put the root key of this fleet back from such a file, for the user of the directory. Raises TrustError."""
    key = _require_root_key(directory, source, passphrase)
    try:
        write_key(directory.root_key, key)
        owner = directory.path.stat()
        os.chown(directory.root_key, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise TrustError(f"{error.filename or directory.path}: {error.strerror}") from error


def _require_root_key(directory: TrustDirectory, path: Path, passphrase: bytes) -> PrivateKey:
    """The key in a file. Raises TrustError when it is not that of this fleet."""
    key = read_key(path, passphrase)
    if digest(key.public_key()) != digest(certificates.public_key(_root(directory))):
        raise TrustError(f"{path} has the key of another fleet")
    return key


def _make_issuer(directory: TrustDirectory, root_key: PrivateKey, number: int, now_ms: int) -> None:
    """Replace the issuing key and its certificate, in one step."""
    key = make_key()
    certificate = certificates.make_issuer(_root(directory), root_key, number, key.public_key(), now_ms)
    write_key(directory.issuer, key, certificates.to_pem(certificate))


def _root(directory: TrustDirectory) -> certificates.Certificate:
    return certificates.from_pem(directory.root.read_bytes())[0]


class Issuer:
    """The issuing key and its book. Belongs to one process at a time."""

    def __init__(self, directory: TrustDirectory) -> None:
        self._key = read_key(directory.issuer)
        [self._certificate] = certificates.from_pem(read_private(directory.issuer))
        self._root = _root(directory)
        if not certificates.signed_by(self._certificate, self._root):
            raise TrustError(f"{directory.issuer} and {directory.root} do not belong together")
        self.fleet = certificates.fleet_of(self._root)
        self.pin = digest(certificates.public_key(self._root))[:PIN_BYTES]
        self._database = sqlite3.connect(directory.joins, isolation_level=None)
        self._database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + _SCHEMA)

    def close(self) -> None:
        self._database.close()

    def admit(self, name: NodeName, key: PublicKey, now_ms: int) -> Certified:
        """Enter a node into the book without a token, and give it a certificate."""
        row = (name.uid, digest(key), name.level, name.region, name.uid, b"", now_ms, now_ms, JOINED)
        self._database.execute(_INSERT, row)
        return self.certify(name, key, now_ms)

    def certify(self, name: NodeName, key: PublicKey, now_ms: int) -> Certified:
        """A certificate for a node that may have one."""
        made = certificates.make_node(self._certificate, self._key, name, key, now_ms)
        issued = Issued(
            node=str(name),
            issuer=self.number,
            issued_ms=now_ms,
            expires_ms=certificates.expires_ms(made),
            pin=self.pin.hex(),
        )
        return Certified(
            issued=issued,
            chain=certificates.to_pem(made) + self.certificate_pem,
            root=certificates.to_pem(self._root),
        )

    # ---- tokens ----

    def create_tokens(self, wanted: Sequence[TokenRequest]) -> list[str]:
        """One for each of these, all or none. Raises TrustError for a token that no node could use."""
        for one in wanted:
            if set(one.levels).difference(LEVELS[1:]):
                raise TrustError(f"levels of a token are of {', '.join(LEVELS[1:])}")
        [(count,)] = self._database.execute("SELECT count(*) FROM tokens")
        if count + len(wanted) > MOST_TOKENS:
            raise TrustError(f"there may be {MOST_TOKENS} tokens; revoke some (edgebroker token revoke)")
        made = [make_token(self.pin) for _ in wanted]
        with self._transaction():
            for token, one in zip(made, wanted, strict=True):
                row = (token.id, token.key, ",".join(one.levels), one.region, one.label, one.uses, 0, one.expires_ms)
                self._database.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, one.hold))
        return [str(token) for token in made]

    def tokens(self) -> list[TokenInfo]:
        rows = self._database.execute(
            "SELECT id, levels, region, label, uses, used, expires_ms, hold FROM tokens ORDER BY label, region, id"
        )
        return [
            TokenInfo(
                id=id.hex(),
                levels=levels.split(","),
                region=region,
                label=label,
                uses=uses,
                used=used,
                expires_ms=expires,
                hold=bool(hold),
            )
            for id, levels, region, label, uses, used, expires, hold in rows
        ]

    def revoke_token(self, id: str) -> None:
        """Nodes that joined with it stay. Raises TrustError when there is none."""
        done = self._database.execute("DELETE FROM tokens WHERE lower(hex(id)) = ?", (id.lower(),))
        if not done.rowcount:
            raise TrustError(f"there is no token {id}")

    # ---- nodes ----

    def join(self, request: JoinRequest, now_ms: int) -> Certified:
        """The certificate of a node that has a token, or had one for the same key. Raises JoinRefusedError."""
        try:
            key = certificates.key_of_request(request.csr)
        except TrustError as error:
            raise JoinRefusedError(str(error)) from error
        node = self._node(request.uid)
        if node is not None and node.key == digest(key):
            return self._renewed(request, node, key, now_ms)
        if not request.token:
            raise JoinRefusedError(f"node {request.uid} is not known here with this key; it needs a token")
        token = self._usable(request, now_ms)
        if node is not None and node.state != REVOKED:
            raise JoinRefusedError(
                f"node {request.uid} has another key; if this is the same machine, revoke that node, or give this one "
                "an empty data directory"
            )
        if node is not None:
            raise JoinRefusedError(
                f"node {request.uid} was revoked; approve it (edgebroker node approve), or empty its directory"
            )
        state = HELD if token.hold else JOINED
        with self._transaction():
            self._database.execute("UPDATE tokens SET used = used + 1 WHERE id = ?", (request.token,))
            self._database.execute(
                "INSERT INTO nodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    request.uid,
                    digest(key),
                    request.level,
                    request.region,
                    request.name,
                    request.token,
                    now_ms,
                    now_ms,
                    state,
                ),
            )
        if state == HELD:
            raise JoinRefusedError("it waits for approval (edgebroker node approve)", "HELD")
        return self.certify(NodeName(self.fleet, request.level, request.region, request.uid), key, now_ms)

    def _renewed(self, request: JoinRequest, node: _Node, key: PublicKey, now_ms: int) -> Certified:
        if node.state == REVOKED:
            raise JoinRefusedError(f"node {request.uid} was revoked", "REVOKED")
        if node.state == HELD:
            raise JoinRefusedError("it waits for approval (edgebroker node approve)", "HELD")
        if (request.level, request.region) != (node.level, node.region):
            raise JoinRefusedError(
                f"node {request.uid} joined as {node.level} in {node.region or 'every region'}; as something else it "
                "needs a data directory and a token of its own"
            )
        self._database.execute(
            "UPDATE nodes SET issued_ms = ?, name = ? WHERE uid = ?", (now_ms, request.name, request.uid)
        )
        return self.certify(NodeName(self.fleet, node.level, node.region, request.uid), key, now_ms)

    def _usable(self, request: JoinRequest, now_ms: int) -> _Token:
        """The token that a request proves to have. Raises JoinRefusedError."""
        row = self._database.execute(
            "SELECT key, levels, region, uses, used, expires_ms, hold FROM tokens WHERE id = ?", (request.token,)
        ).fetchone()
        if row is None:
            raise JoinRefusedError("the token is not known here: it was revoked, or is of another fleet")
        token = _Token(*row)
        wanted = proof(token.key, request.csr, request.server, *request.claims())
        if not hmac.compare_digest(wanted, request.proof):
            raise JoinRefusedError("the proof does not fit the token")
        known = self._database.execute("SELECT state FROM nodes WHERE key = ?", (request.server,)).fetchone()
        if known != (JOINED,):
            raise JoinRefusedError("it asked through something that is not a node of this fleet")
        if token.expires_ms and now_ms > token.expires_ms:
            raise JoinRefusedError("the token has expired")
        if token.used >= token.uses:
            raise JoinRefusedError(f"the token is used up: {token.uses} nodes have joined with it")
        if request.level not in token.levels.split(","):
            raise JoinRefusedError(f"the token is not for level {request.level}, only for {token.levels}")
        if not contains(token.region, request.region):
            raise JoinRefusedError(
                f"the token is for region {token.region}, not for {printable(request.region) or 'every region'}"
            )
        return token

    def _node(self, uid: str) -> _Node | None:
        row = self._database.execute(
            "SELECT key, level, region, token, state FROM nodes WHERE uid = ?", (uid,)
        ).fetchone()
        return _Node(*row) if row is not None else None

    def set_state(self, nodes: Sequence[str], state: str) -> list[str]:
        """Revoke or approve nodes, by name or uid: their uids. Raises TrustError when one is not known, or several have
        its name; nothing is changed then."""
        uids = [self._uid_of(node) for node in nodes]
        if state == REVOKED and any(known.level == "root" for uid in uids if (known := self._node(uid)) is not None):
            raise TrustError("the root of the fleet cannot be revoked")
        with self._transaction():
            self._database.executemany("UPDATE nodes SET state = ? WHERE uid = ?", [(state, uid) for uid in uids])
        return uids

    def view(self) -> FleetBook:
        """The fleet as the book has it."""
        states = dict(self._database.execute("SELECT state, count(*) FROM nodes GROUP BY state"))
        waiting = self._database.execute(
            "SELECT uid, name, level, region FROM nodes WHERE state = ? ORDER BY joined_ms LIMIT ?", (HELD, MOST_SHOWN)
        )
        labels = self._database.execute(
            "SELECT label, sum(used), sum(uses) FROM tokens GROUP BY label ORDER BY label LIMIT ?", (MOST_SHOWN,)
        )
        return FleetBook(
            joined=states.get(JOINED, 0),
            held=states.get(HELD, 0),
            revoked=states.get(REVOKED, 0),
            waiting=[
                WaitingNode(uid=uid, name=name, level=level, region=region) for uid, name, level, region in waiting
            ],
            labels=[LabelInfo(label=label, joined=joined, uses=uses) for label, joined, uses in labels],
        )

    def _uid_of(self, node: str) -> str:
        rows = self._database.execute("SELECT uid FROM nodes WHERE uid = ? OR name = ?", (node, node)).fetchall()
        if not rows:
            raise TrustError(f"no node {printable(node)} has joined")
        if len(rows) > 1:
            raise TrustError(f"{len(rows)} nodes are called {printable(node)}; use the uid")
        return str(rows[0][0])

    @property
    def number(self) -> int:
        return certificates.number_of(self._certificate)

    @property
    def certificate_pem(self) -> bytes:
        return certificates.to_pem(self._certificate)

    def sign(self, data: bytes) -> bytes:
        """With the issuing key."""
        return sign(self._key, data)

    def _transaction(self) -> sqlite3.Connection:
        self._database.execute("BEGIN IMMEDIATE")
        return self._database
