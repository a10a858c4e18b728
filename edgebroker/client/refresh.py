"""What a caller sees of a snapshot refresh: load into a staging store, then make it visible in one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgebroker.common.records import Record
from edgebroker.common.types import Position


class Refresh:
    """One snapshot refresh of one partition, as a staging store gets it.

    Attributes:
        reset_id: names the refresh, in hex; the same after a crash in between.
        log_id: 16 bytes that name the log that is loaded.
        topic: the topic.
        partition: the partition.
        from_offset: where loading begins.
        target: the offset up to which records have to be loaded before the switch.
        next_offset: the offset up to which they are loaded.
        epoch: the epoch of the log at the last of them; -1 before the first.
    """

    __slots__ = ("epoch", "from_offset", "log_id", "next_offset", "partition", "reset_id", "target", "topic")

    def __init__(
        self, *, reset_id: str, log_id: bytes, topic: str, partition: int, from_offset: int, target: int
    ) -> None:
        self.reset_id, self.log_id, self.topic, self.partition = reset_id, log_id, topic, partition
        self.from_offset, self.target = from_offset, target
        self.next_offset, self.epoch = from_offset, -1

    @property
    def position(self) -> Position:
        """The position behind what is loaded: for a store that gives it back as one of the consumer's `positions`."""
        return Position(self.log_id, self.epoch, self.next_offset)

    @property
    def progress(self) -> float:
        """How much is loaded, from 0 to 1."""
        whole = self.target - self.from_offset
        return min(1.0, (self.next_offset - self.from_offset) / whole) if whole > 0 else 1.0

    @property
    def complete(self) -> bool:
        """True when everything up to `target` is loaded."""
        return self.next_offset >= self.target

    def __repr__(self) -> str:
        return f"Refresh({self.topic}/{self.partition}, {self.progress:.0%}, {self.reset_id})"


class Staging(Protocol):
    """Where a consumer loads a snapshot refresh: a class of yours with these three methods, given as `staging`.

    Readers of your store see the old data until switch() returns and the new data from then on, also when the process
    ends in between: after a restart begin() is called again with the same reset_id. An exception of any of the methods
    passes through poll(), and the broker then announces the refresh again.

    Threads:
        Called in the thread that polls the consumer.
    """

    def begin(self, refresh: Refresh) -> int:
        """Open the staging store of this refresh, and remove those of others.

        Args:
            refresh: the refresh; `from_offset` and `target` say what is to be loaded.

        Returns:
            The next offset to load: `from_offset` for a new store; where it ends for one that a crash interrupted; the
            next offset of the visible store when that already is the one of this refresh.
        """

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        """Put records into the staging store.

        Args:
            refresh: the refresh; `next_offset` is the offset after these records.
            records: the next records, in order; may be empty.

        Durability:
            The records are acknowledged when it returns: what begin() returns after a crash has to agree with what is
            stored.
        """

    def switch(self, refresh: Refresh) -> bool | None:
        """Make the staging store the visible one, in one atomic step; or say that it is too early.

        A store that switches several partitions or topics together answers False until the last of them is complete,
        then switches all in one step; one that waits for an hour, until it has come. What is published meanwhile is
        loaded into the staging store, and acknowledged. It is asked again when more was loaded, when another refresh
        of this consumer was switched, and by Consumer.switch().

        Args:
            refresh: the refresh; at least up to its `target` it is loaded.

        Returns:
            False: not yet. Anything else: readers see the new data.

        Durability:
            The step stores `reset_id` and `next_offset` together with the data, so that begin() finds them.
        """
