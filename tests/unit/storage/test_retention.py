"""What is removed, when producers must wait, and that both end by themselves."""

from __future__ import annotations

import pytest

from edgebroker.common.outcome import Outcome
from edgebroker.storage import files
from edgebroker.storage.upkeep.budget import RESUME_BYTES, Budget, watermarks
from tests.kit.storage import Start


def test_retention_by_bytes(start: Start) -> None:
    harness = start(segment_bytes=1000, retention_bytes=2500)
    values = harness.fill(50)
    harness.tick_until(lambda: harness.log().size_bytes < 3500)
    start_at = harness.log().log_start
    assert start_at == harness.bases()[0] > 0
    assert harness.log().size_bytes >= 2500, "more went than had to"
    assert harness.values() == values[start_at:]
    assert [int(path.stem) for path in harness.logs()] == harness.bases()
    assert {int(path.stem) for path in harness.directory().glob("*.index")} <= set(harness.bases())
    harness.restart()
    assert harness.values() == values[start_at:]


def test_retention_by_age_stands_while_the_clock_is_wrong(start: Start) -> None:
    harness = start(segment_bytes=1000, retention_ms=3_600_000)
    harness.fill(12)
    bases = harness.bases()
    harness.tick(1800.0)
    assert harness.bases() == bases
    harness.clock.wall += 48 * 3600 * 1000
    for _ in range(5):
        harness.tick()
    assert harness.bases() == bases and "jumped" in str(harness.store.status().clock)
    harness.clock.wall -= 72 * 3600 * 1000
    harness.tick()
    assert harness.bases() == bases
    harness.clock.wall += 24 * 3600 * 1000
    harness.tick(1801.0)
    harness.tick_until(lambda: harness.bases() == [bases[-1]])
    assert harness.store.status().clock == "plausible"
    assert harness.log().log_start == bases[-1]


@pytest.mark.parametrize("lost", ["nothing", "meta.db", "meta.db and indexes"])
def test_retention_by_age_goes_on_after_a_restart(start: Start, lost: str) -> None:
    harness = start(segment_bytes=1000, retention_ms=3_600_000)
    values = harness.fill(12)
    harness.tick()
    harness.crash()
    if lost != "nothing":
        for path in harness.path.glob("meta.db*"):
            path.unlink()
    if "indexes" in lost:
        for path in harness.directory().glob("*.index"):
            path.unlink()
    harness.open()
    last = harness.bases()[-1]
    assert harness.values() == values
    harness.tick()
    assert harness.log().log_start == 0, "removed too early"
    harness.clock.wall = max(segment.sealed_ms for segment in harness.segments())
    harness.restart()
    harness.tick(3601.0)
    harness.tick_until(lambda: harness.log().log_start == last)
    assert harness.values() == values[last:]


def test_a_full_budget_refuses_and_resumes_by_itself(start: Start) -> None:
    harness = start(segment_bytes=1000, max_bytes=5000)
    harness.fill(40)
    harness.tick_until(harness.store.refusal)
    refusal = harness.store.refusal()
    assert refusal is not None and refusal[0] == Outcome.DISK_FULL and "max_bytes" in refusal[1]
    assert "disk_full" in harness.store.problems()
    assert harness.log().log_start == 0, "no live group: nothing goes early"
    assert len(harness.values()) == 40
    harness.listener.floor = 12
    harness.tick_until(lambda: harness.bases()[0] == 10)
    harness.tick()
    assert harness.bases()[0] == 10, "what a group has not passed stays"
    harness.listener.floor = 40
    harness.tick_until(lambda: harness.store.refusal() is None)
    assert harness.log().size_bytes < 5000
    harness.fill(1)


def test_little_free_space_removes_only_what_groups_passed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = start(segment_bytes=1000, soft_free_bytes=1 << 20)
    harness.fill(20)
    monkeypatch.setattr(files, "free_space", lambda path: ((1 << 20) - 1, 1 << 30))
    harness.listener.floor = 20
    harness.tick_until(lambda: harness.bases()[0] == 5)
    monkeypatch.setattr(files, "free_space", lambda path: (1 << 21, 1 << 30))
    for _ in range(4):
        harness.tick()
    assert harness.bases()[0] <= 10, "a segment made space enough"
    assert harness.store.refusal() is None


def test_watermarks_have_a_share_and_a_floor() -> None:
    assert watermarks(-1, -1, 1 << 40) == ((1 << 40) // 20, (1 << 40) // 50)
    assert watermarks(-1, -1, 1 << 30) == (512 << 20, 128 << 20)
    assert watermarks(7, 0, 1 << 40) == (7, 0)
    budget = Budget(max_bytes=0, soft_free=0, hard_free=200 << 20)
    for free, full in ((200, False), (199, True), (250, True), (264, False), (263, False), (199, True)):
        budget.measured(free << 20, 1 << 40, 0)
        assert bool(budget.full) == full, free
    assert RESUME_BYTES == 64 << 20
