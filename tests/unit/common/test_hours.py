"""Hours of the day in which a link may be used, against looking at every minute."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebroker.common.runtime.clock import second_of_day
from edgebroker.common.runtime.hours import DAY_SECONDS, Hours, Span, parse_hours

minutes = st.integers(0, 24 * 60 - 1)


def text_of(spans: list[tuple[int, int]]) -> str:
    return ", ".join("-".join(f"{minute // 60:02d}:{minute % 60:02d}" for minute in span) for span in spans)


@given(st.lists(st.tuples(minutes, minutes), min_size=1, max_size=4), minutes)
def test_minute_by_minute(spans: list[tuple[int, int]], minute: int) -> None:
    inside = set()
    for first, following in spans:
        inside |= {at % 1440 for at in range(first, following if first < following else following + 1440)}
    hours = parse_hours(text_of(spans))
    assert hours.open(minute * 60) == hours.open(minute * 60 + 59.9) == (minute in inside)
    wait = hours.until_change(minute * 60)
    edges = {edge for span in spans for edge in span}
    assert wait == 60 * next(later for later in range(1, 1441) if (minute + later) % 1440 in edges)


def test_no_hours() -> None:
    for text in ("", "  "):
        assert parse_hours(text).open(0) and parse_hours(text).until_change(5) == DAY_SECONDS
    assert Hours([Span(0, 0)]).open(70_000)


@pytest.mark.parametrize("text", ["22-6", "24:00-06:00", "22:00-06:60", "22:00", ",", "22:00-06:00,", "a"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 22:00-06:00"):
        parse_hours(text)


def test_the_second_of_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "CET-1")
    time.tzset()
    try:
        assert second_of_day(1_764_022_530_250) == 23 * 3600 + 15 * 60 + 30.25  # 2025-11-24 22:15:30.250 UTC
    finally:
        monkeypatch.undo()
        time.tzset()
