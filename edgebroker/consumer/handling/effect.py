"""What records do, all of it in one transaction: rows of the view, calls of the handlers, records that are given up.

    portion of a delivery -> decoded -> rows of the view -> handlers, in the order of the records

A value that cannot be decoded is given up at once: no attempt would help. A handler that raises ends the transaction;
FailedRecord says which record it was. Records of a topic that instances share are given up by the broker: one that
cannot be decoded is a FailedRecord there.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import groupby
from typing import Any, NamedTuple, NoReturn

import msgspec

from edgebroker.common.records import Record
from edgebroker.common.types import TopicPartition
from edgebroker.consumer.database import AppDatabase, DeadRecord, NotStorableError, View, is_damage, is_shortage
from edgebroker.consumer.declare.application import Handler, Topic
from edgebroker.consumer.handling.calls import CallFailedError, Calls

MOST_REASON = 1000
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Portion(NamedTuple):
    """Records of one partition, in order; `attempt` is how often the first one is tried with this."""

    key: TopicPartition
    records: Sequence[Record]
    attempt: int = 1


class Changed(NamedTuple):
    """Rows of a view that were set, as the table has them, and keys that were deleted, with partition and offset."""

    topic: str
    rows: list[tuple[Any, ...]]
    deleted: list[tuple[str | bytes, int, int]]


class ReplayedRecord(NamedTuple):
    """A record that was given up, as handlers get it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


class HopelessError(Exception):
    """No further attempt is made with a record; the text says why."""


class FailedRecord(Exception):
    """A handler raised. `before` are how many records of the portion come before the one that failed."""

    def __init__(self, portion: Portion, before: int, handler: Handler, error: BaseException) -> None:
        super().__init__(str(error))
        self.portion, self.before, self.handler, self.error = portion, before, handler, error

    @property
    def record(self) -> Record:
        return self.portion.records[self.before]

    @property
    def why(self) -> str:
        if isinstance(self.error, HopelessError):
            return str(self.error)
        return f"{type(self.error).__name__}: {self.error}"

    def is_final(self, attempts: int) -> bool:
        """Is there no attempt after so many?"""
        policy = self.handler.policy
        if isinstance(self.error, HopelessError):
            return True
        return attempts >= policy.max_attempts or not isinstance(self.error, policy.retry_on)


class Effect:
    """Of one topic. Belongs to the thread of the database."""

    def __init__(self, topic: Topic, database: AppDatabase, calls: Calls, wall_ms: Callable[[], int]) -> None:
        self._topic, self._database, self._calls, self._wall_ms = topic, database, calls, wall_ms
        self._view: View | None = database.view(topic.name, topic.view) if topic.view is not None else None
        # The generation that is loaded beside it, and the partitions whose records go there.
        self._next: View | None = None
        self._loading = {number for number, one in database.loading(topic.name).items() if one.target >= 0}
        if self._view is not None and self._loading:
            with database.transaction():
                self._next = database.next_generation(self._view)
        self._decode: Callable[[bytes], Any] | None = None
        if topic.view is not None:
            self._decode = msgspec.json.Decoder(topic.view.kind).decode

    def apply(
        self, portion: Portion, changed: list[Changed] | None = None, given_up: Container[int] = frozenset()
    ) -> None:
        """Within a transaction; what readers of the view see of it is added to `changed`. Records at the offsets
        `given_up` go into the view only. Raises FailedRecord, and what the database raises when nothing can be
        stored."""
        records = portion.records
        view = self._next if portion.key.partition in self._loading else self._view
        if view is not None:
            records = self._put(view, records, changed if view is self._view else None)
        if given_up:
            records = [record for record in records if record.offset not in given_up]
        for handler in self._topic.handlers:
            self._call_all(handler, portion, records)

    def bury(self, record: Record, attempts: int, reason: str) -> None:
        """Give a record up, within a transaction."""
        self._database.bury(
            DeadRecord(
                record.topic,
                record.partition,
                record.offset,
                record.key,
                record.value,
                attempts,
                reason[:MOST_REASON],
                self._wall_ms(),
                record.timestamp,
                msgspec.json.encode(record.headers).decode(),
            )
        )

    def apply_again(self, dead: DeadRecord) -> None:
        """The effect of a record that was given up, within a transaction; its row of the view only if that has no later
        record. Raises FailedRecord."""
        headers = msgspec.json.decode(dead.headers, type=tuple[tuple[str, bytes | None], ...])
        record = ReplayedRecord(*dead[:3], dead.timestamp, dead.key, dead.value, headers)
        portion = Portion(TopicPartition(*dead[:2]), [record])  # type: ignore[list-item]
        records: Sequence[Record] = portion.records
        if self._view is not None and dead.key is not None:
            later = self._database.offset_of(self._view, _key_of(dead.key)) > dead.offset
            if not later:
                records = self._put(self._view, records, None)
        for handler in self._topic.handlers:
            self._call_all(handler, portion, records)

    # ---- loading again ----

    def loading(self) -> tuple[int, ...]:
        """The partitions whose records go into the next generation. Any thread."""
        return tuple(self._loading.copy())

    def begin_generation(self, partition: int) -> None:
        """The records of a partition go into the next generation from now on; within a transaction."""
        if self._view is not None:
            self._next = self._database.next_generation(self._view)
            self._database.empty(self._next, partition)
        self._loading.add(partition)

    def sizes(self, loaded: Sequence[int]) -> tuple[int, int]:
        """How many rows readers see of these partitions, and how many are loaded."""
        if self._view is None or self._next is None:
            return 0, 0
        return self._database.count(self._view, loaded), self._database.count(self._next, loaded)

    def end_generation(self, loaded: Sequence[int]) -> None:
        """Show the next generation, which has these partitions; within a transaction."""
        if self._view is not None and self._next is not None:
            self._database.switch(self._view, self._next, loaded)
            self._view, self._next = self._next, None
        self._loading.clear()

    # ---- the view ----

    def _put(self, view: View, records: Sequence[Record], changed: list[Changed] | None) -> Sequence[Record]:
        """Set the latest row of each key; the records that have one."""
        latest: dict[str | bytes, tuple[Any, ...]] = {}
        gone: dict[str | bytes, Record] = {}
        bad: set[int] = set()
        decode, row = self._decode, view.columns.row
        assert decode is not None
        for record in records:
            raw, value = record.key, record.value
            if raw is None:
                self.bury(record, 1, "a record without a key has no place in a view")
                bad.add(record.offset)
                continue
            key = _key_of(raw)
            if value is None:
                latest.pop(key, None)
                gone[key] = record
                continue
            if gone:
                gone.pop(key, None)
            try:
                latest[key] = (key, *row(decode(value)), record.partition, record.offset, record.timestamp)
            except _UNDECODABLE as error:
                self.bury(record, 1, f"the value is not as expected: {error}")
                bad.add(record.offset)
        good = [record for record in records if record.offset not in bad] if bad else records
        rows = list(latest.values())
        try:
            self._database.put(view, rows, [(key,) for key in gone])
        except NotStorableError as error:
            if len(good) > 1:  # find out which
                return [one for record in good for one in self._put(view, [record], changed)]
            self.bury(good[0], 1, f"the value cannot be stored: {error}")
            return []
        if changed is not None:
            deleted = [(key, record.partition, record.offset) for key, record in gone.items()]
            changed.append(Changed(self._topic.name, rows, deleted))
        return good

    # ---- handlers ----

    def handler_of(self, record: Record) -> Handler | None:
        """Who gets a record."""
        for handler in self._topic.handlers:
            if handler.takes(record.key, record.headers) and (record.value is not None or handler.signature.deletions):
                return handler
        return None

    def _call_all(self, handler: Handler, portion: Portion, records: Sequence[Record]) -> None:
        if handler.key != "*" or handler.headers:
            records = [record for record in records if handler.takes(record.key, record.headers)]
        if not handler.signature.deletions:
            records = [record for record in records if record.value is not None]
        decode, found, values = handler.signature.decode, list[Record](), list[Any]()
        for record in records:
            try:
                values.append(decode(record) if record.value is not None else None)
            except _UNDECODABLE as error:
                why = f"the value is not as expected: {error}"
                if self._topic.scope == "shared":
                    # What comes before it is handled first.
                    self._call(handler, portion, found, values)
                    self._failed(handler, portion, record, HopelessError(why))
                self.bury(record, 1, why)
            else:
                found.append(record)
        self._call(handler, portion, found, values)

    def _call(self, handler: Handler, portion: Portion, records: list[Record], values: list[Any]) -> None:
        if not records:
            return
        attempts = portion.attempt if records[0] is portion.records[0] else 1
        try:
            if handler.signature.batch:
                self._calls.batches(handler, values, records, attempts)
            else:
                self._calls.each(handler, values, records, attempts)
        except CallFailedError as failure:
            if is_shortage(failure.error) or is_damage(failure.error):
                raise failure.error from None  # it is not about the record
            self._failed(handler, portion, records[failure.before * handler.batch], failure.error)

    @staticmethod
    def _failed(handler: Handler, portion: Portion, record: Record, error: BaseException) -> NoReturn:
        before = next(place for place, one in enumerate(portion.records) if one is record)
        raise FailedRecord(portion, before, handler, error) from error


def _key_of(raw: bytes) -> str | bytes:
    """A key as a view has it: as text, if it is that."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        return raw


def portions_of(records: Sequence[Record]) -> list[Portion]:
    """Records as they were delivered, by partition."""
    return [
        Portion(TopicPartition(*key), list(them))
        for key, them in groupby(records, lambda record: (record.topic, record.partition))
    ]
