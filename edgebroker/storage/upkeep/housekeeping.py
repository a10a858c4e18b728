"""What a store does on the side: checkpoints, retention, the disk budget, and verifying what an earlier run wrote.

A tick every second measures the disk and looks for segments to seal by age and to remove. Removing goes: identity with
the new log start (durable) -> unlink -> metadata row. Checkpoints ride on the metadata transaction.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from functools import partial
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from edgebroker.common.batch import EXPLANATION, STORED_BATCH_BYTES, Reason
from edgebroker.common.clock import Clock
from edgebroker.common.scheduler import Scheduler, Timer
from edgebroker.storage import files
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.engine import EngineListener
from edgebroker.storage.identity import change_identity
from edgebroker.storage.log import staging
from edgebroker.storage.log.index import index_path
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.reader import ColdReader, SegmentRead
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.log.walk import ScanState, next_good_batch, walk_mapped, walk_start
from edgebroker.storage.metadata.meta_db import SegmentRow, Windows
from edgebroker.storage.metadata.metadata import Metadata
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.rewrite.truncate import drop_aside
from edgebroker.storage.settings import HousekeepingSettings
from edgebroker.storage.types import UNKNOWN_CHAIN, CorruptRange, DiskState, Identity
from edgebroker.storage.upkeep.budget import Budget
from edgebroker.storage.upkeep.retention import LogFacts, plan

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
PRODUCER_EXPIRY_SECONDS = 7 * 24 * 3600.0
PRODUCER_STATE_BYTES = 8 << 20
PRODUCER_STATE_SECONDS = 5.0
OPEN_SEALED = 32
CACHED_INDEXES = 8
ASIDE_CHECK_SECONDS = 3600.0
JUMP_MS = 24 * 3600 * 1000


class Logs(Protocol):
    def logs(self) -> list[PartitionLog]: ...


class Housekeeping:
    """Owned by the loop thread."""

    def __init__(
        self,
        path: Path,
        scheduler: Scheduler,
        clock: Clock,
        settings: HousekeepingSettings,
        store: Logs,
        listener: EngineListener,
        committer: Committer,
        metadata: Metadata,
        reader: ColdReader,
        quarantine: Quarantine,
    ) -> None:
        self._path, self._scheduler, self._clock, self._settings = path, scheduler, clock, settings
        self._store, self._committer, self._metadata = store, committer, metadata
        self._listener = listener
        self._reader, self._quarantine = reader, quarantine
        self._budget = Budget(
            max_bytes=settings.max_bytes,
            soft_free=settings.soft_free_bytes,
            hard_free=settings.hard_free_bytes,
        )
        self._open: OrderedDict[Segment, None] = OrderedDict()
        self._indexed: OrderedDict[Segment, None] = OrderedDict()
        self._windows_at: dict[PartitionLog, tuple[float, int]] = {}
        self._timer: Timer | None = None
        self._scrub_timer: Timer | None = None
        self._scrub_queue: deque[tuple[PartitionLog, Segment]] = deque()
        self._scrubbing = False
        self._removing = False
        self._measuring = False
        self._aside_due = 0.0
        self._groups_seen = 0
        self._clock_base = (clock.wall_ms(), clock.monotonic())
        self.clock_implausible = ""
        self.removed_segments = self.scrubbed_bytes = 0

    def reconfigure(self, settings: HousekeepingSettings) -> None:
        """Go on with these settings."""
        self._settings = settings
        self._budget.change(
            max_bytes=settings.max_bytes, soft_free=settings.soft_free_bytes, hard_free=settings.hard_free_bytes
        )

    def start(self) -> None:
        """Begin ticking; verify in the background what this process did not write itself."""
        for partition in self._store.logs():
            if partition.corrupt_ranges:
                self.corrupt_ranges_changed(partition)
            self.checkpoint(partition)
        self._tick()
        for partition in self._store.logs():
            for segment in partition.segments:
                if segment.unverified_end:
                    self.verify(partition, segment)

    def stop(self) -> None:
        """Put the last checkpoints and producer states into the changes that Metadata.stop() writes."""
        for timer in (self._timer, self._scrub_timer):
            if timer is not None:
                timer.cancel()
        for partition in self._store.logs():
            self._note_sealed(partition)
            self.checkpoint(partition)
            self._store_windows(partition)

    # ---- checkpoints ----

    def checkpoint(self, partition: PartitionLog) -> None:
        """The durable end moved; the next metadata transaction says so, with the producers when they are due."""
        if partition.rewriting:
            return
        key = (partition.topic, partition.partition)
        self._metadata.changes.checkpoints[key] = partition.checkpoint()
        partition.checkpointed = partition.durable_end
        if partition.stage.producer_count:
            since, bytes_in = self._windows_at.get(partition, (0.0, 0))
            late = self._scheduler.now() - since > PRODUCER_STATE_SECONDS
            if late or partition.bytes_in - bytes_in > PRODUCER_STATE_BYTES:
                self._store_windows(partition)
        self._metadata.touch()

    def _store_windows(self, partition: PartitionLog) -> None:
        now = self._scheduler.now()
        self._windows_at[partition] = (now, partition.bytes_in)
        below = partition.durable_end
        producers = [
            (producer, epoch, now - seen, entries) for producer, epoch, seen, entries in partition.stage.dump(below)
        ]
        self._metadata.changes.windows[partition.topic, partition.partition] = Windows(below, producers)

    def corrupt_ranges_changed(self, partition: PartitionLog) -> None:
        self._metadata.changes.corrupt_ranges[partition.topic, partition.partition] = list(partition.corrupt_ranges)
        self._metadata.touch()

    # ---- open files and loaded indexes are bounded ----

    def opened(self, segment: Segment) -> None:
        self._open[segment] = None
        self._open.move_to_end(segment)
        for old in list(self._open)[: max(0, len(self._open) - OPEN_SEALED)]:
            if old.users == 0:
                del self._open[old]
                old.close()

    def index_loaded(self, segment: Segment) -> None:
        self._indexed[segment] = None
        self._indexed.move_to_end(segment)
        while len(self._indexed) > CACHED_INDEXES:
            old, _ = self._indexed.popitem(last=False)
            if not isinstance(old.points, bytearray):
                old.points = None

    # ---- the tick ----

    def _tick(self) -> None:
        self._timer = self._scheduler.call_later(TICK_SECONDS, self._tick)
        self._watch_clock()
        now = self._scheduler.now()
        for partition in self._store.logs():
            segment_ms = partition.settings.segment_ms or self._settings.segment_ms
            if segment_ms and partition.active.size and (now - partition.active.born) * 1000 >= segment_ms:
                self._committer.seal(partition)
            self._note_sealed(partition)
            partition.stage.expire(now - PRODUCER_EXPIRY_SECONDS)
        self._measure()
        self._retain()
        self._drop_aside(now)
        idle = self._groups_seen == self._committer.groups
        self._groups_seen = self._committer.groups
        if idle:
            staging.trim()

    def _note_sealed(self, partition: PartitionLog) -> None:
        """Give the index of freshly sealed segments back and put their row into the metadata."""
        for segment in partition.segments[-2::-1]:
            if segment in self._indexed or segment.points is None:
                break
            self.index_loaded(segment)
            self.opened(segment)
            if segment.base_chain != UNKNOWN_CHAIN:
                self._metadata.changes.segments[partition.topic, partition.partition, segment.base] = SegmentRow(
                    segment.end_offset,
                    segment.size,
                    segment.base_chain,
                    segment.end_chain,
                    segment.max_timestamp,
                    segment.sealed_ms,
                )
                self._metadata.touch()

    def _watch_clock(self) -> None:
        """Age counts only while the wall clock moves with the monotonic one and not before what was sealed."""
        wall, monotonic = self._clock.wall_ms(), self._clock.monotonic()
        drift = (wall - self._clock_base[0]) - (monotonic - self._clock_base[1]) * 1000
        newest = max((s.sealed_ms for p in self._store.logs() for s in p.segments[:-1]), default=0)
        why = ""
        if abs(drift) > JUMP_MS:
            why = f"the wall clock jumped by {drift / 3.6e6:.0f} h"
        elif wall < newest:
            why = "the wall clock is before the newest sealed segment"
        if why and why != self.clock_implausible:
            log.warning("%s; nothing is removed by age until it is plausible again", why)
        self.clock_implausible = why

    def stored(self, size: int) -> None:
        """A fast disk takes more between two ticks than a small one has left: measure as soon as that may be gone."""
        if self._budget.spend(size):
            self._measure()

    def _measure(self) -> None:
        if self._measuring:
            return
        self._measuring = True
        used = sum(partition.size_bytes for partition in self._store.logs())

        def done(result: object) -> None:
            self._measuring = False
            if not isinstance(result, tuple):
                return
            was_full = self._committer.disk_full
            free, size = result
            self._budget.measured(free, size, used)
            self._committer.disk_full = self._budget.full
            if bool(was_full) != bool(self._budget.full):
                log.warning(
                    "%s", f"disk full: {self._budget.full}" if self._budget.full else "the disk has space again"
                )

        self._committer.call(lambda: files.free_space(self._path), done)

    def _drop_aside(self, now: float) -> None:
        """What mirrors set aside goes after a day, or when space is wanted."""
        wanted = self._budget.wants_space > 0
        if now < self._aside_due and not wanted:
            return
        self._aside_due = now + ASIDE_CHECK_SECONDS
        wall_ms = self._clock.wall_ms() if not wanted else 1 << 62
        directories = [partition.directory for partition in self._store.logs()]

        def work() -> None:
            for directory in directories:
                drop_aside(directory, wall_ms)

        self._committer.call(work, lambda result: None)

    # ---- retention ----

    def _retain(self) -> None:
        if self._removing:
            return
        now_ms = 0 if self.clock_implausible else self._clock.wall_ms()
        partitions = [partition for partition in self._store.logs() if not partition.rewriting]
        facts = (
            LogFacts(
                partition.segments,
                partition.settings,
                partition.identity.snapshot[0],
                partial(self._listener.retention_pin, partition),
                partial(self._listener.retention_floor, partition),
            )
            for partition in partitions
        )
        found = plan(facts, self._settings, now_ms=now_ms, wanted=self._budget.wants_space)
        if found is not None:
            rank, gone = found
            self._remove(partitions[rank], gone)

    def _remove(self, partition: PartitionLog, gone: list[Segment]) -> None:
        """Identity first, then the files: a crash in between leaves files that the next start removes."""
        first = partition.segments[len(gone)]
        self._removing = True

        def work() -> Identity:
            identity = change_identity(
                partition.directory, lambda old: replace(old, log_start=first.base, chain=first.base_chain)
            )
            for segment in gone:
                files.remove(index_path(segment.path))
                files.remove(segment.path)
            files.sync_directory(partition.directory)
            return identity

        def done(result: object) -> None:
            self._removing = False
            if not isinstance(result, Identity):
                log.error("%s: old segments could not be removed: %s", partition.name, result)
                return
            partition.identity = result
            for segment in gone:
                partition.segments.remove(segment)
                self._open.pop(segment, None)
                self._indexed.pop(segment, None)
                segment.retire()
                self._metadata.changes.segments[partition.topic, partition.partition, segment.base] = None
            partition.corrupt_ranges = [
                corrupt for corrupt in partition.corrupt_ranges if corrupt.next > result.log_start
            ]
            self.corrupt_ranges_changed(partition)
            self.removed_segments += len(gone)
            self._metadata.touch()
            self._listener.on_topic(partition.topic)
            log.info("%s: %d segments removed, the log starts at %d", partition.name, len(gone), result.log_start)

        self._committer.call(work, done)

    # ---- verifying what an earlier run wrote ----

    def verify(self, partition: PartitionLog, segment: Segment) -> None:
        """Read all of a segment in the background, after those that wait for that already."""
        self._scrub_queue.append((partition, segment))
        if not self._scrubbing:
            self._scrub_next()

    def _scrub_next(self) -> None:
        self._scrubbing = False
        while self._scrub_queue:
            partition, segment = self._scrub_queue.popleft()
            if segment.unverified_end and not segment.retired:
                epoch = partition.identity.epoch_at(segment.base)
                state = walk_start(segment.base, max(segment.base_chain, 0), epoch=epoch)
                self._scrubbing = True
                self._scrub(partition, segment, state, False)
                return

    def _scrub(self, partition: PartitionLog, segment: Segment, state: ScanState, damaged: bool) -> None:
        """Verify one window of a segment; then wait as long as the allowed rate says, and go on."""
        if partition.rewriting:
            # Its files may be others in a moment; which of them are left is looked at again.
            again = partial(self._scrub, partition, segment, state, damaged)
            self._scrub_timer = self._scheduler.call_later(1.0, self._scrub_next if segment.retired else again)
            return
        size = min(segment.unverified_end, segment.size)
        end_offset, whole = segment.end_offset, size == segment.size
        max_epoch = partition.identity.epoch
        found: list[tuple[ScanState, CorruptRange | None]] = []

        def work() -> SegmentRead:
            fd = files.open_log(segment.path)
            try:
                walked = walk_mapped(
                    fd,
                    size,
                    state,
                    base_offset=segment.base,
                    max_batch=STORED_BATCH_BYTES,
                    max_epoch=max_epoch,
                    limit_offset=end_offset,
                )
                ended_early = whole and walked.position >= size and walked.next_offset < end_offset
                if (walked.position > state.position or walked.position >= size) and not ended_early:
                    found.append((walked, None))
                    return SegmentRead()
                at = next_good_batch(fd, walked.position, size, walked.next_offset, end_offset - 1, STORED_BATCH_BYTES)
                following = int.from_bytes(files.read_at(fd, 8, at), "big") if at >= 0 else end_offset
                end = at if at >= 0 else size
                reason = EXPLANATION.get(Reason(walked.reason), "damaged")
                self._quarantine.keep(partition.name, segment.path, fd, walked.position, end, reason)
                corrupt = CorruptRange(walked.next_offset, following)
                found.append((walked._replace(position=end, next_offset=following), corrupt))
                return SegmentRead()
            finally:
                files.close(fd)

        def done(result: SegmentRead) -> None:
            if result.error or not found or segment.retired:
                if result.error:
                    log.error("%s: %s could not be verified: %s", partition.name, segment.path.name, result.error)
                self._scrub_next()
                return
            walked, corrupt = found[0]
            if corrupt is not None:
                partition.add_corrupt_range(corrupt)
                self.corrupt_ranges_changed(partition)
            moved = walked.position - state.position
            self.scrubbed_bytes += moved
            if walked.position >= size or walked.next_offset >= end_offset:
                if corrupt is None and not damaged:
                    segment.unverified_end = 0
                    if whole:
                        partition.verified(segment, walked.position, walked.chain)
                again = self._scrub_next
            else:
                again = partial(self._scrub, partition, segment, walked, damaged or corrupt is not None)
            rate = self._settings.scrub_bytes_per_second
            self._scrub_timer = self._scheduler.call_later(moved / rate if rate else 0.0, again)

        if size == 0:
            self._scrub_next()
            return
        self._reader.submit(work, done, timeout=60.0)

    def disk(self) -> DiskState | None:
        """As measured last; None before the first measurement."""
        budget = self._budget
        return DiskState(budget.free, budget.size, budget.usable, budget.used) if budget.size else None

    @property
    def unverified_segments(self) -> int:
        return sum(1 for partition in self._store.logs() for one in partition.segments if one.unverified_end)
