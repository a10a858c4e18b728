"""Digests of stored batches, for comparing two nodes: POST /v1/pipe/digest (`edgebroker verify --against`).

The bytes are read again and every batch is checked, a piece at a time through the reader thread; what is damaged is
named, and noted as damage of the log.
"""

from __future__ import annotations

import hashlib

import msgspec

from edgebroker.broker.ranges import PIECE_BYTES, RETRY_AFTER_SECONDS, RangeRequest
from edgebroker.network.http import Reply, Request, Response
from edgebroker.storage import segscan
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.reader import ColdRead

MOST_BYTES = 64 << 20
MOST_AT_ONCE = 4


class Digests:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running = 0

    def answer(self, request: Request, reply: Reply) -> None:
        try:
            wanted = msgspec.json.decode(request.body, type=RangeRequest)
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return
        partition = self.engine.log(wanted.topic, wanted.partition)
        if partition is None or partition.identity.log_id != wanted.log_id:
            reply(Response(404, {"error": f"{wanted.topic}/{wanted.partition} of that log id is not here"}))
        elif not partition.log_start <= wanted.first < wanted.next <= partition.durable_end or partition.rewriting:
            here = f"offsets {partition.log_start} to {partition.durable_end}"
            reply(Response(409, {"error": f"{partition.name} has {here} here, not {wanted.first} to {wanted.next}"}))
        elif self.running >= MOST_AT_ONCE:
            why = f"{MOST_AT_ONCE} digests are being made here already; try again in a moment"
            reply(Response(503, {"error": why}, (("retry-after", str(RETRY_AFTER_SECONDS)),)))
        else:
            Digest(self, partition, wanted.first, wanted.next, reply).go_on()


class Digest:
    """One answer: the SHA-256 over the batches that begin in [first, next), or in as much of it as MOST_BYTES are; a
    damaged place counts as such."""

    def __init__(self, digests: Digests, partition: Log, first: int, following: int, reply: Reply) -> None:
        self._digests, self._log, self._offset, self._next = digests, partition, first, following
        self._reply = reply
        self._sum = hashlib.sha256()
        self._bytes = 0
        self._damaged: list[tuple[int, int]] = []
        digests.running += 1

    def go_on(self) -> None:
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
        if result.hole is not None:
            following = min(result.hole.next, self._next)
            self._damaged.append((self._offset, following))
            self._sum.update(b"damaged")
            self._offset = following
        else:
            length, self._offset = segscan.cut(result.data, len(result.data), self._next)
            self._sum.update(memoryview(result.data)[:length])
            self._bytes += length
        self.go_on()

    def _end(self, response: Response) -> None:
        self._digests.running -= 1
        self._reply(response)
