"""Hours of the day, as an operator writes them: "22:00-06:00, 12:30-13:15"."""

from __future__ import annotations

import re
from typing import NamedTuple

DAY_SECONDS = 24 * 3600
_SPAN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)\Z")


class Span(NamedTuple):
    """Seconds of the day, [first, next); over midnight when `next` is not after `first`."""

    first: int
    next: int


class Hours:
    """Spans of the day; without any it is always open."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans

    def open(self, second: float) -> bool:
        """Is this second of the day in one of the spans?"""
        return not self._spans or any(_within(span, second) for span in self._spans)

    def until_change(self, second: float) -> float:
        """Seconds to the next beginning or end of a span; a day when there is none."""
        edges = {edge for span in self._spans for edge in span}
        return min(((edge - second) % DAY_SECONDS or DAY_SECONDS for edge in edges), default=float(DAY_SECONDS))


def _within(span: Span, second: float) -> bool:
    if span.first < span.next:
        return span.first <= second < span.next
    return second >= span.first or second < span.next


def parse_hours(text: str) -> Hours:
    """Parse HH:MM-HH:MM, several with commas; no text is no time range. Raises ValueError for anything else."""
    spans = []
    for part in (part.strip() for part in text.split(",")):
        if not part and not text.strip():
            break
        found = _SPAN.match(part)
        if found is None:
            raise ValueError(f"{part!r} is not a time range; write it as 22:00-06:00")
        hour, minute, last_hour, last_minute = map(int, found.groups())
        spans.append(Span(hour * 3600 + minute * 60, last_hour * 3600 + last_minute * 60))
    return Hours(spans)
