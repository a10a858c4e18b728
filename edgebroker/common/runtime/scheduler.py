"""What the loop offers to those who live on it. Storage knows only this, not edgebroker.network.io.loop."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")
SLICE_SECONDS = 0.002


class Timer(Protocol):
    def cancel(self) -> None:
        """The callback will not run. Idempotent."""


class Scheduler(Protocol):
    """All calls but call_soon_threadsafe belong to the loop thread."""

    def now(self) -> float:
        """Monotonic seconds, read once per turn of the loop."""

    def clock_now(self) -> float:
        """Monotonic seconds at this moment."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Run a callback on the loop, not before `seconds` have passed."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Run a callback on the loop as soon as possible; from any thread."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Run a callback whenever a descriptor is readable."""

    def remove_reader(self, fd: int) -> None: ...

    def at_end_of_iteration(self, callback: Callable[[], None]) -> None:
        """Run a callback at the end of every turn, after all events of the turn were handled."""

    def remove_end_of_iteration(self, callback: Callable[[], None]) -> None:
        """Undo that."""


def in_slices(
    scheduler: Scheduler,
    items: Sequence[T],
    size: int,
    take: Callable[[Sequence[T]], bool | None],
    done: Callable[[], None],
) -> None:
    """Work through many items, `size` of them in a loop iteration, so that nothing else waits for long; then done().
    take() gets a slice; when it returns True, that was enough. The first slice is taken at once."""

    def some(first: int) -> None:
        enough = take(items[first : first + size])
        if enough or first + size >= len(items):
            done()
        else:
            scheduler.call_later(0.0, lambda: some(first + size))

    some(0)


def in_turns(scheduler: Scheduler, steps: Iterator[object], done: Callable[[], None]) -> None:
    """Take the steps of a long walk for 2 ms in a loop iteration, then done(). The first are taken at once. When a step
    fails, done() is called as well, before the failure goes on: who waits for the end does not wait for ever."""

    def some() -> None:
        until = scheduler.clock_now() + SLICE_SECONDS
        try:
            for _ in steps:
                if scheduler.clock_now() >= until:
                    scheduler.call_later(0.0, some)
                    return
        except BaseException:
            done()
            raise
        done()

    some()
