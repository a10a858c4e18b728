"""Requests that fit: a body for every route, made from the struct that the router takes it for.

A route that is added has its bodies by that alone. What a field means is known by its name.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any, NamedTuple
from unittest.mock import MagicMock

from msgspec import inspect

from edgebroker.broker.admin.routes import pipe_routes, routes
from edgebroker.common.types import TopicSettings
from edgebroker.network.http.router import Route
from edgebroker.pipe.report import Report
from edgebroker.pipe.stream import Poll, SamePoll
from tests.fuzz.live.mutation import Pairs, Verbatim, written
from tests.fuzz.live.node import LOG, NODE, SNAPSHOT, TABLE

FOR_NODES = pipe_routes(MagicMock())
ROUTES = [*routes(MagicMock(), MagicMock()), *FOR_NODES]  # only the rows are looked at
# What these take, the router does not know.
TAKEN: dict[str, list[Any]] = {"/v1/pipe": [Poll, Poll, SamePoll], "/v1/topics/{name}": [TopicSettings]}
WITH_BODY = [route for route in ROUTES if route.request is not None or route.path == "/v1/pipe"]
CHILD, OTHER = "c1" * 16, "c2" * 16
NAMES = ["t", "t", "t", "table", "u", "missing", "t.dlq", "g", "deleted-1", "mirrored-0"]
ADDRESS = "127.0.0.1:00001"  # nobody listens there; as long as one with a free port
WORDS: dict[str, list[str]] = {
    "topic": NAMES,
    "name": NAMES,
    "group": ["g", "g", "", "missing"],
    "log_id": [LOG, LOG, TABLE],
    "uid": [CHILD, CHILD, OTHER, NODE],
    "sender": [CHILD, CHILD, OTHER],
    "node": [CHILD, "child", OTHER],
    "parent": [NODE, CHILD, ""],
    "path": [NODE, OTHER],
    "level": ["l2", "l2", "local", "root"],
    "to": ["earliest", "latest", "3", "@1000"],
    "hours": ["", "", "01:00-02:00"],
    "topics": ["*", "t", "t*", "[!x]*"],
    "address": [ADDRESS],
    "source": [ADDRESS],
    "candidates": [ADDRESS],
    "session": ["s"],
    "client_id": ["__snapshot-1", "raw"],
    "state": ["waiting", "done", "failed"],
    "version": ["0.1.0"],
    "id": [OTHER, SNAPSHOT, SNAPSHOT],
}
KEYS = ["after", "topic", "group", "end", "mirrored", "label", "level", "format", "limit", "name"]
NUMBERS = [0, 0, 0, 1, 2, 5, 10, 15]
FIELDS = {
    "number": [0, 0, 0, 1],
    "version": [1],
    "partition": [0, 0, 0, 1, -1],
    "partitions": [1, 1, 3],
    "segment_bytes": [0, 1 << 16],
    "replicas": [1, 1, 2],
}


type_info = cache(inspect.type_info)


class Made(NamedTuple):
    """A request without its head. The body is "" for a route that takes none."""

    method: str
    target: str
    body: Any


def made(random: Random, route: Route) -> Made:
    """A request for a route."""
    parts = [random.choice(WORDS.get(part[1:-1], NAMES)) if part[:1] == "{" else part for part in route.path.split("/")]
    if route not in WITH_BODY:
        return Made(route.method, "/".join(parts), "")
    kind = random.choice(TAKEN.get(route.path, [route.request]))
    return Made(route.method, "/".join(parts), sample(random, type_info(kind)))


def posted(method: str, target: str, body: bytes) -> bytes:
    """A whole request."""
    head = f"{method} {target} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def query(random: Random) -> str:
    """A query string: one of those that are expected, or another one."""
    if random.random() < 0.3:
        return "?topic=t&end=0:5" + random.choice(("", "&group=g", "&mirrored=1", "&level=root", "&end=1:0"))
    values = ["", "t", "0:5", "0:999999999999", "g", "%00", "%ff", "a=b", "9" * 5000, "-1:-1", CHILD, "x,y", "%", "+"]
    return "?" + "&".join(f"{random.choice(KEYS)}={random.choice(values)}" for _ in range(random.randrange(4)))


def sample(random: Random, kind: Any, name: str = "") -> Any:
    """A value of a type, as mutation.written() takes it."""
    match kind:
        case inspect.StructType() | inspect.NamedTupleType() if getattr(kind, "array_like", True):
            return [sample(random, field.type, field.name) for field in kind.fields]
        case inspect.StructType():
            fields = [field for field in kind.fields if field.required or random.random() < 0.4]
            found = [(field.encode_name, sample(random, field.type, field.name)) for field in fields]
            return Pairs([*found, *([(kind.tag_field, kind.tag)] if kind.tag_field is not None else [])])
        case inspect.UnionType():
            return sample(random, random.choice(kind.types), name)
        case inspect.ListType() | inspect.VarTupleType():
            return [sample(random, kind.item_type, name) for _ in range(random.choice((1, 1, 0, 2, 3)))]
        case inspect.TupleType():
            return [sample(random, one, name) for one in kind.item_types]
        case inspect.DictType():
            return Pairs(
                (sample(random, kind.key_type, "name"), sample(random, kind.value_type))
                for _ in range(random.choice((0, 1, 2)))
            )
        case inspect.LiteralType():
            return random.choice(kind.values)
        case inspect.EnumType():
            return random.choice(list(kind.cls)).value
        case inspect.StrType():
            return _text(random, kind, name)
        case inspect.IntType() | inspect.FloatType():
            least = kind.ge if kind.ge is not None else 0
            return max(int(least), random.choice(FIELDS.get(name, NUMBERS)))
        case inspect.BoolType():
            return random.random() < 0.3
        case inspect.BytesType():
            return "AAAA"
        case inspect.RawType():
            return Verbatim(written(sample(random, type_info(Report))))
        case inspect.NoneType():
            return None
    return random.choice(("t", 1))


def _text(random: Random, kind: inspect.StrType, name: str) -> str:
    pattern = kind.pattern or ""
    if "{16}" in pattern:
        return "ab" * 8
    if "root|" in pattern:
        return "l2"
    words = WORDS.get(name, ["word"])
    return (
        random.choice([word for word in words if len(word) == 32] or [CHILD])
        if "{32}" in pattern
        else random.choice(words)
    )
