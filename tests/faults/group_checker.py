"""What a consumer group promises, held against the journals of all its members (member.py) and the log at the end.

    problems = Journals(paths).problems(content, letters)

For each partition: whatever is in the log was handled by the group or is a dead letter; nothing was skipped, first-time
handlings are in the order of the offsets; each lease hands out consecutive records to one member; no lease begins
before what the broker confirmed as stored under an earlier one, so that two members never get ahead in turns.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.common.runtime.clock import SystemClock

from .checker import Content, origin_of

# Leases count from a number that is drawn again at each start of a broker: those of one run lie close together.
LEASES_PER_RUN = 1 << 20


class Handled(NamedTuple):
    """A record was handled; `at` is comparable between processes."""

    at: int
    member: str
    lease: int
    offset: int
    origin: tuple[str, int]


class Stored(NamedTuple):
    """The broker confirmed under a lease that everything before an offset is stored as acknowledged."""

    at: int
    lease: int
    offset: int


class Letter(NamedTuple):
    """A record of the dead-letter topic: where it came from and what the broker says about it."""

    partition: int
    offset: int
    origin: tuple[str, int]
    headers: Mapping[str, str]


class Journals:
    """What all members of a group wrote down about one topic."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.handled: dict[int, list[Handled]] = defaultdict(list)
        self.stored: dict[int, list[Stored]] = defaultdict(list)
        self.poisoned: dict[tuple[int, int], int] = defaultdict(int)
        self.ends: dict[str, str] = {}
        self.gaps: list[str] = []
        for path in paths:
            self._read(path)
        for handled in self.handled.values():
            handled.sort()

    def _read(self, path: Path) -> None:
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            at, what, *rest = line.split(" ")
            if what == "h":
                origin = (rest[3], int(rest[4]))
                self.handled[int(rest[0])].append(Handled(int(at), path.stem, int(rest[1]), int(rest[2]), origin))
            elif what == "s":
                self.stored[int(rest[0])].append(Stored(int(at), int(rest[1]), int(rest[2])))
            elif what == "x":
                self.poisoned[int(rest[0]), int(rest[2])] += 1
            elif what == "g":
                self.gaps.append(f"{path.stem}: {' '.join(rest)}")
            elif what in "!e":
                self.ends[path.stem] = " ".join(rest)

    @property
    def first_times(self) -> int:
        return sum(len({handled.offset for handled in found}) for found in self.handled.values())

    @property
    def repeats(self) -> int:
        return sum(map(len, self.handled.values())) - self.first_times

    def problems(self, content: Content, letters: Iterable[Letter], *, faults: bool = True) -> list[str]:
        """Every broken promise, in words. Without `faults` no record may be handled twice, no letter written."""
        dead: dict[int, dict[int, list[Letter]]] = defaultdict(lambda: defaultdict(list))
        buried = list(letters)
        for letter in buried:
            dead[letter.partition][letter.offset].append(letter)
        found = [f"a gap: {gap}" for gap in self.gaps]
        found += [f"{member} ended: {why}" for member, why in self.ends.items() if why]
        for partition, part in sorted(content.items()):
            held = {offset: origin_of(value) for offset, value in part.records}
            # What retention has removed since can not be compared.
            handled = [each for each in self.handled[partition] if each.offset >= part.log_start]
            checks = [_same(held, handled), _buried_right(held, dead[partition]), _all(held, handled, dead[partition])]
            checks += [_order(part.log_start, handled, dead[partition]), _leases(handled, self.stored[partition])]
            found += [f"partition {partition}: {problem}" for check in checks for problem in check]
        if not faults:
            found += [f"{self.repeats} records were handled twice"] if self.repeats else []
            found += [f"{len(buried)} records are dead letters"] if buried else []
        return found


def _same(held: Mapping[int, tuple[str, int]], handled: list[Handled]) -> Iterator[str]:
    for each in handled:
        if held.get(each.offset) != each.origin:
            yield f"{each.member} handled {each.origin} at {each.offset}, the log holds {held.get(each.offset)}"


def _buried_right(held: Mapping[int, tuple[str, int]], dead: Mapping[int, list[Letter]]) -> Iterator[str]:
    for offset, letters in dead.items():
        for letter in letters:
            if held.get(offset) != letter.origin:
                yield f"the letter of {offset} holds {letter.origin}, the log {held.get(offset)}"


def _all(
    held: Mapping[int, tuple[str, int]], handled: list[Handled], dead: Mapping[int, list[Letter]]
) -> Iterator[str]:
    missing = sorted(held.keys() - {each.offset for each in handled} - dead.keys())
    if missing:
        yield f"{len(missing)} records were never handled, the first are {missing[:5]}"


def _order(start: int, handled: list[Handled], dead: Mapping[int, list[Letter]]) -> Iterator[str]:
    """First-time handlings in the order of the offsets, nothing left out but dead letters."""
    following = start
    for each in handled:
        if each.offset > following:
            skipped = [offset for offset in range(following, each.offset) if offset not in dead]
            if skipped:
                yield f"{each.member} handled {each.offset} before {skipped[0]} was handled by anybody"
        following = max(following, each.offset + 1)


def _leases(handled: list[Handled], stored: list[Stored]) -> Iterator[str]:
    """Each lease belongs to one member and is consecutive; none begins before what an earlier one had stored."""
    by_lease: dict[int, list[Handled]] = defaultdict(list)
    for each in handled:
        by_lease[each.lease].append(each)
    for lease, found in by_lease.items():
        members = {each.member for each in found}
        if len(members) > 1:
            yield f"lease {lease} belonged to {sorted(members)}"
        for before, after in pairwise(found):
            if after.offset != before.offset + 1:
                yield f"lease {lease}: {after.offset} came after {before.offset} to {after.member}"
    confirmed: dict[int, int] = defaultdict(int)
    for each_stored in stored:
        confirmed[each_stored.lease] = max(confirmed[each_stored.lease], each_stored.offset)
    floor, by = 0, 0
    for lease in _in_order([*handled, *stored]):
        if lease in by_lease and by_lease[lease][0].offset < floor:
            first = by_lease[lease][0]
            yield f"lease {lease} gave {first.member} {first.offset}, {floor} was stored under lease {by} before"
        if confirmed[lease] > floor:
            floor, by = confirmed[lease], lease


def _in_order(events: Iterable[Handled | Stored]) -> list[int]:
    """Leases as they were given: run after run of the broker, in each by number."""
    begun: dict[int, int] = {}
    for event in events:
        begun[event.lease] = min(begun.get(event.lease, event.at), event.at)
    runs: list[list[int]] = []
    for lease in sorted(begun):
        if not runs or lease - runs[-1][-1] > LEASES_PER_RUN:
            runs.append([])
        runs[-1].append(lease)
    runs.sort(key=lambda run: min(begun[lease] for lease in run))
    return [lease for run in runs for lease in run]


def read_letters(broker: BrokerProcess, topic: str, end: int, seconds: float = 20.0) -> list[Letter]:
    """All dead letters of a topic. `end`: the durable end of its dead-letter topic."""
    found: list[Letter] = []
    clock = SystemClock()
    deadline = clock.monotonic() + seconds
    seen = 0
    with Consumer(broker.server, [f"{topic}.dlq"], start="earliest", auto_ack=False) as consumer:
        while seen < end:
            if clock.monotonic() > deadline:
                raise TimeoutError(f"{topic}.dlq did not come to its end {end}, but to {seen}")
            for record in consumer.poll(0.5):
                headers = {name: (value or b"").decode() for name, value in record.headers}
                place = int(headers["eb-dlq-partition"]), int(headers["eb-dlq-offset"])
                found.append(Letter(*place, origin_of(record.value or b""), headers))
                seen = record.offset + 1
    return found
