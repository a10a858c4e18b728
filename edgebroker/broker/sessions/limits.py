"""What a session grants its client, from the configuration."""

from __future__ import annotations

import msgspec

from edgebroker.common.config import Config
from edgebroker.common.types import TopicSettings


class SessionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, times in milliseconds."""

    heartbeat_ms: int
    idle_ms: int
    max_frame: int
    max_batch: int
    max_record: int
    window_batches: int
    window_bytes: int
    delivery_ms: int
    consume_records: int
    consume_bytes: int
    max_groups: int
    max_committed_offsets: int
    max_subscribed_partitions: int
    auto_create: bool
    new_topics: TopicSettings


def session_limits(config: Config) -> SessionLimits:
    """Those of a node with this configuration."""
    limits, topics = config.limits, config.topics
    return SessionLimits(
        heartbeat_ms=limits.heartbeat_ms,
        idle_ms=limits.idle_timeout_ms,
        max_frame=limits.max_batch_bytes + 4096,
        max_batch=limits.max_batch_bytes,
        max_record=limits.max_record_bytes,
        window_batches=limits.publish_window_batches,
        window_bytes=limits.publish_window_bytes,
        delivery_ms=config.delivery.timeout_ms,
        consume_records=limits.consume_window_records,
        consume_bytes=limits.consume_window_bytes,
        max_groups=limits.max_groups,
        max_committed_offsets=limits.max_committed_offsets,
        max_subscribed_partitions=limits.max_subscribed_partitions,
        auto_create=topics.auto_create,
        new_topics=TopicSettings(kind=topics.kind, partitions=topics.partitions),
    )
