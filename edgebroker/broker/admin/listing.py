"""Lists that may be long: thousands of partitions must not hold up the pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from edgebroker.common.runtime.scheduler import Scheduler

SLICE_SECONDS = 0.002
W = TypeVar("W")


def list_in_slices(
    scheduler: Scheduler, rendered: Iterator[object], kind: type[W], done: Callable[[list[W]], None]
) -> None:
    """Take what an iterator renders, for 2 ms in each loop iteration, then done().

    rendered: objects of `kind`, which has a list `partitions`, each followed by what belongs into that list.
    """
    found: list[W] = []

    def some() -> None:
        until = scheduler.clock_now() + SLICE_SECONDS
        for one in rendered:
            if isinstance(one, kind):
                found.append(one)
            else:
                found[-1].partitions.append(one)  # type: ignore[attr-defined]
            if scheduler.clock_now() >= until:
                scheduler.call_later(0.0, some)
                return
        done(found)

    some()
