"""The copy that an application keeps of its topics: their batches as the broker has stored them, in a segment log.

    received() -> on the loop: what is new of it -> appended -> durable -> its records may be acknowledged

A partition has a log of its own, with the offsets and the bytes of the broker's. What was received stays in memory
until it is durable. A gap in what the broker has is one here; where the broker has another log, or another history of
it, the copy begins again. The oldest segments go when there is too much, or when the disk wants room.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from edgebroker.client.refresh import Refresh
from edgebroker.common import batch
from edgebroker.common.batch import EXPLANATION, STORED_BATCH_BYTES, Reason
from edgebroker.common.crc32c import crc32c
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import Delivery, Position, TopicPartition, TopicSettings
from edgebroker.storage.engine import Log
from edgebroker.storage.settings import HousekeepingSettings, StoreSettings
from edgebroker.storage.store import SegmentStore
from edgebroker.storage.types import ColdRead, DurableChunk, Identity, LogInventory

log = logging.getLogger(__name__)

COPY = "copy"
# Received, and not durable yet: no more is taken then.
BACKLOG_BYTES, TURN_BYTES = 16 << 20, 1 << 20
# The logs are synced so often at most: nothing is acknowledged more than once a second.
COMMIT_SECONDS, READ_SECONDS, RETRY_SECONDS = 0.1, 5.0, 0.5
# A copy has about so many segments when it is full, none of them larger than this.
SEGMENTS, SEGMENT_BYTES = 64, 16 << 20
# So much is left to the local database; after so long without room, records are left out.
LEAST_FREE_BYTES, FULL_SECONDS = 64 << 20, 5.0
DAY_MS, VERIFY_BYTES = 86_400_000, 4 << 20
_LATER = {Outcome.OVERLOADED, Outcome.DISK_FULL}


class CopiedPartition(NamedTuple):
    """What there is of a partition: [start, end), the last of it of a history `epoch`. `rebuild_from`: a view can be
    built from what is here from this offset on; -1: the copy does not have all of it."""

    log_id: bytes
    epoch: int
    start: int
    end: int
    rebuild_from: int


class _Feed:
    """What was received of a partition and is not durable yet: `staged` is with the disk, and up to which offset,
    `waiting` comes next. `busy`: its log is being made or changed; `due`: it goes on in a moment."""

    def __init__(self) -> None:
        self.waiting, self.staged = deque[Delivery](), deque[tuple[Delivery, int]]()
        self.busy = self.due = False


class SegmentCopy:
    """Belongs to the loop thread, but for what says otherwise. `positions` are those that the application has stored
    before: the copy of what it reads from the beginning, in `from_beginning`, is whole without one."""

    def __init__(
        self,
        path: Path,
        scheduler: Scheduler,
        clock: Clock,
        *,
        max_bytes: int,
        hours: float,
        positions: Container[tuple[str, int]],
        from_beginning: Container[str],
    ) -> None:
        """Open or make it; takes as long as recovery does. `hours` 0: age removes nothing. Raises OSError,
        DataDirectoryError, DataDirectoryInUseError and FormatTooNewError."""
        self._scheduler, self._positions, self._from_beginning = scheduler, positions, from_beginning
        self._feeds: dict[TopicPartition, _Feed] = {}
        # Where the refresh of a partition begins, and what it has to reach.
        self._refreshes: dict[TopicPartition, Refresh] = {}
        # For any thread.
        self._logs: dict[TopicPartition, CopiedPartition] = {}
        self.failure = ""
        # There is no room: since when, and whether for so long that what comes is left out.
        self._full_since, self.left_out = 0.0, False
        # The first is counted by who receives, the second by the loop.
        self._received = self._settled = 0
        self._engine = SegmentStore(path, scheduler, clock, _settings(max_bytes, hours))
        self._engine.open(self)
        for one in self._engine.logs():
            self._note(one)

    def close(self, timeout: float) -> None:
        """Store and release everything, once flush() was True."""
        self._engine.close(timeout)

    def flush(self) -> bool:
        """Store what was received without waiting; True when nothing is left. The loop runs meanwhile."""
        return (self._engine.flush() and not self.backlog) or bool(self.failure)

    # ---- any thread ----

    def received(self, delivery: Delivery) -> None:
        """Take a delivery; the thread of the consumers."""
        self._received += len(delivery.batches)
        self._scheduler.call_soon_threadsafe(lambda: self._receive(delivery))

    def resume(self, refresh: Refresh, offset: int) -> int:
        """A partition is loaded again, and what is before its beginning is no part of it: where to go on, when so much
        of it is loaded and the copy may lack some."""
        found = self._logs.get(TopicPartition(refresh.topic, refresh.partition))
        self._scheduler.call_soon_threadsafe(lambda: self._note_refresh(refresh))
        if found is None or found.log_id != refresh.log_id:
            return refresh.from_offset
        return max(refresh.from_offset, min(offset, found.end))

    def start(self, key: TopicPartition, position: Position) -> Position:
        """Where to read on, when the effects of records are stored up to a position and the copy may lack some."""
        found = self._logs.get(key)
        if found is None or found.log_id != position.log_id or found.end >= position.next_offset:
            return position
        return Position(found.log_id, found.epoch, found.end)

    @property
    def backlog(self) -> int:
        """Bytes that were received and are not durable."""
        return self._received - self._settled

    @property
    def bytes(self) -> int:
        """The size of all logs, as measured last."""
        disk = self._engine.disk()
        return disk.used if disk is not None else 0

    @property
    def has_room(self) -> bool:
        return self.backlog < BACKLOG_BYTES or self.left_out or bool(self.failure)

    def logs(self) -> Mapping[TopicPartition, CopiedPartition]:
        """What there is of each partition."""
        return self._logs.copy()

    def stored(self, key: TopicPartition, next_offset: int) -> int:
        """Up to which offset, at most this one, records of a partition may be acknowledged."""
        if self.failure or self.left_out:
            return next_offset
        found = self._logs.get(key)
        return min(next_offset, found.end) if found is not None else -1

    # ---- what is received ----

    def _receive(self, delivery: Delivery) -> None:
        key = TopicPartition(delivery.topic, delivery.partition)
        if self.failure or not delivery.batches:
            return  # a gap shows when something follows it
        if self._full_since:
            self._look_for_room()
        if self.left_out:
            self._settled += len(delivery.batches)
            return
        feed = self._feeds.setdefault(key, _Feed())
        feed.waiting.append(delivery)
        self._go_on(key)

    def _go_on(self, key: TopicPartition) -> None:
        try:
            self._append_some(key)
        except Exception as error:  # whatever a broker sends, views do not depend on it
            self._fail(f"{key.topic}/{key.partition}: {error}")

    def _append_some(self, key: TopicPartition) -> None:
        """Append what waits, a part of it in a turn, as far as that is possible now."""
        feed, size = self._feeds[key], 0
        while feed.waiting and not feed.busy and not self.failure:
            if size >= TURN_BYTES:
                self._go_on_later(key, 0.0)
                break
            delivery, found = feed.waiting[0], self._log(key)
            if found is None:
                self._change(key, partial(self._engine.create_mirror, _name(key), [self._identity(key, delivery)]))
            elif self._append(key, found, delivery):
                feed.staged.append((feed.waiting.popleft(), found.staged_end))
                size += len(delivery.batches)
            else:
                break
        found = self._log(key)
        while found is not None and feed.staged and feed.staged[0][1] <= found.durable_end:
            self._settled += len(feed.staged.popleft()[0].batches)

    def _append(self, key: TopicPartition, found: Log, delivery: Delivery) -> bool:
        """Append what is new of a delivery; False: something has to be stored, or changed, before."""
        identity = found.identity
        position, same = _new_from(delivery, found.staged_end, identity)
        refresh = self._refreshes.get(key)
        earlier = refresh is not None and delivery.first <= refresh.from_offset < found.log_start
        if delivery.log_id != identity.log_id_bytes or not same or earlier:
            self._begin_again(key, found, delivery)
            return False
        refusal = self._engine.refusal()
        if refusal is not None:
            self._refused(key, *refusal)
            return False
        data = memoryview(delivery.batches)[position:]
        taken, reason = self._engine.append_numbered(found, data)
        if taken == len(data):
            return True
        header = batch.read_header(data, taken)
        if header.base_offset > found.staged_end:
            if found.staged_end == found.durable_end:
                self._change(key, partial(self._engine.skip, found, header.base_offset, 0))
        elif reason != Reason.BAD_EPOCH:
            self._fail(f"{found.name}: {EXPLANATION[Reason(reason)]}")
        elif header.epoch > identity.epoch:
            add = partial(_with_history, epoch=header.epoch, first=header.base_offset)
            self._change(key, partial(self._engine.change_identities, _name(key), [add]))
        else:
            self._begin_again(key, found, delivery)
        return False

    def _begin_again(self, key: TopicPartition, found: Log, delivery: Delivery) -> None:
        """What is here is of another log or history than the broker's, or lacks what a refresh begins with."""
        if found.staged_end == found.durable_end:
            log.info("the copy of %s/%d begins again, at %d", *key, delivery.first)
            identity = self._identity(key, delivery)
            self._change(key, partial(self._engine.recreate, found, lambda old: identity))

    def _change(self, key: TopicPartition, change: Callable[[Done], None]) -> None:
        """Change the log of a partition, then go on."""
        feed = self._feeds[key]
        feed.busy = True

        def done(outcome: Outcome, why: str) -> None:
            feed.busy = False
            if outcome is Outcome.OK:
                self._go_on_later(key, 0.0)
            else:
                self._refused(key, outcome, why)

        change(done)

    def _refused(self, key: TopicPartition, outcome: Outcome, why: str) -> None:
        if outcome in _LATER:
            self._go_on_later(key, RETRY_SECONDS)
            if outcome is Outcome.DISK_FULL and not self._full_since:
                self._full_since = self._scheduler.now()
                self._scheduler.call_later(FULL_SECONDS, self._look_for_room)
        else:
            self._fail(why)

    def _look_for_room(self) -> None:
        """Without room for long, records are left out of the copy: nothing else is to wait for it."""
        if self._engine.refusal() is None:
            if self.left_out:
                log.warning("the copy has room again: it goes on behind a gap")
            self._full_since, self.left_out = 0.0, False
        elif self._full_since and not self.left_out and self._scheduler.now() - self._full_since >= FULL_SECONDS:
            self.left_out = True
            log.error("there is no room for the copy of topics: records are left out of it until there is")
            for feed in self._feeds.values():
                self._settled += sum(len(one.batches) for one in feed.waiting)
                feed.waiting.clear()

    def _go_on_later(self, key: TopicPartition, seconds: float) -> None:
        feed = self._feeds.setdefault(key, _Feed())

        def go_on() -> None:
            feed.due = False
            self._go_on(key)

        if not feed.due:
            feed.due = True
            self._scheduler.call_later(seconds, go_on)

    def _fail(self, why: str) -> None:
        """Go on without the copy: what readers see does not depend on it."""
        if self.failure:
            return
        self.failure = why
        log.error("the copy cannot be written: %s; it is left out until the next start", why)
        for feed in self._feeds.values():
            feed.waiting.clear()
            feed.staged.clear()

    def _identity(self, key: TopicPartition, delivery: Delivery) -> Identity:
        """Of a log that begins with a delivery."""
        header, refresh = batch.read_header(delivery.batches), self._refreshes.get(key)
        first, log_id, snapshot = header.base_offset, delivery.log_id, (-1, -1)
        if refresh is not None and refresh.log_id == log_id:
            snapshot = (refresh.from_offset, refresh.target)
        elif key.topic in self._from_beginning and key not in self._positions and self._log(key) is None:
            snapshot = (first, first)
        return Identity(
            log_id=log_id.hex(),
            origin="broker",
            epochs=[(header.epoch, first)],
            log_start=first,
            chain=crc32c(log_id),
            settings=TopicSettings(),
            snapshot=snapshot,
        )

    def _note_refresh(self, refresh: Refresh) -> None:
        key = TopicPartition(refresh.topic, refresh.partition)
        self._refreshes[key] = refresh
        found, snapshot = self._log(key), (refresh.from_offset, refresh.target)
        if found is not None and found.identity.log_id_bytes == refresh.log_id and found.identity.snapshot != snapshot:

            def noted(outcome: Outcome, why: str) -> None:
                if outcome is not Outcome.OK:
                    self._refused(key, outcome, why)

            self._engine.complete_snapshot(found, *snapshot, noted)

    # ---- what is there ----

    def read(self, key: TopicPartition, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None:
        """Verified batches from the one that holds an offset on, about so many bytes; or, without any, up to where
        there are none (`next_offset`), or why there are none (`error`)."""
        found = self._log(key)
        if found is None or not found.log_start <= offset < found.durable_end:
            done(ColdRead(error="it is not there any more"))
            return
        gap = found.identity.gap_at(offset)
        if gap is not None:
            done(ColdRead(first_offset=offset, next_offset=gap.next))
            return
        self._engine.read_cold(found, offset, max_bytes, done)

    def offset_at_time(self, key: TopicPartition, timestamp: int, done: Callable[[int, str], None]) -> None:
        """The first offset whose record is not older."""
        found = self._log(key)
        if found is None:
            done(-1, "it is not there any more")
        else:
            self._engine.offset_at_time(found, timestamp, done)

    def inventory(self, key: TopicPartition) -> LogInventory | None:
        """The files of a partition."""
        found = self._engine.log(_name(key), 0)
        return found.inventory() if found is not None else None

    def _log(self, key: TopicPartition) -> Log | None:
        return self._engine.log(_name(key), 0)

    def _note(self, found: Log) -> None:
        identity = found.identity
        first, target = identity.snapshot
        whole = 0 <= target <= found.durable_end and found.log_start <= max(first, 0)
        whole = whole and not any(gap.next > first for gap in identity.gaps) and not found.corrupt_ranges
        self._logs[_key(found.topic)] = CopiedPartition(
            identity.log_id_bytes, found.epoch, found.log_start, found.durable_end, first if whole else -1
        )

    # ---- the engine ----

    def on_opening(self, done: int, topics: int) -> None: ...

    def on_written(self, log: Log) -> None: ...

    def on_durable(self, log: Log, chunks: Sequence[DurableChunk]) -> None:
        self._note(log)
        if (key := _key(log.topic)) in self._feeds:
            self._go_on(key)

    def on_failed(self, log: Log, outcome: Outcome, message: str) -> None:
        key = _key(log.topic)
        feed = self._feeds.get(key)
        if feed is not None:
            feed.waiting.extendleft(one for one, _ in reversed(feed.staged))
            feed.staged.clear()
            self._refused(key, outcome, message)

    def on_topic(self, name: str) -> None:
        for found in self._engine.partitions(name):
            self._note(found)

    def on_rewritten(self, log: Log) -> None:
        self._note(log)

    def retention_pin(self, log: Log) -> int | None:
        return None

    def retention_floor(self, log: Log) -> int | None:
        return log.durable_end

    def on_full(self) -> bool:
        return False


def _settings(max_bytes: int, hours: float) -> StoreSettings:
    age_ms = int(hours * 3_600_000)
    return StoreSettings(
        level="local",
        segment_bytes=min(SEGMENT_BYTES, max_bytes // SEGMENTS),
        max_batch=STORED_BATCH_BYTES,
        max_record=STORED_BATCH_BYTES,
        window=1,
        commit_interval=COMMIT_SECONDS,
        read_timeout=READ_SECONDS,
        housekeeping=HousekeepingSettings(
            retention_bytes=0,
            retention_ms=age_ms,
            segment_ms=min(age_ms, DAY_MS),
            max_bytes=max_bytes,
            soft_free_bytes=-1,
            hard_free_bytes=LEAST_FREE_BYTES,
            scrub_bytes_per_second=VERIFY_BYTES,
            deleted_retention_ms=0,
        ),
    )


def _name(key: TopicPartition) -> str:
    """The topic of the engine that has a partition: each has its own log id, and they come one after the other."""
    return f"{key.topic}.{key.partition}"


def _key(name: str) -> TopicPartition:
    topic, _, partition = name.rpartition(".")
    return TopicPartition(topic, int(partition))


def _with_history(old: Identity, epoch: int, first: int) -> Identity:
    return replace(old, epochs=[*old.epochs, (epoch, first)])


def _new_from(delivery: Delivery, end: int, identity: Identity) -> tuple[int, bool]:
    """Where the first batch at or behind an offset begins; False: those before are of another history than here."""
    batches, position = delivery.batches, 0
    if delivery.last < end and not identity.gaps and delivery.first >= identity.log_start:
        # All of it is known: a history begins at one offset only, so first and last tell.
        first = batch.read_header(batches)
        same = first.epoch == identity.epoch_at(delivery.first) and delivery.epoch == identity.epoch_at(delivery.last)
        return len(batches), same
    while position < len(batches):
        header = batch.read_header(batches, position)
        if header.base_offset >= end:
            break
        known = header.base_offset >= identity.log_start and identity.gap_at(header.base_offset) is None
        if known and header.epoch != identity.epoch_at(header.base_offset):
            return position, False
        position += header.size
    return position, True
