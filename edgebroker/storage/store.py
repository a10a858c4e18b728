"""The segment-log engine: the data directory, its logs, and the threads that serve them, put together.

    open()     recovers the logs             append()   stages; the committer stores and notifies the listener
    reads      cold_reads and the logs       rewrites   rewriter, creation, removal, replacement
    upkeep     checkpoints, retention, verifying, bounded files: once a second

Everything here runs on the loop thread and leaves waiting to the commit, metadata and reader threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from edgebroker.common.histogram import Histogram
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage import files
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.commit.open_files import OpenFiles, most_open
from edgebroker.storage.directory import DataDirectory
from edgebroker.storage.engine import EngineListener, Log
from edgebroker.storage.identity import change_identity
from edgebroker.storage.log.ages import Ages
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.reader import ColdReader
from edgebroker.storage.log.staging import Chunk
from edgebroker.storage.metadata.granted import GrantedProducers
from edgebroker.storage.metadata.meta_db import MetaDatabase
from edgebroker.storage.metadata.metadata import Metadata
from edgebroker.storage.opening import Opener, begin_histories, raise_epochs
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.rewrite.creation import TopicCreation
from edgebroker.storage.rewrite.removal import Removal, finish_removals, read_tombstones
from edgebroker.storage.rewrite.replace import TopicReplacement, finish_replacements, read_resyncs
from edgebroker.storage.rewrite.rewriter import Rewriter
from edgebroker.storage.settings import StoreSettings
from edgebroker.storage.types import (
    Appended,
    ChainPoint,
    Change,
    Children,
    ColdRead,
    DiskState,
    EngineStatus,
    FileSlice,
    GroupKey,
    GroupOffset,
    Identity,
    LogInventory,
    StoredFile,
    Tombstone,
    make_identity,
)
from edgebroker.storage.upkeep.checkpoints import Checkpoints
from edgebroker.storage.upkeep.cold_reads import ColdReads
from edgebroker.storage.upkeep.deleted_topics import DeletedTopics
from edgebroker.storage.upkeep.housekeeping import Housekeeping
from edgebroker.storage.upkeep.scrub import Scrub

log = logging.getLogger(__name__)

# A stop with one of these is not clean: what is on the disk may not be what memory knows. Damage is noted, and a full
# disk lacks nothing that was acknowledged.
UNCLEAN = {"read_only", "metadata", "disk_stalled", "unserved_topics"}


class SegmentStore:
    """Implements edgebroker.storage.engine.Engine."""

    def __init__(self, path: Path, scheduler: Scheduler, clock: Clock, settings: StoreSettings) -> None:
        self._scheduler, self._clock, self._settings = scheduler, clock, settings
        self._directory = DataDirectory(path, settings.level)
        self.node_uid = self._directory.node.uid
        self.promoted = self._directory.node.promoted
        self.level = self._directory.node.level if self.promoted else settings.level
        self._quarantine = Quarantine(self._directory.quarantine, clock)
        self._topics: dict[str, list[PartitionLog]] = {}
        self._opener = Opener(
            self._directory.topics,
            self.node_uid,
            self._quarantine,
            scheduler,
            clock,
            limits=(settings.max_batch, settings.max_record, settings.window),
            segment_bytes=settings.segment_bytes,
        )
        self.producers = GrantedProducers({}, self._note_producer)
        self.topology: list[str] = []
        self.tombstones: dict[str, Tombstone] = {}
        self._path = path
        self._ages = Ages(clock)

    @property
    def mirrors(self) -> SegmentStore:
        return self

    @property
    def remover(self) -> Removal:
        return self.removal

    @property
    def replacements(self) -> TopicReplacement:
        return self.replacement

    # ---- life ----

    def open(self, listener: EngineListener) -> None:
        """Recover every log; raises only for what DataDirectory refuses."""
        self._listener = listener
        self._metadata = Metadata(self._path, self._scheduler, self._clock)
        self._reader = ColdReader(self._scheduler, self._settings.read_timeout)
        self._open_files = OpenFiles(most_open())
        self._committer = Committer(
            self._scheduler, self._clock, self, self._open_files, interval_seconds=self._settings.commit_interval
        )
        if not self._directory.was_clean:
            log.info("no clean stop before this start: the logs are checked from their last checkpoints on")
        state = self._metadata.load()
        self.tombstones = read_tombstones(self._path)
        resyncs = read_resyncs(self._path)
        replaced, resyncs = finish_replacements(self._path, resyncs)
        gone, left = finish_removals(self._path, self.tombstones, self._clock.wall_ms())
        changed = gone + replaced
        state.forget(changed)
        for name in changed:
            self._metadata.changes.drop_topic(name)
        deleted = DeletedTopics(
            self._path, self.node_uid, self._opener, self._scheduler, self._committer, self._taken_back
        )
        self.removal = Removal(
            self._path, self._topics, self._scheduler, self._clock, self._committer, self._metadata, self.tombstones,
            deleted,
        )  # fmt: skip
        for name in left:
            self.removal.left_over(name)
        self.topology = state.topology
        paths = [path for path in sorted(self._directory.topics.iterdir()) if path.is_dir() and path.name not in left]
        for number, topic_path in enumerate(paths):
            logs = self._opener.open_topic(topic_path, state, partial(listener.on_opening, number, len(paths)))
            if logs:
                self._topics[topic_path.name] = logs
        raise_epochs(self.logs(), state.producers)
        self.producers = GrantedProducers(state.producers, self._note_producer)
        if self._directory.restored:
            begin_histories(self.logs(), self.node_uid, accepted=self._directory.loss_accepted)
            self._directory.restore_finished()
        self._checkpoints = Checkpoints(self._scheduler, self._metadata)
        self._scrub = Scrub(
            self._scheduler, self._reader, self._quarantine, self._checkpoints,
            self._settings.housekeeping.scrub_bytes_per_second,
        )  # fmt: skip
        self._housekeeping = Housekeeping(
            self._path, self._scheduler, self._clock, self._settings.housekeeping, self, listener, self._committer,
            self._checkpoints, self._open_files, self._scrub, deleted,
        )  # fmt: skip
        self.replacement = TopicReplacement(
            self._path, self._topics, self._opener, self._committer, self._metadata, self._reader, self._checkpoints,
            self._scrub, listener, resyncs, self._scheduler, self._copy_of,
        )  # fmt: skip
        self._creation = TopicCreation(
            self._directory.topics, self._topics, self._opener, self.removal, self._committer, listener
        )
        self._reads = ColdReads(self._scheduler, self._reader, self._quarantine, self._checkpoints, self._open_files)
        self._rewriter = Rewriter(
            self._clock, self._committer, self._metadata, self._checkpoints, self._scrub, self._quarantine, listener
        )
        self._housekeeping.start()

    def _taken_back(self, name: str, logs: list[PartitionLog]) -> None:
        """Serve a topic that was deleted."""
        self._topics[name] = logs
        for partition in logs:
            self._checkpoints.corrupt_ranges_changed(partition)
            self._checkpoints.checkpoint(partition)
            self._scrub.verify_log(partition)
        self._listener.on_topic(name)

    def _copy_of(self, directory: Path) -> SegmentStore:
        """The store of a copy of a topic; on a thread of its own, for this syncs."""
        store = SegmentStore(directory, self._scheduler, self._clock, self._settings)
        MetaDatabase(directory / "meta.db", self._clock).make()
        return store

    def reconfigure(self, settings: StoreSettings) -> None:
        """Continue with another commit interval and other settings of the housekeeping."""
        self._settings = settings  # for copies that begin from now on
        self._committer.interval = settings.commit_interval
        self._housekeeping.reconfigure(settings.housekeeping)

    def close(self, timeout: float, *, mark: bool = True) -> bool:
        """Store and release everything. The loop must run until flush() is True before, or the stop is not clean.
        Without `mark` the next open checks as after a crash."""
        self._housekeeping.stop()
        clean = self._committer.stored and not self.problems().keys() & UNCLEAN
        stopped = self._committer.stop(timeout)
        read = self._reader.stop(timeout)
        clean = self._metadata.stop(timeout) and clean
        if not stopped:
            # A thread waits for the disk: descriptors and lock stay with it until the process is gone.
            log.error("the disk did not answer in time; the stop is not clean")
            return False
        if read:  # else a read that hangs still uses them; nothing stored depends on it
            for partition in self.logs():
                if clean:
                    partition.note_index()
                partition.close()
        try:
            self._directory.close(clean=clean and mark)
        except OSError as error:
            log.error("the stop is not marked clean: %s", error)
            clean = False
        return clean

    def flush(self) -> bool:
        """Sync without waiting for intervals; True when nothing is left to do."""
        self._committer.flush_now()
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
        self.create_mirror(name, [make_identity(self.node_uid, settings) for _ in range(settings.partitions)], done)

    def create_mirror(self, name: str, identities: Sequence[Identity], done: Done) -> None:
        self._creation.create(name, identities, done)

    def alter_topic(self, name: str, settings: TopicSettings, done: Done) -> None:
        """Replace a topic's settings durably in every partition's identity."""
        self.change_identities(name, [partial(replace, settings=settings) for _ in self._topics.get(name, [])], done)

    def change_identities(self, name: str, changes: Sequence[Change], done: Done) -> None:
        """Change the identities of a topic's partitions, one function for each; durable when done is called."""
        logs = self._topics.get(name, [])

        def work() -> list[Identity]:
            return [
                change_identity(partition.directory, change) for partition, change in zip(logs, changes, strict=True)
            ]

        def finished(result: object) -> None:
            if not isinstance(result, list):
                done(*files.refusal(f"the identity of {name} cannot be stored", result))
                return
            for partition, identity in zip(logs, result, strict=True):
                partition.identity = identity
                partition.segment_bytes = identity.settings.segment_bytes or self._settings.segment_bytes
                if identity.origin == self.node_uid and identity.epoch != partition.epoch:
                    partition.epoch = identity.epoch
                    partition.stage.resume(partition.staged_end, identity.epoch)
                elif partition.epoch > identity.epoch:
                    # A history that began here, and was given up before anything was written to it.
                    partition.epoch = identity.epoch_at(partition.staged_end)
                    if not partition.stage.pending_bytes:  # what is staged is of a history that goes on
                        partition.stage.resume(partition.staged_end, partition.epoch)
            done(Outcome.OK, "")
            self._listener.on_topic(name)

        self._committer.call(work, finished)

    # ---- mirrors ----

    def truncate(self, log: Log, offset: int, done: Done) -> None:
        assert isinstance(log, PartitionLog)
        self._rewriter.truncate(log, offset, done)

    def recreate(self, log: Log, change: Change, done: Done) -> None:
        assert isinstance(log, PartitionLog)
        self._rewriter.recreate(log, change, done)

    def skip(self, log: Log, offset: int, chain: int, done: Done) -> None:
        assert isinstance(log, PartitionLog)
        self._rewriter.skip(log, offset, chain, done)

    def repair(self, log: Log, data: bytes, done: Callable[[int, str], None]) -> None:
        assert isinstance(log, PartitionLog)
        self._rewriter.repair(log, data, done)

    def chains(self, log: Log, offsets: Sequence[int], done: Callable[[list[ChainPoint], str], None]) -> None:
        assert isinstance(log, PartitionLog)
        self._reads.chains(log, offsets, done)

    def change_level(self, level: str, promoted: bool, done: Done) -> None:
        """Remember that this node was promoted to a level (or is not any more): durable when done is called."""
        node = replace(self._directory.node, level=level, promoted=promoted)

        def finished(result: object) -> None:
            if result is not None:
                done(*files.refusal("the level cannot be stored", result))
                return
            self.level, self.promoted = level, promoted
            done(Outcome.OK, "")

        self._committer.call(lambda: self._directory.change_node(node), finished)

    # ---- writing ----

    def refusal(self, *, spare: bool = False) -> tuple[Outcome, str] | None:
        return self._committer.refusal(spare=spare and self._housekeeping.spare > 0)

    def append(
        self, log: Log, data: memoryview, spans: bytes, level: AckLevel, inflated: bool, producer_id: int
    ) -> Appended:
        assert isinstance(log, PartitionLog)
        appended = Appended(*log.stage.append(data, spans, self._scheduler.now(), inflated, producer_id))
        log.records_in += appended.records
        if log.stage.pending_bytes:
            self._committer.mark(
                log,
                durable=level >= AckLevel.DURABLE,
                written=level == AckLevel.WRITTEN,
                urgent=log.settings.urgent,
            )
        return appended

    def append_numbered(self, log: Log, data: memoryview) -> tuple[int, int]:
        assert isinstance(log, PartitionLog)
        taken = log.stage.append_numbered(data, self._scheduler.now(), log.identity.epoch)
        if log.stage.pending_bytes:
            self._committer.mark(log, durable=True, written=False, urgent=log.settings.urgent)
        return taken

    @property
    def staged_bytes(self) -> int:
        return self._committer.staged_bytes

    def on_written(self, log: PartitionLog) -> None:
        self._listener.on_written(log)

    def on_durable(self, log: PartitionLog, chunks: list[Chunk]) -> None:
        size = sum(len(chunk) for chunk in chunks)
        self._checkpoints.checkpoint(log)
        self._housekeeping.stored(size)
        log.bytes_in += size
        self._listener.on_durable(log, chunks)

    def on_failed(self, log: PartitionLog, outcome: Outcome, message: str) -> None:
        self._listener.on_failed(log, outcome, message)

    # ---- reading ----

    def read_cold(self, log: Log, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None:
        assert isinstance(log, PartitionLog)
        self._reads.read(log, offset, max_bytes, done)

    def read_cached(self, piece: FileSlice) -> bytes | None:
        return files.read_cached(piece.file.fd, piece.length, piece.position)

    def load_range(self, file: StoredFile, position: int, length: int, done: Callable[[bytes, str], None]) -> None:
        self._reads.load_range(file, position, length, done)

    def live_from(self, log: Log) -> int:
        assert isinstance(log, PartitionLog)
        return self._ages.live_from(log)

    def age_ms(self, log: Log, next_offset: int) -> int:
        assert isinstance(log, PartitionLog)
        return max(0, self._ages.oldest_below(log, next_offset))

    def complete_snapshot(self, log: Log, first: int, next_offset: int, done: Done) -> None:
        assert isinstance(log, PartitionLog)
        partition = log

        def work() -> Identity:
            return change_identity(
                partition.directory, lambda identity: replace(identity, snapshot=(first, next_offset))
            )

        def finished(result: object) -> None:
            if not isinstance(result, Identity):
                done(*files.refusal("the end of the snapshot cannot be stored", result))
                return
            partition.identity = result
            done(Outcome.OK, "")
            self._listener.on_topic(partition.topic)

        self._committer.call(work, finished)

    def offset_at_time(self, log: Log, timestamp: int, done: Callable[[int, str], None]) -> None:
        assert isinstance(log, PartitionLog)
        self._reads.offset_at_time(log, timestamp, done)

    # ---- metadata ----

    def inventory(self) -> list[LogInventory]:
        return [log.inventory() for log in self.logs()]

    def group_offsets(self) -> dict[GroupKey, GroupOffset]:
        return self._metadata.group_offsets

    def commit_offset(self, key: GroupKey, offset: GroupOffset | None) -> None:
        self._metadata.commit_offset(key, offset)

    def when_stored(self, callback: Callable[[], None]) -> None:
        self._metadata.touch(callback)

    def children(self) -> Children:
        return self._metadata.children

    def store_children(self, children: Children) -> None:
        self._metadata.store_children(children)

    def _note_producer(self, client_id: str, granted: tuple[int, int] | None) -> None:
        self._metadata.changes.producers[client_id] = granted
        self._metadata.touch()

    def store_topology(self, addresses: list[str]) -> None:
        """Remember where the registry said that parents are to be found."""
        self.topology = self._metadata.changes.topology = addresses
        self._metadata.touch()

    # ---- state ----

    @property
    def staged_at(self) -> float:
        return self._committer.staged_at

    def latencies(self) -> dict[str, Histogram]:
        return {"append": self._committer.append_latency, "sync": self._committer.sync_latency}

    def problems(self) -> dict[str, str]:
        found = {
            "read_only": self._committer.read_only,
            "disk_full": self._committer.disk_full,
            "descriptors": self._committer.scarce,
            "metadata": self._metadata.failed,
        }
        if self._committer.stalled or self._reader.stalled:
            found["disk_stalled"] = "the disk does not answer"
        if self._opener.unserved:
            found["unserved_topics"] = "; ".join(f"{topic}: {why}" for topic, why in self._opener.unserved.items())
        damaged = [
            partition.name
            for partition in self.logs()
            if partition.corrupt_ranges and partition.settings.on_damage == "wait"
        ]
        if damaged:
            found["damaged"] = ", ".join(damaged[:20])
        early = self._housekeeping.removed_early()
        if early:
            found["removed_early"] = f"removed for space, although retention keeps it: {', '.join(early[:20])}"
        return {name: why for name, why in found.items() if why}

    def disk(self) -> DiskState | None:
        return self._housekeeping.disk()

    def status(self) -> EngineStatus:
        committer, housekeeping = self._committer, self._housekeeping
        disk = housekeeping.disk() or DiskState(0, 0, 0, 0, 0)
        return EngineStatus(
            engine="segment",
            commit_groups=committer.groups,
            commit_bytes=committer.group_bytes,
            sync_seconds=committer.sync_ns / 1e9,
            slowest_sync_seconds=committer.slowest_sync_ns / 1e9,
            rolls=committer.rolls,
            metadata_transactions=self._metadata.transactions,
            cold_reads=self._reader.jobs,
            read_timeouts=self._reader.timeouts,
            quarantined_ranges=self._quarantine.ranges,
            disk_free_bytes=disk.free,
            disk_bytes=disk.size,
            disk_usable_bytes=disk.usable,
            log_bytes=disk.used,
            removed_segments=housekeeping.removed_segments,
            verified_bytes=self._scrub.verified_bytes,
            unverified_segments=housekeeping.unverified_segments,
            clock=housekeeping.clock_implausible or "plausible",
        )
