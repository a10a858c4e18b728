"""What a device cannot read is damage: it is noted after a few tries, apart from what is around it, and repaired."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebroker.cli.main import main
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import TopicSettings
from edgebroker.storage import files
from edgebroker.storage.files import BLOCK_BYTES, salvage_at
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.upkeep import scrub
from tests.kit.storage import TOPIC, StoreHarness, encode, store_settings


class BadDevice:
    """Reads that touch one block of a file fail; a file that takes its place lies somewhere else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inode, self.block = 0, -1
        self._pread, self._preadv = os.pread, os.preadv
        monkeypatch.setattr(os, "pread", self.pread)
        monkeypatch.setattr(os, "preadv", self.preadv)

    def _touches(self, fd: int, length: int, position: int) -> bool:
        begin = self.block * BLOCK_BYTES
        same = self.block >= 0 and os.fstat(fd).st_ino == self.inode
        return same and position < begin + BLOCK_BYTES and position + length > begin

    def pread(self, fd: int, length: int, position: int) -> bytes:
        if self._touches(fd, length, position):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._pread(fd, length, position)

    def preadv(self, fd: int, buffers: Any, position: int, flags: int = 0) -> int:
        if self._touches(fd, sum(len(one) for one in buffers), position):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._preadv(fd, buffers, position, flags)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[StoreHarness]:
    """Segments of some 20 KB with ten records each; nothing of the sealed ones is in memory."""
    found = StoreHarness(tmp_path / "data", store_settings(segment_bytes=20_000))
    found.create()
    for number in range(60):
        found.append(encode(b"%03d" % number * 600))
        found.durable()
    yield found
    found.close()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> BadDevice:
    return BadDevice(monkeypatch)


def sealed(harness: StoreHarness, rank: int = 1) -> Segment:
    """A sealed segment, as after a start: read through the reader thread only."""
    segment: Segment = harness.log().segments[rank]
    segment.unverified_end = segment.size
    return segment


def try_to_read(harness: StoreHarness, segment: Segment, times: int = 12) -> Any:
    """As a reader does that comes from the beginning of a segment: once a second, until it is at damage."""
    offset = segment.base
    for _ in range(times):
        result = harness.read_cold(offset)
        harness.clock.advance(1.0)
        if result.corrupt is not None or result.next_offset >= segment.end_offset:
            break
        offset = max(offset, result.next_offset)
    return result


def test_a_block_that_cannot_be_read_becomes_damage(harness: StoreHarness, device: BadDevice) -> None:
    """Its records and no others; only after a few tries, and it stays known."""
    segment = sealed(harness)
    device.inode, device.block = segment.path.stat().st_ino, 2
    first = segment.base
    assert harness.read_cold(first).error
    assert not harness.log().corrupt_ranges
    try_to_read(harness, segment)
    (corrupt,) = harness.log().corrupt_ranges
    assert first < corrupt.first < corrupt.next < segment.end_offset
    assert corrupt.next - corrupt.first <= 4
    assert harness.store.problems()["damaged"] == harness.log().name
    messages, ranges = harness.read()
    assert ranges == [corrupt]
    assert len(messages) == 60 - (corrupt.next - corrupt.first)
    device.block = -1
    harness.tick()
    harness.restart()
    assert harness.log().corrupt_ranges == [corrupt]


def test_a_block_that_can_be_read_again_is_no_damage(harness: StoreHarness, device: BadDevice) -> None:
    segment = sealed(harness)
    device.inode, device.block = segment.path.stat().st_ino, 2
    assert try_to_read(harness, segment, 2).error
    device.block = -1
    assert not try_to_read(harness, segment).error
    assert not harness.log().corrupt_ranges


def test_it_is_repaired_from_good_bytes(harness: StoreHarness, device: BadDevice) -> None:
    segment = sealed(harness)
    whole = segment.path.read_bytes()
    device.inode, device.block = segment.path.stat().st_ino, 2
    try_to_read(harness, segment)
    first, following = harness.log().to_repair()
    answers: list[tuple[int, str]] = []
    good = b"".join(numbered_as_stored(whole, number) for number in range(first, following))
    harness.store.repair(harness.log(), good, lambda end, error: answers.append((end, error)))
    harness.tick_until(lambda: answers)
    assert answers == [(following, "")]
    assert len(harness.values()) == 60
    assert segment.path.read_bytes() == whole


def numbered_as_stored(segment: bytes, offset: int) -> bytes:
    """The batch of one record with an offset, as it lies in a file."""
    at = 0
    while int.from_bytes(segment[at : at + 8], "big") != offset:
        at += 12 + int.from_bytes(segment[at + 8 : at + 12], "big")
    return segment[at : at + 12 + int.from_bytes(segment[at + 8 : at + 12], "big")]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_file_that_is_gone_while_the_node_runs(harness: StoreHarness, rank: int) -> None:
    """As the next start would find it; the other records are served."""
    segment = sealed(harness, rank)
    if segment.fd >= 0:
        files.close(segment.fd)
        segment.fd = -1
    segment.path.unlink()
    try_to_read(harness, segment)
    assert harness.log().corrupt_ranges == [(segment.base, segment.end_offset)]
    messages, ranges = harness.read()
    assert [tuple(one) for one in ranges] == [(segment.base, segment.end_offset)]
    assert len(messages) == 60 - (segment.end_offset - segment.base)
    harness.restart()
    assert harness.log().corrupt_ranges == [(segment.base, segment.end_offset)]


def test_the_check_in_the_background_finds_it_too(harness: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mapping, whose page cannot be read either."""
    path = harness.log().segments[1].path

    def refuse(fd: int, *arguments: Any, **options: Any) -> Any:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *arguments, **options)

    real = scrub.walk_mapped
    monkeypatch.setattr(scrub, "walk_mapped", refuse)
    device = BadDevice(monkeypatch)
    harness.crash()
    device.inode, device.block = path.stat().st_ino, 1
    harness.open()
    for _ in range(200):
        if harness.log().corrupt_ranges:
            break
        harness.loop.turn(0.005)
        harness.clock.advance(0.3)
    (corrupt,) = harness.log().corrupt_ranges
    assert corrupt.next - corrupt.first <= 4


@given(st.sets(st.integers(0, 9)), st.integers(0, 39_000), st.integers(1, 40_000))
def test_salvaged_bytes(bad: set[int], position: int, length: int) -> None:
    """Every block that can be read is there, the others are filled."""
    data = os.urandom(40_000)
    length = min(length, len(data) - position)

    def read(fd: int, length: int, position: int) -> bytes:
        touched = range(position // BLOCK_BYTES, (position + length - 1) // BLOCK_BYTES + 1)
        if bad & set(touched):
            raise OSError(errno.EIO, "bad")
        return data[position : position + length]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "read_at", read)
        found = salvage_at(-1, length, position)
    wanted = bytearray(data)
    for block in bad:
        end = min((block + 1) * BLOCK_BYTES, len(data))
        wanted[block * BLOCK_BYTES : end] = b"\xff" * (end - block * BLOCK_BYTES)
    assert found == wanted[position : position + length]


def test_what_is_over_in_a_moment_is_no_damage() -> None:
    def read(fd: int, length: int, position: int) -> bytes:
        raise OSError(errno.ENOMEM, "short of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "read_at", read)
        with pytest.raises(OSError, match="short of memory"):
            salvage_at(-1, 10_000, 0)


# ---- the tool that looks at a data directory ----


@pytest.mark.parametrize(
    ("rank", "first", "says"), [(0, 0, "their file"), (2, 20, "their file"), (-1, 50, "behind it")]
)
def test_missing_files_are_found(
    harness: StoreHarness, capsys: pytest.CaptureFixture[str], rank: int, first: int, says: str
) -> None:
    harness.close()
    assert main(["log", "verify", str(harness.path)]) == 0
    assert "0 damaged ranges" in capsys.readouterr().out
    paths = harness.logs()
    path = paths.pop(rank)
    path.rename(path.with_name(f"{path.stem} (copy).log"))
    assert main(["log", "verify", str(harness.path)]) == 4
    told = capsys.readouterr().out
    assert (f"from offset {first} on the records up to" in told, says in told, "1 damaged range" in told) == (True,) * 3
    assert main(["log", "verify", str(paths[0])]) == 0, "one file alone"


def test_accepted_damage_is_over(harness: StoreHarness, device: BadDevice) -> None:
    """on_damage = skip: it is still known, and no problem."""
    segment = sealed(harness)
    device.inode, device.block = segment.path.stat().st_ino, 2
    try_to_read(harness, segment)
    assert set(harness.store.problems()) == {"damaged"}
    done: list[Outcome] = []
    harness.store.alter_topic(TOPIC, TopicSettings(on_damage="skip"), lambda *told: done.append(told[0]))
    harness.until(lambda: done)
    assert harness.store.problems() == {}
    assert harness.log().corrupt_ranges
    assert harness.close()
