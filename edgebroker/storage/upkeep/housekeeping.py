"""The tick of a store: once a second, what is due is done, and what needs the disk is left to the commit thread.

    seal segments by age -> note what was sealed -> forget producers -> measure the disk -> deleted topics -> retention
    -> what is aside

Removing is identity with the new log start (durable) -> unlink -> metadata row: a crash in between leaves files that
the next start removes. The disk is measured between two ticks as well, when more was stored than it had left.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from edgebroker.common.runtime.clock import Clock, is_plausible
from edgebroker.common.runtime.scheduler import Scheduler, Timer, in_turns
from edgebroker.storage import files
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.commit.open_files import OpenFiles
from edgebroker.storage.engine import EngineListener
from edgebroker.storage.identity import change_identity
from edgebroker.storage.log import staging
from edgebroker.storage.log.aside import drop_aside
from edgebroker.storage.log.index import index_path
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.settings import HousekeepingSettings
from edgebroker.storage.types import UNKNOWN_CHAIN, DiskState, Identity, begin_at
from edgebroker.storage.upkeep.budget import Budget
from edgebroker.storage.upkeep.checkpoints import Checkpoints
from edgebroker.storage.upkeep.clock_guard import ClockGuard
from edgebroker.storage.upkeep.deleted_topics import DeletedTopics
from edgebroker.storage.upkeep.retention import RetentionFacts, plan, takes_keys
from edgebroker.storage.upkeep.scrub import Scrub

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
PRODUCER_EXPIRY_SECONDS = 7 * 24 * 3600.0
ASIDE_CHECK_SECONDS = 3600.0
REDATE_SECONDS = 60.0
# An active segment with less is not sealed for the sake of space: it would be another one every second.
LEAST_SEALED_BYTES = 64 << 10
# So long it is told that something was removed early.
EARLY_SECONDS = 3600.0
# Logs that are looked at, and directories of which what is aside is dropped, in one step.
SLICE = 64


class Logs(Protocol):
    def logs(self) -> list[PartitionLog]: ...

    def log(self, topic: str, partition: int) -> PartitionLog | None: ...


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
        checkpoints: Checkpoints,
        open_files: OpenFiles,
        scrub: Scrub,
        deleted: DeletedTopics,
    ) -> None:
        self._path, self._scheduler, self._clock, self._settings = path, scheduler, clock, settings
        self._store, self._listener, self._committer = store, listener, committer
        self._checkpoints, self._open_files, self._scrub = checkpoints, open_files, scrub
        self._deleted = deleted
        self._clock_guard = ClockGuard(clock)
        self._budget = Budget(
            max_bytes=settings.max_bytes,
            soft_free=settings.soft_free_bytes,
            hard_free=settings.hard_free_bytes,
        )
        self._timer: Timer | None = None
        self._measuring = self._dropping = False
        self._removing = 0
        # The walk that is under way.
        self._steps: Generator[None, None, None] | None = None
        # Bytes of all logs, as of the last walk, and what was stored since it began.
        self._used = self._stored_since = 0
        self._aside_due = self._redate_due = 0.0
        self._groups_seen = 0
        self._early: dict[PartitionLog, float] = {}
        self.removed_segments = 0

    def reconfigure(self, settings: HousekeepingSettings) -> None:
        """Continue with these settings."""
        self._settings = settings
        self._scrub.bytes_per_second = settings.scrub_bytes_per_second
        self._budget.change(
            max_bytes=settings.max_bytes, soft_free=settings.soft_free_bytes, hard_free=settings.hard_free_bytes
        )

    def start(self) -> None:
        """Begin ticking; verify in the background what this process did not write itself."""
        for partition in self._store.logs():
            if partition.corrupt_ranges:
                self._checkpoints.corrupt_ranges_changed(partition)
            self._checkpoints.checkpoint(partition)
        self._tick()
        for partition in self._store.logs():
            self._scrub.verify_log(partition)

    def stop(self) -> None:
        """Note the last checkpoints and producer windows, for Metadata.stop() to write."""
        if self._steps is not None:
            self._steps.close()
        if self._timer is not None:
            self._timer.cancel()
        self._scrub.stop()
        for partition in self._store.logs():
            self._note_sealed(partition)
            self._checkpoints.checkpoint(partition)
            self._checkpoints.store_window(partition)

    @property
    def clock_implausible(self) -> str:
        """Why the wall clock is not believed; "" when it is."""
        return self._clock_guard.implausible

    @property
    def unverified_segments(self) -> int:
        return sum(1 for partition in self._store.logs() for one in partition.segments if one.unverified_end)

    def disk(self) -> DiskState | None:
        """As measured last; None before the first measurement."""
        budget = self._budget
        return DiskState(budget.free, budget.size, budget.usable, budget.used, budget.spare) if budget.size else None

    @property
    def spare(self) -> int:
        """DiskState.spare, as measured last."""
        return self._budget.spare

    # ---- the tick ----

    def _tick(self) -> None:
        self._timer = self._scheduler.call_later(TICK_SECONDS, self._tick)
        if self._steps is None:
            self._steps = self._walk()
            in_turns(self._scheduler, self._steps, self._walked)

    def _walked(self) -> None:
        self._steps = None

    def _walk(self) -> Generator[None, None, None]:
        """Everything that is due, a few logs at a time: there may be thousands."""
        now = self._scheduler.now()
        logs = self._store.logs()
        newest = used = self._stored_since = 0
        for rank, partition in enumerate(logs):
            if self._serves(partition):
                self._tend(partition, now)
            for segment in partition.segments:
                newest = max(newest, segment.sealed_ms)
                used += segment.size
            if rank % SLICE == 0:
                yield
        self._used = used + self._stored_since
        self._clock_guard.check(newest)
        if now >= self._redate_due:
            self._redate_due = now + REDATE_SECONDS
            yield from self._redate(logs)
        self._measure()
        wanted = self._deleted.remove(
            self._clock_guard.wall_ms(), self._settings.deleted_retention_ms, self._budget.wants_space
        )
        yield from self._retain(logs, wanted)
        self._drop_aside(logs, now)
        idle = self._groups_seen == self._committer.groups
        self._groups_seen = self._committer.groups
        if idle:
            staging.trim()

    def _tend(self, partition: PartitionLog, now: float) -> None:
        segment_ms = partition.settings.segment_ms or self._settings.segment_ms
        if segment_ms and partition.active.size and (now - partition.active.born) * 1000 >= segment_ms:
            self._committer.seal(partition)
        self._note_sealed(partition)
        partition.stage.expire(now - PRODUCER_EXPIRY_SECONDS)

    def _serves(self, partition: PartitionLog) -> bool:
        """A topic may be deleted in the middle of a walk."""
        return self._store.log(partition.topic, partition.partition) is partition

    def _redate(self, logs: list[PartitionLog]) -> Iterator[None]:
        """A segment that was sealed under a wrong clock is as old as a plausible clock has known it."""
        now_ms = self._clock_guard.seen_ms()
        if not now_ms:
            return
        for rank, partition in enumerate(logs):
            before = 0
            for segment in partition.segments[:-1]:
                late = segment.sealed_ms > now_ms
                if not (is_plausible(segment.sealed_ms, now_ms, before) or (late and not self._clock_guard.confirmed)):
                    segment.sealed_ms = now_ms
                    if segment.base_chain != UNKNOWN_CHAIN:
                        self._checkpoints.note_segment(partition, segment)
                if segment.sealed_ms <= now_ms:
                    before = segment.sealed_ms
            if rank % SLICE == 0:
                yield

    def _note_sealed(self, partition: PartitionLog) -> None:
        """Count the indexes of freshly sealed segments, and note what they are."""
        for segment in partition.segments[-2::-1]:
            if self._open_files.knows(segment) or segment.points is None:
                break
            self._open_files.index_loaded(segment)
            if segment.base_chain != UNKNOWN_CHAIN:
                self._checkpoints.note_segment(partition, segment)

    def stored(self, size: int) -> None:
        """A fast disk takes more between two ticks than a small one has left: measure as soon as that may be gone."""
        self._used += size
        self._stored_since += size
        if self._budget.spend(size):
            self._measure()

    def _measure(self) -> None:
        if self._measuring:
            return
        self._measuring = True
        used = self._used + self._deleted.size_bytes

        def done(result: object) -> None:
            self._measuring = False
            if not isinstance(result, tuple):
                return
            was_full = self._committer.disk_full
            free, size = result
            self._budget.measured(free, size, used)
            self._committer.disk_full, self._committer.scarce = self._budget.full, ""
            if bool(was_full) != bool(self._budget.full):
                log.warning(
                    "%s", f"disk full: {self._budget.full}" if self._budget.full else "the disk has space again"
                )

        self._committer.call(lambda: files.free_space(self._path), done)

    def _drop_aside(self, logs: list[PartitionLog], now: float) -> None:
        """What is retained aside goes after a day, or when space is wanted."""
        wanted = self._budget.wants_space > 0
        if self._dropping or (now < self._aside_due and not wanted):
            return
        self._dropping = True
        self._aside_due = now + ASIDE_CHECK_SECONDS
        wall_ms = self._clock_guard.wall_ms()
        directories = [partition.directory for partition in logs]

        def work() -> None:
            for directory in directories[:SLICE]:
                drop_aside(directory, wall_ms, everything=wanted)

        def go_on(result: object) -> None:
            del directories[:SLICE]
            if directories:
                self._committer.call(work, go_on)
            else:
                self._dropping = False

        self._committer.call(work, go_on)

    # ---- retention ----

    def _retain(self, logs: list[PartitionLog], wanted: int) -> Iterator[None]:
        """`wanted`: bytes to remove early."""
        if self._removing:
            return
        wanted = wanted if self._settings.drop_consumed else 0
        several = [one for one in logs if len(one.segments) > 1]
        if wanted > 0:
            several.sort(key=lambda one: one.segments[0].sealed_ms)  # what is the oldest goes first
        for first in range(0, len(several), SLICE):
            partitions = [one for one in several[first : first + SLICE] if self._serves(one) and not one.rewriting]
            found = self._plan(partitions, wanted)
            if found is not None:
                rank, gone = found
                in_time = self._plan([partitions[rank]], 0) if wanted > 0 else found
                early = gone[len(in_time[1]) if in_time is not None else 0 :]
                wanted -= sum(segment.size for segment in early)
                if early:
                    self._early[partitions[rank]] = self._scheduler.now()
                self._remove(partitions[rank], gone)
            yield
        if wanted > 0 and not self._removing:
            passed: list[PartitionLog] = []
            for first in range(0, len(logs), SLICE):
                passed += filter(self._passed, logs[first : first + SLICE])
                yield
            self._seal_largest(passed, wanted)
            if not passed and self._budget.full:
                self._listener.on_full()

    def _plan(self, partitions: Sequence[PartitionLog], wanted: int) -> tuple[int, list[Segment]] | None:
        facts = (
            RetentionFacts(
                partition.segments,
                partition.settings,
                partition.identity.snapshot[0],
                partial(self._listener.retention_pin, partition),
                partial(self._listener.retention_floor, partition),
            )
            for partition in partitions
        )
        return plan(facts, self._settings, now_ms=self._clock_guard.wall_ms(), wanted=wanted)

    def removed_early(self) -> list[str]:
        """Logs of which something went within the last hour although their retention keeps it."""
        now = self._scheduler.now()
        self._early = {log: when for log, when in self._early.items() if now - when < EARLY_SECONDS}
        return sorted(log.name for log in self._early)

    def _passed(self, one: PartitionLog) -> bool:
        """Has everybody read this log to its end, so that its active segment can go once it is sealed?"""
        return (
            one.active.size >= LEAST_SEALED_BYTES
            and self._serves(one)
            and self._listener.retention_floor(one) == one.durable_end == one.staged_end
            and not takes_keys(one.settings, one.identity.snapshot[0], one.durable_end)
        )

    def _seal_largest(self, passed: list[PartitionLog], wanted: int) -> None:
        """Until so many bytes are found."""
        for one in sorted(passed, key=lambda one: -one.active.size):
            if wanted <= 0:
                break
            wanted -= one.active.size
            self._committer.seal(one)

    def _remove(self, partition: PartitionLog, gone: list[Segment]) -> None:
        first = partition.segments[len(gone)]
        self._removing += 1

        def work() -> Identity:
            identity = change_identity(partition.directory, lambda old: begin_at(old, first.base, first.base_chain))
            for segment in gone:
                files.remove(index_path(segment.path))
                files.remove(segment.path)
            files.sync_directory(partition.directory)
            return identity

        def done(result: object) -> None:
            self._removing -= 1
            if not isinstance(result, Identity):
                log.error("%s: old segments could not be removed: %s", partition.name, result)
                return
            partition.identity = result
            for segment in gone:
                partition.segments.remove(segment)
                self._open_files.forget(segment)
                segment.retire()
                self._checkpoints.forget_segment(partition, segment)
            partition.corrupt_ranges = [
                corrupt for corrupt in partition.corrupt_ranges if corrupt.next > result.log_start
            ]
            self._checkpoints.corrupt_ranges_changed(partition)
            self.removed_segments += len(gone)
            self._listener.on_topic(partition.topic)
            log.info("%s: %d segments removed, the log starts at %d", partition.name, len(gone), result.log_start)

        self._committer.call(work, done)
