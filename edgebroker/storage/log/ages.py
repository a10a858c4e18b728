"""How old stored batches are at this node; where clocks and index points leave a doubt, they are younger.

An index point is stamped with the wall and the monotonic time of its append. Of what this process stored itself the
monotonic clock tells the age; of what an earlier run stored the wall clock does, as far as it can be believed: not
before EARLIEST_WALL_MS, and the lower of what it shows and what it should show since the start; so jumps while the node
runs change nothing. A clock that was wrong when an earlier run stored, or when this one began, and looked plausible,
cannot be recognised. The age of what is between two points is known to granularity_ms().
"""

from __future__ import annotations

import struct

from edgebroker.common.runtime.clock import EARLIEST_WALL_MS, Clock
from edgebroker.storage.log import segscan
from edgebroker.storage.log.index import POINT_BYTES, granularity_ms
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.segment import Segment

_STAMPS = struct.Struct("<qq")
_STAMPS_AT = POINT_BYTES - _STAMPS.size
LOOK_SECONDS = 0.1


class Ages:
    """Owned by the loop thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started, self._started_wall = clock.monotonic(), clock.wall_ms()

    def of(self, wall_ms: int, monotonic_ms: int) -> int:
        """Milliseconds since a moment with these stamps (0: unknown), at least 0."""
        now = int(self._clock.monotonic() * 1000)
        started = int(self._started * 1000)
        if max(started, 1) <= monotonic_ms <= now:
            return now - monotonic_ms
        # Another run: it was there when this one began; of an earlier boot, all of this boot has passed since.
        age = now - started
        if 0 < monotonic_ms < started:
            age = now - monotonic_ms
        if wall_ms >= EARLIEST_WALL_MS:
            age = max(age, min(self._clock.wall_ms(), self._started_wall + now - started) - wall_ms)
        return age

    def live_from(self, log: PartitionLog) -> int:
        """The first offset whose batch has not outlived the topic's time to live; log_start when nothing has."""
        ttl = log.settings.message_ttl_ms
        if not ttl:
            return log.log_start
        now = self._clock.monotonic()
        known_ttl, offset, looked = log.live
        if known_ttl == ttl and now - looked < LOOK_SECONDS:
            return max(offset, log.log_start)
        offset = max(offset if known_ttl == ttl else 0, log.log_start)
        while offset < log.durable_end:
            segment = log.segment_of(offset)
            if segment is log.active or self._sealed_age(log, segment) <= ttl:
                offset = min(max(offset, self._live_within(segment, ttl)), log.durable_end)
                break
            # Not where this one ends: the file behind it may be gone, and its records with it.
            offset = log.segments[log.segments.index(segment) + 1].base
        log.live = (ttl, offset, now)
        return offset

    def oldest_below(self, log: PartitionLog, next_offset: int) -> int:
        """An age that every record before next_offset has reached (0 when that is not known without the disk)."""
        segment = log.segment_of(next_offset - 1)
        sealed = self._sealed_age(log, segment) if segment is not log.active else 0
        if segment.points is None:
            return sealed
        stamps = segscan.stamps(segment.points, next_offset - 1 - segment.base)
        if stamps is None:
            return sealed
        finest = granularity_ms(log.settings.message_ttl_ms, len(segment.points))
        return max(sealed, self._within(segment, *stamps) - finest)

    def _sealed_age(self, log: PartitionLog, segment: Segment) -> int:
        """Since the next segment began, everything in this one is at least as old."""
        after = log.segments[log.segments.index(segment) + 1]
        return self.of(segment.sealed_ms, int(after.born * 1000))

    def _within(self, segment: Segment, wall_ms: int, monotonic_ms: int) -> int:
        if not wall_ms and not monotonic_ms:
            wall_ms = segment.sealed_ms or segment.modified_ms
        return self.of(wall_ms, monotonic_ms)

    def _live_within(self, segment: Segment, ttl: int) -> int:
        """The offset after the last stretch between two points that has expired as a whole."""
        points = segment.points
        if points is None or segment.points_from:
            return segment.base
        limit = ttl + granularity_ms(ttl, len(points))
        low, high = 0, len(points) // POINT_BYTES
        while low < high:
            middle = (low + high) // 2
            stamps = _STAMPS.unpack_from(points, middle * POINT_BYTES + _STAMPS_AT)
            if self._within(segment, *stamps) > limit:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return segment.base
        if low == len(points) // POINT_BYTES:
            return segment.end_offset
        return segment.base + int.from_bytes(points[low * POINT_BYTES : low * POINT_BYTES + 4], "little")
