"""What records do, all of it in one transaction: rows of the view, calls of the handlers, records that are given up.

    portion of a delivery -> decoded -> rows of the view -> handlers, in the order of the records

A value that cannot be decoded is given up at once: no attempt would help. A handler that raises ends the transaction;
FailedRecord says which record it was. Records of a topic that instances share are given up by the broker: one that
cannot be decoded is a FailedRecord there.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import groupby
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import msgspec

from edgebroker.common.records import Record
from edgebroker.common.types import TopicPartition
from edgebroker.consumer.database import AppDatabase, DeadRecord, Loading, NotStorableError, Row, is_damage, is_shortage
from edgebroker.consumer.declare.application import Handler, Topic
from edgebroker.consumer.declare.signatures import whole_record
from edgebroker.consumer.handling.calls import CallFailedError, Calls
from edgebroker.consumer.handling.errors import described, text_of
from edgebroker.consumer.views import View, Views

MOST_REASON = 1000
# Takes rows of a view, as the table has them, and deletions: (key, partition, offset). Raises NotStorableError.
Put = Callable[[list[Row], list[Row]], None]
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Portion(NamedTuple):
    """Records of one partition, in order; `attempt` is how often the first one is tried with this."""

    key: TopicPartition
    records: Sequence[Record]
    attempt: int = 1


class Changed(NamedTuple):
    """Rows of a view that were set, as the table has them, and keys that were deleted, with partition and offset."""

    topic: str
    rows: list[Row]
    deleted: list[Row]


class Observer(Protocol):
    """Who is told what readers of the views see anew. Called in the thread of run(); must not wait."""

    def published(self, topic: str, rows: Sequence[Row], deleted: Sequence[Row]) -> None:
        """Rows were set, as the table has them, and keys deleted: (key, partition, offset)."""

    def reset(self, topic: str) -> None:
        """A topic was loaded again."""


class DeadNow(NamedTuple):
    """A record that is given up after so many attempts, and why."""

    record: Record
    attempts: int
    why: str


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
        super().__init__(text_of(error))
        self.portion, self.before, self.handler, self.error = portion, before, handler, error

    @property
    def record(self) -> Record:
        return self.portion.records[self.before]

    @property
    def why(self) -> str:
        if isinstance(self.error, HopelessError):
            return str(self.error)
        return described(self.error)

    def is_final(self, attempts: int) -> bool:
        """Is there no attempt after so many?"""
        policy = self.handler.policy
        if isinstance(self.error, HopelessError):
            return True
        return attempts >= policy.max_attempts or not isinstance(self.error, policy.retry_on)


class Effect:
    """Of one topic. Belongs to the thread of the database."""

    def __init__(
        self, topic: Topic, database: AppDatabase, views: Views, calls: Calls, wall_ms: Callable[[], int]
    ) -> None:
        self._topic, self._database, self._views = topic, database, views
        self._calls, self._wall_ms = calls, wall_ms
        # The generation that readers see.
        self.view: View | None = None
        if topic.view is not None:
            self.view = views.open(topic.name, topic.view, topic.version)
        self.handles = bool(topic.handlers)
        # Partitions that are loaded again: how far handlers are; with a target of -1: which refresh was the last one.
        self.loading: dict[int, Loading] = database.loading(topic.name)
        self._decode: Callable[[bytes], Any] | None = None
        if topic.view is not None:
            self._decode, self._row = msgspec.json.Decoder(topic.view.kind).decode, topic.view.row

    @property
    def stale(self) -> bool:
        """Has the view other columns or another version than the application declares, for now? Any thread."""
        return self.view is not None and self.view.stale

    def apply(
        self, portion: Portion, changed: list[Changed] | None = None, given_up: Container[int] = frozenset()
    ) -> None:
        """Within a transaction; what readers of the view see of it is added to `changed`. Records at the offsets
        `given_up` go into the view only. Raises FailedRecord, and what the database raises when nothing can be
        stored."""
        records = portion.records
        if self.view is not None and not self.stale:
            view, dead = self.view, list[DeadNow]()
            rows = self._rows(
                records, dead, lambda rows, gone: self._views.put(view, rows, [(one[0],) for one in gone])
            )
            if changed is not None:
                changed += [Changed(self._topic.name, *one) for one in rows]
            for one in dead:
                self.bury(*one)
            records = _without(records, {one.record.offset for one in dead})
        self.handle(portion, records, given_up)

    def handle(self, portion: Portion, records: Sequence[Record], given_up: Container[int] = frozenset()) -> None:
        """Have handlers handle records of a portion, within a transaction. Raises FailedRecord."""
        if given_up:
            records = [record for record in records if record.offset not in given_up]
        for handler in self._topic.handlers:
            self._call_all(handler, portion, records)

    def stage(self, records: Sequence[Record], put: Put) -> list[DeadNow]:
        """Give the rows of records to a staging file; the records that have none."""
        dead = list[DeadNow]()
        self._rows(records, dead, put)
        return dead

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

    def apply_again(self, dead: DeadRecord, changed: list[Changed]) -> None:
        """The effect of a record that was given up, within a transaction; its row of the view only if that has no later
        record, added to `changed` then. Raises FailedRecord."""
        headers = msgspec.json.decode(dead.headers, type=tuple[tuple[str, bytes | None], ...])
        record = ReplayedRecord(*dead[:3], dead.timestamp, dead.key, dead.value, headers)
        portion = Portion(TopicPartition(dead.topic, dead.partition), [cast("Record", record)])
        if self.view is None or dead.key is None or self._views.offset_of(self.view, _key_of(dead.key)) <= dead.offset:
            self.apply(portion, changed)
        else:
            self.handle(portion, portion.records)

    # ---- the view ----

    def _rows(self, records: Sequence[Record], dead: list[DeadNow], put: Put) -> list[tuple[list[Row], list[Row]]]:
        """Put the latest row of each key, and the deletions; what was put. Records that have no row are added to
        `dead`."""
        latest: dict[str | bytes, Row] = {}
        gone: dict[str | bytes, Row] = {}
        decode, row, partition = self._decode, self._row, records[0].partition if records else 0
        assert decode is not None
        for record in records:
            raw, value = record.key, record.value
            if raw is None:
                dead.append(DeadNow(record, 1, "a record without a key has no place in a view"))
                continue
            key = _key_of(raw)
            if value is None:
                latest.pop(key, None)
                gone[key] = (key, partition, record.offset)
                continue
            if gone:
                gone.pop(key, None)
            try:
                latest[key] = (key, *row(decode(value)), partition, record.offset, record.timestamp)
            except Exception as error:  # also what a type of theirs raises
                dead.append(DeadNow(record, 1, f"the value is not as expected: {_why(error)}"))
        rows, deleted = list(latest.values()), list(gone.values())
        try:
            put(rows, deleted)
        except NotStorableError as error:
            good = _without(records, {one.record.offset for one in dead})
            if len(good) > 1:  # find out which
                return [one for record in good for one in self._rows([record], dead, put)]
            dead += [DeadNow(record, 1, f"the value cannot be stored: {error}") for record in good]
            return []
        return [(rows, deleted)]

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
        whole = decode is whole_record
        for record in records:
            try:
                values.append(decode(record) if whole or record.value is not None else None)
            except Exception as error:
                why = f"the value is not as expected: {_why(error)}"
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


def _why(error: Exception) -> str:
    return text_of(error) if isinstance(error, _UNDECODABLE) else described(error)


def _without(records: Sequence[Record], offsets: Container[int]) -> Sequence[Record]:
    return [record for record in records if record.offset not in offsets] if offsets else records


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
