"""The sparse index of a sealed segment: a file that may be lost, and is rebuilt from the log when it does not fit it.

     0  magic "EBIX"          4  u32 version = 1        8  16 bytes log_id
    24  u64 base offset      32  u64 end offset        40  u64 size of the log file in bytes
    48  u32 chain at base    52  u32 chain at end      56  i64 maximum timestamp
    64  i64 wall ms when sealed                        72  u32 number of points
    76  u32 CRC-32C of everything else (header and points)
    80  points of 40 bytes each (cext/segscan.pyx)

All numbers are little-endian: the file never leaves the node.
"""

import struct
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.crc32c import crc32c
from edgebroker.storage import files

INTERVAL_BYTES = 16 << 10
POINT_BYTES = 40
_HEADER = struct.Struct("<4sI16sQQQIIqqI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
assert HEADER_BYTES == 80
# An index point is due after so many bytes (INTERVAL_BYTES) or so much time, whichever comes first.
FINEST_MS, COARSE_MS = 1_000, 10_000
# After so many points of a segment they may be twice, three times, ... as far apart: memory is bounded.
STEP_POINTS = 4096


def granularity_ms(ttl_ms: int, points_bytes: int) -> int:
    """How far apart in time the index points of a segment may be that has these already."""
    steps = 1 + points_bytes // (STEP_POINTS * POINT_BYTES)
    coarse = COARSE_MS * steps
    return max(FINEST_MS, min(ttl_ms // 64, coarse)) if ttl_ms else coarse


class SealedIndex(NamedTuple):
    """What a sealed segment's index file says; believed only when log_id, base and size fit the log."""

    log_id: bytes
    base: int
    end_offset: int
    size: int
    base_chain: int
    end_chain: int
    max_timestamp: int
    sealed_ms: int
    points: bytes


def index_path(log_path: Path) -> Path:
    return log_path.with_suffix(".index")


def write_index(log_path: Path, index: SealedIndex) -> None:
    """Write the index beside its log; a hint, not synced."""
    header = _HEADER.pack(b"EBIX", 1, *index[:8], len(index.points) // POINT_BYTES)
    checksum = _CRC.pack(crc32c(index.points, crc32c(header)))
    files.write_hint(index_path(log_path), header + checksum + index.points)


def read_index(log_path: Path, log_id: bytes, base: int, size: int) -> SealedIndex | None:
    """The index beside a log of `size` bytes, or None when there is none that fits. May wait for the disk."""
    try:
        data = index_path(log_path).read_bytes()
    except OSError:
        return None
    if len(data) < HEADER_BYTES or (len(data) - HEADER_BYTES) % POINT_BYTES:
        return None
    magic, version, *fields, count = _HEADER.unpack_from(data)
    index = SealedIndex._make([*fields, data[HEADER_BYTES:]])
    checksum = crc32c(index.points, crc32c(data[: _HEADER.size]))
    if (magic, version, _CRC.unpack_from(data, _HEADER.size)[0]) != (b"EBIX", 1, checksum):
        return None
    if count * POINT_BYTES != len(index.points) or (index.log_id, index.base, index.size) != (log_id, base, size):
        return None
    return index
