"""Lists that may be long: thousands of partitions must not hold up the pushes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from edgebroker.common.runtime.scheduler import Scheduler, in_turns

W = TypeVar("W")


def list_in_slices(
    scheduler: Scheduler, rendered: Iterator[object], kind: type[W], done: Callable[[list[W]], None]
) -> None:
    """Take what an iterator renders, a few milliseconds at a time, then done().

    rendered: objects of `kind`, which has a list `partitions`, each followed by what belongs into that list.
    """
    found: list[W] = []

    def steps() -> Iterator[None]:
        for one in rendered:
            if isinstance(one, kind):
                found.append(one)
            else:
                found[-1].partitions.append(one)  # type: ignore[attr-defined]
            yield

    in_turns(scheduler, steps(), lambda: done(found))
