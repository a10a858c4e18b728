"""What the core asks of those who use it. It speaks in the terms of the domain: packed facts, stored pieces, outcomes.
Only a session, which implements these, writes bytes of a protocol.

Everything is called on the loop thread. A call may find that the connection is over; it does nothing then, and the
session tells Membership.vanished() as usual.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

from edgebroker.common.messages import GapReason, Holding
from edgebroker.common.outcome import Outcome
from edgebroker.storage.types import FileSlice, GroupOffset

C = TypeVar("C")
"""The core's cursor (delivery/state.py): one member in one partition."""

Key = tuple[str, int]
"""Topic and partition."""


FROM_ABOVE = "above"
"""The peer of a request of administration that a node above has passed on."""


class NodeInfo(NamedTuple):
    """Who this node is, for its neighbours."""

    uid: str
    name: str
    level: str


class Publisher(Protocol):
    """One that publishes: a session, or the broker itself. `producer_id` is the one that it was granted, or -1."""

    client_id: str
    producer_id: int

    def answered(self, spans: bytes, answers: bytes) -> None:
        """What became of publishes, each with its answer (common/spans.py); they are true now."""

    def refused(self, spans: bytes, outcome: Outcome, why: str) -> None:
        """None of these publishes was stored, all for one reason."""

    def rejected(self, spans: bytes, code: int, why: str) -> None:
        """A batch of these publishes is wrong, as `code` (common/errors.py) and `why` say."""

    def hold(self) -> None:
        """Do not publish anything more until release(), once for each hold()."""

    def release(self) -> None:
        """Go on, with what was held back first."""


class Member(Protocol[C]):
    """A consumer, as far as groups and pushing know it."""

    client_id: str
    cursors: dict[Key, C]
    """What it holds."""

    @property
    def writable(self) -> bool:
        """True when what is delivered now goes out at once: nothing is queued before it, the connection stands."""

    def deliver(self, cursor: C, first: int, next_offset: int, data: memoryview, age_ms: int) -> None:
        """Stored batches: the records wanted of them are [first, next_offset), each of them at least `age_ms` old at
        this node. The cursor has moved to next_offset."""

    def deliver_file(self, cursor: C, first: int, next_offset: int, piece: FileSlice, age_ms: int) -> None:
        """The same, from a file. The member holds the file until the bytes are sent."""

    def gap(self, cursor: C, first: int, next_offset: int, reason: GapReason) -> None:
        """The records [first, next_offset) will not come. The cursor has moved to next_offset."""

    def assigned(self, cursor: C, holding: Holding) -> None:
        """The cursor's partition is the member's now, is being revoked, or is its no more."""

    def state(self, cursor: C, outcome: Outcome, why: str) -> None:
        """Nothing is delivered from the cursor's partition for now."""

    def announce_refresh(self, cursor: C, committed: GroupOffset) -> None:
        """The partition has to be refreshed: from `committed.reset_from` to `committed.target`."""
