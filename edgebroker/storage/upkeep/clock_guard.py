"""Whether the wall clock can be believed: by a wrong one, records would be removed by age too early.

It is implausible while it shows a time before there was a release, while it has moved otherwise than the monotonic
clock since the start, by a day or more, and while it is before the newest sealed segment. Each ends by itself once it
is right again. It counts only some time after the start: until then a machine without a battery may not have been told
what time it is.
"""

from __future__ import annotations

import logging

from edgebroker.common.runtime.clock import EARLIEST_WALL_MS, Clock

log = logging.getLogger(__name__)

JUMP_MS = 24 * 3600 * 1000
SETTLE_SECONDS = 600.0
# After so long without a jump, a stamp that lies in the future is taken for wrong, and not the clock.
CONFIRMED_SECONDS = 6 * 3600.0


class ClockGuard:
    """Owned by the loop thread. `implausible` says why the clock is not believed, "" when it is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_wall, self._started = clock.wall_ms(), clock.monotonic()
        self._set = False
        self.implausible = ""

    def check(self, newest_sealed_ms: int) -> None:
        """Compare the clocks, and the wall clock with when the newest segment was sealed (0: none is)."""
        wall, monotonic = self._clock.wall_ms(), self._clock.monotonic()
        drift = (wall - self._started_wall) - (monotonic - self._started) * 1000
        self._set = wall >= EARLIEST_WALL_MS and abs(drift) <= JUMP_MS
        why = ""
        if wall < EARLIEST_WALL_MS:
            why = "the wall clock was not set: it is before the release"
        elif abs(drift) > JUMP_MS:
            why = f"the wall clock jumped by {drift / 3.6e6:.0f} h"
        elif wall < newest_sealed_ms:
            why = "the wall clock is before the newest sealed segment"
        if why and why != self.implausible:
            log.warning("time-based retention suspended: %s", why)
        elif self.implausible and not why:
            log.info("time-based retention resumed: the wall clock is plausible again")
        self.implausible = why

    def seen_ms(self) -> int:
        """By which clock what has no plausible stamp is dated: milliseconds since 1970; 0 while it was not set or has
        jumped."""
        return self._clock.wall_ms() if self._set else 0

    @property
    def confirmed(self) -> bool:
        """It has run for so long that stamps in the future are wrong."""
        return self._set and self._clock.monotonic() - self._started >= CONFIRMED_SECONDS

    def wall_ms(self) -> int:
        """By which clock things are removed: milliseconds since 1970; 0 while it is implausible, and shortly after the
        start."""
        settled = self._clock.monotonic() - self._started >= SETTLE_SECONDS
        return self._clock.wall_ms() if settled and not self.implausible else 0
