"""What the views of an application have: the latest record of a key, of many keys, and of keys in order.

An answer is of one moment, which its as-of names. Pages are bounded by rows and by bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgebroker.consumer.database import view_name
from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.declare.routes import HttpError
from edgebroker.consumer.reader import Reader
from edgebroker.consumer.rest.answers import (
    AsOf,
    BasketAnswer,
    DeadPage,
    GivenUp,
    Latest,
    LatestAnswer,
    LatestPage,
    after_cursor,
    cursor_of,
    no_cursor,
    text_or_bytes,
)

MOST_PAGE_BYTES = 1 << 20
LAST_CHARACTER = "\U0010ffff"


class LookUps:
    """`age_ms` tells how old what is stored of a topic may be, `is_stale` whether its view has other columns than the
    application declares, for now. Every method may be called by any thread, with its own reader. Raises HttpError, and
    sqlite3.Error."""

    def __init__(
        self,
        views: Mapping[str, Columns],
        age_ms: Callable[[str], int | None],
        is_stale: Callable[[str], bool],
    ) -> None:
        self._views, self._age_ms, self._is_stale = views, age_ms, is_stale
        # One statement is of one moment, and for keys that are there it is all that is needed.
        position = "(SELECT next_offset FROM _position WHERE topic=? AND partition=_partition)"
        self._with_position = {
            topic: f"{_select(topic, columns, position)} WHERE key=?" for topic, columns in views.items()
        }
        self._one = {topic: f"{_select(topic, columns)} WHERE key=?" for topic, columns in views.items()}

    def latest(self, reader: Reader, topic: str, key: str) -> LatestAnswer:
        """The latest record of a key."""
        self._check(topic)
        rows = reader.rows(self._with_position[topic], (topic, key))
        if rows:
            *row, offset = rows[0]
            record = self._record(topic, row)
            return LatestAnswer(record, AsOf({str(record.partition): offset or 0}, self._age_ms(topic)))
        with reader.at_one_moment():
            rows, as_of = reader.rows(self._one[topic], (key,)), self._as_of(reader, topic)
        if rows:  # it came this moment
            return LatestAnswer(self._record(topic, rows[0]), as_of)
        raise HttpError(404, f"topic {topic} has no key {key} as of {_spelled(as_of)}")

    def basket(self, reader: Reader, topic: str, keys: Sequence[str]) -> BasketAnswer:
        """The latest records of several keys, all of one moment."""
        self._check(topic)
        sql = self._one[topic]
        records, missing = list[Latest](), list[str]()
        with reader.at_one_moment():
            for key in dict.fromkeys(keys):
                rows = reader.rows(sql, (key,))
                if rows:
                    records.append(self._record(topic, rows[0]))
                else:
                    missing.append(key)
            return BasketAnswer(records, missing, self._as_of(reader, topic))

    def page(self, reader: Reader, topic: str, prefix: str, after: str, limit: int) -> LatestPage:
        """Records in the order of their keys, behind a cursor."""
        self._check(topic)
        where, bounds = ("key>?", [after_cursor(after)]) if after else ("key>=?", [prefix])
        if prefix:
            where, bounds = f"{where} AND key<?", [*bounds, prefix + LAST_CHARACTER]
        sql = f"{_select(topic, self._views[topic])} WHERE {where} ORDER BY key"
        records, size, more = list[Latest](), 0, False
        with reader.at_one_moment():
            for row in reader.each(sql, bounds):
                if len(records) == limit or size >= MOST_PAGE_BYTES:
                    more = True
                    break
                records.append(self._record(topic, row))
                size += sum(len(column) for column in row if isinstance(column, str | bytes)) + 100
                last = row[0]
            as_of = self._as_of(reader, topic)
        return LatestPage(records, cursor_of(last) if more else None, as_of)

    def _record(self, topic: str, row: Sequence[Any]) -> Latest:
        key, data = text_or_bytes(row[0])
        partition, offset, timestamp = row[-3:]
        return Latest(key, self._views[topic].value(row[1:-3]), partition, offset, timestamp, data)

    def _as_of(self, reader: Reader, topic: str) -> AsOf:
        """Of all partitions."""
        rows = reader.rows("SELECT partition, next_offset FROM _position WHERE topic=?", (topic,))
        return AsOf({str(number): offset for number, offset in rows}, self._age_ms(topic))

    def _check(self, topic: str) -> None:
        if topic not in self._views:
            names = ", ".join(self._views) or "none"
            raise HttpError(404, f"this application has no view of {topic}; it has views of {names}")
        if self._is_stale(topic):
            raise HttpError(503, f"the view of {topic} has other columns; it is being loaded for these")


def dead_page(reader: Reader, topic: str, after: str, limit: int) -> DeadPage:
    """Records that were given up, of one topic or of all (""). Raises HttpError."""
    behind: tuple[str, int, int] = ("", -1, -1)
    if after:
        name, _, rest = str(after_cursor(after)).partition(" ")
        partition, _, offset = rest.partition(" ")
        try:
            behind = (name, int(partition[:18]), int(offset[:18]))
        except ValueError:
            raise no_cursor() from None
    rows = reader.rows(
        'SELECT topic, partition, "offset", key, value, attempts, reason, at_ms FROM _dead '
        "WHERE (topic, partition, \"offset\") > (?,?,?) AND (?='' OR topic=?) "
        'ORDER BY topic, partition, "offset" LIMIT ?',
        (*behind, topic, topic, limit + 1),
    )
    records, size = list[GivenUp](), 0
    for name, partition, offset, key, value, attempts, reason, at_ms in rows[:limit]:
        key_text, key_bytes = text_or_bytes(key)
        value_text, value_bytes = text_or_bytes(value)
        records.append(
            GivenUp(name, partition, offset, key_text, value_text, attempts, reason, at_ms, key_bytes, value_bytes)
        )
        size += len(value or b"")
        if size >= MOST_PAGE_BYTES:
            break
    more = len(records) < len(rows)
    last = records[-1] if records else None
    return DeadPage(records, cursor_of(f"{last.topic} {last.partition} {last.offset}") if more and last else None)


def _select(topic: str, columns: Columns, more: str = "") -> str:
    last = f", {more}" if more else ""
    return f'SELECT {columns.selected}{last} FROM "{view_name(topic)}"'


def _spelled(as_of: AsOf) -> str:
    offsets = ", ".join(f"{partition}: {offset}" for partition, offset in as_of.offsets.items())
    return f"partitions {offsets}" if offsets else "nothing yet"
