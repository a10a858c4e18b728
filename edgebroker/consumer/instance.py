"""A running application: records from the broker, their effect in transactions, acknowledgements behind a sync.

    poll() -> portions -> one transaction: effects and positions -> once a second: sync, then acknowledge

Order wins: where a handler fails its partition waits, the others go on. What was committed counts, whatever becomes of
the acknowledgement: a record that comes again is passed over.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from edgebroker.client.consumer import Consumer
from edgebroker.client.refresh import Refresh
from edgebroker.common.outcome import Outcome
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import SystemClock, sleep
from edgebroker.common.types import Position, TopicPartition
from edgebroker.consumer.config import AppConfig
from edgebroker.consumer.copy.copy_reader import CopyReader
from edgebroker.consumer.copy.rebuild import REBUILT, Rebuild
from edgebroker.consumer.database import AppDatabase, DatabaseError, is_shortage
from edgebroker.consumer.declare.application import Application
from edgebroker.consumer.generation import Generations
from edgebroker.consumer.handling.calls import Calls
from edgebroker.consumer.handling.dead_records import DeadRecords
from edgebroker.consumer.handling.effect import (
    MOST_REASON,
    Changed,
    Effect,
    FailedRecord,
    Observer,
    Portion,
    portions_of,
)
from edgebroker.consumer.handling.errors import StoppedError
from edgebroker.consumer.handling.hooks import Hooks
from edgebroker.consumer.handling.in_hand import InHand
from edgebroker.consumer.handling.outbox import OutboxSender
from edgebroker.consumer.handling.waiting import WaitingPartition, once
from edgebroker.consumer.handling.watch import Watch
from edgebroker.consumer.loaded_records import EndedError, LoadedRecords, having_in_hand
from edgebroker.consumer.reloads import Reloads
from edgebroker.consumer.subscriptions import REMIND_SECONDS, Subscriptions
from edgebroker.consumer.views import Views

log = logging.getLogger(__name__)

# A transaction takes what has arrived: at most so many records, and what came within so long.
MOST_RECORDS, GATHER_SECONDS = 5000, 0.05
SYNC_SECONDS, PRESENCE_SECONDS, RETRY_SECONDS = 1.0, 10.0, 1.0
# What may be unacknowledged before the next second.
UNACKED_BYTES = 4 << 20
WAIT_SECONDS = 0.2
# How long it is waited for the copy to have more room, or to be durable.
COPY_SECONDS = 0.02
# Of several consumers each is waited for so long.
SHARED_SECONDS = 0.005
# How often it is looked whether anything is missing.
CURRENT_SECONDS = 0.2
# How often readers of the database are told how current it is.
AS_OF_SECONDS = 10.0
# No more records are taken while so many wait in the outbox.
MOST_OUTGOING = 100_000


class Instance:
    """run() belongs to one thread. `watch` sees what that thread calls; jobs are run by it between two transactions."""

    def __init__(
        self,
        application: Application,
        database: AppDatabase,
        settings: AppConfig,
        observer: Observer,
        copied: CopyReader | None,
    ) -> None:
        self._database, self._clock, self._stopping = database, SystemClock(), False
        self._copy = copied.copy if copied is not None else None
        self._observer = observer
        self._jobs: deque[Callable[[], None]] = deque()
        # For whoever asks, any thread: records whose effect is stored.
        self.records = self._failures = 0
        self._current_due, self._as_of_due, self._busy = 0.0, 0.0, False
        # What readers were told of how current topics are, in milliseconds since 1970.
        self._as_of: dict[str, int] = {}
        self.watch = Watch(self._clock.monotonic)
        self._calls = Calls(database, self.watch, self._clock, settings.node, log)
        self._positions = database.positions()
        views = Views(database, self._clock)
        self._effects = {
            name: Effect(topic, database, views, self._calls, self._clock.wall_ms)
            for name, topic in application.topics.items()
        }
        self._topics = application.topics
        self.dead_records = DeadRecords(database, self._effects, observer)
        self._in_hand = InHand(database.path.parent)
        server, credentials = settings.server, settings.credentials
        self._outgoing, self._full_outbox = OutboxSender(database.path, server, credentials, self._clock), False
        received = self._copy.received if self._copy is not None else None
        self.subscriptions = Subscriptions(
            settings.name, settings.node, server, credentials, self._clock, self._lost, received
        )
        self._reloads = Reloads(self._topics, self.subscriptions, settings.activate_refresh, self._clock)
        self._loaded = LoadedRecords(database, self._effects, self._in_hand, self._clock, lambda: self._stopping)
        self.generations = Generations(
            database,
            views,
            self._topics,
            self._effects,
            self,
            self._loaded,
            self._reloads,
            self._clock,
            force=settings.force,
        )
        self._rebuild = Rebuild(
            copied,
            self.generations,
            self._reloads,
            self.subscriptions,
            self._topics,
            self._effects,
            self._positions,
            self._clock,
        )
        # What was received and is not stored yet; nothing more is asked for before it is.
        self._held: list[Portion] = []
        self._to_load = deque[Portion]()
        # Of views that are to be loaded again: their rows and positions stay as they are until that begins.
        self._early: list[Portion] = []
        self._short = False
        self._waiting: dict[TopicPartition, WaitingPartition] = {}
        # Committed, and not acknowledged yet.
        self._unacknowledged: dict[TopicPartition, int] = {}
        # Durable here, and not in the copy yet.
        self._synced: dict[TopicPartition, int] = {}
        self._unacked_bytes = 0
        self._sync_due = self._presence_due = self._held_up_due = self._copy_due = 0.0
        self._hooks = Hooks(application.hooks, self._calls, database, self._clock)
        self.ready = self._begun = False

    def submit(self, job: Callable[[], None]) -> None:
        """Have run() do something between two transactions. Any thread."""
        self._jobs.append(job)

    def positions(self) -> dict[tuple[str, int], Position]:
        """Where reading goes on, of topics whose positions are kept here. Any thread."""
        return dict(self._positions)

    def is_stale(self, topic: str) -> bool:
        """Has the view of a topic other columns or another version than the application declares, for now? Any
        thread."""
        return self._effects[topic].stale

    @property
    def failures(self) -> int:
        """Attempts of handlers that failed. Any thread."""
        return self._failures + self._loaded.failures

    @property
    def waiting(self) -> int:
        """Partitions whose first record waits for another attempt. Any thread."""
        return len(self._waiting)

    def stop(self) -> None:
        """End soon: what has begun is finished. Any thread."""
        self._stopping = True

    def run(self) -> None:
        """Until stop(). Raises StoppedError, sqlite3.Error, and what a consumer raises."""
        try:
            self._hooks.call("start")
            while not self._stopping:
                try:
                    if not self._begun:
                        self._rebuild.start()
                        self._begun = True
                    self._turn()
                except DatabaseError as error:
                    if not is_shortage(error):
                        raise
                    self._wait_for_room(error)
                except EndedError:
                    break
            self._hooks.call("stop")
        finally:
            try:
                self._acknowledge()
            finally:
                self.subscriptions.close()
                self.generations.close()
                self._outgoing.close()
                self._in_hand.close()
                try:
                    self._remove_sent()
                    self._database.finish()
                except DatabaseError as error:
                    log.warning("the next start takes longer: %s", error)

    def _wait_for_room(self, error: BaseException) -> None:
        """Nothing can be stored: readers have what is here. What was received waits, and holds its leases."""
        if not self._short:
            self._short = True
            log.error("nothing can be stored: %s; what is here is served, and it is tried again every second", error)
        self.subscriptions.in_progress()
        sleep(RETRY_SECONDS)

    def _turn(self) -> None:
        if not self._held:
            early, self._early = self._early, []
            for portion in early:
                self._take(portion)
            self._gather()
            self._load_rebuilt()
            self._reloads.ask()
            self._try_again()
        if self._held:
            self._apply()
        if self._short:
            self._short = False
            log.warning("records are stored again")
        if self._database.outgoing:
            self._remove_sent()
            self._outgoing.wake()
        now = self._clock.monotonic()
        if now >= self._sync_due or self._unacked_bytes >= UNACKED_BYTES:
            self._sync_due = now + SYNC_SECONDS
            self._acknowledge()
            self._look_at_readers(now)
            self.dead_records.tell()
            self.dead_records.make_room()
        elif self._synced and now >= self._copy_due:
            self._copy_due = now + COPY_SECONDS
            self._acknowledge_synced()
        if (self._waiting or self._early) and now >= self._presence_due:
            self._presence_due = now + PRESENCE_SECONDS
            self.subscriptions.in_progress()
        self._hooks.call_due()
        self._busy = self.generations.step() or self._rebuild.busy
        if now >= self._current_due:
            self._current_due = now + CURRENT_SECONDS
            self.subscriptions.switch(self._reloads.asked)
            self._rebuild.switch()
            if not self._held and not self._waiting and not self._early:
                self._note_current(now)
        while self._jobs:
            self._jobs.popleft()()
        if not self.ready and self._is_ready():
            self.ready = True
            log.info("ready: everything is there that was published when this began")
            self._hooks.call("ready")

    def _note_current(self, now: float) -> None:
        """Note, and tell readers once in a while, of which topics nothing is missing."""
        behind = {topic for topic in self._topics if self.is_stale(topic)} | self._rebuild.topics
        behind |= {topic for topic, _ in self.generations.loading()}
        self.subscriptions.note_current(behind)
        ages = {topic: self.subscriptions.age(topic) for topic, effect in self._effects.items() if effect.view}
        wall_ms = self._clock.wall_ms()
        as_of = {topic: wall_ms - round(age * 1000) for topic, age in ages.items() if age is not None}
        new = {topic: when for topic, when in as_of.items() if when - self._as_of.get(topic, 0) >= 1000}
        if new and (now >= self._as_of_due or new.keys() - self._as_of.keys()):
            self._as_of_due = now + AS_OF_SECONDS
            self._as_of.update(new)
            with self._database.transaction():
                self._database.set_as_of(new)

    # ---- records ----

    def _try_again(self) -> None:
        """Take up partitions whose first record failed, when their time has come."""
        now = self._clock.monotonic()
        for key, waiting in list(self._waiting.items()):
            if waiting.given_up:
                self._held += self._give_up(key, waiting)
            elif now >= waiting.due:
                self._held.append(Portion(key, list(waiting.records), waiting.attempts + 1))

    def _gather(self) -> None:
        """Take what has arrived. It is held at once: poll() may raise, for a refresh that cannot be stored."""
        if self._is_outbox_full():
            sleep(WAIT_SECONDS)
            return
        if self._copy is not None and not self._copy.has_room:
            sleep(COPY_SECONDS)
            return
        consumers, wait = self.subscriptions.consumers, self._wait()
        if not consumers:
            sleep(wait)
            return
        until = self._clock.monotonic() + wait
        wait = wait if len(consumers) == 1 else 0.0
        while not any([self._gather_from(consumer, wait) for consumer in consumers]):
            if self._clock.monotonic() >= until:
                break
            wait = SHARED_SECONDS  # whichever has something is not kept waiting by the others

    def _gather_from(self, consumer: Consumer, wait: float) -> bool:
        """Take what has arrived at one consumer; False: nothing had, for so many seconds."""
        count, until = 0, 0.0
        while records := self.subscriptions.poll(consumer, wait):
            wait, until = 0.0, until or self._clock.monotonic() + GATHER_SECONDS
            count += len(records)
            for portion in portions_of(records):
                self._take(portion)
            if count >= MOST_RECORDS or self._clock.monotonic() >= until:
                break
        return count > 0

    def _wait(self) -> float:
        """How long to wait for records: until something else is due."""
        now = self._clock.monotonic()
        if self._busy or self._jobs:
            return 0.0
        due = [now + WAIT_SECONDS, *(one.due for one in self._waiting.values()), *self._hooks.due]
        return max(0.0, min(due) - now)

    def _take(self, portion: Portion) -> None:
        if self._rebuild.takes(portion.key.topic):
            self._to_load.append(portion)
        elif self._rebuild.waits(portion.key.topic) and not self._reloads.is_refused(portion.key):
            self._early.append(portion)
        elif (new := self._new(portion)) is not None:
            self._held.append(new)

    def _new(self, portion: Portion) -> Portion | None:
        """The part of a portion that has had no effect yet, unless its partition waits."""
        waiting = self._waiting.get(portion.key)
        if waiting is not None:
            known = waiting.records[-1].offset
            waiting.records += [record for record in portion.records if record.offset > known]
            return None
        stored = self._positions.get(portion.key)
        if stored is None:
            return portion
        if stored.log_id != self._after(portion.records[0]).log_id:
            # The topic was made again: what readers see is of the one before, and all of it has to go.
            self._reloads.want_again(portion.key.topic)
            return None
        records = [record for record in portion.records if record.offset >= stored.next_offset]
        if not records:  # the copy had lost them, perhaps
            self._settled(portion)
        return portion._replace(records=records) if records else None

    def _settled(self, portion: Portion) -> None:
        """What these records do is stored."""
        end = portion.records[-1].offset + 1
        self._unacknowledged[portion.key] = max(end, self._unacknowledged.get(portion.key, 0))
        self._unacked_bytes += _size(portion.records)

    def _after(self, record: Record) -> Position:
        return self.subscriptions.position_after(record)

    def _apply(self) -> None:
        """Apply what is held in one transaction. A portion that fails is cut off before the record that failed, and
        what is left of all is applied again: the effects before are those of another transaction by then."""
        while self._held:
            portions = self._together()
            try:
                positions = self._store(portions)
            except FailedRecord as failure:
                self._held = self._without(self._held, failure)
            else:
                self._held = self._held[len(portions) :]
                self._committed(portions, positions)

    def _together(self) -> list[Portion]:
        """What goes into the next transaction: all that is held, but one by one what the process died of."""
        if not self._in_hand:
            return self._held
        first = self._held[0]
        count = self._in_hand.together(first.key, first.records)
        if count < len(first.records):
            rest = Portion(first.key, first.records[count:])
            self._held[:1] = [first._replace(records=first.records[:count]), rest]
        return self._held[:1]

    def _store(self, portions: list[Portion]) -> dict[tuple[str, int], Position]:
        """The effects of portions and the positions behind them, in one transaction."""
        positions = self._positions_behind(portions)
        changed: list[Changed] = []
        with having_in_hand(self._in_hand, portions, self._effects), self._database.transaction():
            for portion in portions:
                self._effects[portion.key.topic].apply(portion, changed)
            self._database.set_positions(positions)
        self._publish(changed)
        return positions

    def _publish(self, changed: list[Changed]) -> None:
        for one in changed:
            self._observer.published(*one)

    def _positions_behind(self, portions: list[Portion]) -> dict[tuple[str, int], Position]:
        return {portion.key: self._after(portion.records[-1]) for portion in portions if self._owns(portion.key.topic)}

    def _owns(self, topic: str) -> bool:
        """Does this instance keep the positions of a topic itself?"""
        return self._topics[topic].scope == "each"

    def _committed(self, portions: list[Portion], positions: Mapping[tuple[str, int], Position]) -> None:
        self._positions.update(positions)
        for portion in portions:
            self.records += len(portion.records)
            self._settled(portion)
            waiting = self._waiting.get(portion.key)
            if waiting is not None and waiting.records[-1].offset <= portion.records[-1].offset:
                del self._waiting[portion.key]

    def _without(self, portions: list[Portion], failure: FailedRecord) -> list[Portion]:
        """What can be applied now: everything but the record that failed, and what follows it in its partition."""
        failed, record, place = failure.portion, failure.record, portions.index(failure.portion)
        waiting = self._waiting.get(failed.key)
        rest = [*failed.records[failure.before :], *(waiting.records if waiting is not None else [])]
        for portion in portions[place + 1 :]:
            rest += portion.records if portion.key == failed.key else []
        self._failures += 1
        attempts = failed.attempt if failure.before == 0 else 1
        pause = failure.handler.policy.pause(attempts)
        now = self._waiting[failed.key] = WaitingPartition(
            once(rest), attempts, self._clock.monotonic() + pause, failure
        )
        again = "" if now.given_up else f"; again in {pause:.1f} s"
        log.warning("%s: attempt %d failed (%s)%s", _name(record), attempts, failure.why, again)
        left = [portion for portion in portions[place + 1 :] if portion.key != failed.key]
        before = [failed._replace(records=failed.records[: failure.before])] if failure.before else []
        return portions[:place] + before + left

    def _give_up(self, key: TopicPartition, waiting: WaitingPartition) -> list[Portion]:
        """Pass over a record that no attempt helps, now that what came before it is committed; what follows it."""
        record, *rest = waiting.records
        then, why = waiting.failure.handler.policy.then, waiting.failure.why
        if then == "stop":
            log.error("%s: given up after %d attempts; stopping, as its policy says", _name(record), waiting.attempts)
            raise StoppedError(f"{_name(record)}: {why}")
        what = "a dead record" if then == "dead_letter" else "left out"
        log.error("%s: given up after %d attempts (%s); it is %s", _name(record), waiting.attempts, why, what)
        del self._waiting[key]
        if then == "dead_letter" and not self._owns(key.topic):
            self._reject(record, why)
            return []
        portion, effect, changed = Portion(key, [record]), self._effects[key.topic], list[Changed]()
        positions = self._positions_behind([portion])
        with self._database.transaction():
            effect.apply(portion, changed, {record.offset})
            if then == "dead_letter":
                effect.bury(record, waiting.attempts, why)
            self._database.set_positions(positions)
        self._publish(changed)
        self._positions.update(positions)
        self._unacknowledged[key] = record.offset + 1
        return [Portion(key, rest)] if rest else []

    def _reject(self, record: Record, why: str) -> None:
        """Have the broker make a dead letter of it. What follows it comes again."""
        self._acknowledge()
        self.subscriptions.reject(record, why[:MOST_REASON])
        key = (record.topic, record.partition)
        self._held = [portion for portion in self._held if portion.key != key]

    def _load_rebuilt(self) -> None:
        while self._to_load:
            portion = self._to_load[0]
            if self._rebuild.takes(portion.key.topic):
                self._rebuild.load(portion.key, portion.records, self._after(portion.records[-1]))
            if self._rebuild.takes(portion.key.topic):
                self._settled(portion)
            else:  # it was switched to meanwhile, or the broker has to load it
                self._take(portion)
            self._to_load.popleft()
        if self._rebuild.busy and not self._is_outbox_full():
            self._rebuild.step()

    # ---- loading again ----

    def begun(self, key: TopicPartition, first: bool) -> None:
        """A partition is loaded again: what waits of it is of the data before."""
        self._rebuild.superseded(key.topic)
        self._waiting.pop(key, None)
        self._held = [portion for portion in self._held if portion.key != key]
        self._early = [portion for portion in self._early if portion.key != key]
        self._unacknowledged.pop(key, None)
        self._synced.pop(key, None)
        self._reloads.want(self._reloads.together(key.topic))
        if first:
            self._hooks.reset()

    def resume(self, refresh: Refresh, offset: int) -> int:
        """Where to go on with a refresh of which so much is loaded: the copy may lack what came last."""
        if self._copy is None or refresh.reset_id.startswith(REBUILT):
            return offset
        return self._copy.resume(refresh, offset)

    def switched(self, topic: str, positions: Mapping[tuple[str, int], Position]) -> None:
        """Readers see what was loaded; these positions hold from now on."""
        self._positions.update(positions)
        self._reloads.switched(topic)
        self._rebuild.switched(topic)
        self._observer.reset(topic)

    # ---- the outbox ----

    def _remove_sent(self) -> None:
        """Remove what was sent from the outbox."""
        settled = self._outgoing.settled()
        if not settled:
            return
        with self._database.transaction():
            self._database.remove_sent([one.number for one in settled if not one.refused])
            for one in settled:
                if one.refused:
                    self._database.bury_unsent(one.number, one.refused, self._clock.wall_ms())
        self._outgoing.removed(len(settled))

    def _is_outbox_full(self) -> bool:
        full = self._database.outgoing >= MOST_OUTGOING
        if full and not self._full_outbox:
            log.warning("%d records wait in the outbox: no more are handled until some are sent", MOST_OUTGOING)
        self._full_outbox = full
        return full

    # ---- what is asked for ----

    def load_again(self, topic: str) -> tuple[Outcome, str]:
        """Have a topic loaded again. A job."""
        if topic not in self._topics:
            return Outcome.NOT_FOUND, f"this application does not read {topic}; it reads {', '.join(self._topics)}"
        self._reloads.want([topic])
        return Outcome.OK, ""

    def activate(self) -> tuple[Outcome, str]:
        """Show what was loaded again and waits for it. A job."""
        return self._reloads.activate(self.generations.copied())

    # ---- acknowledging ----

    def _acknowledge(self) -> None:
        """Make durable what is committed, and say so to the broker, as far as the copy has it."""
        if self._unacknowledged:
            self._database.sync()
            self._synced.update(self._unacknowledged)
            self._unacknowledged, self._unacked_bytes = {}, 0
        self._acknowledge_synced()

    def _acknowledge_synced(self) -> None:
        for key, end in list(self._synced.items()):
            stored = self._copy.stored(key, end) if self._copy is not None and self._owns(key.topic) else end
            self.subscriptions.acknowledge(key, stored)
            if stored >= end:
                del self._synced[key]

    def _look_at_readers(self, now: float) -> None:
        """Say it when another program keeps the database growing."""
        if not self._database.restart_log() and now >= self._held_up_due:
            self._held_up_due = now + REMIND_SECONDS
            log.warning(
                "%s-wal has grown to %d MiB, because another program keeps a transaction open: it grows until that one "
                "ends it", self._database.path, self._database.wal_bytes() >> 20,
            )  # fmt: skip

    def _lost(self, partitions: Sequence[TopicPartition]) -> None:
        """Partitions are another member's from now on."""
        self._acknowledge()
        for key in partitions:
            self._waiting.pop(key, None)
        self._held = [portion for portion in self._held if portion.key not in partitions]
        self._early = [portion for portion in self._early if portion.key not in partitions]

    # ---- readiness ----

    def _is_ready(self) -> bool:
        """Is everything there that was published when this began, in views as they are declared?"""
        loading = self._rebuild.topics or any(map(self._rebuild.waits, self._topics))
        return not (self._waiting or self._held or loading) and self.subscriptions.are_complete()


def _name(record: Record) -> str:
    return f"{record.topic}/{record.partition} record {record.offset}"


def _size(records: Sequence[Record]) -> int:
    """Bytes of records, about: as if all were like the first and the last."""
    ends = (records[0], records[-1])
    return len(records) * (64 + sum(len(record.value or b"") for record in ends) // 2)
