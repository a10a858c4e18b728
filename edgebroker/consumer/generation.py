"""Loading a topic again beside its view: a new generation of the table, switched to in one transaction.

    RESET -> begin() -> load() into the new generation, with the position -> all partitions complete -> switch()

Readers have the old rows until the switch, also across crashes: what is loaded is stored with how far it goes. All
partitions of a topic are loaded together: when one of them has to be, the others are asked for. Handlers get the
records of a refresh as they get others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from edgebroker.client.refresh import Refresh
from edgebroker.common.records import Record
from edgebroker.common.types import Position, TopicPartition
from edgebroker.consumer.database import AppDatabase, Loading
from edgebroker.consumer.handling.effect import Effect, Portion

log = logging.getLogger(__name__)

LEAST_PERCENT = 90


class Generations:
    """The staging store of an instance. `apply` has the effect of a portion, in one transaction with what it is given,
    and passes over records that no attempt helps. `begun` is told of a partition that is loaded again, and whether it
    is the first one of its topic (within a transaction then); `whole` says whether all partitions of a topic that can
    be loaded are among these; `owns` whether the positions of a topic are kept here; `switched` is told of the topic
    and of those positions that hold from then on. `force`: show also what has fewer than nine tenths of the rows."""

    def __init__(
        self,
        database: AppDatabase,
        effects: dict[str, Effect],
        apply: Callable[[Portion, Callable[[int], None]], None],
        begun: Callable[[TopicPartition, bool], None],
        whole: Callable[[str, set[int]], bool],
        owns: Callable[[str], bool],
        switched: Callable[[str, dict[tuple[str, int], Position]], None],
        *,
        force: bool,
    ) -> None:
        self._database, self._effects, self._apply = database, effects, apply
        self._begun, self._whole, self._owns, self._switched = begun, whole, owns, switched
        # Refreshes that were switched to: READY is asked for one after the other.
        self._over: set[str] = set()
        # Refreshes that are complete and have too few rows -> the sum of offsets below which they cannot have enough.
        self._enough: dict[tuple[str, ...], int] = {}
        self._force = force

    def begin(self, refresh: Refresh) -> int:
        """Where to go on: behind what an earlier attempt has stored, or behind what readers see already."""
        key = TopicPartition(refresh.topic, refresh.partition)
        loading = self._database.loading(key.topic)
        known = loading.get(key.partition)
        if known is not None and known.reset_id == refresh.reset_id:
            if known.target >= 0:
                self._begun(key, False)
                return known.position.next_offset
            self._over.add(refresh.reset_id)
            return max(known.position.next_offset, refresh.target)
        log.info("%s/%d is loaded again, from %d to %d", *key, refresh.from_offset, refresh.target)
        with self._database.transaction():
            self._effects[key.topic].begin_generation(key.partition)
            self._database.set_loading(*key, _state(refresh))
            self._begun(key, all(one.target < 0 for one in loading.values()))
        return refresh.from_offset

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        """Store the effect of the next records together with the position behind them."""
        key = TopicPartition(refresh.topic, refresh.partition)
        self._apply(Portion(key, records), lambda end: self._database.set_loading(*key, _state(refresh, end)))

    def switch(self, refresh: Refresh) -> bool:
        """Show the new generation once all partitions that are loaded again are complete."""
        if refresh.reset_id in self._over:
            return True
        loading = {
            partition: one for partition, one in self._database.loading(refresh.topic).items() if one.target >= 0
        }
        complete = all(one.position.next_offset >= one.target for one in loading.values())
        if not complete or not self._whole(refresh.topic, set(loading)) or self._is_too_small(refresh.topic, loading):
            return False
        positions = {}
        if self._owns(refresh.topic):
            positions = {(refresh.topic, partition): one.position for partition, one in loading.items()}
        with self._database.transaction():
            self._effects[refresh.topic].end_generation(list(loading))
            self._database.set_positions(positions)
            self._database.loaded(refresh.topic)
        # The broker is told next, and asks for nothing of this again.
        self._database.sync()
        self._over.update(one.reset_id for one in loading.values())
        self._switched(refresh.topic, positions)
        log.info("topic %s: readers see what was loaded again", refresh.topic)
        return True

    def _is_too_small(self, topic: str, loading: dict[int, Loading]) -> bool:
        """Has what was loaded much fewer rows than readers see? A mistake at the top must not empty the shelves."""
        attempt = tuple(sorted(one.reset_id for one in loading.values()))
        end = sum(one.position.next_offset for one in loading.values())
        if self._force or end < self._enough.get(attempt, 0):
            return not self._force
        before, now = self._effects[topic].sizes(list(loading))
        least = -(-before * LEAST_PERCENT // 100)
        if now >= least:
            return False
        if attempt not in self._enough:
            log.error(
                "topic %s: what was loaded again has much fewer rows (%d of %d): it is not shown until it has %d, or "
                "the application is started with --force", topic, now, before, least,
            )  # fmt: skip
        self._enough[attempt] = end + least - now
        return True


def _state(refresh: Refresh, end: int = -1) -> Loading:
    """How far it is: up to an offset, or to the end of what was given."""
    position = refresh.position if end < 0 else refresh.position._replace(next_offset=end)
    return Loading(refresh.reset_id, position, refresh.target)
