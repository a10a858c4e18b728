"""Sending what handlers have put into their outbox, once the transaction is stored that has it.

    _outbox -> read -> producer -> acknowledged by the broker -> removed with the next transaction

On a thread of its own: a broker that is away holds nothing up but this.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgebroker.client.producer import Producer, Sent
from edgebroker.common.errors import AnswerError, ArgumentError, Code, EdgeBrokerError
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.threads import start_thread
from edgebroker.consumer.database import DatabaseError
from edgebroker.consumer.reader import Reader

log = logging.getLogger(__name__)

MOST_ROWS = 1000
# A topic that refuses records is tried again so often.
REFUSED_SECONDS, REMIND_SECONDS = 5.0, 300.0
STOP_SECONDS = 2.0
_HOPELESS = (Code.TOO_LARGE, Code.INVALID_BATCH)


class Settled(NamedTuple):
    """A record of the outbox that was sent, or why it can never be."""

    number: int
    refused: str = ""


class OutboxSender:
    """wake(), settled(), removed() and close() belong to the thread of the database."""

    def __init__(self, path: Path, server: str, credentials: str, clock: Clock) -> None:
        self._path, self._server, self._credentials, self._clock = path, server, credentials, clock
        self._wake, self._closed = threading.Event(), False
        self._begun, self._ended = False, threading.Event()
        self._producer: Producer | None = None
        # By the thread: everything before is sent, or of a topic that refuses, of which nothing is sent until all is
        # tried again, from the first record on; when the log says again of a topic that it refuses.
        self._through = 0
        self._refusing: set[str] = set()
        self._retry_due = 0.0
        self._remind_due: dict[str, float] = {}
        # Not removed from the database yet: one thread appends, the other takes.
        self._settled: deque[Settled] = deque()

    def wake(self) -> None:
        """There may be something to send."""
        if not self._begun:
            self._begun = True
            start_thread("edgebroker-outbox", self._run)
        self._wake.set()

    def settled(self) -> list[Settled]:
        """What is to be removed from the database."""
        return list(self._settled)

    def removed(self, count: int) -> None:
        """The first so many of these are removed."""
        for _ in range(count):
            self._settled.popleft()

    def close(self) -> None:
        """Send nothing more; what was not acknowledged is sent after the next start."""
        self._closed = True
        self._wake.set()
        if self._producer is not None:
            self._producer.close(STOP_SECONDS)
        if self._begun:
            self._ended.wait(STOP_SECONDS)

    # ---- the thread ----

    def _run(self) -> None:
        reader = Reader(self._path)
        self._producer = producer = Producer(self._server, credentials=self._credentials, timeout=None)
        while self._wake.wait() and not self._closed:
            self._wake.clear()
            if self._refusing and not self._settled and self._clock.monotonic() >= self._retry_due:
                self._through = 0
                self._refusing.clear()
            try:
                while not self._closed and self._send_some(reader, producer):
                    pass
            except DatabaseError as error:  # the worker wakes it again
                log.warning("the outbox cannot be read: %s; it is tried again", error)
        reader.close()
        self._ended.set()

    def _send_some(self, reader: Reader, producer: Producer) -> bool:
        """Send the next records; False when there are none."""
        rows = reader.rows(
            "SELECT number, topic, key, value, headers FROM _outbox WHERE number > ? ORDER BY number LIMIT ?",
            (self._through, MOST_ROWS),
        )
        futures: list[tuple[int, str, Sent]] = []
        for number, topic, key, value, headers in rows:
            if topic in self._refusing:
                continue
            pairs = [(name, text.encode()) for name, text in msgspec.json.decode(headers)] if headers else None
            try:
                futures.append((number, topic, producer.send(topic, value, key, headers=pairs)))
            except (ValueError, EdgeBrokerError) as error:
                if self._closed:
                    return False
                self._failed(number, topic, error)
        for number, topic, future in futures:
            failure = future.exception()
            if failure is None:
                self._settled.append(Settled(number))
                self._remind_due.pop(topic, None)
            elif not self._closed:
                self._failed(number, topic, failure)
        if rows:
            self._through = rows[-1][0]
        return len(rows) == MOST_ROWS

    def _failed(self, number: int, topic: str, error: Exception) -> None:
        """A record was not taken: it waits, with what follows it in its topic, unless no attempt helps."""
        if isinstance(error, ArgumentError) or (isinstance(error, AnswerError) and error.code in _HOPELESS):
            self._settled.append(Settled(number, str(error)))
            return
        self._refusing.add(topic)
        now = self._clock.monotonic()
        self._retry_due = now + REFUSED_SECONDS
        if now >= self._remind_due.get(topic, 0.0):
            self._remind_due[topic] = now + REMIND_SECONDS
            log.warning("records for topic %s wait in the outbox: %s", topic, error)
