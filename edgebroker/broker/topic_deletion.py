"""Delete a topic: its readers, writers and children are notified, and everything about it is forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from edgebroker.broker.core import Core
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.common.outcome import Done, Outcome
from edgebroker.storage.engine import Log


class TopicDeletion:
    """Owned by the loop thread."""

    def __init__(self, core: Core, downstream: Downstream) -> None:
        self._core, self._downstream = core, downstream

    def delete(self, topic: str, done: Done, epochs: dict[str, int] | None = None) -> None:
        """Delete a topic of this node, or one whose origin has deleted it (up to these `epochs`, by log id): done when
        its name is free again."""
        remover = self._core.engine.remover
        if remover is None:
            done(Outcome.UNSUPPORTED, "the memory engine keeps its topics until the node stops")
        else:
            remover.delete(topic, lambda logs: self._gone(topic, logs), done, epochs)

    def _gone(self, topic: str, logs: Sequence[Log]) -> None:
        core = self._core
        core.table_snapshots.give_up(topic)
        for partition in logs:
            for cursor in core.groups.holders(partition):
                core.push.tell(cursor, Outcome.NOT_FOUND, f"topic {topic} was deleted")
                core.leases.release(cursor, tell=True)
            core.publishing.loss_accepted(partition)
            self._downstream.on_deleted(partition)
        for group in {*core.groups.all(), *core.membership.groups()}:
            core.membership.forget_topic(group, topic)
        core.groups.forget_topic(topic)
