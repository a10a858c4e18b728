"""A replica that continues behind a gap: it keeps what it had, and no crash and no damage takes that away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebroker.common import records
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import TopicSettings
from edgebroker.storage import files
from edgebroker.storage.log.aside import NEXT_NAME
from edgebroker.storage.types import UNKNOWN_CHAIN, CorruptRange, LogGap
from tests.kit.storage import StoreHarness, encode, store_settings
from tests.unit.storage.test_mirror_store import (
    answer,
    batches,
    bytes_of,
    chains,
    cut,
    fail_from,
    identity_of,
    mirror,
    take,
)

CHAIN = 77


def skip(harness: StoreHarness, offset: int, chain: int = CHAIN) -> Outcome:
    return answer(harness, lambda done: harness.store.skip(harness.log(), offset, chain, done))[0]


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[StoreHarness]:
    found = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000))
    mirror(found, identity_of())
    yield found
    found.close()


@pytest.mark.parametrize("again", ["running", "stopped", "crashed"])
@pytest.mark.parametrize("count", [1, 7, 12])
def test_what_was_there_stays_and_new_records_go_on(harness: StoreHarness, count: int, again: str) -> None:
    """At every fill of the last segment: the gap is exact, for readers and for the chains of both sides."""
    stored = batches(0, count)
    take(harness, *stored)
    assert skip(harness, 50) is Outcome.OK
    log = harness.log()
    assert (log.durable_end, log.staged_end, log.chain) == (50, 50, CHAIN)
    if again == "crashed":
        harness.restart()
    behind = batches(50, 15)
    take(harness, *behind[:9])
    take(harness, *behind[9:])
    if again == "stopped":
        harness.close()
        harness.open()
    log = harness.log()
    found, missing = harness.read()
    assert [message.offset for message in found] == [*range(count), *range(50, 65)]
    assert missing == [LogGap(count, 50, CHAIN)]
    assert (log.records, log.corrupt_ranges, log.log_start) == (count + 15, [], 0)
    assert bytes_of(harness) == b"".join([*stored, *behind])
    before = records.chain(b"".join(stored), identity_of().chain)
    assert chains(harness, [0, count, count + 1, 49, 50, 65]) == {
        0: identity_of().chain,
        count: before,
        50: CHAIN,
        65: records.chain(b"".join(behind), CHAIN),
    }
    assert harness.read(count + 3)[1] == [LogGap(count, 50, CHAIN)], "from within"


def test_gaps_with_nothing_between_are_one(harness: StoreHarness) -> None:
    take(harness, *batches(0, 3))
    assert [skip(harness, 10), skip(harness, 20, 5), skip(harness, 30, 6)] == [Outcome.OK] * 3
    assert harness.log().identity.gaps == [LogGap(3, 30, 6)]
    take(harness, *batches(30, 2))
    assert skip(harness, 40, 8) is Outcome.OK
    harness.restart()
    assert harness.log().identity.gaps == [LogGap(3, 30, 6), LogGap(32, 40, 8)]
    assert [message.offset for message in harness.read()[0]] == [0, 1, 2, 30, 31]
    assert len(harness.logs()) == 3


def test_whatever_step_the_power_goes_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log ends where it did, or goes on behind the gap; what it has is there, and it can go on from there."""
    for step in range(1, 40):
        harness = StoreHarness(tmp_path / f"data{step}", store_settings(segment_bytes=1000))
        mirror(harness, identity_of())
        take(harness, *batches(0, 12))
        harness.commit(4)
        with monkeypatch.context() as patch:
            fail_from(patch, step, "move", "create_log", "remove", "sync_directory", "write_new")
            outcome = skip(harness, 100)
        harness.restart()
        log = harness.log()
        assert (log.corrupt_ranges, log.durable_end in (12, 100)) == ([], True)
        assert not (log.directory / NEXT_NAME).exists()
        end = log.durable_end
        assert log.identity.gaps == ([LogGap(12, 100, CHAIN)] if end == 100 else [])
        take(harness, *batches(end, 3))
        assert [message.offset for message in harness.read()[0]] == [*range(12), *range(end, end + 3)]
        harness.close()
        if outcome is Outcome.OK:
            assert (step > 3, end) == (True, 100)
            return
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("offset", [0, 5, 12, 50, 53])
def test_truncating_around_a_gap(harness: StoreHarness, offset: int) -> None:
    take(harness, *batches(0, 12))
    skip(harness, 50)
    take(harness, *batches(50, 8))
    assert cut(harness, offset) is Outcome.OK
    for _ in range(2):
        log = harness.log()
        assert (log.durable_end, log.corrupt_ranges) == (offset, [])
        assert log.identity.gaps == ([LogGap(12, 50, CHAIN)] if offset >= 50 else [])
        harness.restart()
    take(harness, *batches(offset, 2))
    assert harness.read(offset)[1] == []


def test_retention_takes_the_gap_with_what_is_before_it(tmp_path: Path) -> None:
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000, retention_bytes=3000))
    mirror(harness, identity_of())
    take(harness, *batches(0, 5))
    skip(harness, 50)
    for number in range(60):
        take(harness, *batches(50 + number, 1))
    harness.tick(11 * 60)
    harness.until(lambda: harness.log().log_start > 50)
    assert (harness.log().identity.gaps, harness.read()[1]) == ([], [])
    harness.restart()
    assert harness.read()[1] == []
    harness.close()


def test_damage_on_either_side_is_damage_and_the_gap_stays(harness: StoreHarness) -> None:
    """The files next to a gap are lost: what they held is damaged, and nothing more."""
    take(harness, *batches(0, 12))
    skip(harness, 50)
    for offset in range(50, 70):
        take(harness, *batches(offset, 1))
    first, *_ = (path for path in harness.logs() if int(path.stem) == 50)
    before = max(path for path in harness.logs() if int(path.stem) < 50)
    behind = sorted(path for path in harness.logs() if int(path.stem) > 50)
    harness.close()
    files.remove(first)
    files.remove(before)
    harness.open()
    assert harness.read()[1] == [
        CorruptRange(int(before.stem), 12), LogGap(12, 50, CHAIN), CorruptRange(50, int(behind[0].stem)),
    ]  # fmt: skip
    assert harness.log().to_repair() == (int(before.stem), 12)
    missing = b"".join(batches(int(before.stem), 12 - int(before.stem)))
    repaired: list[tuple[int, str]] = []
    harness.store.repair(harness.log(), missing, lambda end, error: repaired.append((end, error)))
    harness.stored()
    assert repaired == [(12, "")]
    assert harness.read()[1][0] == LogGap(12, 50, CHAIN)


def test_every_file_behind_the_gap_is_gone(harness: StoreHarness) -> None:
    """A crash lost them, and nothing certifies what was in them: the log goes on behind the gap."""
    take(harness, *batches(0, 12))
    skip(harness, 50)
    harness.restart()
    harness.close()
    files.remove(harness.logs()[-1])
    harness.open()
    assert (harness.log().durable_end, harness.log().chain) == (50, CHAIN)
    take(harness, *batches(50, 1))
    assert harness.read()[1] == [LogGap(12, 50, CHAIN)]


def test_expired_records_and_times_around_a_gap(tmp_path: Path) -> None:
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000))
    mirror(harness, identity_of(settings=TopicSettings(message_ttl_ms=60_000)))
    take(harness, *(records.restamp(encode(b"old", timestamp=5), offset, 1) for offset in range(12)))
    skip(harness, 50)
    harness.clock.advance(3600.0)
    take(harness, *(records.restamp(encode(b"new", timestamp=900), offset, 1) for offset in range(50, 55)))
    assert harness.engine.live_from(harness.log()) == 50
    assert (harness.offset_at(5), harness.offset_at(6), harness.offset_at(901)) == (0, 50, 55)
    harness.close()


Step = tuple[str, int]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 12)),
        st.tuples(st.just("skip"), st.integers(1, 30)),
        st.tuples(st.just("cut"), st.integers(0, 40)),
        st.tuples(st.sampled_from(["crash", "stop"]), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_any_schedule_against_a_list(tmp_path_factory: pytest.TempPathFactory, schedule: list[Step]) -> None:
    """Taking, skipping, cutting, stopping and crashing in any order: a reader gets exactly what a plain list says."""
    harness = StoreHarness(tmp_path_factory.mktemp("gaps") / "data", store_settings(segment_bytes=1000))
    mirror(harness, identity_of())
    held: list[int] = []
    end = 0
    for what, number in schedule:
        log = harness.log()
        if what == "take":
            take(harness, *batches(end, number))
            held += range(end, end + number)
            end += number
        elif what == "skip" and held:  # an empty log is recreated instead
            assert skip(harness, end + number) is Outcome.OK
            end += number
        elif what == "cut" and held and number < len(held):
            offset = held[number]
            assert cut(harness, offset) is Outcome.OK
            held, end = held[:number], offset
        elif what == "crash":
            harness.restart()
        elif what == "stop":
            harness.close()
            harness.open()
        log = harness.log()
        found, missing = harness.read()
        assert [message.offset for message in found] == held
        assert (log.durable_end, log.corrupt_ranges) == (end, [])
        assert all(isinstance(one, LogGap) for one in missing)
        assert log.records == len(held)
        assert log.chain != UNKNOWN_CHAIN
    harness.close()
