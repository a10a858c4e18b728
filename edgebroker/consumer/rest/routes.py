"""Every route of an application, one row each; docs/consumer.md says what they do. Functions of the application follow.

A look-up of one key is answered by the loop, which takes it some ten microseconds; pages, baskets and functions are
answered by threads beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import msgspec

from edgebroker.common.outcome import Outcome
from edgebroker.consumer.database import DatabaseError
from edgebroker.consumer.declare.application import UserRoute
from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.declare.routes import HttpError, Query
from edgebroker.consumer.instance import Instance
from edgebroker.consumer.reader import Reader
from edgebroker.consumer.rest.answers import (
    MOST_ROWS,
    Basket,
    BasketAnswer,
    DeadPage,
    LatestAnswer,
    LatestPage,
    MessagePage,
    Readiness,
    ResetRequest,
    Running,
    SegmentPage,
    Stats,
)
from edgebroker.consumer.rest.changes import CONTENT_TYPE, MOST_LISTENERS, ChangeFeed
from edgebroker.consumer.rest.history import History, lines, message_query
from edgebroker.consumer.rest.lookups import LookUps, dead_page
from edgebroker.consumer.rest.metrics import exposition
from edgebroker.consumer.rest.queries import Queries
from edgebroker.network.http.router import Call, Nothing, Route
from edgebroker.network.http.server import Failed, Response

ROWS = 100
_PLACE = ("partition", "offset")
# What SQLite has as a number; -1 is the partition of records of the outbox.
_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Node(Protocol):
    """What the routes know of a running application. stats() may be called by any thread; do() has the worker do
    something, then answers."""

    def stats(self) -> Stats: ...
    def readiness(self) -> Readiness: ...
    def do(self, call: Call, job: Callable[[], tuple[Outcome, str]]) -> None: ...


class Api:
    """Belongs to the loop. `reader` is that of the loop; what `instance` is asked to do is done by the worker."""

    def __init__(
        self,
        node: Node,
        instance: Instance,
        views: Mapping[str, Columns],
        look_ups: LookUps,
        history: History,
        changes: ChangeFeed,
        reader: Reader,
        queries: Queries,
        functions: Queries,
    ) -> None:
        self._node, self._instance, self._views = node, instance, views
        self._look_ups, self._history, self._changes = look_ups, history, changes
        self._reader, self._queries, self._functions = reader, queries, functions

    def routes(self, functions: list[UserRoute]) -> list[Route]:
        """The table. Rights: `health` and `metrics` for monitoring, `view` for what changes nothing, `operate` for what
        changes what is stored; functions have `view` for GET and `operate` for others."""
        found = [
            Route("GET", "/healthz", lambda call: call.answer(Running()), Running, "health"),
            Route("GET", "/readyz", self._ready, Readiness, "health"),
            Route("GET", "/metrics", self._metrics, None, "metrics"),
            Route("GET", "/v1/stats", self._stats, Stats, "view"),
            Route("GET", "/v1/latest/{topic}/{key}", self._latest, LatestAnswer, "view"),
            Route("GET", "/v1/latest/{topic}", self._page, LatestPage, "view"),
            Route("POST", "/v1/latest/{topic}", self._basket, BasketAnswer, "view", Basket),
            Route("GET", "/v1/changes/{topic}", self._listen, None, "view"),
            Route("GET", "/v1/messages", self._messages, MessagePage, "view"),
            Route("GET", "/v1/segments", self._segments, SegmentPage, "view"),
            Route("GET", "/v1/dead", self._dead, DeadPage, "view"),
            Route("POST", "/v1/dead/{topic}/{partition}/{offset}/replay", self._replay, Nothing, "operate"),
            Route("DELETE", "/v1/dead/{topic}/{partition}/{offset}", self._drop, Nothing, "operate"),
            Route("POST", "/v1/activate", self._activate, Nothing, "operate"),
            Route("POST", "/v1/reset", self._reset, Nothing, "operate", ResetRequest),
        ]
        for one in functions:
            right = "view" if one.note.method == "GET" else "operate"
            body = next((parameter.kind for parameter in one.note.parameters if parameter.where == "body"), None)
            handler = partial(self._call, one)
            found.append(Route(one.note.method, one.note.path, handler, None, right, body))
        return found

    def _ready(self, call: Call) -> None:
        readiness = self._node.readiness()
        call.answer(readiness, 503 if readiness.status == "not ready" else 200)

    def _metrics(self, call: Call) -> None:
        self._queries.ask(call, lambda reader: exposition(self._node.stats()))

    def _stats(self, call: Call) -> None:
        self._queries.ask(call, lambda reader: self._node.stats())

    # ---- what is stored ----

    def _latest(self, call: Call) -> None:
        topic, key = call.parameters["topic"], call.parameters["key"]
        try:
            call.answer(self._look_ups.latest(self._reader, topic, key))
        except HttpError as error:
            call.answer(Response(error.status, Failed(str(error))))
        except DatabaseError as error:
            call.refuse(Outcome.READ_ONLY, f"the local database cannot be read: {error}")

    def _page(self, call: Call) -> None:
        limit = _limit(call)
        if limit is not None:
            topic, prefix, after = call.parameters["topic"], _text(call, "prefix"), _text(call, "cursor")
            self._queries.ask(call, lambda reader: self._look_ups.page(reader, topic, prefix, after, limit))

    def _basket(self, call: Call) -> None:
        topic, keys = call.parameters["topic"], call.body.keys
        self._queries.ask(call, lambda reader: self._look_ups.basket(reader, topic, keys))

    def _listen(self, call: Call) -> None:
        topic = call.parameters["topic"]
        if topic not in self._changes:
            names = ", ".join(self._views) or "none"
            call.refuse(Outcome.NOT_FOUND, f"this application has no view of {topic}; it has views of {names}")
        elif self._changes.full:
            call.refuse(Outcome.OVERLOADED, f"{MOST_LISTENERS} programs listen already")
        else:
            headers = (("cache-control", "no-store"),)
            call.answer(Response(200, self._changes.listen(topic, call.last_event_id), headers, CONTENT_TYPE))

    # ---- the copy ----

    def _messages(self, call: Call) -> None:
        try:
            query = message_query({name: values[-1] for name, values in call.query.items()})
        except HttpError as error:
            call.answer(Response(error.status, Failed(str(error))))
            return
        if query.format == "ndjson":
            self._queries.ask(call, lambda reader: lines(self._history.page(query)))
        else:
            self._queries.ask(call, lambda reader: self._history.page(query))

    def _segments(self, call: Call) -> None:
        limit = _limit(call)
        if limit is not None:
            topic, after = _text(call, "topic"), _text(call, "cursor")
            self._queries.ask(call, lambda reader: self._history.segments(topic, after, limit))

    # ---- dead records, and loading again ----

    def _dead(self, call: Call) -> None:
        limit = _limit(call)
        if limit is not None:
            topic, after = _text(call, "topic"), _text(call, "cursor")
            self._queries.ask(call, lambda reader: dead_page(reader, topic, after, limit))

    def _replay(self, call: Call) -> None:
        self._on_dead(call, self._instance.dead_records.replay)

    def _drop(self, call: Call) -> None:
        self._on_dead(call, self._instance.dead_records.drop)

    def _on_dead(self, call: Call, job: Callable[[str, int, int], tuple[Outcome, str]]) -> None:
        topic = call.parameters["topic"]
        texts = [call.parameters[name] for name in _PLACE]
        if not all(map(_NUMBER.fullmatch, texts)):
            call.refuse(Outcome.INVALID, "partition and offset are numbers: /v1/dead/{topic}/{partition}/{offset}")
            return
        partition, offset = map(int, texts)
        self._node.do(call, lambda: job(topic, partition, offset))

    def _reset(self, call: Call) -> None:
        topic = call.body.topic
        self._node.do(call, lambda: self._instance.load_again(topic))

    def _activate(self, call: Call) -> None:
        self._node.do(call, self._instance.activate)

    # ---- functions of the application ----

    def _call(self, function: UserRoute, call: Call) -> None:
        arguments: dict[str, Any] = {}
        for name, where, kind, required in function.note.parameters:
            if where == "body":
                if call.body is None:
                    call.refuse(Outcome.INVALID, "this takes a body, as JSON")
                    return
                arguments[name] = call.body
                continue
            if not where:
                continue
            text = call.parameters.get(name) if where == "path" else _text(call, name) or None
            if text is None:
                if required:
                    call.refuse(Outcome.INVALID, f"the query has no {name}")
                    return
                continue
            try:
                arguments[name] = msgspec.convert(text, kind, strict=False)
            except msgspec.ValidationError as error:
                call.refuse(Outcome.INVALID, f"{name}={text!r}: {error}")
                return
        self._functions.ask(call, lambda reader: _answer_of(function, arguments, reader))


def _answer_of(function: UserRoute, arguments: dict[str, Any], reader: Reader) -> object:
    for name, where, _, _ in function.note.parameters:
        if not where:
            arguments[name] = Query(reader.each)
    with reader.at_one_moment():
        result = function.call(**arguments)
    if result is None:
        if function.note.method == "GET":
            raise HttpError(404, "there is no such thing")
        return Nothing()
    return result


def _text(call: Call, name: str) -> str:
    return call.query.get(name, [""])[-1]


def _limit(call: Call) -> int | None:
    """How many rows a page may have; None: the answer says what is wrong with it."""
    text = _text(call, "limit")
    if text and not (_NUMBER.fullmatch(text) and 1 <= int(text) <= MOST_ROWS):
        call.refuse(Outcome.INVALID, f"limit={text[:20]}: between 1 and {MOST_ROWS}")
        return None
    return int(text) if text else ROWS
