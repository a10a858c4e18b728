"""What was published of a topic, as far as the copy has it: a page of records, and the files that they are in.

A page is bounded by its records, by their bytes and by the bytes that are searched for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from edgebroker.common.outcome import Outcome
from edgebroker.common.records import Record
from edgebroker.common.types import TopicPartition
from edgebroker.consumer.copy.copy_reader import CopyReader, CopyUnreadableError
from edgebroker.consumer.declare.routes import HttpError
from edgebroker.consumer.rest.answers import (
    MOST_ROWS,
    AsOf,
    CopiedSegment,
    Message,
    MessagePage,
    Missing,
    SegmentPage,
    after_cursor,
    cursor_of,
    no_cursor,
    text_or_bytes,
)
from edgebroker.network.http.server import Response

if TYPE_CHECKING:
    from edgebroker.consumer.copy.segment_copy import CopiedPartition

MOST_PAGE_BYTES, PIECE_BYTES, MOST_SEARCHED_BYTES = 1 << 20, 256 << 10, 16 << 20
NDJSON = "application/x-ndjson"
_Offset = Annotated[int, Meta(ge=0, lt=1 << 62)]


class MessageQuery(
    Struct, frozen=True, rename={"first": "from", "end": "to", "since": "from_time", "until": "to_time"}
):
    """Which records: [from, to) of the offsets, [from_time, to_time) of the times: milliseconds since 1970, or as
    2026-11-30T12:00:00Z."""

    topic: str
    partition: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    first: _Offset = 0
    end: _Offset = (1 << 62) - 1
    since: str = ""
    until: str = ""
    key: str | None = None
    limit: Annotated[int, Meta(ge=1, le=MOST_ROWS)] = 100
    cursor: str = ""
    format: Literal["json", "ndjson"] = "json"


def message_query(found: Mapping[str, str]) -> MessageQuery:
    """The query of a request. Raises HttpError."""
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(MessageQuery)}
    values = {}
    for name, text in found.items():
        if name not in fields:
            raise _invalid(f"there is no {name[:40]}; a query has {', '.join(fields)}")
        try:
            values[name] = msgspec.convert(text, fields[name], strict=False)
        except msgspec.ValidationError as error:
            raise _invalid(f"{name}={text[:40]!r}: {error}") from None
    if "topic" not in values:
        raise _invalid("which topic? /v1/messages?topic=NAME")
    return msgspec.convert(values, MessageQuery)


class History:
    """Any thread but the loop's. `age_ms` tells how old what is stored of a topic may be; without `reader` there is no
    copy. Raises HttpError."""

    def __init__(self, reader: CopyReader | None, topics: Iterable[str], age_ms: Callable[[str], int | None]) -> None:
        self._reader, self._topics, self._age_ms = reader, list(topics), age_ms

    def page(self, query: MessageQuery) -> MessagePage:
        """Records in the order of partitions and offsets, behind the cursor of the query."""
        reader = self._copy()
        self._check(query.topic)
        logs = {key: one for key, one in sorted(reader.copy.logs().items()) if key.topic == query.topic}
        as_of = AsOf({str(key.partition): one.end for key, one in logs.items()}, self._age_ms(query.topic))
        page, search = MessagePage([], [], None, as_of), _Search(query)
        for key, copied in logs.items():
            if query.partition in (None, key.partition) and key.partition >= search.partition:
                with _readable():
                    page.next = self._search(reader, key, copied, search, page)
                if page.next is not None:
                    break
        return page

    def _search(
        self, reader: CopyReader, key: TopicPartition, copied: CopiedPartition, search: _Search, page: MessagePage
    ) -> str | None:
        """Add what is found in a partition to the page; the cursor of what is left, when that is full."""
        offset, end = search.bounds(reader, key, copied)
        first = search.first(key)
        if first < copied.start:
            page.missing.append(Missing(key.partition, first, min(end, copied.start)))
        while offset < end:
            if search.full(page):
                return cursor_of(f"{key.partition} {offset}")
            piece = reader.read(key, offset, end, PIECE_BYTES)
            if piece.missing:
                page.missing.append(Missing(key.partition, offset, piece.next_offset))
            for record in piece.records:
                if search.full(page):
                    return cursor_of(f"{key.partition} {record.offset}")
                search.add(record, page)
            search.searched += PIECE_BYTES
            offset = piece.next_offset
        return None

    def segments(self, topic: str, after: str, limit: int) -> SegmentPage:
        """The files of the copy, of one topic or of all (""), behind a cursor."""
        reader = self._copy()
        if topic:
            self._check(topic)
        behind = _place(after) if after else ("", -1, -1)
        found = list[CopiedSegment]()
        for key in sorted(reader.copy.logs()):
            if (topic and key.topic != topic) or tuple(key) < behind[:2]:
                continue
            with _readable():
                files = reader.files(key)
            for one in files.segments if files is not None else []:
                segment = CopiedSegment(*key, int(one.file.partition(".")[0]), one.bytes, one.sealed)
                if (*key, segment.first) > behind:
                    found.append(segment)
            if len(found) > limit:
                last = found[limit - 1]
                return SegmentPage(found[:limit], cursor_of(f"{last.topic} {last.partition} {last.first}"))
        return SegmentPage(found, None)

    def _copy(self) -> CopyReader:
        if self._reader is None:
            raise HttpError(
                Outcome.CONFLICT.status,
                'this application keeps no copy of topics: set copy = "on" (EDGEBROKER_APP_COPY=on), or ask the broker '
                "(edgebroker consume)",
            )
        return self._reader

    def _check(self, topic: str) -> None:
        if topic not in self._topics:
            names = ", ".join(self._topics) or "none"
            raise HttpError(404, f"this application has no copy of {topic}; it has copies of {names}")


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except CopyUnreadableError as error:
        raise HttpError(503, f"the copy cannot be read now: {error}; try again in a moment") from None


class _Search:
    """A query on its way: where it begins, and what it has used."""

    def __init__(self, query: MessageQuery) -> None:
        self._query, self._size, self.searched = query, 0, 0
        self._since, self._until = _time("from_time", query.since), _time("to_time", query.until)
        self._key = query.key.encode() if query.key is not None else None
        self.partition = -1
        if query.cursor:
            self.partition, self._after = _numbers(str(after_cursor(query.cursor)))

    def bounds(self, reader: CopyReader, key: TopicPartition, copied: CopiedPartition) -> tuple[int, int]:
        """Between which offsets of a partition it is searched."""
        offset, end = max(copied.start, self._query.first), min(copied.end, self._query.end)
        if key.partition == self.partition:
            offset = max(offset, self._after)
        elif self._since is not None:
            offset = max(offset, reader.offset_at_time(key, self._since))
        return offset, end

    def first(self, key: TopicPartition) -> int:
        """From which offset on a partition was asked for."""
        return self._after if key.partition == self.partition else self._query.first

    def full(self, page: MessagePage) -> bool:
        too_much = self._size >= MOST_PAGE_BYTES or self.searched >= MOST_SEARCHED_BYTES
        return too_much or len(page.records) >= self._query.limit

    def add(self, record: Record, page: MessagePage) -> None:
        """Add a record if it is one of those that are asked for."""
        if self._key is not None and record.key != self._key:
            return
        if self._since is not None and record.timestamp < self._since:
            return
        if self._until is not None and record.timestamp >= self._until:
            return
        key, key_bytes = text_or_bytes(record.key)
        value, value_bytes = text_or_bytes(record.value)
        found = Message(record.partition, record.offset, record.timestamp, key, value, list(record.headers))
        found.key_bytes, found.value_bytes = key_bytes, value_bytes
        page.records.append(found)
        self._size += len(record.key or b"") + len(record.value or b"") + 100


def lines(page: MessagePage) -> Response:
    """A record on each line, as JSON; what a page has besides is in headers."""
    more: dict[str, object] = {"missing": page.missing, "next": page.next, "as-of": page.as_of}
    headers = tuple((f"edgebroker-{name}", msgspec.json.encode(one).decode()) for name, one in more.items())
    return Response(200, msgspec.json.Encoder().encode_lines(page.records), headers, NDJSON)


def _time(name: str, text: str) -> int | None:
    """Milliseconds since 1970. Raises HttpError."""
    if not text:
        return None
    if text.isdecimal() and len(text) < 19:
        return int(text)
    try:
        found = datetime.fromisoformat(text.replace(" ", "+"))
    except ValueError:
        raise _invalid(f"{name}={text[:40]!r}: milliseconds since 1970, or a time as 2026-11-30T12:00:00Z") from None
    return round((found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp() * 1000)


def _place(cursor: str) -> tuple[str, int, int]:
    topic, _, rest = str(after_cursor(cursor)).partition(" ")
    return topic, *_numbers(rest)


def _numbers(text: str) -> tuple[int, int]:
    """The partition and the offset of a cursor. Raises HttpError."""
    texts = text.split(" ")
    if len(texts) != 2 or not all(one.isdecimal() and len(one) < 19 for one in texts):
        raise no_cursor()
    return int(texts[0]), int(texts[1])


def _invalid(why: str) -> HttpError:
    return HttpError(Outcome.INVALID.status, why)
