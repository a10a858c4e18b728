"""Parent and child of the pipe against each other, without sockets: cut at every byte, different in every way."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest

from edgebroker.common import batch, records
from edgebroker.common.batch import Reason
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import RemoteProtocolError
from edgebroker.common.types import TopicPartition
from edgebroker.pipe import feed as downstream
from edgebroker.pipe import follower
from edgebroker.pipe.divergence import Search, last_common
from edgebroker.pipe.feed import Feed, FeedCursor, LogFacts, Piece, Stopped, judge, same_chain
from edgebroker.pipe.follower import (
    AppendResult,
    CompareChain,
    FindBoundaries,
    Follower,
    HelloReceived,
    RecreateLog,
    SkipRecords,
    StateChanged,
    TruncateLog,
)
from edgebroker.pipe.stream import Hello, Kind, LogPosition, Patterns, Point, Poll, Refusal, wildcards, write_frame

LOG_ID = "ab" * 16
UP, ME = "aa" * 16, "bb" * 16


class ModelLog:
    """A log as a list of batches."""

    def __init__(self, log_id: str = LOG_ID, log_start: int = 0, chain: int | None = None) -> None:
        self.log_id, self.log_start, self.epoch = log_id, log_start, 1
        self.start_chain = crc32c(bytes.fromhex(log_id)) if chain is None else chain
        self.epochs = [(1, 0)]
        self.batches: list[bytes] = []
        self.gaps: list[tuple[int, int, int]] = []
        self.ends = [log_start]
        self.chains = [self.start_chain]

    @property
    def end(self) -> int:
        return self.ends[-1]

    def publish(self, *counts: int, size: int = 20, salt: str = "") -> ModelLog:
        for count in counts:
            rows = [(None, f"{self.end + n}{salt}".encode().ljust(size, b"."), 1) for n in range(count)]
            self.take(records.restamp(batch.encode(rows), self.end, self.epoch))
        return self

    def take(self, one: bytes) -> None:
        self.batches.append(one)
        self.ends.append(self.end + batch.read_header(one).count)
        self.chains.append(records.chain(one, self.chains[-1]))

    def cut(self, offset: int) -> None:
        rank = self.ends.index(offset)
        del self.batches[rank:], self.ends[rank + 1 :], self.chains[rank + 1 :]

    def removed(self, offset: int) -> ModelLog:
        """Retention: the log begins further on."""
        rank = self.ends.index(offset)
        del self.batches[:rank], self.ends[:rank], self.chains[:rank]
        self.log_start, self.start_chain = offset, self.chains[0]
        return self

    def skip(self, offset: int, chain: int) -> None:
        """Go on behind a gap."""
        self.gaps.append((self.end, offset, chain))
        self.batches.append(b"")
        self.ends.append(offset)
        self.chains.append(chain)

    def behind_gap(self, offset: int) -> tuple[int, int] | None:
        return next(((end, chain) for first, end, chain in self.gaps if first < offset < end), None)

    def points(self, offsets: list[int]) -> list[Point]:
        found = {}
        for offset in offsets:
            rank = next((rank for rank, end in enumerate(self.ends) if end >= offset), None)
            if rank is not None and offset >= self.log_start:
                found[self.ends[rank]] = self.chains[rank]
        return [Point(*item) for item in sorted(found.items())]

    def facts(self) -> LogFacts:
        def contains(epoch: int, offset: int) -> bool:
            later = [first for known, first in self.epochs if known > epoch]
            return not later or offset <= min(later)

        return LogFacts(
            self.log_id, self.epoch, self.log_start, self.start_chain, self.end, self.chains[-1], contains,
            self.behind_gap,
        )  # fmt: skip

    @property
    def data(self) -> bytes:
        return b"".join(self.batches)


class Parent:
    """Answers polls from model logs: what feeding does around a Feed."""

    def __init__(self, logs: dict[TopicPartition, ModelLog], frame_bytes: int = 1 << 20) -> None:
        self.logs, self.frame_bytes = logs, frame_bytes

    def read(self, cursor: FeedCursor, max_bytes: int) -> Piece | Refusal | None:
        log = cursor.log
        assert isinstance(log, ModelLog)
        if cursor.offset >= log.end:
            return None
        rank = log.ends.index(cursor.offset)
        found, end = log.batches[rank], rank + 1
        if not found:
            return Refusal(code="GONE", message="a gap", offset=log.ends[end], chain=log.chains[end])
        while end < len(log.batches) and 0 < len(log.batches[end]) <= max_bytes - len(found):
            found += log.batches[end]
            end += 1
        return Piece(found, 0, len(found), log.ends[end])

    def chain_at(self, cursor: FeedCursor) -> int | None:
        log = cursor.log
        assert isinstance(log, ModelLog)
        # Known at some places only, as at a real parent.
        return log.chains[log.ends.index(cursor.offset)] if cursor.offset % 3 else None

    def durable_end(self, cursor: FeedCursor) -> int:
        assert isinstance(cursor.log, ModelLog)
        return cursor.log.end

    def answer(self, child: Follower) -> bytes:
        poll = child.poll()
        poll = msgspec.json.decode(msgspec.json.encode(poll), type=type(poll))
        hello = Hello(uid=UP, name="parent", level="root", path=[], topics=[])
        out = write_frame(Kind.HELLO, msgspec.json.encode(hello))
        feed = Feed(self)
        feed.frame_bytes = self.frame_bytes
        for line, position in enumerate(poll.logs):
            log = self.logs.get(TopicPartition(position.topic, position.partition))
            refusal = judge(position, log.facts() if log is not None else None)
            if refusal is None and log is not None:
                asked = [position.offset, *(point.offset for point in position.points)]
                chains = {offset: log.chains[log.ends.index(offset)] for offset in asked if offset in log.ends}
                refusal = same_chain(position, log.facts(), chains)
            if refusal is not None:
                out += write_frame(Kind.STATE, msgspec.json.encode(refusal), line)
            else:
                feed.add(FeedCursor(line, log, position, urgent=position.topic == "urgent"))
        while (found := feed.next()) is not None:
            if isinstance(found, Stopped):
                out += write_frame(Kind.STATE, msgspec.json.encode(found.refusal), found.cursor.line)
                break
            assert isinstance(found.piece.source, bytes)
            out += found.head + found.piece.source[found.piece.position :][: found.piece.length]
        return out


class Child:
    """A follower with model logs, which does at once what it is told to do."""

    def __init__(self, logs: dict[TopicPartition, ModelLog], level: str = "l2") -> None:
        self.logs = logs
        self.follower = Follower(ME, "child", level, ["*"], self)
        self.events: list[object] = []
        for key in logs:
            self.follow(key)

    def follow(self, key: TopicPartition) -> None:
        log = self.logs[key]
        self.follower.follow(key, log.log_id, log.epoch, log.log_start, log.end, log.chains[-1])

    def append(self, key: TopicPartition, data: memoryview) -> AppendResult:
        log, position = self.logs[key], 0
        while position < len(data):
            reason, fields = records.header(data, position)
            if fields is None:
                return AppendResult(position, Reason(reason), log.end, log.epoch)
            if fields[0] != log.end:
                return AppendResult(position, Reason.BAD_OFFSET, log.end, log.epoch)
            one = bytes(data[position : position + fields[1]])
            if crc32c(one[21:]) != fields[3]:
                return AppendResult(position, Reason.BAD_CRC, log.end, log.epoch)
            log.take(one)
            position += len(one)
        return AppendResult(position, Reason.OK, log.end, log.epoch)

    def receive(self, data: bytes) -> None:
        self._do(self.follower.receive(memoryview(data)))

    def _do(self, events: Iterator[object]) -> None:
        for event in events:
            self.events.append(event)
            if isinstance(event, FindBoundaries):
                self._do(self.follower.looked(event.line, self.logs[event.line.key].points(event.offsets)))
            elif isinstance(event, CompareChain):
                same = Point(event.offset, event.chain) in self.logs[event.line.key].points([event.offset])
                self._do(self.follower.compared(event.line, same, event.offset))
            elif isinstance(event, TruncateLog):
                self.logs[event.line.key].cut(event.offset)
                self.follow(event.line.key)
            elif isinstance(event, RecreateLog):
                self.logs[event.line.key] = ModelLog(LOG_ID, event.offset, event.chain)
                self.follow(event.line.key)
            elif isinstance(event, SkipRecords):
                self.logs[event.line.key].skip(event.offset, event.chain)
                self.follow(event.line.key)

    def state(self, key: TopicPartition) -> str:
        return self.follower.lines[key].state


ONE = TopicPartition("t", 0)


def settle(parent: Parent, child: Child, rounds: int = 20) -> int:
    """Poll until nothing changes any more; how many answers that took."""
    for number in range(rounds):
        before = len(child.events), {key: log.end for key, log in child.logs.items()}
        child.receive(parent.answer(child.follower))
        child.events = [event for event in child.events if not isinstance(event, HelloReceived | CompareChain)]
        if before == (len(child.events), {key: log.end for key, log in child.logs.items()}):
            return number
    raise AssertionError(f"it does not come to rest: {child.events[-5:]}")


@pytest.mark.parametrize("frame_bytes", [7, 64, 1 << 20])
def test_cut_at_every_byte(frame_bytes: int) -> None:
    """The connection breaks behind every byte: what came is not asked for again, and the copy is exact."""
    parent = Parent({ONE: ModelLog().publish(1, 3, 1, size=9)}, frame_bytes)
    whole = parent.answer(Child({ONE: ModelLog()}).follower)
    for cut in range(len(whole)):
        child = Child({ONE: ModelLog()})
        first = parent.answer(child.follower)
        child.receive(first[:cut])
        rest = parent.answer(child.follower)
        child.receive(rest)
        assert child.logs[ONE].data == parent.logs[ONE].data
        assert child.follower.lines[ONE].chain == parent.logs[ONE].chains[-1]
        assert child.follower.bytes_wasted == 0


def test_byte_by_byte_with_a_cut_every_few_bytes() -> None:
    parent = Parent({ONE: ModelLog().publish(*[2] * 30, size=50)}, 100)
    child, draw = Child({ONE: ModelLog()}), random.Random(5)
    for _ in range(5000):
        answer = parent.answer(child.follower)
        for byte in answer[: draw.randrange(200, 400)]:
            child.receive(bytes([byte]))
        if child.logs[ONE].end == 60:
            break
    assert child.logs[ONE].data == parent.logs[ONE].data
    assert child.follower.bytes_wasted == 0


def test_urgent_topics_wait_one_frame_of_a_long_batch() -> None:
    urgent = TopicPartition("urgent", 0)
    logs = {ONE: ModelLog().publish(1, size=5000), urgent: ModelLog().publish(1, 1)}
    parent, child = Parent(logs, 500), Child({key: ModelLog() for key in logs})
    answer = parent.answer(child.follower)
    position = len(write_frame(Kind.HELLO, b"")) + downstream.HEADER.unpack_from(answer)[0]
    lines = []
    while position < len(answer):
        size, _, _, line, *_ = downstream.HEADER.unpack_from(answer, position)
        lines.append(line)
        position += downstream.HEADER.size + size
    assert lines[0] == 1
    assert lines.count(0) == -(-len(logs[ONE].data) // 500)
    child.receive(answer)
    assert {key: log.data for key, log in child.logs.items()} == {key: log.data for key, log in logs.items()}


def test_a_byte_that_changed_on_the_way() -> None:
    """Every single one: nothing wrong is taken, and the next answer mends it."""
    parent = Parent({ONE: ModelLog().publish(2, 1, size=9)})
    good = parent.answer(Child({ONE: ModelLog()}).follower)
    hello = len(write_frame(Kind.HELLO, b"")) + downstream.HEADER.unpack_from(good)[0]
    for position in range(hello + downstream.HEADER.size, len(good)):
        child = Child({ONE: ModelLog()})
        answer = bytearray(parent.answer(child.follower))
        answer[position] ^= 0x10
        try:
            child.receive(bytes(answer))
        except RemoteProtocolError:
            pass
        taken = child.logs[ONE].data
        # Of a batch only the epoch lies outside of CRC, order and density; the chain at the next frame tells.
        if taken != parent.logs[ONE].data[: len(taken)]:
            wrong = next(at for at in range(len(taken)) if taken[at] != parent.logs[ONE].data[at])
            assert wrong % len(parent.logs[ONE].batches[0]) in range(12, 16)
        else:
            for _ in range(3):
                try:
                    child.receive(parent.answer(child.follower))
                except RemoteProtocolError:
                    continue
            assert child.logs[ONE].data == parent.logs[ONE].data


@pytest.mark.parametrize("common", [0, 1, 5, 6, 40, 99, 100])
@pytest.mark.parametrize("more", [0, 1, 70])
def test_a_parent_with_another_past(common: int, more: int) -> None:
    """It was put back to an older state and went on: the child cuts at the last boundary that both have."""
    one, other = ModelLog().publish(*[1] * common), ModelLog().publish(*[1] * common)
    one.publish(*[1] * (100 - common), salt="old")
    other.publish(*[1, 2] * 40, salt="new")
    child, parent = Child({ONE: one}), Parent({ONE: other})
    if other.end <= one.end:
        other.publish(*[1] * (one.end - other.end + more), salt="new")
    rounds = settle(parent, child)
    assert child.logs[ONE].data == other.data
    assert rounds < 8
    if common < 100:
        cuts = [event.offset for event in child.events if isinstance(event, TruncateLog)]
        assert cuts == [common]


def test_a_thousand_logs_at_a_time_look_for_where_they_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent takes no more values in a poll; all find it in the end."""
    monkeypatch.setattr(follower, "MOST_SEARCHED", 3)
    keys = [TopicPartition("t", number) for number in range(10)]
    child = Child({key: ModelLog().publish(*[1] * 20, salt="old") for key in keys})
    parent = Parent({key: ModelLog().publish(*[1] * 30, salt="new") for key in keys})
    for _ in range(20):
        child.receive(parent.answer(child.follower))
        assert sum(bool(position.points) for position in child.follower.poll().logs) <= 3
    assert all(child.logs[key].data == parent.logs[key].data for key in keys)


@pytest.mark.parametrize("before", [[5], [1, 1], [20, 30], [1] * 60])
@pytest.mark.parametrize("gone", [0, 1])
def test_another_past_in_one_long_batch(before: list[int], gone: int) -> None:
    """The last batch is longer than all before it: what is in front of it is not cut off with it."""
    one, other = ModelLog().publish(*before).publish(100, salt="old"), ModelLog().publish(*before)
    other.publish(*[1] * 200, salt="new")
    start = sum(before[:gone])
    child, parent = Child({ONE: one}), Parent({ONE: other.removed(start)})
    settle(parent, child)
    assert child.logs[ONE].end == other.end
    assert [event.offset for event in child.events if isinstance(event, TruncateLog)] == [sum(before)]
    assert not any(isinstance(event, RecreateLog) for event in child.events)


@pytest.mark.parametrize("same", [True, False])
def test_a_parent_that_is_shorter(same: bool) -> None:
    one = ModelLog().publish(*[1] * 50)
    other = ModelLog().publish(*[1] * 20).publish(*[1] * 10, salt="" if same else "new")
    child, parent = Child({ONE: one}), Parent({ONE: other})
    settle(parent, child)
    if same:
        assert (child.state(ONE), child.logs[ONE].end) == ("behind", 50)
        assert child.follower.lacking
        other.publish(*[1] * 30)
        settle(parent, child)
        assert (child.state(ONE), child.follower.lacking) == ("live", False)
        other.publish(1)
        settle(parent, child)
    assert child.logs[ONE].data == other.data


def test_a_parent_that_begins_further_on() -> None:
    child, parent = (
        Child({ONE: ModelLog().publish(1, 1)}),
        Parent({ONE: ModelLog().publish(*[1] * 30).removed(20)}),
    )
    before = child.logs[ONE].data
    settle(parent, child)
    assert (child.logs[ONE].log_start, child.logs[ONE].data) == (0, before + parent.logs[ONE].data)
    assert [gap[:2] for gap in child.logs[ONE].gaps] == [(2, 20)]


@pytest.mark.parametrize("has", [0, 1, 4, 5, 12, 20, 25])
@pytest.mark.parametrize("frame_bytes", [40, 1 << 20])
def test_a_parent_with_a_gap(has: int, frame_bytes: int) -> None:
    """Whatever a child has: it keeps that, gets what the parent has around its gap, and goes on behind it."""
    whole = ModelLog().publish(*[1] * 30)
    hub = Child({ONE: ModelLog().publish(*[1] * 5)})
    settle(Parent({ONE: ModelLog().publish(*[1] * 30).removed(20)}), hub)
    leaf = Child({ONE: ModelLog().publish(*[1] * has)})
    settle(Parent(hub.logs, frame_bytes), leaf)
    log = leaf.logs[ONE]
    assert log.chains[-1] == whole.chains[-1]
    kept = max(has, 5)
    if kept < 20:
        assert [gap[:2] for gap in log.gaps] == [(kept, 20)]
        assert log.data == b"".join([*whole.batches[:kept], *whole.batches[20:]])
    else:
        assert (log.gaps, log.data) == ([], whole.data)


def test_a_parent_whose_past_is_another_one_and_gone() -> None:
    """No boundary is common: the child begins again where the parent begins."""
    other = ModelLog().publish(*[1] * 60, salt="new").removed(30)
    child, parent = Child({ONE: ModelLog().publish(*[1] * 50)}), Parent({ONE: other})
    settle(parent, child)
    assert (child.logs[ONE].log_start, child.logs[ONE].data) == (30, other.data)


def test_another_log_is_never_followed() -> None:
    one = ModelLog().publish(1, 1)
    child, parent = Child({ONE: one}), Parent({ONE: ModelLog("cd" * 16).publish(5, 5, 5)})
    before = one.data
    settle(parent, child)
    assert (child.state(ONE), child.logs[ONE].data) == ("replaced", before)
    assert not child.follower.lacking, "another parent has it no better"


def test_a_topic_that_is_not_carried_deletes_nothing() -> None:
    child, parent = Child({ONE: ModelLog().publish(1)}), Parent({})
    settle(parent, child)
    assert (child.state(ONE), child.logs[ONE].end, child.follower.lacking) == ("not_carried", 1, True)
    assert [event.code for event in child.events if isinstance(event, StateChanged)] == ["NOT_CARRIED"]


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (Hello(uid=ME, name="me", level="root", path=[], topics=[]), "circle"),
        (Hello(uid=UP, name="up", level="root", path=["cc" * 16, ME], topics=[]), "circle"),
        (Hello(uid=UP, name="peer", level="l2", path=[], topics=[]), "above"),
        (Hello(uid=UP, name="below", level="pos", path=[], topics=[]), "above"),
        (Hello(uid=UP, name="odd", level="l9", path=[], topics=[]), "above"),
    ],
)
def test_the_tree_has_a_direction(hello: Hello, why: str) -> None:
    child = Child({})
    child.follower.poll()
    with pytest.raises(RemoteProtocolError, match=why):
        child.receive(write_frame(Kind.HELLO, msgspec.json.encode(hello)))


def test_frames_that_cannot_be() -> None:
    for data in (
        downstream.HEADER.pack(4, 9, 0, 0, 0, 0, 0, 0),
        write_frame(Kind.HELLO, b"{}"),
        write_frame(Kind.STATE, msgspec.json.encode(Refusal(code="GONE", message="")), line=3),
        write_frame(Kind.STATE, msgspec.json.encode(Refusal(code="NONSENSE", message=""))),
        write_frame(Kind.STATE, msgspec.json.encode(Refusal(code="GONE", message=""))),
        write_frame(Kind.STATE, msgspec.json.encode(Refusal(code="GONE", message="", offset=0))),
        downstream.HEADER.pack(1 << 31, Kind.STATE, 0, 0, 0, 0, 0, 0),
        downstream.HEADER.pack(4, Kind.DATA, 0, 0, 0, 5, 0, 9) + b"data",
        downstream.HEADER.pack(4, Kind.DATA, downstream.Flags.CHAINED, 0, 1, 0, 0, 9) + b"data",
    ):
        child = Child({ONE: ModelLog()})
        child.follower.poll()
        with pytest.raises(RemoteProtocolError):
            child.receive(data)


def test_patterns() -> None:
    follower = Follower(ME, "child", "l2", ["prices", "store-*"], Child({}))
    assert [follower.wants(name) for name in ("prices", "store-7", "sales", "prices.dlq", "__own")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_names_need_no_expression() -> None:
    wanted = Patterns(["prices", "a.b", "store-*"])
    assert [name in wanted for name in ("prices", "a.b", "axb", "store-7", "price")] == [True, True, False, True, False]
    assert wildcards(["prices", "store-*", "[ab]", "a?"]) == ["store-*", "[ab]", "a?"]
    assert "x" not in Patterns([])


@pytest.mark.parametrize("seed", range(30))
def test_the_search_finds_the_last_common_boundary(seed: int) -> None:
    draw = random.Random(seed)
    length, common = draw.randrange(1, 3000), draw.randrange(3000)
    one, other = ModelLog(), ModelLog()
    for number in range(length):
        count = draw.choice([1, 1, 2, 7, 30])
        one.publish(count, size=1, salt="a")
        other.publish(count, size=1, salt="a" if number < common else "b")
    search, rounds = Search(0, one.end), 0
    chains = dict(zip(other.ends, other.chains, strict=True))
    while points := search.take(one.points(search.offsets())):
        search.answered(last_common(points, chains), Point(0, other.start_chain))
        rounds += 1
        assert rounds < 10
    expected = max(end for end in one.ends[:-1] if chains.get(end) == one.chains[one.ends.index(end)])
    assert search.low == expected


def test_a_position_beyond_the_end_of_its_history() -> None:
    """The origin accepted a loss and went on in a new history: who has more of the old one has to cut."""
    log = ModelLog().publish(*[1] * 10)
    old = LogPosition("t", 0, LOG_ID, 1, 10, log.chains[-1])
    log.cut(6)
    log.epoch, log.epochs = 2, [(1, 0), (2, 6)]
    log.publish(*[1] * 10)
    assert judge(old, log.facts()) is None
    chains = dict(zip(log.ends, log.chains, strict=True))
    refusal = same_chain(old, log.facts(), chains)
    assert refusal is not None and refusal.code == "DIVERGED"
    newer = LogPosition("t", 0, LOG_ID, 3, 10, 0)
    refusal = judge(newer, log.facts())
    assert refusal is not None and refusal.code == "BEHIND"


def test_a_log_whose_beginning_cannot_be_compared() -> None:
    """No boundary is known to be common, and there are none left to ask about: it begins again."""
    one, other = ModelLog().publish(*[1] * 50, salt="old"), ModelLog().publish(*[1] * 60, salt="new")
    child, parent = Child({ONE: one}), Parent({ONE: other})
    whole = one.points
    one.points = lambda offsets: [point for point in whole(offsets) if point.offset >= 10]  # type: ignore[method-assign]
    assert settle(parent, child) < 10
    assert child.logs[ONE].data == other.data


def test_what_lies_before_the_parents_log_is_not_lost() -> None:
    one, other = ModelLog().publish(*[1] * 130), ModelLog().publish(*[1] * 130)
    one.publish(*[1] * 70, salt="old")
    other.publish(*[1] * 100, salt="new").removed(100)
    child, parent = Child({ONE: one}), Parent({ONE: other})
    settle(parent, child)
    assert [event.offset for event in child.events if isinstance(event, TruncateLog)] == [130]
    assert (child.logs[ONE].log_start, child.logs[ONE].end) == (0, 230)
    assert child.logs[ONE].data.endswith(other.data)


@pytest.mark.parametrize(
    "topic",
    [
        {"name": "../../evil"},
        {"name": "prices.dlq"},
        {"name": "__own"},
        {"settings": {"partitions": 2}},
        {"partitions": []},
        {"partitions": [[LOG_ID, UP, [], 0, 0, [-1, -1]]]},
        {"partitions": [[LOG_ID, UP, [[2, 0], [1, 5]], 0, 0, [-1, -1]]]},
        {"partitions": [[LOG_ID, UP, [[1, 0]], -5, 0, [-1, -1]]]},
        {"partitions": [["x", UP, [[1, 0]], 0, 0, [-1, -1]]]},
    ],
)
def test_topics_that_cannot_be(topic: dict[str, object]) -> None:
    good = {"name": "t", "settings": {}, "partitions": [[LOG_ID, UP, [[1, 0]], 0, 0, [-1, -1]]], "digest": 1}
    for changes, refused in ((topic, True), ({}, False)):
        hello = {"uid": UP, "name": "up", "level": "root", "path": [], "topics": [{**good, **changes}]}
        child = Child({})
        child.follower.poll()
        frame = write_frame(Kind.HELLO, msgspec.json.encode(hello))
        if refused:
            with pytest.raises(RemoteProtocolError):
                child.receive(frame)
        else:
            child.receive(frame)


@pytest.mark.parametrize(
    "changes",
    [
        {"skip": -1}, {"skip": 16 << 20}, {"offset": -1}, {"chain": 1 << 32}, {"epoch": -1}, {"log_id": "?"},
        {"partition": -1}, {"points": [Point(1, 1)] * 129},
    ],
)  # fmt: skip
def test_positions_that_cannot_be(changes: dict[str, object]) -> None:
    position = msgspec.structs.replace(LogPosition("t", 0, LOG_ID, 1, 0, 0), **changes)
    poll = Poll(uid=ME, name="child", level="l2", topics=["*"], logs=[position])
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(poll), type=Poll)
