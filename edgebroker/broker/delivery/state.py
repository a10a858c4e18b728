"""The state of consumer groups: a cursor for each member and partition, a group's committed offsets, members, holders.

Plain state and what follows from it at once; no socket, file, thread or clock. Who changes it: groups.py keeps it,
membership.py moves partitions, leases.py decides where a cursor is, push.py what is sent to it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from edgebroker.broker.ports import Key, Member
from edgebroker.common.messages import Wanted
from edgebroker.storage.engine import Log
from edgebroker.storage.types import GroupOffset, Identity


class CursorState(StrEnum):
    """What a cursor waits for; docs/protocol.md tells users."""

    STARTING = "starting"
    """Where it begins is being looked up."""
    LIVE = "live"
    """Nothing: records are pushed as they become durable."""
    READING = "reading"
    """The disk."""
    BEHIND = "behind"
    """The log has not come to its position yet."""
    DAMAGED = "damaged"
    """Records in a corrupt range."""
    BACKOFF = "backoff"
    """The pause after a failure."""
    DEAD_LETTERING = "dead_lettering"
    """The record that failed too often is on its way into the dead-letter topic."""
    REFRESH = "refresh"
    """The member has to accept a snapshot refresh."""
    NO_SNAPSHOT = "no_snapshot"
    """Its table is not complete, and there is no snapshot to refresh from."""
    GONE = "gone"
    """It was released; final."""


_ANY_TIME = {CursorState.STARTING, CursorState.BACKOFF, CursorState.REFRESH, CursorState.NO_SNAPSHOT, CursorState.GONE}
# A lease ends at any time: by a failure, a refresh, an operator, a truncation, a release. Beyond that:
TRANSITIONS: dict[CursorState, set[CursorState]] = {
    CursorState.STARTING: {*_ANY_TIME, CursorState.LIVE, CursorState.DEAD_LETTERING},
    CursorState.LIVE: {*_ANY_TIME, CursorState.READING, CursorState.BEHIND, CursorState.DAMAGED, CursorState.LIVE,
                       CursorState.DEAD_LETTERING},
    CursorState.READING: {*_ANY_TIME, CursorState.LIVE, CursorState.DEAD_LETTERING},
    CursorState.BEHIND: {*_ANY_TIME, CursorState.LIVE, CursorState.DEAD_LETTERING},
    CursorState.DAMAGED: {*_ANY_TIME, CursorState.LIVE, CursorState.DEAD_LETTERING},
    CursorState.BACKOFF: {*_ANY_TIME, CursorState.LIVE, CursorState.DEAD_LETTERING},
    CursorState.DEAD_LETTERING: {*_ANY_TIME, CursorState.LIVE, CursorState.DEAD_LETTERING},
    CursorState.REFRESH: _ANY_TIME,
    CursorState.NO_SNAPSHOT: _ANY_TIME,
    CursorState.GONE: set(),
}  # fmt: skip


_NOTHING: deque[tuple[int, int]] = deque(maxlen=0)


class Cursor:
    """Delivery state of one member in one partition. A slow reader costs this, not a queue.

    committed <= acked <= next_offset; what lies between acked and next_offset is in flight. `hint` is where the
    batch at next_offset lies. `deadline` is when what is in flight must have been acknowledged (0: nothing is).
    `fresh`: nothing was read for it since it began. `failed_at`: the record that failed before and is isolated (-1:
    none); after it the window opens again with every record that is acknowledged. `revoking`: given up as soon as
    nothing is in flight. `correlation` is the member's own number for its subscription, `prefix` what it has encoded
    for this log; both belong to the member.
    """

    __slots__ = (
        "acked",
        "correlation",
        "deadline",
        "failed_at",
        "fresh",
        "generation",
        "group",
        "hint",
        "in_flight_bytes",
        "key",
        "last_ack",
        "lease",
        "log",
        "member",
        "next_offset",
        "pieces",
        "position_epoch",
        "prefix",
        "revoking",
        "state",
        "why",
        "window_bytes",
        "window_records",
    )

    def __init__(self, group: Group, log: Log, member: Member[Cursor], window_records: int, window_bytes: int) -> None:
        self.group, self.log, self.member = group, log, member
        self.key: Key = log.topic, log.partition
        self.window_records, self.window_bytes = window_records, window_bytes
        self.next_offset = self.acked = 0
        self.in_flight_bytes = 0
        self.pieces = _NOTHING
        self.hint: tuple[int, int] | None = None
        self.fresh = True
        self.state, self.why = CursorState.STARTING, ""
        self.generation = self.lease = 0
        self.last_ack = self.deadline = 0.0
        self.failed_at = -1
        self.revoking = False
        self.correlation = 0
        self.position_epoch = -1
        self.prefix: tuple[Identity, int, bytes] | None = None

    @property
    def in_flight(self) -> int:
        return self.next_offset - self.acked

    @property
    def window(self) -> int:
        """Records that may be in flight. After a failure it begins with one: a record that ends its handler again and
        again costs a few more members then, not one for each record before it in the window."""
        if self.failed_at < 0:
            return self.window_records
        return min(self.window_records, 1 + self.acked - self.failed_at)

    @property
    def isolated(self) -> bool:
        """The record that failed is the only one that may be in flight, here and for this member."""
        return self.acked == self.failed_at

    @property
    def wants_turn(self) -> bool:
        """Isolated, and there is a record to deliver or to wait for."""
        reads = self.state is CursorState.LIVE or self.state is CursorState.READING
        ready = reads and not self.revoking and self.next_offset < self.log.durable_end
        return self.isolated and (ready or self.in_flight > 0)

    def begin(self, offset: int) -> None:
        """Be at an offset with nothing in flight."""
        self.next_offset = self.acked = offset
        self.in_flight_bytes = 0
        self.deadline = 0.0
        self.pieces = _NOTHING
        self.hint = None
        self.fresh = True

    def delivered(self, next_offset: int, size: int) -> None:
        """Records up to next_offset were sent, in `size` bytes."""
        self.next_offset = next_offset
        self.in_flight_bytes += size
        if self.pieces is _NOTHING:  # a deque takes half a kilobyte, and most cursors wait
            self.pieces = deque()
        self.pieces.append((next_offset, size))

    def acknowledge(self, offset: int) -> bool:
        """A cumulative acknowledgement; False when it is not about records in flight."""
        if not self.acked <= offset <= self.next_offset:
            return False
        self.acked = offset
        while self.pieces and self.pieces[0][0] <= offset:
            self.in_flight_bytes -= self.pieces.popleft()[1]
        return True


@dataclass(slots=True, eq=False)
class Subscription:
    """What one member wants. `topics` and `pins` hold the last line about a topic or a single partition; `left` are
    partitions that it gave back although it wants their topic; `begun` those whose line has been followed; `size` is
    how many partitions it names; `unresponsive`: it let a delivery time out and was not heard since."""

    correlation: int
    window_records: int
    window_bytes: int
    topics: dict[str, Wanted] = field(default_factory=dict)
    pins: dict[Key, Wanted] = field(default_factory=dict)
    left: set[Key] = field(default_factory=set)
    begun: set[Key] = field(default_factory=set)
    size: int = 0
    unresponsive: bool = False

    def wants(self, key: Key) -> bool:
        return key in self.pins or (key[0] in self.topics and key not in self.left)

    def take_line(self, key: Key) -> Wanted | None:
        """What was said last about a partition; None when it was followed already: a line counts once."""
        if key in self.begun:
            return None
        self.begun.add(key)
        return self.pins.get(key) or self.topics.get(key[0])


class Group:
    """A consumer group. One without a name belongs to one connection, and nothing of it is stored.

    `last_clients` are the client ids that held each partition last. `pauses` says until when a partition waits after a
    failure, `reasons` why it failed, `rejected` which record a member wants to be a dead letter; `dead_lettering` are
    partitions whose next record is on its way into the dead-letter topic, `suspects` the cursors that are before a
    record at which a member fell silent. `applied` is what members say that their readers see, by log id.
    """

    __slots__ = (
        "applied", "committed_offsets", "dead_lettering", "generation", "holders", "last_clients", "last_seen",
        "members", "name", "pauses", "reasons", "rejected", "suspects",
    )  # fmt: skip

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.committed_offsets: dict[Key, GroupOffset] = {}
        self.members: dict[Member[Cursor], Subscription] = {}
        self.holders: dict[Key, Cursor] = {}
        self.last_clients: dict[Key, str] = {}
        self.pauses: dict[Key, float] = {}
        self.reasons: dict[Key, str] = {}
        self.rejected: dict[Key, int] = {}
        self.applied: dict[Key, tuple[str, int]] = {}
        self.dead_lettering: set[Key] = set()
        self.suspects: dict[Cursor, None] = {}
        self.generation = 0
        self.last_seen = now

    def applied_in(self, log: Log) -> int:
        """Up to where readers see this very log; -1 when no member said."""
        log_id, offset = self.applied.get((log.topic, log.partition), ("", -1))
        return offset if log_id == log.identity.log_id else -1

    def committed(self, log: Log) -> GroupOffset | None:
        """The group's committed offset in this very log."""
        found = self.committed_offsets.get((log.topic, log.partition))
        return found if found is not None and found.log_id == log.identity.log_id else None
