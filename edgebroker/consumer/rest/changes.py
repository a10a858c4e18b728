"""ChangeFeed of a view as they are stored: server-sent events, resumable by their ids.

    worker: commit -> published() -> ring of a topic          loop: every listener reads on from where it is

A ring keeps the last changes, of KEPT_BYTES at most, from the first listener on. One that comes back with an id that
the ring still has goes on behind it; else, and when a topic was loaded again, it gets the event `reset`: read the whole
again, what follows is behind it. A listener that reads too slowly to keep up is told so, too. Each piece is encoded
once, and sent to one listener in a turn of the loop.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from edgebroker.common.runtime.scheduler import Timer
from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.rest.answers import text_or_bytes
from edgebroker.network.http.server import BodyWriter
from edgebroker.network.io.loop import Loop

KEPT_BYTES = 4 << 20
MOST_LISTENERS = 64
# Of a transaction: what is encoded, and sent to a listener, in one turn of the loop.
PIECE_ROWS, PIECE_BYTES, BACKLOG_BYTES = 100, 64 << 10, 256 << 10
ALIVE_SECONDS = 15.0
CONTENT_TYPE = "text/event-stream"

Row = tuple[Any, ...]
_NUMBER = re.compile(r"[0-9]{1,18}")


class Change(msgspec.Struct, omit_defaults=True):
    """`value` null: the key was deleted."""

    key: str | None
    value: Any
    partition: int
    offset: int
    key_bytes: bytes | None = None


class _Piece:
    """Some changes of a transaction, or a reset. A deletion is (key, partition, offset). `size`: bytes of the rows."""

    def __init__(self, rows: Sequence[Row], deleted: Sequence[Row], size: int = 0, reset: str = "") -> None:
        self.rows, self.deleted, self._reset = rows, deleted, reset
        # As rows, and once more as events.
        self.size = 64 + 200 * (len(rows) + len(deleted)) + 2 * size
        self._events = b""

    def events(self, columns: Columns, name: bytes) -> bytes:
        """As server-sent events; the last one has the id."""
        if not self._events:
            if self._reset:
                self._events = reset_event(name, self._reset)
            else:
                changes = [msgspec.json.encode(one) for one in self._changes(columns)]
                lines = b"".join(b"event: change\ndata: %b\n\n" % one for one in changes[:-1])
                self._events = lines + b"event: change\nid: %b\ndata: %b\n\n" % (name, changes[-1])
        return self._events

    def _changes(self, columns: Columns) -> Iterable[Change]:
        for row in self.rows:
            key, data = text_or_bytes(row[0])
            yield Change(key, columns.value(row[1:-3]), row[-3], row[-2], data)
        for raw, partition, offset in self.deleted:
            key, data = text_or_bytes(raw)
            yield Change(key, None, partition, offset, data)


def reset_event(name: bytes, why: str) -> bytes:
    return b"event: reset\nid: %b\ndata: %b\n\n" % (name, msgspec.json.encode({"why": why}))


def _width(row: Row) -> int:
    return sum(len(column) for column in row if isinstance(column, str | bytes))


def _cut(rows: Sequence[Row]) -> Iterator[tuple[Sequence[Row], int]]:
    """Rows in pieces of PIECE_ROWS and about PIECE_BYTES at most, and their bytes; a larger one is a piece of its
    own."""
    first = size = 0
    for place, row in enumerate(rows):
        width = _width(row)
        if place > first and (place - first == PIECE_ROWS or size + width > PIECE_BYTES):
            yield rows[first:place], size
            first, size = place, 0
        size += width
    if rows:
        yield rows[first:], size


class _Ring:
    """The pieces of a topic. Their numbers are consecutive; `first` is that of the oldest."""

    def __init__(self, columns: Columns, boot: str) -> None:
        self._columns, self._boot = columns, boot
        self._kept: deque[_Piece] = deque()
        self.first, self._bytes = 1, 0
        self.wanted, self.listeners = False, set[FeedReader]()

    @property
    def end(self) -> int:
        return self.first + len(self._kept)

    def add(self, piece: _Piece) -> None:
        self._kept.append(piece)
        self._bytes += piece.size
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popleft().size
            self.first += 1

    def events(self, number: int) -> bytes:
        return self._kept[number - self.first].events(self._columns, self.name_of(number))

    def name_of(self, number: int) -> bytes:
        return b"%b-%d" % (self._boot.encode(), number)

    def number_behind(self, last_id: str) -> int:
        """Where to go on behind an event; -1: that is not kept."""
        boot, _, number = last_id.rpartition("-")
        if boot == self._boot and _NUMBER.fullmatch(number) and self.first <= int(number) + 1 <= self.end:
            return int(number) + 1
        return -1


class ChangeFeed:
    """published() and reset() may be called by any thread; all else belongs to the loop. `boot` names this run of the
    application in the ids."""

    def __init__(self, loop: Loop, views: dict[str, Columns], boot: str) -> None:
        self._loop = loop
        self._rings = {topic: _Ring(columns, boot) for topic, columns in views.items()}

    def __contains__(self, topic: object) -> bool:
        return topic in self._rings

    @property
    def full(self) -> bool:
        return sum(len(ring.listeners) for ring in self._rings.values()) >= MOST_LISTENERS

    def published(self, topic: str, rows: Sequence[Row], deleted: Sequence[Row]) -> None:
        """Rows of a view were stored, as the table has them, and keys deleted: (key, partition, offset)."""
        if self._rings[topic].wanted:
            # Here, beside the loop.
            pieces = [_Piece(some, (), size) for some, size in _cut(rows)]
            pieces += [_Piece((), deleted[first : first + PIECE_ROWS]) for first in range(0, len(deleted), PIECE_ROWS)]
            self._loop.call_soon_threadsafe(lambda: self._put(topic, pieces))

    def reset(self, topic: str) -> None:
        """A topic was loaded again."""
        if topic in self._rings:
            self._loop.call_soon_threadsafe(
                lambda: self._put(topic, [_Piece((), (), reset="the topic was loaded again")])
            )

    def listen(self, topic: str, last_id: str) -> FeedReader:
        """A body that goes on behind an id; "" begins now."""
        return FeedReader(self._loop, self._rings[topic], last_id)

    def _put(self, topic: str, pieces: Sequence[_Piece]) -> None:
        ring = self._rings[topic]
        for piece in pieces:
            ring.add(piece)
        for listener in ring.listeners:
            listener.go_on()


class FeedReader:
    """The body of one answer."""

    def __init__(self, loop: Loop, ring: _Ring, last_id: str) -> None:
        self._loop, self._ring, self._last_id = loop, ring, last_id
        self._next, self._going = 0, False
        self._out: BodyWriter | None = None
        self._timer: Timer | None = None

    def begin(self, out: BodyWriter) -> None:
        ring, self._out = self._ring, out
        ring.wanted = True
        ring.listeners.add(self)
        self._next = ring.number_behind(self._last_id)
        if self._next < 0:
            why = "what came after that event is not kept any more" if self._last_id else "this is the beginning"
            self._begin_at_end(why)
        self._alive()
        self.go_on()

    def go_on(self) -> None:
        """Send what is new, in a turn of the loop, if the peer takes it."""
        if not self._going:
            self._going = True
            self._loop.call_in_turn(self._send)

    def _send(self) -> None:
        self._going = False
        out, ring = self._out, self._ring
        if out is None or out.closed or out.backlog >= BACKLOG_BYTES:
            return
        if self._next < ring.first:
            self._begin_at_end("it was read too slowly: changes in between are not kept any more")
        elif self._next < ring.end:
            out.send(ring.events(self._next))
            self._next += 1
            self.go_on()

    def _begin_at_end(self, why: str) -> None:
        assert self._out is not None
        self._next = self._ring.end
        self._out.send(reset_event(self._ring.name_of(self._next - 1), why))

    def on_drained(self) -> None:
        self.go_on()

    def on_alive(self) -> None:
        """A listener has nothing to say."""

    def on_closed(self, reason: str) -> None:
        self._out = None
        self._ring.listeners.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def _alive(self) -> None:
        """A comment, for the timers of whatever is between."""
        self._timer = self._loop.call_later(ALIVE_SECONDS, self._alive)
        if self._out is not None and not self._out.backlog:
            self._out.send(b": alive\n\n")
