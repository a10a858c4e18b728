"""What a DELIVER frame begins with."""

from __future__ import annotations

from edgebroker.broker.delivery.state import Cursor
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Gap

MAX_AGE_MS = (1 << 32) - 1


def deliver_head(
    cursor: Cursor, first: int, next_offset: int, size: int, age_ms: int, gaps: list[Gap] | None = None
) -> bytes:
    """Everything of a DELIVER frame before its batches. What it begins with is the same for a log and an epoch."""
    partition = cursor.log
    known = cursor.prefix
    if known is None or known[0] is not partition.identity or known[1] != partition.epoch:
        prefix = frames.deliver_prefix(*cursor.key, partition.identity.log_id_bytes, partition.epoch)
        known = cursor.prefix = (partition.identity, partition.epoch, prefix)
    return frames.deliver_head(
        known[2],
        cursor.generation,
        cursor.lease,
        first,
        next_offset - 1,
        partition.durable_end,
        min(age_ms, MAX_AGE_MS),
        gaps or [],
        size,
    )
