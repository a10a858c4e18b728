"""One partition's log as the loop sees it: staged, written, durable; segments and holes; what to read from where.

    staged    numbered in memory (stage.next_offset)
    written   in the page cache (written_end): survives the process
    durable   synced (durable_end): survives the power; only this is served to anybody

The committer drives writing; this file owns the state and never waits for the disk.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.types import TopicSettings
from edgebroker.storage import files
from edgebroker.storage.log import segscan
from edgebroker.storage.log.ages import granularity_ms
from edgebroker.storage.log.index import INTERVAL_BYTES, POINT_BYTES, SealedIndex
from edgebroker.storage.log.reader import SegmentView
from edgebroker.storage.log.recovery import RecoveredLog
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.log.staging import Chunk, Stage
from edgebroker.storage.rewrite.repair import RepairResult, RepairTarget
from edgebroker.storage.types import (
    UNKNOWN_CHAIN,
    Checkpoint,
    CorruptRange,
    DamagedOffsets,
    FileSlice,
    Found,
    Identity,
    LogInventory,
    LogStatus,
    NeedsDisk,
    SegmentFile,
)

PEEK_BYTES = 64 << 10
# Reserved ahead of the end: little for a small segment, more for one that is filling.
PREALLOCATE_BYTES, MAX_PREALLOCATE_BYTES = 512 << 10, 8 << 20
MAX_CHUNK_BYTES = 8 << 20


class Layout(NamedTuple):
    """The result of walking one chunk as it will lie in the active segment."""

    chunk: Chunk
    size: int
    chain: int
    max_timestamp: int
    points: bytes


class PartitionLog:
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
        # The files are being cut or begun anew: nobody else changes them meanwhile.
        self.rewriting = False
        # They are being exchanged for others: nothing may be read by their names.
        self.replacing = False
        # A roll was begun and failed: the next segment may exist, so that nothing more belongs into this one.
        self.must_roll = False
        self.wants_sync = False
        self.wants_announcement = False
        self.checkpointed = -1
        # What Ages found out last: (time to live, first offset that is within it, when).
        self.live = (0, 0, 0.0)
        self.producer_state_at = recovered.next_offset
        self.records_in = self.bytes_in = 0
        self.active.born = born

    @property
    def active(self) -> Segment:
        return self.segments[-1]

    @property
    def log_start(self) -> int:
        return self.identity.log_start

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
        """How a chunk will lie at the end of the active segment; pass the result to written() once it does."""
        active = self.active
        due = monotonic_ms - active.last_point_ms >= granularity_ms(self.settings.message_ttl_ms)
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
            self.epoch = self.identity.epoch_at(self.durable_end)  # a mirror that comes to a newer history
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
        old = self.active
        old.sealed_ms = sealed_ms
        old.points = bytes(old.points) if old.points is not None else None
        segment.born = now
        self.must_roll = False
        self.segments.append(segment)
        self.durable_position = segment.size
        if old.users == 0:
            old.close()

    def rewritten(self, identity: Identity, recovered: RecoveredLog, *, whole: bool = False) -> list[Segment]:
        """The files were cut or begun anew (nothing is staged): go on from there. The segments that are gone; with
        `whole` all of them: every file is another one."""
        known = {segment.base: segment for segment in self.segments[:-1] if not whole}
        segments: list[Segment] = []
        for found in recovered.segments[:-1]:
            old = known.get(found.base)
            same = old is not None and old.end_offset == found.end_offset
            segments.append(old if same and old is not None else found)
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

    def to_repair(self) -> tuple[int, int]:
        """The offsets [first, next) to be fetched first: the first hole, as far as one segment goes."""
        corrupt, wound = self.corrupt_ranges[0], self.wound()
        return corrupt.first, min(corrupt.next, wound.end_offset) if wound is not None else corrupt.next

    def wound(self) -> RepairTarget | None:
        """The first hole, for healing; None when there is none, or when it lies in the active segment."""
        if not self.corrupt_ranges:
            return None
        corrupt = self.corrupt_ranges[0]
        rank = max(0, bisect_right(self.segments, corrupt.first, key=lambda segment: segment.base) - 1)
        segment = self.segments[rank]
        if segment.base > corrupt.first:  # the first segments are missing
            return self._missing(corrupt, segment.base, segment.base_chain, self.identity.chain)
        if corrupt.first >= segment.end_offset and segment is not self.active:
            following = self.segments[rank + 1]
            return self._missing(corrupt, following.base, following.base_chain, segment.end_chain)
        if segment is self.active:
            return None
        following = self.segments[rank + 1]
        end_chain = following.base_chain if following.base == segment.end_offset else UNKNOWN_CHAIN
        return RepairTarget(
            self.directory, segment.path, segment.size, segment.base, segment.base_chain, segment.end_offset, end_chain,
            corrupt.first, min(corrupt.next, segment.end_offset), self.identity.epoch_at(segment.base),
            self.identity.epoch,
        )  # fmt: skip

    def _missing(self, corrupt: CorruptRange, end: int, end_chain: int, base_chain: int) -> RepairTarget:
        epoch, following = self.identity.epoch_at(corrupt.first), min(corrupt.next, end)
        return RepairTarget(
            self.directory, None, 0, corrupt.first, base_chain, end, end_chain, corrupt.first, following, epoch,
            self.identity.epoch,
        )  # fmt: skip

    def repaired(self, wound: RepairTarget, repaired: RepairResult, wall_ms: int) -> list[Segment]:
        """Files with good bytes took the place of a damaged or missing one; the segments that are gone."""
        rank = max(0, bisect_right(self.segments, repaired.base, key=lambda segment: segment.base) - 1)
        nearest, gone = self.segments[rank], []
        segment = _on_disk(repaired.path, repaired.base, repaired.size, nearest.sealed_ms or wall_ms)
        if nearest.base == repaired.base:
            segment.base_chain = nearest.base_chain
            self.segments[rank] = segment
            gone.append(nearest)
        else:
            if repaired.shortened is not None:
                size, chain = repaired.shortened
                before = _on_disk(nearest.path, nearest.base, size, nearest.sealed_ms)
                before.base_chain, before.end_offset, before.end_chain = nearest.base_chain, repaired.base, chain
                self.segments[rank] = before
                gone.append(nearest)
            at = rank if nearest.base > repaired.base else rank + 1
            segment.base_chain = self.segments[at - 1].end_chain if at else self.identity.chain
            self.segments.insert(at, segment)
        segment.end_offset, segment.end_chain = repaired.end_offset, repaired.end_chain
        segment.max_timestamp = repaired.max_timestamp
        following = self.segments[self.segments.index(segment) + 1]
        if (
            following.base_chain == UNKNOWN_CHAIN
            and following.base == segment.end_offset
            and following is not self.active
        ):
            following.base_chain, following.points = segment.end_chain, None
        corrupt_ranges, self.corrupt_ranges = self.corrupt_ranges, []
        if following.base > segment.end_offset:
            corrupt_ranges.append(
                CorruptRange(segment.end_offset, following.base)
            )  # nothing good was left behind it either
        for corrupt in corrupt_ranges:
            for part in (
                CorruptRange(corrupt.first, min(corrupt.next, wound.first)),
                CorruptRange(max(corrupt.first, repaired.next_offset), corrupt.next),
            ):
                if part.first < part.next:
                    self.add_corrupt_range(part)
        return gone

    def checkpoint(self) -> Checkpoint:
        """The durable place, for the next metadata transaction."""
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

    # ---- reading ----

    def segment_of(self, offset: int) -> Segment:
        """The segment that holds an offset."""
        return self.segments[max(0, bisect_right(self.segments, offset, key=lambda segment: segment.base) - 1)]

    def corrupt_range_at(self, offset: int) -> CorruptRange | None:
        for corrupt in self.corrupt_ranges:
            if corrupt.first <= offset < corrupt.next:
                return corrupt
        return None

    def add_corrupt_range(self, corrupt: CorruptRange) -> None:
        """Note damage found while reading; overlapping holes become one."""
        first, following = corrupt
        kept = []
        for other in self.corrupt_ranges:
            if other.next < first or other.first > following:
                kept.append(other)
            else:
                first, following = min(first, other.first), max(following, other.next)
        self.corrupt_ranges = sorted([*kept, CorruptRange(first, following)])

    def find(self, offset: int, max_bytes: int, max_records: int, hint: tuple[int, int] | None = None) -> Found:
        """What to send a reader that stands at `offset`: at most max_bytes and max_records, but at least one batch.

        `hint` is (segment base, position) of the batch at `offset`, kept by a reader that came here by an extent.
        None: the reader has everything that is durable. The extent begins with the batch that holds `offset`.
        """
        if offset >= self.durable_end:
            return None
        if self.corrupt_ranges:
            corrupt = self.corrupt_range_at(offset)
            if corrupt is not None:
                return corrupt
        segment = self.segment_of(offset)
        active = segment is self.active
        end = self.durable_position if active else segment.size
        if hint is not None and hint[0] == segment.base:
            position, first = hint[1], offset
        else:
            point = None
            if segment.points is not None:
                point = segscan.floor_offset(segment.points, offset - segment.base)
            if point is None and (segment.points is None or segment.points_from):
                return NeedsDisk()
            relative, position, _, _ = point or (0, 0, 0, 0)
            first = segment.base + relative
        if position < segment.unverified_end or segment.fd < 0 or segment.points is None:
            return NeedsDisk()
        if first < offset:
            # The limits count from the batch that holds the offset; every batch this far behind a point is one itself.
            head = files.read_cached(segment.fd, min(end - position, PEEK_BYTES), position)
            found = segscan.seek(head, offset) if head is not None else None
            if found is None:
                return NeedsDisk()
            position, first = position + found[0], found[1]
        end_offset = min(segment.end_offset, self.durable_end)
        if self.corrupt_ranges:
            end_offset = min(
                [end_offset, *(corrupt.first for corrupt in self.corrupt_ranges if corrupt.first > offset)]
            )
        if end - position <= max_bytes and end_offset - offset <= max_records and end_offset == segment.end_offset:
            return FileSlice(segment, position, end - position, first, end_offset, not active)
        return self._cut(segment, position, end, first, min(end_offset, offset + max_records), max_bytes)

    def chain_at(self, offset: int) -> int | None:
        """The chain before an offset, where it is known without the disk: at the ends, at segments and index points."""
        if offset == self.durable_end:
            return self.durable_chain if self.durable_chain != UNKNOWN_CHAIN else None
        if offset == self.log_start:
            return self.identity.chain
        segment = self.segment_of(offset)
        if segment.base_chain == UNKNOWN_CHAIN or offset > self.durable_end or self.damaged_before(offset):
            return None
        if offset == segment.base:
            return segment.base_chain
        point = segscan.floor_offset(segment.points, offset - segment.base) if segment.points is not None else None
        return point[2] if point is not None and segment.base + point[0] == offset else None

    def damaged_before(self, offset: int) -> bool:
        """True when damage keeps this node from knowing the chain before an offset."""
        if offset == self.durable_end:
            return self.durable_chain == UNKNOWN_CHAIN
        segment = self.segment_of(offset)
        unknown = segment.base_chain == UNKNOWN_CHAIN and any(
            corrupt.next <= segment.base for corrupt in self.corrupt_ranges
        )
        return unknown or any(
            segment.base <= corrupt.first < offset or corrupt.first < offset < corrupt.next
            for corrupt in self.corrupt_ranges
        )

    def end_hint(self) -> tuple[int, int] | None:
        """Where the batch at durable_end will lie: the hint of a reader that has everything."""
        return self.active.base, self.durable_position

    def _cut(self, segment: Segment, position: int, end: int, first: int, end_offset: int, max_bytes: int) -> Found:
        """End an extent at the last index point that fits, else at the last batch that does."""
        assert segment.points is not None
        by_bytes = segscan.floor_position(segment.points, min(position + max_bytes, end))
        by_records = segscan.floor_offset(segment.points, end_offset - segment.base)
        if by_bytes is not None and by_records is not None:
            relative, cut_at, _, _ = min(by_bytes, by_records)
            if cut_at > position:
                following = segment.base + relative
                return FileSlice(segment, position, cut_at - position, first, following, segment is not self.active)
        head = files.read_cached(segment.fd, min(end - position, PEEK_BYTES), position)
        if head is None:
            return NeedsDisk()
        length, following = segscan.cut(head, max_bytes, end_offset)
        if following < 0:
            return NeedsDisk()
        return FileSlice(segment, position, length, first, following, segment is not self.active)

    def view(self, segment: Segment) -> SegmentView:
        """A segment for the reader thread."""
        active = segment is self.active
        return SegmentView(
            name=self.name,
            path=segment.path,
            log_id=self.identity.log_id_bytes,
            base=segment.base,
            end_offset=min(segment.end_offset, self.durable_end),
            size=self.durable_position if active else segment.size,
            base_chain=segment.base_chain,
            sealed=not active,
            sealed_ms=segment.sealed_ms,
            points=bytes(segment.points) if segment.points is not None and not segment.points_from else None,
            max_batch=self.max_batch,
            epoch=self.identity.epoch_at(segment.base),
            max_epoch=self.identity.epoch,
        )

    def take_index(self, segment: Segment, index: SealedIndex, verified_end: int) -> None:
        """An index was loaded or rebuilt for a segment, and (perhaps) its bytes verified up to a position."""
        if index.size == segment.size and segment is not self.active:
            segment.adopt(index)
        elif segment.points_from:
            # The segment grew, and was perhaps sealed, while the index was made.
            newer = segscan.points_from(segment.points or b"", index.size)
            points = bytearray(index.points) + newer
            segment.points, segment.points_from = points if segment is self.active else bytes(points), 0
        if verified_end >= segment.unverified_end:
            segment.unverified_end = 0

    def verified(self, segment: Segment, size: int, chain: int) -> None:
        """All of a segment was found good: it ends at `size` (what follows was never acknowledged) with this chain."""
        if segment is self.active:
            return
        segment.size = size
        if segment.base_chain != UNKNOWN_CHAIN:
            segment.end_chain = chain
            following = self.segments[self.segments.index(segment) + 1]
            if following.base_chain == UNKNOWN_CHAIN:
                following.base_chain = chain

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

    def status(self) -> LogStatus:
        return LogStatus(
            segments=len(self.segments),
            bytes=self.size_bytes,
            producers=self.stage.producer_count,
            staged_bytes=self.stage.pending_bytes,
            checkpoint=self.checkpointed,
            damaged=[DamagedOffsets(one.first, one.next - 1) for one in self.corrupt_ranges],
        )

    def close(self) -> None:
        for segment in self.segments:
            segment.close()


def _on_disk(path: Path, base: int, size: int, sealed_ms: int) -> Segment:
    """A sealed segment of which nothing is in memory yet, nor verified."""
    segment = Segment(path, base, size=size)
    segment.points, segment.points_from, segment.unverified_end = None, size, size
    segment.sealed_ms = sealed_ms
    return segment
