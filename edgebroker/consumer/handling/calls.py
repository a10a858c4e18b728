"""Calling handlers with many values: in this thread, or as a task of asyncio; each within its time.

A handler that takes too long is told to end: its SQL is interrupted, and an exception is raised in it, or its task is
cancelled. It counts as failed then, whatever it does.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, cast

from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import Clock
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.declare.application import Handler
from edgebroker.consumer.declare.declarations import Context, Database, Outbox
from edgebroker.consumer.handling.errors import text_of
from edgebroker.consumer.handling.interruption import raise_in_thread
from edgebroker.consumer.handling.tasks import Tasks
from edgebroker.consumer.handling.watch import Todo, Watch

HOOK_SECONDS = 30.0


class OverTimeError(BaseException):
    """Raised in a handler that takes too long. No Exception: a handler that catches those does not catch it."""


class CallFailedError(Exception):
    """A handler raised `error`, after `before` calls that did not."""

    def __init__(self, before: int, error: BaseException) -> None:
        super().__init__(text_of(error))
        self.before, self.error = before, error


class _TooLateError(Exception):
    """A call was told to end when so many values were left."""

    def __init__(self, seconds: float, left: int) -> None:
        super().__init__(f"it took longer than {seconds:g} s")
        self.left = left


def _check_done(result: object) -> None:
    """A handler has returned something: was its work done?"""
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError("it returned something that is still to be run: a decorator hides that it is async, or yields")


class Calls:
    """Belongs to the thread of the database."""

    def __init__(self, database: AppDatabase, watch: Watch, clock: Clock, node: str, logger: logging.Logger) -> None:
        self._database, self._watch, self._clock, self._tasks = database, watch, clock, Tasks()
        self._node, self._logger = node, logger
        self._given: dict[type, object] = {
            Database: Database(database.execute, database.execute_many),
            Outbox: Outbox(database.send),
        }

    def each(self, handler: Handler, values: Sequence[object], records: Sequence[Record], attempts: int) -> None:
        """Call a handler with one value after the other; `attempts` is how often the first one is tried with this.
        Raises CallFailedError."""
        todo = cast("Todo", iter(values))
        self._call(handler, todo, todo, records, attempts)

    def batches(self, handler: Handler, values: Sequence[object], records: Sequence[Record], attempts: int) -> None:
        """Call a handler with lists of values, of as many as it wants. Raises CallFailedError."""
        size = handler.batch
        starts = iter(range(0, len(values), size))
        pieces = (values[first : first + size] for first in starts)
        self._call(handler, pieces, cast("Todo", starts), records[::size], attempts)

    def hook(self, call: Callable[..., Any], name: str, *, wants_database: bool, limited: bool) -> None:
        """Call a function that is no handler. Raises what it raises, and when it is limited and takes too long."""
        given = [self._given[Database]] if wants_database else []
        seconds, todo = HOOK_SECONDS if limited else inf, cast("Todo", iter(()))
        self._watched(name, seconds, todo, lambda: call(*given), self._end_here(), lend=wants_database)

    def _call(self, handler: Handler, values: Any, todo: Todo, records: Sequence[Record], attempts: int) -> None:
        call, count = handler.call, todo.__length_hint__()
        more = self._more(handler, records, attempts) if handler.signature.others else None

        def here() -> None:
            if more is None:
                for value in values:
                    if (result := call(value)) is not None:
                        _check_done(result)
            else:
                for value in values:
                    if (result := call(value, *next(more))) is not None:
                        _check_done(result)

        async def there() -> None:
            self._database.lend()
            try:
                for value in values:
                    await call(value, *(next(more) if more is not None else ()))
            finally:
                self._database.take_back()

        try:
            if handler.is_async:
                self._watched(handler.where, handler.timeout, todo, lambda: self._tasks.run(there), self._tasks.cancel)
            else:
                self._watched(handler.where, handler.timeout, todo, here, self._end_here())
        except _TooLateError as error:
            raise CallFailedError(max(0, count - error.left - 1), TimeoutError(str(error))) from None
        except BaseException as error:
            raise CallFailedError(max(0, count - todo.__length_hint__() - 1), error) from error

    def _more(self, handler: Handler, records: Sequence[Record], attempts: int) -> Any:
        """What a handler gets beside the value, for each of the calls."""
        others, given = handler.signature.others, self._given
        if Context not in others:
            same = tuple(given[kind] for kind in others)
            while True:
                yield same
        for record in records:
            deadline = self._clock.monotonic() + handler.timeout
            context = Context(record, attempts, self._node, self._logger, deadline)
            attempts = 1
            yield tuple(context if kind is Context else given[kind] for kind in others)

    def _end_here(self) -> Callable[[], None]:
        """How another thread ends what this one calls."""
        ident = threading.get_ident()

        def end() -> None:
            self._database.interrupt()
            raise_in_thread(ident, OverTimeError)

        return end

    def _watched(
        self,
        what: str,
        seconds: float,
        todo: Todo,
        work: Callable[[], None],
        end: Callable[[], None],
        *,
        lend: bool = True,
    ) -> None:
        """Do some work while it is watched, with the database lent to it. Raises what it raises, _TooLateError when it
        was told to end. An OverTimeError comes at any step, also behind the work, and gets no further than this."""
        failure: BaseException | None = None
        try:
            try:
                self._watch.begin(what, seconds, todo, end)
                if lend:
                    self._database.lend()
                work()
            except BaseException as error:
                failure = error
            late_left = self._watch.end()
            raise_in_thread(threading.get_ident(), None)
        except OverTimeError:
            late_left = self._watch.end()
        self._database.take_back()
        if late_left >= 0:
            raise _TooLateError(seconds, late_left)
        if failure is not None:
            raise failure
