"""Waiting for several things that each call back once."""

from __future__ import annotations

from edgebroker.common.outcome import Done, Outcome


def gather(count: int, done: Done) -> Done:
    """A callback for each of the things to wait for; after `count` calls `done` gets the first failure, else OK. With a
    count of 0 it is called at once."""
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
    return one
