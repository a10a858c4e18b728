"""A consumer's side of a full refresh: load into a staging store, then make it visible at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgebroker.common.records import Record


class Refresh:
    """One refresh of one partition. `reset_id` (hex) names it, also after a crash in between; records go from
    `from_offset` to at least `target`; `next_offset` is how far it has come."""

    __slots__ = ("from_offset", "log_id", "next_offset", "partition", "reset_id", "target", "topic")

    def __init__(self, reset_id: str, log_id: bytes, topic: str, partition: int, from_offset: int, target: int) -> None:
        self.reset_id, self.log_id, self.topic, self.partition = reset_id, log_id, topic, partition
        self.from_offset, self.target = from_offset, target
        self.next_offset = from_offset

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        whole = self.target - self.from_offset
        return min(1.0, (self.next_offset - self.from_offset) / whole) if whole > 0 else 1.0

    @property
    def complete(self) -> bool:
        return self.next_offset >= self.target

    def __repr__(self) -> str:
        return f"Refresh({self.topic}/{self.partition}, {self.progress:.0%}, {self.reset_id})"


class Staging(Protocol):
    """Where a consumer loads a refresh; given to Consumer(staging=...). Called in the thread that polls.

    What readers of the store see must be the old data until switch() returns, and the new data from then on, also when
    the process dies in between: after a restart begin() is called again with the same reset_id.
    """

    def begin(self, refresh: Refresh) -> int:
        """Open the staging store of this reset_id, removing those of others. Returns the next offset wanted:
        from_offset for a new one, where it stands for one that a crash interrupted, where the visible store stands
        when that is this very refresh (then switch() has nothing left to do)."""

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        """Put records into the staging store; they are acknowledged when this returns."""

    def switch(self, refresh: Refresh) -> None:
        """Make the staging store the visible one, in one atomic step that stores reset_id and next_offset with it."""
