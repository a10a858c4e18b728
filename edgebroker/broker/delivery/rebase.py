"""Rebase cursors after a log was truncated or recreated, because the parent's log is another one."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edgebroker.broker.delivery.groups import Groups
from edgebroker.broker.delivery.leases import Leases
from edgebroker.broker.delivery.push import Push
from edgebroker.broker.delivery.refresh import Refreshes
from edgebroker.broker.delivery.state import CursorState
from edgebroker.storage.engine import Engine, Log

log = logging.getLogger(__name__)


class CursorRebase:
    """Owned by the loop thread."""

    def __init__(
        self,
        engine: Engine,
        groups: Groups,
        leases: Leases,
        push: Push,
        refreshes: Refreshes,
    ) -> None:
        self._engine, self._groups, self._leases = engine, groups, leases
        self._push, self._refreshes = push, refreshes

    def truncating(self, partition: Log, offset: int, then: Callable[[], None]) -> None:
        """Everything from an offset on goes: groups whose committed offset is past it go back to it, stored
        before `then`. What they handled of it has been taken back at the origin; what takes its place they get."""
        holders = self._groups.holders(partition)
        for cursor in holders:
            # Under no lease that anybody knows: what is acknowledged now is of the records that go.
            self._push.pause(cursor, CursorState.STARTING, "the log is being truncated")
            cursor.begin(cursor.acked)
            cursor.lease = self._groups.next_lease()
        self._go_back(partition, offset)
        self._engine.when_stored(then)

    def truncated(self, partition: Log) -> None:
        """It is done: everybody goes on from the committed offset, under a new lease."""
        self._go_back(partition, partition.durable_end)  # who joined meanwhile
        for cursor in self._groups.holders(partition):
            committed = cursor.group.committed(partition)
            self._leases.move(cursor, committed.next_offset if committed is not None else cursor.acked)

    def _go_back(self, partition: Log, offset: int) -> None:
        for group in {*self._groups.all(), *(cursor.group for cursor in self._groups.holders(partition))}:
            committed = group.committed(partition)
            if committed is not None and committed.next_offset > offset:
                log.warning(
                    "group %s goes back from %d to %d of %s: the rest is not in the parent's log", group.name,
                    committed.next_offset, offset, partition.name,
                )  # fmt: skip
                self._groups.move(group, partition, offset)

    def recreated(self, partition: Log, other: bool) -> None:
        """The log goes on further on (readers get a gap), or it is another log (they are refreshed)."""
        for cursor in self._groups.holders(partition):
            if other:
                self._refreshes.needed(cursor)
            else:
                self._push.pump(cursor)
