"""Lists that may be long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from edgebroker.common.runtime.scheduler import Scheduler, in_slices

T = TypeVar("T")
R = TypeVar("R")
SLICE = 50


def list_in_slices(
    scheduler: Scheduler, items: Sequence[T], render: Callable[[T], R | None], done: Callable[[list[R]], None]
) -> None:
    """Render a list, a slice in each loop iteration: thousands of groups must not hold up the pushes.

    render() gives None for what has gone meanwhile.
    """
    found: list[R] = []

    def some(part: Sequence[T]) -> None:
        found.extend(one for item in part if (one := render(item)) is not None)

    in_slices(scheduler, items, SLICE, some, lambda: done(found))
