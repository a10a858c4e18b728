"""What requests and answers of the REST interface look like: the structs of which the document is made, too."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

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


class Stats(Struct):
    """What the application has, and what is going on. `silent_seconds`: since the broker was last heard; null while it
    is not connected."""

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


def problem(status: int, phrase: str, detail: str, code: str) -> bytes:
    """An error as RFC 9457 has it."""
    found = {"type": "about:blank", "title": phrase, "status": status, "detail": detail}
    if code:
        found["code"] = code
    return msgspec.json.encode(found) + b"\n"
