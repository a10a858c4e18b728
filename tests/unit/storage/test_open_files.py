"""Descriptors of segments: bounded whatever the number of logs, and open while something needs them."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest

from edgebroker.common.types import AckLevel
from edgebroker.storage import files
from edgebroker.storage.commit import open_files as limits
from edgebroker.storage.commit.open_files import CACHED_INDEXES, LEAST_OPEN, OpenFiles
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.segment import Segment
from tests.kit.storage import Start, StoreHarness, encode


class OneLog:
    """What OpenFiles asks of a log."""

    def __init__(self, active: Segment | None = None, quiet: bool = True) -> None:
        self.active, self.quiet = active, quiet


def open_segments(directory: Path, count: int) -> list[Segment]:
    segments = []
    for number in range(count):
        path = directory / f"{number}.log"
        segments.append(Segment(path, number, fd=files.create_log(path)))
        segments[-1].points = b""
    return segments


def closed(segments: list[Segment]) -> list[int]:
    return [number for number, segment in enumerate(segments) if segment.fd < 0]


def test_files_and_indexes_used_least_recently_go(tmp_path: Path) -> None:
    open_files, segments = OpenFiles(32), open_segments(tmp_path, 35)
    log = cast(PartitionLog, OneLog())
    segments[0].hold()
    for segment in segments:
        open_files.index_loaded(segment)
        open_files.opened(segment, log)
        open_files.opened(segments[2], log)
    # The first is being sent: it counts, and stays.
    assert closed(segments) == [1, 3, 4]
    indexed = [segment for segment in segments if segment.points is not None]
    assert indexed == segments[-CACHED_INDEXES:] == [one for one in segments if open_files.knows(one)]
    open_files.forget(segments[-1])
    assert not open_files.knows(segments[-1])
    for segment in segments:
        segment.close()


def test_a_file_that_is_written_to_stays_open(tmp_path: Path) -> None:
    open_files, segments = OpenFiles(20), open_segments(tmp_path, 20)
    logs = [OneLog(segment, quiet=number % 2 == 1) for number, segment in enumerate(segments)]
    for segment, log in zip(segments, logs, strict=True):
        open_files.opened(segment, cast(PartitionLog, log))
    open_files.used(segments[1])
    assert open_files.room(5) == 5
    assert closed(segments) == [3, 5, 7, 9, 11]
    assert open_files.room(100) == 10
    assert closed(segments) == list(range(1, 20, 2))
    for segment in segments:
        segment.close()


def test_readers_that_do_not_go_on_leave_a_few_descriptors_for_writing(tmp_path: Path) -> None:
    open_files, segments = OpenFiles(20), open_segments(tmp_path, 20)
    logs = [OneLog(segment, quiet=number >= 3) for number, segment in enumerate(segments)]
    for segment, log in zip(segments, logs, strict=True):
        segment.hold()
        open_files.opened(segment, cast(PartitionLog, log))
    assert open_files.room(100) == LEAST_OPEN - 3
    assert closed(segments) == []
    for segment in segments:
        segment.close()


def held(harness: StoreHarness) -> int:
    """Descriptors of segment files that the process has."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # another thread has closed it
            path = os.readlink(f"/proc/self/fd/{name}")
            found += path.startswith(str(harness.path)) and path.endswith(".log")
    return found


def verified(harness: StoreHarness) -> None:
    """Nothing is verified any more: that takes a descriptor of its own, twice."""
    harness.until(lambda: not harness.store._scrub._busy)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """A store may have this many segments open."""
    monkeypatch.setattr(limits, "LEAST_OPEN", 2)
    monkeypatch.setattr("edgebroker.storage.store.most_open", lambda: 5)
    return 5


@pytest.mark.parametrize("seed", range(4))
def test_many_logs_are_written_and_read_with_few_descriptors(few: int, seed: int, start: Start) -> None:
    """Any order of writing, at any level, in any number of logs at once, between reads."""
    chance, partitions = random.Random(seed), 40
    harness = start(segment_bytes=4096)
    harness.create("many", partitions=partitions)
    wanted: dict[int, list[bytes]] = {number: [] for number in range(partitions)}
    for step in range(120):
        chosen = chance.sample(range(partitions), chance.choice([1, 1, 3, partitions]))
        for number in chosen:
            value = (b"%d-%d" % (step, number)).ljust(chance.choice([20, 900]), b".")
            level = chance.choice([AckLevel.DURABLE, AckLevel.WRITTEN, AckLevel.NONE])
            harness.stage(encode(value), level=level, topic="many", partition=number)
            wanted[number].append(value)
        if chance.random() < 0.5:
            for number in chosen:
                harness.durable("many", number)
            verified(harness)
            assert held(harness) <= few
        if chance.random() < 0.3:
            number = chance.choice(chosen)
            harness.durable("many", number)
            assert harness.values(topic="many", partition=number) == wanted[number]
        if step == 60:
            for number in range(partitions):
                harness.durable("many", number)
            harness.restart()
            assert held(harness) <= 2, "an idle log needs no descriptor, but while it is verified"
    for number in range(partitions):
        harness.durable("many", number)
        assert harness.values(topic="many", partition=number) == wanted[number]
    verified(harness)
    assert held(harness) <= few
    assert [event for event in harness.listener.events if event[0] == "failed"] == []


def test_a_log_whose_file_cannot_be_opened_answers_and_goes_on(
    few: int, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor the producer is told to try again; a file that is gone is replaced, and nothing is lost that
    was acknowledged meanwhile."""
    harness = start()
    harness.append(encode(b"before"))
    harness.restart()
    usual = files.open_log

    def none_left(path: Path, *, writable: bool = False) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(files, "open_log", none_left)
    harness.stage(encode(b"refused"))
    harness.until(lambda: any(event[0] == "failed" for event in harness.listener.events))
    assert harness.store.problems().keys() == {"descriptors"}
    monkeypatch.setattr(files, "open_log", usual)
    harness.until(lambda: harness.log().quiet)
    harness.append(encode(b"after"))
    assert harness.values() == [b"before", b"after"]
    harness.restart()
    assert harness.values() == [b"before", b"after"]

    harness.restart()
    harness.log().active.path.unlink()
    harness.append(encode(b"and again"))
    assert harness.values(2) == [b"and again"]
    harness.restart()
    assert harness.values(2) == [b"and again"]
    assert "damaged" in harness.store.problems()
