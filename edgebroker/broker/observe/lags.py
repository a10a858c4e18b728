"""How long a group has been behind, in seconds: from when each log ended where.

Once a second the ends of the logs are looked at; those that moved are noted. When a log has more than MOST samples,
they are thinned so that the gaps grow with the age: what is recent is known to a second, what is older to an eighth of
its age, whatever the traffic. What was stored before this run is judged by the age of the stored batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from edgebroker.common.runtime.scheduler import Scheduler, in_turns
from edgebroker.storage.engine import Engine, Log

MOST = 192
FINENESS = 8
SLICE = 64

Sample = tuple[int, float]
"""Where a log ended, and when that was seen first."""


class Lags:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self._engine, self._scheduler = engine, scheduler
        self._samples: dict[str, list[Sample]] = {}
        self._looking = False

    def sample(self, now: float) -> None:
        """Look where the logs end now, a few at a time, unless that is under way already."""
        if self._looking:
            return
        self._looking, samples = True, dict[str, list[Sample]]()

        def look() -> Iterator[None]:
            for rank, log in enumerate(self._engine.logs()):
                samples[log.identity.log_id] = self._sampled(log, now)
                if rank % SLICE == 0:
                    yield

        def done() -> None:
            self._looking, self._samples = False, samples

        in_turns(self._scheduler, look(), done)

    def _sampled(self, log: Log, now: float) -> list[Sample]:
        samples = self._samples.get(log.identity.log_id)
        if samples is None or samples[-1][0] > log.durable_end:
            return [(log.durable_end, now)]  # new here, or cut
        if samples[-1][0] < log.durable_end:
            samples.append((log.durable_end, now))
            if len(samples) > MOST:
                return _thinned(samples, now)
        return samples

    def seconds(self, log: Log, next_offset: int, now: float) -> float:
        """For how long at least the record at next_offset has been there; 0 for who is at the end."""
        if next_offset >= log.durable_end:
            return 0.0
        samples = self._samples.get(log.identity.log_id, [])
        rank = bisect_right(samples, next_offset, key=lambda sample: sample[0])
        if rank == len(samples):
            return 0.0  # it came since the last look
        if rank:
            return now - samples[rank][1]
        before = self._engine.age_ms(log, next_offset + 1) / 1000 if next_offset >= log.log_start else 0.0
        return max(before, now - samples[0][1])


def _thinned(samples: list[Sample], now: float) -> list[Sample]:
    """Of what is older than a gap allows, the oldest is kept; first and last always."""
    kept = [samples[-1]]
    for rank in range(len(samples) - 2, 0, -1):
        (_, following), (_, time), (_, earlier) = kept[-1], samples[rank], samples[rank - 1]
        if following - earlier > (now - earlier) / FINENESS or following - time >= (now - time) / FINENESS:
            kept.append(samples[rank])
    return [samples[0], *reversed(kept)]
