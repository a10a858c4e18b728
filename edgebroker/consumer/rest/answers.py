"""What requests and answers of the REST interface look like: the structs of which the document is made, too."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from edgebroker.common.outcome import Outcome
from edgebroker.consumer.declare.routes import HttpError

MOST_KEYS, MOST_ROWS = 500, 1000


class AsOf(Struct):
    """How current an answer is: everything before these offsets of the partitions is in it, and nothing else. `age_ms`:
    how long ago the broker last said that there was no more; null: not since the application started."""

    offsets: dict[str, int]
    age_ms: int | None


class Latest(Struct):
    """The latest record of a key. A key that is no text is null here, and in base64 in `key_bytes`."""

    key: str | None
    value: Any
    partition: int
    offset: int
    timestamp: int
    key_bytes: bytes | None = None


class LatestAnswer(Struct):
    record: Latest
    as_of: AsOf


class LatestPage(Struct):
    """`next`: the cursor of the next page; null behind the last one."""

    records: list[Latest]
    next: str | None
    as_of: AsOf


class Basket(Struct, forbid_unknown_fields=True):
    keys: Annotated[list[str], Meta(min_length=1, max_length=MOST_KEYS)]


class BasketAnswer(Struct):
    """The records of one moment. `missing`: keys that have none."""

    records: list[Latest]
    missing: list[str]
    as_of: AsOf


class PartitionProgress(Struct):
    """`next_offset`: everything before is stored; `end`: where the broker's log ended when it last said so."""

    partition: int
    next_offset: int
    end: int | None
    loading: bool


class TopicProgress(Struct):
    name: str
    scope: str
    view: str | None
    age_ms: int | None
    partitions: list[PartitionProgress]


class CopyProgress(Struct):
    """The copy of topics: its size, what was received and is not stored yet, and why nothing is stored any more ("":
    it is)."""

    bytes: int
    backlog_bytes: int
    problem: str


class Stats(Struct):
    """What the application has, and what is going on. `silent_seconds`: since the broker was last heard; null while it
    is not connected. `copy`: null when none is kept."""

    name: str
    node: str
    version: str
    ready: bool
    silent_seconds: float | None
    records: int
    failures: int
    late_calls: int
    waiting_partitions: int
    dead_records: int
    outbox_records: int
    wal_bytes: int
    copy: CopyProgress | None
    topics: list[TopicProgress]


class Running(Struct):
    status: str = "running"


class Readiness(Struct):
    """`status`: ready, degraded (it answers from what it has, and the broker is away), or not ready; and why."""

    status: str
    why: list[str]


class GivenUp(Struct):
    """A record that was given up. What is no UTF-8 is null in `key` or `value`, and in base64 in `key_bytes` or
    `value_bytes`."""

    topic: str
    partition: int
    offset: int
    key: str | None
    value: str | None
    attempts: int
    reason: str
    at_ms: int
    key_bytes: bytes | None = None
    value_bytes: bytes | None = None


class DeadPage(Struct):
    records: list[GivenUp]
    next: str | None


class Message(Struct):
    """A record as it was published. What is no UTF-8 is null in `key` or `value`, and in base64 in `key_bytes` or
    `value_bytes`; headers are pairs of a name and a value in base64."""

    partition: int
    offset: int
    timestamp: int
    key: str | None
    value: str | None
    headers: list[tuple[str, bytes | None]]
    key_bytes: bytes | None = None
    value_bytes: bytes | None = None


class Missing(Struct):
    """Offsets [first, next) of a partition that the copy does not have."""

    partition: int
    first: int
    next: int


class MessagePage(Struct):
    """`next`: the cursor of the next page, which may be there when this one has no records: so much was searched;
    null behind the last one."""

    records: list[Message]
    missing: list[Missing]
    next: str | None
    as_of: AsOf


class CopiedSegment(Struct):
    """A file of the copy: the first offset in it; a sealed one grows no more."""

    topic: str
    partition: int
    first: int
    bytes: int
    sealed: bool


class SegmentPage(Struct):
    segments: list[CopiedSegment]
    next: str | None


class ResetRequest(Struct, forbid_unknown_fields=True):
    """A topic that is to be loaded again."""

    topic: str


def text_or_bytes(data: bytes | str | None) -> tuple[str | None, bytes | None]:
    """Stored bytes as text if they are that, else as bytes."""
    if data is None or isinstance(data, str):
        return data, None
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        return None, data


def cursor_of(key: str | bytes) -> str:
    """The cursor of a page that begins behind a key."""
    data = b"t" + key.encode() if isinstance(key, str) else b"b" + key
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def after_cursor(cursor: str) -> str | bytes:
    """The key of a cursor. Raises HttpError."""
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True)
        return data[1:].decode() if data[:1] == b"t" else data[data.index(b"b") + 1 :]
    except (binascii.Error, UnicodeError, ValueError):
        raise no_cursor() from None


def no_cursor() -> HttpError:
    return HttpError(Outcome.INVALID.status, "this is not a cursor of a page; begin without one")


def problem(status: int, phrase: str, detail: str, code: str) -> bytes:
    """An error as RFC 9457 has it."""
    found = {"type": "about:blank", "title": phrase, "status": status, "detail": detail}
    if code:
        found["code"] = code
    return msgspec.json.encode(found) + b"\n"
