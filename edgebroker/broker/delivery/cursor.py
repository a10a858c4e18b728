"""One member's place in one partition of its group: what was sent under its lease, and what of it is done."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from edgebroker.storage.engine import Log

if TYPE_CHECKING:
    from edgebroker.broker.delivery.groups import Group


Key = tuple[str, int]


class Member(Protocol):
    """A session, as far as groups know it."""

    client_id: str
    cursors: dict[Key, Cursor]
    """What it holds."""

    def send(self, data: bytes) -> None: ...


class Cursor:
    """Slow readers cost this, not a queue.

    committed <= acked <= next_offset; what lies between acked and next_offset is in flight. `hint` is where the
    batch at next_offset lies. `deadline` is when what is in flight must have been acknowledged (0: nothing is).
    `fresh`: nothing was read for it since it began; the first piece of a sealed segment is checked on the disk then.
    `failed_at`: the record that failed before and comes alone (-1: none); behind it the window opens again with every
    record that is acknowledged. `revoking`: given up as soon as nothing is in flight.
    `state` is one of (docs/protocol.md tells what each waits for)
    starting, live, reading, behind, damaged, backoff, dead_lettering, reset, no_snapshot, gone.
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
        "last_ack",
        "lease",
        "log",
        "member",
        "next_offset",
        "pieces",
        "position_epoch",
        "revoking",
        "state",
        "why",
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
        self.fresh = True
        self.state, self.why = "starting", ""
        self.generation = self.lease = 0
        self.last_ack = self.deadline = 0.0
        self.failed_at = -1
        self.revoking = False
        self.correlation = 0
        self.position_epoch = -1

    @property
    def key(self) -> Key:
        return self.log.topic, self.log.partition

    @property
    def in_flight(self) -> int:
        return self.next_offset - self.acked

    @property
    def window(self) -> int:
        """Records that may be in flight. Behind a failure it begins with one: a record that ends its handler again and
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
        """Alone, and there is a record to deliver or to wait for."""
        ready = self.state in ("live", "reading") and not self.revoking and self.next_offset < self.log.durable_end
        return self.isolated and (ready or self.in_flight > 0)

    def begin(self, offset: int) -> None:
        """Stand at an offset with nothing in flight."""
        self.next_offset = self.acked = offset
        self.in_flight_bytes = 0
        self.deadline = 0.0
        self.pieces.clear()
        self.hint = None
        self.fresh = True

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
