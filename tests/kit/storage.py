"""What the storage tests share: a clock that is turned by hand, a store on a loop, and a crash.

The harness turns a real loop; nothing sleeps. A crash is the directory as it lies at that moment: it is copied, the
process that wrote it is thrown away, and the copy takes its place. Power cuts are made from it by truncating files.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.network.io.loop import Loop
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.log.staging import Chunk
from edgebroker.storage.memory import MemoryEngine
from edgebroker.storage.settings import HousekeepingSettings, StoreSettings
from edgebroker.storage.store import SegmentStore
from edgebroker.storage.types import ColdRead, CorruptRange, FileSlice, GroupKey, GroupOffset, Inline, LogGap, Tombstone
from tests.kit.clock import ManualClock

TOPIC = "prices"
MAX = 1 << 20
TURNS = 300
TURN_SECONDS = 0.02


class Message(NamedTuple):
    """One record as a reader gets it."""

    offset: int
    value: bytes | None
    timestamp: int = 0


class Placed(NamedTuple):
    """The answer to one PUBLISH frame."""

    offset: int
    code: int
    reason: int


class Listener:
    """Writes down what the store tells; `floor` is what every live group has passed."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, Any]] = []
        self.topics: list[str] = []
        self.rewritten: list[str] = []
        self.floor: int | None = None
        self.pin: int | None = None

    def on_opening(self, done: int, topics: int) -> None: ...

    def on_written(self, log: Log) -> None:
        self.events.append(("written", log.name, log.written_end))

    def on_durable(self, log: Log, chunks: list[Chunk]) -> None:
        self.events.append(("durable", log.name, log.durable_end))

    def on_failed(self, log: Log, outcome: Outcome, message: str) -> None:
        self.events.append(("failed", log.name, outcome))

    def on_topic(self, name: str) -> None:
        self.topics.append(name)

    def on_rewritten(self, log: Log) -> None:
        self.rewritten.append(log.name)

    def retention_pin(self, log: Log) -> int | None:
        return self.pin

    def retention_floor(self, log: Log) -> int | None:
        return self.floor

    def on_full(self) -> bool:
        return False


def store_settings(
    *,
    segment_bytes: int = 1000,
    window: int = 20,
    commit_interval: float = 0.0,
    read_timeout: float = 5.0,
    scrub: int = 0,
    **limits: int,
) -> StoreSettings:
    """Small segments, no watermarks, no limits unless named."""
    defaults = {
        "retention_bytes": 0,
        "retention_ms": 0,
        "segment_ms": 0,
        "max_bytes": 0,
        "deleted_retention_ms": 86_400_000,
    }
    housekeeping = HousekeepingSettings(
        **{**defaults, "soft_free_bytes": 0, "hard_free_bytes": 0, "scrub_bytes_per_second": scrub, **limits}
    )
    return StoreSettings(
        level="root",
        segment_bytes=segment_bytes,
        max_batch=MAX,
        max_record=MAX,
        window=window,
        commit_interval=commit_interval,
        read_timeout=read_timeout,
        housekeeping=housekeeping,
    )


def encode(*values: bytes, timestamp: int = 1000, sequence: int = -1, producer: int = 7, epoch: int = 0) -> bytes:
    """A batch of values; with a sequence it belongs to a producer."""
    if sequence < 0:
        producer = epoch = -1
    rows = [(None, value, timestamp) for value in values]
    return batch.encode(rows, producer_id=producer, producer_epoch=epoch, base_sequence=sequence)


def pack(frames: Iterable[bytes]) -> tuple[memoryview, bytes]:
    """PUBLISH frames as the transport hands them over: one buffer, and a span for each."""
    data, spans = b"", b""
    for number, frame in enumerate(frames):
        spans += struct.pack("=QII", number, len(data), len(data) + len(frame))
        data += frame
    return memoryview(data), spans


def producer_of(frames: Sequence[bytes]) -> int:
    """The producer id of the first of these batches."""
    return int.from_bytes(frames[0][43:51], "big", signed=True) if len(frames[0]) >= 51 else -1


def turn_until(loop: Loop, condition: Callable[[], object]) -> None:
    """Turn until the condition holds; a test that waits in vain fails here."""
    for number in range(TURNS):
        if condition():
            return
        loop.turn(TURN_SECONDS if number else 0.0)
    raise AssertionError("waited in vain")


class Harness:
    """An engine on a loop; common to both engines."""

    def __init__(self, clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock()
        self.listener = Listener()
        self.loop = Loop(self.clock)
        try:
            self.engine: Engine = self.make_engine()
            self.engine.open(self.listener)
        except BaseException:
            self.loop.close()
            raise

    def make_engine(self) -> Engine:
        return MemoryEngine(self.loop, self.clock, max_batch=MAX, max_record=MAX, window=20)

    def until(self, condition: Callable[[], object]) -> None:
        turn_until(self.loop, condition)

    def create(self, name: str = TOPIC, **settings: Any) -> Code:
        answers: list[Code] = []
        self.engine.create_topic(name, TopicSettings(**settings), lambda outcome, _: answers.append(outcome))
        self.until(lambda: answers)
        return answers[0]

    def log(self, topic: str = TOPIC, partition: int = 0) -> Any:
        log = self.engine.log(topic, partition)
        assert log is not None, f"{topic}/{partition} is not served"
        return log

    def stage(
        self, *frames: bytes, level: AckLevel = AckLevel.DURABLE, topic: str = TOPIC, partition: int = 0
    ) -> list[Placed]:
        """Append without turning the loop."""
        data, spans = pack(frames)
        appended = self.engine.append(self.log(topic, partition), data, spans, level, False, producer_of(frames))
        assert appended.frames == len(frames)
        return [Placed._make(row) for row in struct.iter_unpack("=qii", appended.answers)]

    def append(
        self, *frames: bytes, level: AckLevel = AckLevel.DURABLE, topic: str = TOPIC, partition: int = 0
    ) -> list[Placed]:
        """Append and turn until all of it is durable."""
        answers = self.stage(*frames, level=level, topic=topic, partition=partition)
        self.durable(topic, partition)
        return answers

    def append_inflated(self, frame: bytes) -> int:
        """Append one batch, compressed or not, as the checker passes it on; its offset, once it is durable."""
        data, spans = pack([frame])
        appended = self.engine.append(self.log(), data, spans, AckLevel.DURABLE, True, producer_of([frame]))
        (answer,) = (Placed._make(row) for row in struct.iter_unpack("=qii", appended.answers))
        assert answer.code == Code.OK, answer
        self.durable()
        return answer.offset

    def durable(self, topic: str = TOPIC, partition: int = 0) -> None:
        """Turn until all that was appended is durable; the clock is advanced, for some of it is synced later."""
        log = self.log(topic, partition)
        for number in range(TURNS):
            if log.durable_end >= log.staged_end:
                return
            self.loop.turn(TURN_SECONDS if number else 0.0)
            self.clock.advance(0.006)
        raise AssertionError("waited in vain")

    def read(self, start: int | None = None, *, max_bytes: int = MAX, max_records: int = 1 << 30, topic: str = TOPIC,
             partition: int = 0) -> tuple[list[Message], list[CorruptRange | LogGap]]:  # fmt: skip
        """Everything from `start` on as a reader without a memory sees it, and what it met that is not there."""
        log, found = self.log(topic, partition), []
        corrupt_ranges: list[CorruptRange | LogGap] = []
        offset = log.log_start if start is None else start
        while True:
            piece = log.find(offset, max_bytes, max_records)
            if piece is None:
                assert offset == log.durable_end, "the reader is beyond the durable end"
                return found, corrupt_ranges
            if isinstance(piece, CorruptRange | LogGap):
                assert piece.first <= offset < piece.next
                corrupt_ranges.append(piece)
                offset = piece.next
                continue
            if isinstance(piece, FileSlice):
                data = os.pread(piece.file.fd, piece.length, piece.position)
                assert len(data) == piece.length
                next_offset = piece.next_offset
            elif isinstance(piece, Inline):
                data, next_offset = bytes(piece.data), piece.next_offset
            else:
                cold = self.read_cold(offset, max_bytes, topic=topic, partition=partition)
                assert not cold.error, cold.error
                if cold.corrupt is not None:
                    assert log.find(offset, max_bytes, max_records) == log.corrupt_range_at(offset) is not None
                    continue
                data, next_offset = cold.data, cold.next_offset
            assert next_offset > offset, "a read that does not move"
            rows = batch.decode(data, first=offset, last=next_offset - 1)
            assert [row.offset for row in rows] == list(range(offset, next_offset)), "records are missing in a slice"
            found += [Message(row.offset, row.value, row.timestamp) for row in rows]
            offset = next_offset

    def values(self, start: int | None = None, **options: Any) -> list[bytes | None]:
        """The values of everything; there must be no corrupt range."""
        found, corrupt_ranges = self.read(start, **options)
        assert not corrupt_ranges
        return [message.value for message in found]

    def read_cold(self, offset: int, max_bytes: int = MAX, *, topic: str = TOPIC, partition: int = 0) -> ColdRead:
        answers: list[ColdRead] = []
        self.engine.read_cold(self.log(topic, partition), offset, max_bytes, answers.append)
        self.until(lambda: answers)
        return answers[0]

    def offset_at(self, timestamp: int) -> int:
        answers: list[tuple[int, str]] = []
        self.engine.offset_at_time(self.log(), timestamp, lambda offset, error: answers.append((offset, error)))
        self.until(lambda: answers)
        assert not answers[0][1], answers[0][1]
        return answers[0][0]

    def commit(self, offset: int, group: str = "tills", *, stored: bool = True) -> GroupKey:
        """Commit a group offset of partition 0; wait until it is stored."""
        key, log = (group, TOPIC, 0), self.log()
        self.engine.commit_offset(key, GroupOffset(log.identity.log_id, log.epoch, offset))
        if stored:
            self.stored()
        return key

    def stored(self) -> None:
        """Turn until everything committed is durable."""
        done: list[bool] = []
        self.engine.when_stored(lambda: done.append(True))
        for _ in range(TURNS):
            if done:
                return
            self.loop.turn(0.005)
            self.clock.advance(0.01)
        raise AssertionError("waited in vain")

    def committed(self, group: str = "tills") -> int | None:
        offset = self.engine.group_offsets().get((group, TOPIC, 0))
        return None if offset is None else offset.next_offset

    def delete(self, name: str, gone: Callable[[Any], None], done: Done) -> None:
        """Delete a topic as its origin does."""
        tombstones = {log.identity.log_id: Tombstone(name, log.identity.epoch) for log in self.engine.partitions(name)}
        self.store.removal.delete(name, tombstones, gone, done)

    def close(self) -> bool:
        self.until(self.engine.flush)
        clean = self.engine.close(5.0)
        self.loop.close()
        return clean


class StoreHarness(Harness):
    """A SegmentStore in a directory; may crash and come back."""

    def __init__(self, path: Path, settings: StoreSettings | None = None, clock: ManualClock | None = None) -> None:
        self.path, self.settings = path, settings or store_settings()
        self.is_open = False
        super().__init__(clock)
        self.is_open = True

    def make_engine(self) -> Engine:
        self.store = SegmentStore(self.path, self.loop, self.clock, self.settings)
        return self.store

    def open(self, settings: StoreSettings | None = None) -> None:
        """Start again on the directory as it is."""
        assert not self.is_open
        self.settings = settings or self.settings
        self.listener, self.loop = Listener(), Loop(self.clock)
        try:
            self.engine = self.make_engine()
            self.engine.open(self.listener)
        except BaseException:
            self.loop.close()
            raise
        self.is_open = True

    def close(self) -> bool:
        if not self.is_open:
            return True
        self.is_open = False
        return super().close()

    def crash(self) -> None:
        """Kill the process: what it wrote stays, nothing more is written."""
        copy = self.path.with_name(self.path.name + ".crash")
        self.quiesce()
        snapshot(self.path, copy)
        self.close()
        shutil.rmtree(self.path)
        copy.rename(self.path)

    def quiesce(self) -> None:
        """Let the threads finish what they are at, so that the copy of the directory is one moment of it."""
        self.until(lambda: not self.store._committer._in_flight)
        for submit in (self.store._metadata._worker.submit, self._on_commit_thread):
            self._finish(submit)

    @staticmethod
    def _finish(submit: Callable[[Callable[[], None]], None]) -> None:
        """Wait until a thread did what it was given so far."""
        finished = threading.Event()
        submit(finished.set)
        assert finished.wait(10.0)

    def _on_commit_thread(self, work: Callable[[], None]) -> None:
        self.store._committer.call(work, lambda _: None)

    def restart(self, settings: StoreSettings | None = None) -> None:
        """Crash and come back."""
        self.crash()
        self.open(settings)

    def tick(self, seconds: float = 1.0) -> None:
        """Let housekeeping have its turn, and finish what it began."""
        self.clock.advance(seconds)
        self.loop.turn(0.0)
        self.until(lambda: self.store.flush())
        self.stored()
        self._finish(self.store._reader._worker.submit)
        self.loop.turn(0.0)

    def tick_until(self, condition: Callable[[], object]) -> None:
        for _ in range(60):
            if condition():
                return
            self.tick()
        raise AssertionError("waited in vain")

    def directory(self, topic: str = TOPIC, partition: int = 0) -> Path:
        return self.path / "topics" / topic / str(partition)

    def logs(self, topic: str = TOPIC) -> list[Path]:
        return sorted(self.directory(topic).glob("*.log"))

    def bases(self, topic: str = TOPIC) -> list[int]:
        return [segment.base for segment in self.segments(topic)]

    def segments(self, topic: str = TOPIC) -> list[Segment]:
        return list(self.log(topic).segments)

    def fill(self, count: int, *, size: int = 100, **options: Any) -> list[bytes]:
        """Append `count` batches of one record each, one at a time, so that segments roll between them."""
        first = self.log().stage.next_offset
        values = [(b"%d-" % (first + number)).ljust(size, b".") for number in range(count)]
        for value in values:
            self.append(encode(value, timestamp=1000 + first, **options))
            first += 1
        return values


def snapshot(source: Path, target: Path) -> None:
    """Copy a data directory; the reserve is space and nothing else."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("reserve", "*.sock"))


def tree(path: Path) -> dict[str, bytes | None]:
    """Every file of a directory with its bytes, to show that nothing changed."""
    return {str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None for entry in path.rglob("*")}


Start = Callable[..., StoreHarness]
"""The fixture `start`: a store with a topic, with these settings; closed at the end of the test."""


def filled_store(path: Path) -> StoreHarness:
    """A store with a topic of several segments, and with committed offsets of groups."""
    found = StoreHarness(path, store_settings(segment_bytes=1000))
    found.create(TOPIC)
    found.fill(30)
    return found
