"""Giving a neighbour stored batches that it lost: POST /v1/pipe/range, answered with the bytes and nothing else.

Whole batches from the one at `first` on, until `next` or MOST_BYTES, whatever comes first; the neighbour checks them
and asks again for the rest. Anybody may ask who knows the log: a child its parent, an origin its child.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.network.http.server import BodyWriter, Reply, Request, Response
from edgebroker.network.io.transport import FileRange
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log import segscan
from edgebroker.storage.log.partition import FileSlice, Inline, NeedsDisk
from edgebroker.storage.log.reader import ColdRead

MOST_BYTES = 32 << 20
PIECE_BYTES = 1 << 20
MOST_AT_ONCE, RETRY_AFTER_SECONDS = 16, 5


class RangeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/pipe/range: batches of a log with offsets in [first, next)."""

    topic: str
    partition: Annotated[int, Meta(ge=0)]
    log_id: str
    first: Annotated[int, Meta(ge=0)]
    next: Annotated[int, Meta(ge=1)]


def find_range(engine: Engine, request: Request) -> tuple[Log, RangeRequest] | Response:
    """The log that a RangeRequest is about, when all of the range is stored here; else the answer."""
    try:
        wanted = msgspec.json.decode(request.body, type=RangeRequest)
    except msgspec.DecodeError as error:
        return Response(400, {"error": str(error)})
    partition = engine.log(wanted.topic, wanted.partition)
    if partition is None or partition.identity.log_id != wanted.log_id:
        return Response(404, {"error": f"{wanted.topic}/{wanted.partition} of that log id is not here"})
    if not partition.log_start <= wanted.first < wanted.next <= partition.durable_end or partition.rewriting:
        here = f"offsets {partition.log_start} to {partition.durable_end}"
        return Response(409, {"error": f"{partition.name} has {here} here, not {wanted.first} to {wanted.next}"})
    return partition, wanted


def too_many(what: str) -> Response:
    """Come again later."""
    return Response(
        503, {"error": f"{what} here already; try again in a moment"}, (("retry-after", str(RETRY_AFTER_SECONDS)),)
    )


class Ranges:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.open: set[Range] = set()

    def answer(self, request: Request, reply: Reply) -> None:
        found = find_range(self.engine, request)
        if isinstance(found, Response):
            reply(found)
            return
        partition, wanted = found
        if any(corrupt.first < wanted.next and wanted.first < corrupt.next for corrupt in partition.corrupt_ranges):
            reply(Response(409, {"error": f"{partition.name} is damaged there here as well"}))
        elif len(self.open) >= MOST_AT_ONCE:
            reply(too_many(f"{MOST_AT_ONCE} ranges are being read"))
        else:
            reply(Response(200, Range(self, partition, wanted.first, wanted.next)))


class Range:
    """One answer (Streamed)."""

    def __init__(self, ranges: Ranges, partition: Log, first: int, following: int) -> None:
        self._ranges, self._engine = ranges, ranges.engine
        self._log, self._offset, self._next = partition, first, following
        self._left = MOST_BYTES
        self._out: BodyWriter | None = None

    def begin(self, out: BodyWriter) -> None:
        self._out = out
        self._ranges.open.add(self)
        self._advance()

    def on_drained(self) -> None:
        self._advance()

    def on_closed(self, reason: str) -> None:
        self._out = None
        self._ranges.open.discard(self)

    def _advance(self) -> None:
        out = self._out
        while out is not None and not out.closed and not out.backlog:
            if self._offset >= self._next or self._left <= 0:
                self._out = None
                self._ranges.open.discard(self)
                out.end()
                return
            found = self._log.find(self._offset, PIECE_BYTES, self._next - self._offset)
            if isinstance(found, FileSlice):
                self._send_extent(out, found)
            elif isinstance(found, Inline):
                self._send(out, bytes(found.data), found.next_offset)
            elif isinstance(found, NeedsDisk):
                self._engine.read_cold(self._log, self._offset, PIECE_BYTES, self._read)
                return
            else:
                out.cut("the range was removed or damaged meanwhile")
                return

    def _read(self, result: ColdRead) -> None:
        out = self._out
        if out is None or out.closed:
            return
        if result.error or result.corrupt is not None:
            out.cut("the range cannot be read")
            return
        length, following = segscan.cut(result.data, len(result.data), self._next)
        self._send(out, result.data[:length], following)
        self._advance()

    def _send(self, out: BodyWriter, data: bytes, following: int) -> None:
        self._offset, self._left = following, self._left - len(data)
        out.send(data)

    def _send_extent(self, out: BodyWriter, extent: FileSlice) -> None:
        segment = extent.segment
        self._offset, self._left = extent.next_offset, self._left - extent.length
        segment.hold()

        def load(piece: FileRange) -> None:
            self._engine.load_range(
                segment, piece.position, piece.length,
                lambda data, error: out.supply(piece, None if error else memoryview(data), error),
            )  # fmt: skip

        out.send_file(b"", FileRange(segment.fd, extent.position, extent.length, segment.release, load))
