"""Ages against an oracle that knows the true time: never too old whatever the clock shows, right when it is right."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebroker.common.runtime.clock import EARLIEST_WALL_MS
from edgebroker.storage.log.ages import Ages
from edgebroker.storage.log.index import granularity_ms
from edgebroker.storage.log.partition import PartitionLog
from tests.kit.clock import ManualClock
from tests.kit.storage import StoreHarness, encode, store_settings

RIGHT_MS = EARLIEST_WALL_MS + 500 * 24 * 3600 * 1000
HOUR, YEAR = 3600.0, 365 * 24 * 3600.0
SEED = 20250117
TOPIC = "ticks"


class Machine:
    """True time, and a machine whose clocks show what they like. `wrong`: by how many ms the wall clock is; `unset`:
    it counts from 1970."""

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = ManualClock(5.0, RIGHT_MS)
        self.wrong, self.unset = 0, False
        self.ages = Ages(self.clock)

    def turn(self) -> None:
        right = int(self.clock.seconds * 1000) if self.unset else RIGHT_MS + int(self.now * 1000)
        self.clock.wall = right + self.wrong

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.clock.seconds += seconds
        self.turn()

    def reboot(self, off: float) -> None:
        self.now += off
        self.clock.seconds = 3.0
        self.restart()

    def restart(self) -> None:
        # A clock that is wrong by a plausible amount at a start is believed: nothing tells that it is.
        self.wrong = 0
        self.turn()
        self.ages = Ages(self.clock)


seconds = st.floats(0.0, 3 * YEAR) | st.floats(0.0, 5 * HOUR)
steps = st.one_of(
    st.tuples(st.just("pass"), seconds),
    st.tuples(st.just("stamp"), st.just(0.0)),
    st.tuples(st.just("restart"), st.just(0.0)),
    st.tuples(st.just("reboot"), seconds),
    st.tuples(st.just("unset"), st.just(0.0)),
    st.tuples(st.just("set"), st.just(0.0)),
    st.tuples(st.just("jump"), st.sampled_from([-YEAR, -2 * HOUR, 2 * HOUR, YEAR]) | st.floats(-YEAR, YEAR)),
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(steps, max_size=30))
def test_no_age_is_above_the_true_one(plan: list[tuple[str, float]]) -> None:
    """Jumps while it runs, restarts, reboots, a clock that is not set: what is told is what is certain."""
    machine = Machine()
    stamps: list[tuple[float, int, int]] = []
    for what, amount in plan:
        if what == "pass":
            machine.pass_time(amount)
        elif what == "stamp":
            # What is stamped while the clock is wrong by a plausible amount is wrong for the runs after this one.
            wrong, machine.wrong = machine.wrong, 0
            machine.turn()
            stamps.append((machine.now, machine.clock.wall_ms(), int(machine.clock.monotonic() * 1000)))
            machine.wrong = wrong
            machine.turn()
        elif what == "restart":
            machine.restart()
        elif what == "reboot":
            machine.reboot(amount)
        elif what in ("unset", "set"):
            machine.unset = what == "unset"
            machine.turn()
        else:
            machine.wrong = int(amount * 1000)
            machine.turn()
        for at, wall_ms, monotonic_ms in stamps:
            told, true = machine.ages.of(wall_ms, monotonic_ms), (machine.now - at) * 1000
            assert 0 <= told <= true + 2, (what, told, true)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(["pass", "stamp", "restart", "reboot"]), seconds), max_size=20))
def test_with_a_right_clock_every_age_is_known(plan: list[tuple[str, float]]) -> None:
    """But for a stamp of an earlier boot that looks like one of this run: it counts as such, which is too young."""
    machine = Machine()
    stamps: list[tuple[int, float, int, int]] = []
    run, started_ms = 0, 5000
    for what, amount in plan:
        if what == "pass":
            machine.pass_time(amount)
        elif what == "stamp":
            stamps.append((run, machine.now, machine.clock.wall_ms(), int(machine.clock.monotonic() * 1000)))
        else:
            if what == "restart":
                machine.restart()
            else:
                machine.reboot(amount)
            run, started_ms = run + 1, int(machine.clock.monotonic() * 1000)
        for stamped_by, at, wall_ms, monotonic_ms in stamps:
            told, true = machine.ages.of(wall_ms, monotonic_ms), (machine.now - at) * 1000
            assert told <= true + 2
            if stamped_by == run or not started_ms <= monotonic_ms <= machine.clock.monotonic() * 1000:
                assert told >= true - 2


@pytest.mark.parametrize("trust", ["right", "jumps", "unset"])
@pytest.mark.parametrize("ttl_seconds", [40.0, 2 * HOUR])
def test_nothing_in_a_store_expires_early(tmp_path: Path, ttl_seconds: float, trust: str) -> None:
    """Appends, pauses, restarts and crashes: each record that is skipped has outlived its time to live. With a right
    clock each that has, by more than what is between two points of the index, is skipped; of what an earlier run wrote
    only whole segments are."""
    rng = random.Random(SEED)
    ttl_ms = int(ttl_seconds * 1000)
    clock = ManualClock(100.0, RIGHT_MS if trust != "unset" else 100_000)
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=3000), clock)
    harness.create(TOPIC, message_ttl_ms=ttl_ms)
    born: list[float] = []
    written: dict[Path, int] = {}
    jumped = 0
    skipped_at_last = 0
    try:
        for _ in range(120):
            what = rng.random()
            if what < 0.5:
                count = rng.randint(1, 6)
                # Jumps are undone while something is stamped: a plausible wrong stamp cannot be told from a right one.
                clock.wall -= jumped
                harness.append(encode(*(b"." * rng.randint(10, 400) for _ in range(count))), topic=TOPIC)
                born += [clock.seconds] * count
                written[harness.logs(TOPIC)[-1]] = clock.wall
                clock.wall += jumped
            elif what < 0.85:
                clock.advance(rng.uniform(0.0, ttl_seconds / 3))
            elif what < 0.93 and trust == "jumps":
                change = int(rng.choice((-YEAR, -2 * HOUR, 2 * HOUR, YEAR)) * 1000) - jumped
                clock.wall, jumped = clock.wall + change, jumped + change
            else:
                clock.wall, jumped = clock.wall - jumped, 0
                if rng.random() < 0.5:
                    harness.crash()
                else:
                    harness.close()
                # The file system has the same clock.
                for path, wall_ms in written.items():
                    os.utime(path, ns=(wall_ms * 1_000_000, wall_ms * 1_000_000))
                harness.open()
            clock.advance(0.2)
            log = harness.log(TOPIC)
            live = harness.engine.live_from(log)
            ages = [clock.seconds - at for at in born]
            context = f"seed {SEED}, {len(born)} records, {live} skipped"
            assert log.log_start <= live <= log.durable_end
            assert all(age > ttl_seconds - 0.01 for age in ages[:live]), context
            if trust == "right":
                slack = 3 * granularity_ms(ttl_ms, 0) / 1000 + 1
                assert all(age <= ttl_seconds + slack for age in ages[_known_from(log, live) :]), context
            if live < len(ages):
                told = harness.engine.age_ms(log, live + 1)
                assert told <= ages[live] * 1000 + 10, context
            skipped_at_last = live
    finally:
        harness.close()
    assert trust == "unset" or skipped_at_last > 0


def _known_from(log: PartitionLog, live: int) -> int:
    """From where on the ages of single batches are known, when `live` is the first that is not skipped."""
    segment = log.segment_of(min(live, log.durable_end - 1))
    return segment.end_offset if segment.points is None or segment.points_from else live


def test_ages_survive_a_clean_restart(tmp_path: Path) -> None:
    """A record every ten seconds for an hour: each one's age is known to ten seconds, before and after."""
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1 << 20))
    harness.create()
    begun = harness.clock.seconds
    for number in range(360):
        harness.append(encode(b"%d" % number))
        harness.clock.advance(10.0 - (harness.clock.seconds - begun - number * 10.0))

    def ages() -> list[float]:
        return [harness.engine.age_ms(harness.log(), offset + 1) / 1000 for offset in range(0, 360, 7)]

    def true() -> list[float]:
        return [harness.clock.seconds - begun - offset * 10.0 for offset in range(0, 360, 7)]

    for _ in range(2):
        assert all(0 <= real - told <= 20.5 for told, real in zip(ages(), true(), strict=True))
        assert harness.close()
        harness.clock.advance(100.0)
        harness.open()
    harness.close()


def test_what_expired_ends_behind_a_file_that_is_gone(tmp_path: Path) -> None:
    """The records of a file that is gone are as old as what lies around them: they are passed as well."""
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000))
    harness.create(TOPIC, message_ttl_ms=60_000)
    for number in range(30):
        harness.append(encode(b"%d".ljust(100, b".") % number), topic=TOPIC)
    log = harness.log(TOPIC)
    log.file_lost(log.segments[1])
    harness.clock.advance(3600.0)
    assert harness.engine.live_from(log) == log.durable_end
    harness.close()
