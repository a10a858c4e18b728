"""Group commit: what the loop staged in one iteration is written and synced together by the commit thread.

    mark() during an iteration -> flush() at its end -> (commit thread: write, sync) -> collect() -> listener

One group is in flight at a time, so a group is as large as what arrived while the last one was with the disk. With a
commit interval (worn flash) a group waits for it, unless a topic is urgent. Data that no producer waits for at
level durable is synced a few milliseconds later, so that level written does not pay for a sync.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from edgebroker.common.histogram import Histogram
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler, Timer
from edgebroker.common.runtime.threads import start_thread
from edgebroker.storage import files
from edgebroker.storage.commit.groupcommit import GroupCommit
from edgebroker.storage.commit.open_files import OpenFiles
from edgebroker.storage.log.index import SealedIndex, write_index
from edgebroker.storage.log.partition import Layout, PartitionLog
from edgebroker.storage.log.segment import Segment, segment_path
from edgebroker.storage.log.staging import Chunk
from edgebroker.storage.types import UNKNOWN_CHAIN

log = logging.getLogger(__name__)

SYNC_DELAY_SECONDS = 0.005
STALLED_SECONDS = 10.0


class CommitListener(Protocol):
    """Notified, on the loop, of what became of staged batches."""

    def on_written(self, log: PartitionLog) -> None:
        """log.written_end moved."""

    def on_durable(self, log: PartitionLog, chunks: list[Chunk]) -> None:
        """log.durable_end moved over these chunks."""

    def on_failed(self, log: PartitionLog, outcome: Outcome, message: str) -> None:
        """What was not durable is forgotten; producers that wait for it are to get this answer."""


class Committer:
    """Owned by the loop thread. `interval` (seconds) may be changed at any time. `read_only` and `disk_full` say why
    writing is refused, "" when it is not; `scarce`: what lacked a descriptor or memory since the disk was measured."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        listener: CommitListener,
        open_files: OpenFiles,
        *,
        interval_seconds: float,
    ) -> None:
        self._scheduler, self._clock, self._listener = scheduler, clock, listener
        self._open_files = open_files
        self.interval = interval_seconds
        self._group = GroupCommit()
        self._dirty: dict[PartitionLog, None] = {}
        self._unsynced: dict[PartitionLog, None] = {}
        self._in_flight: list[tuple[PartitionLog, Layout | None, int]] = []
        self._syncing = False
        self._flush_due = self._sync_due = 0.0
        self._timer: Timer | None = None
        self._timer_due = 0.0
        self._calling = 0  # closures whose result is not known on the loop yet
        self._calls: deque[tuple[Callable[[], object], Callable[[object], None]]] = deque()
        self._flushing = self._ending = self._opening = False
        self.read_only = ""
        self.disk_full = self.scarce = ""
        self.groups = self.group_bytes = self.write_ns = self.sync_ns = self.rolls = self.slowest_sync_ns = 0
        self.sync_latency, self.append_latency = Histogram(), Histogram()
        self._staged_since = 0.0
        # When the first batch of the group was staged that is in flight, or is just being reported to the listener.
        self.staged_at = 0.0
        scheduler.add_reader(self._group.done_fd, self._collect)
        scheduler.at_end_of_iteration(self.flush)
        self._thread = start_thread("edgebroker-commit", self._run)

    def mark(self, partition: PartitionLog, *, durable: bool, written: bool, urgent: bool) -> None:
        """Something was staged, and perhaps a producer waits for it to be durable or written."""
        if partition not in self._dirty:
            if not self._dirty:
                self._staged_since = self._scheduler.now()
            self._dirty[partition] = None
        partition.wants_sync = partition.wants_sync or durable
        partition.wants_announcement = partition.wants_announcement or written
        if self.interval and not urgent:
            if not self._flush_due:
                self._flush_due = self._scheduler.now() + self.interval
        else:
            self._flush_due = -1.0

    @property
    def stalled(self) -> bool:
        """True when a group has been with the disk for ten seconds."""
        return self._group.seconds_in_flight > STALLED_SECONDS

    @property
    def stored(self) -> bool:
        """True when everything that was published is durable; closures (measuring the disk) may be under way."""
        return not (self._dirty or self._unsynced or self._in_flight)

    @property
    def idle(self) -> bool:
        """True when nothing is staged, written without a sync, or in flight."""
        return self.stored and not self._calling

    def refusal(self, *, spare: bool = False) -> tuple[Outcome, str] | None:
        """Why nothing can be stored now; None when it can. `spare`: although the disk counts as full."""
        if self.read_only:
            return Outcome.READ_ONLY, f"this node is read-only: {self.read_only}"
        if self.disk_full and not spare:
            return Outcome.DISK_FULL, f"the disk is full: {self.disk_full}"
        return None

    def call(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        """Run file work on the commit thread between groups; `done` gets its result or its exception, on the loop."""
        self._calling += 1
        self._calls.append((work, done))
        self._group.call()

    def _called(self, done: Callable[[object], None], result: object) -> None:
        self._calling -= 1
        done(result)

    @property
    def staged_bytes(self) -> int:
        """What waits for the disk: staged, not yet handed over."""
        return sum(partition.stage.pending_bytes for partition in self._dirty)

    def seal(self, partition: PartitionLog) -> None:
        """Begin a new segment although the active one has room (age)."""
        if not (partition.rolling or partition.unsynced or partition in self._dirty):
            if any(partition is other for other, _, _ in self._in_flight):
                return
            self._roll(partition)

    def flush_now(self) -> None:
        """Sync what is left without waiting for intervals (stop)."""
        self._flushing = True
        self.flush()

    def flush(self) -> None:
        """Hand what is due to the commit thread, if it is idle. Called at the end of every iteration."""
        if not (self._dirty or self._unsynced) or not self._group.idle:
            return
        now = self._scheduler.now()
        ready = bool(self._dirty) and (self._flush_due <= now or self._flushing)
        sync = bool(self._sync_due and self._sync_due <= now) or self._flushing
        if not (ready or sync):
            self._wake_at(min((due for due in (self._flush_due, self._sync_due) if due > 0), default=now))
            return
        jobs: list[tuple[int, int, int, int, int, int, object]] = []
        in_flight: list[tuple[PartitionLog, Layout | None, int]] = []
        written = False
        taken = list(self._dirty) if ready else []
        closed: list[PartitionLog] = []
        wall_ms, monotonic_ms = self._clock.wall_ms(), int(now * 1000)
        for partition in taken:
            if partition.rolling:
                continue
            if partition.needs_roll():
                if partition.unsynced:
                    sync = True
                else:
                    self._roll(partition)
                continue
            if partition.active.fd < 0:
                closed.append(partition)
                continue
            self._open_files.used(partition.active)
            chunk = partition.take_chunk()
            layout = partition.lay_out(chunk, wall_ms, monotonic_ms) if chunk is not None else None
            sync = sync or partition.wants_sync
            written = written or partition.wants_announcement
            if not partition.stage.pending_bytes:
                del self._dirty[partition]
                partition.wants_sync = partition.wants_announcement = False
            if layout is not None:
                start, amount = partition.preallocation(layout.size)
                active = partition.active
                jobs.append((active.fd, active.size, layout.chunk.address, layout.size, start, amount, layout.chunk))
                in_flight.append((partition, layout, start + amount))
        if closed and not self._opening:
            room = self._open_files.room(len(closed))
            sync = sync or room < len(closed)  # what is durable gives its descriptor to others
            if room:
                self._open(closed[:room])
        if not self._dirty:
            self._flush_due = 0.0
        if sync:
            writing = {partition for partition, _, _ in in_flight}
            for partition in self._unsynced:
                if partition not in writing and not partition.rolling:
                    jobs.append((partition.active.fd, 0, 0, 0, 0, 0, None))
                    in_flight.append((partition, None, 0))
        if not jobs:
            return
        self._in_flight, self._syncing = in_flight, sync
        self.staged_at, self._staged_since = self._staged_since, now
        self._group.submit(jobs, sync, written)

    def _open(self, partitions: list[PartitionLog]) -> None:
        """Open files of logs that were idle, on the commit thread; what is staged is written after it."""
        self._opening = True
        active = [partition.active for partition in partitions]
        for partition in partitions:
            partition.rolling = True

        def work() -> list[int | OSError]:
            return [_open_or_error(segment) for segment in active]

        def opened(result: object) -> None:
            assert isinstance(result, list), result
            self._opening = False
            for partition, segment, fd in zip(partitions, active, result, strict=True):
                partition.rolling = False
                if isinstance(fd, int) and segment.fd >= 0:
                    files.close(fd)  # a reader was faster, and its bytes may be on their way
                elif isinstance(fd, int):
                    segment.fd = fd
                    self._open_files.opened(segment, partition)
                elif fd.errno in files.TRANSIENT:
                    self._lacks_descriptor(partition, f"{partition.name} cannot be opened: {files.reason(fd)}")
                else:
                    self._file_failed(partition, fd.errno or 0, None)

        self.call(work, opened)

    def _lacks_descriptor(self, partition: PartitionLog, why: str) -> None:
        self.scarce = why
        self._open_files.shrink()
        self._drop_unwritten(partition, Outcome.OVERLOADED, f"{why}; retry")

    def _run(self) -> None:
        """The commit thread: groups inside the extension, closures here."""
        while not self._ending:
            self._group.run()
            while self._calls:
                work, done = self._calls.popleft()
                result: object
                try:
                    result = work()
                except Exception as error:
                    result = error
                self._scheduler.call_soon_threadsafe(partial(self._called, done, result))

    def _collect(self) -> None:
        outcome = self._group.collect()
        if outcome is None:
            return
        done, errors, write_ns, sync_ns = outcome
        in_flight = self._in_flight
        if not done:
            self._note_written(errors)
            return
        self._note_written(errors)
        self._in_flight = []
        self.groups += 1
        self.write_ns += write_ns
        self.sync_ns += sync_ns
        self.slowest_sync_ns = max(self.slowest_sync_ns, sync_ns)
        if self._syncing:
            self.sync_latency.observe(sync_ns / 1e9)
            self.append_latency.observe(self._clock.monotonic() - self.staged_at)
        for (partition, layout, _), (write_error, sync_error) in zip(in_flight, errors, strict=True):
            if write_error in files.FULL:
                self._disk_is_full(partition, f"writing {partition.name} failed: {os.strerror(write_error).lower()}")
            elif write_error or sync_error:
                self._file_failed(partition, write_error or sync_error, layout)
            elif self._syncing:
                self._unsynced.pop(partition, None)
                self._listener.on_durable(partition, partition.synced())
            else:
                self._unsynced[partition] = None
        if self._unsynced and not self._sync_due:
            self._sync_due = self._scheduler.now() + max(self.interval, SYNC_DELAY_SECONDS)
        elif not self._unsynced:
            self._sync_due = 0.0

    def _note_written(self, errors: list[tuple[int, int]]) -> None:
        """Move written_end once per group, at the first signal that says so."""
        for rank, (partition, layout, allocated) in enumerate(self._in_flight):
            if layout is not None and not errors[rank][0]:
                partition.written(layout, allocated)
                self.group_bytes += layout.size
                self._in_flight[rank] = (partition, None, 0)
                self._listener.on_written(partition)

    def _disk_is_full(self, partition: PartitionLog, why: str) -> None:
        self.disk_full = why
        self._drop_unwritten(partition, Outcome.DISK_FULL, "the disk is full; retry when there is space")

    def _drop_unwritten(self, partition: PartitionLog, outcome: Outcome, why: str) -> None:
        """Drop what was not written; its producers send it again."""
        self._dirty.pop(partition, None)
        partition.wants_sync = partition.wants_announcement = False
        partition.drop_unwritten()
        fd, size = partition.active.fd, partition.active.size
        if fd < 0:  # then nothing was written to it
            self._listener.on_failed(partition, outcome, why)
            return

        def done(result: object) -> None:
            partition.rolling = False
            if isinstance(result, OSError):
                log.error("%s: the unwritten end of the file could not be truncated: %s", partition.name, result)

        # Bytes after the end would come back after a crash as batches that were never acknowledged.
        partition.rolling = True
        self.call(lambda: files.truncate(fd, size), done)
        self._listener.on_failed(partition, outcome, why)

    def _file_failed(self, partition: PartitionLog, number: int, layout: Layout | None) -> None:
        """After a failed sync the file is over: its pages may be lost and marked clean. Write what is not durable
        once more, from memory, into a new segment with its own sync; if that fails too, the node turns read-only."""
        log.error(
            "%s: storing failed (%s); writing the unacknowledged batches to a new segment",
            partition.name,
            errno.errorcode.get(number, number),
        )
        self._roll(partition, rescue=[*partition.unsynced, *([layout.chunk] if layout else [])])

    def _roll(self, partition: PartitionLog, rescue: list[Chunk] | None = None) -> None:
        """Seal the active segment and begin another at the durable end, on the commit thread."""
        old, base, chain = partition.active, partition.durable_end, partition.durable_chain
        size = partition.durable_position
        partition.rolling = True
        wall_ms = self._clock.wall_ms()
        self.rolls += 1
        index, known = None, UNKNOWN_CHAIN not in (old.base_chain, old.end_chain)
        if rescue is None and old.points is not None and not old.points_from and known:
            index = old.to_index(partition.identity.log_id_bytes)._replace(sealed_ms=wall_ms)

        def work() -> Segment:
            if rescue is None:
                _truncate(old, size)
                if index is not None:
                    _write_index_if_possible(old, index)
            path = segment_path(partition.directory, base)
            if base == old.base:
                # Nothing in the old file is durable: keep its bytes out of the way of the new one.
                files.rename_suffix(old.path, ".failed")
            segment = Segment(path, base, base_chain=chain, fd=files.create_log(path))
            segment.end_chain = chain
            try:
                for chunk in rescue or ():
                    files.write_at(segment.fd, memoryview(chunk), segment.size)
                    segment.size += len(chunk)
                if rescue:
                    files.sync_file(segment.fd)
            finally:
                segment.close()
            return segment

        self.call(work, lambda result: self._rolled(partition, result, rescue, wall_ms))

    def _rolled(self, partition: PartitionLog, result: object, rescue: list[Chunk] | None, wall_ms: int) -> None:
        partition.rolling = False
        if not isinstance(result, Segment):
            number = getattr(result, "errno", 0)
            why = f"a new segment of {partition.name} cannot be made: {files.reason(result)}"
            if rescue is None and number in files.FULL:
                partition.must_roll = True
                self._disk_is_full(partition, why)
            elif rescue is None and number in files.TRANSIENT:
                partition.must_roll = True
                self._lacks_descriptor(partition, why)
            else:
                self._turn_read_only(partition, result)
            return
        if rescue is None:
            partition.begin_segment(result, sealed_ms=wall_ms, now=self._scheduler.now())
            return
        self._rescued(partition, result, rescue, wall_ms)

    def _turn_read_only(self, partition: PartitionLog, why: object) -> None:
        self.read_only = f"{partition.name}: {files.reason(why)}"
        log.critical("storing failed twice (%s); this node is read-only until it is restarted", why)
        self._dirty.pop(partition, None)
        self._unsynced.pop(partition, None)
        partition.wants_sync = partition.wants_announcement = False
        partition.fall_back()
        self._listener.on_failed(partition, Outcome.READ_ONLY, "storing failed; the node is read-only, see its log")

    def _rescued(self, partition: PartitionLog, segment: Segment, rescue: list[Chunk], wall_ms: int) -> None:
        old = partition.active
        old.size, old.end_offset, old.end_chain = (
            partition.durable_position,
            partition.durable_end,
            partition.durable_chain,
        )
        partition.chain, partition.written_end = partition.durable_chain, partition.durable_end
        if segment.base == old.base:
            partition.segments.pop()
            old.retire()
            partition.segments.append(segment)
        else:
            partition.begin_segment(segment, sealed_ms=wall_ms, now=self._scheduler.now())
        segment.size = 0
        segment.points = bytearray()
        partition.unsynced = []
        for chunk in rescue:
            partition.written(partition.lay_out(chunk, wall_ms, 0), 0)
        self._unsynced.pop(partition, None)
        self._listener.on_written(partition)
        self._listener.on_durable(partition, partition.synced())

    def _wake_at(self, due: float) -> None:
        if self._timer is not None and self._timer_due <= due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._scheduler.call_later(max(0.0, due - self._scheduler.now()), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None

    def stop(self, timeout: float) -> bool:
        """End the thread; everything must have been flushed before. False when the disk holds it up."""
        self._ending = True
        self._group.call()
        self._thread.join(timeout)
        self._scheduler.remove_reader(self._group.done_fd)
        self._scheduler.remove_end_of_iteration(self.flush)
        if self._thread.is_alive():
            return False
        self._group.close()
        return True


def _open_or_error(segment: Segment) -> int | OSError:
    try:
        return files.open_log(segment.path, writable=True)
    except OSError as error:
        return error


def _truncate(segment: Segment, size: int) -> None:
    """Free what is behind the end of a segment, open or not."""
    if segment.fd >= 0:
        files.truncate(segment.fd, size)
        return
    fd = files.open_log(segment.path, writable=True)
    try:
        files.truncate(fd, size)
    finally:
        files.close(fd)


def _write_index_if_possible(segment: Segment, index: SealedIndex) -> None:
    """The index is a hint: the roll goes on without it, and a reader rebuilds it from the log."""
    try:
        write_index(segment.path, index)
    except OSError as error:
        log.warning("%s: the index could not be written: %s", segment.path, error)
