"""Views that are filled again from the copy, beside the one that readers see: the broker is not needed for it.

    begin() -> pieces of the copy, one a turn -> what came since, from the broker -> switched as every refresh is

A topic is rebuilt whose view another version made, or other columns; and one whose local database was lost.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgebroker.client.consume.decoding import has_outlived
from edgebroker.client.refresh import Refresh
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import Clock, sleep
from edgebroker.common.types import Position, TopicPartition
from edgebroker.consumer.copy.copy_reader import CopyReader, CopyUnreadableError, Inquiry
from edgebroker.consumer.declare.application import Topic
from edgebroker.consumer.generation import Generations
from edgebroker.consumer.handling.effect import Effect
from edgebroker.consumer.reloads import Reloads
from edgebroker.consumer.subscriptions import Subscriptions

if TYPE_CHECKING:
    from edgebroker.consumer.copy.segment_copy import CopiedPartition
    from edgebroker.storage.types import ColdRead

log = logging.getLogger(__name__)

PIECE_BYTES = 256 << 10
# So often a piece is asked for before the broker is.
MOST_FAILURES, RETRY_SECONDS = 10, 0.05
# What the ids of rebuilds begin with.
REBUILT = "copy-"


class Rebuild:
    """Belongs to the thread of the database. `positions` are those that are stored; without `reader` there is no
    copy."""

    def __init__(
        self,
        reader: CopyReader | None,
        generations: Generations,
        reloads: Reloads,
        subscriptions: Subscriptions,
        topics: Mapping[str, Topic],
        effects: Mapping[str, Effect],
        positions: Mapping[tuple[str, int], Position],
        clock: Clock,
    ) -> None:
        self._reader, self._generations, self._reloads = reader, generations, reloads
        self._subscriptions, self._clock = subscriptions, clock
        self._topics, self._effects, self._positions = topics, effects, positions
        self._refreshes: dict[TopicPartition, Refresh] = {}
        # What is left in the copy; the topics that are read on at the broker when nothing is.
        self._reading: dict[TopicPartition, CopiedPartition] = {}
        self._unread = set[str]()
        self._next: tuple[TopicPartition, int, Inquiry[ColdRead]] | None = None
        self._beginning, self._failures = False, 0
        # Topics that the broker has to load before anything of them has an effect.
        self._waiting = set[str]()

    @property
    def topics(self) -> set[str]:
        """Those that are rebuilt and not switched yet."""
        return {key.topic for key in self._refreshes}

    # ---- what is rebuilt ----

    def start(self) -> None:
        """Begin to read every topic: what can be rebuilt from the copy when that is done, the others at once. What it
        raises leaves nothing that keeps it from being called again."""
        logs = self._reader.copy.logs() if self._reader is not None else {}
        broken = {name for name, effect in self._effects.items() if effect.stale or _is_half_rebuilt(effect)}
        rebuilt = {topic for topic in self._topics if self._is_possible(topic, broken, logs)}
        self._waiting = broken - rebuilt
        self._reloads.want(self._waiting)
        if rebuilt:
            log.info("rebuilt from the copy: %s", ", ".join(sorted(rebuilt)))
            self._reloads.rebuild(rebuilt)
            self._unread = rebuilt
            for key, copied in logs.items():
                if key.topic in rebuilt:
                    self._begin_reading(key, copied)
        self._read([topic for topic in self._topics if topic not in rebuilt], self._positions)

    def _is_possible(self, topic: str, broken: set[str], logs: Mapping[TopicPartition, CopiedPartition]) -> bool:
        """Is a topic to be built again, or one that is switched with it, and does the copy have all of them?"""
        topics = self._reloads.together(topic)
        stored = {key: one for key, one in self._positions.items() if key[0] in topics}
        copied = {key: one for key, one in logs.items() if key.topic in topics}
        lost = copied and not stored
        if not (lost or broken.intersection(topics)) or {key.topic for key in copied} != set(topics):
            return False
        whole = all(one.rebuild_from >= 0 for one in copied.values())
        same = all(key in copied and copied[TopicPartition(*key)].log_id == one.log_id for key, one in stored.items())
        return whole and same and all(self._topics[one].scope == "each" for one in topics)

    def _read(self, topics: Iterable[str], positions: Mapping[tuple[str, int], Position]) -> None:
        """Begin to read topics at the broker, at positions or where the copy ends, if that is before."""
        if self._reader is not None:
            copy = self._reader.copy
            positions = {key: copy.start(TopicPartition(*key), one) for key, one in positions.items()}
        self._subscriptions.open([self._topics[topic] for topic in topics], positions, self._generations)

    def _begin_reading(self, key: TopicPartition, copied: CopiedPartition) -> None:
        stored = self._positions.get(key)
        target = max(copied.end, stored.next_offset if stored is not None else 0)
        refresh = self._begin(key, copied.log_id, copied.rebuild_from, target)
        refresh.epoch = copied.epoch
        self._reading[key] = copied

    def _begin(self, key: TopicPartition, log_id: bytes, first: int, target: int) -> Refresh:
        """One that was begun by the same version goes on where it stood."""
        prefix = f"{REBUILT}{self._topics[key.topic].version}-"
        known = self._effects[key.topic].loading.get(key.partition)
        going_on = known is not None and known.target >= 0 and known.reset_id.startswith(prefix)
        refresh = Refresh(
            reset_id=known.reset_id if known is not None and going_on else prefix + os.urandom(16).hex(),
            log_id=log_id,
            topic=key.topic,
            partition=key.partition,
            from_offset=first,
            target=target,
        )
        self._beginning = True
        try:
            refresh.next_offset = self._generations.begin(refresh)
        finally:
            self._beginning = False
        self._refreshes[key] = refresh
        return refresh

    # ---- from the copy ----

    @property
    def busy(self) -> bool:
        """Is anything left in the copy?"""
        return bool(self._reading)

    def step(self) -> None:
        """Load a piece of the copy; or have the broker go on."""
        key, copied = next(iter(self._reading.items()))
        refresh = self._refreshes[key]
        if refresh.next_offset < copied.end:
            try:
                self._stage_piece(key, refresh, copied.end)
                self._failures = 0
            except CopyUnreadableError as error:
                self._failures += 1
                sleep(RETRY_SECONDS)
                if self._failures >= MOST_FAILURES:
                    self._abandon(key.topic, str(error))
            return
        del self._reading[key]
        self._read_on()

    def _read_on(self) -> None:
        """Have the broker go on once nothing is left in the copy: one consumer for all topics."""
        if not self._reading:
            positions = dict(self._positions)
            positions.update((key, refresh.position) for key, refresh in self._refreshes.items())
            self._read(sorted(self._unread), positions)

    def _stage_piece(self, key: TopicPartition, refresh: Refresh, end: int) -> None:
        """The next one is read meanwhile. Nothing is synced: what a power cut takes back the copy still has."""
        assert self._reader is not None
        offset = refresh.next_offset
        next_one, self._next = self._next, None
        if next_one is None or next_one[:2] != (key, offset):
            next_one = (key, offset, self._reader.ask(key, offset, PIECE_BYTES))
        piece = self._reader.answer(next_one[2], key, offset, end)
        if piece.missing:
            self._abandon(key.topic, f"records from {offset} on are missing or damaged")
            return
        if piece.next_offset < end:
            self._next = (key, piece.next_offset, self._reader.ask(key, piece.next_offset, PIECE_BYTES))
        with _moved(refresh, piece.next_offset):
            self._generations.stage(refresh, self._alive(piece.records))

    def _alive(self, records: Sequence[Record]) -> Sequence[Record]:
        """Those that have not outlived the time to live in their header: a consumer is not given them either."""
        now_ms = self._clock.wall_ms()
        return [one for one in records if not one.headers or not has_outlived(one, now_ms - one.timestamp)]

    def _abandon(self, topic: str, why: str) -> None:
        log.warning("topic %s cannot be rebuilt from the copy: %s; it is loaded from the broker", topic, why)
        self.superseded(topic)
        self._read_on()

    # ---- from the broker ----

    def takes(self, topic: str) -> bool:
        """Do the records of a topic belong to a rebuild?"""
        return any(key.topic == topic for key in self._refreshes)

    def waits(self, topic: str) -> bool:
        """Has the broker to load a topic before its records have an effect?"""
        return topic in self._waiting

    def switched(self, topic: str) -> None:
        """Readers see what was loaded of a topic."""
        self._waiting.discard(topic)
        self._forget(topic)

    def load(self, key: TopicPartition, records: Sequence[Record], position: Position) -> None:
        """Load records that came from the broker, up to a position."""
        refresh = self._refreshes.get(key)
        if refresh is not None and refresh.log_id != position.log_id:  # the topic was made again
            self.superseded(key.topic)
            return
        if refresh is None:  # the copy has nothing of it: it was empty
            refresh = self._begin(key, position.log_id, records[0].offset, position.next_offset)
        refresh.epoch = position.epoch
        new = [one for one in records if one.offset >= refresh.next_offset]
        with _moved(refresh, position.next_offset):
            self._generations.load(refresh, new)

    def switch(self) -> None:
        """Show what is complete, if it is time. All that was received is loaded: what was received beyond that has no
        records for it, as a gap has, or what has outlived its time."""
        for key, offset in self._subscriptions.next_offsets().items() if self._refreshes else ():
            found = self._refreshes.get(key)
            if found is not None and key not in self._reading and offset > found.next_offset:
                with _moved(found, offset):
                    self._generations.load(found, [])
        for key, refresh in list(self._refreshes.items()):
            if refresh.complete and key not in self._reading and self._generations.switch(refresh):
                self._refreshes.pop(key, None)

    def superseded(self, topic: str) -> None:
        """The broker has to load a topic: what was rebuilt of it does not count."""
        if self._beginning or topic not in self.topics:
            return
        self._reloads.end_rebuild(topic)
        self._reloads.want([topic])
        self._waiting.add(topic)
        self._forget(topic)

    def _forget(self, topic: str) -> None:
        for held in (self._refreshes, self._reading):
            for key in [key for key in held if key.topic == topic]:
                del held[key]


@contextmanager
def _moved(refresh: Refresh, next_offset: int) -> Iterator[None]:
    """A refresh is so far, unless that fails."""
    before, refresh.next_offset = refresh.next_offset, next_offset
    try:
        yield
    except BaseException:
        refresh.next_offset = before
        raise


def _is_half_rebuilt(effect: Effect) -> bool:
    return any(one.target >= 0 and one.reset_id.startswith(REBUILT) for one in effect.loading.values())
