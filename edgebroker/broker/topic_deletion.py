"""Delete a topic, and take it back: readers, writers and children are told, and everything about it is forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from edgebroker.broker.core import Core
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.broker.sessions.sessions import Sessions
from edgebroker.common.outcome import Done, Outcome
from edgebroker.storage.engine import Log
from edgebroker.storage.types import DeletedTopic, Tombstone


class TopicDeletion:
    """Owned by the loop thread."""

    def __init__(self, core: Core, downstream: Downstream, sessions: Sessions) -> None:
        self._core, self._downstream, self._sessions = core, downstream, sessions

    def delete(self, topic: str, done: Done) -> None:
        """Delete a topic: done when its name is free again. Where this node is its origin, every replica follows, in
        the histories that it began; anywhere else the topic goes at this node alone."""
        uid = self._core.engine.node_uid
        self._delete(
            topic,
            {
                log.identity.log_id: Tombstone(topic, log.identity.epoch, log.identity.begun)
                for log in self._core.engine.partitions(topic)
                if log.identity.origin == uid
            },
            done,
        )

    def follow(self, topic: str, first: int, epoch: int, done: Done) -> None:
        """Delete a topic whose origin has deleted these histories of it."""
        logs = self._core.engine.partitions(topic)
        self._delete(topic, {log.identity.log_id: Tombstone(topic, epoch, first) for log in logs}, done)

    def deleted_topics(self) -> list[DeletedTopic]:
        """Deleted topics whose files are still there, the oldest first."""
        remover = self._core.engine.remover
        return [] if remover is None else remover.deleted_topics()

    def undelete(self, topic: str, name: str, done: Done) -> None:
        """Take back a deleted topic as `name`. One that another node writes comes from the parent again: only the
        tombstone is lifted here, unless it gets another name, and this node as its origin."""
        remover = self._core.engine.remover
        if remover is None:
            done(Outcome.UNSUPPORTED, "the memory engine keeps its topics until the node stops")
            return
        uid = self._core.engine.node_uid
        own = any(one.topic == topic and one.origin == uid for one in remover.deleted_topics())
        if own or name != topic:
            remover.undelete(topic, name, done)
        else:
            remover.lift(topic, done)

    def rename(self, topic: str, name: str, done: Done) -> None:
        """Delete a topic and take it back under another name: a new log with the same records, of this node. Not while
        nothing can be stored: then it would stay deleted."""

        def deleted(outcome: Outcome, message: str) -> None:
            if outcome is Outcome.OK:
                self.undelete(topic, name, renamed)
            else:
                done(outcome, message)

        def renamed(outcome: Outcome, message: str) -> None:
            kept = f"; its records are kept: edgebroker topic undelete {topic} --as {name}"
            done(outcome, message + kept if outcome is not Outcome.OK else "")

        refusal = self._core.engine.refusal()
        if self._core.engine.partitions(name):
            done(Outcome.NAME_CLASH, f"topic {name} exists")
        elif refusal is not None:
            done(*refusal)
        else:
            self.delete(topic, deleted)

    def _delete(self, topic: str, tombstones: dict[str, Tombstone], done: Done) -> None:
        remover = self._core.engine.remover
        if remover is None:
            done(Outcome.UNSUPPORTED, "the memory engine keeps its topics until the node stops")
        else:
            remover.delete(topic, tombstones, lambda logs: self._gone(topic, logs), done)

    def _gone(self, topic: str, logs: Sequence[Log]) -> None:
        core = self._core
        core.table_snapshots.give_up(topic)
        for partition in logs:
            for cursor in core.groups.holders(partition):
                core.push.tell(cursor, Outcome.NOT_FOUND, f"topic {topic} was deleted")
                core.leases.release(cursor, tell=True)
            core.publishing.deleted(partition)
            self._downstream.on_deleted(partition)
        for group in {*core.groups.all(), *core.membership.groups()}:
            core.membership.forget_topic(group, topic)
        core.groups.forget_topic(topic)
        self._sessions.on_topic_deleted(topic)
