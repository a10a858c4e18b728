"""One answer to one child that polled: which of its logs may go on, and the frames that it gets.

judge each line -> cursors -> frames, by sendfile, as far as the socket takes them -> end, and the child polls again
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import msgspec

from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.reading import next_piece
from edgebroker.broker.sending import file_range
from edgebroker.common.runtime.hours import parse_hours
from edgebroker.common.runtime.scheduler import Scheduler, in_turns
from edgebroker.network.http.server import BodyWriter
from edgebroker.pipe import stream
from edgebroker.pipe.feed import Feed, FeedCursor, LogFacts, Outgoing, Piece, Rate, Stopped, judge, same_chain
from edgebroker.pipe.report import Directive
from edgebroker.pipe.stream import Kind, LogPosition, Patterns, Poll, Refusal, TopicInfo
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.types import (
    ChainPoint,
    ColdRead,
    CorruptRange,
    FileSlice,
    Inline,
    LogGap,
    NeedsDisk,
    StoredFile,
)

Source = StoredFile | memoryview
LogCursor = FeedCursor[Log, Source]
StoredPiece = Piece[Source]

ANSWER_SECONDS, LEAST_ANSWER_SECONDS = 120.0, 1.0
IDLE_SECONDS = 45.0
LEAST_SAMPLE_SECONDS = 0.5
SHARED_BYTES = 64 << 10
MOST_COLD = 2
# Lines of a poll that are judged in one step.
SLICE = 16
RETRY_SECONDS = 1.0
# After these the child has something to do, and then polls again.
_ASKS = ("GONE", "DIVERGED", "DELETED")


class ChildStatus(msgspec.Struct, kw_only=True):
    """A child that is connected. `lag`: records not sent to it yet; `bytes_per_second`: its link, as measured."""

    uid: str
    name: str
    level: str
    address: str
    logs: int
    lag: int
    bytes_per_second: int


class FeedHost(Protocol):
    """What a stream asks of the node: facts that it shares with the streams to the other children."""

    engine: Engine
    scheduler: Scheduler
    metrics: Metrics
    news: dict[Log, tuple[int, StoredPiece]]
    """What was read after an offset up to the end of a log, in this loop iteration."""
    fenced: Mapping[Log, str]
    """Logs that another node writes now, and its name."""
    awaited: Callable[[Log], bool]
    """Does a publisher wait until children have a log?"""

    def hello(self, topics: list[TopicInfo]) -> bytes: ...
    def info(self, topic: str) -> TopicInfo: ...
    def second_of_day(self) -> float: ...
    def rate_of(self, uid: str) -> Rate: ...
    def joined(self, child: ChildStream) -> None: ...
    def left(self, child: ChildStream, cursors: list[LogCursor]) -> None: ...
    def wants_turn(self, child: ChildStream) -> None:
        """There is something to send to it."""

    def idle(self, child: ChildStream, cursor: LogCursor, partition: Log) -> None:
        """It has all of a log: wake it when that grows."""

    def ahead(self, child: ChildStream, partition: Log, position: LogPosition) -> None:
        """It has more of a log than this node."""

    def history_lost(self, partition: Log, position: LogPosition) -> None:
        """The same, of a log that this node may be the origin of."""

    def asked(self, poll: Poll, partition: Log, position: LogPosition) -> None:
        """It has exactly what this node has before its position."""


class ChildStream:
    """One answer to one child; what Feed asks for (Reading) and what HTTP asks for (Streamed)."""

    def __init__(self, host: FeedHost, poll: Poll, peer: str) -> None:
        self._host, self._poll, self.peer = host, poll, peer
        self.feed: Feed[Log, Source] = Feed(self)
        self._rate = host.rate_of(poll.uid)
        self._busy_since = 0.0
        self._busy_bytes = 0
        self._pending = 0
        self._ending = False
        self._out: BodyWriter | None = None
        self._known = dict(poll.known)
        self._wanted = Patterns(poll.topics)
        # Cursors whose bytes come through the reader thread, and those that wait for their turn to.
        self._cold: set[LogCursor] = set()
        self._colder: deque[LogCursor] = deque()
        self._timers = [host.scheduler.call_later(ANSWER_SECONDS, self.end)]
        self._timers.append(host.scheduler.call_later(IDLE_SECONDS, self._idle))
        hours, second = parse_hours(poll.hours), host.second_of_day()
        self._urgent_only = not hours.open(second)
        change = hours.until_change(second)
        if change < ANSWER_SECONDS:
            self._timers.append(host.scheduler.call_later(max(change, LEAST_ANSWER_SECONDS), self.end))
        # When the child said last that it is there; 0: it never did in this answer (a proxy may keep that to itself).
        self.alive_at = 0.0
        # When there was last something to say.
        self._said_at = self._polled_at = host.scheduler.now()

    @property
    def name(self) -> str:
        return self._poll.name

    @property
    def uid(self) -> str:
        return self._poll.uid

    @property
    def heard_at(self) -> float:
        """When the child polled, or said that it is there."""
        return max(self._polled_at, self.alive_at)

    def places(self) -> dict[Log, int]:
        """Up to where the child has been sent what it follows, by log."""
        return {cursor.log: cursor.offset for cursor in self.feed.cursors.values()}

    def direct(self, order: Directive) -> None:
        """Pass directives on."""
        if self._out is not None and not self._out.closed:
            self._out.send(stream.write_frame(Kind.DIRECTIVE, msgspec.json.encode([order])))

    def follows(self, partition: Log) -> bool:
        key = (partition.topic, partition.partition)
        return any((position.topic, position.partition) == key for position in self._poll.logs)

    # ---- Streamed ----

    def begin(self, out: BodyWriter) -> None:
        self._out = out
        out.hold_back(self._rate.unsent_bytes)
        self._host.joined(self)
        fresh = [topic for topic in sorted(self._host.engine.topics()) if self._wants(topic)]
        out.send(self._host.hello(self._news(fresh)))
        self._pending += 1
        in_turns(self._host.scheduler, self._judge_all(out), self._all_judged)

    def on_alive(self) -> None:
        self.alive_at = self._host.scheduler.now()

    def on_drained(self) -> None:
        self.measure()
        self._host.wants_turn(self)

    def on_closed(self, reason: str) -> None:
        self._leave()

    # ---- who may go on ----

    def _wants(self, topic: str) -> bool:
        return topic in self._wanted

    def _news(self, topics: list[str]) -> list[TopicInfo]:
        """Descriptions that the child does not have. One of a topic that it does not follow ends the answer."""
        found = []
        followed = {position.topic for position in self._poll.logs}
        for topic in topics:
            info = self._host.info(topic)
            if self._known.get(topic) != info.digest:
                self._known[topic] = info.digest
                found.append(info)
                self._ending = self._ending or topic not in followed
        return found

    def _judge_all(self, out: BodyWriter) -> Iterator[None]:
        """A few lines at a time: there may be thousands."""
        for line, position in enumerate(self._poll.logs):
            if self._out is None or out.closed:
                return  # it hung up, or asks again
            self._judge(line, position)
            if line % SLICE == 0:
                yield

    def _all_judged(self) -> None:
        self._pending -= 1
        if self._out is not None and not self._out.closed:
            self._judged()

    def _judge(self, line: int, position: LogPosition) -> None:
        partition = None
        if self._wants(position.topic):
            partition = self._host.engine.log(position.topic, position.partition)
            if partition is not None and partition.rewriting:
                partition = None  # it is judged when that is over
        deleted = self._host.engine.tombstones.get(position.log_id)
        here = self._host.engine.log(position.topic, position.partition)
        lives = here is not None and here.identity.log_id == position.log_id and here.identity.knows(position.epoch)
        if deleted is not None and deleted.covers(position.epoch) and not lives:
            why = f"{deleted.topic} was deleted"
            told = Refusal(
                code="DELETED", message=why, offset=deleted.epoch, start=deleted.first, log_id=position.log_id
            )
            self._refuse(line, told)
            return
        if partition is not None and partition in self._host.fenced:
            why = f"{partition.name} is written by node {self._host.fenced[partition]} now, which was promoted"
            self._refuse(line, Refusal(code="NOT_CARRIED", message=why))
            return
        facts = _facts(partition) if partition is not None else None
        refusal = judge(position, facts)
        if refusal is not None and refusal.code == "BEHIND" and partition and partition.damaged_before(refusal.offset):
            refusal = _not_comparable(partition)
        if partition is None or facts is None or refusal is not None:
            assert refusal is not None
            self._refuse(line, refusal)
            if partition is not None and refusal.code == "BEHIND":
                self._host.ahead(self, partition, position)
                self._host.history_lost(partition, position)
            return
        known = partition.chain_at(position.offset) if not position.points else None
        if known is not None:
            self._accept(line, position, partition, {position.offset: known})
            return
        self._pending += 1
        offsets = sorted({position.offset, *(point.offset for point in position.points)})

        def done(points: list[ChainPoint], error: str) -> None:
            self._pending -= 1
            if self._out is None or self._out.closed:
                return
            if error:
                self._refuse(line, Refusal(code="DAMAGED", message=f"{partition.name}: {error}"))
            else:
                self._accept(line, position, partition, dict(points))
            self._judged()

        self._host.engine.chains(partition, offsets, done)

    def _accept(self, line: int, position: LogPosition, partition: Log, chains: dict[int, int]) -> None:
        refusal = same_chain(position, _facts(partition), chains)
        if refusal is not None:
            places = [position.offset, *(point.offset for point in position.points)]
            if any(partition.damaged_before(place) for place in places if place > refusal.offset):
                refusal = _not_comparable(partition)  # what the child has may be all that is left of it
            self._refuse(line, refusal)
            return
        self._host.asked(self._poll, partition, position)
        if self._urgent_only and not partition.settings.urgent:
            why = f"{partition.name} is not urgent: it comes in the hours of {self._poll.hours}"
            self._refuse(line, Refusal(code="HOURS", message=why))
            return
        if position.refused and self._out is not None:
            told = Refusal(code="OK", message="")
            self._out.send(stream.write_frame(Kind.STATE, msgspec.json.encode(told), line))
        cursor = LogCursor(line, partition, position, partition.settings.urgent)
        self.feed.add(cursor)
        self._host.wants_turn(self)

    def _refuse(self, line: int, refusal: Refusal) -> None:
        assert self._out is not None
        self._host.metrics.refused(refusal.code)
        self._out.send(stream.write_frame(Kind.STATE, msgspec.json.encode(refusal), line))
        self._ending = self._ending or refusal.code in _ASKS

    def _judged(self) -> None:
        if self._ending and not self._pending:
            self.end()

    def topic_changed(self, topic: str) -> None:
        if self._out is None or self._out.closed or not self._wants(topic):
            return
        news = self._news([topic])
        if news:
            # What changed may change who may go on: the child takes it over and polls again.
            self._out.send(self._host.hello(news))
            self.end()

    def _idle(self) -> None:
        """A child that has heard nothing for a while shall know that the line is alive: what counts is when it was
        told something last, for a line may fall silent long after the answer began."""
        out, now = self._out, self._host.scheduler.now()
        if out is None or out.closed:
            return
        if now - self._said_at >= IDLE_SECONDS:
            out.send(stream.write_frame(Kind.IDLE))
            self._said_at = now
        self._timers[1] = self._host.scheduler.call_later(self._said_at + IDLE_SECONDS - now, self._idle)

    # ---- sending ----

    def pump(self, share: int) -> int:
        """Send what there is, as far as the socket takes it and the share goes; the bytes sent."""
        out, sent = self._out, 0
        if out is None or out.closed or out.backlog:
            return 0
        self.feed.frame_bytes = self._rate.frame_bytes
        if not self._busy_since and self.feed.busy:
            # It was idle: what it was sent before has gone through (asking the kernel would cost as much as a frame).
            self._busy_since, self._busy_bytes = self._host.scheduler.now(), out.bytes_out
        while sent < share and not out.backlog and not out.closed:
            found = self.feed.next()
            if found is None:
                if not self._cold:
                    self._busy_since = 0.0  # else the disk has it: there is something to send
                return sent
            if isinstance(found, Stopped):
                self._refuse(found.cursor.line, found.refusal)
                if self._ending:
                    self.end()
                    return sent
                continue
            sent += found.piece.length
            self._said_at = self._host.scheduler.now()
            self._send(out, found)
        if not out.backlog and self.feed.busy:
            self._host.wants_turn(self)
        return sent

    def _send(self, out: BodyWriter, found: Outgoing[Log, Source]) -> None:
        piece, cursor = found.piece, found.cursor
        metrics = self._host.metrics
        metrics.pipe_frames_out += 1
        metrics.pipe_bytes_out += piece.length
        if not isinstance(piece.source, memoryview):
            if cursor.piece is not None:
                piece.source.hold()  # the rest of it is still to come: read() holds it once for what is sent last
            stored = file_range(self._host.engine, piece.source, piece.position, piece.length, out.supply)
            out.send_file(found.head, stored)
        else:
            out.send_data(found.head, piece.source[piece.position : piece.position + piece.length])
            if cursor.piece is None and cursor in self._cold:
                self._warm(cursor)
        if cursor.piece is None:
            self._ask(cursor)

    def _ask(self, cursor: LogCursor) -> None:
        """Publishers may wait until this child has what it was sent."""
        if cursor.asked != cursor.offset and self._host.awaited(cursor.log) and self._out is not None:
            cursor.asked = cursor.offset
            self._out.send(stream.write_frame(Kind.CONFIRM, line=cursor.line))

    def measure(self) -> None:
        """How fast did the line take what there was for it?"""
        out, now = self._out, self._host.scheduler.now()
        if self._busy_since and out is not None and not out.closed and now - self._busy_since > LEAST_SAMPLE_SECONDS:
            through = out.bytes_through
            self._rate.sent(through - self._busy_bytes, now - self._busy_since)
            self._busy_since, self._busy_bytes = now, through
            out.hold_back(self._rate.unsent_bytes)

    # ---- Reading ----

    def read(self, cursor: LogCursor, max_bytes: int) -> StoredPiece | Refusal | None:
        partition: Log = cursor.log
        if cursor.offset == partition.durable_end:
            cursor.hint = None
            self._ask(cursor)
            self._host.idle(self, cursor, partition)
            return None
        if cursor.offset < partition.log_start:
            why = f"{partition.name} begins at {partition.log_start} here"
            start, chain = partition.log_start, partition.identity.chain
            return Refusal(code="GONE", message=why, offset=start, chain=chain)
        news = self._host.news.get(partition)
        if news is not None and news[0] == cursor.offset and news[1].length <= max_bytes:
            cursor.hint = None
            return news[1]
        found = next_piece(partition, cursor, cursor.offset, max_bytes, 1 << 30)
        cursor.hint = None
        if isinstance(found, FileSlice):
            piece = self._shared(partition, cursor.offset, found)
            if piece is not None:
                return piece
            found.file.hold()
            cursor.hint = found.next_hint
            return StoredPiece(found.file, found.position, found.length, found.next_offset)
        if isinstance(found, Inline):
            return StoredPiece(found.data, 0, len(found.data), found.next_offset)
        if isinstance(found, LogGap):
            why = f"{partition.name}: records {found.first} to {found.next - 1} were removed before they came here"
            return Refusal(code="GONE", message=why, offset=found.next, chain=found.chain)
        if isinstance(found, CorruptRange):
            why = f"{partition.name}: records {found.first} to {found.next - 1} are corrupt here"
            return Refusal(code="DAMAGED", message=why, offset=found.next)
        if isinstance(found, NeedsDisk):
            self._fetch(cursor, partition, max_bytes)
        else:
            self._host.idle(self, cursor, partition)
        return None

    def _shared(self, partition: Log, offset: int, found: FileSlice) -> StoredPiece | None:
        """The newest batches of a log, small enough to be read once for all the children that want them next."""
        if found.length > SHARED_BYTES or found.next_offset != partition.durable_end:
            return None
        data = self._host.engine.read_cached(found)
        if data is None:
            return None
        piece: StoredPiece = Piece(memoryview(data), 0, found.length, found.next_offset)
        self._host.news[partition] = (offset, piece)
        return piece

    def chain_at(self, cursor: LogCursor) -> int | None:
        partition: Log = cursor.log
        return partition.chain_at(cursor.offset)

    def durable_end(self, cursor: LogCursor) -> int:
        partition: Log = cursor.log
        return partition.durable_end

    def _fetch(self, cursor: LogCursor, partition: Log, max_bytes: int) -> None:
        """Through the reader thread; meanwhile the cursor waits outside of the queue. What came is held in memory until
        it is sent: so only for a few cursors at a time."""
        if len(self._cold) >= MOST_COLD and cursor not in self._cold:
            self._colder.append(cursor)
            return
        self._cold.add(cursor)
        wanted = cursor.offset

        def done(result: ColdRead) -> None:
            if self.feed.cursors.get(cursor.line) is not cursor or cursor.offset != wanted:
                self._warm(cursor)
                return
            if result.error:
                self._host.scheduler.call_later(RETRY_SECONDS, again)
                return
            if result.corrupt is None and result.data:
                following = min(result.next_offset, partition.durable_end)
                skip = cursor.skip if cursor.skip < len(result.data) else 0
                cursor.skip = skip
                data = memoryview(result.data)
                cursor.piece = StoredPiece(data, skip, len(data) - skip, following)
            else:
                self._warm(cursor)
            again()

        def again() -> None:
            if self.feed.cursors.get(cursor.line) is cursor:
                self.feed.wake(cursor)
                self._host.wants_turn(self)

        self._host.engine.read_cold(partition, wanted, max(max_bytes, 1), done)

    def _warm(self, cursor: LogCursor) -> None:
        """It is done with its bytes from the disk: the next one gets its turn."""
        self._cold.discard(cursor)
        if self._colder:
            following = self._colder.popleft()
            self.feed.wake(following)
            self._host.wants_turn(self)

    # ---- ending ----

    def end(self) -> None:
        """The answer is over: the child polls again."""
        out = self._out
        if out is None or out.closed:
            return
        self._leave()
        out.end()

    def cut(self, reason: str) -> None:
        if self._out is not None:
            self._out.cut(reason)

    def _leave(self) -> None:
        for timer in self._timers:
            timer.cancel()
        cursors = self.feed.drop()
        self._host.left(self, cursors)
        for cursor in cursors:
            if cursor.piece is not None and not isinstance(cursor.piece.source, memoryview):
                cursor.piece.source.release()
            cursor.piece = None
        self._out = None
        # What a poll brings may be much, and this and its feed refer to each other: the collector finds them late.
        self._poll = msgspec.structs.replace(self._poll, logs=[], known={})
        self._known.clear()

    def describe(self) -> ChildStatus:
        return ChildStatus(
            uid=self._poll.uid,
            name=self._poll.name,
            level=self._poll.level,
            address=self._out.peer if self._out is not None else "",
            logs=len(self.feed.cursors),
            lag=sum(max(0, cursor.log.durable_end - cursor.offset) for cursor in self.feed.cursors.values()),
            bytes_per_second=int(self._rate.bytes_per_second),
        )


def _not_comparable(partition: Log) -> Refusal:
    corrupt_ranges = (
        ", ".join(f"{corrupt.first} to {corrupt.next - 1}" for corrupt in partition.corrupt_ranges)
        or "what was repaired since the start"
    )
    return Refusal(code="DAMAGED", message=f"{partition.name} cannot be compared here: {corrupt_ranges} is damaged")


def _facts(partition: Log) -> LogFacts:
    end_chain = partition.chain_at(partition.durable_end)
    # Who has more than a copy that was put back is not of another history: it has what was lost here.
    identity = partition.identity.copied(partition.durable_end)
    return LogFacts(
        identity.log_id,
        min(partition.epoch, identity.epoch),
        partition.log_start,
        partition.identity.chain,
        partition.durable_end,
        end_chain or 0,  # not known behind damage: _judge does not use it then
        identity.contains,
        partial(_behind_gap, partition),
    )


def _behind_gap(partition: Log, offset: int) -> tuple[int, int] | None:
    """LogFacts.behind_gap."""
    gap = partition.identity.gap_at(offset)
    return (gap.next, gap.chain) if gap is not None and gap.first < offset else None
