"""An application: what a module declares, put together and checked as a whole.

module -> notes of its functions, classes and methods -> Application: topics, each with its view and handlers; hooks
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.declare.declarations import (
    ConsumerNote,
    DeclarationError,
    HandlerNote,
    Notes,
    RetryPolicy,
    notes_of,
    place_of,
)
from edgebroker.consumer.declare.routes import RouteNote
from edgebroker.consumer.declare.signatures import Signature

_PLACE = re.compile(r"\{(node|label\.([^{}]+))\}")


class Handler(NamedTuple):
    """`call` is the function, of a method bound; `where` its file and line. `timeout` in seconds."""

    key: str
    headers: tuple[tuple[str, bytes], ...]
    batch: int
    timeout: float
    signature: Signature
    policy: RetryPolicy
    call: Callable[..., Any]
    where: str

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.call)

    def takes(self, key: bytes | None, headers: tuple[tuple[str, bytes | None], ...]) -> bool:
        """Is a record with this key and these headers for it?"""
        if self.key != "*":
            wanted = self.key.encode()
            if key is None or not (key.startswith(wanted[:-1]) if self.key.endswith("*") else key == wanted):
                return False
        return all(header in headers for header in self.headers)


class Topic(NamedTuple):
    """What an application reads of one topic, and for what."""

    name: str
    scope: Literal["each", "shared"]
    start: str
    view: Columns | None
    handlers: list[Handler]
    version: int = 1
    together: tuple[str, ...] = ()


class Hook(NamedTuple):
    """`moment` is start, ready, reset or stop, or "" for one that runs every so many seconds."""

    moment: str
    seconds: float
    wants_database: bool
    call: Callable[..., Any]

    @property
    def name(self) -> str:
        return getattr(self.call, "__name__", "a hook")


class UserRoute(NamedTuple):
    """`call` is the function that answers, of a method bound."""

    note: RouteNote
    call: Callable[..., Any]


class Application(NamedTuple):
    topics: dict[str, Topic]
    hooks: list[Hook]
    routes: list[UserRoute]


def load_module(source: str) -> ModuleType:
    """Import an application: a file, or the name of a module. Raises DeclarationError, and what the module raises."""
    path = Path(source)
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name and source.startswith(error.name):
                raise DeclarationError(f"there is no module {source}; give a file that ends with .py") from None
            raise
    if not path.is_file():
        raise DeclarationError(f"{source}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))  # what lies beside it can be imported
    spec.loader.exec_module(module)
    return module


def read_application(module: ModuleType, node: str, labels: Mapping[str, str]) -> Application:
    """What a module declares. Raises DeclarationError."""
    consumers: list[tuple[str, ConsumerNote]] = []
    handlers: list[tuple[str, HandlerNote, RetryPolicy | None, Callable[..., Any], str]] = []
    hooks: list[Hook] = []
    routes: list[UserRoute] = []
    for notes, call, where, own in _declared(module):
        consumers += [(where, one) for one in notes.consumers]
        handlers += [(own or one.topic, one, notes.policy, call, where) for one in notes.handlers]
        hooks += [Hook(*one, call) for one in notes.hooks]
        for note in notes.routes:
            if any((note.method, note.path) == (other.note.method, other.note.path) for other in routes):
                raise DeclarationError(f"{where}: {note.method} {note.path} is answered already; keep one of them")
            routes.append(UserRoute(note, call))
    topics: dict[str, Topic] = {}
    places: dict[str, str] = {}
    for where, one in consumers:
        name = _named(one.topic, node, labels, where)
        if name in topics:
            raise DeclarationError(f"{where}: topic {name} has a consumer already, at {places[name]}; keep one of them")
        topics[name], places[name] = _topic(name, one, node, labels, where), where
    for topic, note, policy, call, where in handlers:
        if not topic:
            raise DeclarationError(
                f"{where}: of which topic? write message_handler(TOPIC), or put consumer(TOPIC) on it"
            )
        name = _named(topic, node, labels, where)
        found = topics.setdefault(name, Topic(name, "each", "earliest", None, []))
        headers = tuple((header, value.encode()) for header, value in note.headers.items())
        handler = Handler(
            note.key, headers, note.batch, note.timeout, note.signature, policy or RetryPolicy(), call, where
        )
        for other in found.handlers:
            if _overlap(handler, other):
                raise DeclarationError(
                    f"{where}: some records of {name} are for the handler at {other.where} as well; give both a key or "
                    "a header that tells them apart"
                )
        found.handlers.append(handler)
    for name, found in topics.items():
        for wanted in found.together:
            if wanted not in topics:
                raise DeclarationError(
                    f"{places[name]}: topic {wanted} is to change together with {name}; read it, too"
                )
        if found.view is None and not found.handlers:
            raise DeclarationError(f"{places[name]}: topic {name} is read for nothing; give it a view or a handler")
    if not topics:
        raise DeclarationError(f"{module.__name__} declares no consumer; write @consumer(TOPIC, view=...) or a handler")
    return Application(topics, hooks, routes)


def _declared(module: ModuleType) -> Iterator[tuple[Notes, Callable[..., Any], str, str]]:
    """Notes, what to call, where it is, and the topic of the class that it is in, in the order of the file."""
    for name, target in list(vars(module).items()):
        if getattr(target, "__module__", None) != module.__name__ or getattr(target, "__name__", None) != name:
            continue  # imported from elsewhere, or another name of the same
        notes = notes_of(target)
        if inspect.isfunction(target):
            if notes is not None:
                own = notes.consumers[0].topic if len(notes.consumers) == 1 else ""
                yield notes, target, place_of(target), own
        elif isinstance(target, type):
            methods = [one for one in vars(target).values() if inspect.isfunction(one) and notes_of(one) is not None]
            if notes is None and not methods:
                continue
            try:
                made = target()
            except TypeError as error:
                raise DeclarationError(f"{place_of(target)}: {name} is made without arguments: {error}") from None
            own = notes.consumers[0].topic if notes is not None and len(notes.consumers) == 1 else ""
            if notes is not None:
                yield notes, made, place_of(target), ""
            for method in methods:
                found = notes_of(method)
                assert found is not None
                yield found, getattr(made, method.__name__), place_of(method), own


def _topic(name: str, note: ConsumerNote, node: str, labels: Mapping[str, str], where: str) -> Topic:
    together = tuple(_named(other, node, labels, where) for other in note.together)
    return Topic(name, note.scope, note.start, note.view, [], note.version, together)


def _named(topic: str, node: str, labels: Mapping[str, str], where: str) -> str:
    """The topic with the names of the node in their places."""

    def fill(found: re.Match[str]) -> str:
        if found[2] is None:
            return node
        if found[2] not in labels:
            raise DeclarationError(f"{where}: {topic}: this node has no label {found[2]}")
        return labels[found[2]]

    return _PLACE.sub(fill, topic)


def _overlap(one: Handler, other: Handler) -> bool:
    """Can a record be for both?"""
    values = dict(other.headers)
    if any(values.get(name, value) != value for name, value in one.headers):
        return False
    if one.key.endswith("*") and other.key.endswith("*"):
        first, second = one.key[:-1], other.key[:-1]
        return first.startswith(second) or second.startswith(first)
    if one.key.endswith("*"):
        return other.key.startswith(one.key[:-1])
    return one.key.startswith(other.key[:-1]) if other.key.endswith("*") else one.key == other.key
