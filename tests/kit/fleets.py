"""Fleets for tests: the files of nodes that have joined, made without asking anybody."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgebroker.common.runtime.clock import SystemClock
from edgebroker.trust import certificates
from edgebroker.trust.contexts import client_context, server_context
from edgebroker.trust.directory import TrustDirectory
from edgebroker.trust.issuing import Issuer, create_fleet
from edgebroker.trust.keys import digest, make_key, read_key, write_key
from edgebroker.trust.messages import Certified, JoinRequest, TokenRequest
from edgebroker.trust.node_name import NodeName
from edgebroker.trust.token import parse_token, proof

NOW_MS = SystemClock().wall_ms()
ROOT_UID = "0" * 32


class Machine(NamedTuple):
    """A machine that may join: its directory, and what it asks for."""

    directory: TrustDirectory
    uid: str
    level: str
    region: str

    @property
    def server(self) -> ssl.SSLContext:
        return server_context(self.directory.certificate, self.directory.key, self.directory.root.read_bytes())

    @property
    def client(self) -> ssl.SSLContext:
        return client_context(self.directory.root.read_bytes(), self.directory.certificate, self.directory.key)


class TestFleet:
    """A fleet with a root; join() lets machines in as its root does over the network."""

    __test__ = False

    def __init__(self, path: Path, name: str = "acme", now_ms: int = NOW_MS) -> None:
        self.path, self.name = path, name
        self.root = Machine(TrustDirectory(path / "root"), ROOT_UID, "root", "")
        create_fleet(self.root.directory, name, ROOT_UID, now_ms)
        self.issuer = Issuer(self.root.directory)

    def machine(self, uid: str, level: str = "local", region: str = "eu/1") -> Machine:
        """One with a key of its own."""
        found = Machine(TrustDirectory(self.path / uid), uid, level, region)
        found.directory.create()
        if not found.directory.key.exists():
            write_key(found.directory.key, make_key())
        return found

    def token(self, **wanted: object) -> str:
        defaults = {"levels": ["l2", "l3", "pos", "local"], "uses": 10}
        return self.issuer.create_tokens([msgspec.convert({**defaults, **wanted}, TokenRequest)])[0]

    def request(self, machine: Machine, token: str, **changes: object) -> JoinRequest:
        """What a machine sends, with changes made after the proof."""
        csr = certificates.make_request(read_key(machine.directory.key))
        server = digest(read_key(self.root.directory.key).public_key())
        request = JoinRequest(
            csr=csr, uid=machine.uid, name="x", level=machine.level, region=machine.region, server=server
        )
        if token:
            parsed = parse_token(token)
            shown = proof(parsed.key, csr, server, *request.claims())
            request = msgspec.structs.replace(request, token=parsed.id, proof=shown)
        return msgspec.structs.replace(request, **changes)

    def join(self, machine: Machine, token: str = "", now_ms: int = NOW_MS) -> Certified:
        """Ask, and take what comes into use. Raises JoinRefusedError."""
        certified = self.issuer.join(self.request(machine, token), now_ms)
        self.store(machine, certified)
        return certified

    def admit(self, uid: str, level: str = "local", region: str = "eu/1", now_ms: int = NOW_MS) -> Machine:
        """A machine that has joined already."""
        machine = self.machine(uid, level, region)
        key = read_key(machine.directory.key).public_key()
        self.store(machine, self.issuer.admit(NodeName(self.name, level, region, uid), key, now_ms))
        return machine

    def store(self, machine: Machine, certified: Certified) -> None:
        machine.directory.root.write_bytes(certified.root)
        machine.directory.write_certificate(certified.issued, certified.chain)
