"""A copy of the registry at the hubs next to its node: what makes one of them the next root.

    registry   what operators decided, the hubs, directives without an answer -> RegistryCopy, with a digest
    standby    is told the digest down the pipe -> fetches the copy from its parent -> file `standby` -> its report
    promoted   keeps the registry from then on -> tells the hubs that followed the lost node where it is

The file is replaced as a whole. A hub that is told of a promotion goes there only if the registry had named that
address to it before, and if it has no parent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.broker.fleet.pending_directives import StoredDirective
from edgebroker.common import json
from edgebroker.common.crc32c import crc32c
from edgebroker.common.runtime.threads import Worker
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.peers import Peers
from edgebroker.pipe.report import Report, StandbyDirective
from edgebroker.storage.checksummed import read_if_whole, write_checked

log = logging.getLogger(__name__)

FILE_NAME = "standby"
COPY_PATH = "/v1/registry/copy"
MOST_COPY_BYTES = 32 << 20
# How often, and for how long, the hubs that followed the lost node are told where its successor is.
TELL_SECONDS, TELL_FOR_SECONDS = 2.0, 600.0
MOST_TOLD = 256


class RegistryCopy(msgspec.Struct, frozen=True, kw_only=True):
    """What the node `root` knew as the keeper of the registry. `hubs` are the nodes with an address for children, each
    with what lasts of its report; `removed` are runs of nodes that operators removed."""

    digest: int
    root: str
    hubs: list[Report]
    pins: dict[str, list[str]]
    draining: list[str]
    removed: dict[str, str]
    directives: list[StoredDirective]


class Promoted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/promoted: a node was promoted, and children reach it at this address."""

    address: Annotated[str, Meta(max_length=300)]


class StandbyStatus(msgspec.Struct):
    """What a standby holds: the node that keeps the registry ("": no copy), and the hubs that follow it."""

    root: str
    hubs: list[StandbyHub]


class StandbyHub(msgspec.Struct):
    """A hub of the copy."""

    uid: str
    name: str
    address: str


class _Digest(msgspec.Struct):
    digest: int = 0


def make_copy(
    root: str,
    hubs: list[Report],
    pins: dict[str, list[str]],
    draining: set[str],
    removed: dict[str, str],
    directives: list[StoredDirective],
) -> RegistryCopy:
    """The copy with its digest, which the time that is left to directives does not change."""
    ids = sorted(stored.directive.id for stored in directives)
    lasting = (root, hubs, pins, sorted(draining), removed, ids)
    return RegistryCopy(
        digest=crc32c(msgspec.json.encode(lasting)) or 1,
        root=root,
        hubs=hubs,
        pins=pins,
        draining=sorted(draining),
        removed=removed,
        directives=directives,
    )


class Standby:
    """Owned by the loop thread. `parent` tells the parent's uid and address, ("", "") while there is none; `kept` is
    called when another copy was stored."""

    def __init__(
        self, directory: Path, peers: Peers, parent: Callable[[], tuple[str, str]], kept: Callable[[], None]
    ) -> None:
        self.path, self._parent, self._kept = directory / FILE_NAME, parent, kept
        self._peers, self._loop = peers, peers.loop
        self.digest = 0
        self._call: HttpCall | None = None
        self._worker: Worker | None = None
        self._stopped = False

    def start(self) -> None:
        """Remember what an earlier run stored. Blocks for a moment."""
        self.digest = read_if_whole(self.path, _Digest, _Digest()).digest

    def stop(self) -> None:
        self._stopped = True
        if self._call is not None:
            self._call.stop()
        if self._worker is not None:
            self._worker.stop(5.0)

    def load(self) -> RegistryCopy | None:
        """The copy; None when there is none. Blocks for a moment."""
        return read_if_whole(self.path, RegistryCopy | None, None)  # type: ignore[arg-type]  # a union

    def wanted(self, directive: StandbyDirective) -> None:
        """The parent keeps the registry, and has a newer copy."""
        uid, address = self._parent()
        if directive.digest == self.digest or self._call is not None or not address:
            return

        def told(status: int, answer: bytes, error: str) -> None:
            self._call = None
            if self._stopped:
                return
            try:
                copy = json.decode(answer, RegistryCopy) if not error else None
            except msgspec.DecodeError as wrong:
                copy, error = None, str(wrong)
            if copy is None or copy.root != uid:
                log.warning("no copy of the registry from %s: %s", address, error or "it keeps none of its own")
            else:
                self._store(copy)

        self._call = HttpCall(self._peers, address, "POST", COPY_PATH, b"", told, most_bytes=MOST_COPY_BYTES)

    def _store(self, copy: RegistryCopy) -> None:
        if self._worker is None:
            self._worker = Worker("standby")

        def work() -> None:
            try:
                write_checked(self.path, copy)
            except OSError as error:
                log.error("the copy of the registry cannot be stored: %s", error)
            else:
                self._loop.call_soon_threadsafe(lambda: stored(copy.digest))

        def stored(digest: int) -> None:
            self.digest = digest
            self._kept()

        self._worker.submit(work)

    def describe(self) -> StandbyStatus:
        """For who thinks about a promotion. Blocks for a moment."""
        copy = self.load()
        if copy is None:
            return StandbyStatus("", [])
        followers = [hub for hub in copy.hubs if hub.parent == copy.root]
        return StandbyStatus(copy.root, [StandbyHub(hub.uid, hub.name, hub.address) for hub in followers])


class Succession:
    """Tells the hubs that followed a lost node where its successor is, until they follow that. Owned by the loop
    thread; `follows` says whether a hub is a child now."""

    def __init__(self, peers: Peers, address: str, hubs: dict[str, str], follows: Callable[[str], bool]) -> None:
        self._follows, self._left = follows, dict(list(hubs.items())[:MOST_TOLD])
        self._peers, self._loop = peers, peers.loop
        self._body = msgspec.json.encode(Promoted(address=address))
        self._until = self._loop.now() + TELL_FOR_SECONDS
        self._stopped = False
        self._tell()

    def stop(self) -> None:
        self._stopped = True

    def _tell(self) -> None:
        self._left = {uid: address for uid, address in self._left.items() if not self._follows(uid)}
        if self._stopped or not self._left or self._loop.now() >= self._until:
            return
        for address in self._left.values():
            HttpCall(self._peers, address, "POST", "/v1/promoted", self._body, lambda *told: None)
        self._loop.call_later(TELL_SECONDS, self._tell)
