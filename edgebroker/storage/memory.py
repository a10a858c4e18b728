"""The in-memory engine: the same promises as far as a process lives. For tests and for handlers that are tried out.

Nothing survives a stop. Batches become durable at the end of the loop iteration in which they were published.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from edgebroker.common import batch, records
from edgebroker.common.histogram import Histogram
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage.engine import EngineListener, Log
from edgebroker.storage.log import segscan
from edgebroker.storage.log.staging import Chunk, Stage
from edgebroker.storage.metadata.granted import GrantedProducers
from edgebroker.storage.settings import StoreSettings
from edgebroker.storage.types import (
    Appended,
    ChainPoint,
    Change,
    Children,
    ColdRead,
    CorruptRange,
    DiskState,
    EngineStatus,
    FileSlice,
    GroupKey,
    GroupOffset,
    Identity,
    Inline,
    LogInventory,
    LogStatus,
    StoredFile,
    Tombstone,
    make_identity,
)


class MemoryLog:
    """A list of chunks."""

    def __init__(self, topic: str, partition: int, identity: Identity, stage: Stage) -> None:
        self.topic, self.partition, self.name = topic, partition, f"{topic}/{partition}"
        self.identity, self.stage, self.epoch = identity, stage, identity.epoch
        self.chunks: list[Chunk] = []
        self.born: list[float] = []
        self.written_end = self.durable_end = 0
        self.corrupt_ranges: list[CorruptRange] = []
        self.records_in = self.bytes_in = 0
        self.chain = identity.chain
        self.chains: list[int] = []
        self.rewriting = False

    @property
    def log_start(self) -> int:
        return 0

    @property
    def staged_end(self) -> int:
        return self.stage.next_offset

    @property
    def staged_epoch(self) -> int:
        return self.stage.epoch

    @property
    def settings(self) -> TopicSettings:
        return self.identity.settings

    @property
    def records(self) -> int:
        return self.durable_end

    def bytes_from(self, offset: int) -> int:
        return sum(len(chunk) for chunk in self.chunks if chunk.next_offset > offset)

    def held_bytes(self, offset: int) -> int:
        return 0  # it removes nothing

    @property
    def size_bytes(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)

    def find(self, offset: int, max_bytes: int, max_records: int, hint: tuple[int, int] | None = None) -> Inline | None:
        if offset >= self.durable_end:
            return None
        chunk = self.chunks[bisect_right(self.chunks, offset, key=lambda chunk: chunk.first_offset) - 1]
        view = memoryview(chunk)
        found = segscan.seek(view, offset)
        assert found is not None
        start, first, _ = found
        length, next_offset = segscan.cut(view[start:], max_bytes, min(chunk.next_offset, first + max_records))
        return Inline(view[start : start + length], first, next_offset)

    def to_repair(self) -> tuple[int, int]:
        raise AssertionError("memory is never damaged")

    def end_hint(self) -> tuple[int, int] | None:
        return None

    def damaged_before(self, offset: int) -> bool:
        return False

    def chain_at(self, offset: int) -> int | None:
        if offset == self.durable_end:
            return self.chain
        if offset == 0:
            return self.identity.chain
        ends = [chunk.next_offset for chunk in self.chunks]
        return self.chains[ends.index(offset)] if offset in ends else None

    def boundaries(self) -> list[tuple[int, int]]:
        """Every batch boundary, in order, with the header chain checksum there."""
        found = [(0, self.identity.chain)]
        for chunk in self.chunks:
            data, chain, position = memoryview(chunk), found[-1][1], 0
            while position < len(data):
                header = batch.read_header(data, position)
                chain = records.chain(data[position : position + header.size], chain)
                position += header.size
                found.append((header.base_offset + header.count, chain))
        return found

    def status(self) -> LogStatus:
        return LogStatus(
            segments=len(self.chunks),
            bytes=self.size_bytes,
            producers=self.stage.producer_count,
            staged_bytes=self.stage.pending_bytes,
        )


class MemoryEngine:
    def __init__(self, scheduler: Scheduler, clock: Clock, *, max_batch: int, max_record: int, window: int) -> None:
        self._scheduler, self._clock = scheduler, clock
        self._limits = (max_batch, max_record, window)
        self._topics: dict[str, list[MemoryLog]] = {}
        self._dirty: dict[MemoryLog, None] = {}
        self._offsets: dict[GroupKey, GroupOffset] = {}
        self.producers = GrantedProducers({}, lambda client_id, granted: None)
        self.node_uid = "00" * 16
        self.tombstones: dict[str, Tombstone] = {}

    @property
    def mirrors(self) -> None:
        return None

    @property
    def remover(self) -> None:
        return None

    @property
    def replacements(self) -> None:
        return None

    def open(self, listener: EngineListener) -> None:
        self._listener = listener
        self._scheduler.at_end_of_iteration(self._flush)

    def close(self, timeout: float, *, mark: bool = True) -> bool:
        return True

    def reconfigure(self, settings: StoreSettings) -> None:
        """There is nothing to pace."""

    def flush(self) -> bool:
        return not self._dirty

    def topics(self) -> Iterable[str]:
        return self._topics

    def log(self, topic: str, partition: int) -> MemoryLog | None:
        logs = self._topics.get(topic, [])
        return logs[partition] if 0 <= partition < len(logs) else None

    def logs(self) -> Iterable[Log]:
        return [log for logs in self._topics.values() for log in logs]

    def partitions(self, topic: str) -> list[Log]:
        return list(self._topics.get(topic, []))

    def create_topic(self, name: str, settings: TopicSettings, done: Done) -> None:
        if name in self._topics:
            done(Outcome.NAME_CLASH, f"topic {name} exists")
            return
        self._topics[name] = [
            MemoryLog(name, number, make_identity(self.node_uid, settings), Stage(0, 1, *self._limits))
            for number in range(settings.partitions)
        ]
        done(Outcome.OK, "")
        self._listener.on_topic(name)

    def chains(self, log: Log, offsets: Sequence[int], done: Callable[[list[ChainPoint], str], None]) -> None:
        assert isinstance(log, MemoryLog)
        known = log.boundaries()
        wanted = {bisect_left(known, (offset, -1)) for offset in offsets if offset <= log.durable_end}
        done([ChainPoint(*known[rank]) for rank in sorted(wanted)], "")

    def alter_topic(self, name: str, settings: TopicSettings, done: Done) -> None:
        self.change_identities(name, [lambda old: replace(old, settings=settings)] * len(self._topics[name]), done)

    def change_identities(self, name: str, changes: Sequence[Change], done: Done) -> None:
        for log, change in zip(self._topics[name], changes, strict=True):
            log.identity = change(log.identity)
            if log.epoch != log.identity.epoch:
                log.epoch = log.identity.epoch
                log.stage.resume(log.staged_end, log.epoch)
        done(Outcome.OK, "")
        self._listener.on_topic(name)

    def refusal(self, *, spare: bool = False) -> tuple[Outcome, str] | None:
        return None

    def append(
        self, log: Log, data: memoryview, spans: bytes, level: AckLevel, inflated: bool, producer_id: int
    ) -> Appended:
        assert isinstance(log, MemoryLog)
        appended = Appended(*log.stage.append(data, spans, self._scheduler.now(), inflated, producer_id))
        log.records_in += appended.records
        self._dirty[log] = None
        return appended

    def append_numbered(self, log: Log, data: memoryview) -> tuple[int, int]:
        assert isinstance(log, MemoryLog)
        self._dirty[log] = None
        return log.stage.append_numbered(data, self._scheduler.now(), log.identity.epoch)

    @property
    def staged_bytes(self) -> int:
        return sum(log.stage.pending_bytes for log in self._dirty)

    def read_cold(self, log: Log, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None:
        found = log.find(offset, max_bytes, 1 << 31)
        assert isinstance(found, Inline)
        done(ColdRead(data=bytes(found.data), first_offset=found.first_offset, next_offset=found.next_offset))

    def inventory(self) -> list[LogInventory] | None:
        return None

    def read_cached(self, piece: FileSlice) -> bytes | None:
        raise AssertionError("memory has no files")

    def load_range(self, file: StoredFile, position: int, length: int, done: Callable[[bytes, str], None]) -> None:
        raise AssertionError("memory is never cold")

    def live_from(self, log: Log) -> int:
        assert isinstance(log, MemoryLog)
        ttl = log.settings.message_ttl_ms
        expired = bisect_left(log.born, self._clock.monotonic() - ttl / 1000) if ttl else 0
        return log.chunks[expired - 1].next_offset if expired else 0

    def age_ms(self, log: Log, next_offset: int) -> int:
        assert isinstance(log, MemoryLog)
        newest = bisect_right(log.chunks, next_offset - 1, key=lambda chunk: chunk.first_offset) - 1
        return int((self._clock.monotonic() - log.born[newest]) * 1000)

    def complete_snapshot(self, log: Log, first: int, next_offset: int, done: Done) -> None:
        assert isinstance(log, MemoryLog)
        log.identity = replace(log.identity, snapshot=(first, next_offset))
        done(Outcome.OK, "")
        self._listener.on_topic(log.topic)

    def offset_at_time(self, log: Log, timestamp: int, done: Callable[[int, str], None]) -> None:
        assert isinstance(log, MemoryLog)
        for chunk in log.chunks:
            found = segscan.seek(chunk, 0, timestamp)
            if found is not None:
                start, base, size = found
                records = batch.decode(memoryview(chunk)[start : start + size])
                done(next((record.offset for record in records if record.timestamp >= timestamp), base), "")
                return
        done(log.durable_end, "")

    def group_offsets(self) -> dict[GroupKey, GroupOffset]:
        return self._offsets

    def commit_offset(self, key: GroupKey, offset: GroupOffset | None) -> None:
        if offset is None:
            self._offsets.pop(key, None)
        else:
            self._offsets[key] = offset

    def when_stored(self, callback: Callable[[], None]) -> None:
        callback()

    def children(self) -> Children:
        return {}

    def store_children(self, children: Children) -> None:
        pass

    @property
    def staged_at(self) -> float:
        return self._scheduler.now()

    def latencies(self) -> dict[str, Histogram]:
        return {}

    def problems(self) -> dict[str, str]:
        return {}

    def disk(self) -> DiskState | None:
        return None

    def status(self) -> EngineStatus:
        return EngineStatus(engine="memory")

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for log in dirty:
            chunk = log.stage.take(1 << 62)
            if chunk is not None:
                log.chunks.append(chunk)
                log.chain = records.chain(chunk, log.chain)
                log.chains.append(log.chain)
                log.born.append(self._clock.monotonic())
                log.bytes_in += len(chunk)
                log.written_end = log.durable_end = chunk.next_offset
                self._listener.on_written(log)
                self._listener.on_durable(log, [chunk])
