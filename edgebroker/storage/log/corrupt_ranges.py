"""The corrupt ranges of a log: noting them, choosing what to repair, and taking over the files that a repair made.

On the loop. A range is repaired as far as one segment goes; where a segment is missing, a file of its own is the
target. The files themselves are made by rewrite/repair.py, from a RepairTarget, with a RepairResult.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgebroker.storage.log.lookup import Lookup
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.types import UNKNOWN_CHAIN, CorruptRange


class RepairTarget(NamedTuple):
    """What to repair: offsets [first, next), in the sealed segment that holds the first one (`path` None: its file is
    missing), where that ends, and the chains before it and after it as far as they are known."""

    directory: Path
    path: Path | None
    size: int
    base: int
    base_chain: int
    end_offset: int
    end_chain: int
    first: int
    next: int
    epoch: int
    max_epoch: int


class RepairResult(NamedTuple):
    """The file that holds good bytes now; offsets up to `next_offset` are whole again. `shortened`: the segment before
    it lost its damaged end, and has this size and this chain at its end; None when nothing changed there."""

    path: Path
    base: int
    size: int
    max_timestamp: int
    next_offset: int
    end_offset: int
    end_chain: int
    shortened: tuple[int, int] | None = None


def merged(ranges: Sequence[CorruptRange], corrupt: CorruptRange) -> list[CorruptRange]:
    """The ranges with one more, in order; those that overlap or touch become one."""
    first, end = corrupt
    kept = []
    for other in ranges:
        if other.next < first or other.first > end:
            kept.append(other)
        else:
            first, end = min(first, other.first), max(end, other.next)
    return sorted([*kept, CorruptRange(first, end)])


def to_repair(log: Lookup) -> tuple[int, int]:
    """The offsets [first, next) to be fetched first: the first range, as far as one segment goes. There is one."""
    corrupt, target = log.corrupt_ranges[0], repair_target(log)
    return corrupt.first, min(corrupt.next, target.end_offset) if target is not None else corrupt.next


def repair_target(log: Lookup) -> RepairTarget | None:
    """The first range; None when there is none, or when it is in the active segment."""
    if not log.corrupt_ranges:
        return None
    corrupt = log.corrupt_ranges[0]
    rank = _rank(log, corrupt.first)
    segment = log.segments[rank]
    if segment.base > corrupt.first:  # the first segments are missing
        return _missing(log, corrupt, segment, log.identity.chain)
    if segment is log.active:
        return None
    after = log.segments[rank + 1]
    if corrupt.first >= segment.end_offset:
        return _missing(log, corrupt, after, segment.end_chain)
    end_chain = after.base_chain if after.base == segment.end_offset else UNKNOWN_CHAIN  # behind a gap: not this one's
    return RepairTarget(
        log.directory, segment.path, segment.size, segment.base, segment.base_chain, segment.end_offset, end_chain,
        corrupt.first, min(corrupt.next, segment.end_offset), log.identity.epoch_at(segment.base), log.identity.epoch,
    )  # fmt: skip


def _missing(log: Lookup, corrupt: CorruptRange, after: Segment, base_chain: int) -> RepairTarget:
    """A segment that is not there, before the segment `after`."""
    end = log.end_of_records(corrupt.first, after)
    end_chain = after.base_chain if end == after.base else UNKNOWN_CHAIN
    return RepairTarget(
        log.directory, None, 0, corrupt.first, base_chain, end, end_chain, corrupt.first,
        min(corrupt.next, end), log.identity.epoch_at(corrupt.first), log.identity.epoch,
    )  # fmt: skip


def take_repaired(log: Lookup, target: RepairTarget, result: RepairResult, wall_ms: int) -> list[Segment]:
    """Files with good bytes replaced a damaged or missing one; the segments that are gone."""
    rank, gone = _rank(log, result.base), []
    nearest = log.segments[rank]
    segment = _on_disk(result.path, result.base, result.size, nearest.sealed_ms or wall_ms)
    if nearest.base == result.base:
        segment.base_chain = nearest.base_chain
        log.segments[rank] = segment
        gone.append(nearest)
    else:
        if result.shortened is not None:
            size, chain = result.shortened
            before = _on_disk(nearest.path, nearest.base, size, nearest.sealed_ms)
            before.base_chain, before.end_offset, before.end_chain = nearest.base_chain, result.base, chain
            log.segments[rank] = before
            gone.append(nearest)
        at = rank if nearest.base > result.base else rank + 1
        segment.base_chain = log.segments[at - 1].end_chain if at else log.identity.chain
        log.segments.insert(at, segment)
    segment.end_offset, segment.end_chain = result.end_offset, result.end_chain
    segment.max_timestamp = result.max_timestamp
    after = log.segments[log.segments.index(segment) + 1]
    if after.base_chain == UNKNOWN_CHAIN and after.base == segment.end_offset and after is not log.active:
        after.base_chain, after.points = segment.end_chain, None
    _shrink(
        log,
        target.first,
        result.next_offset,
        CorruptRange(segment.end_offset, log.end_of_records(segment.end_offset, after)),
    )
    return gone


def _shrink(log: Lookup, first: int, end: int, missing: CorruptRange) -> None:
    """Offsets [first, end) are whole again; what is `missing` after the new segment had nothing good in it either."""
    ranges, log.corrupt_ranges = log.corrupt_ranges, []
    if missing.first < missing.next:
        ranges.append(missing)
    for corrupt in ranges:
        for part in (
            CorruptRange(corrupt.first, min(corrupt.next, first)),
            CorruptRange(max(corrupt.first, end), corrupt.next),
        ):
            if part.first < part.next:
                log.corrupt_ranges = merged(log.corrupt_ranges, part)


def _rank(log: Lookup, offset: int) -> int:
    """Of the last segment that does not begin after an offset, or of the first one."""
    return max(0, bisect_right(log.segments, offset, key=lambda segment: segment.base) - 1)


def _on_disk(path: Path, base: int, size: int, sealed_ms: int) -> Segment:
    """A sealed segment of which nothing is in memory yet, nor verified."""
    segment = Segment(path, base, size=size)
    segment.points, segment.points_from, segment.unverified_end = None, size, size
    segment.sealed_ms = sealed_ms
    return segment
