"""What the broker asks of an engine (storage/engine.py), of every engine, and through that interface only.

An engine that cannot do something says so as data; one that can passes the checks of it as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgebroker.common import batch, records
from edgebroker.common.batch import Reason
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage.engine import Engine, Log, MirrorEngine
from edgebroker.storage.types import (
    UNKNOWN_CHAIN,
    ChainPoint,
    CorruptRange,
    FileSlice,
    GroupOffset,
    Inline,
    make_identity,
)
from tests.kit.storage import TOPIC, TURNS, Harness, Listener, StoreHarness, encode, store_settings

SEGMENT_BYTES = 1500
TTL_MS = 5000


class Recorder(Listener):
    """Keeps the bytes that became durable, and checks that they come in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, bytes] = {}
        self.ends: dict[str, int] = {}

    def on_durable(self, log: Log, chunks: Any) -> None:
        assert chunks
        for chunk in chunks:
            assert chunk.first_offset == self.ends.get(log.name, log.log_start)
            data = bytes(memoryview(chunk))
            assert len(data) == len(chunk)
            self.stored[log.name] = self.stored.get(log.name, b"") + data
            self.ends[log.name] = chunk.next_offset
        assert self.ends[log.name] == log.durable_end <= log.written_end <= log.staged_end
        super().on_durable(log, chunks)


class MemorySubject(Harness):
    def __init__(self, path: Path) -> None:
        super().__init__()


class SegmentSubject(StoreHarness):
    def __init__(self, path: Path) -> None:
        super().__init__(path / "data", store_settings(segment_bytes=SEGMENT_BYTES))


Subject = MemorySubject | SegmentSubject
SUBJECTS: list[type[MemorySubject] | type[SegmentSubject]] = [MemorySubject, SegmentSubject]


@contextmanager
def opened(kind: type[MemorySubject] | type[SegmentSubject], path: Path) -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.kit.storage.Listener", Recorder)
        subject = kind(path)
    try:
        yield subject
    finally:
        subject.close()


@pytest.fixture(params=SUBJECTS, ids=["memory", "segment"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    with opened(request.param, tmp_path) as subject:
        yield subject


@pytest.fixture
def mirror(subject: Subject) -> MirrorEngine:
    """The engine, when it can hold replicas."""
    if subject.engine.mirrors is None:
        pytest.skip("this engine says that it holds no replicas")
    return subject.engine.mirrors


def answer(subject: Subject, ask: Callable[[Callable[..., None]], None]) -> tuple[Any, ...]:
    """What a callback is called with; it is called exactly once."""
    answers: list[tuple[Any, ...]] = []
    ask(lambda *result: answers.append(result))
    for _ in range(TURNS):
        if answers:
            break
        subject.loop.turn(0.005)
        subject.clock.advance(0.01)
    subject.loop.turn(0.0)
    assert len(answers) == 1
    return answers[0]


class Stored(NamedTuple):
    """A batch as it is stored."""

    first: int
    end: int
    data: bytes
    chain: int
    """The header chain checksum after it."""


def stored_batches(subject: Subject, log: Log) -> list[Stored]:
    """The batches of a log, from what the listener was told."""
    data, found, chain = subject.listener.stored.get(log.name, b""), [], log.identity.chain
    while data:
        header = batch.read_header(data)
        piece, data = data[: header.size], data[header.size :]
        chain = records.chain(piece, chain)
        found.append(Stored(header.base_offset, header.base_offset + header.count, piece, chain))
    return found


def bytes_of(subject: Subject, piece: FileSlice | Inline) -> bytes:
    if isinstance(piece, Inline):
        return bytes(piece.data)
    piece.file.hold()
    data = subject.engine.read_cached(piece)
    loaded, error = answer(
        subject, lambda done: subject.engine.load_range(piece.file, piece.position, piece.length, done)
    )
    piece.file.release()
    assert error == "" and data in (None, loaded)
    return bytes(loaded)


# ---- topics ----


def test_topics(subject: Subject) -> None:
    engine = subject.engine
    assert list(engine.topics()) == list(engine.logs()) == engine.partitions(TOPIC) == []
    assert engine.log(TOPIC, 0) is None
    wanted = TopicSettings(partitions=3, message_ttl_ms=TTL_MS)
    assert answer(subject, lambda done: engine.create_topic(TOPIC, wanted, done)) == (Outcome.OK, "")
    assert subject.listener.topics == [TOPIC]
    outcome, why = answer(subject, lambda done: engine.create_topic(TOPIC, wanted, done))
    assert (outcome, TOPIC in why) == (Outcome.NAME_CLASH, True)
    assert answer(subject, lambda done: engine.create_topic("other", TopicSettings(), done))[0] is Outcome.OK
    logs = engine.partitions(TOPIC)
    assert [(log.topic, log.partition, log.name) for log in logs] == [(TOPIC, n, f"{TOPIC}/{n}") for n in range(3)]
    assert list(engine.topics()) == [TOPIC, "other"]
    assert list(engine.logs()) == [*logs, *engine.partitions("other")]
    assert [engine.log(TOPIC, number) for number in (-1, 0, 1, 2, 3)] == [None, *logs, None]
    for log in logs:
        assert (log.log_start, log.staged_end, log.written_end, log.durable_end, log.size_bytes) == (0, 0, 0, 0, 0)
        assert (log.epoch, log.staged_epoch, log.identity.epoch) == (1, 1, 1)
        assert (log.settings, log.identity.origin) == (wanted, engine.node_uid)
        assert log.chain == log.chain_at(0) == log.identity.chain
        assert not (log.corrupt_ranges or log.rewriting or log.damaged_before(0))
        assert log.find(0, 100, 100) is None
    assert len({log.identity.log_id for log in engine.logs()}) == 4


def test_altering_a_topic(subject: Subject) -> None:
    subject.create(partitions=2)
    wanted = TopicSettings(partitions=2, urgent=True, retention_ms=1)
    assert answer(subject, lambda done: subject.engine.alter_topic(TOPIC, wanted, done)) == (Outcome.OK, "")
    assert [log.settings for log in subject.engine.partitions(TOPIC)] == [wanted, wanted]
    assert subject.listener.topics == [TOPIC, TOPIC]


def test_changing_identities(subject: Subject) -> None:
    subject.create(partitions=2)
    subject.append(encode(b"a"))
    changes = [lambda old: replace(old, epochs=[*old.epochs, (2, 1)]), lambda old: old]
    before = subject.log(partition=1).identity
    assert answer(subject, lambda done: subject.engine.change_identities(TOPIC, changes, done))[0] is Outcome.OK
    assert subject.log(partition=1).identity == before
    log = subject.log()
    assert (log.identity.epochs, log.epoch, log.staged_epoch) == ([(1, 0), (2, 1)], 2, 2)
    subject.append(encode(b"b"))
    epochs = [batch.read_header(one.data).epoch for one in stored_batches(subject, log)]
    assert epochs == [1, 2]


# ---- writing ----


@pytest.mark.parametrize("level", list(AckLevel))
def test_what_was_appended_becomes_written_then_durable(subject: Subject, level: AckLevel) -> None:
    subject.create()
    log, ends = subject.log(), []
    for size in (1, 3, 2):
        answers = subject.stage(*(encode(b"x" * 50, b"y") for _ in range(size)), level=level)
        assert [(one.offset, one.code) for one in answers] == [(log.staged_end - 2 * n, 0) for n in range(size, 0, -1)]
        assert subject.engine.staged_bytes > 0
        subject.durable()
        ends.append(log.durable_end)
    assert ends == [2, 8, 12]
    assert (log.records_in, log.bytes_in) == (12, log.size_bytes)
    assert (log.written_end, log.staged_end, subject.engine.staged_bytes) == (12, 12, 0)
    written = [end for event, _, end in subject.listener.events if event == "written"]
    assert written == sorted(written) and written[-1] == 12
    for rank, (event, _, end) in enumerate(subject.listener.events):
        assert event != "durable" or ("written", log.name, end) in subject.listener.events[:rank]


def test_nothing_is_read_before_it_is_durable(subject: Subject) -> None:
    subject.create()
    subject.stage(encode(b"a"))
    assert (subject.log().staged_end, subject.log().durable_end, subject.log().find(0, 100, 100)) == (1, 0, None)


def test_duplicates_get_their_offset_again(subject: Subject) -> None:
    subject.create()
    frames = [encode(b"%d" % n, sequence=n) for n in range(3)]
    assert [one.offset for one in subject.append(*frames, frames[1])] == [0, 1, 2, 1]
    assert [one.offset for one in subject.append(frames[2])] == [2]
    assert subject.log().durable_end == subject.log().records_in == 3
    assert subject.log().status().producers == 1


# ---- reading ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUBJECTS, ids=["memory", "segment"])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=4), min_size=1, max_size=4), max_size=8))
def test_readers_get_the_stored_batches_byte_by_byte(
    kind: type[MemorySubject] | type[SegmentSubject], groups: list[list[list[int]]]
) -> None:
    """At every offset and limit: whole batches from the one that holds the offset on, at least one of them."""
    with tempfile.TemporaryDirectory() as directory, opened(kind, Path(directory)) as subject:
        subject.create()
        log = subject.log()
        for group in groups:
            subject.append(*(encode(*(b"v" * size for size in sizes)) for sizes in group))
        batches = stored_batches(subject, log)
        assert [one.first for one in batches] == [0, *(one.end for one in batches)][: len(batches)]
        assert log.size_bytes == sum(len(one.data) for one in batches)
        for offset in range(log.durable_end):
            for max_bytes, max_records in ((1, 1 << 30), (300, 1 << 30), (1 << 20, 3), (1 << 20, 1 << 30)):
                check_piece(subject, batches, offset, max_bytes, max_records)
        assert log.find(log.durable_end, 1 << 20, 1 << 30) is None
        check_hints(subject, batches)
        check_chains(subject, batches)


def check_piece(subject: Subject, batches: list[Stored], offset: int, max_bytes: int, max_records: int) -> None:
    piece = subject.log().find(offset, max_bytes, max_records)
    if isinstance(piece, FileSlice | Inline):
        check_answer(batches, offset, bytes_of(subject, piece), piece.first_offset, piece.next_offset, max_bytes)
        last = next(one for one in batches if one.end == piece.next_offset)
        assert last.first < offset + max_records
    cold = subject.read_cold(offset, max_bytes)
    assert (cold.error, cold.corrupt, cold.timed_out) == ("", None, False)
    check_answer(batches, offset, cold.data, cold.first_offset, cold.next_offset, max_bytes)


def check_answer(batches: list[Stored], offset: int, data: bytes, first: int, next_offset: int, max_bytes: int) -> None:
    expected = [one for one in batches if one.end > offset and one.first < next_offset]
    assert (expected[0].first, expected[-1].end) == (first, next_offset)
    assert data == b"".join(one.data for one in expected)
    assert len(data) <= max_bytes or len(expected) == 1


def check_hints(subject: Subject, batches: list[Stored]) -> None:
    """A reader that passes its hint on gets everything once; so does one whose hint is wrong for its offset."""
    log, offset, hint, seen = subject.log(), 0, None, b""
    while (piece := log.find(offset, 400, 1 << 30, hint)) is not None:
        if isinstance(piece, FileSlice | Inline):
            seen += bytes_of(subject, piece)
            offset, hint = piece.next_offset, piece.next_hint if isinstance(piece, FileSlice) else None
        else:
            cold = subject.read_cold(offset, 400)
            seen, offset, hint = seen + cold.data, cold.next_offset, None
    assert seen == b"".join(one.data for one in batches)
    end_hint = log.end_hint()
    subject.append(encode(b"more"))
    piece = log.find(offset, 400, 1 << 30, end_hint)
    assert isinstance(piece, FileSlice | Inline) or subject.read_cold(offset).first_offset == offset
    batches[:] = stored_batches(subject, log)


def check_chains(subject: Subject, batches: list[Stored]) -> None:
    """chains() knows every boundary, chain_at() those that need no disk, and they agree."""
    log = subject.log()
    known = {0: log.identity.chain, **{one.end: one.chain for one in batches}}
    assert log.chain == log.chain_at(log.durable_end) == known[log.durable_end] != UNKNOWN_CHAIN
    assert log.chain_at(0) == log.identity.chain
    for offset in range(log.durable_end + 1):
        assert log.chain_at(offset) in (None, known.get(offset))
        boundary = min(one for one in known if one >= offset)
        expected = [ChainPoint(boundary, known[boundary])]
        assert answer(subject, lambda done, at=offset: subject.engine.chains(log, [at], done)) == (expected, "")  # type: ignore[misc]
        assert not log.damaged_before(offset)
    every = [ChainPoint(offset, known[offset]) for offset in sorted(known)]
    offsets = range(log.durable_end + 1)
    assert answer(subject, lambda done: subject.engine.chains(log, offsets, done)) == (every, "")


def test_ages_and_the_time_to_live(subject: Subject) -> None:
    """Never older than they are, and gone when they are old enough: to the second, for a time to live of five."""
    subject.create(message_ttl_ms=TTL_MS)
    log, engine, born = subject.log(), subject.engine, []
    for number in range(40):
        born.append(subject.clock.monotonic())
        subject.append(encode(b"x" * (number % 7 * 40)))
        subject.clock.advance(0.4)
        ages = [(subject.clock.monotonic() - when) * 1000 for when in born]
        live = next((offset for offset, age in enumerate(ages) if age <= TTL_MS), log.durable_end)
        surely = next((offset for offset, age in enumerate(ages) if age <= TTL_MS + 2500), log.durable_end)
        assert surely <= engine.live_from(log) <= live
        for offset, age in enumerate(ages):
            assert 0 <= engine.age_ms(log, offset + 1) <= age + 1
    subject.clock.advance(TTL_MS / 1000 + 2.5)
    assert engine.live_from(log) == log.durable_end


def test_without_a_time_to_live_everything_lives(subject: Subject) -> None:
    subject.create()
    subject.append(encode(b"a"))
    subject.clock.advance(1e6)
    assert subject.engine.live_from(subject.log()) == subject.log().log_start == 0


def test_an_offset_for_a_time(subject: Subject) -> None:
    subject.create()
    times = [100, 300, 200, 200, 500, 400, 600]
    for rank in range(0, len(times), 2):
        subject.append(batch.encode([(None, b"v" * 200, time) for time in times[rank : rank + 2]]))
    for wanted in range(0, 800, 50):
        expected = next((offset for offset, time in enumerate(times) if time >= wanted), len(times))
        result = answer(subject, lambda done, at=wanted: subject.engine.offset_at_time(subject.log(), at, done))  # type: ignore[misc]
        assert result == (expected, "")


# ---- what is stored beside the records ----


def test_committed_offsets(subject: Subject) -> None:
    engine, key = subject.engine, ("tills", TOPIC, 0)
    subject.create()
    log_id = subject.log().identity.log_id
    engine.commit_offset(key, GroupOffset(log_id, 1, 5))
    engine.commit_offset(("other", TOPIC, 0), GroupOffset(log_id, 1, 1))
    engine.commit_offset(key, GroupOffset(log_id, 1, 7, attempts=2))
    subject.stored()
    found = {key: replace(offset, revision=0) for key, offset in engine.group_offsets().items()}
    assert found == {key: GroupOffset(log_id, 1, 7, attempts=2), ("other", TOPIC, 0): GroupOffset(log_id, 1, 1)}
    engine.commit_offset(key, None)
    subject.stored()
    assert list(engine.group_offsets()) == [("other", TOPIC, 0)]


def test_producers(subject: Subject) -> None:
    assert subject.engine.producers.of("till") is None
    subject.engine.producers.grant("till", 7, 0, lambda client: False)
    subject.engine.producers.grant("till", 7, 1, lambda client: False)
    assert subject.engine.producers.of("till") == (7, 1)
    subject.stored()
    assert subject.engine.producers.of("other") is None
    assert subject.engine.children() == {}


def test_a_complete_snapshot(subject: Subject) -> None:
    subject.create(kind="table")
    subject.append(encode(b"a"), encode(b"b"))
    before, log = subject.log().identity, subject.log()
    assert answer(subject, lambda done: subject.engine.complete_snapshot(log, 0, 2, done)) == (Outcome.OK, "")
    assert log.identity == replace(before, snapshot=(0, 2))
    assert subject.listener.topics == [TOPIC, TOPIC]


# ---- the engine itself ----


def test_a_healthy_engine(subject: Subject) -> None:
    subject.create()
    subject.append(encode(b"a"))
    engine = subject.engine
    assert (engine.refusal(), engine.problems(), dict(engine.tombstones)) == (None, {}, {})
    assert len(bytes.fromhex(engine.node_uid)) == 16
    segments = isinstance(subject, SegmentSubject)
    assert engine.status().engine == ("segment" if segments else "memory")
    assert subject.log().status().bytes == subject.log().size_bytes
    assert set(engine.latencies()) == ({"sync", "append"} if segments else set())
    subject.until(engine.flush)
    assert subject.close()


def test_what_an_engine_cannot_do_it_says_as_data(subject: Subject) -> None:
    """A life in memory has none of what needs a disk; a disk has all of it."""
    subject.create()
    subject.append(encode(b"a"))
    engine: Engine = subject.engine
    if isinstance(subject, SegmentSubject):
        subject.until(engine.disk)
    abilities = (engine.mirrors, engine.remover, engine.replacements, engine.inventory(), engine.disk())
    on_disk = engine.status().engine == "segment"
    assert [ability is not None for ability in abilities] == [on_disk] * len(abilities)
    assert engine.mirrors in (None, engine)


# ---- replicas ----


def replicated(first: int, count: int, epoch: int = 1) -> bytes:
    """Batches of one record each, with their offsets."""
    return b"".join(records.restamp(encode(b"%d" % n * 100), n, epoch) for n in range(first, first + count))


def take(subject: Subject, data: bytes) -> None:
    assert subject.engine.append_numbered(subject.log(), memoryview(data)) == (len(data), Reason.OK)
    subject.durable()


@pytest.fixture
def replica(subject: Subject, mirror: MirrorEngine) -> Log:
    """A log of another node, with 40 records in several segments."""
    identity = make_identity("ab" * 16, TopicSettings())
    assert answer(subject, lambda done: mirror.create_mirror(TOPIC, [identity], done)) == (Outcome.OK, "")
    log: Log = subject.log()
    assert (log.identity, subject.listener.topics) == (identity, [TOPIC])
    for first in range(0, 40, 5):
        take(subject, replicated(first, 5))
    return log


def test_a_replica_is_the_same_bytes(subject: Subject, replica: Log) -> None:
    data = b"".join(one.data for one in stored_batches(subject, replica))
    assert data == replicated(0, 40)
    assert replica.chain == records.chain(data, replica.identity.chain)
    gap = replicated(50, 1)
    assert subject.engine.append_numbered(replica, memoryview(gap)) == (0, Reason.BAD_OFFSET)
    newer = replicated(40, 1, epoch=2)
    assert subject.engine.append_numbered(replica, memoryview(newer)) == (0, Reason.BAD_EPOCH)


@pytest.mark.parametrize("offset", [0, 1, 15, 39])
def test_truncating_a_replica(subject: Subject, mirror: MirrorEngine, replica: Log, offset: int) -> None:
    assert answer(subject, lambda done: mirror.truncate(replica, offset, done)) == (Outcome.OK, "")
    assert (replica.staged_end, replica.durable_end, replica.log_start) == (offset, offset, 0)
    assert replica.chain == records.chain(replicated(0, offset), replica.identity.chain)
    assert subject.listener.rewritten == [replica.name]
    assert not replica.rewriting and replica.find(offset, 100, 100) is None
    subject.listener.ends[replica.name] = offset
    take(subject, replicated(offset, 45 - offset))
    assert subject.values() == [b"%d" % n * 100 for n in range(45)]


def test_what_is_staged_keeps_a_replica_as_it_is(subject: Subject, mirror: MirrorEngine, replica: Log) -> None:
    data = replicated(40, 1)
    mirror.append_numbered(replica, memoryview(data))
    for ask in (
        lambda done: mirror.truncate(replica, 3, done),
        lambda done: mirror.recreate(replica, lambda old: old, done),
    ):
        assert answer(subject, ask)[0] is Outcome.OVERLOADED
    subject.durable()
    assert replica.durable_end == 41 and subject.listener.rewritten == []


def test_recreating_a_replica(subject: Subject, mirror: MirrorEngine, replica: Log) -> None:
    for identity in (
        replace(replica.identity, log_start=100, chain=77),
        replace(make_identity("cd" * 16, TopicSettings()), log_start=7),
    ):
        result = answer(subject, lambda done, new=identity: mirror.recreate(replica, lambda old: new, done))  # type: ignore[misc]
        assert result == (Outcome.OK, "")
        start = identity.log_start
        assert (replica.identity, replica.chain, replica.chain_at(start)) == (identity, identity.chain, identity.chain)
        assert (replica.log_start, replica.staged_end, replica.durable_end) == (start, start, start)
        subject.listener.ends[replica.name] = start
        take(subject, replicated(start, 3))
        assert subject.values() == [b"%d" % n * 100 for n in range(start, start + 3)]
    assert subject.listener.rewritten == [replica.name] * 2


def test_repairing_a_replica(subject: Subject, mirror: MirrorEngine, replica: Log) -> None:
    assert answer(subject, lambda done: mirror.repair(replica, replicated(0, 1), done))[0] == -1, "nothing is damaged"
    inventory = mirror.inventory()
    assert isinstance(subject, SegmentSubject) and inventory is not None
    file = next(one for one in inventory[0].segments if one.sealed)
    path = subject.directory() / file.file
    with path.open("r+b") as stored:
        stored.seek(file.bytes // 2)
        stored.write(b"\0\0\0\0")
    cold = [subject.read_cold(offset) for offset in range(5)]
    (corrupt,) = {one.corrupt for one in cold if one.corrupt is not None}
    assert replica.corrupt_ranges == [corrupt] and isinstance(corrupt, CorruptRange)
    assert replica.find(corrupt.first, 100, 100) == corrupt
    assert replica.to_repair() == corrupt
    assert replica.damaged_before(corrupt.next) and not replica.damaged_before(corrupt.first)
    damaged = bytearray(replicated(corrupt.first, corrupt.next - corrupt.first))
    damaged[-1] ^= 1
    next_offset, why = answer(subject, lambda done: mirror.repair(replica, bytes(damaged), done))
    assert (next_offset, bool(why), replica.corrupt_ranges) == (-1, True, [corrupt])
    whole = replicated(corrupt.first, corrupt.next - corrupt.first)
    assert answer(subject, lambda done: mirror.repair(replica, whole, done)) == (corrupt.next, "")
    assert replica.corrupt_ranges == []
    assert subject.values() == [b"%d" % n * 100 for n in range(40)]
    assert replica.name in subject.listener.rewritten
