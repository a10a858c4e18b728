"""Which sealed segments to remove next: a decision from facts, without I/O and without a clock.

    limits   removed oldest first while the log is larger, or the segment older, than its topic (or the node) keeps
    holds    nothing from the newest complete snapshot of a table on, so nothing of a table without one; nothing from
             the pin on
    space    when the disk wants bytes back, also what every live group and child has passed

Only whole segments from the beginning of a log, never the active one, and only as far as the chain at the new start is
known. The plan is for one log; the next tick plans again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from edgebroker.common.types import TopicSettings
from edgebroker.storage.settings import HousekeepingSettings
from edgebroker.storage.types import UNKNOWN_CHAIN


class SegmentFacts(Protocol):
    """What counts of a segment. `sealed_ms` 0: not known, so it has no age."""

    size: int
    end_offset: int
    sealed_ms: int
    base_chain: int


S = TypeVar("S", bound=SegmentFacts)


@dataclass(frozen=True, slots=True)
class RetentionFacts(Generic[S]):
    """`segments` in order, the active one last. `snapshot`: where the newest complete snapshot of a table begins (-1:
    there is none). `pin` and `floor` are EngineListener's; they are asked only when the answer matters."""

    segments: Sequence[S]
    settings: TopicSettings
    snapshot: int
    pin: Callable[[], int | None]
    floor: Callable[[], int | None]

    def takes_keys(self, offset: int) -> bool:
        return takes_keys(self.settings, self.snapshot, offset)


def takes_keys(settings: TopicSettings, snapshot: int, offset: int) -> bool:
    """Would removing everything before an offset take live keys of a table?"""
    return settings.kind == "table" and offset > max(snapshot, 0)


def plan(
    logs: Iterable[RetentionFacts[S]], defaults: HousekeepingSettings, *, now_ms: int, wanted: int
) -> tuple[int, list[S]] | None:
    """What to remove now: (rank of the log in `logs`, its segments); None: nothing.

    `now_ms` 0: the clock is not to be believed, and nothing is removed by age. `wanted`: bytes that the disk budget
    wants back.
    """
    for rank, facts in enumerate(logs):
        gone = _over_limits(facts, defaults, now_ms)
        in_time = len(gone)
        if wanted > 0:
            gone += _passed_by_all(facts, in_time, wanted)
        pin = facts.pin() if gone else None
        if pin is not None:
            gone = [segment for segment in gone if segment.end_offset <= pin]
        wanted -= sum(segment.size for segment in gone[in_time:])
        if gone and facts.segments[len(gone)].base_chain != UNKNOWN_CHAIN:
            return rank, gone
    return None


def _over_limits(facts: RetentionFacts[S], defaults: HousekeepingSettings, now_ms: int) -> list[S]:
    """Beyond the limits of size and age."""
    keep_bytes = facts.settings.retention_bytes or defaults.retention_bytes
    keep_ms = (facts.settings.retention_ms or defaults.retention_ms) if now_ms else 0
    if not (keep_bytes or keep_ms):
        return []
    left = sum(segment.size for segment in facts.segments)
    gone: list[S] = []
    for segment in facts.segments[:-1]:
        too_much = keep_bytes > 0 and left - segment.size >= keep_bytes
        too_old = keep_ms > 0 and segment.sealed_ms > 0 and now_ms - segment.sealed_ms >= keep_ms
        if not (too_much or too_old) or facts.takes_keys(segment.end_offset):
            break
        gone.append(segment)
        left -= segment.size
    return gone


def _passed_by_all(facts: RetentionFacts[S], first: int, wanted: int) -> list[S]:
    """From segment `first` on, what every live group and child has passed, until `wanted` bytes are found."""
    floor = facts.floor()
    if floor is None and facts.settings.kind == "table":
        floor = facts.snapshot  # whoever comes first begins there
    early: list[S] = []
    for segment in facts.segments[first:-1]:
        if floor is None or segment.end_offset > floor or wanted <= 0 or facts.takes_keys(segment.end_offset):
            break
        early.append(segment)
        wanted -= segment.size
    return early
