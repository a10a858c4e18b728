"""A topic is deleted: whoever reads, writes or follows it is told, and forgets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgebroker.broker.delivery.cursor import Cursor
from edgebroker.broker.delivery.groups import Group, Groups
from edgebroker.broker.delivery.leases import Leases
from edgebroker.broker.delivery.membership import Membership
from edgebroker.broker.delivery.push import Push
from edgebroker.broker.delivery.table_snapshots import TableSnapshots
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.broker.publish.publishing import Publishing
from edgebroker.common.errors import Code
from edgebroker.storage.engine import Done, Engine, Log
from edgebroker.storage.store import SegmentStore


class TopicDeletion:
    """Owned by the loop thread. `holders` finds everybody who reads a log now, `reading` the groups of all who are
    connected, also those without a name."""

    def __init__(
        self,
        engine: Engine,
        groups: Groups,
        membership: Membership,
        leases: Leases,
        delivery: Push,
        publishing: Publishing,
        snapshots: TableSnapshots,
        downstream: Downstream,
        holders: Callable[[Log], list[Cursor]],
        reading: Callable[[], list[Group]],
    ) -> None:
        self._engine, self._groups, self._membership, self._leases = engine, groups, membership, leases
        self._push, self._publishing, self._snapshots = delivery, publishing, snapshots
        self._downstream, self._holders, self._reading = downstream, holders, reading

    def delete(self, topic: str, done: Done, epochs: dict[str, int] | None = None) -> None:
        """Delete a topic of this node, or one whose origin has deleted it (up to these `epochs`, by log id): done when
        its name is free again."""
        assert isinstance(self._engine, SegmentStore)
        self._engine.removal.delete(topic, lambda logs: self._gone(topic, logs), done, epochs)

    def _gone(self, topic: str, logs: Sequence[Log]) -> None:
        self._snapshots.give_up(topic)
        for partition in logs:
            for cursor in self._holders(partition):
                self._push.tell(cursor, Code.UNKNOWN_TOPIC, f"topic {topic} was deleted")
                self._leases.release(cursor, tell=True)
            self._push.forget(partition)
            self._publishing.loss_accepted(partition)
            self._downstream.on_deleted(partition)
        for group in {*self._groups.all(), *self._reading()}:
            self._membership.forget_topic(group, topic)
        self._groups.forget_topic(topic)
