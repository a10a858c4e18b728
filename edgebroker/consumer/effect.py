"""What records do, all of it in one transaction: rows of the view, calls of the handlers, records that are given up.

    portion of a delivery -> decoded -> rows of the view -> handlers, in the order of the records

A value that cannot be decoded is given up at once: no attempt would help. A handler that raises ends the transaction;
FailedRecord says which record it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from edgebroker.common.records import Record
from edgebroker.common.types import TopicPartition
from edgebroker.consumer.application import Handler, Topic
from edgebroker.consumer.database import AppDatabase, DeadRecord, NotStorableError, View, is_damage, is_shortage
from edgebroker.consumer.declarations import Context, Database

MOST_REASON = 1000
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Portion(NamedTuple):
    """Records of one partition, in order; `attempt` is how often the first one is tried with this."""

    key: TopicPartition
    records: Sequence[Record]
    attempt: int = 1


class FailedRecord(Exception):
    """A handler raised. `before` are how many records of the portion come before the one that failed."""

    def __init__(self, portion: Portion, before: int, handler: Handler, error: BaseException) -> None:
        super().__init__(str(error))
        self.portion, self.before, self.handler, self.error = portion, before, handler, error

    @property
    def record(self) -> Record:
        return self.portion.records[self.before]


class Effect:
    """Of one topic. Belongs to the thread of the database."""

    def __init__(self, topic: Topic, database: AppDatabase, node: str, wall_ms: Callable[[], int]) -> None:
        self._topic, self._database, self._node, self._wall_ms = topic, database, node, wall_ms
        self._view: View | None = database.view(topic.name, topic.view) if topic.view is not None else None
        # The generation that is loaded beside it, and the partitions whose records go there.
        self._next: View | None = None
        self._loading = {number for number, one in database.loading(topic.name).items() if one.target >= 0}
        if self._view is not None and self._loading:
            with database.transaction():
                self._next = database.next_generation(self._view)
        self._sql = Database(database.execute, database.execute_many)
        self._decode: Callable[[bytes], Any] | None = None
        if topic.view is not None:
            self._decode = msgspec.json.Decoder(topic.view.kind).decode

    def apply(self, portion: Portion) -> None:
        """Within a transaction. Raises FailedRecord, and what the database raises when nothing can be stored."""
        records = portion.records
        view = self._next if portion.key.partition in self._loading else self._view
        if view is not None:
            records = self._put(view, records)
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
            )
        )

    # ---- loading again ----

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

    def _put(self, view: View, records: Sequence[Record]) -> Sequence[Record]:
        """Set the latest row of each key; the records that have one."""
        latest: dict[Any, tuple[Any, ...] | None] = {}
        bad: set[int] = set()
        decode, row = self._decode, view.columns.row
        assert decode is not None
        for record in records:
            raw, value = record.key, record.value
            if raw is None:
                self.bury(record, 1, "a record without a key has no place in a view")
                bad.add(record.offset)
                continue
            try:
                key: str | bytes = str(raw, "utf-8")
            except UnicodeDecodeError:
                key = raw
            if value is None:
                latest[key] = None
                continue
            try:
                latest[key] = (key, *row(decode(value)), record.partition, record.offset, record.timestamp)
            except _UNDECODABLE as error:
                self.bury(record, 1, f"the value is not as expected: {error}")
                bad.add(record.offset)
        good = [record for record in records if record.offset not in bad] if bad else records
        rows = [one for one in latest.values() if one is not None]
        deleted = [(key,) for key, one in latest.items() if one is None]
        try:
            self._database.put(view, rows, deleted)
        except NotStorableError as error:
            if len(good) > 1:  # find out which
                return [one for record in good for one in self._put(view, [record])]
            self.bury(good[0], 1, f"the value cannot be stored: {error}")
            return []
        return good

    # ---- handlers ----

    def _call_all(self, handler: Handler, portion: Portion, records: Sequence[Record]) -> None:
        if handler.key != "*" or handler.headers:
            records = [record for record in records if handler.takes(record.key, record.headers)]
        if not handler.signature.deletions:
            records = [record for record in records if record.value is not None]
        decode, found, values = handler.signature.decode, [], []
        for record in records:
            try:
                values.append(decode(record) if record.value is not None else None)
            except _UNDECODABLE as error:
                self.bury(record, 1, f"the value is not as expected: {error}")
            else:
                found.append(record)
        if handler.signature.batch:
            self._call_with_batches(handler, portion, found, values)
        else:
            self._call_with_each(handler, portion, found, values)

    def _call_with_each(self, handler: Handler, portion: Portion, records: list[Record], values: list[Any]) -> None:
        call, others, done = handler.call, handler.signature.others, 0
        try:
            if not others:
                for value in values:
                    call(value)
                    done += 1
                return
            for value, record in zip(values, records, strict=True):
                call(value, *self._others(others, portion, record))
                done += 1
        except Exception as error:
            if is_shortage(error) or is_damage(error):
                raise  # it is not about the record
            raise FailedRecord(portion, _place(portion, records[done]), handler, error) from error

    def _call_with_batches(self, handler: Handler, portion: Portion, records: list[Record], values: list[Any]) -> None:
        others = handler.signature.others
        for first in range(0, len(values), handler.batch):
            try:
                batch = values[first : first + handler.batch]
                handler.call(batch, *self._others(others, portion, records[first]))
            except Exception as error:
                if is_shortage(error) or is_damage(error):
                    raise
                raise FailedRecord(portion, _place(portion, records[first]), handler, error) from error

    def _others(self, others: tuple[type, ...], portion: Portion, record: Record) -> list[object]:
        attempt = portion.attempt if record is portion.records[0] else 1
        return [self._sql if kind is Database else Context(record, attempt, self._node) for kind in others]


def _place(portion: Portion, record: Record) -> int:
    return next(place for place, one in enumerate(portion.records) if one is record)


def portions_of(records: Sequence[Record]) -> list[Portion]:
    """Records as they were delivered, by partition."""
    return [
        Portion(TopicPartition(*key), list(them))
        for key, them in groupby(records, lambda record: (record.topic, record.partition))
    ]
