"""Which parent to ask, and when: the list in its order, pauses after failures, moving on and coming back.

The first candidate is the wanted one. A candidate that cannot be reached, refuses, or has been BEHIND for 30 s gives
way to the next; a better one that has answered for five minutes gets its child back. Pauses are jittered and grow
(decorrelated: each is drawn between the shortest and three times the last), and it never gives up. No socket, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
FAILURES = 2
BEHIND_SECONDS = 30.0
LONGEST_BEHIND_SECONDS = 3600.0
HEALTHY_SECONDS = 300.0
PROBE_SECONDS = 20.0


class Candidates:
    """`draw(low, high)` is a random number between two; times are monotonic seconds."""

    def __init__(self, addresses: Sequence[str], draw: Callable[[float, float], float]) -> None:
        self._draw = draw
        self.addresses = list(addresses)
        self._current = 0
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._behind_since: float | None = None
        self._behind_wait = BEHIND_SECONDS
        self._healthy_since: dict[int, float] = {}
        self._probe_due = 0.0
        self.failovers = 0

    @property
    def current(self) -> str:
        """HOST:PORT of the parent to be asked; "" when there is none at all."""
        return self.addresses[self._current] if self.addresses else ""

    def replace(self, addresses: Sequence[str]) -> bool:
        """Another list; True when the current parent is not the one to be asked any more."""
        before = self.current
        self.addresses = list(addresses)
        self._current = self.addresses.index(before) if before in self.addresses else 0
        self._healthy_since.clear()
        return self.current != before

    def prefer_first(self) -> bool:
        """Ask the first of the list; True when that is another one than now."""
        moved, self._current = self._current != 0, 0
        self._failures, self._behind_since = 0, None
        return moved

    def answered(self) -> None:
        """The current parent takes part: data, or a sound 'nothing new'."""
        self._failures = 0
        self._pause = FIRST_PAUSE

    def failed(self) -> float:
        """It cannot be reached, or what it sends is of no use. How long to wait before the next attempt."""
        self._failures += 1
        if self._failures >= FAILURES:
            self.move_on()
        self._pause = min(LONGEST_PAUSE, self._draw(FIRST_PAUSE, self._pause * 3))
        return self._pause

    def move_on(self) -> bool:
        """Ask the next candidate; False when there is no other."""
        self._failures, self._behind_since = 0, None
        if len(self.addresses) < 2:
            return False
        self._healthy_since.pop(self._current, None)
        self._current = (self._current + 1) % len(self.addresses)
        self.failovers += 1
        return True

    def go_to(self, address: str) -> None:
        """Ask this candidate: it has what the current one lacks."""
        self.failovers += address != self.current
        self._failures, self._behind_since = 0, None
        self._healthy_since.clear()
        self._current = self.addresses.index(address)

    def behind(self, now: float, behind: bool) -> bool:
        """Told with every answer whether the parent lacks what this node has; True when it is time to move on."""
        if not behind:
            self._behind_since, self._behind_wait = None, BEHIND_SECONDS
            return False
        if self._behind_since is None:
            self._behind_since = now
        if now - self._behind_since < self._behind_wait or len(self.addresses) < 2:
            return False
        # Perhaps no parent has it: with every parent that lacks it as well, the next one is given longer.
        self._behind_wait = min(LONGEST_BEHIND_SECONDS, self._behind_wait * 2)
        return True

    def to_probe(self, now: float) -> list[str]:
        """Better candidates whose health should be looked at now; probed() takes the answers."""
        if self._current == 0 or now < self._probe_due:
            return []
        self._probe_due = now + PROBE_SECONDS
        return self.addresses[: self._current]

    def probed(self, address: str, healthy: bool, now: float) -> bool:
        """What a probe found; True when the child has come back to this better parent."""
        if address not in self.addresses[: self._current]:
            return False
        rank = self.addresses.index(address)
        if not healthy:
            self._healthy_since.pop(rank, None)
            return False
        if now - self._healthy_since.setdefault(rank, now) < HEALTHY_SECONDS:
            return False
        self._current, self._failures, self._pause = rank, 0, FIRST_PAUSE
        self._behind_since = None
        self._healthy_since.clear()
        self.failovers += 1
        return True
