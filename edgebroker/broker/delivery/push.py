"""Push durable records to cursors, as far as window and connection of each member allow.

    on_durable -> pump(cursor) -> Member.deliver() (from the chunk in memory, or a file) -> consumer -> ACK -> pump

There is no polling: a cursor is pumped when its log grew, when its member acknowledged, when its socket drained and
when the reader thread brought cold bytes. Where a cursor begins, and what becomes of what it has in flight, is for
leases.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from edgebroker.broker.delivery.state import Cursor, CursorState
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.ports import Member
from edgebroker.broker.reading import next_piece, size_of
from edgebroker.common.messages import GapReason
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import SLICE_SECONDS, Scheduler
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.types import ColdRead, CorruptRange, DurableChunk, FileSlice, Inline, LogGap, NeedsDisk

log = logging.getLogger(__name__)

DELIVER_BYTES = 1 << 20
# What those who catch up are sent in one turn of the loop, all of them together: the others wait no longer than that.
TURN_BYTES = 4 << 20
TURN_SECONDS = 0.005
# So long a log that grew is sent on at once, from memory: to a thousand consumers.
FAN_OUT_SECONDS = 0.01
LEAST_DELIVER_BYTES = 256 << 10
RETRY_SECONDS = 1.0


_LIVE = CursorState.LIVE


class Push:
    """Owned by the loop thread. `timeout` in seconds."""

    def __init__(self, engine: Engine, scheduler: Scheduler, metrics: Metrics, timeout: float) -> None:
        self._engine, self._scheduler, self._metrics, self._timeout = engine, scheduler, metrics, timeout
        self._cursors: dict[Log, dict[Cursor, None]] = {}
        # Cursors with more to send than this turn had room for, in the order in which they get their turn.
        self._waiting: dict[Cursor, None] = {}
        self._turn_bytes = TURN_BYTES
        self._history_lost: Callable[[Cursor], None] | None = None

    def on_history_lost(self, callback: Callable[[Cursor], None]) -> None:
        """Whom to tell that a cursor's table lost records which its refresh has not seen."""
        self._history_lost = callback

    def start(self, cursor: Cursor, offset: int) -> None:
        """Begin to push from an offset (the cursor holds its partition, under a lease)."""
        cursor.begin(offset)
        self._set(cursor, _LIVE)
        self._cursors.setdefault(cursor.log, {})[cursor] = None
        if self._is_behind(cursor):
            self._set(cursor, CursorState.BEHIND)
            self.tell(
                cursor,
                Outcome.BEHIND,
                f"{cursor.log.name} ends at {cursor.log.durable_end} of epoch {cursor.log.epoch}, the position is "
                f"{offset}; nothing is delivered until the log has passed it",
            )
            return
        self.pump(cursor)

    def pause(self, cursor: Cursor, state: CursorState, why: str = "") -> None:
        """Push nothing more until start(): the cursor waits in a state of leases.py."""
        self._cursors.get(cursor.log, {}).pop(cursor, None)
        self._waiting.pop(cursor, None)
        self._set(cursor, state, why)

    def stop(self, cursor: Cursor) -> None:
        """The member left or lost the partition."""
        self.pause(cursor, CursorState.GONE)

    def overdue(self, now: float) -> Iterator[Cursor]:
        """Cursors whose records in flight should have been acknowledged by now."""
        for cursors in list(self._cursors.values()):
            for cursor in list(cursors):
                if cursor.deadline and now >= cursor.deadline:
                    yield cursor

    def pump_all(self, member: Member[Cursor]) -> None:
        """A member takes more: some of its partitions go on at once, the others wait for their turn."""
        until = self._scheduler.clock_now() + SLICE_SECONDS
        for cursor in list(member.cursors.values()):
            if self._scheduler.clock_now() < until:
                self.pump(cursor)
            elif cursor.next_offset < cursor.log.durable_end:
                self._waiting[cursor] = None

    def wake_others(self, cursor: Cursor) -> None:
        """What the member's other partitions waited for, a record that comes alone, is over: they go on next turn."""
        for other in cursor.member.cursors.values():
            if other is not cursor and other.state is _LIVE:
                self._waiting[other] = None

    def _set(self, cursor: Cursor, state: CursorState, why: str = "") -> None:
        cursor.state, cursor.why = state, why
        if cursor.group.suspects and state is not _LIVE and state is not CursorState.READING:
            self.wake_others(cursor)

    @staticmethod
    def _held_back(cursor: Cursor) -> bool:
        """True while the cursor's member is to have one record in flight and no other: one at which it fell silent."""
        if cursor in cursor.group.suspects and cursor.isolated:
            return any(other.in_flight for other in cursor.member.cursors.values() if other is not cursor)
        return any(suspect.member is cursor.member and suspect.wants_turn for suspect in cursor.group.suspects)

    @staticmethod
    def _is_behind(cursor: Cursor) -> bool:
        return cursor.next_offset > cursor.log.durable_end or cursor.position_epoch > cursor.log.epoch

    def on_durable(self, partition: Log, chunks: Sequence[DurableChunk]) -> None:
        """A log grew: the cursors at its end get the new chunk from memory, the others are pumped."""
        cursors = self._cursors.get(partition)
        if not cursors:
            return
        chunk = chunks[0] if len(chunks) == 1 else None
        until = self._scheduler.clock_now() + FAN_OUT_SECONDS
        for cursor in list(cursors):
            if cursor.state is CursorState.BEHIND and not self._is_behind(cursor):
                self._set(cursor, _LIVE)
            elif cursor.state is CursorState.DAMAGED and cursor.next_offset < partition.log_start:
                self._set(cursor, _LIVE)  # retention has removed the damage
            if self._scheduler.clock_now() > until:
                self._waiting[cursor] = None
            elif chunk is not None and self._fits(cursor, chunk):
                self._send(cursor, memoryview(chunk), chunk.next_offset)
                cursor.hint = partition.end_hint()
            else:
                self.pump(cursor)
        self._metrics.push_latency.observe(self._scheduler.clock_now() - self._engine.staged_at)

    def settings_changed(self, partition: Log) -> None:
        """Who waits before damage may be allowed to go on now."""
        for cursor in list(self._cursors.get(partition, ())):
            if cursor.state is CursorState.DAMAGED:
                self._set(cursor, _LIVE)
                self.pump(cursor)

    def pump(self, cursor: Cursor) -> None:
        """Send what is stored, as much as window, socket and this turn allow; the rest in the turns that follow."""
        if cursor.next_offset >= cursor.log.durable_end:
            return
        if self._waiting:
            self._waiting[cursor] = None  # not before those who wait already
        else:
            self._pump(cursor)

    def end_iteration(self) -> None:
        """The turn ends: those with more to send get it in the next one."""
        self._turn_bytes = TURN_BYTES
        if self._waiting:
            self._scheduler.call_later(0.0, self._serve_waiting)

    def _serve_waiting(self) -> None:
        until = self._scheduler.clock_now() + TURN_SECONDS
        for _ in range(len(self._waiting)):
            if self._turn_bytes <= 0 or not self._waiting:  # a member that is found gone waits no more
                return
            cursor = next(iter(self._waiting))
            del self._waiting[cursor]
            self._pump(cursor)
            if self._scheduler.clock_now() >= until:
                return

    def _pump(self, cursor: Cursor) -> None:
        partition = cursor.log
        while cursor.state is _LIVE and not cursor.revoking and cursor.member.writable:
            if cursor.group.suspects and self._held_back(cursor):
                return
            records = cursor.window - cursor.in_flight
            size = cursor.window_bytes - cursor.in_flight_bytes
            if records <= 0 or size <= 0 or self._should_wait(cursor, records, size):
                return
            if self._turn_bytes <= 0:
                self._waiting[cursor] = None
                return
            if cursor.next_offset < partition.log_start:
                if self._lost_history(cursor):
                    return
                self._gap(cursor, partition.log_start, GapReason.RETENTION)
            if partition.settings.message_ttl_ms:
                self._skip_expired(cursor)
            share = max(LEAST_DELIVER_BYTES, DELIVER_BYTES // (1 + len(self._waiting) // 2))
            found = next_piece(partition, cursor, cursor.next_offset, min(size, share), records)
            if found is None:
                return
            if isinstance(found, CorruptRange):
                self._at_corrupt_range(cursor, found)
            elif isinstance(found, LogGap):
                if self._lost_history(cursor):
                    return
                self._gap(cursor, found.next, GapReason.RETENTION)
            elif isinstance(found, NeedsDisk):
                self._fetch(cursor, min(size, DELIVER_BYTES))
            elif cursor.in_flight and (found.next_offset - cursor.next_offset > records or size_of(found) > size):
                return  # the next batch does not fit into what is left of the window
            elif isinstance(found, Inline):
                self._turn_bytes -= len(found.data)
                self._send(cursor, found.data, found.next_offset, self._engine.age_ms(partition, found.next_offset))
            else:
                self._turn_bytes -= found.length
                self._send_file(cursor, found)

    @staticmethod
    def _should_wait(cursor: Cursor, records: int, size: int) -> bool:
        """True while a full window opens a crack: many small deliveries would cost more than they bring."""
        crack = records < cursor.window >> 2 or size < cursor.window_bytes >> 2
        return crack and cursor.in_flight > 0 and cursor.log.durable_end - cursor.next_offset > records

    @staticmethod
    def _fits(cursor: Cursor, chunk: DurableChunk) -> bool:
        return (
            cursor.state is _LIVE
            and not cursor.revoking
            and not cursor.group.suspects
            and cursor.next_offset == chunk.first_offset
            and len(chunk) <= min(DELIVER_BYTES, cursor.window_bytes - cursor.in_flight_bytes)
            and chunk.next_offset - chunk.first_offset <= cursor.window - cursor.in_flight
            and cursor.member.writable
        )

    # ---- handing over: the cursor moves first, for the connection may prove to be over ----

    def _send(self, cursor: Cursor, data: memoryview, next_offset: int, age_ms: int = 0) -> None:
        first, wanted = self._delivered(cursor, next_offset, len(data))
        cursor.hint = None
        cursor.member.deliver(cursor, first, wanted, data, age_ms)

    def _send_file(self, cursor: Cursor, piece: FileSlice) -> None:
        first, wanted = self._delivered(cursor, piece.next_offset, piece.length)
        if wanted == piece.next_offset:
            cursor.hint = piece.next_hint
        elif piece.first_offset < piece.next_offset:
            cursor.hint = None
        cursor.member.deliver_file(cursor, first, wanted, piece, self._engine.age_ms(cursor.log, wanted))

    def _delivered(self, cursor: Cursor, next_offset: int, size: int) -> tuple[int, int]:
        """Note what is handed over; the records wanted of it, [first, next): a batch may hold more than the window has
        room for."""
        first, wanted = cursor.next_offset, min(next_offset, cursor.acked + cursor.window)
        self._metrics.deliveries += 1
        self._metrics.records_delivered += wanted - first
        if first == cursor.acked:
            cursor.deadline = self._scheduler.now() + self._timeout
        cursor.delivered(wanted, size)
        return first, wanted

    def _gap(self, cursor: Cursor, next_offset: int, reason: GapReason) -> None:
        """Tell the member that records will not come, and continue after them."""
        first = cursor.next_offset
        self._metrics.gaps += 1
        self._metrics.deliveries += 1
        self._metrics.records_delivered += next_offset - first
        if not cursor.in_flight:
            cursor.acked = next_offset
            if cursor.group.suspects:
                self.wake_others(cursor)
        cursor.delivered(next_offset, 0)
        cursor.hint = None
        cursor.member.gap(cursor, first, next_offset, reason)

    def _skip_expired(self, cursor: Cursor) -> None:
        live = self._engine.live_from(cursor.log)
        if cursor.next_offset < live:
            self._metrics.records_expired += live - cursor.next_offset
            self._gap(cursor, live, GapReason.EXPIRED)

    def _lost_history(self, cursor: Cursor) -> bool:
        """True when records are gone that a table's refresh needs: it has to begin again, not to go on with a gap."""
        committed = cursor.group.committed(cursor.log)
        if (
            committed is None
            or not committed.refreshing
            or cursor.log.settings.kind != "table"
            or not self._history_lost
        ):
            return False
        self._history_lost(cursor)
        return True

    def _at_corrupt_range(self, cursor: Cursor, corrupt: CorruptRange) -> None:
        if cursor.log.settings.on_damage == "skip":
            if not self._lost_history(cursor):
                self._gap(cursor, corrupt.next, GapReason.DAMAGED)
            return
        mirrored = cursor.log.identity.origin != self._engine.node_uid
        what = (
            "they are being repaired from the parent"
            if mirrored
            else "set on_damage = skip for the topic to continue without them"
        )
        why = (
            f"{cursor.log.name}: records {corrupt.first} to {corrupt.next - 1} are corrupt; delivery waits at "
            f"{corrupt.first} ({what})"
        )
        self._set(cursor, CursorState.DAMAGED, why)
        self.tell(cursor, Outcome.DAMAGED, why)

    def _fetch(self, cursor: Cursor, size: int) -> None:
        self._set(cursor, CursorState.READING)
        wanted, lease = cursor.next_offset, cursor.lease
        self._metrics.cold_deliveries += 1

        def done(result: ColdRead) -> None:
            if cursor.state is not CursorState.READING or cursor.lease != lease:
                return
            if result.error:
                cursor.why = f"{cursor.log.name}: {result.error}; trying again"
                self.tell(cursor, result.refusal, cursor.why)
                self._scheduler.call_later(RETRY_SECONDS, again)
                return
            self._set(cursor, _LIVE)
            if cursor.in_flight and len(result.data) > cursor.window_bytes - cursor.in_flight_bytes:
                return  # one batch, larger than what is left of the window
            later = self._engine.live_from(cursor.log) > wanted or cursor.revoking or self._held_back(cursor)
            if result.corrupt is None and cursor.next_offset == wanted and not later:
                limit = min(result.next_offset, cursor.log.durable_end)
                self._send(cursor, memoryview(result.data), limit, self._engine.age_ms(cursor.log, limit))
            self.pump(cursor)

        def again() -> None:
            if cursor.state is CursorState.READING and cursor.lease == lease:
                self._set(cursor, _LIVE)
                self.pump(cursor)

        self._engine.read_cold(cursor.log, wanted, size, done)

    def announce_refresh(self, cursor: Cursor) -> None:
        """Tell the member that its partition has to be refreshed; it accepts with a RESET of its own."""
        committed = cursor.group.committed(cursor.log)
        assert committed is not None
        self.pause(cursor, CursorState.REFRESH, f"refresh {committed.reset_id} waits to be accepted")
        cursor.begin(committed.next_offset)
        self._metrics.refreshes_announced += 1
        cursor.member.announce_refresh(cursor, committed)

    def tell(self, cursor: Cursor, outcome: Outcome, message: str) -> None:
        """Tell the member why nothing is delivered from its partition for now."""
        self._metrics.refused(outcome.code.name)
        cursor.member.state(cursor, outcome, message)
