"""Which storage engine a configuration asks for, and with which settings."""

from __future__ import annotations

from pathlib import Path

from edgebroker.common.config import Config
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.storage.engine import Engine
from edgebroker.storage.settings import HousekeepingSettings, StoreSettings
from edgebroker.storage.store import SegmentStore


def make_engine(config: Config, scheduler: Scheduler, clock: Clock) -> Engine:
    """The engine of a node, not opened yet. Raises what DataDirectory refuses."""
    if config.storage.engine == "segment":
        return SegmentStore(Path(config.node.data_dir), scheduler, clock, store_settings(config))
    # Few nodes have it: the others need not load it.
    from edgebroker.storage.memory import MemoryEngine

    limits = config.limits
    return MemoryEngine(
        scheduler,
        clock,
        max_batch=limits.max_batch_bytes,
        max_record=limits.max_record_bytes,
        window=limits.publish_window_batches,
    )


def store_settings(config: Config) -> StoreSettings:
    storage, limits = config.storage, config.limits
    return StoreSettings(
        level=config.node.level,
        segment_bytes=storage.segment_bytes,
        max_batch=limits.max_batch_bytes,
        max_record=limits.max_record_bytes,
        window=limits.publish_window_batches,
        commit_interval=storage.commit_interval_ms / 1000,
        read_timeout=storage.read_timeout_ms / 1000,
        housekeeping=HousekeepingSettings(
            retention_bytes=storage.retention_bytes,
            retention_ms=storage.retention_ms,
            segment_ms=storage.segment_ms,
            max_bytes=storage.max_bytes,
            soft_free_bytes=storage.soft_free_bytes,
            hard_free_bytes=storage.hard_free_bytes,
            scrub_bytes_per_second=storage.verify_bytes_per_second,
            deleted_retention_ms=storage.deleted_retention_ms,
            drop_consumed=storage.on_full == "drop_consumed",
        ),
    )
