"""No wall clock is believed for ever: whatever it shows, nothing goes by age before its time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebroker.common.runtime.clock import EARLIEST_WALL_MS, is_plausible
from edgebroker.storage.upkeep.clock_guard import CONFIRMED_SECONDS, SETTLE_SECONDS
from tests.kit.clock import START_WALL_MS, ManualClock
from tests.kit.storage import StoreHarness, encode, store_settings

HOUR_MS = 3_600_000
KEEP_MS = 24 * HOUR_MS
YEAR_MS = 365 * 24 * HOUR_MS
RIGHT = START_WALL_MS


@pytest.mark.parametrize(
    ("stamp", "after", "expected"),
    [
        (RIGHT, 0, True),
        (RIGHT + 1, 0, False),
        (EARLIEST_WALL_MS, 0, True),
        (EARLIEST_WALL_MS - 1, 0, False),
        (0, 0, False),
        (RIGHT - 5, RIGHT - 5, True),
        (RIGHT - 5, RIGHT - 4, False),
    ],
)
def test_what_is_evidence(stamp: int, after: int, expected: bool) -> None:
    assert is_plausible(stamp, RIGHT, after) is expected


def store(path: Path, wall_ms: int, monotonic: float = 1000.0) -> StoreHarness:
    """A node with retention of a day, started while its clock shows this."""
    clock = ManualClock(monotonic, wall_ms)
    return StoreHarness(path, store_settings(segment_bytes=1000, retention_ms=KEEP_MS), clock)


def filled(path: Path, wall_ms: int) -> StoreHarness:
    found = store(path, wall_ms)
    found.create()
    found.fill(30)
    found.tick()
    return found


def let_pass(harness: StoreHarness, seconds: float) -> None:
    harness.tick(seconds)
    for _ in range(40):
        harness.tick(61.0 / 40)


@pytest.mark.parametrize("wall_ms", [0, 978_307_200_000, EARLIEST_WALL_MS - YEAR_MS])
def test_sealed_by_a_clock_that_was_never_set(tmp_path: Path, wall_ms: int) -> None:
    """It is right at the next start: what was sealed a moment ago stays its time, and goes then."""
    harness = filled(tmp_path / "data", wall_ms)
    assert "was not set" in str(harness.store.status().clock)
    let_pass(harness, 3 * KEEP_MS / 1000)
    assert harness.log().log_start == 0
    harness.close()
    harness = store(tmp_path / "data", RIGHT)
    let_pass(harness, SETTLE_SECONDS)
    assert harness.log().log_start == 0
    harness.close()
    harness = store(tmp_path / "data", RIGHT + KEEP_MS - HOUR_MS)
    let_pass(harness, SETTLE_SECONDS)
    assert harness.log().log_start == 0
    let_pass(harness, 3600)
    assert harness.log().log_start > 0
    harness.close()


def test_set_while_the_node_runs(tmp_path: Path) -> None:
    harness = filled(tmp_path / "data", 978_307_200_000)
    harness.clock.wall = RIGHT
    let_pass(harness, 2 * KEEP_MS / 1000)
    assert harness.log().log_start == 0, "what jumped is not believed in this run"
    harness.close()


def test_sealed_by_a_clock_that_was_ahead(tmp_path: Path) -> None:
    """Ten years: it is not kept for ten years, nor removed at once."""
    harness = filled(tmp_path / "data", RIGHT + 10 * YEAR_MS)
    harness.close()
    harness = store(tmp_path / "data", RIGHT)
    let_pass(harness, CONFIRMED_SECONDS - 3600)
    assert "before the newest sealed" in str(harness.store.status().clock)
    let_pass(harness, 3600)
    assert harness.store.status().clock == "plausible"
    assert harness.log().log_start == 0
    let_pass(harness, KEEP_MS / 1000 - 3600)
    assert harness.log().log_start == 0
    let_pass(harness, 3600)
    assert harness.log().log_start > 0
    harness.close()


def test_a_clock_that_is_ahead_at_the_start(tmp_path: Path) -> None:
    """It is set right within minutes, as by NTP: nothing has gone until then."""
    harness = filled(tmp_path / "data", RIGHT)
    harness.close()
    harness = store(tmp_path / "data", RIGHT + 10 * YEAR_MS)
    let_pass(harness, SETTLE_SECONDS / 2)
    harness.clock.wall -= 10 * YEAR_MS
    let_pass(harness, KEEP_MS / 1000 - 3600)
    assert harness.log().log_start == 0
    harness.close()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([-RIGHT, EARLIEST_WALL_MS - YEAR_MS - RIGHT, -HOUR_MS, 0, 0, HOUR_MS]),
            st.booleans(),
            st.sampled_from([0.0, 60.0, SETTLE_SECONDS, 4 * 3600.0]),
        ),
        min_size=2,
        max_size=6,
    )
)
def test_nothing_goes_early(tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, bool, float]]) -> None:
    """Runs whose clocks are not set at all, an hour wrong, right, or set right meanwhile: a segment whose true
    age is well below a day is there."""
    path = tmp_path_factory.mktemp("clocks") / "data"
    true_ms, sealed_ms = RIGHT, -1
    for wrong_ms, set_right, seconds in runs:
        harness = store(path, max(0, true_ms + wrong_ms))
        if sealed_ms < 0:
            harness.create()
            harness.fill(30)
            harness.tick()
            sealed_ms = true_ms
        harness.append(encode(b"one more"))
        let_pass(harness, seconds)
        if set_right:
            harness.clock.wall = true_ms + int((harness.clock.seconds - 1000.0) * 1000)
        let_pass(harness, 0.0)
        true_ms += int((harness.clock.seconds - 1000.0) * 1000) + 60_000
        if true_ms - sealed_ms < KEEP_MS - HOUR_MS - 60_000:
            assert harness.log().log_start == 0
        harness.close()
