"""Handlers get the records of a refresh as they get others: in order, in transactions, with attempts and pauses.

A record that fails is waited for where it is loaded: its partition shows nothing yet. What handlers have in hand is
written down before, for these and for others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from edgebroker.common.runtime.clock import Clock, sleep
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.handling.effect import DeadNow, Effect, FailedRecord, HopelessError, Portion
from edgebroker.consumer.handling.errors import StoppedError
from edgebroker.consumer.handling.in_hand import MOST_DEATHS, InHand

log = logging.getLogger(__name__)

# How long a pause between two attempts lasts before it is looked whether it is to end.
LOOK_SECONDS = 0.2


class EndedError(Exception):
    """It is to end while a record waits for another attempt."""


@contextmanager
def having_in_hand(in_hand: InHand, portions: Sequence[Portion], effects: Mapping[str, Effect]) -> Iterator[None]:
    """Handlers get these: it is written down, so that a record is found that ends the process. Raises FailedRecord
    when it has done so often enough."""
    taken = [one for one in portions if one.records and effects[one.key.topic].handles]
    if not taken:
        yield
        return
    for portion in taken:
        handler = effects[portion.key.topic].handler_of(portion.records[0])
        if handler is not None and in_hand.deaths(portion.key, portion.records[0]) >= MOST_DEATHS:
            why = HopelessError(f"the process ended {MOST_DEATHS} times while it was handled alone")
            raise FailedRecord(portion, 0, handler, why)
    in_hand.begin((one.key, one.records) for one in taken)
    try:
        yield
    finally:
        in_hand.end()


class LoadedRecords:
    """Belongs to the thread of the database. `ending` tells whether it is to end; `failures`: attempts that failed."""

    def __init__(
        self,
        database: AppDatabase,
        effects: Mapping[str, Effect],
        in_hand: InHand,
        clock: Clock,
        ending: Callable[[], bool],
    ) -> None:
        self._database, self._effects, self._in_hand = database, effects, in_hand
        self._clock, self._ending = clock, ending
        self.failures = 0

    def handle(self, portion: Portion, dead: Sequence[DeadNow], also: Callable[[int], None]) -> None:
        """Have handlers handle records, and keep those that are given up, in one transaction with something else, which
        gets the offset behind them (-1: behind all). Raises StoppedError, EndedError and sqlite3.Error."""
        records = portion.records
        while self._in_hand and records:
            count = self._in_hand.together(portion.key, records)
            piece, records = records[:count], records[count:]
            end = piece[-1].offset + 1
            self._handle_piece(portion._replace(records=piece), dead, lambda end=end: also(end))  # type: ignore[misc]
            dead = []
        self._handle_piece(portion._replace(records=records), dead, lambda: also(-1))

    def _handle_piece(self, portion: Portion, dead: Sequence[DeadNow], also: Callable[[], None]) -> None:
        attempt, buried, effect = 1, list(dead), self._effects[portion.key.topic]
        passed = {one.record.offset for one in dead}
        while True:
            now = portion._replace(attempt=attempt)
            try:
                with having_in_hand(self._in_hand, [now], self._effects), self._database.transaction():
                    for one in buried:
                        effect.bury(*one)
                    effect.handle(now, now.records, passed)
                    also()
            except FailedRecord as failure:
                self.failures += 1
                policy, record = failure.handler.policy, failure.record
                name = f"{record.topic}/{record.partition} record {record.offset}"
                log.warning("%s: attempt %d failed (%s)", name, attempt, failure.why)
                if not failure.is_final(attempt):
                    self._pause(policy.pause(attempt))
                    attempt += 1
                    continue
                if policy.then == "stop":
                    raise StoppedError(f"{name}: {failure.why}") from failure
                if policy.then == "dead_letter":
                    buried.append(DeadNow(record, attempt, failure.why))
                passed.add(record.offset)
                attempt = 1
            else:
                return

    def _pause(self, seconds: float) -> None:
        until = self._clock.monotonic() + seconds
        while self._clock.monotonic() < until:
            if self._ending():
                raise EndedError
            sleep(min(LOOK_SECONDS, seconds))
