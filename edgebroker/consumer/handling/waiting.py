"""Partitions whose first record failed, until its next attempt."""

from __future__ import annotations

from collections.abc import Sequence

from edgebroker.common.records import Record
from edgebroker.consumer.handling.effect import FailedRecord


class WaitingPartition:
    """A partition whose first record failed so often: what has come of it, and when it is tried again. `given_up` says
    why no attempt would help: the record is passed over then, as its handler's policy says."""

    def __init__(self, records: list[Record], attempts: int, due: float, failure: FailedRecord) -> None:
        self.records, self.attempts, self.due, self.failure = records, attempts, due, failure
        self.given_up = failure.is_final(attempts)


def once(records: Sequence[Record]) -> list[Record]:
    """Each record once, of several stretches of a partition that may overlap."""
    found: list[Record] = []
    for record in records:
        if not found or record.offset > found[-1].offset:
            found.append(record)
    return found
