"""A table of routes, and the router that answers for all of them what has nothing to do with any:

    400  the body or the query is not what the route takes          405  another method, with Allow
    401  the token is not known; 403  a right is missing             413  the body is too long (the server, as it comes)
    404  there is no such path                                       415  the body is not JSON

A row says everything about a route: method, path, the structs of request and response, the right, the limit of a body.
Handlers get a Call with the decoded body, and answer with a struct, now or later, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import msgspec

from edgebroker.common import json
from edgebroker.common.errors import Code
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.page import any_page, foreign_name, foreign_page
from edgebroker.network.http.server import MAX_BODY_BYTES, Failed, Reply, Request, Response, Streamed

# What nodes below and monitoring ask for, who find a node by names of theirs. No GET of these may tell what a page must
# not know.
BY_ANY_NAME = ("health", "metrics", "join", "below", "hub", "peer")

# The right of a route that passes a request on to another node, in its last part, {path...}; and that of a route which
# only that node has.
PASSED_ON, UNKNOWN_ROUTE = "via", "admin"
# From node to node to node: so often.
MOST_PASSED_ON = 8

Headers = tuple[tuple[str, str], ...]
Query = dict[str, list[str]]


class Nothing(msgspec.Struct):
    """The answer of what was only to be done: {}."""


class Call:
    """One request, decoded; answered once. `parameters` are the named parts of the path; `peer`: where it came from;
    `identity`: who that is, as far as the connection says."""

    __slots__ = (
        "_reply",
        "body",
        "identity",
        "last_event_id",
        "method",
        "parameters",
        "path",
        "peer",
        "query",
        "raw",
        "target",
    )

    def __init__(self, request: Request, parameters: dict[str, str], body: Any, reply: Reply) -> None:
        self.method, self.target = request.method, request.target
        self.path, _, query = request.target.partition("?")
        self.parameters, self.body, self.raw, self._reply = parameters, body, request.body, reply
        self.peer, self.identity, self.last_event_id = request.peer, request.identity, request.last_event_id
        self.query: Query = parse_qs(query) if query else {}

    def answer(self, body: object, status: int = 200) -> None:
        """Answer with a struct (or a text that is a response of its own)."""
        self._reply(body if isinstance(body, Response) else Response(status, body))

    def stream(self, body: Streamed) -> None:
        """Answer piece by piece."""
        self._reply(Response(200, body))

    def refuse(self, outcome: Outcome, why: str, code: str = "", headers: Headers = ()) -> None:
        """Answer with an error. `code` says it more closely than the outcome does."""
        self._reply(Response(outcome.status, Failed(why, code or outcome.name), headers))

    def done(self, outcome: Outcome, message: str) -> None:
        """A Done: answer with nothing, or with why it was not done."""
        if outcome is Outcome.OK:
            self._reply(Response(200, Nothing()))
        else:
            self.refuse(outcome, message)


class Route(NamedTuple):
    """One row. `path` has named parts in braces: /v1/topics/{name}; a last one with dots, {path...}, is all that is
    left, when no other row matches. `request` is the struct of the body; without one
    the handler gets the body as it came. `response` is the struct of the answer (None: a text or a stream)."""

    method: str
    path: str
    handler: Callable[[Call], None]
    response: type | None
    right: str
    request: Any = None
    body_limit: int = MAX_BODY_BYTES


class _Place:
    """The routes of one path."""

    def __init__(self, parts: list[str]) -> None:
        self.parts = parts
        self.routes: dict[str, Route] = {}

    def match(self, parts: list[str]) -> dict[str, str] | None:
        found = {}
        for mine, theirs in zip(self.parts, parts, strict=True):
            if mine[:1] == "{":
                found[mine[1:-1]] = unquote(theirs)
            elif mine != theirs:
                return None
        return found


class Denial(NamedTuple):
    """Why a request does not have a right. `status` 401: who asks is not known."""

    why: str
    status: int = 403


class Router:
    """`refusal` says why a request does not have a right, None when it has; `names` are those by which this node may be
    called, beside its addresses (in lower case); `done` is told of each request that a handler got, the right that it
    needed, and the status of its answer."""

    def __init__(
        self,
        routes: Sequence[Route],
        refusal: Callable[[Request, str], Denial | None],
        names: Set[str] = frozenset(),
        done: Callable[[Request, str, int], None] = lambda request, right, status: None,
    ) -> None:
        self._refusal, self._names, self._done = refusal, names, done
        # By how many parts they have; -1: the others.
        self._places: dict[int, list[_Place]] = {}
        for route in routes:
            parts = route.path.strip("/").split("/")
            places = self._places.setdefault(-1 if parts[-1].endswith("...}") else len(parts), [])
            place = next((one for one in places if one.parts == parts), None)
            if place is None:
                place = _Place(parts)
                places.append(place)
                places.sort(key=lambda one: "".join("1" if part[:1] == "{" else "0" for part in one.parts))
            place.routes[route.method] = route

    def body_limit(self, method: str, target: str) -> int:
        """How long the body of a request may be."""
        place, _ = self._find(target)
        route = place.routes.get(method) if place is not None else None
        return route.body_limit if route is not None else MAX_BODY_BYTES

    def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request."""
        place, parameters = self._find(request.target)
        if place is None:
            reply(Response(404, Failed(f"there is no {request.target.partition('?')[0]}", Outcome.NOT_FOUND.name)))
            return
        route = place.routes.get("GET" if request.method == "HEAD" else request.method)
        if route is None:
            allow = sorted(place.routes) + (["HEAD"] if "GET" in place.routes else [])
            why = f"{request.method} is not allowed for {request.target.partition('?')[0]}; use {', '.join(allow)}"
            _refuse(reply, 405, why, (("allow", ", ".join(allow)),))
            return
        foreign = foreign_page(request)
        if not foreign:
            foreign = any_page(request) if route.right in BY_ANY_NAME else foreign_name(request, self._names)
        if foreign:
            _refuse(reply, 403, foreign)
            return
        right = self._right(route, parameters)
        missing = self._refusal(request, right)
        if missing is not None:
            headers = (("www-authenticate", "Bearer"),) if missing.status == 401 else ()
            reply(Response(missing.status, Failed(missing.why, Code.UNAUTHORISED.name), headers))
            return
        body: object = None
        if request.body:
            kind = request.content_type.partition(";")[0].strip().lower()
            if kind != "application/json":
                said = f", not {kind}" if kind else "; nothing says so"
                _refuse(reply, 415, f"the body must be JSON (content-type: application/json){said}")
                return
        if route.request is not None:
            try:
                body = json.decode(request.body, route.request)
            except msgspec.DecodeError as error:
                reply(Response(400, Failed(f"the body is not as expected: {error}", Outcome.INVALID.name)))
                return

        def answered(response: Response) -> None:
            self._done(request, right, response.status)
            reply(response)

        route.handler(Call(request, parameters, body, answered))

    def _right(self, route: Route, parameters: dict[str, str]) -> str:
        """What is needed for a route; for one that passes a request on, what that needs where it arrives."""
        right = route.right
        for _ in range(MOST_PASSED_ON):
            if right != PASSED_ON:
                return right
            place, inner = self._find("/" + parameters["path"])
            found = place.routes.get(route.method) if place is not None else None
            right, parameters = (found.right, inner) if found is not None else (UNKNOWN_ROUTE, {})
        return right if right != PASSED_ON else UNKNOWN_ROUTE

    def _find(self, target: str) -> tuple[_Place | None, dict[str, str]]:
        parts = target.partition("?")[0].strip("/").split("/")
        for place in self._places.get(len(parts), ()):
            parameters = place.match(parts)
            if parameters is not None:
                return place, parameters
        for place in self._places.get(-1, ()):
            *first, last = place.parts
            parameters = _Place(first).match(parts[: len(first)]) if len(parts) >= len(first) else None
            if parameters is not None:
                return place, {**parameters, last[1:-4]: unquote("/".join(parts[len(first) :]))}
        return None, {}


def _refuse(reply: Reply, status: int, why: str, headers: Headers = ()) -> None:
    reply(Response(status, Failed(why), headers))
