"""Feeding the children: each poll is answered by a stream of stored bytes for up to 90 seconds.

    POST /v1/pipe -> HELLO -> judge every line (chain from memory, else through the reader thread) -> cursors
    on_durable -> wake the cursors of that log -> frames, by sendfile, in turns with the other children

A waiting child costs a cursor for each log. Many children of one log are served in turns, each gets what has gathered
since its last one, so a busy log costs no frame for each record and child. An answer ends after 90 seconds, or at once
when the child has to do something first (GONE, DIVERGED, topics that are new to it).
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from edgebroker.broker.metrics import Metrics
from edgebroker.common.scheduler import Scheduler
from edgebroker.network.http import BodyWriter, Reply, Request, Response
from edgebroker.network.transport import FileRange
from edgebroker.pipe import stream
from edgebroker.pipe.feed import Feed, FeedCursor, LogFacts, Outgoing, Piece, Rate, Stopped, judge, same_chain
from edgebroker.pipe.follower import LEVELS
from edgebroker.pipe.stream import Hello, Kind, LogPosition, PartitionInfo, Patterns, Poll, Refusal, TopicInfo
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.identity import Identity
from edgebroker.storage.log import Extent, Inline, NeedsDisk
from edgebroker.storage.reader import ColdRead
from edgebroker.storage.recovery import Hole
from edgebroker.storage.segment import Segment

log = logging.getLogger(__name__)

ANSWER_SECONDS = 90.0
IDLE_SECONDS = 45.0
TURN_BYTES = 4 << 20
LEAST_SHARE_BYTES = 64 << 10
TURN_CHILDREN = 200
SHARED_BYTES = 64 << 10
MOST_COLD = 2
RETRY_SECONDS = 1.0
MEASURE_SECONDS, LEAST_SAMPLE_SECONDS = 1.0, 0.5
RETRY_AFTER_SECONDS = 5
LIVE_SECONDS = 7 * 24 * 3600.0
# After these the child has something to do, and then polls again.
_ASKS = ("GONE", "DIVERGED")


class Node(NamedTuple):
    """Who this node is, for its neighbours."""

    uid: str
    name: str
    level: str


class Feeding:
    """Owned by the loop thread. `path` tells the uids of this node's own parents, the nearest first."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        metrics: Metrics,
        node: Node,
        path: Callable[[], list[str]],
        max_children: int,
    ) -> None:
        self.engine, self.scheduler, self.metrics = engine, scheduler, metrics
        self._node, self._path, self._max_children = node, path, max_children
        self.children: dict[Child, None] = {}
        # Cursors that have everything, by log: only these are woken when it grows.
        self._idle: dict[Log, dict[FeedCursor, Child]] = {}
        # Children that are ahead of a log, and of what they have: when it comes there they are looked at again.
        self._ahead: dict[Log, dict[Child, LogPosition]] = {}
        self._waiting: dict[Child, None] = {}
        # What stands behind an offset up to the end of a log, read once in a turn for many children.
        self.news: dict[Log, tuple[int, Piece]] = {}
        self._rates: OrderedDict[str, Rate] = OrderedDict()
        self._infos: dict[str, tuple[list[Identity], TopicInfo]] = {}
        self._asked: dict[Log, dict[str, tuple[int, float]]] = {}
        self._history_lost: Callable[[Log, LogPosition], None] | None = None
        scheduler.call_later(MEASURE_SECONDS, self._measure)

    def on_history_lost(self, callback: Callable[[Log, LogPosition], None]) -> None:
        """Whom to tell that a child has more of a log that this node originates than this node itself."""
        self._history_lost = callback

    def become(self, node: Node) -> None:
        """This node stands elsewhere in the tree from now on: its children ask again."""
        self._node = node
        for child in list(self.children):
            child.end()

    def answer(self, request: Request, reply: Reply) -> None:
        """POST /v1/pipe."""
        try:
            poll = msgspec.json.decode(request.body, type=Poll)
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return
        refusal = self._refusal(poll)
        if refusal is not None:
            self.metrics.pipe_polls_refused += 1
            reply(refusal)
            return
        self.metrics.pipe_polls += 1
        reply(Response(200, Child(self, poll)))

    def _refusal(self, poll: Poll) -> Response | None:
        if poll.version != stream.VERSION:
            return Response(400, {"error": f"pipe version {poll.version} is not spoken here, {stream.VERSION} is"})
        if poll.level not in LEVELS or LEVELS.index(poll.level) <= LEVELS.index(self._node.level):
            why = f"this is a {self._node.level} node; a {poll.level} node cannot be its child"
            return Response(409, {"error": why, "code": "LEVEL"})
        if poll.uid == self._node.uid or poll.uid in self._path():
            return Response(409, {"error": "the tree must not be a circle", "code": "LEVEL"})
        if len(self.children) >= self._max_children:
            why = f"this node feeds {len(self.children)} children already; try again in a moment, or elsewhere"
            return Response(503, {"error": why}, (("retry-after", str(RETRY_AFTER_SECONDS)),))
        return None

    def hello(self, topics: list[TopicInfo]) -> bytes:
        hello = Hello(**self._node._asdict(), path=self._path(), topics=topics)
        return stream.write_frame(Kind.HELLO, msgspec.json.encode(hello))

    def info(self, topic: str) -> TopicInfo:
        """The description of a topic."""
        logs = self.engine.partitions(topic)
        known = self._infos.get(topic)
        if known is None or not all(one is log.identity for one, log in zip(known[0], logs, strict=False)):
            parts = [
                PartitionInfo(
                    log.identity.log_id,
                    log.identity.origin,
                    log.identity.epochs,
                    log.log_start,
                    log.identity.chain,
                    log.identity.snapshot,
                )
                for log in logs
            ]
            known = ([log.identity for log in logs], stream.describe_topic(topic, logs[0].settings, parts))
            self._infos[topic] = known
        return known[1]

    # ---- what the engine tells ----

    def on_durable(self, partition: Log) -> None:
        """A log grew."""
        for cursor, child in self._idle.pop(partition, {}).items():
            child.feed.wake(cursor)
            self._waiting[child] = None
        if partition in self._ahead:
            for child, position in list(self._ahead[partition].items()):
                if partition.durable_end >= position.offset and partition.epoch >= position.epoch:
                    child.end()

    def on_topic(self, topic: str) -> None:
        """A topic was made or changed."""
        for child in list(self.children):
            child.topic_changed(topic)

    def on_rewritten(self, partition: Log) -> None:
        """A log was cut or begun anew: whoever follows it has to be judged again."""
        self.news.pop(partition, None)
        for child in list(self.children):
            if child.follows(partition):
                child.end()

    def floor(self, partition: Log, now: float) -> int | None:
        """The offset that every child seen within a week has asked for, and has passed; None without any."""
        asked = self._asked.get(partition, {})
        for uid in [uid for uid, (_, seen) in asked.items() if now - seen >= LIVE_SECONDS]:
            del asked[uid]
        return min((offset for offset, _ in asked.values()), default=None)

    def _measure(self) -> None:
        self.scheduler.call_later(MEASURE_SECONDS, self._measure)
        for child in self.children:
            child.measure()

    def turn_over(self) -> None:
        """The turn ends: serve those who wait, each its share; the rest in the next turn."""
        if not self._waiting:
            return
        share = max(LEAST_SHARE_BYTES, TURN_BYTES // len(self._waiting))
        left = TURN_BYTES
        for _ in range(min(TURN_CHILDREN, len(self._waiting))):
            if not self._waiting or left <= 0:
                break
            child = next(iter(self._waiting))
            del self._waiting[child]
            try:
                left -= child.pump(share)
            except Exception:
                log.exception("feeding %s failed", child.name)
                child.cut("an internal error")
        self.news.clear()
        if self._waiting:
            self.scheduler.call_later(0.0, lambda: None)

    def wants_turn(self, child: Child) -> None:
        self._waiting[child] = None

    def joined(self, child: Child) -> None:
        self.children[child] = None

    def left(self, child: Child, cursors: list[FeedCursor]) -> None:
        self.children.pop(child, None)
        self._waiting.pop(child, None)
        for cursor in cursors:
            self._idle.get(cursor.log, {}).pop(cursor, None)  # type: ignore[call-overload]
        for partition in [partition for partition, children in self._ahead.items() if child in children]:
            del self._ahead[partition][child]
            if not self._ahead[partition]:
                del self._ahead[partition]

    def rate_of(self, uid: str) -> Rate:
        """How fast this child's link was; it outlives the connection."""
        rate = self._rates.setdefault(uid, Rate())
        self._rates.move_to_end(uid)
        if len(self._rates) > self._max_children:
            self._rates.popitem(last=False)
        return rate

    def ahead(self, child: Child, partition: Log, position: LogPosition) -> None:
        self._ahead.setdefault(partition, {})[child] = position

    def asked(self, uid: str, partition: Log, offset: int) -> None:
        self._asked.setdefault(partition, {})[uid] = (offset, self.scheduler.now())

    def idle(self, child: Child, cursor: FeedCursor, partition: Log) -> None:
        self._idle.setdefault(partition, {})[cursor] = child

    def history_lost(self, partition: Log, position: LogPosition) -> None:
        if self._history_lost is not None and partition.identity.origin == self._node.uid:
            self._history_lost(partition, position)

    def describe(self) -> list[dict[str, object]]:
        """For /v1/pipe."""
        return [child.describe() for child in self.children]


class Child:
    """One answer to one child; what Feed asks for (Reading) and what HTTP asks for (Streamed)."""

    def __init__(self, feeding: Feeding, poll: Poll) -> None:
        self._feeding, self._poll = feeding, poll
        self.feed = Feed(self)
        self._rate = feeding.rate_of(poll.uid)
        self._busy_since = 0.0
        self._busy_bytes = 0
        self._pending = 0
        self._ending = False
        self._out: BodyWriter | None = None
        self._known = dict(poll.known)
        self._wanted = Patterns(poll.topics)
        # Cursors whose bytes come through the reader thread, and those that wait for their turn to.
        self._cold: set[FeedCursor] = set()
        self._colder: deque[FeedCursor] = deque()
        self._timers = [feeding.scheduler.call_later(ANSWER_SECONDS, self.end)]
        self._timers.append(feeding.scheduler.call_later(IDLE_SECONDS, self._idle))
        self._said = 0

    @property
    def name(self) -> str:
        return self._poll.name

    def follows(self, partition: Log) -> bool:
        key = (partition.topic, partition.partition)
        return any((position.topic, position.partition) == key for position in self._poll.logs)

    # ---- Streamed ----

    def begin(self, out: BodyWriter) -> None:
        self._out = out
        out.hold_back(self._rate.unsent_bytes)
        self._feeding.joined(self)
        fresh = [topic for topic in sorted(self._feeding.engine.topics()) if self._wants(topic)]
        out.send(self._feeding.hello(self._news(fresh)))
        for line, position in enumerate(self._poll.logs):
            self._judge(line, position)
        self._said = out.bytes_out
        self._judged()

    def on_drained(self) -> None:
        self.measure()
        self._feeding.wants_turn(self)

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
            info = self._feeding.info(topic)
            if self._known.get(topic) != info.digest:
                self._known[topic] = info.digest
                found.append(info)
                self._ending = self._ending or topic not in followed
        return found

    def _judge(self, line: int, position: LogPosition) -> None:
        partition = None
        if self._wants(position.topic):
            partition = self._feeding.engine.log(position.topic, position.partition)
            if partition is not None and partition.rewriting:
                partition = None  # it is judged when that is over
        facts = _facts(partition) if partition is not None else None
        refusal = judge(position, facts)
        if partition is None or facts is None or refusal is not None:
            assert refusal is not None
            self._refuse(line, refusal)
            if partition is not None and refusal.code == "BEHIND":
                self._feeding.ahead(self, partition, position)
                self._feeding.history_lost(partition, position)
            return
        self._feeding.asked(self._poll.uid, partition, position.offset)
        known = partition.chain_at(position.offset) if not position.points else None
        if known is not None:
            self._accept(line, position, partition, {position.offset: known})
            return
        self._pending += 1
        offsets = sorted({position.offset, *(point.offset for point in position.points)})

        def done(points: list[tuple[int, int]], error: str) -> None:
            self._pending -= 1
            if self._out is None or self._out.closed:
                return
            if error:
                self._refuse(line, Refusal(code="DAMAGED", message=f"{partition.name}: {error}"))
            else:
                self._accept(line, position, partition, dict(points))
            self._judged()

        self._feeding.engine.chains(partition, offsets, done)  # type: ignore[arg-type]

    def _accept(self, line: int, position: LogPosition, partition: Log, chains: dict[int, int]) -> None:
        refusal = same_chain(position, _facts(partition), chains)
        if refusal is not None:
            self._refuse(line, refusal)
            return
        cursor = FeedCursor(line, partition, position, partition.settings.urgent)
        self.feed.add(cursor)
        self._feeding.wants_turn(self)

    def _refuse(self, line: int, refusal: Refusal) -> None:
        assert self._out is not None
        self._feeding.metrics.refused(refusal.code)
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
            self._out.send(self._feeding.hello(news))
            self.end()

    def _idle(self) -> None:
        """Half of the answer's time is over: a child that has heard nothing shall know that the line is alive."""
        out = self._out
        if out is not None and not out.closed and out.bytes_out == self._said:
            out.send(stream.write_frame(Kind.IDLE))

    # ---- sending ----

    def pump(self, share: int) -> int:
        """Send what there is, as far as the socket takes it and the share goes; the bytes sent."""
        out, sent = self._out, 0
        if out is None or out.closed or out.backlog:
            return 0
        self.feed.frame_bytes = self._rate.frame_bytes
        if not self._busy_since and self.feed.busy:
            self._busy_since, self._busy_bytes = self._feeding.scheduler.now(), out.bytes_through
        while sent < share and not out.backlog and not out.closed:
            found = self.feed.next()
            if found is None:
                self._busy_since = 0.0
                return sent
            if isinstance(found, Stopped):
                self._refuse(found.cursor.line, found.refusal)
                if self._ending:
                    self.end()
                    return sent
                continue
            sent += found.piece.length
            self._send(out, found)
        if not out.backlog and self.feed.busy:
            self._feeding.wants_turn(self)
        return sent

    def _send(self, out: BodyWriter, found: Outgoing) -> None:
        piece, cursor = found.piece, found.cursor
        metrics = self._feeding.metrics
        metrics.pipe_frames_out += 1
        metrics.pipe_bytes_out += piece.length
        if isinstance(piece.source, Segment):
            segment = piece.source
            if cursor.piece is not None:
                segment.hold()  # the rest of it is still to come: read() holds it once for what is sent last
            engine = self._feeding.engine

            def load(extent: FileRange) -> None:
                engine.load_range(
                    segment,
                    extent.position,
                    extent.length,
                    lambda data, error: _supply(out, extent, data, error),
                )

            out.send_file(found.head, FileRange(segment.fd, piece.position, piece.length, segment.release, load))
        else:
            assert isinstance(piece.source, memoryview)
            out.send_data(found.head, piece.source[piece.position : piece.position + piece.length])
            if cursor.piece is None and cursor in self._cold:
                self._warm(cursor)

    def measure(self) -> None:
        """How fast did the line take what there was for it?"""
        out, now = self._out, self._feeding.scheduler.now()
        if self._busy_since and out is not None and not out.closed and now - self._busy_since > LEAST_SAMPLE_SECONDS:
            through = out.bytes_through
            self._rate.sent(through - self._busy_bytes, now - self._busy_since)
            self._busy_since, self._busy_bytes = now, through
            out.hold_back(self._rate.unsent_bytes)

    # ---- Reading ----

    def read(self, cursor: FeedCursor, max_bytes: int) -> Piece | Refusal | None:
        partition: Log = cursor.log  # type: ignore[assignment]
        if cursor.offset < partition.log_start:
            why = f"{partition.name} begins at {partition.log_start} here"
            start, chain = partition.log_start, partition.identity.chain
            return Refusal(code="GONE", message=why, offset=start, chain=chain)
        news = self._feeding.news.get(partition)
        if news is not None and news[0] == cursor.offset and news[1].length <= max_bytes:
            cursor.hint = None
            return news[1]
        hint: tuple[int, int] | None = cursor.hint  # type: ignore[assignment]
        found = partition.find(cursor.offset, max_bytes, 1 << 30, hint)
        if isinstance(found, Extent):
            piece = self._shared(partition, cursor.offset, found)
            if piece is not None:
                cursor.hint = None
                return piece
            found.segment.hold()
            cursor.hint = (found.segment.base, found.position + found.length)
            return Piece(found.segment, found.position, found.length, found.next_offset)
        cursor.hint = None
        if isinstance(found, Inline):
            return Piece(found.data, 0, len(found.data), found.next_offset)
        if isinstance(found, Hole):
            why = f"{partition.name}: records {found.first} to {found.next - 1} are damaged here"
            return Refusal(code="DAMAGED", message=why, offset=found.next)
        if isinstance(found, NeedsDisk):
            self._fetch(cursor, partition, max_bytes)
        else:
            self._feeding.idle(self, cursor, partition)
        return None

    def _shared(self, partition: Log, offset: int, found: Extent) -> Piece | None:
        """The newest batches of a log, small enough to be read once for all the children that stand before them."""
        if found.length > SHARED_BYTES or found.next_offset != partition.durable_end:
            return None
        data = self._feeding.engine.peek(found)
        if data is None:
            return None
        piece = Piece(memoryview(data), 0, found.length, found.next_offset)
        self._feeding.news[partition] = (offset, piece)
        return piece

    def chain_at(self, cursor: FeedCursor) -> int | None:
        partition: Log = cursor.log  # type: ignore[assignment]
        return partition.chain_at(cursor.offset)

    def durable_end(self, cursor: FeedCursor) -> int:
        partition: Log = cursor.log  # type: ignore[assignment]
        return partition.durable_end

    def _fetch(self, cursor: FeedCursor, partition: Log, max_bytes: int) -> None:
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
                self._feeding.scheduler.call_later(RETRY_SECONDS, again)
                return
            if result.hole is None and result.data:
                following = min(result.next_offset, partition.durable_end)
                skip = cursor.skip if cursor.skip < len(result.data) else 0
                cursor.skip = skip
                data = memoryview(result.data)
                cursor.piece = Piece(data, skip, len(data) - skip, following)
            else:
                self._warm(cursor)
            again()

        def again() -> None:
            if self.feed.cursors.get(cursor.line) is cursor:
                self.feed.wake(cursor)
                self._feeding.wants_turn(self)

        self._feeding.engine.read_cold(partition, wanted, max(max_bytes, 1), done)

    def _warm(self, cursor: FeedCursor) -> None:
        """It is done with its bytes from the disk: the next one gets its turn."""
        self._cold.discard(cursor)
        if self._colder:
            following = self._colder.popleft()
            self.feed.wake(following)
            self._feeding.wants_turn(self)

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
        self._feeding.left(self, cursors)
        for cursor in cursors:
            if cursor.piece is not None and isinstance(cursor.piece.source, Segment):
                cursor.piece.source.release()
            cursor.piece = None
        self._out = None

    def describe(self) -> dict[str, object]:
        lag = sum(
            max(0, cursor.log.durable_end - cursor.offset)  # type: ignore[attr-defined]
            for cursor in self.feed.cursors.values()
        )
        return {
            "uid": self._poll.uid,
            "name": self._poll.name,
            "level": self._poll.level,
            "address": self._out.peer if self._out is not None else "",
            "logs": len(self.feed.cursors),
            "lag": lag,
            "bytes_per_second": int(self._rate.bytes_per_second),
        }


def _facts(partition: Log) -> LogFacts:
    end_chain = partition.chain_at(partition.durable_end)
    assert end_chain is not None
    return LogFacts(
        partition.identity.log_id,
        partition.epoch,
        partition.log_start,
        partition.identity.chain,
        partition.durable_end,
        end_chain,
        partition.identity.contains,
    )


def _supply(out: BodyWriter, extent: FileRange, data: bytes, error: str) -> None:
    out.supply(extent, None if error else memoryview(data), error)
