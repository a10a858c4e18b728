"""Consumer groups: their places in every partition, who is a member, who holds what.

No socket, file, thread or clock. Places go to the engine, which stores them within 50 ms.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from msgspec.structs import replace

from edgebroker.broker.delivery.cursor import Cursor, Key, Member
from edgebroker.network.wire.frames import Wanted
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.metadata.meta_db import GroupOffset

LIVE_SECONDS = 7 * 24 * 3600.0


@dataclass(slots=True, eq=False)
class Subscription:
    """What one member wants. `topics` and `pins` hold the last line about a topic or a single partition; `left` are
    partitions that it gave back although it wants their topic; `begun` those whose line has been followed; `hung`: it
    let a delivery time out and was not heard since."""

    correlation: int
    window_records: int
    window_bytes: int
    topics: dict[str, Wanted] = field(default_factory=dict)
    pins: dict[Key, Wanted] = field(default_factory=dict)
    left: set[Key] = field(default_factory=set)
    begun: set[Key] = field(default_factory=set)
    unresponsive: bool = False

    def wants(self, key: Key) -> bool:
        return key in self.pins or (key[0] in self.topics and key not in self.left)

    def line(self, key: Key) -> Wanted | None:
        """What was said last about a partition; None when it was followed already: a line says it once."""
        if key in self.begun:
            return None
        self.begun.add(key)
        return self.pins.get(key) or self.topics.get(key[0])


class Group:
    """A consumer group. One without a name belongs to one connection, and nothing of it is stored.

    `last_clients` are the client ids that held each partition last. `pauses` says until when a partition waits after a
    failure, `reasons` why it failed; `lettering` are partitions whose next record is on its way into the dead-letter
    topic, `suspects` the cursors that stand before a record at which a member fell silent.
    """

    __slots__ = (
        "committed_offsets",
        "dead_lettering",
        "generation",
        "holders",
        "last_clients",
        "last_seen",
        "members",
        "name",
        "pauses",
        "reasons",
        "suspects",
    )  # fmt: skip

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.committed_offsets: dict[Key, GroupOffset] = {}
        self.members: dict[Member, Subscription] = {}
        self.holders: dict[Key, Cursor] = {}
        self.last_clients: dict[Key, str] = {}
        self.pauses: dict[Key, float] = {}
        self.reasons: dict[Key, str] = {}
        self.dead_lettering: set[Key] = set()
        self.suspects: dict[Cursor, None] = {}
        self.generation = 0
        self.last_seen = now

    def committed(self, log: Log) -> GroupOffset | None:
        """The group's place in this very log."""
        committed = self.committed_offsets.get((log.topic, log.partition))
        return committed if committed is not None and committed.log_id == log.identity.log_id else None


class Groups:
    """All groups of the node."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups: dict[str, Group] = {}
        # Leases of an earlier run of this node must not be taken for one of this run.
        self._leases = int.from_bytes(os.urandom(6), "big")

    def group(self, name: str, now: float) -> Group:
        """The group of this name, made when it is new; without a name a new one each time."""
        group = self._groups.get(name)
        if group is None:
            group = Group(name, now)
            if name:
                self._groups[name] = group
        group.last_seen = now
        return group

    def adopt(self, group: Group) -> Group:
        """The group of this name that is known; from now on this one, when there is none."""
        return self._groups.setdefault(group.name, group) if group.name else group

    def find(self, name: str) -> Group | None:
        return self._groups.get(name)

    def all(self) -> list[Group]:
        return list(self._groups.values())

    def forget(self, group: Group) -> None:
        """Delete a group and every place it had."""
        for topic, partition in group.committed_offsets:
            self._engine.commit_offset((group.name, topic, partition), None)
        group.committed_offsets.clear()  # what was under way for it (a dead letter) finds no place to move
        self._groups.pop(group.name, None)

    def forget_topic(self, topic: str) -> None:
        """A topic is deleted: no group has a place in it."""
        for group in self._groups.values():
            for key in [key for key in group.committed_offsets if key[0] == topic]:
                del group.committed_offsets[key]
                self._engine.commit_offset((group.name, *key), None)
            for known in (group.pauses, group.reasons, group.last_clients):
                for key in [key for key in known if key[0] == topic]:
                    del known[key]

    def restore(self, group: str, topic: str, partition: int, offset: GroupOffset, now: float) -> None:
        """A place stored by an earlier run."""
        self.group(group, now).committed_offsets[topic, partition] = offset

    def commit(self, group: Group, log: Log, offset: int, *, attempts: int = 0, isolated: bool = False) -> None:
        """Move a group's place; what is known about its refreshes and moves stays."""
        committed = group.committed(log)
        if committed is not None and (committed.next_offset, committed.attempts, committed.isolated) == (
            offset,
            attempts,
            isolated,
        ):
            return
        if committed is None:
            moved = GroupOffset(log.identity.log_id, log.epoch, offset, 0, attempts, isolated)
        else:
            moved = replace(committed, epoch=log.epoch, next_offset=offset, attempts=attempts, isolated=isolated)
        self.put(group, log, moved)

    def move(self, group: Group, log: Log, offset: int) -> None:
        """commit() by an operator: what members acknowledged before does not take the group past the new place."""
        self.commit(group, log, offset)
        committed = group.committed(log)
        assert committed is not None
        self.put(group, log, replace(committed, moved_end=log.durable_end))

    def put(self, group: Group, log: Log, committed: GroupOffset) -> None:
        """Replace a group's place; stored within 50 ms (Engine.when_stored tells when)."""
        key = (log.topic, log.partition)
        group.committed_offsets[key] = committed
        if group.name:
            self._engine.commit_offset((group.name, *key), committed)

    def grant(self, cursor: Cursor) -> None:
        """Make a cursor the holder of its partition."""
        cursor.group.generation += 1
        cursor.generation = cursor.group.generation
        cursor.group.last_clients[cursor.key] = cursor.member.client_id
        cursor.group.holders[cursor.key] = cursor.member.cursors[cursor.key] = cursor

    def revoke(self, cursor: Cursor) -> None:
        """Nobody holds its partition any more."""
        del cursor.group.holders[cursor.key], cursor.member.cursors[cursor.key]
        cursor.group.suspects.pop(cursor, None)

    def next_lease(self) -> int:
        self._leases += 1
        return self._leases

    def floor(self, log: Log, now: float) -> int | None:
        """The offset that every live group of this log has passed; None when there is no such group."""
        key = (log.topic, log.partition)
        committed_offsets = [
            committed.next_offset
            for group in self._groups.values()
            if (committed := group.committed(log)) is not None
            and (now - group.last_seen < LIVE_SECONDS or key in group.holders)
        ]
        return min(committed_offsets, default=None)
