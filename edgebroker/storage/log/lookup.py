"""What a log gives to its readers at once: the offset arithmetic over its segments, their indexes and corrupt ranges.

    find()       the bytes to send from an offset on, when they are verified, in memory, and their index is as well
    chain_at()   the header chain checksum before an offset, at the ends, at segments and at index points

Nothing here waits for the disk: where only it could tell, the answer is NeedsDisk or None. The fields are set by the
log that this is a part of (partition.py); nothing here changes them, but for the index and the chains that a reader
of the disk has found.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from edgebroker.storage import files
from edgebroker.storage.log import segscan
from edgebroker.storage.log.index import SealedIndex
from edgebroker.storage.log.reader import SegmentView
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.types import (
    UNKNOWN_CHAIN,
    CorruptRange,
    FileSlice,
    Found,
    Identity,
    NeedsDisk,
)

PEEK_BYTES = 64 << 10


class Lookup:
    """The durable part of a log. `segments` in order, the last one active; `corrupt_ranges` in order."""

    name: str
    directory: Path
    identity: Identity
    max_batch: int
    segments: list[Segment]
    corrupt_ranges: list[CorruptRange]
    durable_end: int
    durable_position: int
    """Where durable_end is in the active segment."""
    durable_chain: int
    """The header chain checksum before durable_end; UNKNOWN_CHAIN after a corrupt range."""

    @property
    def active(self) -> Segment:
        return self.segments[-1]

    @property
    def log_start(self) -> int:
        return self.identity.log_start

    def segment_of(self, offset: int) -> Segment:
        """The segment that holds an offset."""
        return self.segments[max(0, bisect_right(self.segments, offset, key=lambda segment: segment.base) - 1)]

    @property
    def records(self) -> int:
        """How many offsets from the start to the durable end are not in a gap."""
        return self.durable_end - self.log_start - sum(gap.next - gap.first for gap in self.identity.gaps)

    def bytes_from(self, offset: int) -> int:
        """Stored bytes from an offset on, to an index point."""
        rank = self.segments.index(self.segment_of(offset))
        first = self.segments[rank]
        point = segscan.floor_offset(first.points, offset - first.base) if first.points is not None else None
        size = sum(segment.size for segment in self.segments[rank:])
        return size - (point[1] if point is not None else 0)

    def end_of_records(self, offset: int, following: Segment) -> int:
        """Where the records from an offset on end, when the next file is `following`: there, or where a gap begins."""
        return min([following.base, *(gap.first for gap in self.identity.gaps if gap.first >= offset)])

    def corrupt_range_at(self, offset: int) -> CorruptRange | None:
        for corrupt in self.corrupt_ranges:
            if corrupt.first <= offset < corrupt.next:
                return corrupt
        return None

    def find(self, offset: int, max_bytes: int, max_records: int, hint: tuple[int, int] | None = None) -> Found:
        """What to send a reader that is at `offset`: at most max_bytes and max_records, but at least one batch.

        `hint` is (segment base, position) of the batch at `offset`, kept by a reader that came here by a slice.
        None: the reader has everything that is durable. The slice begins with the batch that holds `offset`.
        """
        if offset >= self.durable_end:
            return None
        if self.corrupt_ranges:
            corrupt = self.corrupt_range_at(offset)
            if corrupt is not None:
                return corrupt
        if self.identity.gaps:
            gap = self.identity.gap_at(offset)
            if gap is not None:
                return gap
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
            # The limits count from the batch that holds the offset; every batch this far after a point has one itself.
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

    def _cut(self, segment: Segment, position: int, end: int, first: int, end_offset: int, max_bytes: int) -> Found:
        """End a slice at the last index point that fits, else at the last batch that does."""
        assert segment.points is not None
        by_bytes = segscan.floor_position(segment.points, min(position + max_bytes, end))
        by_records = segscan.floor_offset(segment.points, end_offset - segment.base)
        if by_bytes is not None and by_records is not None:
            relative, cut_at, _, _ = min(by_bytes, by_records)
            if cut_at > position:
                return FileSlice(
                    segment, position, cut_at - position, first, segment.base + relative, segment is not self.active
                )
        head = files.read_cached(segment.fd, min(end - position, PEEK_BYTES), position)
        if head is None:
            return NeedsDisk()
        length, next_offset = segscan.cut(head, max_bytes, end_offset)
        if next_offset < 0:
            return NeedsDisk()
        return FileSlice(segment, position, length, first, next_offset, segment is not self.active)

    def end_hint(self) -> tuple[int, int] | None:
        """Where the batch at durable_end will be: the hint of a reader that has everything."""
        return self.active.base, self.durable_position

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
        """True when corruption keeps this node from knowing the chain before an offset."""
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

    def take_index(self, segment: Segment, index: SealedIndex) -> None:
        """An index was loaded or rebuilt for a segment."""
        if index.size == segment.size and segment is not self.active:
            segment.adopt(index)
        elif segment.points_from:
            # The segment grew, and was perhaps sealed, while the index was made.
            newer = segscan.points_from(segment.points or b"", index.size)
            points = bytearray(index.points) + newer
            segment.points, segment.points_from = points if segment is self.active else bytes(points), 0

    def verified(self, segment: Segment, size: int, chain: int) -> None:
        """All of a segment was found good: it ends at `size` (what follows was never acknowledged) with this chain."""
        if segment is self.active:
            return
        segment.size = size
        if segment.base_chain != UNKNOWN_CHAIN:
            segment.end_chain = chain
            after = self.segments[self.segments.index(segment) + 1]
            if after.base_chain == UNKNOWN_CHAIN:
                after.base_chain = chain
