"""Push: what became durable goes to whoever stands before it, as far as its window and its socket allow.

    on_durable -> pump(cursor) -> DELIVER (from the chunk in memory, or by sendfile) -> consumer -> ACK -> pump

There is no polling: a cursor is pumped when its log grew, when its member acknowledged, when its socket drained and
when the reader thread brought cold bytes. Where a cursor begins, and what becomes of what it has in flight, is for
leases.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from edgebroker.broker.delivery.cursor import Cursor
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.common.errors import Code
from edgebroker.common.scheduler import Scheduler
from edgebroker.network.io.transport import FileRange, Transport
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Gap, GapReason, Reset
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log.partition import FileSlice, Inline, NeedsDisk
from edgebroker.storage.log.reader import ColdRead
from edgebroker.storage.log.recovery import CorruptRange
from edgebroker.storage.log.staging import Chunk

log = logging.getLogger(__name__)

DELIVER_BYTES = 1 << 20
# What those who catch up are sent in one turn of the loop, all of them together: the others wait no longer than that.
TURN_BYTES = 4 << 20
LEAST_DELIVER_BYTES = 256 << 10
RETRY_SECONDS = 1.0
MAX_AGE_MS = (1 << 32) - 1


class PushMember(Protocol):
    """A session, as far as delivery knows it."""

    client_id: str
    transport: Transport

    def send(self, data: bytes) -> None: ...


class Push:
    """Owned by the loop thread. A cursor's member is a DeliveryMember. `timeout` in seconds."""

    def __init__(self, engine: Engine, scheduler: Scheduler, metrics: Metrics, timeout: float) -> None:
        self._engine, self._scheduler, self._metrics, self._timeout = engine, scheduler, metrics, timeout
        self._cursors: dict[Log, dict[Cursor, None]] = {}
        # What DELIVER frames of a log begin with, and of which epoch.
        self._prefixes: dict[Log, tuple[int, bytes]] = {}
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
        self._set(cursor, "live")
        self._cursors.setdefault(cursor.log, {})[cursor] = None
        if self._is_behind(cursor):
            self._set(cursor, "behind")
            self.tell(
                cursor,
                Code.BEHIND,
                f"{cursor.log.name} ends at {cursor.log.durable_end} of epoch {cursor.log.epoch}, the position is "
                f"{offset}; nothing is delivered until the log has passed it",
            )
            return
        self.pump(cursor)

    def pause(self, cursor: Cursor, state: str, why: str = "") -> None:
        """Push nothing more until start(): the cursor waits in a state of leases.py."""
        self._cursors.get(cursor.log, {}).pop(cursor, None)
        self._waiting.pop(cursor, None)
        self._set(cursor, state, why)

    def stop(self, cursor: Cursor) -> None:
        """The member left or lost the partition."""
        self.pause(cursor, "gone")

    def overdue(self, now: float) -> list[Cursor]:
        """Cursors whose records in flight should have been acknowledged by now."""
        return [
            cursor
            for cursors in self._cursors.values()
            for cursor in cursors
            if cursor.deadline and now >= cursor.deadline
        ]

    def wake_others(self, cursor: Cursor) -> None:
        """What the member's other partitions waited for, a record that comes alone, is over: they go on next turn."""
        for other in cursor.member.cursors.values():
            if other is not cursor and other.state == "live":
                self._waiting[other] = None

    def _set(self, cursor: Cursor, state: str, why: str = "") -> None:
        cursor.state, cursor.why = state, why
        if cursor.group.suspects and state not in ("live", "reading"):
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

    def on_durable(self, partition: Log, chunks: list[Chunk]) -> None:
        """A log grew: the cursors at its end get the new chunk from memory, the others are pumped."""
        cursors = self._cursors.get(partition)
        if not cursors:
            return
        chunk = chunks[0] if len(chunks) == 1 else None
        for cursor in list(cursors):
            if cursor.state == "behind" and not self._is_behind(cursor):
                self._set(cursor, "live")
            elif cursor.state == "damaged" and cursor.next_offset < partition.log_start:
                self._set(cursor, "live")  # retention has removed the damage
            if chunk is not None and self._fits(cursor, chunk):
                self._send(cursor, memoryview(chunk), chunk.next_offset)
                cursor.hint = partition.end_hint()
            else:
                self.pump(cursor)
        self._metrics.push_latency.observe(self._scheduler.clock_now() - self._engine.staged_at)

    def settings_changed(self, partition: Log) -> None:
        """Who waits before damage may be allowed to go on now."""
        for cursor in list(self._cursors.get(partition, ())):
            if cursor.state == "damaged":
                self._set(cursor, "live")
                self.pump(cursor)

    def forget(self, partition: Log) -> None:
        """The log is another one now."""
        self._prefixes.pop(partition, None)

    def pump(self, cursor: Cursor) -> None:
        """Send what is stored, as much as window, socket and this turn allow; the rest in the turns that follow."""
        if cursor.next_offset >= cursor.log.durable_end:
            return
        if self._waiting:
            self._waiting[cursor] = None  # not before those who wait already
        else:
            self._pump(cursor)

    def end_iteration(self) -> None:
        """The turn ends: whoever has more to send gets it in the next one."""
        self._turn_bytes = TURN_BYTES
        if self._waiting:
            self._scheduler.call_later(0.0, self._serve_waiting)

    def _serve_waiting(self) -> None:
        for _ in range(len(self._waiting)):
            if self._turn_bytes <= 0 or not self._waiting:  # a member that is found gone waits no more
                return
            cursor = next(iter(self._waiting))
            del self._waiting[cursor]
            self._pump(cursor)

    def _pump(self, cursor: Cursor) -> None:
        member: PushMember = cursor.member  # type: ignore[assignment]
        while (
            cursor.state == "live"
            and not cursor.revoking
            and not member.transport.backlog
            and not member.transport.closed
        ):
            if cursor.group.suspects and self._held_back(cursor):
                return
            records = cursor.window - cursor.in_flight
            size = cursor.window_bytes - cursor.in_flight_bytes
            if records <= 0 or size <= 0 or self._should_wait(cursor, records, size):
                return
            if self._turn_bytes <= 0:
                self._waiting[cursor] = None
                return
            if cursor.next_offset < cursor.log.log_start:
                if self._lost_history(cursor):
                    return
                self._gap(cursor, cursor.log.log_start, GapReason.RETENTION)
            if cursor.log.settings.message_ttl_ms:
                self._skip_expired(cursor)
            share = max(LEAST_DELIVER_BYTES, DELIVER_BYTES // (1 + len(self._waiting) // 2))
            found = cursor.log.find(cursor.next_offset, min(size, share), records, cursor.hint)
            if found is None:
                return
            if isinstance(found, CorruptRange):
                self._at_corrupt_range(cursor, found)
            elif isinstance(found, NeedsDisk) or self._to_check(cursor, found):
                self._fetch(cursor, min(size, DELIVER_BYTES))
            elif cursor.in_flight and (found.next_offset - cursor.next_offset > records or _length(found) > size):
                return  # the next batch does not fit into what is left of the window
            elif isinstance(found, Inline):
                self._turn_bytes -= len(found.data)
                self._send(cursor, found.data, found.next_offset, self._engine.age_ms(cursor.log, found.next_offset))
            else:
                self._turn_bytes -= found.length
                self._send_extent(cursor, found)

    @staticmethod
    def _to_check(cursor: Cursor, found: FileSlice | Inline) -> bool:
        """True for the first piece of a sealed segment that a reader gets. What was verified once may have rotted, and
        a reader that found it so comes again: it must not get the same bytes for ever."""
        fresh, cursor.fresh = cursor.fresh, False
        return fresh and isinstance(found, FileSlice) and found.sealed

    @staticmethod
    def _should_wait(cursor: Cursor, records: int, size: int) -> bool:
        """True while a full window opens a crack: many small deliveries would cost more than they bring."""
        crack = records < cursor.window >> 2 or size < cursor.window_bytes >> 2
        return crack and cursor.in_flight > 0 and cursor.log.durable_end - cursor.next_offset > records

    def _fits(self, cursor: Cursor, chunk: Chunk) -> bool:
        member: PushMember = cursor.member  # type: ignore[assignment]
        return (
            cursor.state == "live"
            and not cursor.revoking
            and not cursor.group.suspects
            and cursor.next_offset == chunk.first_offset
            and not member.transport.backlog
            and len(chunk) <= min(DELIVER_BYTES, cursor.window_bytes - cursor.in_flight_bytes)
            and chunk.next_offset - chunk.first_offset <= cursor.window - cursor.in_flight
        )

    def _wanted(self, cursor: Cursor, next_offset: int) -> int:
        """Where the records that a DELIVER hands over end: a batch may hold more than the window has room for."""
        return min(next_offset, cursor.acked + cursor.window)

    def _send(self, cursor: Cursor, data: memoryview, next_offset: int, age_ms: int = 0) -> None:
        member: PushMember = cursor.member  # type: ignore[assignment]
        wanted = self._wanted(cursor, next_offset)
        head = self._head(cursor, wanted, len(data), age_ms)
        self._delivered(cursor, wanted, len(data))
        cursor.hint = None
        member.transport.send_pair(head, data)

    def _send_extent(self, cursor: Cursor, extent: FileSlice) -> None:
        member: PushMember = cursor.member  # type: ignore[assignment]
        wanted = self._wanted(cursor, extent.next_offset)
        head = self._head(cursor, wanted, extent.length, self._engine.age_ms(cursor.log, wanted))
        self._delivered(cursor, wanted, extent.length)
        segment = extent.segment
        if wanted == extent.next_offset:
            cursor.hint = (segment.base, extent.position + extent.length)
        elif extent.first_offset < extent.next_offset:
            cursor.hint = None
        segment.hold()
        member.transport.send_file(
            head,
            FileRange(
                segment.fd,
                extent.position,
                extent.length,
                segment.release,
                lambda piece: self._engine.load_range(segment, piece.position, piece.length, _supply(member, piece)),
            ),
        )

    def _delivered(self, cursor: Cursor, next_offset: int, size: int) -> None:
        if not cursor.in_flight:
            cursor.deadline = self._scheduler.now() + self._timeout
        cursor.delivered(next_offset, size)

    def _head(
        self, cursor: Cursor, next_offset: int, size: int, age_ms: int = 0, gaps: list[Gap] | None = None
    ) -> bytes:
        partition = cursor.log
        self._metrics.deliveries += 1
        self._metrics.records_delivered += next_offset - cursor.next_offset
        known = self._prefixes.get(partition)
        if known is None or known[0] != partition.epoch:
            prefix = frames.deliver_prefix(
                partition.topic, partition.partition, partition.identity.log_id_bytes, partition.epoch
            )
            known = self._prefixes[partition] = (partition.epoch, prefix)
        return frames.deliver_head(
            known[1],
            cursor.generation,
            cursor.lease,
            cursor.next_offset,
            next_offset - 1,
            partition.durable_end,
            min(age_ms, MAX_AGE_MS),
            gaps or [],
            size,
        )

    def _gap(self, cursor: Cursor, next_offset: int, reason: GapReason) -> None:
        """Tell the member that records will not come, and go on behind them."""
        member: PushMember = cursor.member  # type: ignore[assignment]
        gap = Gap(cursor.next_offset, next_offset - 1, reason)
        self._metrics.gaps += 1
        head = self._head(cursor, next_offset, 0, gaps=[gap])
        if not cursor.in_flight:
            cursor.acked = next_offset
            if cursor.group.suspects:
                self.wake_others(cursor)
        self._delivered(cursor, next_offset, 0)
        cursor.hint = None
        member.send(head)

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
        why = (
            f"{cursor.log.name}: records {corrupt.first} to {corrupt.next - 1} are corrupt; delivery waits at "
            f"{corrupt.first} (set on_damage = skip for the topic to continue without them)"
        )
        self._set(cursor, "damaged", why)
        self.tell(cursor, Code.DAMAGED, why)

    def _fetch(self, cursor: Cursor, size: int) -> None:
        self._set(cursor, "reading")
        wanted, lease = cursor.next_offset, cursor.lease
        self._metrics.cold_deliveries += 1

        def done(result: ColdRead) -> None:
            if cursor.state != "reading" or cursor.lease != lease:
                return
            if result.error:
                code = Code.STORAGE_TIMEOUT if result.timed_out else Code.DAMAGED
                cursor.why = f"{cursor.log.name}: {result.error}; trying again"
                self.tell(cursor, code, cursor.why)
                self._scheduler.call_later(RETRY_SECONDS, again)
                return
            self._set(cursor, "live")
            if cursor.in_flight and len(result.data) > cursor.window_bytes - cursor.in_flight_bytes:
                return  # one batch, larger than what is left of the window
            later = self._engine.live_from(cursor.log) > wanted or cursor.revoking or self._held_back(cursor)
            if result.corrupt is None and cursor.next_offset == wanted and not later:
                limit = min(result.next_offset, cursor.log.durable_end)
                self._send(cursor, memoryview(result.data), limit, self._engine.age_ms(cursor.log, limit))
            self.pump(cursor)

        def again() -> None:
            if cursor.state == "reading" and cursor.lease == lease:
                self._set(cursor, "live")
                self.pump(cursor)

        self._engine.read_cold(cursor.log, wanted, size, done)

    def announce_refresh(self, cursor: Cursor) -> None:
        """Tell the member that its partition has to be refreshed; it accepts with a RESET of its own."""
        committed = cursor.group.committed(cursor.log)
        assert committed is not None
        self.pause(cursor, "refresh", f"refresh {committed.reset_id} waits to be accepted")
        cursor.begin(committed.next_offset)
        self._metrics.refreshes_announced += 1
        partition = cursor.log
        reset = Reset(
            bytes.fromhex(committed.reset_id),
            partition.identity.log_id_bytes,
            partition.topic,
            partition.partition,
            committed.reset_from,
            committed.target,
        )
        cursor.member.send(frames.write_reset(cursor.correlation, reset))

    def tell(self, cursor: Cursor, code: Code, message: str) -> None:
        """Tell the member in which state its partition is, as a further answer to its SUBSCRIBE."""
        self._metrics.refused(code.name)
        cursor.member.send(frames.write_answer(cursor.correlation, code, message, cursor.next_offset))


def _length(found: FileSlice | Inline) -> int:
    return found.length if isinstance(found, FileSlice) else len(found.data)


def _supply(member: PushMember, piece: FileRange) -> Callable[[bytes, str], None]:
    def answer(data: bytes, error: str) -> None:
        member.transport.supply(piece, None if error else memoryview(data), error)

    return answer
