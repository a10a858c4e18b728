"""The settings of the segment store: limits and paces, from the configuration."""

from __future__ import annotations

import msgspec


class HousekeepingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """0 means no limit; the free watermarks of -1 mean the default shares."""

    retention_bytes: int
    retention_ms: int
    segment_ms: int
    max_bytes: int
    soft_free_bytes: int
    hard_free_bytes: int
    scrub_bytes_per_second: int
    deleted_retention_ms: int
    drop_consumed: bool = True


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits in bytes and seconds; `window` is the batches remembered per producer and partition."""

    level: str
    segment_bytes: int
    max_batch: int
    max_record: int
    window: int
    commit_interval: float
    read_timeout: float
    housekeeping: HousekeepingSettings
