"""Plain data that crosses floors. Nothing here does anything."""

from enum import IntEnum
from typing import Literal, NamedTuple

import msgspec

TopicKind = Literal["stream", "table"]
OnDamage = Literal["wait", "skip"]
# Suffix of the topic, one per node and source topic, that holds what could not be handled.
DEAD_LETTERS = ".dlq"


class TopicSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an origin decides about a topic; travels with the partition's identity."""

    kind: TopicKind = "stream"
    partitions: int = 1
    retention_ms: int = 0
    retention_bytes: int = 0
    segment_bytes: int = 0
    segment_ms: int = 0
    message_ttl_ms: int = 0
    urgent: bool = False
    on_damage: OnDamage = "wait"
    max_delete_percent: int = 1
    hold_ms: int = 0
    hold_bytes: int = 0
    replicas: int = 1
    replica_nodes: str = ""


class AckLevel(IntEnum):
    """What a producer waits for: nothing, the write (survives the process), the sync (survives the power), the sync at
    nodes below as well (survives the loss of the node)."""

    NONE = 0
    WRITTEN = 1
    DURABLE = 2
    REPLICATED = 3


class Start(IntEnum):
    """Where a subscription begins."""

    COMMITTED = 0
    EARLIEST = 1
    LATEST = 2
    OFFSET = 3
    TIME = 4
    POSITION = 5
    RESUME = 6


class Position(NamedTuple):
    """Where a reader is in a log: which log, which history of it, and the next offset to read.

    Attributes:
        log_id: 16 bytes that name the log; a topic that was recreated has another.
        epoch: the history of the log that the reader has read, at `next_offset`.
        next_offset: the offset of the next record to read.
    """

    log_id: bytes
    epoch: int
    next_offset: int


class Delivery(NamedTuple):
    """Batches of one partition as they are stored, for a copy of its log.

    Attributes:
        topic: the topic.
        partition: the partition.
        log_id: 16 bytes that name the log.
        epoch: the history of the log at the last of them.
        first: the first offset that is delivered. The first batch may begin before it.
        last: the last offset that is delivered.
        batches: whole batches, with the offsets and the histories (epochs) that the broker gave them; empty when all of
            it is a gap.
    """

    topic: str
    partition: int
    log_id: bytes
    epoch: int
    first: int
    last: int
    batches: bytes


class TopicPartition(NamedTuple):
    """One partition of a topic.

    Attributes:
        topic: the name of the topic.
        partition: the number of the partition, from 0.
    """

    topic: str
    partition: int
