"""Records that were given up: kept until they are handled once more, or dropped."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from edgebroker.common.outcome import Outcome
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.handling.effect import Changed, Effect, FailedRecord, Observer

log = logging.getLogger(__name__)

MOST_DEAD = 100_000


class DeadRecords:
    """Belongs to the thread of the database, outside of its transactions. Raises sqlite3.Error."""

    def __init__(self, database: AppDatabase, effects: Mapping[str, Effect], observer: Observer) -> None:
        self._database, self._effects, self._observer = database, effects, observer
        self._tell_at = 1

    def replay(self, topic: str, partition: int, offset: int) -> tuple[Outcome, str]:
        """Handle one once more, and keep it no longer if that succeeds."""
        dead, name = self._database.dead_record(topic, partition, offset), f"{topic}/{partition} record {offset}"
        if dead is None:
            return Outcome.NOT_FOUND, f"there is no dead record {name}"
        if partition < 0 or topic not in self._effects:
            return Outcome.CONFLICT, f"{name} was to be published, and the broker refused it: {dead.reason}"
        changed: list[Changed] = []
        try:
            with self._database.transaction():
                self._database.unbury(topic, partition, offset)
                self._effects[topic].apply_again(dead, changed)
        except FailedRecord as failure:
            return Outcome.CONFLICT, f"{name} failed again: {failure.why}"
        for one in changed:
            self._observer.published(*one)
        again = self._database.dead_record(topic, partition, offset)
        if again is not None:
            return Outcome.CONFLICT, f"{name} is given up again: {again.reason}"
        return Outcome.OK, ""

    def tell(self) -> None:
        """Say it in the log when there are some, then each time that they are twice as many."""
        count = self._database.dead
        if count >= self._tell_at and (newest := self._database.newest_dead()) is not None:
            name = f"{newest.topic}/{newest.partition} record {newest.offset}"
            log.warning("dead records: %d; the last is %s: %s (GET /v1/dead)", count, name, newest.reason)
        self._tell_at = max(1, 2 * count) if count >= self._tell_at or not count else self._tell_at

    def make_room(self) -> None:
        """Of more than MOST_DEAD the oldest tenth goes: they are still in their topics."""
        if self._database.dead > MOST_DEAD:
            with self._database.transaction():
                count = self._database.drop_oldest_dead(MOST_DEAD // 10)
            log.error("more than %d dead records: the %d oldest ones are not kept any longer", MOST_DEAD, count)

    def drop(self, topic: str, partition: int, offset: int) -> tuple[Outcome, str]:
        """Keep one no longer."""
        if self._database.dead_record(topic, partition, offset) is None:
            return Outcome.NOT_FOUND, f"there is no dead record {topic}/{partition} record {offset}"
        with self._database.transaction():
            self._database.unbury(topic, partition, offset)
        return Outcome.OK, ""
