"""The packed facts of a run of publishes, as the extensions make them (cext/spans.pxd): one call for many frames.

    span    u64 correlation, u32 start, u32 end     one publish: its batches are data[start:end]
    answer  i64 offset, i32 code, i32 reason        what became of it: the offset of its first record, a Code, a Reason

Both in the byte order of the machine, 16 bytes each, so that the nth answer belongs to the nth span.
"""

from __future__ import annotations

import struct

SPAN = struct.Struct("=QII")
ANSWER = struct.Struct("=qii")


def pack_span(correlation: int, start: int, end: int) -> bytes:
    """One publish."""
    return SPAN.pack(correlation, start, end)


def payload_bytes(spans: bytes) -> int:
    """From the beginning of the first publish to the end of the last one."""
    first: int = SPAN.unpack_from(spans)[1]
    end: int = SPAN.unpack_from(spans, len(spans) - SPAN.size)[2]
    return end - first
