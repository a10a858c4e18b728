"""Requests whose answer may take long: a few threads, each with a connection to the local database of its own.

At most MOST_WAITING requests wait for a thread. A question that takes too long is ended; its request is answered at
once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import msgspec

from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import Worker
from edgebroker.consumer.declare.routes import HttpError
from edgebroker.consumer.handling.errors import described
from edgebroker.consumer.reader import Reader
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import TEXT_TYPE, Failed, Response

log = logging.getLogger(__name__)

MOST_WAITING, MOST_ANSWER_BYTES, MOST_LOST = 64, 8 << 20, 16
JSON = "application/json"

Work = Callable[[Reader], object]


class _Question:
    """`over`: its request is answered."""

    def __init__(self, call: Call, work: Work) -> None:
        self.call, self.work, self.over = call, work, False


class _Desk:
    """One thread and its connection. `pending` belongs to the loop."""

    def __init__(self, name: str, path: Path) -> None:
        self.worker, self.pending = Worker(name), 0
        self._path, self._reader = path, None  # type: Path, Reader | None
        self._lock, self._now = threading.Lock(), None  # type: threading.Lock, _Question | None

    def answer(self, question: _Question) -> Response:
        """In the thread."""
        with self._lock:
            self._now = question
        try:
            if self._reader is None:
                self._reader = Reader(self._path)
            return _response(question.work(self._reader))
        except HttpError as error:
            return Response(error.status, Failed(str(error)))
        except BaseException as error:  # also SystemExit: the thread is not its to end
            if not question.over:
                log.error("%s failed: %s", question.call.path, described(error))
            return Response(500, Failed("an internal error; see the log of the application"))
        finally:
            with self._lock:
                self._now = None

    def end(self, question: _Question) -> None:
        """End a question that is being answered."""
        with self._lock:
            if self._now is question and self._reader is not None:
                self._reader.interrupt()

    def has(self, question: _Question) -> bool:
        """Is it being answered?"""
        with self._lock:
            return self._now is question


class Queries:
    """Belongs to the loop thread."""

    def __init__(
        self, scheduler: Scheduler, path: Path, name: str, threads: int, seconds: float, stuck: Callable[[str], None]
    ) -> None:
        """`stuck` is told when MOST_LOST threads were lost to questions that do not end."""
        self._scheduler, self._seconds, self._stuck = scheduler, seconds, stuck
        self._path, self._name, self._lost = path, name, 0
        self._desks = [_Desk(f"{name}-{number}", path) for number in range(threads)]

    def ask(self, call: Call, work: Work) -> None:
        """Have a thread do some work, and answer with what it returns: a struct, text, bytes, or a Response. HttpError
        is answered as it says."""
        desk = min(self._desks, key=lambda one: one.pending)
        if sum(one.pending for one in self._desks) >= MOST_WAITING:
            why = "too many requests wait; try again in a moment"
            call.refuse(Outcome.OVERLOADED, why, headers=(("retry-after", "1"),))
            return
        desk.pending += 1
        question = _Question(call, work)
        timer = self._scheduler.call_later(self._seconds, lambda: self._late(desk, question))

        def job() -> None:
            if question.over:
                response = None
            else:
                response = desk.answer(question)
            self._scheduler.call_soon_threadsafe(lambda: answered(response))

        def answered(response: Response | None) -> None:
            desk.pending -= 1
            timer.cancel()
            if response is not None and not question.over:
                question.over = True
                call.answer(response)

        desk.worker.submit(job)

    def _late(self, desk: _Desk, question: _Question) -> None:
        question.over = True
        desk.end(question)
        question.call.refuse(Outcome.STORAGE_TIMEOUT, f"it took longer than {self._seconds:g} s")
        self._scheduler.call_later(self._seconds, lambda: self._replace(desk, question))

    def _replace(self, desk: _Desk, question: _Question) -> None:
        """A question does not end: another thread takes the place of the one that has it."""
        if desk not in self._desks or not desk.has(question):
            return
        self._lost += 1
        log.error("%s does not end; another thread answers instead of its own", question.call.path)
        fresh = _Desk(f"{self._name}-{len(self._desks) + self._lost}", self._path)
        self._desks[self._desks.index(desk)] = fresh
        if self._lost >= MOST_LOST:
            self._stuck(question.call.path)


def _response(result: object) -> Response:
    """Encoded here, beside the loop."""
    if isinstance(result, Response):
        return result
    if isinstance(result, str):
        data = result.encode("utf-8", "replace")
        size, response = len(data), Response(200, data, content_type=TEXT_TYPE)
    elif isinstance(result, bytes):
        size, response = len(result), Response(200, result)
    else:
        try:
            body = msgspec.json.encode(result) + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, f"what it returns cannot be sent: {error}") from None
        size, response = len(body), Response(200, body, content_type=JSON)
    if size > MOST_ANSWER_BYTES:
        raise HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, f"an answer has at most {MOST_ANSWER_BYTES:,} bytes")
    return response
