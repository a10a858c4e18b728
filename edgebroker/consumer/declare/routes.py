"""Routes of an application beside those of the kit: a function answers a request, with what it reads from the database.

    @route("GET", "/price/{code}")
    def price(code: str, query: Query) -> Price | None

A parameter is a part of the path, one of the query string, a Query, or the body: what its name and annotation say.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import msgspec

from edgebroker.consumer.declare.declarations import DeclarationError, add_route, place_of

F = TypeVar("F", bound=Callable[..., Any])

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
OWN = ("v1", "healthz", "readyz", "metrics", "openapi.json")
_PART = re.compile(r"\{([^{}/]+)\}")
_PLAIN = (str, int, float, bool)


class Query:
    """Reads the local database, in a transaction of its own that changes nothing."""

    def __init__(self, each: Callable[[str, Sequence[object]], Iterator[tuple[Any, ...]]]) -> None:
        self._each = each

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a question. Raises sqlite3.Error."""
        return list(self._each(sql, parameters))

    def row(self, sql: str, parameters: Sequence[object] = ()) -> tuple[Any, ...] | None:
        """The first row, None when there is none. Raises sqlite3.Error."""
        return next(iter(self._each(sql, parameters)), None)


class HttpError(Exception):
    """Raised by a route: the answer is this status, from 400 to 599, and why."""

    def __init__(self, status: int, why: str) -> None:
        if not isinstance(status, int) or not 400 <= status <= 599:
            raise ValueError(f"HttpError({status!r}, ...): a status from 400 to 599")
        super().__init__(str(why).encode("utf-8", "replace").decode())
        self.status = status


class Parameter(NamedTuple):
    """`where`: path, query, body, or "" for the Query. `required`: it has no default."""

    name: str
    where: str
    kind: Any
    required: bool


class RouteNote(NamedTuple):
    """`answer` is the type that the function says it returns; Any when it says nothing."""

    method: str
    path: str
    parameters: tuple[Parameter, ...]
    answer: Any


def route(method: str, path: str) -> Callable[[F], F]:
    """Answer requests over HTTP.

    What the function returns becomes JSON; text and bytes are sent as they are, None is 404 for GET. It may run for 10
    seconds, in one of four threads, beside the handlers: it reads what they have stored.

    Args:
        method: GET, POST, PUT, PATCH or DELETE.
        path: the path, with parts in braces for parameters: "/price/{code}".

    Raises:
        DeclarationError: something of this cannot work.
    """

    def note(function: F) -> F:
        def wrong(why: str) -> DeclarationError:
            return DeclarationError(f"{place_of(function)}: route {method} {path}: {why}")

        if method not in METHODS:
            raise wrong(f"write one of {', '.join(METHODS)}")
        if not path.startswith("/") or " " in path or "?" in path:
            raise wrong('a path begins with "/" and has no query')
        if path.strip("/").split("/")[0] in OWN:
            raise wrong(f"the paths {', '.join('/' + name for name in OWN)} are the kit's own; choose another one")
        if inspect.iscoroutinefunction(function):
            raise wrong("it runs in a thread; write def, without async")
        try:
            parameters, answer = _parameters(function, path)
        except TypeError as error:
            raise wrong(str(error)) from None
        add_route(function, RouteNote(method, path, parameters, answer))
        return function

    return note


def _parameters(function: Callable[..., Any], path: str) -> tuple[tuple[Parameter, ...], Any]:
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise TypeError(f"an annotation cannot be resolved: {error}") from None
    parts, found = _PART.findall(path), list[Parameter]()
    signature = list(inspect.signature(function).parameters.values())
    if signature and signature[0].name == "self":
        signature = signature[1:]
    for one in signature:
        kind = hints.get(one.name, str)
        required = one.default is one.empty
        if kind is Query:
            found.append(Parameter(one.name, "", kind, True))
        elif one.name in parts:
            if kind not in _PLAIN:
                raise TypeError(f"parameter {one.name} is a part of the path: str, int, float or bool")
            found.append(Parameter(one.name, "path", kind, True))
        elif kind in _PLAIN:
            found.append(Parameter(one.name, "query", kind, required))
        elif kind is dict or dataclasses.is_dataclass(kind) or _is_struct(kind):
            if any(other.where == "body" for other in found):
                raise TypeError(f"parameter {one.name}: there is one body, and it has a parameter already")
            found.append(Parameter(one.name, "body", kind, True))
        else:
            raise TypeError(
                f"parameter {one.name}: write str, int, float or bool for the query, a msgspec.Struct, dataclass or "
                "dict for the body, or Query"
            )
    missing = [part for part in parts if all(one.name != part for one in found)]
    if missing:
        raise TypeError(f"there is no parameter for {{{missing[0]}}}")
    return tuple(found), hints.get("return", Any)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
