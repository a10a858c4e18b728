"""Digests of stored batches, for comparing two nodes: POST /v1/pipe/digest (`edgebroker verify --against`).

The bytes are read again and every batch is checked, a piece at a time through the reader thread; what is damaged is
named, and noted as damage of the log.
"""

from __future__ import annotations

import msgspec

from edgebroker.broker.feed.ranges import PIECE_BYTES, find_range, too_many
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log import segscan
from edgebroker.storage.types import ColdRead

MOST_BYTES = 64 << 20
MOST_AT_ONCE = 4


class Digests:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running = 0

    def answer(self, call: Call) -> None:
        found = find_range(self.engine, call)
        if found is None:
            return
        if self.running >= MOST_AT_ONCE:
            too_many(call, f"{MOST_AT_ONCE} digests are being made")
        else:
            partition, wanted = found
            Digest(self, partition, wanted.first, wanted.next, call).advance()


class DigestAnswer(msgspec.Struct):
    """The digest of the batches in [first, next); `next` is where it ended, `damaged` the corrupt offsets in it."""

    next: int
    bytes: int
    sha256: str
    damaged: list[tuple[int, int]]


class Digest:
    """One answer: the SHA-256 over the batches that begin in [first, next), or in as much of it as MOST_BYTES are; a
    damaged place counts as such."""

    def __init__(self, digests: Digests, partition: Log, first: int, end: int, call: Call) -> None:
        self._digests, self._log, self._offset, self._next = digests, partition, first, end
        self._call = call
        # Here, since it brings OpenSSL along: 3.7 MiB that a node which is never compared need not have.
        from hashlib import sha256

        self._sum = sha256()
        self._bytes = 0
        self._damaged: list[tuple[int, int]] = []
        digests.running += 1

    def advance(self) -> None:
        if self._offset < self._next and self._bytes < MOST_BYTES:
            self._digests.engine.read_cold(self._log, self._offset, PIECE_BYTES, self._read)
            return
        self._digests.running -= 1
        self._call.answer(DigestAnswer(self._offset, self._bytes, self._sum.hexdigest(), self._damaged))

    def _read(self, result: ColdRead) -> None:
        if result.error:
            self._digests.running -= 1
            why = f"{self._log.name}: offset {self._offset} cannot be read: {result.error}"
            self._call.refuse(Outcome.STORAGE_TIMEOUT, why)
            return
        if result.corrupt is not None:
            end = min(result.corrupt.next, self._next)
            self._damaged.append((self._offset, end))
            self._sum.update(b"damaged")
            self._offset = end
        else:
            length, self._offset = segscan.cut(result.data, len(result.data), self._next)
            self._sum.update(memoryview(result.data)[:length])
            self._bytes += length
        self.advance()
