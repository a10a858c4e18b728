"""Full refreshes: RESET is asked for or needed, stored, announced, accepted, and over with READY.

    begin() -> stored -> announced to the holder (again at every SUBSCRIBE) -> accept() -> deliveries -> ready()

A refresh goes from `reset_from` to `target`, the durable end when it began. A stream is read from its first record; a
table from its newest complete snapshot, or from offset 0 while nothing is missing; else there is NO_SNAPSHOT, never
half a table. What was committed before belongs to the refresh before: leases end when a refresh begins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from msgspec.structs import replace

from edgebroker.broker.delivery.groups import Groups
from edgebroker.broker.delivery.push import Push
from edgebroker.broker.delivery.state import Cursor, CursorState, Group
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.common.outcome import Done, Outcome
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.types import GroupOffset

log = logging.getLogger(__name__)


class Refreshes:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine, groups: Groups, push: Push, metrics: Metrics) -> None:
        self._engine, self._groups, self._push, self._metrics = engine, groups, push, metrics
        push.on_history_lost(self.needed)

    def begin(self, group: Group, partition: Log, done: Done) -> None:
        """Begin a refresh of one partition, or go on with the one under way; done once it is stored and announced.

        NO_SNAPSHOT: a table whose history is not complete; nothing was changed.
        """
        committed = group.committed(partition)
        if committed is not None and committed.refreshing:
            self._engine.when_stored(lambda: done(Outcome.OK, ""))
            return
        start = complete_from(partition)
        if start is None:
            done(Outcome.NO_SNAPSHOT, no_snapshot(partition))
            return
        self._store_new(group, partition, start)
        self._announce_when_stored(group, partition, lambda: done(Outcome.OK, ""))

    def needed(self, cursor: Cursor) -> None:
        """The holder cannot go on with what it has: its log is another one, or records are missing in its refresh."""
        start = complete_from(cursor.log)
        if start is None:
            why = no_snapshot(cursor.log)
            self._push.pause(cursor, CursorState.NO_SNAPSHOT, why)
            self._push.tell(cursor, Outcome.NO_SNAPSHOT, why)
            return
        self._store_new(cursor.group, cursor.log, start)
        self._announce_when_stored(cursor.group, cursor.log, lambda: None)

    def snapshot_completed(self, partition: Log) -> None:
        """Who waited for a snapshot of this table gets its refresh now."""
        for group in self._groups.all():
            holder = group.holders.get((partition.topic, partition.partition))
            if holder is not None and holder.state is CursorState.NO_SNAPSHOT:
                self.needed(holder)

    def accept(self, cursor: Cursor, reset_id: bytes, offset: int) -> int | None:
        """The member has its staging store and wants the refresh from an offset on (a new one: from its start).

        The offset where delivery begins; None when this is not the refresh that was announced.
        """
        committed = cursor.group.committed(cursor.log)
        if committed is None or not committed.refreshing or committed.reset_id != reset_id.hex():
            return None
        return max(offset, committed.reset_from)

    def ready(self, group: Group, partition: Log, reset_id: bytes, next_offset: int, done: Done) -> None:
        """The member shows the new data; done once that is stored. FENCED: an earlier refresh; BEHIND: too early."""
        committed = group.committed(partition)
        if committed is None or committed.reset_id != reset_id.hex():
            done(Outcome.FENCED, f"{partition.name}: refresh {reset_id.hex()} is not the last one of this group")
            return
        if committed.refreshing:
            if next_offset < committed.target:
                done(
                    Outcome.BEHIND,
                    f"{partition.name}: the refresh goes to {committed.target}, not to {next_offset}",
                )
                return
            holder = group.holders.get((partition.topic, partition.partition))
            if holder is not None and holder.state is CursorState.REFRESH:
                done(
                    Outcome.BEHIND,
                    f"{partition.name}: refresh {committed.reset_id} was not accepted since it was announced",
                )
                return
            self._metrics.refreshes_done += 1
            self._groups.put(group, partition, replace(committed, target=-1))
            log.info("group %s has refreshed %s up to %d", group.name, partition.name, next_offset)
        self._engine.when_stored(lambda: done(Outcome.OK, ""))

    def _store_new(self, group: Group, partition: Log, start: int) -> None:
        reset_id = os.urandom(16).hex()
        self._metrics.refreshes_begun += 1
        log.info("refresh %s of %s by group %s, from %d", reset_id, partition.name, group.name, start)
        committed = GroupOffset(
            partition.identity.log_id,
            partition.epoch,
            start,
            reset_id=reset_id,
            reset_from=start,
            target=partition.durable_end,
        )
        self._groups.put(group, partition, committed)
        for known in (group.pauses, group.rejected):
            known.pop((partition.topic, partition.partition), None)

    def _announce_when_stored(self, group: Group, partition: Log, then: Callable[[], None]) -> None:
        key = (partition.topic, partition.partition)
        holder = group.holders.get(key)
        if holder is not None and holder.state is not CursorState.REFRESH:
            # Its lease is over from here on: what it acknowledges now is of the data before.
            holder.lease = self._groups.next_lease()
            self._push.pause(holder, CursorState.REFRESH, "the refresh is being stored")
            holder.begin(holder.acked)

        def stored() -> None:
            holder, committed = group.holders.get(key), group.committed(partition)
            if (
                holder is not None
                and holder.state is CursorState.REFRESH
                and committed is not None
                and committed.refreshing
            ):
                self._push.announce_refresh(holder)
            then()

        self._engine.when_stored(stored)


def complete_from(partition: Log) -> int | None:
    """Where reading has to begin to get everything; None for a table of which something is missing."""
    if partition.settings.kind != "table":
        return partition.log_start
    first = partition.identity.snapshot[0]
    start = first if first >= partition.log_start else partition.log_start
    missing = [following for _, following in partition.corrupt_ranges]
    missing += [gap.next for gap in partition.identity.gaps]
    if (start > 0 and start != first) or any(following > start for following in missing):
        return None
    return start


def no_snapshot(partition: Log) -> str:
    return (
        f"{partition.name}: the table is not complete any more (it begins at {partition.log_start}) and has no "
        f"complete snapshot; write its whole content where it is published: edgebroker publish {partition.topic} "
        "--snapshot --csv FILE --key-column COLUMN"
    )
