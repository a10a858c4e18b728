"""Digests of stored batches, for comparing two nodes: POST /v1/pipe/digest (`edgebroker verify --against`).

The bytes are read again and every batch is checked, a piece at a time through the reader thread; what is damaged is
named, and noted as damage of the log.
"""

from __future__ import annotations

from edgebroker.broker.feed.ranges import PIECE_BYTES, find_range, too_many
from edgebroker.network.http.server import Reply, Request, Response
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log import segscan
from edgebroker.storage.log.reader import ColdRead

MOST_BYTES = 64 << 20
MOST_AT_ONCE = 4


class Digests:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running = 0

    def answer(self, request: Request, reply: Reply) -> None:
        found = find_range(self.engine, request)
        if isinstance(found, Response):
            reply(found)
        elif self.running >= MOST_AT_ONCE:
            reply(too_many(f"{MOST_AT_ONCE} digests are being made"))
        else:
            partition, wanted = found
            Digest(self, partition, wanted.first, wanted.next, reply).advance()


class Digest:
    """One answer: the SHA-256 over the batches that begin in [first, next), or in as much of it as MOST_BYTES are; a
    damaged place counts as such."""

    def __init__(self, digests: Digests, partition: Log, first: int, following: int, reply: Reply) -> None:
        self._digests, self._log, self._offset, self._next = digests, partition, first, following
        self._reply = reply
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
        self._end(
            Response(
                200,
                {
                    "next": self._offset,
                    "bytes": self._bytes,
                    "sha256": self._sum.hexdigest(),
                    "damaged": self._damaged,
                },
            )
        )

    def _read(self, result: ColdRead) -> None:
        if result.error:
            self._end(
                Response(503, {"error": f"{self._log.name}: offset {self._offset} cannot be read: {result.error}"})
            )
            return
        if result.corrupt is not None:
            following = min(result.corrupt.next, self._next)
            self._damaged.append((self._offset, following))
            self._sum.update(b"damaged")
            self._offset = following
        else:
            length, self._offset = segscan.cut(result.data, len(result.data), self._next)
            self._sum.update(memoryview(result.data)[:length])
            self._bytes += length
        self.advance()

    def _end(self, response: Response) -> None:
        self._digests.running -= 1
        self._reply(response)
