"""What a session grants its client, from the configuration, and what it refuses because of a limit."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from edgebroker.broker.core import Core
from edgebroker.broker.delivery.state import Cursor
from edgebroker.broker.ports import Member
from edgebroker.broker.publish.producers import ProducerId
from edgebroker.common.config import Config
from edgebroker.common.messages import Wanted
from edgebroker.common.types import TopicSettings
from edgebroker.network.wire.frames import PROTOCOL_VERSION, Grants, Subscribe, TopicMetadata


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

    def grants(self, node_uid: bytes, producer: ProducerId, topics: list[TopicMetadata]) -> Grants:
        """The answer to a CONNECT."""
        return Grants(
            version=PROTOCOL_VERSION,
            node_uid=node_uid,
            heartbeat_ms=self.heartbeat_ms,
            idle_ms=self.idle_ms,
            max_frame=self.max_frame,
            max_batch=self.max_batch,
            max_record=self.max_record,
            window_batches=self.window_batches,
            window_bytes=self.window_bytes,
            delivery_ms=self.delivery_ms,
            producer_id=producer.id,
            producer_epoch=producer.epoch,
            topics=topics,
        )


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


def reached_limit(
    core: Core,
    limits: SessionLimits,
    member: Member[Cursor],
    subscribe: Subscribe,
    wanted_from: Callable[[int], int],
) -> tuple[str, str, str] | None:
    """The limit that a JOIN would exceed: its name, what happens because of it, and what the client is told."""
    name = subscribe.group
    if name and core.groups.find(name) is None and len(core.groups) >= limits.max_groups:
        return (
            "max_groups",
            f"group {name} was not begun",
            f"group {name} cannot begin: this node may have {limits.max_groups} groups; delete some that have no "
            "use (edgebroker group delete), or raise limits.max_groups",
        )
    more, most = core.membership.more_wanted(member, subscribe.wanted), limits.max_subscribed_partitions
    share = most // 4
    crowded = core.membership.wanted + more > share
    if crowded and (core.membership.wanted + more > most or wanted_from(more) > share):
        return (
            "max_subscribed_partitions",
            f"{member.client_id} did not get {more} partitions more",
            f"{more} partitions more are too many: all consumers together may subscribe to {most}, those of one "
            "address of another machine to a quarter of that; subscribe to fewer topics, or raise "
            "limits.max_subscribed_partitions",
        )
    most = limits.max_committed_offsets
    if name and core.groups.offsets + more > most:
        new = _more_offsets(core, name, subscribe.wanted)
        if core.groups.offsets + new > most:
            return (
                "max_committed_offsets",
                f"group {name} did not begin in {new} partitions",
                f"group {name} cannot begin in {new} partitions: this node may have {most} committed offsets; "
                "delete groups that have no use (edgebroker group delete), or raise limits.max_committed_offsets",
            )
    return None


def _more_offsets(core: Core, name: str, wanted: list[Wanted]) -> int:
    """In how many partitions of these a group has no committed offset yet."""
    group = core.groups.find(name)
    known = group.committed_offsets if group is not None else {}
    keys = {(line.topic, line.partition) for line in wanted if line.partition != -1}
    for topic in {line.topic for line in wanted if line.partition == -1}:
        keys.update((topic, log.partition) for log in core.engine.partitions(topic))
    return len(keys.difference(known))
