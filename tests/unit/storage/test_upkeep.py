"""The small parts of housekeeping: which clock is believed, which files stay open, what is noted without an append."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from edgebroker.common.runtime.clock import EARLIEST_WALL_MS
from edgebroker.storage.upkeep.clock_guard import JUMP_MS, SETTLE_SECONDS, ClockGuard
from tests.kit.clock import START_WALL_MS, ManualClock
from tests.kit.storage import StoreHarness, store_settings


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[StoreHarness]:
    harness = StoreHarness(tmp_path / "data", store_settings())
    harness.create()
    yield harness
    harness.close()


@pytest.mark.parametrize(
    ("wall_ms", "seconds", "sealed", "why"),
    [
        (0, 0, 0, ""),
        (5000, 5, 0, ""),
        (JUMP_MS, 0, 0, ""),
        (-JUMP_MS, 0, 0, ""),
        (JUMP_MS + 1, 0, 0, "jumped by 24 h"),
        (-JUMP_MS - 1, 0, 0, "jumped by -24 h"),
        (0, JUMP_MS / 1000 + 1, 0, "jumped by -24 h"),
        (EARLIEST_WALL_MS - START_WALL_MS, 0, 0, "jumped by"),
        (EARLIEST_WALL_MS - START_WALL_MS - 700_000, 0, 0, "was not set"),
        (0, 0, 1, "before the newest sealed segment"),
        (1, 0, 1, ""),
    ],
)
def test_which_clock_is_believed(wall_ms: int, seconds: float, sealed: int, why: str) -> None:
    clock = ManualClock()
    guard = ClockGuard(clock)
    assert guard.wall_ms() == 0, "it was started a moment ago"
    clock.advance(SETTLE_SECONDS)
    start = clock.wall
    clock.wall += wall_ms
    clock.seconds += seconds
    guard.check(start + sealed if sealed else 0)
    assert (why in guard.implausible, bool(guard.implausible)) == (True, bool(why))
    assert guard.wall_ms() == (0 if why else clock.wall)
    clock.wall = start + int(seconds * 1000) + sealed
    guard.check(start + sealed if sealed else 0)
    assert (guard.implausible, guard.wall_ms(), guard.seen_ms()) == ("", clock.wall, clock.wall)


def test_a_sealed_segment_is_noted_without_another_append(harness: StoreHarness) -> None:
    harness.fill(12)
    harness.stored()
    harness.clock.advance(1.0)
    for _ in range(50):
        harness.loop.turn(0.005)
        harness.clock.advance(0.01)
    harness.quiesce()
    with closing(sqlite3.connect(harness.path / "meta.db")) as connection:
        rows = connection.execute("SELECT base FROM segments ORDER BY base").fetchall()
    assert [base for (base,) in rows] == harness.bases()[:-1] != []
