"""Whether the wall clock can be believed: by a wrong one, records would be removed by age too early.

It is implausible while it has moved otherwise than the monotonic clock since the start, by a day or more, and while it
is before the newest sealed segment. Both end by themselves once it is right again.
"""

from __future__ import annotations

import logging

from edgebroker.common.runtime.clock import Clock

log = logging.getLogger(__name__)

JUMP_MS = 24 * 3600 * 1000


class ClockGuard:
    """Owned by the loop thread. `implausible` says why the clock is not believed, "" when it is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_wall, self._started = clock.wall_ms(), clock.monotonic()
        self.implausible = ""

    def check(self, newest_sealed_ms: int) -> None:
        """Compare the clocks, and the wall clock with when the newest segment was sealed (0: none is)."""
        wall, monotonic = self._clock.wall_ms(), self._clock.monotonic()
        drift = (wall - self._started_wall) - (monotonic - self._started) * 1000
        why = ""
        if abs(drift) > JUMP_MS:
            why = f"the wall clock jumped by {drift / 3.6e6:.0f} h"
        elif wall < newest_sealed_ms:
            why = "the wall clock is before the newest sealed segment"
        if why and why != self.implausible:
            log.warning("time-based retention suspended: %s", why)
        elif self.implausible and not why:
            log.info("time-based retention resumed: the wall clock is plausible again")
        self.implausible = why

    def wall_ms(self) -> int:
        """Milliseconds since 1970; 0 while the clock is implausible."""
        return 0 if self.implausible else self._clock.wall_ms()
