"""The child's side of the pipe, without socket, file or clock: where it stands in its logs, what an answer leads to.

    poll()  ->  (the parent answers)  ->  receive()  ->  batches to the sink; what has to be done, as events

Nothing reaches the log that was not checked: a frame must continue the line (offset, chain, bytes of an unfinished
batch), and the sink checks CRC, density and epoch of every batch. Bytes of an unfinished batch outlive the connection:
the next poll asks for the rest. After an error (RemoteProtocolError) the answer is over; the lines stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from edgebroker.common import json, records
from edgebroker.common.batch import EXPLANATION, HEADER_BYTES, Reason
from edgebroker.common.errors import RemoteProtocolError
from edgebroker.common.levels import LEVELS
from edgebroker.common.types import TopicPartition
from edgebroker.pipe.divergence import Search
from edgebroker.pipe.report import Directive
from edgebroker.pipe.stream import (
    MOST_SHOWN_BYTES,
    Flags,
    FrameReader,
    Hello,
    Kind,
    LogPosition,
    Patterns,
    PipeFrame,
    Point,
    Poll,
    Refusal,
)

T = TypeVar("T")

# Logs in one poll that show places to find where they part from the parent's: each has a hundred values, and a parent
# takes 250,000 in a poll. The turn of the others comes when these have found theirs.
MOST_SEARCHED = 1000


class AppendResult(NamedTuple):
    """What a sink took: so many bytes, why not more, and where its log stands now."""

    size: int
    reason: Reason
    next_offset: int
    epoch: int


class Sink(Protocol):
    """Where batches go: the node's own log."""

    def append(self, key: TopicPartition, data: memoryview) -> AppendResult:
        """Take whole batches from the beginning of `data`."""


class FollowedLog:
    """One log. `state` is one of live, behind, damaged, not_carried, waiting, replaced, diverged, moving; `why` tells.
    `offset` and `chain` are behind the last batch that the sink took, `partial` is the beginning of the next one.
    `beyond`: the batch at the end (`beyond_at`) of a parent that is behind, to show it; `shown`: by how many polls."""

    __slots__ = (
        "beyond", "beyond_at", "chain", "epoch", "key", "log_id", "log_start", "offset", "parent_end", "partial",
        "points", "search", "shown", "state", "why",
    )  # fmt: skip

    def __init__(self, key: TopicPartition, log_id: str, epoch: int, log_start: int, offset: int, chain: int) -> None:
        self.key = key
        self.parent_end = -1
        self.begin(log_id, epoch, log_start, offset, chain)

    @property
    def lacking(self) -> bool:
        """The parent lacks something of it that this node has or wants."""
        return self.state in ("behind", "not_carried", "damaged")

    def begin(self, log_id: str, epoch: int, log_start: int, offset: int, chain: int) -> None:
        """Follow from a place."""
        self.log_id, self.epoch, self.log_start, self.offset, self.chain = log_id, epoch, log_start, offset, chain
        self.partial = bytearray()
        self.points: list[Point] = []
        self.search: Search | None = None
        self.state, self.why = "live", ""
        self.show(b"", -1)

    def show(self, beyond: bytes, offset: int) -> None:
        """Let the polls from the next one on show the batch at this offset."""
        self.beyond, self.beyond_at, self.shown = beyond, offset, 0


class HelloReceived(NamedTuple):
    hello: Hello


class DirectivesReceived(NamedTuple):
    """Directives, for this node or for those below it."""

    directives: list[Directive]


class CompareChain(NamedTuple):
    """The parent ends at `offset`: is the chain there the same in our log? Answer with compared()."""

    line: FollowedLog
    offset: int
    chain: int


class FindBoundaries(NamedTuple):
    """Look up the boundaries at or behind these offsets in our log; answer with looked()."""

    line: FollowedLog
    offsets: list[int]


class TruncateLog(NamedTuple):
    """Our log and the parent's are the same up to `offset`: what lies behind it goes. Then follow() again."""

    line: FollowedLog
    offset: int


class RecreateLog(NamedTuple):
    """The parent has nothing that continues our log: recreate it at `offset`. Then follow() again."""

    line: FollowedLog
    offset: int
    chain: int


class SkipRecords(NamedTuple):
    """The parent has removed what comes next in our log: it goes on at `offset`. Then follow() again."""

    line: FollowedLog
    offset: int
    chain: int


class ConfirmWanted(NamedTuple):
    """The parent wants to know when everything of our log before `offset` is durable."""

    line: FollowedLog
    offset: int


class LogDeleted(NamedTuple):
    """The origin has deleted histories of this log, `first` to `epoch`, and the topic with it. Then drop(), or follow()
    if ours is another one."""

    line: FollowedLog
    first: int
    epoch: int


class StateChanged(NamedTuple):
    """A line is in another state; for logs and counters."""

    line: FollowedLog
    code: str


Event = (
    HelloReceived
    | DirectivesReceived
    | CompareChain
    | FindBoundaries
    | TruncateLog
    | RecreateLog
    | SkipRecords
    | ConfirmWanted
    | LogDeleted
    | StateChanged
)


class Follower:
    """`patterns` are the topics that this node wants (shell wildcards), `hours` those of the day in which it takes also
    what is not urgent. `pin`: the parent shall keep what was asked for until it has come."""

    def __init__(
        self,
        uid: str,
        name: str,
        level: str,
        patterns: Sequence[str],
        sink: Sink,
        hours: str = "",
        *,
        pin: bool = False,
    ) -> None:
        self._uid, self._name, self._level, self._patterns, self._sink = uid, name, level, list(patterns), sink
        self.lines: dict[TopicPartition, FollowedLog] = {}
        self._wanted, self.hours, self._pin = Patterns(self._patterns), hours, pin
        self._parent = ""
        self.known: dict[str, int] = {}
        self._polled: list[FollowedLog] = []
        self._reader = FrameReader()
        self._begun: set[FollowedLog] = set()
        self.bytes_taken = self.bytes_wasted = 0

    def wants(self, topic: str) -> bool:
        """True for a topic that a pattern matches; what belongs to one node is matched by none."""
        return topic in self._wanted

    def follow(self, key: TopicPartition, log_id: str, epoch: int, log_start: int, offset: int, chain: int) -> None:
        """Follow a log from a place: new, moved, or after something that was taken could not be stored."""
        line = self.lines.get(key)
        if line is None:
            self.lines[key] = FollowedLog(key, log_id, epoch, log_start, offset, chain)
        else:
            line.begin(log_id, epoch, log_start, offset, chain)

    def drop(self, topic: str) -> None:
        """Follow the logs of a topic no more."""
        for key in [key for key in self.lines if key.topic == topic]:
            self.lines.pop(key).state = "moving"  # nothing more is taken for it
        self.known.pop(topic, None)

    def poll(self) -> Poll:
        """What to ask for now. What was under way before is over."""
        self._reader = FrameReader()
        self._begun.clear()
        searching = [line for line in self.lines.values() if line.points]
        later = set(searching[MOST_SEARCHED:])
        self._polled = [line for line in self.lines.values() if line.state != "moving" and line not in later]
        for line in self._polled:
            if len(line.partial) >= HEADER_BYTES and records.header(line.partial)[0] == 0:
                # Whole batches that the disk had no room for: what is left out must lie in one batch.
                self.bytes_wasted += len(line.partial)
                line.partial = bytearray()
        logs = [
            LogPosition(
                *line.key,
                line.log_id,
                line.epoch,
                line.offset,
                line.chain,
                len(line.partial),
                line.points,
                line.state != "live",
                beyond,
            )
            for line, beyond in zip(self._polled, self._shown(), strict=True)
        ]
        return Poll(
            uid=self._uid,
            name=self._name,
            level=self._level,
            topics=self._patterns,
            logs=logs,
            known=self.known,
            hours=self.hours,
            pin=self._pin,
        )

    def _shown(self) -> list[bytes]:
        """What this poll shows of each log to a parent that is behind: as much as a poll may, in turns."""
        size, shown = 0, set[FollowedLog]()
        for line in sorted((line for line in self._polled if line.beyond), key=lambda line: line.shown):
            if not size or size + len(line.beyond) <= MOST_SHOWN_BYTES:
                size += len(line.beyond)
                line.shown += 1
                shown.add(line)
        return [line.beyond if line in shown else b"" for line in self._polled]

    @property
    def parent(self) -> str:
        """The uid of the node that answered last."""
        return self._parent

    @property
    def lacking(self) -> bool:
        """The parent lacks something that this node has or wants."""
        return any(line.lacking for line in self.lines.values())

    # ---- an answer ----

    def receive(self, data: memoryview) -> Iterator[Event]:
        """Take bytes of an answer. Raises RemoteProtocolError for what cannot be right."""
        for frame, payload, first in self._reader.feed(data):
            if frame.kind == Kind.DATA:
                yield from self._data(frame, payload, first)
            elif frame.kind == Kind.HELLO:
                yield self._hello(_decode(payload, Hello))
            elif frame.kind == Kind.STATE:
                yield from self._refused(self._line(frame), _decode(payload, Refusal))
            elif frame.kind == Kind.CONFIRM:
                yield ConfirmWanted(self._line(frame), self._line(frame).offset)
            elif frame.kind == Kind.DIRECTIVE:
                yield DirectivesReceived(_directives(payload))

    def _line(self, frame: PipeFrame) -> FollowedLog:
        if frame.line >= len(self._polled):
            raise RemoteProtocolError(f"the parent answered line {frame.line} of {len(self._polled)}")
        return self._polled[frame.line]

    def _hello(self, hello: Hello) -> HelloReceived:
        if self._uid in (hello.uid, *hello.path):
            raise RemoteProtocolError(f"{hello.name} gets its data from this node: the tree must not be a circle")
        if hello.level not in LEVELS or LEVELS.index(hello.level) >= LEVELS.index(self._level):
            raise RemoteProtocolError(
                f"{hello.name} is a {hello.level} node; the parent of a {self._level} node must be of a level above"
            )
        for info in hello.topics:
            if info.problem():
                raise RemoteProtocolError(f"{hello.name}: {info.problem()}")
        if hello.uid != self._parent:
            # What was found out by comparing with another node says nothing about this one.
            self._parent = hello.uid
            for line in self.lines.values():
                line.search, line.points = None, []
        return HelloReceived(hello)

    def _data(self, frame: PipeFrame, payload: memoryview, first: bool) -> Iterator[Event]:
        line = self._line(frame)
        if line.state == "moving":
            return
        if first:
            self._begins_right(line, frame)
            line.parent_end = frame.durable_end
            yield from _may_go_on(line)
        if line.partial:
            line.partial += payload
            with memoryview(line.partial) as whole:
                taken, reason = self._take(line, whole)
            del line.partial[:taken]
        else:
            taken, reason = self._take(line, payload)
            line.partial += payload[taken:]
        cut_off = reason in (Reason.OK, Reason.TRUNCATED)
        if not cut_off and not (reason == Reason.ZEROES and len(line.partial) < HEADER_BYTES):
            self.bytes_wasted += len(line.partial)
            line.partial = bytearray()
            why = EXPLANATION.get(reason, "it is not a batch")
            raise RemoteProtocolError(f"{_name(line)}: the batch at {line.offset} cannot be taken: {why}")

    def flush(self) -> None:
        """Offer the sink again what it did not take when it came."""
        for line in self.lines.values():
            if line.partial and line.state != "moving":
                with memoryview(line.partial) as whole:
                    taken, _ = self._take(line, whole)
                del line.partial[:taken]

    def _begins_right(self, line: FollowedLog, frame: PipeFrame) -> None:
        if frame.flags & Flags.CONTINUES and line in self._begun:
            return
        self._begun.add(line)
        here = (line.offset, len(line.partial))
        if (frame.offset, frame.skip) != here or (frame.flags & Flags.CHAINED and frame.chain != line.chain):
            self.bytes_wasted += len(line.partial)
            line.partial = bytearray()
            raise RemoteProtocolError(
                f"{_name(line)}: the parent goes on at {frame.offset}+{frame.skip} (chain {frame.chain:08x}), this "
                f"node is at {here[0]}+{here[1]} (chain {line.chain:08x})"
            )

    def _take(self, line: FollowedLog, data: memoryview) -> tuple[int, Reason]:
        taken = self._sink.append(line.key, data)
        if taken.size:
            with data[: taken.size] as whole:
                line.chain = records.chain(whole, line.chain)
            line.offset, line.epoch = taken.next_offset, taken.epoch
            self.bytes_taken += taken.size
        return taken.size, taken.reason

    # ---- refusals ----

    def _refused(self, line: FollowedLog, refusal: Refusal) -> Iterator[Event]:
        if line.state == "moving":
            return
        before, line.why = line.state, refusal.message
        match refusal.code:
            case "BEHIND":
                line.state, line.parent_end = "behind", refusal.offset
                if line.log_start <= refusal.offset < line.offset:
                    yield CompareChain(line, refusal.offset, refusal.chain)
            case "GONE":
                if refusal.offset <= line.offset:
                    raise RemoteProtocolError(
                        f"{_name(line)}: the parent goes on at {refusal.offset}, which it had sent"
                    )
                line.state = "moving"
                yield SkipRecords(line, refusal.offset, refusal.chain)
            case "OK":
                yield from _may_go_on(line)
                return
            case "LOG_ID":
                line.state = "replaced"
            case "DELETED":
                if refusal.log_id != line.log_id:
                    raise RemoteProtocolError(f"{_name(line)}: the parent deleted another log, {refusal.log_id}")
                line.state = "moving"
                yield LogDeleted(line, refusal.start, refusal.offset)
            case "HOURS":
                line.state = "waiting"
            case "DAMAGED":
                line.state = "damaged"
            case "NOT_CARRIED":
                line.state = "not_carried"
            case "DIVERGED":
                line.state = "diverged"
                yield from self._diverged(line, refusal)
            case _:
                raise RemoteProtocolError(f"{_name(line)}: the parent answered {refusal.code}")
        if line.state != before:
            yield StateChanged(line, refusal.code)

    def compared(self, line: FollowedLog, same: bool, offset: int) -> Iterator[Event]:
        """The answer to CompareChain. The same chain: the parent is only behind. Another one: the logs part before."""
        if line.state == "behind" and not same:
            line.state = "diverged"
            line.search = Search(line.log_start, max(offset, line.log_start + 1))
            yield StateChanged(line, "DIVERGED")
            yield FindBoundaries(line, line.search.offsets())

    def _diverged(self, line: FollowedLog, refusal: Refusal) -> Iterator[Event]:
        if line.search is None:
            line.search = Search(line.log_start, line.offset)
        line.search.answered(refusal.offset if line.points else -1, Point(refusal.start, refusal.start_chain))
        line.points = []
        yield FindBoundaries(line, line.search.offsets())

    def looked(self, line: FollowedLog, found: Sequence[Point]) -> Iterator[Event]:
        """The answer to FindBoundaries; without an event the next poll asks the parent about what was found."""
        search = line.search
        if line.state != "diverged" or search is None:
            return
        line.points = search.take(found)
        if not line.points and search.low >= 0:
            line.state = "moving"
            yield TruncateLog(line, search.low)
        elif not line.points and search.start.offset >= 0:
            line.state = "moving"
            yield RecreateLog(line, *search.start)


def _may_go_on(line: FollowedLog) -> Iterator[Event]:
    if line.state != "live":
        line.state, line.why, line.search, line.points = "live", "", None, []
        line.show(b"", -1)
        yield StateChanged(line, "OK")


def _name(line: FollowedLog) -> str:
    return f"{line.key.topic}/{line.key.partition}"


def _directives(payload: memoryview) -> list[Directive]:
    """Those that this release knows; a newer one may have others."""
    found: list[Directive] = []
    for raw in _decode(payload, list[msgspec.Raw]):
        try:
            found.append(json.decode(raw, Directive))  # type: ignore[arg-type]  # a union
        except msgspec.DecodeError:
            continue
    return found


def _decode(payload: memoryview, kind: type[T]) -> T:
    try:
        return json.decode(payload, kind)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"malformed {kind.__name__} from the parent: {error}") from error
