"""The state of one partition's log, as the loop sees it: what is staged, written and durable, and in which segments.

    staged    numbered in memory (stage.next_offset)
    written   in the page cache (written_end): survives the process
    durable   synced (durable_end): survives a power cut; only this is served

The committer drives writing; what readers ask is in lookup.py. Nothing here waits for the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from edgebroker.common.types import TopicSettings
from edgebroker.storage.log import corrupt_ranges, segscan
from edgebroker.storage.log.index import INTERVAL_BYTES, POINT_BYTES, granularity_ms, write_index
from edgebroker.storage.log.lookup import Lookup
from edgebroker.storage.log.recovery import RecoveredLog
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.log.staging import Chunk, Stage
from edgebroker.storage.types import (
    UNKNOWN_CHAIN,
    Checkpoint,
    CorruptRange,
    Identity,
    LogInventory,
    LogStatus,
    OffsetRange,
    SegmentFile,
)

# Reserved ahead of the end: little for a small segment, more for one that is filling.
PREALLOCATE_BYTES, MAX_PREALLOCATE_BYTES = 512 << 10, 8 << 20
# A log that never grows takes no space ahead: there may be thousands of them.
PREALLOCATE_FROM_BYTES, BLOCK_BYTES = 64 << 10, 4 << 10
MAX_CHUNK_BYTES = 8 << 20


class Layout(NamedTuple):
    """The result of walking one chunk as it will be in the active segment."""

    chunk: Chunk
    size: int
    chain: int
    max_timestamp: int
    points: bytes


class PartitionLog(Lookup):
    """Owned by the loop thread. `name` is topic/partition, for messages."""

    def __init__(
        self,
        topic: str,
        partition: int,
        directory: Path,
        identity: Identity,
        recovered: RecoveredLog,
        stage: Stage,
        *,
        max_batch: int,
        segment_bytes: int,
        born: float,
    ) -> None:
        self.topic, self.partition, self.name = topic, partition, f"{topic}/{partition}"
        self.directory, self.identity = directory, identity
        self.segments: list[Segment] = recovered.segments
        self.corrupt_ranges: list[CorruptRange] = list(recovered.corrupt_ranges)
        self.stage = stage
        self.max_batch, self.segment_bytes = max_batch, segment_bytes
        self.written_end = self.durable_end = recovered.next_offset
        self.chain = self.durable_chain = recovered.chain
        self.durable_position = self.active.size
        self.epoch = recovered.epoch
        self.unsynced: list[Chunk] = []
        self.rolling = False
        # The files are being truncated, recreated or repaired: nothing else changes them meanwhile.
        self.rewriting = False
        # They are being replaced: nothing may be read by their names.
        self.replacing = False
        # A roll failed half-way: the next segment may exist, so nothing more goes into this one.
        self.must_roll = False
        self.wants_sync = False
        self.wants_announcement = False
        self.checkpointed = -1
        # Cache of Ages.live_from: (time to live, first offset that is within it, when).
        self.live = (0, 0, 0.0)
        # When the producer windows were noted last, and bytes_in then.
        self.windows_noted = (0.0, 0)
        self.records_in = self.bytes_in = 0
        self.active.born = born

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
    def size_bytes(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def quiet(self) -> bool:
        """Everything is stored, and nothing changes the files."""
        return not (self.rewriting or self.rolling) and self.staged_end == self.durable_end

    # ---- writing: driven by the committer ----

    def needs_roll(self) -> bool:
        """True when what is staged should begin a new segment."""
        size = self.active.size
        full = size + min(self.stage.pending_bytes, INTERVAL_BYTES) > self.segment_bytes
        return size > 0 and (full or self.must_roll)

    def take_chunk(self) -> Chunk | None:
        """What is staged and fits into the active segment."""
        return self.stage.take(min(max(self.segment_bytes - self.active.size, INTERVAL_BYTES), MAX_CHUNK_BYTES))

    def lay_out(self, chunk: Chunk, wall_ms: int, monotonic_ms: int) -> Layout:
        """How a chunk will be stored at the end of the active segment; pass the result to written() once it does."""
        active = self.active
        finest = granularity_ms(self.settings.message_ttl_ms, len(active.points or b""))
        due = monotonic_ms - active.last_point_ms >= finest
        size, reason, _, chain, _, max_timestamp, points = segscan.scan(
            chunk,
            chunk.first_offset,
            max(self.chain, 0),
            0,
            1 << 31,
            verify=False,
            base_offset=active.base,
            base_position=active.size,
            interval=INTERVAL_BYTES,
            last_point=-1 if due else active.last_point_position,
            max_timestamp=active.max_timestamp,
            wall_ms=wall_ms,
            monotonic_ms=monotonic_ms,
        )
        assert reason == 0 and size == len(chunk), (self.name, reason)
        return Layout(chunk, size, UNKNOWN_CHAIN if self.chain == UNKNOWN_CHAIN else chain, max_timestamp, points)

    def preallocation(self, length: int) -> tuple[int, int]:
        """(from, bytes) to reserve before writing `length` bytes; bytes 0 when there is room already."""
        active = self.active
        end = active.size + length
        if end <= active.allocated_end:
            return 0, 0
        if end < PREALLOCATE_FROM_BYTES:
            ahead = -end % BLOCK_BYTES  # what is written, so that a full disk takes all of it or nothing
        else:
            ahead = max(PREALLOCATE_BYTES, min(MAX_PREALLOCATE_BYTES, end // 8))
        return active.allocated_end, end + ahead - active.allocated_end

    def written(self, layout: Layout, allocated: int) -> None:
        """The chunk is in the page cache."""
        active = self.active
        active.size += layout.size
        active.allocated_end = max(active.allocated_end, allocated, active.size)
        active.end_chain = self.chain = layout.chain
        active.max_timestamp = layout.max_timestamp
        active.end_offset = self.written_end = layout.chunk.next_offset
        assert isinstance(active.points, bytearray)
        active.points += layout.points
        self.unsynced.append(layout.chunk)

    def synced(self) -> list[Chunk]:
        """Everything written is durable now. Returns the chunks that became so."""
        chunks, self.unsynced = self.unsynced, []
        self.durable_end, self.durable_position = self.written_end, self.active.size
        self.durable_chain = self.chain
        self.stage.settle(self.durable_end)
        if self.epoch != self.identity.epoch:
            self.epoch = self.identity.epoch_at(self.durable_end)  # a replica that comes to a newer history
        return chunks

    def drop_unwritten(self) -> None:
        """A write failed: forget what is not in the file."""
        self.stage.rollback(self.written_end, self.identity.epoch_at(self.written_end))

    def fall_back(self) -> None:
        """Storing failed for good: forget what is not durable; the file may hold more, the log does not."""
        active = self.active
        self.unsynced = []
        self.written_end, self.chain = self.durable_end, self.durable_chain
        active.size = active.allocated_end = self.durable_position
        active.end_offset, active.end_chain = self.durable_end, self.durable_chain
        assert isinstance(active.points, bytearray)
        while active.last_point_position >= active.size:
            del active.points[-POINT_BYTES:]
        self.drop_unwritten()

    def begin_segment(self, segment: Segment, *, sealed_ms: int, now: float) -> None:
        """A new active segment was created durably; the old one is sealed."""
        self.active.seal(sealed_ms)
        segment.born = now
        self.must_roll = False
        self.segments.append(segment)
        self.durable_position = segment.size

    def rewritten(self, identity: Identity, recovered: RecoveredLog, *, whole: bool = False) -> list[Segment]:
        """The files were truncated, recreated, continued or replaced (nothing is staged): continue from there. The
        segments that are gone; with `whole` all of them: every file is a new one."""
        known = {segment.base: segment for segment in self.segments if not whole}
        segments: list[Segment] = []
        for found in recovered.segments[:-1]:
            old = known.get(found.base, found)
            segments.append(old if old.end_offset == found.end_offset else found)
            if segments[-1] is self.active:
                self.active.seal(found.sealed_ms)
        active, before = recovered.segments[-1], known.get(recovered.segments[-1].base, self.active)
        if active.base_chain == UNKNOWN_CHAIN and before.base == active.base and not whole:
            active.base_chain = before.base_chain
        segments.append(active)
        gone = [segment for segment in self.segments if segment not in segments]
        kept = [
            corrupt
            for corrupt in self.corrupt_ranges
            if corrupt.first >= identity.log_start and corrupt.next <= recovered.next_offset
        ]
        if whole or identity.log_id != self.identity.log_id:
            kept = []
        self.identity, self.segments, self.corrupt_ranges = identity, segments, list(recovered.corrupt_ranges)
        for corrupt in kept:
            self.add_corrupt_range(corrupt)
        self.written_end = self.durable_end = recovered.next_offset
        self.chain = self.durable_chain = recovered.chain
        self.durable_position = active.size
        self.epoch = identity.epoch_at(self.durable_end)
        self.stage.resume(self.durable_end, self.epoch)
        self.must_roll = False
        self.live = (0, 0, 0.0)
        return gone

    def checkpoint(self) -> Checkpoint:
        """Where the log is durable, for the next metadata transaction."""
        active = self.active
        return Checkpoint(
            self.identity.log_id,
            active.base,
            self.durable_position,
            self.durable_end,
            self.durable_chain,
            self.epoch,
            active.max_timestamp,
        )

    # ---- corrupt ranges ----

    def add_corrupt_range(self, corrupt: CorruptRange) -> None:
        """Note damage that was found; ranges that overlap become one."""
        self.corrupt_ranges = corrupt_ranges.merged(self.corrupt_ranges, corrupt)

    def note_index(self) -> None:
        """Leave the index of the active segment to the next run; a hint. Waits for the disk."""
        active = self.active
        known = UNKNOWN_CHAIN not in (active.base_chain, active.end_chain)
        if known and active.size and active.points and not active.points_from:
            try:
                write_index(active.path, active.to_index(self.identity.log_id_bytes))
            except OSError:
                pass  # the next run knows less about ages

    def file_lost(self, segment: Segment) -> None:
        """The file of a sealed segment is gone: its records are damaged, as the next start would find."""
        if segment in self.segments:
            self.segments.remove(segment)
            segment.retire()
            self.add_corrupt_range(CorruptRange(segment.base, segment.end_offset))

    def to_repair(self) -> tuple[int, int]:
        """The offsets [first, next) to be fetched first: the first corrupt range, as far as one segment goes."""
        return corrupt_ranges.to_repair(self)

    # ---- what the engine tells ----

    def inventory(self) -> LogInventory:
        """The files of the log with the bytes of each that are durable."""
        files = [
            SegmentFile(
                segment.path.name,
                self.durable_position if segment is self.active else segment.size,
                segment is not self.active,
            )
            for segment in self.segments
        ]
        return LogInventory(self.topic, self.partition, self.identity, self.durable_end, files)

    def held_bytes(self, offset: int) -> int:
        if offset >= self.active.base:
            return 0  # almost everybody: at once
        return sum(segment.size for segment in self.segments[:-1] if segment.end_offset > offset)

    def status(self) -> LogStatus:
        return LogStatus(
            segments=len(self.segments),
            bytes=self.size_bytes,
            producers=self.stage.producer_count,
            staged_bytes=self.stage.pending_bytes,
            checkpoint=self.checkpointed,
            damaged=[OffsetRange(one.first, one.next - 1) for one in self.corrupt_ranges],
            gaps=[OffsetRange(one.first, one.next - 1) for one in self.identity.gaps],
        )

    def close(self) -> None:
        for segment in self.segments:
            segment.close()
