"""Reads that may wait for the disk: asked for on the loop, done by the reader thread, answered on the loop.

What a read finds on the way is taken over into the log: a descriptor, an index, a corrupt range. A log whose files are
being replaced is not read; the caller tries again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import structs

from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.storage import files
from edgebroker.storage.commit.open_files import OpenFiles
from edgebroker.storage.log.chains import DamagedLogError, find_chains
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.reader import ColdReader, SegmentRead, read_cold
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.log.timestamps import find_time
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import ChainPoint, ColdRead, StoredFile
from edgebroker.storage.upkeep.checkpoints import Checkpoints

# So often, and for so long, a read has to fail before what was to be read counts as damaged.
TRIES, TRY_SECONDS = 3, 2.0
BEING_REPLACED = "its files are being replaced; try again in a moment"


class ColdReads:
    """Owned by the loop thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        reader: ColdReader,
        quarantine: Quarantine,
        checkpoints: Checkpoints,
        open_files: OpenFiles,
    ) -> None:
        self._scheduler, self._reader, self._quarantine = scheduler, reader, quarantine
        self._checkpoints, self._open_files = checkpoints, open_files
        # How often the device refused to read a segment, and since when.
        self._failures: dict[Segment, tuple[int, float]] = {}

    def read(self, log: PartitionLog, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None:
        """Verified batches from the one that holds `offset` on. What cannot be read after a few tries is damage."""
        if log.replacing:
            self._scheduler.call_later(0.0, lambda: done(SegmentRead(error=BEING_REPLACED)))
            return
        segment = log.segment_of(offset)
        view = log.view(segment)
        if any(one.first < segment.end_offset and segment.base < one.next for one in log.corrupt_ranges):
            view = structs.replace(view, salvage=True)  # what is around known damage is read in spite of it

        def answer(result: SegmentRead) -> None:
            if not (result.unreadable and self._given_up(log, segment)):
                self._take(log, segment, result)
                done(result)
            elif result.missing:
                self._checkpoints.file_lost(log, segment)
                done(result)
            else:
                salvaged = structs.replace(view, salvage=True)
                self._reader.submit(lambda: read_cold(salvaged, offset, max_bytes, self._quarantine), taken)

        def taken(result: SegmentRead) -> None:
            self._take(log, segment, result)
            done(result)

        self._reader.submit(lambda: read_cold(view, offset, max_bytes, self._quarantine), answer)

    def _given_up(self, log: PartitionLog, segment: Segment) -> bool:
        """Count a failure of the device: True when it has failed often and long enough. Of the active segment only the
        next start can tell more."""
        if segment.retired or segment is log.active:
            return False
        now = self._scheduler.now()
        count, since = self._failures.get(segment, (0, now))
        if count + 1 >= TRIES and now - since >= TRY_SECONDS:
            self._failures.pop(segment, None)
            return True
        self._failures[segment] = (count + 1, since)
        return False

    def _take(self, log: PartitionLog, segment: Segment, result: SegmentRead) -> None:
        """Take over what a read found on its way."""
        if not result.error or segment.retired:
            self._failures.pop(segment, None)
        if result.index is not None and not segment.retired:
            log.take_index(segment, result.index)
            if segment is not log.active:
                self._open_files.index_loaded(segment)
        if result.corrupt is not None and segment.retired:
            # It was repaired meanwhile: what was found belongs to the file before.
            result.corrupt, result.error = None, "the segment was replaced while it was read"
        if result.corrupt is not None:
            log.add_corrupt_range(result.corrupt)
            self._checkpoints.corrupt_ranges_changed(log)
        if result.fd >= 0:
            if segment.fd < 0 and not segment.retired and self._open_files.fits():
                segment.fd = result.fd
                self._open_files.opened(segment, log)
            else:
                files.close(result.fd)

    def load_range(self, file: StoredFile, position: int, length: int, done: Callable[[bytes, str], None]) -> None:
        """Bytes of a file that the caller holds."""
        fd = file.fd

        def read() -> SegmentRead:
            return SegmentRead(data=files.read_at(fd, length, position))

        def answer(result: SegmentRead) -> None:
            short = not result.error and len(result.data) != length
            if (short or result.unreadable) and isinstance(file, Segment):
                file.unverified_end = file.size  # from now on it is read as what was never verified
            done(result.data, result.error or ("a segment is shorter than its log" if short else ""))

        self._reader.submit(read, answer)

    def chains(self, log: PartitionLog, offsets: Sequence[int], done: Callable[[list[ChainPoint], str], None]) -> None:
        """For each offset the first batch boundary at or after it, with the chain there, as far as that is known."""
        if log.replacing:
            self._scheduler.call_later(0.0, lambda: done([], BEING_REPLACED))
            return
        inside = [offset for offset in offsets if log.log_start <= offset <= log.durable_end]
        inside = [offset for offset in inside if not log.damaged_before(offset)]
        segments = {log.segment_of(offset).base: log.segment_of(offset) for offset in inside}
        views = [log.view(segments[base]) for base in sorted(segments)]
        found: list[ChainPoint] = []
        damaged: list[int] = []

        def read() -> SegmentRead:
            try:
                found.extend(find_chains(views, inside))
            except DamagedLogError as error:
                damaged.append(error.offset)
                return SegmentRead(error=str(error))
            return SegmentRead()

        def answer(result: SegmentRead) -> None:
            for offset in damaged:
                self.read(log, offset, 1, lambda result: None)  # it becomes a corrupt range, which is repaired
            done([] if result.error else found, result.error)

        self._reader.submit(read, answer)

    def offset_at_time(self, log: PartitionLog, timestamp: int, done: Callable[[int, str], None]) -> None:
        """The first offset whose record is not older than `timestamp`."""
        if log.replacing:
            self._scheduler.call_later(0.0, lambda: done(-1, BEING_REPLACED))
            return
        views = [(log.view(segment), segment.max_timestamp) for segment in log.segments]
        end = log.durable_end
        self._reader.submit(
            lambda: find_time(views, timestamp, end), lambda result: done(result.first_offset, result.error)
        )
