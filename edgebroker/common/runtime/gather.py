"""Waiting for several things that each call back once."""

from __future__ import annotations

from collections.abc import Sequence

from edgebroker.common.outcome import Done, Outcome


def gather(count: int, done: Done) -> Sequence[Done]:
    """As many callbacks as there are things to wait for; when all were called, `done` gets the first failure, else OK.
    With a count of 0 it is called at once."""
    failures: list[tuple[Outcome, str]] = []
    left = count

    def one(outcome: Outcome, message: str) -> None:
        nonlocal left
        left -= 1
        if outcome is not Outcome.OK:
            failures.append((outcome, message))
        if not left:
            done(*(failures[0] if failures else (Outcome.OK, "")))

    if not count:
        done(Outcome.OK, "")
    return [one] * count
