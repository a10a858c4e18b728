"""Where two logs with the same log_id part: a search by comparing chain checksums at batch boundaries.

The child names places at doubling distances from its end; the parent says which of them is the last that both have.
Then the child names places inside the gap between that and the next one, until there is no boundary left in it: after
log(n) rounds the last common boundary is found. Where the parent's log begins counts as a place too; what lies before
that cannot be compared. Pure: no socket, file or clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgebroker.pipe.stream import Point

POINTS = 32


class Search:
    """`low`: the last boundary known to be common (-1: none yet); `high`: the first known to differ. `start` is where
    the parent's log begins (-1: it did not say yet)."""

    def __init__(self, log_start: int, end: int) -> None:
        self._log_start = log_start
        self.low, self.high = -1, end
        self.start = Point(-1, 0)
        self._given: list[Point] = []

    def offsets(self) -> list[int]:
        """At which offsets of its own log the child should look up boundaries for the next round."""
        first = max(self._log_start, self.start.offset)
        if self.low < 0:
            distances = [1 << power for power in range(63)]
            # Of the first boundary behind `first` as well: one long batch may lie at all of the distances.
            return sorted({first, first + 1, *(self.high - d for d in distances if self.high - d > first)})
        step = max(1, (self.high - self.low) // (POINTS + 1))
        return list(range(self.low + 1, self.high, step))

    def take(self, found: Sequence[Point]) -> list[Point]:
        """The boundaries that were found there: what to ask the parent about; [] when the search is over: at `low`, or
        with nothing in common (-1)."""
        if self.start in found:
            self.low = max(self.low, self.start.offset)
        first = max(self.low + 1, self.start.offset)
        self._given = sorted({point for point in found if first <= point.offset < self.high})
        return self._given

    def answered(self, matched: int, start: Point) -> None:
        """The parent, whose log begins at `start`, has the given boundaries up to `matched` (-1: none of them)."""
        self.start = start
        differing = [point.offset for point in self._given if point.offset > max(matched, start.offset - 1)]
        self.high = min([self.high, *differing])
        self.low = max([self.low, *(point.offset for point in self._given if point.offset <= matched)])
        self._given = []


def last_common(points: Sequence[Point], chains: dict[int, int]) -> int:
    """The parent's side: the last of the child's points at which its own chain is the same; -1 when none is."""
    return max((point.offset for point in points if chains.get(point.offset) == point.chain), default=-1)
