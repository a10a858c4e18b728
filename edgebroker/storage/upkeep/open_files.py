"""Bounded descriptors and indexes of sealed segments, over all logs: those used least recently are closed and dropped.

A descriptor from which bytes are being sent stays open. The active segments are not counted: each has both.
"""

from __future__ import annotations

from collections import OrderedDict

from edgebroker.storage.log.segment import Segment

OPEN_SEALED = 32
CACHED_INDEXES = 8


class OpenFiles:
    """Owned by the loop thread."""

    def __init__(self) -> None:
        self._open: OrderedDict[Segment, None] = OrderedDict()
        self._indexed: OrderedDict[Segment, None] = OrderedDict()

    def opened(self, segment: Segment) -> None:
        """A sealed segment has a descriptor."""
        self._open[segment] = None
        self._open.move_to_end(segment)
        for old in list(self._open)[: max(0, len(self._open) - OPEN_SEALED)]:
            if old.users == 0:
                del self._open[old]
                old.close()

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
