"""The disk as a budget: how much is free, when to remove early, when to refuse producers, when to take them back.

soft   what every live group has passed is removed early
hard   producers get DISK_FULL (retryable); consumers continue; writing resumes by itself above hard + 64 MiB
"""

from typing import NamedTuple

RESUME_BYTES = 64 << 20


class Watermarks(NamedTuple):
    """Free bytes. A configured value of -1 means the default: a share of the file system or a floor, the larger."""

    soft: int
    hard: int


def watermarks(soft: int, hard: int, file_system_bytes: int) -> Watermarks:
    return Watermarks(
        soft if soft >= 0 else max(file_system_bytes // 20, 512 << 20),
        hard if hard >= 0 else max(file_system_bytes // 50, 128 << 20),
    )


class Budget:
    """Decides from the last measurement; owned by the loop. `max_bytes` 0: only the file system limits."""

    def __init__(self, *, max_bytes: int, soft_free: int, hard_free: int) -> None:
        self._max_bytes, self._soft_free, self._hard_free = max_bytes, soft_free, hard_free
        self.free = self.size = self.used = self.usable = self.spare = 0
        self.full = ""
        self.wants_space = 0

    def change(self, *, max_bytes: int, soft_free: int, hard_free: int) -> None:
        """Other limits, from the next measurement on."""
        self._max_bytes, self._soft_free, self._hard_free = max_bytes, soft_free, hard_free

    def spend(self, size: int) -> bool:
        """So many bytes were stored since; True when there may be nothing left: it is time to measure."""
        self.usable -= size
        return self.usable < 0

    def measured(self, free: int, size: int, used: int) -> None:
        """`used`: bytes of all logs together. Sets `usable` (bytes until producers are refused), `spare` (bytes that a
        snapshot may still take), `full` (why, or "") and `wants_space` (bytes to remove early)."""
        self.free, self.size, self.used = free, size, used
        marks = watermarks(self._soft_free, self._hard_free, size)
        self.usable = free - marks.hard
        self.spare = max(0, free - marks.hard // 2)
        if self._max_bytes:
            self.usable = min(self.usable, self._max_bytes - used)
        resume = marks.hard + (min(RESUME_BYTES, marks.hard // 2) if self.full else 0)
        over = self._max_bytes and used >= (self._max_bytes if not self.full else self._max_bytes * 19 // 20)
        if free < resume:
            self.full = f"{free:,} bytes are free, the hard watermark is {marks.hard:,} bytes"
        elif over:
            self.full = f"the logs hold {used:,} bytes, storage.max_bytes is {self._max_bytes:,} bytes"
        else:
            self.full = ""
        by_free = marks.soft - free
        by_used = used - self._max_bytes * 9 // 10 if self._max_bytes else 0
        self.wants_space = max(0, by_free, by_used)
