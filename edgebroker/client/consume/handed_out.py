"""What the caller of a consumer has of a delivery: the records that are left of it, and the last one that was given.

With `auto_ack`, asking for more says that what was given is handled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from edgebroker.client.consume.partition_state import PartitionState
from edgebroker.common.records import Record
from edgebroker.common.types import TopicPartition

MOST_RECORDS, MOST_SECONDS = 1000, 1.0


def key_of(record: Record) -> TopicPartition:
    return TopicPartition(record.topic, record.partition)


class HandedOut:
    """Belongs to the thread of the consumer. `state_of` tells how a partition is held now, `acknowledge` takes the
    offset before which everything of a partition is handled."""

    def __init__(
        self,
        auto_ack: bool,
        state_of: Callable[[TopicPartition], PartitionState],
        acknowledge: Callable[[TopicPartition, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._auto_ack, self._state_of, self._acknowledge, self._clock = auto_ack, state_of, acknowledge, clock
        self._rest: deque[Record] = deque()
        self._last: Record | None = None
        # Of the partition that the last delivery was from, and the lease under which it came.
        self._state = PartitionState()
        self._lease = self._unacked = 0
        self._ack_due = 0.0

    def next(self, receive: Callable[[], Iterable[Record]]) -> Record | None:
        """One record, of a new delivery when nothing is left; None when there is none. Those before it are
        acknowledged, a delivery, 1,000 records or a second's worth at a time: a slow handler keeps its lease."""
        rest, now = self._rest, self._clock()
        if self._state.lease != self._lease:
            rest.clear()  # the partition was lost, or moved: it comes again
        if not rest or self._unacked >= MOST_RECORDS or now >= self._ack_due:
            self._ack_due = now + MOST_SECONDS
            self.handled()
        if not rest:
            rest.extend(receive())
            if not rest:
                return None
            self._came(rest[0])
        self._last = rest.popleft()
        self._unacked += 1
        return self._last

    def all(self, receive: Callable[[], list[Record]]) -> list[Record]:
        """What is left, or a new delivery."""
        rest, self._rest = self._rest, deque()
        records = list(rest) if rest and self._state.lease == self._lease else receive()
        if records:
            self._last = records[-1]
            self._came(self._last)
        return records

    def each(self, receive: Callable[[], Iterable[Record]]) -> Iterator[Record]:
        """next(), again and again: an iteration, whose steps are to be cheap."""
        clock = self._clock
        while (record := self.next(receive)) is not None:
            yield record
            while (
                self._rest
                and self._unacked < MOST_RECORDS
                and self._state.lease == self._lease
                and clock() < self._ack_due
            ):
                self._last = record = self._rest.popleft()
                self._unacked += 1
                yield record

    def _came(self, record: Record) -> None:
        """A delivery, of which this is a record."""
        self._state = self._state_of(key_of(record))
        self._lease = self._state.lease

    def handled(self) -> None:
        """Everything that was given is handled."""
        last, self._last, self._unacked = self._last, None, 0
        if last is not None and self._auto_ack and self._state.lease == self._lease:
            self._acknowledge(key_of(last), last.offset + 1)

    def left(self) -> None:
        """A loop was left: what was before the last record is handled. Whether that one is cannot be seen here."""
        last = self._last
        if last is not None and self._auto_ack and self._state.lease == self._lease:
            self._acknowledge(key_of(last), last.offset)

    def decided(self, key: TopicPartition) -> None:
        """The caller says what of this partition is handled, and what not."""
        if self._last is not None and key_of(self._last) == key:
            self._last, self._unacked = None, 0

    def take_back(self, key: TopicPartition) -> None:
        """Nothing more of a partition is given of what was received."""
        self.decided(key)
        if self._rest and key_of(self._rest[0]) == key:
            self._rest.clear()
