"""The description of the REST interface as OpenAPI 3.1, made from the routes and the structs of requests and answers.

A path that names a topic stands there once for each view, with the columns of that view.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct, defstruct

from edgebroker.consumer.database import view_name
from edgebroker.consumer.declare.application import UserRoute
from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.rest.answers import MOST_ROWS, AsOf, BasketAnswer, LatestAnswer, LatestPage
from edgebroker.consumer.rest.history import MessageQuery
from edgebroker.consumer.rest.routes import ROWS
from edgebroker.network.http.router import Route
from edgebroker.version import __version__

_PART = re.compile(r"\{([^{}]+)\}")
_CURSOR = {"name": "cursor", "in": "query", "description": "`next` of the page before", "schema": {"type": "string"}}
_LIMIT = {
    "name": "limit",
    "in": "query",
    "description": "rows of a page at most",
    "schema": {"type": "integer", "minimum": 1, "maximum": MOST_ROWS, "default": ROWS},
}
_TEXT = {"type": "string"}
# What is asked of /v1/messages.
_MESSAGES = {
    "topic": "the topic",
    "partition": "only this partition",
    "from": "from this offset on",
    "to": "before this offset",
    "from_time": "not older than this: milliseconds since 1970, or 2026-11-30T12:00:00Z",
    "to_time": "older than this",
    "key": "only records with this key",
    "limit": "records of a page at most",
    "cursor": "`next` of the page before",
    "format": "json, or ndjson: a record on each line, and `next` in the header edgebroker-next",
}


def _query() -> list[dict[str, Any]]:
    return [
        {
            "name": field.encode_name,
            "in": "query",
            "description": _MESSAGES[field.encode_name],
            "required": field.required,
            "schema": msgspec.json.schema(field.type),
        }
        for field in msgspec.structs.fields(MessageQuery)
    ]


# What the kit's own routes take beside the parts of their paths, and what they are for.
_ABOUT: dict[tuple[str, str], tuple[str, list[dict[str, Any]]]] = {
    ("GET", "/healthz"): ("Is the process alive?", []),
    ("GET", "/readyz"): ("Is everything there that was published when it began?", []),
    ("GET", "/metrics"): ("Numbers for Prometheus", []),
    ("GET", "/v1/stats"): ("What the application has, and what is going on", []),
    ("GET", "/v1/latest/{topic}/{key}"): ("The latest record of a key", []),
    ("GET", "/v1/latest/{topic}"): (
        "The latest records in the order of their keys",
        [{"name": "prefix", "in": "query", "description": "only keys that begin so", "schema": _TEXT}, _LIMIT, _CURSOR],
    ),
    ("POST", "/v1/latest/{topic}"): ("The latest records of several keys, of one moment", []),
    ("GET", "/v1/changes/{topic}"): (
        "Changes as they are stored, as server-sent events",
        [{"name": "Last-Event-ID", "in": "header", "description": "go on behind this event", "schema": _TEXT}],
    ),
    ("GET", "/v1/messages"): ("What was published of a topic, as far as the copy has it", _query()),
    ("GET", "/v1/segments"): (
        "The files of the copy",
        [{"name": "topic", "in": "query", "description": "only those of this topic", "schema": _TEXT}, _LIMIT, _CURSOR],
    ),
    ("GET", "/v1/dead"): (
        "Records that were given up",
        [{"name": "topic", "in": "query", "description": "only those of this topic", "schema": _TEXT}, _LIMIT, _CURSOR],
    ),
    ("POST", "/v1/dead/{topic}/{partition}/{offset}/replay"): ("Handle a record once more that was given up", []),
    ("DELETE", "/v1/dead/{topic}/{partition}/{offset}"): ("Keep a record no longer that was given up", []),
    ("POST", "/v1/activate"): ("Show topics that were loaded again and wait for it", []),
    ("POST", "/v1/reset"): ("Have a topic loaded again", []),
}
_OTHER_TYPES = {"/metrics": "text/plain", "/v1/changes/{topic}": "text/event-stream"}
_NUMBERS = ("partition", "offset")


class Problem(Struct):
    """An error (RFC 9457): `detail` says what is wrong and what to do."""

    type: str
    title: str
    status: int
    detail: str
    code: str = ""


def document(
    name: str, routes: Sequence[Route], functions: Sequence[UserRoute], views: Mapping[str, Columns]
) -> dict[str, Any]:
    """The whole document, to be encoded as JSON."""
    typed = {topic: _typed(view_name(topic), columns) for topic, columns in views.items()}
    kinds = [kind for kinds in typed.values() for kind in kinds.values()]
    kinds += [kind for route in routes for kind in (route.response, route.request) if _has_schema(kind)]
    answers = [one.note.answer for one in functions if _has_schema(one.note.answer)]
    schemas, components = msgspec.json.schema_components(
        [*dict.fromkeys([*kinds, *answers, Problem])], ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(dict.fromkeys([*kinds, *answers, Problem]), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        about = _ABOUT.get((route.method, route.path))
        if about is None:
            continue
        if "{topic}" in route.path and not route.path.startswith("/v1/dead"):
            for topic in views:
                path = route.path.replace("{topic}", topic)
                response = typed[topic].get(route.response)
                paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, about, response, schema_of)
        else:
            operation = _operation(route, route.path, about, route.response, schema_of)
            paths.setdefault(route.path, {})[route.method.lower()] = operation
    for one in functions:
        paths.setdefault(one.note.path, {})[one.note.method.lower()] = _function(one, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": name, "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _typed(name: str, columns: Columns) -> dict[Any, Any]:
    """The answers about a view, with the type of its values."""
    record = defstruct(
        f"{name}_record",
        [
            ("key", str | None), ("value", columns.kind), ("partition", int), ("offset", int), ("timestamp", int),
            ("key_bytes", bytes | None, None),
        ],
    )  # fmt: skip
    return {
        LatestAnswer: defstruct(f"{name}_answer", [("record", record), ("as_of", AsOf)]),
        LatestPage: defstruct(f"{name}_page", [("records", list[record]), ("next", str | None), ("as_of", AsOf)]),  # type: ignore[valid-type]
        BasketAnswer: defstruct(
            f"{name}_basket",
            [("records", list[record]), ("missing", list[str]), ("as_of", AsOf)],  # type: ignore[valid-type]
        ),
    }


def _has_schema(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def _operation(
    route: Route, path: str, about: tuple[str, list[dict[str, Any]]], response: Any, schema_of: dict[Any, Any]
) -> dict[str, Any]:
    summary, parameters = about
    parts = [
        {"name": part, "in": "path", "required": True, "schema": {"type": "integer"} if part in _NUMBERS else _TEXT}
        for part in _PART.findall(path)
    ]
    kind = _OTHER_TYPES.get(route.path, "application/json")
    schema = schema_of.get(response, _TEXT)
    found: dict[str, Any] = {"summary": summary, "parameters": [*parts, *parameters]}
    if route.request is not None:
        found["requestBody"] = _body(schema_of[route.request])
    found["responses"] = _responses(kind, schema, schema_of)
    return found


def _function(one: UserRoute, schema_of: dict[Any, Any]) -> dict[str, Any]:
    parameters = [
        {
            "name": parameter.name,
            "in": parameter.where,
            "required": parameter.required,
            "schema": msgspec.json.schema(parameter.kind),
        }
        for parameter in one.note.parameters
        if parameter.where in ("path", "query")
    ]
    summary = (one.call.__doc__ or one.call.__name__).strip().split("\n")[0]
    found: dict[str, Any] = {"summary": summary, "parameters": parameters}
    for parameter in one.note.parameters:
        if parameter.where == "body":
            found["requestBody"] = _body(schema_of.get(parameter.kind, {"type": "object"}))
    found["responses"] = _responses("application/json", schema_of.get(one.note.answer, {}), schema_of)
    return found


def _body(schema: Any) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _responses(kind: str, schema: Any, schema_of: dict[Any, Any]) -> dict[str, Any]:
    return {
        "200": {"description": "the answer", "content": {kind: {"schema": schema}}},
        "default": {
            "description": "what is wrong",
            "content": {"application/problem+json": {"schema": schema_of[Problem]}},
        },
    }
