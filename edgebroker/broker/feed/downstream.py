"""Feeding the children: each poll is answered by a stream of stored bytes for up to 90 seconds.

    POST /v1/pipe -> HELLO -> judge every line (chain from memory, else through the reader thread) -> cursors
    on_durable -> wake the cursors of that log -> frames, by sendfile, in turns with the other children

A waiting child costs a cursor for each log. Many children of one log are served in turns, each gets what has gathered
since its last one, so a busy log costs no frame for each record and child. An answer ends after 90 seconds, or at once
when the child has to do something first (GONE, DIVERGED, topics that are new to it).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import msgspec
from msgspec.structs import replace

from edgebroker.broker.feed.child_stream import ChildStatus, ChildStream, LogCursor, StoredPiece
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.ports import NodeInfo
from edgebroker.common import json
from edgebroker.common.crc32c import crc32c
from edgebroker.common.levels import LEVELS
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import Clock, second_of_day
from edgebroker.common.runtime.hours import parse_hours
from edgebroker.common.runtime.newest import Newest
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.network.http.router import Call
from edgebroker.pipe import stream
from edgebroker.pipe.feed import Rate
from edgebroker.pipe.stream import (
    MAX_SAME_BYTES,
    MAX_SAME_POLL_BYTES,
    Hello,
    Kind,
    LogPosition,
    PartitionInfo,
    Poll,
    PollRefusal,
    Receipt,
    SamePoll,
    TopicInfo,
)
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.types import REMEMBER_SECONDS, ChildPosition, Identity

log = logging.getLogger(__name__)

TURN_BYTES = 4 << 20
LEAST_SHARE_BYTES = 64 << 10
TURN_CHILDREN = 200
# A child says every ALIVE_SECONDS (mirror/upstream.py) that it is there.
SILENT_SECONDS = 18.5
# Between two answers to its poll, and while it comes back from a lost connection, a child is not lost.
GRACE_SECONDS = 15.0
MEASURE_SECONDS = 1.0
RETRY_AFTER_SECONDS = 5
PIN_SECONDS = 3600.0
LOOK_SECONDS = 0.1
# In a poll: a line of it has ten. To decode more would hold up the loop.
MOST_VALUES = 250_000
# The address from which a child was connected first is its home for so long after it was seen there last.
HOME_SECONDS = 600.0
STORE_SECONDS = 60.0
# What is remembered of children in all logs together: how far they are, and what is kept for their copies.
MOST_PLACES, MOST_PINS = 250_000, 50_000


SenderRules = Callable[[str, str, str], str]
"""Why a peer with this identity may not speak as the node of this uid and level ("": any); "" when it may."""


class Downstream:
    """Owned by the loop thread. `path` tells the uids of this node's own parents, the nearest first."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        clock: Clock,
        metrics: Metrics,
        node: NodeInfo,
        path: Callable[[], list[str]],
        max_children: int,
    ) -> None:
        self.engine, self.scheduler, self.metrics = engine, scheduler, metrics
        self._clock = clock
        self._node, self._path, self._max_children = node, path, max_children
        self.children: dict[ChildStream, None] = {}
        self._uids: dict[str, ChildStream] = {}
        # Cursors that have everything, by log: only these are woken when it grows.
        self._idle: dict[Log, dict[LogCursor, ChildStream]] = {}
        # Children that are ahead of a log, and of what they have: when it comes there they are looked at again.
        self._ahead: dict[Log, dict[ChildStream, LogPosition]] = {}
        self._waiting: dict[ChildStream, None] = {}
        # What lies behind an offset up to the end of a log, read once in a turn for many children.
        self.news: dict[Log, tuple[int, StoredPiece]] = {}
        self._rates = Newest[str, Rate](max_children)
        # Children that said in an answer before that they are there.
        self._says_alive = Newest[str, None](max_children)
        # From where, and until when, those that are not connected now were.
        self._left = Newest[str, tuple[str, float]](max_children)
        # Where each child usually comes from, and when it was seen there last.
        self._homes = Newest[str, tuple[str, float]](max_children)
        # The last poll of each child, as it came.
        self._polls = Newest[str, bytes](max_children)
        self._infos: dict[str, tuple[list[Identity], TopicInfo]] = {}
        self._asked: dict[Log, dict[str, ChildPosition]] = {}
        self._pins: dict[Log, dict[str, tuple[int, float]]] = {}
        self._asked_more = False
        # How many of both there are, at least; they are counted when that reaches its limit.
        self._place_count = self._pin_count = 0
        self._look_due = 0.0
        # What nodes may say, by their certificates.
        self.rules: SenderRules = lambda identity, uid, level: ""
        # Logs that a promoted node writes now: they are not served from here.
        self.fenced: Mapping[Log, str] = {}
        # Whether a publisher waits until children have a log, and who is told what they have durably.
        self.awaited: Callable[[Log], bool] = lambda log: False
        self.confirmed: Callable[[Log, str, str, int], None] = lambda log, uid, name, offset: None
        self._history_lost: Callable[[Log, LogPosition], None] | None = None
        scheduler.call_later(MEASURE_SECONDS, self._measure)
        scheduler.call_later(STORE_SECONDS, self._store_now_and_then)

    def restore(self) -> None:
        """Take over what the children had in an earlier run."""
        for key, places in self.engine.children().items():
            partition = self.engine.log(*key)
            if partition is not None:
                self._asked[partition] = dict(places)
                self._place_count += len(places)

    def store(self) -> None:
        """Remember what the children have, for the next run."""
        self._asked_more = False
        if self._asked:
            # Copied here and taken apart by the metadata thread: a hub has many.
            self.engine.store_children({(log.topic, log.partition): dict(found) for log, found in self._asked.items()})

    def _store_now_and_then(self) -> None:
        self.scheduler.call_later(STORE_SECONDS, self._store_now_and_then)
        if self._asked_more:
            self.store()

    def on_history_lost(self, callback: Callable[[Log, LogPosition], None]) -> None:
        """Whom to tell that a child has more of a log that this node originates than this node itself."""
        self._history_lost = callback

    def become(self, node: NodeInfo) -> None:
        """This node stands elsewhere in the tree from now on: its children ask again."""
        self._node = node
        for child in list(self.children):
            child.end()

    def answer(self, call: Call) -> None:
        """POST /v1/pipe."""
        body = self._same_as(call.raw)
        if body is None:
            self.metrics.refused(PollRefusal.POLL_AGAIN)
            why = "this node does not know the previous poll; send all of it"
            call.refuse(Outcome.CONFLICT, why, PollRefusal.POLL_AGAIN)
            return
        if body.count(b",") > MOST_VALUES:
            call.refuse(Outcome.INVALID, f"the poll has more than {MOST_VALUES} values; follow fewer logs")
            return
        try:
            poll = json.decode(body, Poll)
        except msgspec.DecodeError as error:
            call.refuse(Outcome.INVALID, f"the body is not as expected: {error}")
            return
        if self._refuses(poll, call):
            self.metrics.pipe_polls_refused += 1
            return
        self.metrics.pipe_polls += 1
        self._remember(poll.uid, body)
        call.stream(ChildStream(self, poll, call.peer))

    def _same_as(self, body: bytes) -> bytes | None:
        """The body that counts: this one, or the last one of the child when it says that it is still true."""
        if len(body) > MAX_SAME_POLL_BYTES:
            return body
        try:
            said = json.decode(body, SamePoll)
        except msgspec.DecodeError:
            return body
        known = self._polls.get(said.uid)
        return known if known is not None and crc32c(known) == said.same else None

    def _remember(self, uid: str, body: bytes) -> None:
        self._polls.pop(uid, None)
        if len(body) <= MAX_SAME_BYTES:
            self._polls.put(uid, body)

    def _refuses(self, poll: Poll, call: Call) -> bool:
        """True when the node that polls cannot be a child here; then it was told."""
        mine = self._node.level
        if poll.version != stream.VERSION:
            call.refuse(Outcome.INVALID, f"pipe version {poll.version} is not supported; use {stream.VERSION}")
            return True
        try:
            parse_hours(poll.hours)
        except ValueError as error:
            call.refuse(Outcome.INVALID, f"hours: {error}")
            return True
        if sum(map(len, stream.wildcards(poll.topics))) > stream.MAX_WILD_CHARACTERS:
            why = f"topics: the patterns with wildcards have more than {stream.MAX_WILD_CHARACTERS} characters together"
            call.refuse(Outcome.INVALID, why)
            return True
        if poll.level not in LEVELS or LEVELS.index(poll.level) <= LEVELS.index(mine):
            why = f"this is a {mine} node; a {poll.level} node cannot be its child"
            call.refuse(Outcome.CONFLICT, why, PollRefusal.LEVEL)
            return True
        false = self.rules(call.identity, poll.uid, poll.level)
        if false:
            call.refuse(Outcome.CONFLICT, false, PollRefusal.IDENTITY)
            return True
        if poll.uid == self._node.uid or poll.uid in self._path():
            call.refuse(Outcome.CONFLICT, "cycle: this node is already an ancestor", PollRefusal.LEVEL)
            return True
        there = self._occupied(poll.uid, call.peer)
        if there:
            why = (
                f"a node with this identity is connected from {there}; if that is another machine, give this one "
                "a data directory of its own"
            )
            call.refuse(Outcome.OVERLOADED, why, headers=(("retry-after", str(RETRY_AFTER_SECONDS)),))
            return True
        if len(self.children) >= self._max_children:
            why = f"this node has {len(self.children)} children already; try again in a moment, or at another node"
            call.refuse(Outcome.OVERLOADED, why, headers=(("retry-after", str(RETRY_AFTER_SECONDS)),))
            return True
        return False

    def _occupied(self, uid: str, peer: str) -> str:
        """The other address from which a child is connected, or was a moment ago; "" when it may be a child from here.
        Where it usually comes from it may always: who took its place while it was away has to go."""
        now = self.scheduler.now()
        home, _ = self._homes.get(uid, (peer, now))
        if peer == home or (uid in self._uids and not self.hears(uid, now)):
            return ""
        there = self.peer_of(uid, now)
        return there if there != peer else ""

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

    def ask(self, partition: Log) -> None:
        """Ask the children that have everything of a log how much of it is durable there."""
        for cursor, child in self._idle.pop(partition, {}).items():
            cursor.asked = -1
            child.feed.wake(cursor)
            self._waiting[child] = None
        if self._waiting:
            self.scheduler.call_later(0.0, lambda: None)  # to the end of this iteration

    def receipt(self, call: Call) -> None:
        """POST /v1/pipe/durable: what a connected child has durably."""
        told = call.body
        assert isinstance(told, Receipt)
        child = self._uids.get(told.uid) if not self.rules(call.identity, told.uid, "") else None
        for one in told.logs if child is not None else []:
            partition = self.engine.log(one.topic, one.partition)
            if partition is None or child is None or partition.identity.log_id != one.log_id:
                continue
            if one.durable_end <= partition.durable_end and partition.identity.contains(one.epoch, one.durable_end):
                self.confirmed(partition, told.uid, child.name, one.durable_end)
        call.done(Outcome.OK, "")

    def on_topic(self, topic: str) -> None:
        """A topic was made or changed."""
        if not self.engine.partitions(topic):
            return  # it was deleted meanwhile
        for child in list(self.children):
            child.topic_changed(topic)

    def on_rewritten(self, partition: Log) -> None:
        """A log was truncated or recreated: its followers have to be judged again."""
        self.news.pop(partition, None)
        end, places = partition.durable_end, self._asked.get(partition, {})
        for uid, place in places.items():
            if place.offset > end:  # what it has of that is not in this log any more
                places[uid] = replace(place, offset=end)
                self._asked_more = True
        self.judge_again(partition)

    def judge_again(self, partition: Log) -> None:
        """Whether its followers may go on is decided anew: they poll again."""
        for child in list(self.children):
            if child.follows(partition):
                child.end()

    def on_deleted(self, partition: Log) -> None:
        """A log is gone: its followers ask again, and are told."""
        self._infos.pop(partition.topic, None)
        self.on_rewritten(partition)
        for known in (self._asked, self._pins, self._ahead, self._idle):
            known.pop(partition, None)

    def places(self, partition: Log, now: float) -> Iterator[tuple[str, str, int, float]]:
        """What each child has of a log, as it asked last: uid, name, offset, and for how many seconds nothing was heard
        of it (0: it is connected)."""
        children = self._asked.get(partition, {})
        for uid in [uid for uid, asked in children.items() if now - asked.seen >= REMEMBER_SECONDS]:
            del children[uid]
        # Of a log that was replaced here a child has nothing yet.
        log_id, start = partition.identity.log_id, partition.log_start
        for uid, asked in children.items():
            silent = 0.0 if uid in self._uids else max(now - asked.seen, 0.001)
            yield uid, asked.name, asked.offset if asked.log_id == log_id else start, silent

    def forget(self, name: str) -> bool:
        """Forget a child that is not connected, by name or uid: nothing waits for it any more. False: there is none."""
        found = False
        for children in self._asked.values():
            for uid in [uid for uid, asked in children.items() if name in (uid, asked.name) and uid not in self._uids]:
                del children[uid]
                found = self._asked_more = True
        return found

    def pinned(self, partition: Log, now: float) -> int | None:
        """From where on retention shall remove nothing, for a child that resyncs the log; None without one."""
        return _lowest(self._pins.get(partition, {}), now - PIN_SECONDS)

    def hears(self, uid: str, now: float) -> bool:
        """Is a child connected, and not silent while it should say that it is there?"""
        child = self._uids.get(uid)
        if child is None:
            return False
        expected = bool(child.alive_at) or uid in self._says_alive
        return not expected or now - child.heard_at < SILENT_SECONDS

    def evidence(self, now: float) -> float:
        """Seconds since the connected child that was heard longest ago was heard; 0 without any."""
        return max((now - child.heard_at for child in self._uids.values()), default=0.0)

    def child(self, uid: str) -> ChildStream | None:
        """The child of this uid, while it is connected."""
        return self._uids.get(uid)

    def peers(self) -> set[str]:
        """The addresses from which children are connected."""
        return {child.peer for child in self._uids.values()}

    def peer_of(self, uid: str, now: float) -> str:
        """The address from which a child is connected, or was a moment ago; "" when it is no child."""
        child = self._uids.get(uid)
        if child is not None:
            return child.peer
        peer, left_at = self._left.get(uid, ("", 0.0))
        return peer if now - left_at < GRACE_SECONDS else ""

    def behind(self, uid: str) -> float:
        """Seconds since the oldest record that a child lacks became durable here (at least so many, where only the disk
        knows)."""
        worst, child = 0, self._uids.get(uid)
        places = child.places() if child is not None else {}
        for partition, asked in self._asked.items():
            if uid in asked:
                offset = places.get(partition, asked[uid].offset)
                if offset < partition.durable_end:
                    worst = max(worst, self.engine.age_ms(partition, offset + 1), 1)
        return worst / 1000

    def _measure(self) -> None:
        self.scheduler.call_later(MEASURE_SECONDS, self._measure)
        for child in self.children:
            child.measure()

    def end_iteration(self) -> None:
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

    def wants_turn(self, child: ChildStream) -> None:
        self._waiting[child] = None

    def joined(self, child: ChildStream) -> None:
        self.children[child] = None
        before = self._uids.get(child.uid)
        if before is not None and before.peer != child.peer:
            before.cut("a node with this identity connected from its usual address")
        self._uids[child.uid] = child
        home, seen = self._homes.get(child.uid, (child.peer, 0.0))
        now = self.scheduler.now()
        if home != child.peer and now - seen > HOME_SECONDS:
            home = child.peer
        self._homes.put(child.uid, (home, now if home == child.peer else seen))

    def left(self, child: ChildStream, cursors: list[LogCursor]) -> None:
        if child.alive_at:
            self._says_alive.put(child.uid, None)
        elif self.scheduler.now() - child.heard_at >= SILENT_SECONDS:
            self._says_alive.pop(child.uid, None)  # it comes through a proxy now
        self.children.pop(child, None)
        if self._uids.get(child.uid) is child:
            del self._uids[child.uid]
            self._left.put(child.uid, (child.peer, self.scheduler.now()))
        self._waiting.pop(child, None)
        for cursor in cursors:
            self._idle.get(cursor.log, {}).pop(cursor, None)
        for partition in [partition for partition, children in self._ahead.items() if child in children]:
            del self._ahead[partition][child]
            if not self._ahead[partition]:
                del self._ahead[partition]

    def second_of_day(self) -> float:
        """By this node's wall clock and time zone."""
        return second_of_day(self._clock.wall_ms())

    def rate_of(self, uid: str) -> Rate:
        """How fast this child's link was; it outlives the connection."""
        rate = self._rates.get(uid) or Rate()
        self._rates.put(uid, rate)
        return rate

    def ahead(self, child: ChildStream, partition: Log, position: LogPosition) -> None:
        self._ahead.setdefault(partition, {})[child] = position

    def asked(self, poll: Poll, partition: Log, position: LogPosition) -> None:
        """A child has exactly what this log has before its position: it was compared. It may want what follows to be
        kept for it."""
        uid = poll.uid
        if poll.pin:  # the copy of a child, which will not come again
            self._pin(uid, partition, position.offset)
            return
        children = self._asked.setdefault(partition, {})
        before = children.get(uid)
        if before is None and not self._has_room(children, partition):
            return
        place = children[uid] = ChildPosition(
            position.log_id, position.epoch, position.offset, self.scheduler.now(), poll.name
        )
        if before is None or (before.log_id, before.offset) != (place.log_id, place.offset):
            self._asked_more = True

    def _pin(self, uid: str, partition: Log, offset: int) -> None:
        pins, now = self._pins.setdefault(partition, {}), self.scheduler.now()
        if uid not in pins and self._pin_count >= MOST_PINS:
            if not self._may_look(now):
                return
            for known in self._pins.values():
                _lowest(known, now - PIN_SECONDS)
            self._pin_count = sum(map(len, self._pins.values()))
            if self._pin_count >= MOST_PINS:
                return  # it is told GAP if retention is faster
        self._pin_count += uid not in pins
        pins[uid] = (offset, now)

    def _has_room(self, children: dict[str, ChildPosition], partition: Log) -> bool:
        """May what one more child has of a log be remembered? One that has all of it, and is away for longest, gives
        way. One that has something to fetch does not give way to a newcomer, which anybody can invent."""
        full = self._place_count >= MOST_PLACES or len(children) >= self._max_children
        if full and not self._may_look(self.scheduler.now()):
            return False
        if self._place_count >= MOST_PLACES:
            self._place_count = sum(map(len, self._asked.values()))
            if self._place_count >= MOST_PLACES:
                return False
        if len(children) >= self._max_children:
            through = [uid for uid, place in children.items() if place.offset >= partition.durable_end]
            through = [uid for uid in through if uid not in self._uids]
            if not through:
                return False
            del children[min(through, key=lambda uid: children[uid].seen)]
            return True
        self._place_count += 1
        return True

    def _may_look(self, now: float) -> bool:
        """To look at all that is remembered takes milliseconds, and a poll has thousands of lines: now and then only. A
        newcomer polls again."""
        if now < self._look_due:
            return False
        self._look_due = now + LOOK_SECONDS
        return True

    def idle(self, child: ChildStream, cursor: LogCursor, partition: Log) -> None:
        self._idle.setdefault(partition, {})[cursor] = child

    def history_lost(self, partition: Log, position: LogPosition) -> None:
        if self._history_lost is not None and partition.identity.origin == self._node.uid:
            self._history_lost(partition, position)

    def describe(self) -> list[ChildStatus]:
        """For /v1/pipe."""
        return [child.describe() for child in self.children]


def _lowest(places: dict[str, tuple[int, float]], since: float) -> int | None:
    """The lowest offset of those that were seen since then; the others are forgotten."""
    for uid in [uid for uid, (_, seen) in places.items() if seen <= since]:
        del places[uid]
    return min((offset for offset, _ in places.values()), default=None)
