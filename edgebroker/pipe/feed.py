"""The parent's side of the pipe, without socket, file or clock: which child gets what next.

A Feed is one answer to one poll: a cursor for each log that the child follows. judge() compares where the child stands
with what this node has; next() says what to send. Urgent topics come first, the others take turns. A frame ends at the
byte where the rate of the link says, also within a batch, so that nothing waits for a long one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

from edgebroker.pipe.divergence import last_common
from edgebroker.pipe.stream import HEADER, Flags, Kind, LogPosition, Refusal

MAX_FRAME_BYTES = 1 << 20
MAX_UNSENT_BYTES = 64 << 20
LEAST_FRAME_BYTES = 4 << 10
# How fast a link is taken to be before it was measured.
FIRST_RATE = 256 << 10


L = TypeVar("L")
"""What the node calls a log."""
S = TypeVar("S")
"""What it reads stored bytes from."""


class LogFacts(NamedTuple):
    """What of a log decides whether a child may go on. `behind_gap`: for an offset inside of a gap, where the log goes
    on behind it and the chain there."""

    log_id: str
    epoch: int
    log_start: int
    start_chain: int
    durable_end: int
    end_chain: int
    contains: Callable[[int, int], bool]
    behind_gap: Callable[[int], tuple[int, int] | None]


class Piece(NamedTuple, Generic[S]):
    """Stored bytes: [position, position + length) of a source."""

    source: S
    position: int
    length: int
    next_offset: int


class Reading(Protocol[L, S]):
    """Where a cursor's bytes come from."""

    def read(self, cursor: FeedCursor[L, S], max_bytes: int) -> Piece[S] | Refusal | None:
        """Whole batches from cursor.offset on (the first may be longer than max_bytes); a gap; None: nothing now."""

    def chain_at(self, cursor: FeedCursor[L, S]) -> int | None:
        """The chain before cursor.offset, when that is known at once."""

    def durable_end(self, cursor: FeedCursor[L, S]) -> int: ...


class FeedCursor(Generic[L, S]):
    """One log of one answer. `offset` is behind the batches that were begun, `skip` what of the first the child has
    already; `piece` is what is left to send of them. `hint`, and `fresh` (nothing was read yet), belong to the one that
    reads; `asked` is the offset before which the child was asked to confirm (-1: it was not)."""

    __slots__ = ("asked", "chain", "continues", "fresh", "hint", "line", "log", "offset", "piece", "skip", "urgent")

    def __init__(self, line: int, log: L, position: LogPosition, urgent: bool) -> None:
        self.line, self.log, self.urgent = line, log, urgent
        self.offset, self.skip = position.offset, position.skip
        self.chain: int | None = position.chain
        self.piece: Piece[S] | None = None
        self.continues = False
        self.hint: tuple[int, int] | None = None
        self.fresh = True
        self.asked = -1


class Outgoing(NamedTuple, Generic[L, S]):
    """A frame: header, and the stored bytes behind it. What is left of its batches stands in cursor.piece."""

    cursor: FeedCursor[L, S]
    head: bytes
    piece: Piece[S]


class Stopped(NamedTuple, Generic[L, S]):
    cursor: FeedCursor[L, S]
    refusal: Refusal


class Rate:
    """How fast a link takes bytes: a moving average over the time in which it had something to do."""

    def __init__(self) -> None:
        self.bytes_per_second = float(FIRST_RATE)

    def sent(self, size: int, seconds: float) -> None:
        if seconds > 0:
            self.bytes_per_second += (size / seconds - self.bytes_per_second) / 4

    @property
    def frame_bytes(self) -> int:
        """At most one second's worth, with what waits in the kernel."""
        return max(LEAST_FRAME_BYTES, min(MAX_FRAME_BYTES, int(self.bytes_per_second / 2)))

    @property
    def unsent_bytes(self) -> int:
        """What the kernel may queue behind what is under way."""
        return max(LEAST_FRAME_BYTES, min(MAX_UNSENT_BYTES, int(self.bytes_per_second / 4)))


def judge(position: LogPosition, facts: LogFacts | None) -> Refusal | None:
    """May this child go on where it stands? None: yes, if the chain is the same (same_chain)."""
    name = f"{position.topic}/{position.partition}"
    if facts is None:
        return Refusal(code="NOT_CARRIED", message=f"{name} is not here")
    if facts.log_id != position.log_id:
        return Refusal(code="LOG_ID", message=f"{name} is another log here", log_id=facts.log_id)
    end, start = facts.durable_end, facts.log_start
    ahead = position.offset > end or position.epoch > facts.epoch
    if ahead and not position.points and facts.contains(position.epoch, position.offset):
        return Refusal(
            code="BEHIND", message=f"{name} ends at {end} (epoch {facts.epoch}) here", offset=end, chain=facts.end_chain
        )
    if position.offset < start:
        return Refusal(code="GONE", message=f"{name} begins at {start} here", offset=start, chain=facts.start_chain)
    behind = facts.behind_gap(position.offset)
    if behind is not None:
        return Refusal(code="GONE", message=f"{name} goes on at {behind[0]} here", offset=behind[0], chain=behind[1])
    return None


def same_chain(position: LogPosition, facts: LogFacts, chains: dict[int, int]) -> Refusal | None:
    """The second half of judge(): `chains` has this node's chain at position.offset and at the child's points, where
    there is a boundary. None: the child's log is the beginning of this one."""
    if chains.get(position.offset) == position.chain and facts.contains(position.epoch, position.offset):
        return None
    name = f"{position.topic}/{position.partition}"
    return Refusal(
        code="DIVERGED",
        message=f"{name} is not the same before {position.offset} here",
        offset=last_common(position.points, chains),
        start=facts.log_start,
        start_chain=facts.start_chain,
    )


class Feed(Generic[L, S]):
    """`frame_bytes` bounds a frame; it may be changed at any time."""

    def __init__(self, reading: Reading[L, S]) -> None:
        self._reading = reading
        self.frame_bytes = FIRST_RATE
        self.cursors: dict[int, FeedCursor[L, S]] = {}
        self._urgent: deque[FeedCursor[L, S]] = deque()
        self._bulk: deque[FeedCursor[L, S]] = deque()
        self._queued: set[FeedCursor[L, S]] = set()

    def add(self, cursor: FeedCursor[L, S]) -> None:
        self.cursors[cursor.line] = cursor
        self.wake(cursor)

    def remove(self, cursor: FeedCursor[L, S]) -> None:
        del self.cursors[cursor.line]
        self._queued.discard(cursor)

    def drop(self) -> list[FeedCursor[L, S]]:
        """Nothing more is sent; the cursors there were."""
        found = list(self.cursors.values())
        self.cursors.clear()
        self._queued.clear()
        return found

    def wake(self, cursor: FeedCursor[L, S]) -> None:
        """There may be something to send for it."""
        if cursor not in self._queued and cursor.line in self.cursors:
            self._queued.add(cursor)
            (self._urgent if cursor.urgent else self._bulk).append(cursor)

    @property
    def busy(self) -> bool:
        return bool(self._queued)

    def next(self) -> Outgoing[L, S] | Stopped[L, S] | None:
        """The next frame, or why a cursor cannot go on (it is removed)."""
        while self._urgent or self._bulk:
            queue = self._urgent or self._bulk
            cursor = queue.popleft()
            if cursor not in self._queued:
                continue
            found = cursor.piece or self._reading.read(cursor, self.frame_bytes)
            if found is None:
                self._queued.discard(cursor)
                continue
            if isinstance(found, Refusal):
                self.remove(cursor)
                return Stopped(cursor, found)
            if cursor.piece is None and cursor.skip >= found.length:
                cursor.skip = 0  # it has nothing of this batch, whatever it says
            if cursor.piece is None and cursor.skip:
                found = found._replace(position=found.position + cursor.skip, length=found.length - cursor.skip)
            queue.append(cursor)
            return self._cut(cursor, found)
        return None

    def _cut(self, cursor: FeedCursor[L, S], piece: Piece[S]) -> Outgoing[L, S]:
        size = min(piece.length, self.frame_bytes)
        flags = Flags.CONTINUES if cursor.continues else Flags.CHAINED if cursor.chain is not None else Flags(0)
        end = self._reading.durable_end(cursor)
        head = HEADER.pack(size, Kind.DATA, flags, cursor.line, cursor.chain or 0, cursor.offset, cursor.skip, end)
        now = piece._replace(length=size)
        if size < piece.length:
            cursor.piece = piece._replace(position=piece.position + size, length=piece.length - size)
            cursor.continues = True
        else:
            cursor.offset, cursor.skip, cursor.piece, cursor.continues = piece.next_offset, 0, None, False
            cursor.chain = self._reading.chain_at(cursor)
        return Outgoing(cursor, head, now)
