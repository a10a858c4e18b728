"""The segment-log engine: the data directory, its logs, and the threads that serve them, put together.

open() recovers; append() stages; the committer stores and tells the listener; housekeeping checkpoints, retires and
verifies. Everything here runs on the loop thread and leaves waiting to the commit, metadata and reader threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from edgebroker.common.batch import STORED_BATCH_BYTES
from edgebroker.common.clock import Clock
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code, DamagedDataError
from edgebroker.common.scheduler import Scheduler
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage import files
from edgebroker.storage.committer import Committer
from edgebroker.storage.directory import DataDirectory
from edgebroker.storage.engine import Appended, Done, Listener, Log
from edgebroker.storage.housekeeping import Housekeeping, HousekeepingSettings
from edgebroker.storage.identity import Identity, change_identity, make_identity, read_identity, write_identity
from edgebroker.storage.index import SealedIndex, read_index
from edgebroker.storage.log import PartitionLog
from edgebroker.storage.meta import GroupKey, GroupOffset, MetaState, SegmentRow
from edgebroker.storage.metadata import Metadata
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.reader import ColdRead, Reader, read_cold
from edgebroker.storage.recovery import RecoveredLog, Recovery
from edgebroker.storage.segment import SUFFIX, UNKNOWN_CHAIN, Segment, segment_path
from edgebroker.storage.staging import Chunk, Stage
from edgebroker.storage.timesearch import find_time
from edgebroker.storage.walk import next_good_batch

log = logging.getLogger(__name__)

REPLAY_BYTES = 64 << 20
REPLAY_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Limits in bytes and seconds; `window` is the batches remembered per producer and partition."""

    level: str
    segment_bytes: int
    max_batch: int
    max_record: int
    window: int
    commit_interval: float
    read_timeout: float
    housekeeping: HousekeepingSettings


class SegmentStore:
    """Implements edgebroker.storage.engine.Engine."""

    def __init__(self, path: Path, scheduler: Scheduler, clock: Clock, settings: StoreSettings) -> None:
        self._scheduler, self._clock, self._settings = scheduler, clock, settings
        self._directory = DataDirectory(path, settings.level)
        self.node_uid = self._directory.node.uid
        self._quarantine = Quarantine(self._directory.quarantine, clock)
        self._topics: dict[str, list[PartitionLog]] = {}
        self._unserved: dict[str, str] = {}
        self._creating: dict[str, list[Done]] = {}
        self._producers: dict[str, tuple[int, int]] = {}
        self._path = path

    # ---- life ----

    def open(self, listener: Listener) -> None:
        """Recover every log; raises only for what DataDirectory refuses."""
        self._listener = listener
        self._metadata = Metadata(self._path, self._scheduler, self._clock)
        self._reader = Reader(self._scheduler, self._settings.read_timeout)
        self._committer = Committer(self._scheduler, self._clock, self, interval_seconds=self._settings.commit_interval)
        if not self._directory.was_clean:
            log.info("no clean stop before this start: the logs are checked from their last checkpoints on")
        state = self._metadata.load()
        self._producers = state.producers
        for topic_path in sorted(self._directory.topics.iterdir()):
            if topic_path.is_dir():
                self._recover_topic(topic_path, state)
        self._housekeeping = Housekeeping(
            self._path, self._scheduler, self._clock, self._settings.housekeeping, self, self._committer,
            self._metadata, self._reader, self._quarantine,
        )  # fmt: skip
        self._housekeeping.start()

    def close(self, timeout: float) -> bool:
        """Write, sync and checkpoint what is left. The loop must keep turning until `idle`, then call this."""
        self._housekeeping.stop()
        clean = self._committer.idle and not self.problems()
        stopped = self._committer.stop(timeout)
        stopped = self._reader.stop(0.5) and stopped
        clean = self._metadata.stop(timeout) and clean
        if not stopped:
            # The disk holds a thread up: descriptors and lock stay with it until the process is gone.
            log.error("the disk did not answer in time; the stop is not clean")
            return False
        for partition in self.logs():
            partition.close()
        try:
            self._directory.close(clean=clean)
        except OSError as error:
            log.error("the stop is not marked clean: %s", error)
            clean = False
        return clean

    def hurry(self) -> bool:
        """Sync without waiting for intervals; True when nothing is left to do."""
        self._committer.hurry()
        return self._committer.idle

    # ---- topics ----

    def topics(self) -> Iterable[str]:
        return self._topics

    def log(self, topic: str, partition: int) -> PartitionLog | None:
        logs = self._topics.get(topic)
        return logs[partition] if logs is not None and 0 <= partition < len(logs) else None

    def logs(self) -> list[PartitionLog]:
        return [log for logs in self._topics.values() for log in logs]

    def partitions(self, topic: str) -> list[Log]:
        return list(self._topics.get(topic, []))

    def create_topic(self, name: str, settings: TopicSettings, done: Done) -> None:
        """Make the directories, identities and first segments durably on the commit thread, then call done."""
        refusal = self.refusal()
        if refusal is not None:
            done(*refusal)
            return
        if name in self._topics:
            done(Code.NAME_CLASH, f"topic {name} exists")
            return
        if name in self._unserved:
            done(Code.READ_ONLY, f"topic {name} lies on the disk and could not be opened: {self._unserved[name]}")
            return
        if name in self._creating:
            self._creating[name].append(done)
            return
        self._creating[name] = [done]

        def work() -> list[tuple[Identity, Segment]]:
            made = []
            for number in range(settings.partitions):
                directory = self._directory.topics / name / str(number)
                files.make_directory(directory)
                identity = make_identity(self.node_uid, settings)
                path = segment_path(directory, 0)
                segment = Segment(path, 0, base_chain=identity.chain, fd=files.create_log(path))
                segment.end_chain = identity.chain
                write_identity(directory, identity)
                made.append((identity, segment))
            return made

        self._committer.call(work, partial(self._created, name))

    def _created(self, name: str, result: object) -> None:
        waiting = self._creating.pop(name)
        if isinstance(result, list):
            self._topics[name] = [
                self._make_log(
                    name, number, identity, RecoveredLog([segment], 0, identity.chain, identity.epoch, [], 0)
                )
                for number, (identity, segment) in enumerate(result)
            ]
            answer = (Code.OK, "")
        else:
            code = Code.DISK_FULL if getattr(result, "errno", 0) in files.FULL else Code.READ_ONLY
            answer = (code, f"topic {name} cannot be created: {result}")
            log.error("%s", answer[1])
        for done in waiting:
            done(*answer)

    def alter_topic(self, name: str, settings: TopicSettings, done: Done) -> None:
        """Replace a topic's settings durably in every partition's identity."""
        logs = self._topics.get(name, [])

        def work() -> list[Identity]:
            return [
                change_identity(partition.directory, lambda identity: _with_settings(identity, settings))
                for partition in logs
            ]

        def finished(result: object) -> None:
            if not isinstance(result, list):
                done(Code.READ_ONLY, f"the settings cannot be stored: {result}")
                return
            for partition, identity in zip(logs, result, strict=True):
                partition.identity = identity
                partition.segment_bytes = settings.segment_bytes or self._settings.segment_bytes
            done(Code.OK, "")

        self._committer.call(work, finished)

    # ---- writing ----

    def refusal(self) -> tuple[Code, str] | None:
        if self._committer.read_only:
            return Code.READ_ONLY, f"this node is read-only: {self._committer.read_only}"
        if self._committer.disk_full:
            return Code.DISK_FULL, f"the disk is full: {self._committer.disk_full}"
        return None

    def append(self, log: Log, data: memoryview, spans: bytes, level: AckLevel, inflated: bool) -> Appended:
        assert isinstance(log, PartitionLog)
        appended = Appended(*log.stage.append(data, spans, self._scheduler.now(), inflated))
        log.records_in += appended.records
        if log.stage.pending_bytes:
            self._committer.mark(
                log,
                durable=level == AckLevel.DURABLE,
                written=level == AckLevel.WRITTEN,
                urgent=log.settings.urgent,
            )
        return appended

    def append_numbered(self, log: Log, data: memoryview) -> tuple[int, int]:
        assert isinstance(log, PartitionLog)
        taken = log.stage.append_numbered(data, self._scheduler.now())
        if log.stage.pending_bytes:
            self._committer.mark(log, durable=True, written=False, urgent=log.settings.urgent)
        return taken

    @property
    def staged_bytes(self) -> int:
        return self._committer.staged_bytes

    def on_written(self, log: PartitionLog) -> None:
        self._listener.on_written(log)

    def on_durable(self, log: PartitionLog, chunks: list[Chunk]) -> None:
        self._housekeeping.checkpoint(log)
        log.bytes_in += sum(len(chunk) for chunk in chunks)
        self._listener.on_durable(log, chunks)

    def on_failed(self, log: PartitionLog, code: Code, message: str) -> None:
        self._listener.on_failed(log, code, message)

    def retention_floor(self, log: PartitionLog) -> int | None:
        return self._listener.retention_floor(log)

    # ---- reading ----

    def read_cold(self, log: Log, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None:
        """Read through the reader thread; new indexes and holes found on the way are taken over."""
        assert isinstance(log, PartitionLog)
        segment = log.segment_of(offset)
        view = log.view(segment)

        def answer(result: ColdRead) -> None:
            if result.index is not None and not segment.retired:
                log.take_index(segment, result.index, -1)
                if segment is not log.active:
                    self._housekeeping.index_loaded(segment)
            if result.hole is not None:
                log.add_hole(result.hole)
                self._housekeeping.holes_changed(log)
            if result.fd >= 0:
                if segment.fd < 0 and not segment.retired:
                    segment.fd = result.fd
                    self._housekeeping.opened(segment)
                else:
                    files.close(result.fd)
            done(result)

        self._reader.submit(lambda: read_cold(view, offset, max_bytes, self._quarantine), answer)

    def load_range(self, segment: Segment, position: int, length: int, done: Callable[[bytes, str], None]) -> None:
        fd = segment.fd

        def read() -> ColdRead:
            return ColdRead(data=files.read_at(fd, length, position))

        def answer(result: ColdRead) -> None:
            short = not result.error and len(result.data) != length
            done(result.data, result.error or ("a segment is shorter than its log" if short else ""))

        self._reader.submit(read, answer)

    def offset_at_time(self, log: Log, timestamp: int, done: Callable[[int, str], None]) -> None:
        assert isinstance(log, PartitionLog)
        views = [(log.view(segment), segment.max_timestamp) for segment in log.segments]
        end = log.durable_end
        self._reader.submit(
            lambda: find_time(views, timestamp, end), lambda result: done(result.first_offset, result.error)
        )

    # ---- metadata ----

    def group_offsets(self) -> dict[GroupKey, GroupOffset]:
        return self._metadata.group_offsets

    def commit_offset(self, key: GroupKey, offset: GroupOffset | None) -> None:
        self._metadata.commit_offset(key, offset)

    def when_stored(self, callback: Callable[[], None]) -> None:
        self._metadata.touch(callback)

    def producer(self, client_id: str) -> tuple[int, int] | None:
        return self._producers.get(client_id)

    def grant_producer(self, client_id: str, producer_id: int, epoch: int) -> None:
        self._producers[client_id] = self._metadata.changes.producers[client_id] = (producer_id, epoch)
        self._metadata.touch()

    # ---- state ----

    def problems(self) -> dict[str, str]:
        found = {
            "read_only": self._committer.read_only,
            "disk_full": self._committer.disk_full,
            "metadata": self._metadata.failed,
        }
        if self._committer.stalled or self._reader.stalled:
            found["disk_stalled"] = "the disk does not answer"
        if self._unserved:
            found["unserved_topics"] = "; ".join(f"{topic}: {why}" for topic, why in self._unserved.items())
        damaged = [partition.name for partition in self.logs() if partition.holes]
        if damaged:
            found["damaged"] = ", ".join(damaged[:20])
        return {name: why for name, why in found.items() if why}

    def describe(self) -> dict[str, object]:
        committer = self._committer
        return {
            "engine": "segment",
            "commit_groups": committer.groups,
            "commit_bytes": committer.group_bytes,
            "sync_seconds": committer.sync_ns / 1e9,
            "slowest_sync_seconds": committer.slowest_sync_ns / 1e9,
            "rolls": committer.rolls,
            "metadata_transactions": self._metadata.transactions,
            "cold_reads": self._reader.jobs,
            "read_timeouts": self._reader.timeouts,
            "quarantined_ranges": self._quarantine.ranges,
            **self._housekeeping.describe(),
        }

    # ---- recovery ----

    def _recover_topic(self, path: Path, state: MetaState) -> None:
        logs: dict[int, PartitionLog] = {}
        for directory in path.iterdir():
            if directory.name.isdigit() and directory.is_dir():
                number = int(directory.name)
                try:
                    recovered = self._recover_partition(path.name, number, directory, state)
                except OSError as error:
                    log.error("%s/%d cannot be read or written: %s", path.name, number, error)
                    self._unserved[path.name] = str(error)
                    continue
                if recovered is not None:
                    logs[number] = recovered
        wanted = max((found.settings.partitions for found in logs.values()), default=0)
        if sorted(logs) != list(range(len(logs))) or len(logs) < wanted:
            why = self._unserved.setdefault(path.name, f"{len(logs)} of {wanted} partitions were found")
            log.error("topic %s is not served: %s", path.name, why)
            for found in logs.values():
                found.close()
            return
        if logs:
            self._topics[path.name] = [logs[number] for number in sorted(logs)]

    def _recover_partition(self, topic: str, number: int, directory: Path, state: MetaState) -> PartitionLog | None:
        key, name = (topic, number), f"{topic}/{number}"
        checkpoint = state.checkpoints.get(key)
        try:
            identity = read_identity(directory)
        except (FileNotFoundError, DamagedDataError) as error:
            sizes = [path.stat().st_size for path in directory.iterdir() if path.suffix == SUFFIX]
            began = any(sizes) or (sizes and isinstance(error, DamagedDataError))
            if not began and checkpoint is None:
                return None  # a topic whose creation did not finish: nobody was told about it
            log.error("%s: %s; the identity is made again", name, error)
            identity = make_identity(self.node_uid, TopicSettings())
            if checkpoint is not None:
                identity = _with_log_id(identity, checkpoint.log_id, checkpoint.epoch)
            write_identity(directory, identity)
        watermark = max(
            (
                offset.next_offset
                for (_, group_topic, group_partition), offset in state.group_offsets.items()
                if (group_topic, group_partition) == key and offset.log_id == identity.log_id
            ),
            default=-1,
        )
        recovery = Recovery(directory, identity, self._quarantine, max_batch=STORED_BATCH_BYTES, name=name)
        recovered = recovery.run(checkpoint, watermark)
        rows = state.segments.get(key, {})
        for segment in recovered.segments[:-1]:
            self._describe_sealed(segment, rows.get(segment.base), identity)
        _link_chains(recovered.segments, identity)
        partition = self._make_log(topic, number, identity, recovered)
        for hole in state.holes.get(key, []):
            partition.add_hole(hole)
        windows = state.windows.get(key)
        now = self._scheduler.now()
        if windows is not None:
            partition.stage.load([(pid, epoch, now - age, entries) for pid, epoch, age, entries in windows.producers])
        _replay_producers(partition, windows.below if windows is not None else -1, now)
        return partition

    def _describe_sealed(self, segment: Segment, row: SegmentRow | None, identity: Identity) -> None:
        """What meta.db or else the index says; a segment that neither knows counts as sealed now (never too early)."""
        if row is not None and (row.size, row.end_offset) == (segment.size, segment.end_offset):
            known: SegmentRow | SealedIndex | None = row
        else:
            known = read_index(segment.path, identity.log_id_bytes, segment.base, segment.size)
        if known is not None and known.end_offset == segment.end_offset:
            segment.base_chain, segment.end_chain = known.base_chain, known.end_chain
            segment.max_timestamp, segment.sealed_ms = known.max_timestamp, known.sealed_ms
        segment.sealed_ms = segment.sealed_ms or self._clock.wall_ms()

    def _make_log(self, topic: str, number: int, identity: Identity, recovered: RecoveredLog) -> PartitionLog:
        stage = Stage(
            recovered.next_offset,
            recovered.epoch,
            self._settings.max_batch,
            self._settings.max_record,
            self._settings.window,
        )
        return PartitionLog(
            topic,
            number,
            self._directory.topics / topic / str(number),
            identity,
            recovered,
            stage,
            max_batch=STORED_BATCH_BYTES,
            segment_bytes=identity.settings.segment_bytes or self._settings.segment_bytes,
            born=self._scheduler.now(),
        )


def _link_chains(segments: list[Segment], identity: Identity) -> None:
    """A segment begins with the chain that the one before it ends with."""
    if segments[0].base == identity.log_start:
        segments[0].base_chain = identity.chain
    for before, segment in pairwise(segments):
        if segment.base_chain == UNKNOWN_CHAIN and before.end_chain != UNKNOWN_CHAIN:
            segment.base_chain = before.end_chain


def _with_settings(identity: Identity, settings: TopicSettings) -> Identity:
    return Identity(
        log_id=identity.log_id,
        origin=identity.origin,
        epochs=identity.epochs,
        log_start=identity.log_start,
        chain=identity.chain,
        settings=settings,
    )


def _with_log_id(identity: Identity, log_id: str, epoch: int) -> Identity:
    return Identity(
        log_id=log_id,
        origin=identity.origin,
        epochs=[(epoch, 0)],
        log_start=identity.log_start,
        chain=crc32c(bytes.fromhex(log_id)),
        settings=identity.settings,
    )


def _replay_producers(partition: PartitionLog, below: int, now: float) -> None:
    """Bring the producer windows up to the end of the log; without a stored state, from the last 64 MiB on."""
    if below >= partition.durable_end:
        return
    covered = 0
    for rank in range(len(partition.segments) - 1, -1, -1):
        segment = partition.segments[rank]
        covered += segment.size
        if (below >= 0 and segment.base <= below) or covered >= REPLAY_BYTES:
            break
    for segment in partition.segments[rank:]:
        fd = segment.fd if segment.fd >= 0 else files.open_log(segment.path)
        try:
            position, length = 0, REPLAY_PIECE_BYTES
            while position < segment.size:
                data = files.read_at(fd, min(length, segment.size - position), position)
                used = partition.stage.replay(data, now, below)
                if used:
                    position, length = position + used, REPLAY_PIECE_BYTES
                elif length <= STORED_BATCH_BYTES and position + len(data) < segment.size:
                    length = STORED_BATCH_BYTES + 1
                else:
                    # Damage: what follows it was acknowledged as well.
                    position = next_good_batch(fd, position, segment.size, segment.base, 1 << 62, STORED_BATCH_BYTES)
                    if position < 0:
                        break
        except OSError as error:
            log.warning("%s: duplicates are not recognised behind an unreadable place: %s", partition.name, error)
        finally:
            if segment.fd < 0:
                files.close(fd)
