"""Push: what became durable goes to whoever stands before it, as far as its window and its socket allow.

    on_durable -> pump(cursor) -> DELIVER (from the chunk in memory, or by sendfile) -> consumer -> ACK -> pump

There is no polling: a cursor is pumped when its log grew, when its member acknowledged, when its socket drained and
when the reader thread brought cold bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from edgebroker.broker.groups import Cursor, Groups
from edgebroker.broker.metrics import Metrics
from edgebroker.common.errors import Code
from edgebroker.common.scheduler import Scheduler
from edgebroker.network import frames
from edgebroker.network.frames import ConsumerAck, Deliver, Gap, GapReason, Reset
from edgebroker.network.transport import FileRange, Transport
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log import Extent, Inline, NeedsDisk
from edgebroker.storage.meta import GroupOffset
from edgebroker.storage.reader import ColdRead
from edgebroker.storage.recovery import Hole
from edgebroker.storage.staging import Chunk

log = logging.getLogger(__name__)

DELIVER_BYTES = 1 << 20
RETRY_SECONDS = 1.0


class DeliveryMember(Protocol):
    """A session, as far as delivery knows it."""

    client_id: str
    transport: Transport

    def send(self, data: bytes) -> None: ...


class Delivery:
    """Owned by the loop thread. A cursor's member is a DeliveryMember."""

    def __init__(self, engine: Engine, groups: Groups, scheduler: Scheduler, metrics: Metrics) -> None:
        self._engine, self._groups, self._scheduler, self._metrics = engine, groups, scheduler, metrics
        self._cursors: dict[Log, dict[Cursor, None]] = {}

    def start(self, cursor: Cursor, offset: int) -> None:
        """Begin to push from an offset (the cursor holds its partition)."""
        cursor.begin(offset)
        cursor.state = "live"
        self._cursors.setdefault(cursor.log, {})[cursor] = None
        if offset > cursor.log.durable_end:
            cursor.state = "behind"
            self._tell(
                cursor,
                Code.BEHIND,
                f"{cursor.log.name} ends at {cursor.log.durable_end}, the position is {offset}; "
                "nothing is delivered until the log has passed it",
            )
            return
        self.pump(cursor)

    def stop(self, cursor: Cursor) -> None:
        """The member left or lost the partition."""
        self._cursors.get(cursor.log, {}).pop(cursor, None)
        cursor.state = "gone"

    def on_durable(self, partition: Log, chunks: list[Chunk]) -> None:
        """A log grew: the cursors at its end get the new chunk from memory, the others are pumped."""
        cursors = self._cursors.get(partition)
        if not cursors:
            return
        chunk = chunks[0] if len(chunks) == 1 else None
        for cursor in list(cursors):
            if cursor.state == "behind" and cursor.next_offset <= partition.durable_end:
                cursor.state = "live"
            if chunk is not None and self._fits(cursor, chunk):
                self._send(cursor, memoryview(chunk), chunk.next_offset)
                cursor.hint = partition.end_hint()
            else:
                self.pump(cursor)

    def acknowledge(self, cursor: Cursor, ack: ConsumerAck) -> bool:
        """A cumulative acknowledgement; False when it is stale and changed nothing."""
        self._metrics.acks_in += 1
        fits = (ack.generation, ack.lease) == (cursor.generation, cursor.lease) and cursor.state != "standby"
        if not fits or not cursor.acknowledge(ack.offset):
            self._metrics.stale_acks += 1
            return False
        cursor.last_ack = self._scheduler.now()
        self.commit(cursor, ack.offset)
        self.pump(cursor)
        return True

    def settings_changed(self, partition: Log) -> None:
        """Who waits before damage may be allowed to go on now."""
        for cursor in list(self._cursors.get(partition, ())):
            if cursor.state == "damaged":
                cursor.state = "live"
                self.pump(cursor)

    def commit(self, cursor: Cursor, offset: int) -> None:
        """Remember a group's place; stored within 50 ms, never ahead of what was acknowledged."""
        place = GroupOffset(cursor.log.identity.log_id, cursor.log.epoch, offset)
        key = (cursor.log.topic, cursor.log.partition)
        if cursor.group.offsets.get(key) != place:
            cursor.group.offsets[key] = place
            self._engine.commit_offset((cursor.group.name, *key), place)

    def pump(self, cursor: Cursor) -> None:
        """Send as much as window and socket allow."""
        member: DeliveryMember = cursor.member  # type: ignore[assignment]
        while cursor.state == "live" and not member.transport.backlog and not member.transport.closed:
            records = cursor.window_records - cursor.in_flight
            size = cursor.window_bytes - cursor.in_flight_bytes
            if records <= 0 or size <= 0 or self._should_wait(cursor, records, size):
                return
            if cursor.next_offset < cursor.log.log_start:
                self._gap(cursor, cursor.log.log_start, GapReason.RETENTION)
            found = cursor.log.find(cursor.next_offset, min(size, DELIVER_BYTES), records, cursor.hint)
            if found is None:
                return
            if isinstance(found, Hole):
                self._at_hole(cursor, found)
            elif isinstance(found, NeedsDisk):
                self._fetch(cursor, min(size, DELIVER_BYTES))
            elif cursor.in_flight and (found.next_offset - cursor.next_offset > records or _length(found) > size):
                return  # the next batch does not fit into what is left of the window
            elif isinstance(found, Inline):
                self._send(cursor, found.data, found.next_offset)
            else:
                self._send_extent(cursor, found)

    @staticmethod
    def _should_wait(cursor: Cursor, records: int, size: int) -> bool:
        """True while a full window opens a crack: many small deliveries would cost more than they bring."""
        crack = records < cursor.window_records >> 2 or size < cursor.window_bytes >> 2
        return crack and cursor.in_flight > 0 and cursor.log.durable_end - cursor.next_offset > records

    def _fits(self, cursor: Cursor, chunk: Chunk) -> bool:
        member: DeliveryMember = cursor.member  # type: ignore[assignment]
        return (
            cursor.state == "live"
            and cursor.next_offset == chunk.first_offset
            and not member.transport.backlog
            and len(chunk) <= min(DELIVER_BYTES, cursor.window_bytes - cursor.in_flight_bytes)
            and chunk.next_offset - chunk.first_offset <= cursor.window_records - cursor.in_flight
        )

    def _wanted(self, cursor: Cursor, next_offset: int) -> int:
        """Where the records that a DELIVER hands over end: a batch may hold more than the window has room for."""
        return min(next_offset, cursor.acked + cursor.window_records)

    def _send(self, cursor: Cursor, data: memoryview, next_offset: int) -> None:
        member: DeliveryMember = cursor.member  # type: ignore[assignment]
        wanted = self._wanted(cursor, next_offset)
        head = self._head(cursor, wanted, len(data))
        cursor.delivered(wanted, len(data))
        cursor.hint = None
        member.transport.send_pair(head, data)

    def _send_extent(self, cursor: Cursor, extent: Extent) -> None:
        member: DeliveryMember = cursor.member  # type: ignore[assignment]
        wanted = self._wanted(cursor, extent.next_offset)
        head = self._head(cursor, wanted, extent.length)
        cursor.delivered(wanted, extent.length)
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

    def _head(self, cursor: Cursor, next_offset: int, size: int, gaps: list[Gap] | None = None) -> bytes:
        partition = cursor.log
        self._metrics.deliveries += 1
        self._metrics.records_delivered += next_offset - cursor.next_offset
        return frames.deliver_head(
            Deliver(
                partition.topic,
                partition.partition,
                partition.identity.log_id_bytes,
                partition.epoch,
                cursor.generation,
                cursor.lease,
                cursor.next_offset,
                next_offset - 1,
                partition.durable_end,
                gaps or [],
                0,
            ),
            size,
        )

    def _gap(self, cursor: Cursor, next_offset: int, reason: GapReason) -> None:
        """Tell the member that records will not come, and go on behind them."""
        member: DeliveryMember = cursor.member  # type: ignore[assignment]
        gap = Gap(cursor.next_offset, next_offset - 1, reason)
        self._metrics.gaps += 1
        head = self._head(cursor, next_offset, 0, [gap])
        if not cursor.in_flight:
            cursor.acked = next_offset
        cursor.delivered(next_offset, 0)
        cursor.hint = None
        member.send(head)

    def _at_hole(self, cursor: Cursor, hole: Hole) -> None:
        if cursor.log.settings.on_damage == "skip":
            self._gap(cursor, hole.next, GapReason.DAMAGED)
            return
        cursor.state = "damaged"
        self._tell(
            cursor,
            Code.DAMAGED,
            f"{cursor.log.name}: records {hole.first} to {hole.next - 1} are damaged; delivery waits at {hole.first} "
            f"(set on_damage = skip for the topic to go on without them)",
        )

    def _fetch(self, cursor: Cursor, size: int) -> None:
        cursor.state = "reading"
        wanted = cursor.next_offset
        self._metrics.cold_deliveries += 1

        def done(result: ColdRead) -> None:
            if cursor.state != "reading":
                return
            cursor.state = "live"
            if cursor.next_offset != wanted:
                self.pump(cursor)
            elif result.error:
                code = Code.STORAGE_TIMEOUT if result.timed_out else Code.DAMAGED
                self._tell(cursor, code, f"{cursor.log.name}: {result.error}; trying again")
                cursor.state = "reading"
                self._scheduler.call_later(RETRY_SECONDS, again)
            elif result.hole is not None:
                self.pump(cursor)
            else:
                limit = min(result.next_offset, cursor.log.durable_end)
                self._send(cursor, memoryview(result.data), limit)
                self.pump(cursor)

        def again() -> None:
            if cursor.state == "reading":
                cursor.state = "live"
                self.pump(cursor)

        self._engine.read_cold(cursor.log, wanted, size, done)

    def announce_reset(self, cursor: Cursor) -> None:
        """The member's position belongs to another log: tell it which log this is and where it begins."""
        cursor.state = "reset"
        self._metrics.resets_announced += 1
        partition = cursor.log
        member: DeliveryMember = cursor.member  # type: ignore[assignment]
        reset = Reset(
            frames.NO_LOG_ID,
            partition.identity.log_id_bytes,
            partition.topic,
            partition.partition,
            partition.log_start,
            partition.durable_end,
        )
        member.send(frames.write_reset(cursor.subscribe_correlation, reset))

    def _tell(self, cursor: Cursor, code: Code, message: str) -> None:
        member: DeliveryMember = cursor.member  # type: ignore[assignment]
        self._metrics.refused(code.name)
        member.send(frames.write_answer(cursor.subscribe_correlation, code, message, cursor.next_offset))


def _length(found: Extent | Inline) -> int:
    return found.length if isinstance(found, Extent) else len(found.data)


def _supply(member: DeliveryMember, piece: FileRange) -> Callable[[bytes, str], None]:
    def answer(data: bytes, error: str) -> None:
        member.transport.supply(piece, None if error else memoryview(data), error)

    return answer
