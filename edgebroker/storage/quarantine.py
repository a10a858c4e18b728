"""Damaged bytes are never thrown away: a copy goes here, with a line that says where it came from.

The directory is capped. While there is room for nothing more, the newest damage is reported but not copied: the
original bytes are still in their segment, because damage below the durable end is never removed from it.
"""

import logging
from pathlib import Path

import msgspec

from edgebroker.common.runtime.clock import Clock
from edgebroker.storage import files

log = logging.getLogger(__name__)

CAP_BYTES = 64 << 20
RANGE_BYTES = 16 << 20


class QuarantinedRange(msgspec.Struct):
    """One line of quarantine/ranges.jsonl."""

    name: str
    segment: str
    position: int
    length: int
    kept: int
    reason: str
    file: str
    wall_ms: int


class Quarantine:
    """keep() may be called before listening and from the reader thread, never from both at once."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self.ranges = 0

    def keep(self, name: str, segment: Path, fd: int, start: int, end: int, reason: str) -> int:
        """Copy [start, end) of a segment file aside, at most 16 MiB of it; the bytes that are safe there.

        Failing to is logged, never raised.
        """
        self.ranges += 1
        wanted = min(end - start, RANGE_BYTES)
        used = sum(path.stat().st_size for path in self._path.iterdir() if path.suffix == ".bytes")
        file = f"{name.replace('/', '-')}-{segment.stem}-{start}-{end}.bytes"
        kept = wanted if used + wanted <= CAP_BYTES else 0
        note = QuarantinedRange(name, segment.name, start, end - start, kept, reason, file, self._clock.wall_ms())
        try:
            if kept and not (self._path / file).exists():
                files.write_durable(self._path / file, files.read_at(fd, wanted, start))
            with (self._path / "ranges.jsonl").open("ab") as notes:
                notes.write(msgspec.json.encode(note) + b"\n")
        except OSError as error:
            log.error("%s: damaged bytes %d to %d could not be kept: %s", segment, start, end, error.strerror)
            kept = 0
        log.error("%s: bytes %d to %d are damaged (%s); %d bytes kept in %s", segment, start, end, reason, kept, file)
        return kept
