"""Records of the copy, for threads beside the loop: they ask, and wait for what the loop and its reader thread find."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from edgebroker.common import batch
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.records import Record
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import TopicPartition

if TYPE_CHECKING:
    from edgebroker.consumer.copy.segment_copy import SegmentCopy
    from edgebroker.storage.types import ColdRead, LogInventory

T = TypeVar("T")
# The engine answers within its own timeout; a loop that has ended does not.
WAIT_SECONDS = 10.0


class CopyUnreadableError(Exception):
    """What the copy has there cannot be read now; the text says why."""


class CopyPiece(NamedTuple):
    """Records of [offset, next_offset). `missing`: there are none, and never will be: a gap, or damage."""

    records: list[Record]
    next_offset: int
    missing: bool


class Inquiry(Generic[T]):
    """What the loop is asked for."""

    def __init__(self) -> None:
        self._answers, self._answered = list[T](), threading.Event()

    def answered(self, answer: T) -> None:
        """On the loop."""
        self._answers.append(answer)
        self._answered.set()

    def answer(self) -> T:
        """Wait for it. Raises CopyUnreadableError."""
        if not self._answered.wait(WAIT_SECONDS):
            raise CopyUnreadableError("the disk does not answer")
        return self._answers[0]


class CopyReader:
    """Any thread but the loop's."""

    def __init__(self, copy: SegmentCopy, scheduler: Scheduler) -> None:
        self.copy, self._scheduler = copy, scheduler

    def read(self, key: TopicPartition, offset: int, end: int, max_bytes: int) -> CopyPiece:
        """The records from an offset on, before `end`: about so many bytes of them, at least one batch. Raises
        CopyUnreadableError."""
        return self.answer(self.ask(key, offset, max_bytes), key, offset, end)

    def ask(self, key: TopicPartition, offset: int, max_bytes: int) -> Inquiry[ColdRead]:
        """Begin to read; answer() waits for it."""
        return self._ask(lambda done: self.copy.read(key, offset, max_bytes, done))

    def answer(self, question: Inquiry[ColdRead], key: TopicPartition, offset: int, end: int) -> CopyPiece:
        """What read() returns, of what ask() has begun. Raises CopyUnreadableError."""
        found = question.answer()
        if found.corrupt is not None:
            return CopyPiece([], min(end, found.corrupt.next), True)
        if found.error:
            raise CopyUnreadableError(found.error)
        after = min(end, found.next_offset)
        if not found.data:
            return CopyPiece([], after, True)
        try:
            return CopyPiece(batch.decode(found.data, *key, offset, after - 1), after, False)
        except EdgeBrokerError as error:
            raise CopyUnreadableError(str(error)) from error

    def offset_at_time(self, key: TopicPartition, timestamp: int) -> int:
        """The first offset whose record is not older than that (ms since 1970). Raises CopyUnreadableError."""

        def look(done: Callable[[tuple[int, str]], None]) -> None:
            self.copy.offset_at_time(key, timestamp, lambda offset, why: done((offset, why)))

        offset, why = self._ask(look).answer()
        if why:
            raise CopyUnreadableError(why)
        return offset

    def files(self, key: TopicPartition) -> LogInventory | None:
        """The files of a partition; None: there are none. Raises CopyUnreadableError."""

        def look(done: Callable[[LogInventory | None], None]) -> None:
            done(self.copy.inventory(key))

        return self._ask(look).answer()

    def _ask(self, look: Callable[[Callable[[T], None]], None]) -> Inquiry[T]:
        question = Inquiry[T]()
        self._scheduler.call_soon_threadsafe(lambda: look(question.answered))
        return question
