"""What retention decides: one row for each rule, and a slow plan that is obviously right beside the real one."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebroker.common.types import TopicKind, TopicSettings
from edgebroker.storage.settings import HousekeepingSettings
from edgebroker.storage.types import UNKNOWN_CHAIN
from edgebroker.storage.upkeep.retention import RetentionFacts, plan

NOW = 1_000_000


class Piece(NamedTuple):
    """A segment as retention sees it."""

    size: int
    end_offset: int
    sealed_ms: int = 0
    base_chain: int = 1


class Case(NamedTuple):
    """A log: five segments of 100 bytes and 10 records, the last of them active, unless said otherwise."""

    name: str
    expected: int | None
    """How many segments go; None: there is nothing to do."""
    bytes: int = 0
    ms: int = 0
    topic_bytes: int = 0
    topic_ms: int = 0
    now_ms: int = NOW
    wanted: int = 0
    table: bool = False
    snapshot: int = -1
    pin: int | None = None
    floor: int | None = None
    sealed: tuple[int, ...] = (100, 200, 300, 400)
    unknown: tuple[int, ...] = ()
    """Ranks of the segments whose base chain is not known."""


def settings(keep_bytes: int = 0, keep_ms: int = 0) -> HousekeepingSettings:
    return HousekeepingSettings(
        retention_bytes=keep_bytes, retention_ms=keep_ms, segment_ms=0, max_bytes=0, soft_free_bytes=0,
        hard_free_bytes=0, scrub_bytes_per_second=0, deleted_retention_ms=0,
    )  # fmt: skip


def log_of(case: Case, asked: list[str] | None = None) -> RetentionFacts[Any]:
    asked = [] if asked is None else asked
    sealed = (*case.sealed, 0)
    segments = [
        Piece(100, 10 * rank + 10, sealed[rank], UNKNOWN_CHAIN if rank in case.unknown else 1) for rank in range(5)
    ]
    kind: TopicKind = "table" if case.table or case.snapshot >= 0 else "stream"
    topic = TopicSettings(kind=kind, retention_bytes=case.topic_bytes, retention_ms=case.topic_ms)

    def pin() -> int | None:
        asked.append("pin")
        return case.pin

    def floor() -> int | None:
        asked.append("floor")
        return case.floor

    return RetentionFacts(segments, topic, case.snapshot, pin, floor)


CASES = [
    Case("no limits", None),
    Case("smaller than the limit", None, bytes=501),
    Case("at least so much stays", 2, bytes=300),
    Case("the active segment stays", 4, bytes=1),
    Case("the topic's size counts before the node's", 1, bytes=1, topic_bytes=400),
    Case("old enough to the millisecond", 2, ms=NOW - 200),
    Case("the topic's age counts before the node's", 1, ms=1, topic_ms=NOW - 100),
    Case("of unknown age, and what follows it", 1, ms=1, sealed=(100, 0, 300, 400)),
    Case("sealed in the future", None, ms=1, sealed=(NOW + 1, 200, 300, 400)),
    Case("the clock is not believed: no age", None, ms=1, now_ms=0),
    Case("the clock is not believed: size counts", 2, ms=1, bytes=300, now_ms=0),
    Case("too old or too much, whichever takes more", 3, ms=NOW - 100, bytes=200),
    Case("the newest snapshot stays", 2, bytes=1, snapshot=29),
    Case("a snapshot at a segment's beginning", 2, bytes=1, snapshot=20),
    Case("a snapshot at the start", None, bytes=1, snapshot=0),
    Case("a table without a snapshot stays", None, bytes=1, ms=1, wanted=1000, floor=50, table=True),
    Case("the pin stays", 1, bytes=1, pin=19),
    Case("a pin at the start", None, bytes=1, pin=0),
    Case("the disk wants space, no group is live", None, wanted=1000),
    Case("the disk wants space: what all have passed", 2, wanted=1000, floor=29),
    Case("the disk wants space: no more than that", 1, wanted=100, floor=50),
    Case("the disk wants space: a part is a whole segment", 2, wanted=101, floor=50),
    Case("the disk wants space: the snapshot stays", 1, wanted=1000, floor=50, snapshot=15),
    Case("the disk wants space: nobody has read a stream", None, wanted=1000),
    Case("the disk wants space: nobody has read a table", 1, wanted=1000, snapshot=15, table=True),
    Case("the disk wants space: nor one without a snapshot", None, wanted=1000, table=True),
    Case("the disk wants space: the pin stays", 1, wanted=1000, floor=50, pin=19),
    Case("the disk wants space: a pin at the start", None, wanted=1000, floor=50, pin=0),
    Case("the disk wants space: the pin stays beyond the limits", 1, wanted=1000, floor=50, bytes=300, pin=10),
    Case("the disk wants space beyond the limits", 3, wanted=100, floor=50, bytes=300),
    Case("the log cannot start at an unknown chain", None, bytes=300, unknown=(2,)),
    Case("an unknown chain within what goes", 3, bytes=200, unknown=(1, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_rule(case: Case) -> None:
    facts = log_of(case)
    found = plan([facts], settings(case.bytes, case.ms), now_ms=case.now_ms, wanted=case.wanted)
    assert found == (None if case.expected is None else (0, list(facts.segments[: case.expected])))


def test_one_log_at_a_time_and_the_space_is_counted_once() -> None:
    blocked = log_of(Case("", None, floor=50, unknown=(1, 2, 3, 4)))
    first, second = log_of(Case("", None, floor=10)), log_of(Case("", None, floor=50))
    assert plan([log_of(Case("", None)), first, second], settings(), now_ms=NOW, wanted=300) == (1, first.segments[:1])
    # Its segments stay, and yet nothing more is taken for it now.
    assert plan([blocked, second], settings(), now_ms=NOW, wanted=400) is None
    assert plan([blocked, second], settings(), now_ms=NOW, wanted=401) == (1, second.segments[:1])


@pytest.mark.parametrize(
    ("case", "asked"),
    [
        (Case("nothing to remove", None), []),
        (Case("over a limit", None, bytes=300), ["pin"]),
        (Case("the disk wants space", None, wanted=1), ["floor"]),
        (Case("both", None, wanted=1, bytes=300), ["floor", "pin"]),
    ],
    ids=lambda each: each.name if isinstance(each, Case) else "",
)
def test_pin_and_floor_are_asked_only_when_they_matter(case: Case, asked: list[str]) -> None:
    calls: list[str] = []
    plan([log_of(case, calls)], settings(case.bytes, case.ms), now_ms=NOW, wanted=case.wanted)
    assert calls == asked


def slow_plan(logs: list[RetentionFacts[Any]], node: HousekeepingSettings, now_ms: int, wanted: int) -> Any:
    """For each number of segments the whole condition again."""

    def held(facts: RetentionFacts[Any], segment: Piece) -> bool:
        pin = facts.pin()
        pinned = pin is not None and segment.end_offset > pin
        return pinned or (facts.settings.kind == "table" and segment.end_offset > max(facts.snapshot, 0))

    def over(facts: RetentionFacts[Any], rank: int) -> bool:
        segment = facts.segments[rank]
        keep_bytes = facts.settings.retention_bytes or node.retention_bytes
        keep_ms = facts.settings.retention_ms or node.retention_ms
        stays = sum(one.size for one in facts.segments[rank + 1 :])
        old = bool(now_ms and keep_ms and segment.sealed_ms) and now_ms - segment.sealed_ms >= keep_ms
        return ((bool(keep_bytes) and stays >= keep_bytes) or old) and not held(facts, segment)

    def early(facts: RetentionFacts[Any], begin: int, rank: int, wanted: int) -> bool:
        segment, floor = facts.segments[rank], facts.floor()
        missing = wanted - sum(one.size for one in facts.segments[begin:rank])
        if facts.settings.kind == "table" and floor is None:
            floor = facts.snapshot
        return missing > 0 and floor is not None and segment.end_offset <= floor and not held(facts, segment)

    for number, facts in enumerate(logs):
        counts = range(len(facts.segments))
        limit = max(count for count in counts if all(over(facts, rank) for rank in range(count)))
        count = max(
            count
            for count in counts
            if count >= limit and all(early(facts, limit, rank, wanted) for rank in range(limit, count))
        )
        wanted -= sum(one.size for one in facts.segments[limit:count])
        if count and facts.segments[count].base_chain != UNKNOWN_CHAIN:
            return number, facts.segments[:count]
    return None


@st.composite
def facts_of_logs(draw: st.DrawFn) -> RetentionFacts[Any]:
    ends, segments = 0, []
    for _ in range(draw(st.integers(1, 6))):
        ends += draw(st.integers(1, 5))
        sealed = draw(st.sampled_from([0, 1, 50, 99, 100, 120]))
        chain = draw(st.sampled_from([UNKNOWN_CHAIN, 7, 7]))
        segments.append(Piece(draw(st.integers(0, 4)), ends, sealed, chain))
    topic = TopicSettings(
        kind=draw(st.sampled_from(["stream", "table"])),
        retention_bytes=draw(st.integers(0, 8)),
        retention_ms=draw(st.sampled_from([0, 1, 50])),
    )
    offsets = st.integers(0, ends + 1)
    pin, floor = draw(st.none() | offsets), draw(st.none() | offsets)
    return RetentionFacts(segments, topic, draw(st.just(-1) | offsets), lambda: pin, lambda: floor)


@given(
    st.lists(facts_of_logs(), max_size=3),
    st.integers(0, 8),
    st.sampled_from([0, 1, 50]),
    st.sampled_from([0, 100, 130]),
    st.integers(-3, 12),
)
def test_it_decides_as_the_slow_plan(
    logs: list[RetentionFacts[Any]], keep_bytes: int, keep_ms: int, now_ms: int, wanted: int
) -> None:
    node = settings(keep_bytes, keep_ms)
    assert plan(logs, node, now_ms=now_ms, wanted=wanted) == slow_plan(logs, node, now_ms, wanted)
