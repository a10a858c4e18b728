"""The life of a lease: where a holder begins, and what its acknowledgements, failures and silence lead to.

    grant -> [refresh to accept | dead letter to write | pause after a failure] -> lease -> deliveries
          -> acknowledged | negative | timed out | disconnected | revoked

Order wins: a failure at record n ends the lease, nothing behind n is delivered until n is done. After a failure n is
delivered alone; behind it the window opens bit by bit. A negative acknowledgement names n and counts as an attempt; one
that rejects n is its last. A timeout or a disconnect names no record: it counts only when n was alone, and after one, n
is alone for its member, in all its partitions. With max_attempts used up, n goes to the dead-letter topic, durably,
before the committed offset passes it.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from edgebroker.broker.delivery.dead_letters import DeadLetters, Failure
from edgebroker.broker.delivery.groups import Groups
from edgebroker.broker.delivery.push import Push
from edgebroker.broker.delivery.refresh import Refreshes, complete_from
from edgebroker.broker.delivery.state import Cursor, CursorState, Group
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.ports import Key
from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, Holding, Wanted
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import Start
from edgebroker.storage.engine import Engine, Log

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
# Failures that name no record.
SILENT, VANISHED = "not acknowledged in time", "the consumer disconnected"


class LeaseLimits(NamedTuple):
    """Seconds; max_attempts 0: never give a record up."""

    timeout: float
    backoff: float
    max_backoff: float
    max_attempts: int


class Leases:
    """Owned by the loop thread."""

    def __init__(
        self,
        engine: Engine,
        groups: Groups,
        push: Push,
        refreshes: Refreshes,
        dead_letters: DeadLetters,
        scheduler: Scheduler,
        metrics: Metrics,
        limits: LeaseLimits,
    ) -> None:
        self._engine, self._groups, self._push, self._refreshes = engine, groups, push, refreshes
        self._dead_letters, self._scheduler, self._metrics, self._limits = dead_letters, scheduler, metrics, limits

    # ---- beginning ----

    def grant(self, cursor: Cursor, wanted: Wanted | None) -> None:
        """The cursor's member holds its partition from now on. `wanted` says where it begins; None, and whatever it
        says while a refresh is under way: at the committed offset."""
        self._groups.grant(cursor)
        self.committed(cursor, wanted)

    def suspend(self, cursor: Cursor) -> None:
        """Where a holder begins is another place by now: nothing is delivered until committed()."""
        self._push.pause(cursor, CursorState.STARTING)

    def committed(self, cursor: Cursor, wanted: Wanted | None) -> None:
        """Find out where a holder begins, then resume()."""
        self.suspend(cursor)
        cursor.begin(cursor.acked)
        cursor.lease = self._groups.next_lease()
        partition, stored = cursor.log, cursor.group.committed(cursor.log)
        if stored is not None and stored.refreshing:
            self._push.announce_refresh(cursor)
            return
        offset = stored.next_offset if stored is not None else _beginning(partition)
        cursor.position_epoch = -1
        match wanted.start if wanted is not None else Start.COMMITTED:
            case Start.POSITION:
                assert wanted is not None
                same = wanted.log_id in (NO_LOG_ID, partition.identity.log_id_bytes)
                if not same or not partition.identity.contains(wanted.epoch, wanted.value):
                    self._refreshes.needed(cursor)
                    return
                offset, cursor.position_epoch = wanted.value, wanted.epoch
            case Start.RESUME:
                assert wanted is not None
                same = wanted.log_id == partition.identity.log_id_bytes
                known = wanted.epoch <= partition.epoch and partition.identity.contains(wanted.epoch, wanted.value)
                rewound = stored is not None and stored.rewound
                if same and known and wanted.value <= partition.durable_end and not rewound:
                    offset = max(offset, wanted.value)
            case Start.OFFSET:
                assert wanted is not None
                offset = wanted.value
            case Start.LATEST:
                offset = partition.durable_end
            case Start.EARLIEST:
                offset = _beginning(partition)
            case Start.TIME:
                assert wanted is not None
                lease = cursor.lease
                self._engine.offset_at_time(
                    partition, wanted.value, lambda found, error: self._found(cursor, lease, wanted, found, error)
                )
                return
        self.resume(cursor, max(0, offset))

    def _found(self, cursor: Cursor, lease: int, wanted: Wanted, offset: int, error: str) -> None:
        if cursor.state is not CursorState.STARTING or cursor.lease != lease:
            return
        if not error:
            self.resume(cursor, offset)
            return
        cursor.why = f"{error}; trying again"
        self._push.tell(cursor, Outcome.STORAGE_TIMEOUT, f"{cursor.log.name}: {cursor.why}")

        def again() -> None:
            if cursor.state is CursorState.STARTING and cursor.lease == lease:
                self.committed(cursor, wanted)

        self._scheduler.call_later(RETRY_SECONDS, again)

    def resume(self, cursor: Cursor, offset: int) -> None:
        """Deliver from an offset under a new lease, unless something has to be waited for first."""
        group, key, partition = cursor.group, cursor.key, cursor.log
        committed = group.committed(partition)
        cursor.begin(offset)
        if committed is None or committed.next_offset != offset:
            # Where a group begins is its committed offset, also when it never acknowledges anything.
            if offset <= partition.durable_end and cursor.position_epoch <= partition.epoch:
                self._groups.commit(group, partition, offset)
                self._forget_failure(group, key)  # it was about another record
            cursor.failed_at = -1
            group.suspects.pop(cursor, None)
        else:
            cursor.failed_at = offset if committed.isolated else -1
            if committed.isolated and group.reasons.get(key, SILENT) in (SILENT, VANISHED):
                group.suspects[cursor] = None
            else:
                group.suspects.pop(cursor, None)
            used_up = 0 < self._limits.max_attempts <= committed.attempts or group.rejected.get(key) == offset
            if key in group.dead_lettering or used_up:
                self._write_dead_letter(cursor, committed.attempts)
                return
            wait = group.pauses.get(key, 0.0) - self._scheduler.now()
            if wait > 0:
                self._pause(cursor, wait)
                return
        if cursor.revoking:
            return  # nothing is in flight any more: it is released at the end of this turn
        cursor.lease = self._groups.next_lease()
        cursor.member.assigned(cursor, Holding.ASSIGNED)
        if group.holders.get(key) is cursor:  # telling it may have shown that the connection is over
            self._push.start(cursor, offset)

    def move(self, cursor: Cursor, offset: int) -> None:
        """The operator moved the committed offset while this member holds the partition."""
        self._push.pause(cursor, CursorState.STARTING)
        cursor.position_epoch = -1
        self.resume(cursor, offset)

    def accept(self, cursor: Cursor, reset_id: bytes, offset: int) -> bool:
        """The member accepts its refresh; False when it is not the one that was announced."""
        start = self._refreshes.accept(cursor, reset_id, offset)
        if start is None:
            return False
        self._push.pause(cursor, CursorState.STARTING)
        cursor.position_epoch = -1
        self.resume(cursor, start)
        return True

    def _pause(self, cursor: Cursor, seconds: float) -> None:
        reason = cursor.group.reasons.get(cursor.key, "")
        self._push.pause(cursor, CursorState.BACKOFF, f"record {cursor.acked} failed: {reason}")
        cursor.lease = lease = self._groups.next_lease()

        def over() -> None:
            if cursor.state is CursorState.BACKOFF and cursor.lease == lease:
                cursor.group.pauses.pop(cursor.key, None)
                self.resume(cursor, cursor.acked)

        self._scheduler.call_later(seconds, over)

    # ---- acknowledgements ----

    def acknowledge(self, cursor: Cursor, ack: ConsumerAck) -> bool:
        """A consumer's ACK of any kind; False when it is stale and changed nothing."""
        self._metrics.acks_in += 1
        if (ack.generation, ack.lease) != (cursor.generation, cursor.lease):
            self._metrics.stale_acks += 1
            return False
        now = self._scheduler.now()
        if ack.kind is AckKind.IN_PROGRESS:
            if cursor.deadline:
                cursor.deadline = now + self._limits.timeout
            self._metrics.in_progress_acks += 1
            return True
        negative = ack.kind is not AckKind.CUMULATIVE
        before = cursor.acked
        if (negative and ack.offset >= cursor.next_offset) or not cursor.acknowledge(ack.offset):
            self._metrics.stale_acks += 1
            return False
        cursor.last_ack = now
        if cursor.acked > before or self._stands_behind(cursor):
            if cursor.failed_at >= 0:
                self._recover(cursor)
            if cursor.group.reasons:
                self._forget_failure(cursor.group, cursor.key)
            self._groups.commit(cursor.group, cursor.log, cursor.acked)
        if negative:
            self._metrics.negative_acks += 1
            self.failed(cursor, ack.reason or "the handler failed", counts=True)
            if ack.kind is AckKind.REJECT:
                cursor.group.rejected[cursor.key] = cursor.acked
            if not cursor.revoking:
                self.resume(cursor, cursor.acked)
            return True
        cursor.deadline = now + self._limits.timeout if cursor.in_flight else 0.0
        if cursor.group.suspects and not cursor.in_flight:
            self._push.wake_others(cursor)
        self._push.pump(cursor)
        return True

    def _recover(self, cursor: Cursor) -> None:
        """The record that failed is done: the member's other partitions go on, this one's window opens bit by bit."""
        if cursor in cursor.group.suspects:
            del cursor.group.suspects[cursor]
            self._push.wake_others(cursor)
        if cursor.window == cursor.window_records:
            cursor.failed_at = -1

    @staticmethod
    def _stands_behind(cursor: Cursor) -> bool:
        """True when the cursor went over a gap with nothing in flight: the committed offset is still before it."""
        committed = cursor.group.committed(cursor.log)
        return committed is not None and committed.next_offset < cursor.acked and cursor.state is not CursorState.BEHIND

    def failed(self, cursor: Cursor, reason: str, *, counts: bool, pause: bool = True) -> None:
        """What was in flight was not handled: its lease is over. The caller resumes or releases the cursor."""
        group, key, partition, offset = cursor.group, cursor.key, cursor.log, cursor.acked
        committed = group.committed(partition)
        known = committed.attempts if committed is not None and committed.next_offset == offset else 0
        attempts = known + 1 if counts else known
        if offset <= partition.durable_end:
            self._groups.commit(group, partition, offset, attempts=attempts, isolated=True)
        group.reasons[key] = reason
        if pause or attempts:
            doubled = self._limits.backoff * 2 ** min(max(attempts - 1, 0), 30)
            group.pauses[key] = self._scheduler.now() + min(self._limits.max_backoff, doubled)
        self._metrics.redeliveries += 1
        self._push.pause(cursor, CursorState.BACKOFF, reason)
        cursor.begin(offset)
        cursor.lease = self._groups.next_lease()

    @staticmethod
    def _forget_failure(group: Group, key: Key) -> None:
        """Another record stands first now."""
        for known in (group.reasons, group.pauses, group.rejected):
            known.pop(key, None)

    def timed_out(self, cursor: Cursor) -> None:
        """The deadline of what is in flight has passed."""
        self._metrics.delivery_timeouts += 1
        log.warning(
            "group %s: %s held records of %s from %d on for longer than the delivery timeout",
            cursor.group.name, cursor.member.client_id, cursor.log.name, cursor.acked,
        )  # fmt: skip
        self.failed(cursor, SILENT, counts=cursor.isolated)

    def disconnected(self, cursor: Cursor) -> None:
        """The member is gone without having given its partition back."""
        if cursor.in_flight:
            self.failed(cursor, VANISHED, counts=cursor.isolated, pause=False)

    # ---- ending ----

    def revoke(self, cursor: Cursor) -> None:
        """Deliver nothing more; the partition is released once nothing is in flight."""
        cursor.revoking = True
        cursor.member.assigned(cursor, Holding.REVOKING)

    def release(self, cursor: Cursor, *, tell: bool) -> None:
        """The partition is free. Nothing is done when it is not the cursor's any more."""
        if cursor.group.holders.get(cursor.key) is not cursor:
            return
        self._push.stop(cursor)
        self._groups.revoke(cursor)
        if tell:
            cursor.member.assigned(cursor, Holding.REVOKED)

    # ---- dead letters ----

    def _write_dead_letter(self, cursor: Cursor, attempts: int) -> None:
        """Write the record that the cursor is at into the dead-letter topic; go on behind it when it is."""
        group, key, partition, offset = cursor.group, cursor.key, cursor.log, cursor.acked
        reason = group.reasons.get(key, "it failed in an earlier run")
        cursor.lease = self._groups.next_lease()
        self._push.pause(cursor, CursorState.DEAD_LETTERING, f"record {offset} failed {attempts} times: {reason}")
        if key in group.dead_lettering:
            return
        group.dead_lettering.add(key)
        self._dead_letters.write(
            partition,
            offset,
            Failure(group.name or "-", attempts, reason),
            lambda outcome, message: self._dead_letter_written(group, partition, offset, outcome, message),
        )

    def _dead_letter_written(self, group: Group, partition: Log, offset: int, outcome: Outcome, message: str) -> None:
        key: Key = (partition.topic, partition.partition)
        group.dead_lettering.discard(key)
        committed, holder = group.committed(partition), group.holders.get(key)
        waits = holder if holder is not None and holder.state is CursorState.DEAD_LETTERING else None
        if committed is None or committed.next_offset != offset:
            if waits is not None:
                self.committed(waits, None)
            return
        if outcome is Outcome.OK:
            self._metrics.dead_letters += not message
            what = f"no dead letter: {message}" if message else "a dead letter"
            log.warning("group %s: record %d of %s is %s", group.name, offset, partition.name, what)
            self._forget_failure(group, key)
            self._groups.commit(group, partition, offset + 1)
            if waits is not None:
                self.resume(waits, offset + 1)
            return
        if waits is None:
            return  # the next holder of the partition tries again
        waits.why = f"record {offset} cannot be written to {partition.topic}.dlq: {message}"
        self._metrics.dead_letter_failures += 1
        self._push.tell(waits, outcome, f"{partition.name}: {waits.why}; the partition waits")
        lease = waits.lease

        def again() -> None:
            if waits.state is CursorState.DEAD_LETTERING and waits.lease == lease:
                self.resume(waits, offset)

        self._scheduler.call_later(RETRY_SECONDS, again)


def _beginning(partition: Log) -> int:
    """Where a reader of everything begins: of a table that is not complete any more at 0, so that it gets the gap."""
    return partition.log_start if complete_from(partition) is not None else 0
