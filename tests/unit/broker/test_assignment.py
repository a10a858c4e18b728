"""Assigning partitions to members, against every other assignment that there could be."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebroker.broker.delivery import assignment as steps

MEMBERS = "abcd"
quick = settings(derandomize=True, deadline=None, max_examples=150, database=None)

some_members = st.lists(st.sampled_from(MEMBERS), min_size=1, unique=True)
# Holders may be gone by now, or hold what they do not want any more.
some_holders = st.dictionaries(st.integers(0, 5), st.sampled_from(MEMBERS + "xy"))
some_wishes = st.dictionaries(st.integers(0, 5), st.lists(st.sampled_from(MEMBERS), unique=True))

M = TypeVar("M")
P = TypeVar("P")
Wishes = Mapping[int, Sequence[str]]
Holders = Mapping[int, str]


def assign(wanted_by: Mapping[P, Sequence[M]], holders: Mapping[P, M], pinned: Collection[P] = ()) -> dict[P, M]:
    """All steps at once."""
    work = steps.assign(wanted_by, holders, pinned)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def loads(assignment: Holders, members: Collection[str]) -> list[int]:
    counts = Counter(assignment.values())
    return [counts[member] for member in members]


def moves(assignment: Holders, wanted_by: Wishes, holders: Holders) -> int:
    """How many partitions change hands although their holder still wants them."""
    return sum(1 for key, member in assignment.items() if holders.get(key) in wanted_by[key] and holders[key] != member)


def is_balanced(assignment: Holders, members: Collection[str]) -> bool:
    return max(loads(assignment, members)) - min(loads(assignment, members)) <= 1


@quick
@given(st.integers(0, 6), some_members, some_holders, st.booleans())
def test_who_want_the_same_get_the_same_with_the_fewest_moves(
    count: int, members: list[str], holders: dict[int, str], shared: bool
) -> None:
    wanted_by = {partition: members if shared else list(members) for partition in range(count)}
    assignment = assign(wanted_by, holders)
    assert assignment.keys() == wanted_by.keys()
    assert is_balanced(assignment, members)
    every = (dict(enumerate(chosen)) for chosen in itertools.product(members, repeat=count))
    fewest = min(moves(other, wanted_by, holders) for other in every if is_balanced(other, members))
    assert moves(assignment, wanted_by, holders) == fewest


@quick
@given(some_wishes, some_holders, st.sets(st.integers(0, 5)))
def test_every_assignment(wanted_by: dict[int, list[str]], holders: dict[int, str], pinned: set[int]) -> None:
    assignment = assign(wanted_by, holders, pinned)
    # Everything that somebody wants is held, by one of those.
    assert assignment.keys() == {partition for partition, members in wanted_by.items() if members}
    assert all(member in wanted_by[partition] for partition, member in assignment.items())
    # What is pinned stays.
    for partition in pinned & assignment.keys():
        if holders.get(partition) in wanted_by[partition]:
            assert assignment[partition] == holders[partition]
    # No single move would even it out.
    counts = Counter(assignment.values())
    for partition, member in assignment.items():
        if partition not in pinned:
            assert all(counts[member] - counts[other] <= 1 for other in wanted_by[partition])
    # The same facts give the same assignment, and nobody moves when nothing has changed.
    assert assign(wanted_by, holders, pinned) == assignment
    assert assign(wanted_by, assignment, pinned) == assignment


@quick
@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 12))
def test_one_more_member_takes_its_share_and_no_more(count: int, members: int, order: int) -> None:
    before = assign({partition: range(members) for partition in range(count)}, {})
    newcomer = min(order, members)
    everybody = [*range(newcomer), 99, *range(newcomer, members)]
    wanted_by = {partition: everybody for partition in range(count)}
    after = assign(wanted_by, before)
    assert {member for key, member in after.items() if member != before[key]} <= {99}
    assert Counter(after.values())[99] == count // (members + 1)
    # It leaves again: only what it held changes hands.
    rest = assign({partition: range(members) for partition in range(count)}, after)
    assert all(rest[key] == member for key, member in after.items() if member != 99)


@pytest.mark.parametrize(
    ("wanted_by", "holders", "pinned", "expected"),
    [
        ({}, {}, (), {}),
        ({0: []}, {}, (), {}),
        ({0: [], 1: ["a"]}, {0: "a"}, (), {1: "a"}),
        ({0: ["a", "b"], 1: ["a", "b"]}, {}, (), None),
        # Two topics count together: who holds much of one gets less of the other.
        ({0: ["a"], 1: ["a"], 2: ["a", "b"], 3: ["a", "b"]}, {}, (), {0: "a", 1: "a", 2: "b", 3: "b"}),
        ({0: ["a"], 1: ["a"], 2: ["b", "a"], 3: ["b", "a"]}, dict.fromkeys(range(4), "a"), (), {2: "b", 3: "b"}),
        # What is pinned counts, but does not move.
        ({key: ["a", "b"] for key in range(3)}, dict.fromkeys(range(3), "a"), (0, 1, 2), dict.fromkeys(range(3), "a")),
        ({key: ["a", "b"] for key in range(3)}, dict.fromkeys(range(3), "a"), (0, 1), {0: "a", 1: "a", 2: "b"}),
        ({0: ["b"]}, {0: "a"}, (0,), {0: "b"}),
    ],
)
def test_cases(wanted_by: Wishes, holders: Holders, pinned: Collection[int], expected: Holders | None) -> None:
    assignment = assign(wanted_by, holders, pinned)
    if expected is None:
        assert sorted(assignment.values()) == ["a", "b"]
    else:
        assert {**assignment, **expected} == assignment


def test_a_large_group() -> None:
    """A thousand members, a thousand partitions: the last one to come takes one from a single other."""
    members = list(range(1000))
    wanted_by = {partition: members for partition in range(1024)}
    assignment = assign(wanted_by, {})
    assert set(Counter(assignment.values()).values()) == {1, 2}
    more = [*members, 1000]
    after = assign(dict.fromkeys(wanted_by, more), assignment)
    assert sum(1 for key in after if after[key] != assignment[key]) == 1
    assert set(Counter(after.values()).values()) == {1, 2}


def test_many_partitions_that_different_members_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends soon, and pauses often enough: between two pauses no more than STEP members are compared, and a list."""
    everything, most = ["a", "b"], ["a"]
    wanted_by = {number: everything if number < 9000 else most for number in range(10_000)}
    after = assign(wanted_by, dict.fromkeys(wanted_by, "a"))
    assert Counter(after.values()) == {"a": 5000, "b": 5000}
    assert all(after[number] == "a" for number in range(9000, 10_000))
    monkeypatch.setattr(steps, "STEP", 10)
    pauses = sum(1 for _ in steps.assign({number: [*"abc"[number % 3 :]] for number in range(300)}, {}))
    assert pauses >= 300 * 2 // (10 + 3)
