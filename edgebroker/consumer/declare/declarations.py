"""The decorators of an application: they note what a function or class is for, and change nothing about it.

A mistake is found while the module is imported, and names the file, the line, and what to write.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from edgebroker.common.errors import ConfigError
from edgebroker.common.names import check_topic_name
from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.declare.signatures import Signature, parameters_of, read_signature

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

NOTE = "__edgebroker__"
Then = Literal["dead_letter", "skip", "stop"]
MOST_BATCH, MOST_ATTEMPTS, MOST_SECONDS = 10_000, 1_000_000, 86_400.0
# Half a percent less than a record may have with all that belongs to it.
MOST_SENT_BYTES = 1_000_000


class DeclarationError(ConfigError):
    """A handler or consumer is declared in a way that cannot work.

    Do: change what the message says, at the file and line that it names.
    """


class RetryPolicy(NamedTuple):
    """How a record is tried again whose handler raised. Times in seconds; `jitter` is the share of a pause by which it
    may be shorter or longer."""

    max_attempts: int = 5
    backoff: float = 0.5
    factor: float = 2.0
    max_backoff: float = 30.0
    jitter: float = 0.2
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    then: Then = "dead_letter"

    def pause(self, attempts: int) -> float:
        """Seconds to wait after so many attempts."""
        pause = min(self.max_backoff, self.backoff * self.factor ** min(attempts - 1, 100))
        return pause * (1 + self.jitter * (2 * random.random() - 1))


class HandlerNote(NamedTuple):
    """`topic` "": that of the class. `key` is a key, a prefix followed by *, or * for all. `timeout` in seconds."""

    topic: str
    key: str
    headers: Mapping[str, str]
    batch: int
    timeout: float
    signature: Signature


class ConsumerNote(NamedTuple):
    topic: str
    scope: Literal["each", "shared"]
    start: str
    view: Columns | None
    version: int
    together: tuple[str, ...]


class HookNote(NamedTuple):
    """`moment` is start, ready, reset or stop, or "" for one that runs every so many seconds."""

    moment: str
    seconds: float
    wants_database: bool


class Notes:
    """What is declared of one function or class."""

    def __init__(self) -> None:
        self.consumers: list[ConsumerNote] = []
        self.handlers: list[HandlerNote] = []
        self.hooks: list[HookNote] = []
        self.routes: list[Any] = []
        self.policy: RetryPolicy | None = None


class Database:
    """SQL inside the transaction that has the record's position: all of it is stored, or none.

    Tables are yours to make; names that begin with an underscore belong to the kit.
    """

    def __init__(self, execute: Callable[..., Any], execute_many: Callable[..., Any]) -> None:
        self._execute, self._execute_many = execute, execute_many

    def execute(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """Run one statement; its rows. Raises sqlite3.Error: the handler should let it pass."""
        rows: list[tuple[Any, ...]] = self._execute(sql, parameters).fetchall()
        return rows

    def executemany(self, sql: str, rows: Any) -> None:
        """Run one statement for each of many rows."""
        self._execute_many(sql, rows)


class Outbox:
    """Records to publish, stored in the transaction that has the record's position, and sent when it is stored.

    Those of a topic are sent in the order in which they were given, and each at least once: a record whose answer is
    lost with the process is sent again.
    """

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send

    def send(
        self, topic: str, value: object, key: str | bytes | None = None, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish a record once this transaction is stored.

        Args:
            topic: the name of the topic.
            value: bytes and str as they are, None for a deletion; everything else becomes JSON.
            key: the key; text becomes UTF-8.
            headers: names and values that are sent with it.

        Raises:
            ValueError: it can never be sent: the topic has a name that is not allowed, or the record has more than
                1,000,000 bytes.
        """
        problem = check_topic_name(topic)
        if problem:
            raise ValueError(f"topic {topic!r}: {problem}")
        data = value if value is None or isinstance(value, bytes) else _encode(value)
        raw = key.encode() if isinstance(key, str) else key
        pairs = list((headers or {}).items())
        size = len(data or b"") + len(raw or b"") + sum(len(name) + len(text) for name, text in pairs)
        if size > MOST_SENT_BYTES:
            raise ValueError(f"a record of {size:,} bytes cannot be sent; at most {MOST_SENT_BYTES:,}")
        self._send(topic, raw, data, msgspec.json.encode(pairs) if pairs else None)


def _encode(value: object) -> bytes:
    return value.encode() if isinstance(value, str) else msgspec.json.encode(value)


class Context(NamedTuple):
    """What a handler may want to know beside the value.

    Attributes:
        record: the record; of a batch the first one.
        attempt: 1, or more when it failed before.
        node: the name of the node that this instance belongs to.
        logger: where the handler may log; its lines are with those of the application.
        deadline: when the handler has to be done, as time.monotonic() tells time.
    """

    record: Any
    attempt: int
    node: str
    logger: logging.Logger
    deadline: float


FOR_HANDLERS: Mapping[type, str] = {
    Database: "SQL in the transaction",
    Outbox: "records to publish with it",
    Context: "about the record",
}


def notes_of(target: object) -> Notes | None:
    """What was declared of a function or class itself."""
    found = getattr(target, "__dict__", {}).get(NOTE)
    return found if isinstance(found, Notes) else None


def place_of(target: object) -> str:
    """FILE:LINE of a function or class."""
    try:
        path = inspect.getsourcefile(target) or "?"  # type: ignore[arg-type]
        return f"{path}:{inspect.getsourcelines(target)[1]}"  # type: ignore[arg-type]
    except (OSError, TypeError):
        return getattr(target, "__name__", "?")


def consumer(
    topic: str,
    *,
    scope: Literal["each", "shared"] = "each",
    start: str = "earliest",
    view: type | None = None,
    version: int = 1,
    together: Sequence[str] = (),
) -> Callable[[T], T]:
    """Read a topic.

    Args:
        topic: its name; `{node}` and `{label.NAME}` stand for those of the node.
        scope: "each": this instance gets all records, in a group of its own; "shared": the instances share them, and
            none has a view.
        start: where a partition begins of which nothing is known: "earliest" or "latest".
        view: a msgspec struct or dataclass: the latest value of each key is kept in the local database, in a view of
            the topic's name with a column for each field.
        version: with another number the topic is loaded again, for a view with other columns or another meaning;
            readers have the one before until that is done.
        together: other topics, which are loaded again and shown with this one in one step.

    Raises:
        DeclarationError: something of this cannot work.
    """

    def note(target: T) -> T:
        def wrong(why: str) -> DeclarationError:
            return DeclarationError(f"{place_of(target)}: consumer({topic!r}): {why}")

        if not isinstance(target, type) and not callable(target):
            raise DeclarationError(f"consumer({topic!r}): it goes on a class, or on a handler")
        problem = check_topic_name(_without_places(topic))
        if problem:
            raise wrong(problem)
        if scope not in ("each", "shared"):
            raise wrong(f'scope={scope!r}: write "each" or "shared"')
        if start not in ("earliest", "latest"):
            raise wrong(f'start={start!r}: write "earliest" or "latest"')
        if view is not None and scope == "shared":
            raise wrong('a view needs all records, and scope="shared" gets a part of them; write scope="each"')
        if not 0 <= version < 1 << 31:
            raise wrong(f"version={version}: a number from 0")
        if isinstance(together, str):
            raise wrong(f'together={together!r}: write a list of topics, ["{together}"]')
        try:
            columns = Columns(view) if view is not None else None
        except TypeError as error:
            raise wrong(f"view: {error}") from None
        _notes(target).consumers.append(ConsumerNote(topic, scope, start, columns, version, tuple(together)))
        return target

    return note


def message_handler(
    topic: str = "",
    *,
    key: str = "*",
    headers: Mapping[str, str] | None = None,
    batch: int = 1,
    timeout: float = 30.0,
) -> Callable[[F], F]:
    """Call a function, `async` or not, with the records of a topic, in the order of each partition.

    Args:
        topic: its name; not needed in a class that is a consumer.
        key: only records with this key, or one that begins so ("sku-*").
        headers: only records that have these headers, with these values.
        batch: how many records a function gets at most whose first parameter is a list.
        timeout: seconds; a call that takes longer counts as failed. It is looked at every quarter of a second.

    Raises:
        DeclarationError: something of this cannot work.
    """

    def note(function: F) -> F:
        def wrong(why: str) -> DeclarationError:
            return DeclarationError(f"{place_of(function)}: handler {function.__name__}: {why}")

        if not inspect.isfunction(function):
            raise DeclarationError("message_handler() goes on a function or a method")
        if topic and (problem := check_topic_name(_without_places(topic))):
            raise wrong(problem)
        if "*" in key[:-1] or not key:
            raise wrong(f'key={key!r}: write a key, a beginning followed by *, or "*" for all')
        if not 1 <= batch <= MOST_BATCH:
            raise wrong(f"batch={batch}: between 1 and {MOST_BATCH}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise wrong("it yields, so nothing of it would be run; write it without yield")
        if not 0 < timeout <= MOST_SECONDS:
            raise wrong(f"timeout={timeout}: seconds, up to {MOST_SECONDS:g}")
        try:
            signature = read_signature(function, FOR_HANDLERS)
        except TypeError as error:
            raise wrong(str(error)) from None
        if batch > 1 and not signature.batch:
            raise wrong(f"batch={batch}: its first parameter gets one record; write list[...] as its annotation")
        _notes(function).handlers.append(HandlerNote(topic, key, dict(headers or {}), batch, timeout, signature))
        return function

    return note


def retry_policy(
    *,
    max_attempts: int = 5,
    backoff: float = 0.5,
    factor: float = 2.0,
    max_backoff: float = 30.0,
    jitter: float = 0.2,
    retry_on: tuple[type[BaseException], ...] = (Exception,),
    then: Then = "dead_letter",
) -> Callable[[F], F]:
    """What happens when a handler raises: its partition waits, then it gets the record again.

    Args:
        max_attempts: how often it gets the record at most.
        backoff: seconds to wait after the first attempt.
        factor: each further pause is so many times as long.
        max_backoff: seconds of the longest pause.
        jitter: the share of a pause by which it may be shorter or longer.
        retry_on: exceptions after which another attempt may help; after others there is none.
        then: "dead_letter": the record is kept as one, and the next one comes; "skip": only the log says so; "stop":
            the application ends.

    Raises:
        DeclarationError: something of this cannot work.
    """

    def note(function: F) -> F:
        def wrong(why: str) -> DeclarationError:
            return DeclarationError(f"{place_of(function)}: retry_policy of {function.__name__}: {why}")

        if not 1 <= max_attempts <= MOST_ATTEMPTS:
            raise wrong(f"max_attempts={max_attempts}: between 1 and {MOST_ATTEMPTS}")
        for name, value in (("backoff", backoff), ("max_backoff", max_backoff)):
            if not 0 <= value <= MOST_SECONDS:
                raise wrong(f"{name}={value}: seconds, up to {MOST_SECONDS:g}")
        if factor < 1 or not 0 <= jitter <= 1:
            raise wrong("factor is at least 1, and jitter between 0 and 1")
        if then not in ("dead_letter", "skip", "stop"):
            raise wrong(f'then={then!r}: write "dead_letter", "skip" or "stop"')
        kinds = tuple(retry_on)
        if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise wrong("retry_on: a tuple of exception classes, for example (OSError,)")
        _notes(function).policy = RetryPolicy(max_attempts, backoff, factor, max_backoff, jitter, kinds, then)
        return function

    return note


def on_start(function: F) -> F:
    """Call a function once, before the first record. It may take a Database."""
    return _hook(function, "start")


def on_ready(function: F) -> F:
    """Call a function once everything is there that was published when the application began."""
    return _hook(function, "ready")


def on_reset(function: F) -> F:
    """Call a function when records are about to come again from the beginning: their topic is loaded again. It may take
    a Database, and clear what handlers have made of them."""
    return _hook(function, "reset")


def on_stop(function: F) -> F:
    """Call a function when the application ends, behind the last record."""
    return _hook(function, "stop")


def every(seconds: float) -> Callable[[F], F]:
    """Call a function again and again, between two transactions.

    Args:
        seconds: from the end of one call to the beginning of the next.
    """

    def note(function: F) -> F:
        if not 0 < seconds <= MOST_SECONDS:
            raise DeclarationError(f"{place_of(function)}: every({seconds}): seconds, up to {MOST_SECONDS:g}")
        return _hook(function, "", seconds)

    return note


def _hook(function: F, moment: str, seconds: float = 0.0) -> F:
    if inspect.iscoroutinefunction(function):
        raise DeclarationError(f"{place_of(function)}: {function.__name__} is not waited for; write def, without async")
    parameters = parameters_of(function)
    hints = inspect.get_annotations(function, eval_str=True)
    if parameters and (len(parameters) > 1 or hints.get(parameters[0].name) is not Database):
        raise DeclarationError(f"{place_of(function)}: {function.__name__} takes nothing, or one Database")
    _notes(function).hooks.append(HookNote(moment, seconds, bool(parameters)))
    return function


def add_route(function: Any, note: object) -> None:
    """Note a route of declare/routes.py."""
    _notes(function).routes.append(note)


def _notes(target: Any) -> Notes:
    found = notes_of(target)
    if found is None:
        found = Notes()
        setattr(target, NOTE, found)
    return found


def _without_places(topic: str) -> str:
    """A topic with letters where names of the node will stand."""
    parts = topic.replace("{node}", "node").split("{label.")
    return parts[0] + "".join("label" + part.partition("}")[2] for part in parts[1:])
