"""Reads that may wait for the disk: asked for on the loop, done by the reader thread, answered on the loop.

What a read finds on the way is taken over into the log: a descriptor, an index, a corrupt range. A log whose files are
being replaced is not read; the caller tries again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.storage import files
from edgebroker.storage.log.chains import DamagedLogError, find_chains
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.reader import ColdReader, SegmentRead, read_cold
from edgebroker.storage.log.timestamps import find_time
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import ChainPoint, ColdRead, StoredFile
from edgebroker.storage.upkeep.checkpoints import Checkpoints
from edgebroker.storage.upkeep.open_files import OpenFiles

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

    def read(self, log: PartitionLog, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None:
        """Verified batches from the one that holds `offset` on."""
        if log.replacing:
            self._scheduler.call_later(0.0, lambda: done(SegmentRead(error=BEING_REPLACED)))
            return
        segment = log.segment_of(offset)
        view = log.view(segment)

        def answer(result: SegmentRead) -> None:
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
                if segment.fd < 0 and not segment.retired:
                    segment.fd = result.fd
                    self._open_files.opened(segment)
                else:
                    files.close(result.fd)
            done(result)

        self._reader.submit(lambda: read_cold(view, offset, max_bytes, self._quarantine), answer)

    def load_range(self, file: StoredFile, position: int, length: int, done: Callable[[bytes, str], None]) -> None:
        """Bytes of a file that the caller holds."""
        fd = file.fd

        def read() -> SegmentRead:
            return SegmentRead(data=files.read_at(fd, length, position))

        def answer(result: SegmentRead) -> None:
            short = not result.error and len(result.data) != length
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
