"""One segment of a partition's log: a file of batches back to back, and what the process knows about it.

A segment does nothing on its own; the log (loop thread) changes it, the reader thread gets a SegmentView to work on.
"""

from pathlib import Path

from edgebroker.storage import files
from edgebroker.storage.log.index import SealedIndex

SUFFIX = ".log"
NO_TIMESTAMP = -(1 << 63)
# What the name of a segment file that is retained aside ends with, before the time in milliseconds.
ASIDE = ".diverged-"


def segment_path(directory: Path, base: int) -> Path:
    return directory / f"{base:020d}{SUFFIX}"


class Segment:
    """`size` counts the bytes that belong to the log; the file may hold more after a failed write.

    points          packed index points of the bytes from `points_from` on; None when they are not in memory
    points_from     position up to which points are missing: 0 when the index is whole
    unverified_end  bytes before it were not verified by this process: they are read through the reader thread only
    modified_ms     wall time by which an earlier run had written it; 0 for what this process began
    base_chain      chain checksum at the base, UNKNOWN_CHAIN when neither an index nor meta.db tells
    users           slices being sent; the descriptor stays open while there are any
    """

    __slots__ = (
        "allocated_end",
        "base",
        "base_chain",
        "born",
        "end_chain",
        "end_offset",
        "fd",
        "max_timestamp",
        "modified_ms",
        "path",
        "points",
        "points_from",
        "retired",
        "sealed_ms",
        "size",
        "unverified_end",
        "users",
    )

    def __init__(self, path: Path, base: int, *, size: int = 0, base_chain: int = 0, fd: int = -1) -> None:
        self.path, self.base, self.size, self.fd = path, base, size, fd
        self.base_chain = self.end_chain = base_chain
        self.end_offset = base
        self.max_timestamp = NO_TIMESTAMP
        self.points: bytearray | bytes | None = bytearray()
        self.points_from = 0
        self.unverified_end = 0
        self.sealed_ms = self.modified_ms = 0
        self.allocated_end = size
        self.born = 0.0
        self.users = 0
        self.retired = False

    @property
    def last_point_position(self) -> int:
        """Position of the newest index point; -1 when there is none."""
        if not self.points:
            return -1
        return int.from_bytes(self.points[-36:-32], "little")

    @property
    def last_point_ms(self) -> int:
        """Monotonic time of the newest index point; 0 when there is none, or when it is not known."""
        if not self.points:
            return 0
        return int.from_bytes(self.points[-8:], "little", signed=True)

    def adopt(self, index: SealedIndex) -> None:
        """Take over what an index file (or a rebuild) says about a sealed segment."""
        self.points, self.points_from = index.points, 0
        self.base_chain, self.end_chain = index.base_chain, index.end_chain
        self.max_timestamp, self.sealed_ms = index.max_timestamp, index.sealed_ms

    def to_index(self, log_id: bytes) -> SealedIndex:
        return SealedIndex(
            log_id,
            self.base,
            self.end_offset,
            self.size,
            self.base_chain,
            self.end_chain,
            self.max_timestamp,
            self.sealed_ms,
            bytes(self.points or b""),
        )

    def hold(self) -> None:
        """A slice of this segment is being sent."""
        self.users += 1

    def release(self) -> None:
        """The slice is sent; a segment that was removed meanwhile closes with its last user."""
        self.users -= 1
        if self.retired and self.users == 0:
            self.close()

    def retire(self) -> None:
        """The file is gone or replaced; readers that hold the old inode may finish."""
        self.retired = True
        if self.users == 0:
            self.close()

    def seal(self, sealed_ms: int) -> None:
        """Nothing more is written to it."""
        self.sealed_ms = sealed_ms
        self.points = bytes(self.points) if self.points is not None else None
        if self.users == 0:
            self.close()

    def close(self) -> None:
        if self.fd >= 0:
            files.close(self.fd)
            self.fd = -1
