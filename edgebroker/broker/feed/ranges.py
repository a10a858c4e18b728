"""Serve stored batches for the repair of a peer: POST /v1/pipe/range, answered with the bytes and nothing else.

Whole batches from the one at `first` on, until `next` or MOST_BYTES, whatever comes first; the neighbour checks them
and asks again for the rest. Anybody may ask who knows the log: a child its parent, an origin its child.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.broker.reading import next_piece
from edgebroker.broker.sending import file_range
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import BodyWriter
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log import segscan
from edgebroker.storage.types import ColdRead, FileSlice, Inline, NeedsDisk

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


def find_range(engine: Engine, call: Call) -> tuple[Log, RangeRequest] | None:
    """The log that a RangeRequest is about, when all of the range is stored here; else the call is answered."""
    wanted = call.body
    assert isinstance(wanted, RangeRequest)
    partition = engine.log(wanted.topic, wanted.partition)
    if partition is None or partition.identity.log_id != wanted.log_id:
        call.refuse(Outcome.NOT_FOUND, f"{wanted.topic}/{wanted.partition} with that log id is not on this node")
        return None
    gap = next((one for one in partition.identity.gaps if one.first < wanted.next and wanted.first < one.next), None)
    stored = partition.log_start <= wanted.first < wanted.next <= partition.durable_end
    if not stored or gap is not None or partition.rewriting:
        here = f"offsets {partition.log_start} to {partition.durable_end}"
        here += f" without {gap.first} to {gap.next - 1}" if gap is not None else ""
        call.refuse(Outcome.CONFLICT, f"{partition.name} has {here} here, not {wanted.first} to {wanted.next}")
        return None
    return partition, wanted


def too_many(call: Call, what: str) -> None:
    """Come again later."""
    later = (("retry-after", str(RETRY_AFTER_SECONDS)),)
    call.refuse(Outcome.OVERLOADED, f"{what} already; try again in a moment", headers=later)


class Ranges:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.open: set[Range] = set()

    def answer(self, call: Call) -> None:
        found = find_range(self.engine, call)
        if found is None:
            return
        partition, wanted = found
        if any(corrupt.first < wanted.next and wanted.first < corrupt.next for corrupt in partition.corrupt_ranges):
            call.refuse(Outcome.CONFLICT, f"{partition.name} is corrupt there on this node as well")
        elif len(self.open) >= MOST_AT_ONCE:
            too_many(call, f"{MOST_AT_ONCE} ranges are being read")
        else:
            call.stream(Range(self, partition, wanted.first, wanted.next))


class Range:
    """One answer (Streamed). `hint` and `fresh` are its ReadState."""

    def __init__(self, ranges: Ranges, partition: Log, first: int, end: int) -> None:
        self._ranges, self._engine = ranges, ranges.engine
        self._log, self._offset, self._end = partition, first, end
        self._left = MOST_BYTES
        self._out: BodyWriter | None = None
        self.hint: tuple[int, int] | None = None
        self.fresh = True

    def begin(self, out: BodyWriter) -> None:
        self._out = out
        self._ranges.open.add(self)
        self._advance()

    def on_alive(self) -> None:
        pass

    def on_drained(self) -> None:
        self._advance()

    def on_closed(self, reason: str) -> None:
        self._out = None
        self._ranges.open.discard(self)

    def _advance(self) -> None:
        out = self._out
        while out is not None and not out.closed and not out.backlog:
            if self._offset >= self._end or self._left <= 0:
                self._out = None
                self._ranges.open.discard(self)
                out.end()
                return
            found = next_piece(self._log, self, self._offset, PIECE_BYTES, self._end - self._offset)
            if isinstance(found, FileSlice):
                self._send_file(out, found)
            elif isinstance(found, Inline):
                self._send(out, bytes(found.data), found.next_offset)
            elif isinstance(found, NeedsDisk):
                self._engine.read_cold(self._log, self._offset, PIECE_BYTES, self._read)
                return
            else:
                out.cut("the range was removed or became corrupt")
                return

    def _read(self, result: ColdRead) -> None:
        out = self._out
        if out is None or out.closed:
            return
        if result.error or result.corrupt is not None:
            out.cut("the range cannot be read")
            return
        length, next_offset = segscan.cut(result.data, len(result.data), self._end)
        self._send(out, result.data[:length], next_offset)
        self._advance()

    def _send(self, out: BodyWriter, data: bytes, next_offset: int) -> None:
        self._offset, self._left, self.hint = next_offset, self._left - len(data), None
        out.send(data)

    def _send_file(self, out: BodyWriter, piece: FileSlice) -> None:
        self._offset, self._left, self.hint = piece.next_offset, self._left - piece.length, piece.next_hint
        piece.file.hold()
        out.send_file(b"", file_range(self._engine, piece.file, piece.position, piece.length, out.supply))
