"""What became of something that the broker or its storage was asked to do, over whichever protocol.

Two tables say how it is told: as a code of the binary protocol, and as a status of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from edgebroker.common.errors import Code


class Outcome(Enum):
    """OK, or the reason why it was not done; a message says more."""

    OK = "OK"
    INVALID = "INVALID"
    """The request makes no sense as it is."""
    NOT_FOUND = "NOT_FOUND"
    """What it is about is not on this node."""
    CONFLICT = "CONFLICT"
    """The node, or what it is about, is not in a state for it."""
    UNSUPPORTED = "UNSUPPORTED"
    """This node's storage engine, or its place in the tree, has no such thing."""
    NAME_CLASH = "NAME_CLASH"
    NOT_ORIGIN = "NOT_ORIGIN"
    """Another node writes it."""
    FENCED = "FENCED"
    """A later one took its place."""
    NO_SNAPSHOT = "NO_SNAPSHOT"
    """The table is not complete, and has no complete snapshot."""
    HISTORY_LOST = "HISTORY_LOST"
    CORRUPT = "CORRUPT"
    DAMAGED = "DAMAGED"
    """The records are in a corrupt range that is not repaired yet."""
    BEHIND = "BEHIND"
    """What it needs has not arrived yet."""
    OVERLOADED = "OVERLOADED"
    """Something else is under way."""
    STORAGE_TIMEOUT = "STORAGE_TIMEOUT"
    DISK_FULL = "DISK_FULL"
    READ_ONLY = "READ_ONLY"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    NOT_REPLICATED = "NOT_REPLICATED"
    """It is stored here, but not at enough nodes below in time."""

    @property
    def code(self) -> Code:
        """As the binary protocol says it."""
        return _CODES[self]

    @property
    def status(self) -> int:
        """As HTTP says it."""
        return _STATUSES.get(self, 503 if self.retryable else 409)

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed later unchanged."""
        return self.code.retryable


Done = Callable[[Outcome, str], None]
"""Called once, on the loop: OK and "", or why it was not done."""

_CODES = {
    Outcome.INVALID: Code.INVALID_REQUEST,
    Outcome.NOT_FOUND: Code.UNKNOWN_TOPIC,
    Outcome.CONFLICT: Code.INVALID_REQUEST,
    Outcome.UNSUPPORTED: Code.INVALID_REQUEST,
    **{one: Code[one.name] for one in Outcome if one.name in Code.__members__},
}
_STATUSES = {
    Outcome.OK: 200,
    Outcome.INVALID: 400,
    Outcome.NOT_FOUND: 404,
    Outcome.UNSUPPORTED: 501,
}
_OUTCOMES = {outcome.code: outcome for outcome in reversed(Outcome)}


def outcome_of(code: Code) -> Outcome:
    """What a code of the binary protocol means inside the broker; CONFLICT for what only its peers understand."""
    return _OUTCOMES.get(code, Outcome.CONFLICT)
