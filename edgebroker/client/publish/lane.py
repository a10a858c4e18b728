"""The batches of one partition on their way to the broker, in the order in which they are to be stored.

A batch gets its sequence when it is sent first, and keeps it until it is known not to be stored: what is sent again is
recognised by its sequence (docs/protocol.md, "How to send again"). When something was not answered with OK, the lane
sends nothing more until everything in flight is answered, and settles what comes next.

A batch that was refused for good leaves its sequence vacant: the next one takes it over. If the refused one was sent
more than once, or timed out, it may be stored nevertheless, and only a new producer epoch says where the sequence goes
on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from edgebroker.client.publish.accumulator import PendingBatch
from edgebroker.common.errors import Code
from edgebroker.network.wire.frames import Answer

MAX_SEQUENCE = 0x7FFFFFFF


class Lane:
    """Belongs to the I/O thread. A batch is in `queue` or in `in_flight`; its `answer` is what it was refused with."""

    __slots__ = (
        "attempts",
        "in_flight",
        "next_sequence",
        "numbered",
        "paused",
        "prefix",
        "queue",
        "topic",
        "unanswered",
        "unsettled",
        "vacant",
    )

    def __init__(self, topic: str, prefix: bytes) -> None:
        self.topic, self.prefix = topic, prefix
        self.queue: deque[PendingBatch] = deque()
        self.in_flight: list[PendingBatch] = []
        self.unanswered = 0
        self.next_sequence = self.numbered = 0
        # The sequence of a batch that is gone, and whether it is certain that it is not stored.
        self.vacant: tuple[int, bool] | None = None
        self.unsettled = self.paused = False
        # How often the broker did not know the sequence, or asked to try again.
        self.attempts = 0

    @property
    def resolved(self) -> bool:
        """Is it known of every batch that it is not stored?"""
        return not self.in_flight and not (self.queue and self.queue[0].sequence >= 0)

    @property
    def needs_epoch(self) -> bool:
        """Can nothing new be sent in this epoch?"""
        return self.vacant is not None and not self.vacant[1]

    def take(self, window: int, new: bool) -> Iterator[PendingBatch]:
        """What may be sent now; batches without a sequence only if `new`. Each is in flight then.

        The broker recognises the last `window` batches: no more are begun behind one whose fate is not known."""
        while self.queue and len(self.in_flight) < window and not self.unsettled and not self.paused:
            batch = self.queue[0]
            if batch.sequence < 0:
                oldest = self.in_flight[0].ordinal if self.in_flight else self.numbered
                if not new or self.vacant is not None or self.numbered - oldest >= window:
                    return
                batch.sequence, batch.ordinal = self.next_sequence, self.numbered
                self.numbered += 1
                self.next_sequence = (batch.sequence + batch.count) & MAX_SEQUENCE
            batch.answer = None
            batch.sendings += 1
            self.in_flight.append(self.queue.popleft())
            self.unanswered += 1
            yield batch

    def stored(self, batch: PendingBatch) -> None:
        self._remove(batch)
        self.attempts = 0

    def returned(self, batch: PendingBatch, answer: Answer) -> None:
        """It was refused, and may be sent again."""
        batch.answer = answer
        self.unanswered -= 1
        self.unsettled = True

    def dropped(self, batch: PendingBatch, *, unknown: bool = False) -> None:
        """It was refused for good, or is given up: is it unknown whether it is stored?"""
        if batch.sequence < 0:
            self.queue.remove(batch)
            return
        known = not unknown and batch.sendings == 1
        if self.vacant is None or _before(batch.sequence, self.vacant[0]):
            self.vacant = (batch.sequence, known)
        self._remove(batch)
        self.unsettled = True

    def fenced(self, batch: PendingBatch) -> None:
        """It was refused, and so will be all that follow."""
        self._remove(batch)

    def _remove(self, batch: PendingBatch) -> None:
        if batch not in self.in_flight:
            self.queue.remove(batch)
            return
        self.in_flight.remove(batch)
        if batch.answer is None:
            self.unanswered -= 1

    def settle(self, *, connected: bool = True) -> bool:
        """Everything that was in flight is answered, or the connection is gone: put it back, in order, and find out
        which sequences count. True when it should not be sent again at once."""
        wait = gone = False
        for batch in self.in_flight:
            behind = self.vacant is not None and _before(self.vacant[0], batch.sequence)
            refused = batch.answer.code if batch.answer is not None else Code.OK
            if refused is Code.UNKNOWN_TOPIC or (behind and (self.vacant[1] or refused is Code.OUT_OF_ORDER)):  # type: ignore[index]
                gone = True
            elif connected and batch is self.in_flight[0] and refused is Code.OUT_OF_ORDER and self.attempts:
                # Everything before it is stored, and it was tried again: the broker has forgotten this producer.
                self.vacant, gone = (batch.sequence, False), True
            wait = wait or (connected and not gone and batch.answer is not None)
            if gone:  # neither this one nor what follows it is stored
                batch.sequence = -1
        self.attempts += wait
        self.queue.extendleft(reversed(self.in_flight))
        self.in_flight.clear()
        self.unanswered, self.unsettled = 0, False
        if self.vacant is not None and self.vacant[1]:
            self.next_sequence, self.vacant = self.vacant[0], None
        return wait

    def begin_epoch(self) -> None:
        """Sequences begin at 0. Whether what was not answered is stored will never be known."""
        self.settle(connected=False)
        for batch in self.queue:
            batch.sequence, batch.sendings = -1, 0
        self.next_sequence, self.vacant = 0, None


def _before(one: int, other: int) -> bool:
    return 0 < (other - one) & MAX_SEQUENCE < 1 << 30
