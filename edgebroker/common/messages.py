"""What clients and brokers say to each other, whichever protocol carries it: plain data, no bytes."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from edgebroker.common.types import Start

NO_LOG_ID = bytes(16)


class AckKind(IntEnum):
    """What an acknowledgement is: the answer to a request, or what a consumer says about its records."""

    ANSWER = 0
    CUMULATIVE = 1
    NEGATIVE = 2
    IN_PROGRESS = 3
    REJECT = 4


class Holding(IntEnum):
    """What a member is told about a partition."""

    ASSIGNED = 1
    REVOKING = 2
    REVOKED = 3


class GapReason(IntEnum):
    """Why records do not come."""

    RETENTION = 1
    DAMAGED = 2
    EXPIRED = 3


class Wanted(NamedTuple):
    """One line of a subscription: where to start in a partition (-1: all of the topic's)."""

    topic: str
    partition: int
    start: Start
    log_id: bytes
    epoch: int
    value: int


class ConsumerAck(NamedTuple):
    """`offset` is the next offset wanted: everything before it is acknowledged. `reason` is that of NEGATIVE and
    REJECT."""

    kind: AckKind
    topic: str
    partition: int
    generation: int
    lease: int
    offset: int
    reason: str = ""


class PublishRun(NamedTuple):
    """Consecutive publishes to one partition: `spans` say where the batches of each lie in `data` (common/spans.py)."""

    level: int
    topic: str
    partition: int
    data: memoryview
    spans: bytes
