"""Who reads what: groups, their places, and for each partition of a group the one member that holds it.

No socket, file, thread or clock: `now` comes in, cursors come out. A partition of a group has one holder; who
subscribes to it as well waits as standby, in order, and follows when the holder leaves.
"""

from __future__ import annotations

import secrets
from collections import deque
from typing import Protocol

from edgebroker.storage.engine import Log
from edgebroker.storage.meta import GroupOffset

LIVE_SECONDS = 7 * 24 * 3600.0


class Member(Protocol):
    """A session, as far as groups know it."""

    client_id: str


class Cursor:
    """One member's place in one partition of its group. Slow readers cost this, not a queue.

    committed <= acked <= next_offset; what lies between acked and next_offset is in flight. `hint` is where the
    batch at next_offset lies. `state` is one of live, standby, starting, reading, behind, damaged, reset.
    """

    __slots__ = (
        "acked",
        "generation",
        "group",
        "hint",
        "in_flight_bytes",
        "last_ack",
        "lease",
        "log",
        "member",
        "next_offset",
        "pieces",
        "start",
        "state",
        "subscribe_correlation",
        "window_bytes",
        "window_records",
    )

    def __init__(self, group: Group, log: Log, member: Member, window_records: int, window_bytes: int) -> None:
        self.group, self.log, self.member = group, log, member
        self.window_records, self.window_bytes = window_records, window_bytes
        self.next_offset = self.acked = 0
        self.in_flight_bytes = 0
        self.pieces: deque[tuple[int, int]] = deque()
        self.hint: tuple[int, int] | None = None
        self.state = "starting"
        self.generation = self.lease = 0
        self.last_ack = 0.0
        self.subscribe_correlation = 0
        self.start: object = None

    @property
    def in_flight(self) -> int:
        return self.next_offset - self.acked

    def begin(self, offset: int) -> None:
        """Stand at an offset with nothing in flight."""
        self.next_offset = self.acked = offset
        self.in_flight_bytes = 0
        self.pieces.clear()
        self.hint = None

    def delivered(self, next_offset: int, size: int) -> None:
        """Records up to next_offset were sent, in `size` bytes."""
        self.next_offset = next_offset
        self.in_flight_bytes += size
        self.pieces.append((next_offset, size))

    def acknowledge(self, offset: int) -> bool:
        """A cumulative acknowledgement; False when it is not about records in flight."""
        if not self.acked <= offset <= self.next_offset:
            return False
        self.acked = offset
        while self.pieces and self.pieces[0][0] <= offset:
            self.in_flight_bytes -= self.pieces.popleft()[1]
        return True


class Group:
    """A consumer group: places of the past and holders of the present, by (topic, partition)."""

    __slots__ = ("generation", "holders", "last_seen", "name", "offsets", "standbys")

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.offsets: dict[tuple[str, int], GroupOffset] = {}
        self.holders: dict[tuple[str, int], Cursor] = {}
        self.standbys: dict[tuple[str, int], deque[Cursor]] = {}
        self.generation = 0
        self.last_seen = now


class Groups:
    """All groups of the node."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        # Leases of an earlier run of this node must not be taken for one of this run.
        self._leases = secrets.randbits(48)

    def group(self, name: str, now: float) -> Group:
        """The group of this name, made when it is new."""
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = Group(name, now)
        group.last_seen = now
        return group

    def all(self) -> list[Group]:
        return list(self._groups.values())

    def restore(self, group: str, topic: str, partition: int, offset: GroupOffset, now: float) -> None:
        """A place stored by an earlier run."""
        self.group(group, now).offsets[topic, partition] = offset

    def join(self, cursor: Cursor) -> bool:
        """Take the partition for a member; False when another holds it: the cursor waits as standby.

        A member that holds it already goes on with the new cursor under a new lease.
        """
        key = (cursor.log.topic, cursor.log.partition)
        group = cursor.group
        holder = group.holders.get(key)
        if holder is not None and holder.member is not cursor.member:
            cursor.state = "standby"
            group.standbys.setdefault(key, deque()).append(cursor)
            return False
        self._grant(cursor, key)
        return True

    def leave(self, cursor: Cursor) -> Cursor | None:
        """A member gives a partition back; the standby that takes it over now, if there is one."""
        key = (cursor.log.topic, cursor.log.partition)
        group = cursor.group
        waiting = group.standbys.get(key)
        if group.holders.get(key) is not cursor:
            if waiting is not None and cursor in waiting:
                waiting.remove(cursor)
            return None
        del group.holders[key]
        if not waiting:
            group.standbys.pop(key, None)
            return None
        following = waiting.popleft()
        self._grant(following, key)
        return following

    def _grant(self, cursor: Cursor, key: tuple[str, int]) -> None:
        group = cursor.group
        group.generation += 1
        self._leases += 1
        group.holders[key] = cursor
        cursor.generation, cursor.lease, cursor.state = group.generation, self._leases, "starting"

    def floor(self, log: Log, now: float) -> int | None:
        """The offset that every live group of this log has passed; None when there is no such group."""
        key = (log.topic, log.partition)
        places = [
            group.offsets[key].next_offset
            for group in self._groups.values()
            if key in group.offsets
            and group.offsets[key].log_id == log.identity.log_id
            and (now - group.last_seen < LIVE_SECONDS or key in group.holders)
        ]
        return min(places, default=None)
