"""Bounded descriptors and indexes of segments, over all logs: those used least recently are closed and dropped.

Sealed segments and the active ones of idle logs share the bound, so that a node has far more logs than descriptors. A
descriptor stays open while bytes are being sent from it, and while something of its log is not durable.
"""

from __future__ import annotations

import resource
from collections import OrderedDict

from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.segment import Segment

CACHED_INDEXES = 8
LEAST_OPEN, MOST_OPEN = 16, 4096


def most_open() -> int:
    """Descriptors that segments may take: an eighth of what the process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(LEAST_OPEN, min(MOST_OPEN, limit // 8))


class OpenFiles:
    """Owned by the loop thread. At most `most` descriptors are open, fewer when the process turns out to lack some."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: OrderedDict[Segment, PartitionLog] = OrderedDict()
        self._indexed: OrderedDict[Segment, None] = OrderedDict()

    def opened(self, segment: Segment, log: PartitionLog) -> None:
        """A segment of a log has a descriptor."""
        self._open[segment] = log
        self._open.move_to_end(segment)
        self.room(0)

    def used(self, segment: Segment) -> None:
        """It is written to."""
        if segment in self._open:
            self._open.move_to_end(segment)

    def room(self, wanted: int) -> int:
        """Close what was used least recently until so many can be opened; how many can, when those in use leave less.
        A few are always for writing: readers that do not go on must not keep everybody from it."""
        excess, busy = len(self._open) + wanted - self._most, 0
        idle: list[Segment] = []
        for segment, log in self._open.items():
            if len(idle) >= excess:
                break
            if segment is log.active and not log.quiet:
                busy += 1
            elif segment.users == 0 or segment.fd < 0:
                idle.append(segment)
        for segment in idle:
            del self._open[segment]
            segment.close()
        return min(wanted, max(self._most - len(self._open), LEAST_OPEN - busy, 0))

    def fits(self) -> bool:
        """Is there room for a segment that is only read? What was read is in memory then, too."""
        self.room(1)
        return len(self._open) < self._most

    def shrink(self) -> None:
        """There are fewer descriptors than was believed: others hold them."""
        self._most = max(LEAST_OPEN, len(self._open) // 2)
        self.room(0)

    def index_loaded(self, segment: Segment) -> None:
        """A sealed segment has its index in memory."""
        self._indexed[segment] = None
        self._indexed.move_to_end(segment)
        while len(self._indexed) > CACHED_INDEXES:
            old, _ = self._indexed.popitem(last=False)
            if not isinstance(old.points, bytearray):
                old.points = None

    def knows(self, segment: Segment) -> bool:
        """True when its index is counted."""
        return segment in self._indexed

    def forget(self, segment: Segment) -> None:
        """The segment is removed; it closes itself with its last user."""
        self._open.pop(segment, None)
        self._indexed.pop(segment, None)
