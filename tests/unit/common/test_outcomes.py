"""Outcomes, their codes and statuses, and waiting for several of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgebroker.common.errors import Code
from edgebroker.common.outcome import Outcome, outcome_of
from edgebroker.common.runtime.gather import gather
from edgebroker.common.runtime.scheduler import in_slices, in_turns
from tests.kit.clock import ManualClock, ManualScheduler


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_a_code_and_a_status(outcome: Outcome) -> None:
    assert (outcome.code is Code.OK) == (outcome is Outcome.OK) == (outcome.status == 200)
    assert outcome.status in (200, 400, 404, 409, 501, 503)
    assert (outcome.status == 503) == outcome.retryable


@pytest.mark.parametrize("code", Code)
def test_a_code_of_a_peer_means_an_outcome(code: Code) -> None:
    outcome = outcome_of(code)
    assert outcome.code is code or outcome is Outcome.CONFLICT
    assert (outcome is Outcome.OK) == (code is Code.OK)


def test_codes_that_stand_for_one_outcome_only_come_back_as_it() -> None:
    for outcome in Outcome:
        if outcome.name in Code.__members__:
            assert outcome_of(outcome.code) is outcome
    assert outcome_of(Code.INVALID_REQUEST) is Outcome.INVALID
    assert outcome_of(Code.UNKNOWN_TOPIC) is Outcome.NOT_FOUND


def test_gather_tells_the_first_failure_when_all_are_through() -> None:
    told: list[tuple[Outcome, str]] = []
    one = gather(3, lambda outcome, why: told.append((outcome, why)))
    one(Outcome.DISK_FULL, "no space")
    one(Outcome.OK, "")
    assert not told
    one(Outcome.READ_ONLY, "it failed")
    assert told == [(Outcome.DISK_FULL, "no space")]


def test_gather_of_nothing_and_of_what_goes_well() -> None:
    told: list[Outcome] = []
    gather(0, lambda outcome, why: told.append(outcome))
    assert told == [Outcome.OK]
    one = gather(2, lambda outcome, why: told.append(outcome))
    one(Outcome.OK, "")
    assert told == [Outcome.OK]
    one(Outcome.OK, "")
    assert told == [Outcome.OK, Outcome.OK]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_slices_are_taken_one_in_an_iteration(count: int) -> None:
    scheduler = ManualScheduler(ManualClock())
    taken: list[list[int]] = []
    ended: list[int] = []
    in_slices(scheduler, range(count), 3, lambda some: taken.append(list(some)), lambda: ended.append(len(taken)))
    iterations = 0
    while not ended:
        assert len(taken) == iterations + 1
        scheduler.turn()
        iterations += 1
    assert [item for some in taken for item in some] == list(range(count))
    assert all(len(some) <= 3 for some in taken)
    assert len(taken) == max(1, -(-count // 3))


def test_slices_end_when_enough_was_taken() -> None:
    scheduler = ManualScheduler(ManualClock())
    taken: list[int] = []
    ended: list[bool] = []

    def take(some: object) -> bool:
        taken.append(len(list(some)))  # type: ignore[call-overload]
        return len(taken) == 2

    in_slices(scheduler, range(100), 10, take, lambda: ended.append(True))
    for _ in range(5):
        scheduler.turn()
    assert taken == [10, 10]
    assert ended == [True]


@pytest.mark.parametrize("fails", [0, 3])
def test_a_walk_that_fails_is_over(fails: int) -> None:
    """At once, or in a later iteration: who waits for its end does not wait for ever."""
    clock = ManualClock()
    scheduler = ManualScheduler(clock)
    taken: list[int] = []
    ended: list[bool] = []

    def steps() -> Iterator[None]:
        for step in range(5):
            if step == fails:
                raise RuntimeError("a defect")
            clock.advance(0.001)
            taken.append(step)
            yield

    with pytest.raises(RuntimeError):
        in_turns(scheduler, steps(), lambda: ended.append(True))
        for _ in range(5):
            scheduler.turn()
    assert taken == list(range(fails))
    assert ended == [True]
