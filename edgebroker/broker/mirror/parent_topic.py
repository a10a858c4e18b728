"""What another node says about a topic (GET /v1/topics/NAME), as far as a node that replicates it needs it."""

from __future__ import annotations

import msgspec

from edgebroker.common import json
from edgebroker.storage.types import OffsetRange


class ParentLog(msgspec.Struct, frozen=True):
    """One partition there: its log, the offsets that it has, and how many bytes they take."""

    log_id: str
    log_start: int
    durable_end: int
    bytes: int = 0
    damaged: list[OffsetRange] = []
    gaps: list[OffsetRange] = []

    @property
    def records(self) -> int:
        """How many of them there are."""
        return self.durable_end - self.log_start - sum(gap.last + 1 - gap.first for gap in self.gaps)


class _ParentTopic(msgspec.Struct, frozen=True):
    partitions: list[ParentLog]


def parent_logs(answer: bytes) -> list[ParentLog]:
    """The partitions that an answer describes. Raises msgspec.DecodeError for what does not describe a topic."""
    return json.decode(answer, _ParentTopic).partitions
