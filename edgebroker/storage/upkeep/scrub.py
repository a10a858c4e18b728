"""Verifying in the background what this process did not write itself: what an earlier run wrote, and what was repaired.

One segment after another, a window at a time on the reader thread, no faster than the settings allow. Damage becomes a
corrupt range, its bytes are kept in quarantine, and verifying continues after it. Until a segment is verified, its
bytes are read through the reader thread only, which checks them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial

from edgebroker.common.batch import EXPLANATION, STORED_BATCH_BYTES, Reason
from edgebroker.common.runtime.scheduler import Scheduler, Timer
from edgebroker.storage import files
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.reader import ColdReader, SegmentRead
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.log.walk import WINDOW_BYTES, ScanState, next_good_batch, walk_file, walk_mapped, walk_start
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import CorruptRange
from edgebroker.storage.upkeep.checkpoints import Checkpoints

log = logging.getLogger(__name__)

REWRITE_WAIT_SECONDS = 1.0
# So often a window is read before what the device refuses counts as damaged.
TRIES, TRY_SECONDS = 3, 1.0
WINDOW_TIMEOUT_SECONDS = 60.0


class Scrub:
    """Owned by the loop thread. `bytes_per_second` may be changed at any time; 0: as fast as it goes."""

    def __init__(
        self,
        scheduler: Scheduler,
        reader: ColdReader,
        quarantine: Quarantine,
        checkpoints: Checkpoints,
        bytes_per_second: int,
    ) -> None:
        self._scheduler, self._reader, self._quarantine = scheduler, reader, quarantine
        self._checkpoints, self.bytes_per_second = checkpoints, bytes_per_second
        self._queue: deque[tuple[PartitionLog, Segment]] = deque()
        self._busy = False
        self._timer: Timer | None = None
        self.verified_bytes = 0

    def stop(self) -> None:
        """Verify nothing more; a window that is being read is the last."""
        if self._timer is not None:
            self._timer.cancel()

    def verify(self, partition: PartitionLog, segment: Segment) -> None:
        """Read all of a segment, after those that wait for that already."""
        self._queue.append((partition, segment))
        if not self._busy:
            self._next()

    def verify_log(self, partition: PartitionLog) -> None:
        """Read all of a log that this process did not write or verify."""
        for segment in partition.segments:
            if segment.unverified_end:
                self.verify(partition, segment)

    def _next(self) -> None:
        self._busy = False
        while self._queue:
            partition, segment = self._queue.popleft()
            if segment.unverified_end and not segment.retired:
                epoch = partition.identity.epoch_at(segment.base)
                self._busy = True
                self._window(partition, segment, walk_start(segment.base, max(segment.base_chain, 0), epoch=epoch))
                return

    def _window(
        self, partition: PartitionLog, segment: Segment, state: ScanState, damaged: bool = False, tries: int = 1
    ) -> None:
        """Verify one window of a segment; then wait as long as the allowed rate says, and continue. What the device
        refuses to read at the last of the TRIES is damage."""
        if partition.rewriting:
            # Its files may be replaced in a moment; then it is decided again.
            again = partial(self._window, partition, segment, state, damaged, tries)
            self._timer = self._scheduler.call_later(REWRITE_WAIT_SECONDS, self._next if segment.retired else again)
            return
        size = min(segment.unverified_end, segment.size)
        end_offset, whole = segment.end_offset, size == segment.size
        max_epoch = partition.identity.epoch
        found: list[tuple[ScanState, CorruptRange | None]] = []
        salvage = tries == TRIES

        def work() -> SegmentRead:
            fd = files.open_log(segment.path)
            try:
                walk = partial(
                    walk_salvaged if salvage else walk_mapped,
                    base_offset=segment.base,
                    max_batch=STORED_BATCH_BYTES,
                    max_epoch=max_epoch,
                    limit_offset=end_offset,
                )
                walked = walk(fd, size, state)
                ended_early = whole and walked.position >= size and walked.next_offset < end_offset
                if (walked.position > state.position or walked.position >= size) and not ended_early:
                    found.append((walked, None))
                    return SegmentRead()
                at = next_good_batch(
                    fd,
                    walked.position,
                    size,
                    walked.next_offset,
                    end_offset - 1,
                    STORED_BATCH_BYTES,
                    salvage=salvage,
                )
                next_offset = int.from_bytes(files.read_at(fd, 8, at), "big") if at >= 0 else end_offset
                end = at if at >= 0 else size
                reason = "cannot be read" if salvage else EXPLANATION.get(Reason(walked.reason), "damaged")
                self._quarantine.keep(partition.name, segment.path, fd, walked.position, end, reason)
                corrupt = CorruptRange(walked.next_offset, next_offset)
                found.append((walked._replace(position=end, next_offset=next_offset), corrupt))
                return SegmentRead()
            finally:
                files.close(fd)

        def done(result: SegmentRead) -> None:
            if segment.retired:
                self._next()
                return
            if result.error or not found:
                self._failed(
                    partition, segment, result, partial(self._window, partition, segment, state, damaged), tries
                )
                return
            walked, corrupt = found[0]
            if corrupt is not None:
                partition.add_corrupt_range(corrupt)
                self._checkpoints.corrupt_ranges_changed(partition)
            moved = walked.position - state.position
            self.verified_bytes += moved
            if walked.position >= size or walked.next_offset >= end_offset:
                if corrupt is None and not damaged:
                    segment.unverified_end = 0
                    if whole:
                        partition.verified(segment, walked.position, walked.chain)
                again = self._next
            else:
                again = partial(self._window, partition, segment, walked, damaged or corrupt is not None)
            rate = self.bytes_per_second
            self._timer = self._scheduler.call_later(moved / rate if rate else 0.0, again)

        if size == 0:
            self._next()
            return
        self._reader.submit(work, done, timeout=WINDOW_TIMEOUT_SECONDS)

    def _failed(
        self,
        partition: PartitionLog,
        segment: Segment,
        result: SegmentRead,
        window: Callable[..., None],
        tries: int,
    ) -> None:
        """Try a window again, in a way that gets along with what cannot be read; a file that stays away is lost."""
        if tries < TRIES and result.unreadable:
            self._timer = self._scheduler.call_later(TRY_SECONDS, partial(window, tries=tries + 1))
            return
        log.error("%s: %s could not be verified: %s", partition.name, segment.path.name, result.error)
        if result.missing and segment is not partition.active:
            self._checkpoints.file_lost(partition, segment)
        self._next()


def walk_salvaged(
    fd: int, size: int, start: ScanState, *, base_offset: int, max_batch: int, max_epoch: int, limit_offset: int
) -> ScanState:
    """walk_mapped() for a window of which the device cannot read everything."""
    return walk_file(
        fd,
        start,
        min(size, start.position + WINDOW_BYTES + max_batch),
        base_offset=base_offset,
        max_batch=max_batch,
        max_epoch=max_epoch,
        limit_offset=limit_offset,
        salvage=True,
    )
