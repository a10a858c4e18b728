"""The files of a node's identity: DATA_DIR/trust. No cryptography here: the serving process reads them as well.

    node.key     the private key; mode 0600, made once
    node.crt     a line about the certificate, the certificate, its issuer
    root.crt     the certificate of the fleet: whom this node trusts
    state        what was learned from the topic __trust, and the newest time that was seen (checksummed)
    token        a join token, until it was used
    erasing      the root said that everything here is to be erased; until that is done
    root.key     only where the fleet was made, until it is taken away: signs issuers
    issuer.pem, joins.db    only where certificates are issued: the issuing key with its certificate, and the book

Each file is replaced as a whole, and node.crt last: a node that has it has the others.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from edgebroker.common.errors import TrustError
from edgebroker.common.runtime.durable import destroy, sync_directory, write_durable
from edgebroker.trust.node_name import NodeName, parse_node_name

FOLDER = "trust"
_LINE = b"edgebroker "
DIRECTORY_MODE, PRIVATE_MODE, PUBLIC_MODE = 0o700, 0o600, 0o640


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """What the serving process has to know of its own certificate. `pin` is that of the fleet, in hex."""

    node: str
    issuer: int
    issued_ms: int
    expires_ms: int
    pin: str


class TrustDirectory:
    """Paths, and what is read and written as a whole."""

    def __init__(self, data_dir: Path) -> None:
        self.path = path = data_dir / FOLDER
        self.key, self.certificate, self.root = path / "node.key", path / "node.crt", path / "root.crt"
        self.state, self.token = path / "state", path / "token"
        self.erasing = path / "erasing"
        self.root_key, self.issuer, self.joins = path / "root.key", path / "issuer.pem", path / "joins.db"

    def create(self) -> None:
        """Make the directory, for the user of the process only."""
        if not self.path.is_dir():
            self.path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            sync_directory(self.path.parent)

    @property
    def issues(self) -> bool:
        """Are certificates issued here?"""
        return self.issuer.exists()

    def identity(self) -> tuple[NodeName, Issued] | None:
        """Who this node is; None while it has no certificate. Raises TrustError for files that cannot be used."""
        try:
            data = self.certificate.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrustError(f"{self.certificate}: {error.strerror}") from error
        line, _, _ = data.partition(b"\n")
        try:
            issued = msgspec.json.decode(line.removeprefix(_LINE), type=Issued)
        except msgspec.DecodeError as error:
            raise TrustError(f"{self.certificate} is damaged") from error
        name = parse_node_name(issued.node)
        if name is None:
            raise TrustError(f"{self.certificate} is not for a node")
        for path in (self.key, self.root):
            if not path.exists():
                raise TrustError(f"{path} is missing")
        if os.stat(self.key).st_mode & 0o077:
            raise TrustError(f"{self.key} can be read by other users; run: chmod 600 {self.key}")
        return name, issued

    def write_certificate(self, issued: Issued, chain: bytes) -> None:
        """Take a certificate and its issuer (PEM) into use: durable when this returns."""
        write_durable(self.certificate, _LINE + msgspec.json.encode(issued) + b"\n" + chain, mode=PUBLIC_MODE)

    def read_token(self) -> str:
        """The token to join with; "" when there is none."""
        try:
            return self.token.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def write_token(self, token: str) -> None:
        self.create()
        write_durable(self.token, token.encode() + b"\n", mode=PRIVATE_MODE)

    def forget_token(self) -> None:
        destroy(self.token)

    def forget_root_key(self) -> None:
        destroy(self.root_key)


def erase_if_told(data_dir: Path, *, told: bool = False) -> bool:
    """Where the root said so (`erasing`, or `told` where that cannot be written): destroy the keys of this node, then
    remove all that is stored here. Goes on where it was interrupted. True when it was done. Raises OSError when
    something cannot be removed; everything else is, and the next attempt goes on."""
    directory = TrustDirectory(data_dir)
    if not told and not directory.erasing.exists():
        return False
    for key in (directory.key, directory.token):
        destroy(key)
    failed: list[OSError] = []
    others = [entry for entry in directory.path.iterdir() if entry != directory.erasing]
    for entry in (*others, *(entry for entry in data_dir.iterdir() if entry != directory.path)):
        _remove(entry, failed)
    sync_directory(data_dir)
    if failed:
        raise failed[0]
    _remove(directory.path, failed)
    sync_directory(data_dir)
    return True


def _remove(path: Path, failed: list[OSError]) -> None:
    """Remove it and all that is in it; what is behind a link stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=lambda function, name, error: failed.append(OSError(*error[1].args)))
        return
    try:
        path.unlink()
    except OSError as error:
        failed.append(error)
