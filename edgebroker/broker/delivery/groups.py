"""All consumer groups of the node: their committed offsets and which cursor holds which partition.

No socket, file, thread or clock. Committed offsets go to the engine, which stores them within 50 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from msgspec.structs import replace

from edgebroker.broker.delivery.state import Cursor, Group
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.types import GroupOffset


class Groups:
    """All groups of the node."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups: dict[str, Group] = {}
        self._holders: dict[Log, dict[Cursor, None]] = {}
        # Committed offsets of all groups that have a name.
        self.offsets = 0
        # Leases of an earlier run of this node must not be taken for one of this run.
        self._leases = int.from_bytes(os.urandom(6), "big")

    def __len__(self) -> int:
        return len(self._groups)

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
        """Delete a group with its committed offsets."""
        for topic, partition in group.committed_offsets:
            self._engine.commit_offset((group.name, topic, partition), None)
        self.offsets -= len(group.committed_offsets)
        group.committed_offsets.clear()  # what was under way for it (a dead letter) finds no offset to move
        self._groups.pop(group.name, None)

    def forget_topic(self, topic: str) -> None:
        """A topic is deleted: no group has a committed offset in it."""
        for group in self._groups.values():
            for key in [key for key in group.committed_offsets if key[0] == topic]:
                del group.committed_offsets[key]
                self.offsets -= 1
                self._engine.commit_offset((group.name, *key), None)
            for known in (group.pauses, group.reasons, group.rejected, group.applied, group.last_clients):
                for key in [key for key in known if key[0] == topic]:
                    del known[key]

    def restore(self, group: str, topic: str, partition: int, offset: GroupOffset, now: float) -> None:
        """A committed offset stored by an earlier run."""
        self.group(group, now).committed_offsets[topic, partition] = offset
        self.offsets += 1

    def commit(self, group: Group, log: Log, offset: int, *, attempts: int = 0, isolated: bool = False) -> None:
        """Move a group's committed offset; what is known about its refreshes and moves stays."""
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
        """commit() by an operator: what members acknowledged before does not take the group past the new offset."""
        self.commit(group, log, offset)
        committed = group.committed(log)
        assert committed is not None
        self.put(group, log, replace(committed, moved_end=log.durable_end))

    def put(self, group: Group, log: Log, committed: GroupOffset) -> None:
        """Replace a group's committed offset; stored within 50 ms (Engine.when_stored tells when)."""
        key = (log.topic, log.partition)
        self.offsets += bool(group.name) and key not in group.committed_offsets
        group.committed_offsets[key] = committed
        if group.name:
            self._engine.commit_offset((group.name, *key), committed)

    def apply(self, cursor: Cursor, offset: int) -> None:
        """A member says up to where its readers see a partition that it holds; -1: it says so no more. Not stored: it
        says it again to every run of a node."""
        if offset < 0:
            cursor.group.applied.pop(cursor.key, None)
        else:
            cursor.group.applied[cursor.key] = (cursor.log.identity.log_id, min(offset, cursor.log.durable_end))

    def grant(self, cursor: Cursor) -> None:
        """Make a cursor the holder of its partition."""
        cursor.group.generation += 1
        cursor.generation = cursor.group.generation
        cursor.group.last_clients[cursor.key] = cursor.member.client_id
        cursor.group.holders[cursor.key] = cursor.member.cursors[cursor.key] = cursor
        self._holders.setdefault(cursor.log, {})[cursor] = None

    def revoke(self, cursor: Cursor) -> None:
        """Its partition is free."""
        del cursor.group.holders[cursor.key], cursor.member.cursors[cursor.key]
        cursor.group.suspects.pop(cursor, None)
        holders = self._holders[cursor.log]
        del holders[cursor]
        if not holders:
            del self._holders[cursor.log]

    def holders(self, log: Log) -> list[Cursor]:
        """Every cursor that holds a partition of this log, of groups without a name as well."""
        return list(self._holders.get(log, ()))

    def next_lease(self) -> int:
        self._leases += 1
        return self._leases

    def places(self, log: Log, now: float) -> Iterator[tuple[str, int, float]]:
        """Where each group is in a log: name, committed offset, and for how many seconds nothing was heard of it (0:
        somebody holds the partition)."""
        key = (log.topic, log.partition)
        for group in self._groups.values():
            committed = group.committed(log)
            if committed is not None:
                silent = 0.0 if key in group.holders else max(now - group.last_seen, 0.001)
                yield group.name, committed.next_offset, silent
