"""Loading topics again beside their views: new generations of the tables, switched to in one transaction.

    RESET -> begin() -> load() into the staging file -> all partitions complete -> sorted, in a thread
          -> copied in slices into the next generation -> then what came since -> switch(): readers see it -> READY

Readers have the old rows until the switch, also across crashes: each step is stored, and goes on where it stood. What
is switched together, and when, reloads.py says. Handlers get the records of a refresh as they get others, when these
come.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from edgebroker.client.refresh import Refresh
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.threads import start_thread
from edgebroker.common.types import Position, TopicPartition
from edgebroker.consumer.database import AppDatabase, Loading
from edgebroker.consumer.declare.application import Topic
from edgebroker.consumer.handling.effect import DeadNow, Effect, Portion
from edgebroker.consumer.loaded_records import LoadedRecords
from edgebroker.consumer.reader import Reader
from edgebroker.consumer.reloads import Reloads
from edgebroker.consumer.staging_file import StagingFile
from edgebroker.consumer.views import Slice, View, Views, counting

log = logging.getLogger(__name__)

LEAST_PERCENT = 90


class Host(Protocol):
    """What loading needs of the instance."""

    def begun(self, key: TopicPartition, first: bool) -> None:
        """A partition is loaded again, the first one of its topic perhaps; within a transaction then."""

    def resume(self, refresh: Refresh, offset: int) -> int:
        """Where to go on with a refresh of which so much is loaded."""

    def switched(self, topic: str, positions: Mapping[tuple[str, int], Position]) -> None:
        """Readers see what was loaded; these positions hold from now on."""


class SortResult(NamedTuple):
    """A file of sorted rows, and how many rows of the same partitions readers see."""

    number: int
    path: Path
    before: int


class _Staged:
    """A topic with a view that is being loaded: its staging file, and how far the next generation is."""

    def __init__(self, file: StagingFile, view: View) -> None:
        self.file, self.view = file, view
        self.next: View | None = None
        # The thread that sorts, by number: begin() makes its result worthless.
        self.sorting, self.sorts = False, 0
        self.result: SortResult | None = None
        self.failure: Exception | None = None
        # Sorted rows that are copied, of how many (-1: they are not at hand); the last record of those behind.
        self.copied, self.total, self.applied = 0, -1, 0
        # Rows that readers see.
        self.before = -1

    @property
    def is_sorted(self) -> bool:
        return self.file.sorted.exists()

    @property
    def is_copied(self) -> bool:
        return 0 <= self.total <= self.copied


class Generations:
    """The staging store of an instance. `force`: show also what has fewer than nine tenths of the rows."""

    def __init__(
        self,
        database: AppDatabase,
        views: Views,
        topics: Mapping[str, Topic],
        effects: Mapping[str, Effect],
        host: Host,
        loaded: LoadedRecords,
        reloads: Reloads,
        clock: Clock,
        *,
        force: bool,
    ) -> None:
        self._database, self._views, self._topics, self._effects = database, views, topics, effects
        self._host, self._loaded_records, self._reloads = host, loaded, reloads
        self._clock, self._force = clock, force
        self._directory: Path = database.path.parent
        self._staged: dict[str, _Staged] = {}
        self._attached = ""
        self._handled: Loading | None = None
        self._slice, self._dropping = Slice(), True
        # Refreshes that were switched to: READY is asked for one after the other.
        self._over: set[str] = set()
        # Refreshes that are complete and have too few rows -> the sum of offsets below which they cannot have enough;
        # those that wait for their time.
        self._enough: dict[tuple[str, ...], int] = {}
        self._held: set[tuple[str, ...]] = set()
        for topic, effect in effects.items():
            if effect.view is None or not StagingFile.exists(self._directory, effect.view.name):
                continue
            staged = self._open(topic, effect.view)
            if not self._loading(topic):  # it was switched to, and then the process ended
                staged.file.remove()
                del self._staged[topic]

    def _open(self, topic: str, view: View) -> _Staged:
        staged = self._staged.get(topic)
        if staged is None:
            staged = self._staged[topic] = _Staged(StagingFile(self._directory, view.name, view.columns), view)
            following = self._views.next(view)
            if following is not None and staged.is_sorted:
                staged.next, staged.copied = following
        return staged

    def loading(self) -> set[tuple[str, int]]:
        """The partitions that are loaded again. Any thread."""
        return {(topic, partition) for topic in list(self._topics) for partition in self._loading(topic)}

    def _loading(self, topic: str) -> dict[int, Loading]:
        """The partitions that are loaded, as the database has it, and how far they are."""
        loading = {number: one for number, one in self._effects[topic].loading.copy().items() if one.target >= 0}
        staged = self._staged.get(topic)
        if staged is None:
            return loading
        found = staged.file.loading.copy()
        return {
            number: found[number] if number in found and found[number].reset_id == one.reset_id else one
            for number, one in loading.items()
        }

    # ---- the staging store ----

    def begin(self, refresh: Refresh) -> int:
        """Where to go on: behind what an earlier attempt has stored, or behind what readers see already."""
        key, effect = TopicPartition(refresh.topic, refresh.partition), self._effects[refresh.topic]
        known = effect.loading.get(key.partition)
        again = known is not None and known.reset_id == refresh.reset_id
        if known is not None and again and known.target < 0:
            self._over.add(refresh.reset_id)
            return max(known.position.next_offset, refresh.target)
        staged = self._open(key.topic, effect.view) if effect.view is not None else None
        # The database says whether it was begun; the staging file follows.
        if again:
            self._host.begun(key, False)
        else:
            self._begin(key, refresh)
        return self._host.resume(refresh, self._loaded(staged, effect.loading[key.partition], refresh, again))

    def _loaded(self, staged: _Staged | None, known: Loading, refresh: Refresh, again: bool) -> int:
        """How far a refresh is that was begun."""
        if staged is None:
            return known.position.next_offset
        found = staged.file.loading.get(refresh.partition)
        if not again or found is None or found.reset_id != refresh.reset_id:
            self._empty(staged, TopicPartition(refresh.topic, refresh.partition), refresh)
            return refresh.from_offset
        if self._effects[refresh.topic].handles:
            return min(found.position.next_offset, known.position.next_offset)
        return found.position.next_offset

    def _empty(self, staged: _Staged, key: TopicPartition, refresh: Refresh) -> None:
        """Nothing that was staged of a partition counts, nor what was sorted and copied of its topic."""
        self._views.detach()
        self._attached = ""
        with self._database.transaction():
            self._views.forget_next(staged.view)
        # Durable before the file changes: else a power cut leaves rows of the attempt before with those of this one.
        self._database.sync()
        staged.file.begin(key.partition, _state(refresh))
        staged.next, staged.copied, staged.total, staged.applied, staged.before = None, 0, -1, 0, -1
        staged.sorts += 1

    def _begin(self, key: TopicPartition, refresh: Refresh) -> None:
        """A partition is to be loaded from its beginning. If it was being loaded already, handlers begin with its whole
        topic from the beginning: what they have made of the others is removed with what they made of this one."""
        log.info("%s/%d is loaded again, from %d to %d", *key, refresh.from_offset, refresh.target)
        effect, loading = self._effects[key.topic], self._loading(key.topic)
        others = [partition for partition in loading if partition != key.partition]
        restart = effect.handles and key.partition in loading
        with self._database.transaction():
            self._database.set_loading(*key, _state(refresh))
            for partition in others if restart else []:
                self._database.forget_loading(key.topic, partition)
            self._host.begun(key, restart or not loading)
        effect.loading[key.partition] = _state(refresh)
        for partition in others if restart else []:
            del effect.loading[partition]
            self._reloads.announce_again(TopicPartition(key.topic, partition))

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        """Store the next records together with the position behind them, durably: they are acknowledged next."""
        if self.stage(refresh, records):
            self._database.sync()
        staged = self._staged.get(refresh.topic)
        if staged is not None:
            staged.file.sync()

    def stage(self, refresh: Refresh, records: Sequence[Record]) -> bool:
        """Store the next records together with the position behind them; True: in the database, too."""
        key, effect = TopicPartition(refresh.topic, refresh.partition), self._effects[refresh.topic]
        if key.partition not in effect.loading or effect.loading[key.partition].target < 0:
            return False  # it begins again, or is over: what was received before does not count
        staged, dead = self._staged.get(key.topic), list[DeadNow]()
        if staged is not None:
            known = staged.file.loading[key.partition]
            with staged.file.appending(key.partition, _further(known, _state(refresh))):
                dead = effect.stage(_behind(known, records), staged.file.put)
        handled = effect.loading[key.partition]
        store = effect.handles or bool(dead)
        if store:
            portion = Portion(key, _behind(handled, records) if effect.handles else [])
            self._loaded_records.handle(
                portion, dead, lambda end: self._set_loading(key, _further(handled, _state(refresh, end)))
            )
            if self._handled is not None:
                effect.loading[key.partition], self._handled = self._handled, None
        return store

    def switch(self, refresh: Refresh) -> bool:
        """Show the next generations once all that is to change together is complete, sorted and copied."""
        if refresh.reset_id in self._over:
            return True
        topics = self._reloads.together(refresh.topic)
        loading = {topic: self._loading(topic) for topic in topics}
        if not all(self._is_complete(topic, loading[topic]) for topic in topics):
            return False
        ready = [self._prepare(topic, loading[topic]) for topic in topics]
        if not all(ready) or not all(self._is_large_enough(topic, loading[topic]) for topic in topics):
            return False
        if not self._reloads.may_switch(topics):
            attempt = _attempt(loading[refresh.topic])
            if attempt not in self._held:
                self._held.add(attempt)
                log.info("%s: loaded; readers see it when it is time (activate_refresh)", ", ".join(topics))
            return False
        self._switch(loading)
        return True

    def _is_complete(self, topic: str, loading: Mapping[int, Loading]) -> bool:
        complete = all(one.position.next_offset >= one.target for one in loading.values())
        return complete and bool(loading) and self._reloads.is_whole(topic, set(loading))

    def _prepare(self, topic: str, loading: Mapping[int, Loading]) -> bool:
        """Is the next generation of a topic filled? What is missing is begun: the sort, when hardly anything is to come
        that would not be in it."""
        staged = self._staged.get(topic)
        if staged is None:
            return True
        if staged.failure is not None:
            failure, staged.failure = staged.failure, None
            raise failure
        if not staged.is_sorted and not staged.sorting and staged.result is None:
            if not self._reloads.is_caught_up(topic, loading):
                return False
            staged.sorting, number, partitions = True, staged.sorts, list(staged.file.loading)
            start_thread("edgebroker-sort", lambda: self._sort(staged, number, partitions))
        if not staged.is_copied:
            return False
        while self._apply_since(staged):
            pass  # a few: step() has applied what came before
        return True

    def _sort(self, staged: _Staged, number: int, partitions: list[int]) -> None:
        """In a thread."""
        try:
            path, reader = staged.file.sort(number), Reader(self._database.path)
            before = reader.rows(counting(staged.view, partitions), partitions)[0][0]
            reader.close()
            staged.result = SortResult(number, path, before)
        except Exception as error:
            staged.failure = error
        staged.sorting = False

    def _switch(self, loading: Mapping[str, Mapping[int, Loading]]) -> None:
        positions = {
            topic: {(topic, partition): one.position for partition, one in partitions.items()}
            if self._topics[topic].scope == "each"
            else {}
            for topic, partitions in loading.items()
        }
        self._views.detach()
        self._attached = ""
        shown: list[tuple[_Staged, View]] = []
        with self._database.transaction():
            for topic, partitions in loading.items():
                staged = self._staged.get(topic)
                if staged is not None and staged.next is not None:
                    self._views.switch(staged.view, staged.next, list(partitions), self._topics[topic].version)
                    shown.append((staged, staged.next))
                self._database.set_positions(positions[topic])
                self._database.loaded(topic, partitions)
        # The broker is told next, and asks for nothing of this again.
        self._database.sync()
        for staged, view in shown:
            self._effects[view.topic].view = view
            staged.file.remove()
            del self._staged[view.topic]
        self._dropping = True
        for topic, partitions in loading.items():
            self._effects[topic].loading.update({number: one._replace(target=-1) for number, one in partitions.items()})
            self._over.update(one.reset_id for one in partitions.values())
            self._host.switched(topic, positions[topic])
            log.info("topic %s: readers see what was loaded again", topic)

    def _set_loading(self, key: TopicPartition, one: Loading) -> None:
        """How far handlers are; within a transaction, which may be undone."""
        self._database.set_loading(*key, one)
        self._handled = one

    # ---- slices ----

    def step(self) -> bool:
        """Do a slice of what is due, between two transactions of others; False: there is nothing to do now."""
        for staged in self._staged.values():
            if staged.result is not None:
                self._accept(staged, staged.result)
            if staged.is_sorted and not staged.is_copied:
                self._database.restart_log()
                self._copy_some(staged)
                return True
            if staged.is_copied and self._apply_since(staged):
                return True
        self._dropping = self._dropping and self._views.drop_some()
        return self._dropping

    def _accept(self, staged: _Staged, result: SortResult) -> None:
        """A thread has sorted; it counts unless a partition was begun again meanwhile."""
        staged.result = None
        if result.number == staged.sorts:
            staged.file.accept(result.path)
            staged.before = result.before

    def copied(self) -> list[str]:
        """The topics whose next generation is filled: they may be ready to be switched."""
        return [topic for topic, staged in self._staged.items() if staged.is_copied]

    def _copy_some(self, staged: _Staged) -> None:
        view = staged.view
        if self._attached != view.topic:
            staged.total = self._views.attach(staged.file.sorted)
            self._attached = view.topic
            staged.applied = staged.file.bound()
        began, count = self._clock.monotonic(), min(self._slice.rows, staged.total - staged.copied)
        with self._database.transaction():
            new = staged.next if staged.next is not None else self._views.begin_next(view)
            copied = self._views.copy(new, staged.copied, count)
        staged.next, staged.copied = new, copied
        self._slice.took(self._clock.monotonic() - began)

    def _apply_since(self, staged: _Staged) -> bool:
        """Apply some of the records that came after the sort; False: there are none."""
        records = staged.file.rows_since(staged.applied, self._slice.rows)
        if not records or staged.next is None:
            return False
        latest = {one.row[0]: one for one in records}
        rows = [one.row for one in latest.values() if not one.gone]
        with self._database.transaction():
            self._views.put(staged.next, rows, [(key,) for key, one in latest.items() if one.gone])
        staged.applied = records[-1].number
        return True

    def _is_large_enough(self, topic: str, loading: Mapping[int, Loading]) -> bool:
        """Has what was loaded not much fewer rows than readers see? A mistake at the top must not empty the shelves."""
        staged = self._staged.get(topic)
        if staged is None or staged.next is None or self._force:
            return True
        attempt, end = _attempt(loading), sum(one.position.next_offset for one in loading.values())
        told = attempt in self._enough
        if told and end < self._enough[attempt]:
            return False
        if staged.before < 0:  # it was sorted before this start
            staged.before = self._views.count(staged.view, list(loading))
        least = -(-staged.before * LEAST_PERCENT // 100)
        if staged.total >= least and not told:
            return True
        if not self._reloads.is_caught_up(topic, loading):
            return False  # what is to come may be what is missing
        now = self._views.count(staged.next, list(loading))
        if now >= least:
            return True
        if not told:
            log.error(
                "topic %s: what was loaded again has much fewer rows (%d of %d): it is not shown until it has %d, or "
                "the application is started with --force", topic, now, staged.before, least,
            )  # fmt: skip
        self._enough[attempt] = end + least - now
        return False

    def close(self) -> None:
        """What was begun goes on with the next start."""
        self._views.detach()
        for staged in self._staged.values():
            staged.file.close()


def _attempt(loading: Mapping[int, Loading]) -> tuple[str, ...]:
    return tuple(sorted(one.reset_id for one in loading.values()))


def _behind(known: Loading, records: Sequence[Record]) -> list[Record]:
    """Those that are not loaded yet."""
    return [record for record in records if record.offset >= known.position.next_offset]


def _further(known: Loading, new: Loading) -> Loading:
    """What came once more takes nothing back."""
    return new if new.position.next_offset >= known.position.next_offset else known


def _state(refresh: Refresh, end: int = -1) -> Loading:
    """How far it is: up to an offset, or to the end of what was given."""
    position = refresh.position if end < 0 else refresh.position._replace(next_offset=end)
    return Loading(refresh.reset_id, position, refresh.target)
