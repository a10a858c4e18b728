"""Cold reads: what the reader thread answers when the disk is slow, refuses, or lies; and the background check."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.common.outcome import Outcome
from edgebroker.network.io.loop import Loop
from edgebroker.storage import files
from edgebroker.storage.log.reader import ColdReader
from edgebroker.storage.types import ColdRead, CorruptRange, NeedsDisk
from tests.kit.clock import ManualClock
from tests.kit.storage import StoreHarness, encode, store_settings, turn_until


class Disk:
    """A reader on a loop whose jobs wait until a test lets them go."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.loop = Loop(self.clock)
        self.reader = ColdReader(self.loop, 5.0)
        self.gates: list[threading.Event] = []
        self.answers: list[ColdRead] = []

    def submit(self, *, blocked: bool, data: bytes = b"x", timeout: float | None = None) -> None:
        """A job that is blocked has begun when this returns: one that is late already would be passed over."""
        gate, begun = threading.Event(), threading.Event()
        self.gates.append(gate)
        if not blocked:
            gate.set()

        def job() -> ColdRead:
            begun.set()
            assert gate.wait(10.0)
            return ColdRead(data=data)

        self.reader.submit(job, self.answers.append, timeout)
        assert not blocked or begun.wait(10.0)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.loop.turn(0.0)

    def close(self) -> None:
        for gate in self.gates:
            gate.set()
        assert self.reader.stop(5.0)
        self.loop.close()


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.close()


def test_a_slow_disk_is_answered_once_and_recovers(disk: Disk) -> None:
    disk.submit(blocked=True, data=b"late")
    disk.advance(4.9)
    assert (disk.answers, disk.reader.stalled) == ([], False)
    disk.advance(0.2)
    (answer,) = disk.answers
    assert answer.timed_out and "5 s" in answer.error and not answer.data
    assert (disk.reader.stalled, disk.reader.timeouts) == (True, 1)
    disk.gates[0].set()
    turn_until(disk.loop, lambda: not disk.reader.stalled)
    assert len(disk.answers) == 1, "the late answer was given as well"
    disk.submit(blocked=False, data=b"again")
    turn_until(disk.loop, lambda: len(disk.answers) == 2)
    assert disk.answers[1] == ColdRead(data=b"again")


def test_jobs_behind_a_stuck_one_time_out_too(disk: Disk) -> None:
    disk.submit(blocked=True)
    disk.advance(3.0)
    disk.submit(blocked=False)
    disk.advance(2.5)
    assert [answer.timed_out for answer in disk.answers] == [True]
    disk.advance(3.0)
    assert [answer.timed_out for answer in disk.answers] == [True, True]
    assert disk.reader.timeouts == 2
    disk.gates[0].set()
    turn_until(disk.loop, lambda: not disk.reader.stalled)
    assert len(disk.answers) == 2


def test_an_answer_in_time_stops_its_timer(disk: Disk) -> None:
    disk.submit(blocked=False, data=b"now")
    turn_until(disk.loop, lambda: disk.answers)
    disk.advance(60.0)
    assert disk.answers == [ColdRead(data=b"now")]
    assert (disk.reader.stalled, disk.reader.timeouts, disk.reader.jobs) == (False, 0, 1)


def test_a_job_may_have_its_own_timeout(disk: Disk) -> None:
    disk.submit(blocked=True, timeout=60.0)
    disk.advance(59.0)
    assert not disk.answers
    disk.advance(2.0)
    assert disk.answers[0].timed_out


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "a.log"), ValueError("too short")])
def test_what_a_job_raises_is_an_answer(disk: Disk, error: Exception) -> None:
    def job() -> ColdRead:
        raise error

    disk.reader.submit(job, disk.answers.append)
    turn_until(disk.loop, lambda: disk.answers)
    assert disk.answers[0].error and not disk.answers[0].timed_out
    assert not disk.reader.stalled


# ---- through the store ----


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[StoreHarness]:
    """A restarted store: everything below the checkpoint is unverified, the background check waits for its tick."""
    harness = StoreHarness(tmp_path / "data", store_settings(scrub=1))
    harness.create()
    harness.fill(20)
    harness.tick()
    harness.close()
    harness.open(store_settings(read_timeout=5.0, scrub=1))
    yield harness
    harness.close()


@pytest.mark.parametrize(
    ("number", "outcome", "why"),
    [
        (errno.EIO, Outcome.DAMAGED, "input/output error"),
        (errno.EMFILE, Outcome.OVERLOADED, "this node has too few file descriptors at the moment"),
        (errno.ENOMEM, Outcome.OVERLOADED, "this node has too little memory at the moment"),
    ],
)
def test_a_device_error_is_told_and_nothing_is_noted(
    cold: StoreHarness, monkeypatch: pytest.MonkeyPatch, number: int, outcome: Outcome, why: str
) -> None:
    """EIO is no hole yet, and a shortage is none at all: the same read works when it is over."""
    with monkeypatch.context() as patch:

        def refuse(fd: int, length: int, position: int) -> bytes:
            raise OSError(number, os.strerror(number))

        patch.setattr(files, "read_at", refuse)
        answer = cold.read_cold(2)
        assert (answer.error, answer.refusal) == (why, outcome) and answer.corrupt is None and not answer.data
    assert cold.log().corrupt_ranges == [] and cold.store.problems() == {}
    assert len(cold.values()) == 20


def test_a_stalled_disk_shows_and_goes(cold: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, really, answers = threading.Event(), files.read_at, []

    def wait(fd: int, length: int, position: int) -> bytes:
        assert gate.wait(10.0)
        return really(fd, length, position)

    monkeypatch.setattr(files, "read_at", wait)
    cold.store.read_cold(cold.log(), 0, 100, answers.append)
    cold.clock.advance(6.0)
    cold.until(lambda: answers)
    assert answers[0].timed_out
    assert "disk_stalled" in cold.store.problems()
    gate.set()
    cold.until(lambda: "disk_stalled" not in cold.store.problems())
    assert len(answers) == 1
    assert len(cold.values()) == 20


def test_every_offset_can_be_asked_for(cold: StoreHarness) -> None:
    for offset in range(cold.bases()[1], cold.log().active.base):
        assert isinstance(cold.log().find(offset, 100, 1), NeedsDisk)
        answer = cold.read_cold(offset, 1)
        assert (answer.first_offset, answer.error, answer.corrupt) == (offset, "", None)
        assert answer.next_offset > offset


def test_an_index_made_while_the_segment_is_sealed_is_not_the_whole(cold: StoreHarness) -> None:
    """A cold read of the active segment is under way while it grows and is sealed: what was added stays found."""
    answers: list[ColdRead] = []
    segment = cold.log().active
    segment.points, segment.points_from = bytearray(), segment.size  # as after a crash
    cold.store.read_cold(cold.log(), 16, 100, answers.append)
    view_size = segment.size
    new = [b"%d" % number for number in range(20)]
    data = [encode(value, timestamp=9000) for value in new]
    finished = threading.Event()
    cold.store._reader._worker.submit(finished.set)
    assert finished.wait(5.0)  # the answer is made, the loop has not seen it
    posted, cold.loop._posted = cold.loop._posted, type(cold.loop._posted)()
    cold.append(data[0])
    cold.append(*data[1:])
    active = cold.log().active.base
    assert active > 20, "the segment was not sealed meanwhile"
    cold.loop._posted.extend(posted)
    cold.until(lambda: answers)
    sealed = cold.log().segment_of(16)
    assert answers[0].index is not None and answers[0].index.size == view_size < sealed.size
    assert sealed.max_timestamp == 9000
    assert cold.offset_at(9000) == 20
    assert cold.values(20) == new
    assert len(cold.values()) == 40


# ---- the background check ----


def crashed(tmp_path: Path) -> StoreHarness:
    harness = StoreHarness(tmp_path / "data", store_settings())
    harness.create()
    harness.fill(20)
    harness.tick()
    harness.crash()
    return harness


def test_after_a_crash_everything_is_verified(tmp_path: Path) -> None:
    harness = crashed(tmp_path)
    harness.open()
    assert all(segment.unverified_end for segment in harness.segments())
    harness.tick_until(lambda: not any(segment.unverified_end for segment in harness.segments()))
    assert harness.store.status().verified_bytes == sum(segment.size for segment in harness.segments())
    assert harness.log().corrupt_ranges == []
    harness.values()
    assert not isinstance(harness.log().find(0, 100, 1), NeedsDisk)
    harness.close()


def test_the_check_names_damage_that_nobody_has_read(tmp_path: Path) -> None:
    harness = crashed(tmp_path)
    log = harness.logs()[1]
    raw = bytearray(log.read_bytes())
    raw[80] ^= 1
    log.write_bytes(raw)
    harness.open()
    assert "damaged" not in harness.store.problems()
    first = int(log.stem)
    harness.tick_until(lambda: "damaged" in harness.store.problems())
    assert harness.log().corrupt_ranges == [CorruptRange(first, first + 1)]
    harness.tick()
    harness.crash()
    harness.open()
    assert harness.log().corrupt_ranges == [CorruptRange(first, first + 1)], "it was forgotten"
    assert harness.close(), "the damage is noted: the stop lacks nothing"
    harness.open()
    assert harness.log().corrupt_ranges == [CorruptRange(first, first + 1)], "it was forgotten"
    harness.close()


def test_the_check_keeps_to_its_rate(tmp_path: Path) -> None:
    """At one byte a second the first window is all that is read for hours."""
    harness = crashed(tmp_path)
    harness.open(store_settings(scrub=1))
    harness.tick()
    harness.tick()
    done = harness.store.status().verified_bytes
    assert done == harness.segments()[0].size
    harness.close()


def test_bytes_behind_the_end_of_a_sealed_segment_are_not_served(tmp_path: Path) -> None:
    """A failed file keeps what was written after its last sync; the log went on in the next one."""
    harness = crashed(tmp_path)
    log = harness.logs()[1]
    with log.open("ab") as file:
        file.write(harness.logs()[2].read_bytes().replace(b"-", b"!"))
    for name in ("*.index", "meta.db*"):
        for path in (*harness.directory().glob(name), *harness.path.glob(name)):
            path.unlink()
    harness.open()
    expected = harness.values()
    harness.tick_until(lambda: not any(segment.unverified_end for segment in harness.segments()))
    for _ in range(2):
        assert harness.values() == expected
        assert len(expected) == 20 and not any(b"!" in value for value in expected if value)
    harness.close()
