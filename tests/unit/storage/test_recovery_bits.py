"""Every bit and every byte: a small segment damaged in each way there is, below and above what is vouched for."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from edgebroker.common import batch
from edgebroker.storage import files
from edgebroker.storage.identity import read_identity
from edgebroker.storage.log import recovery, segscan
from edgebroker.storage.log.index import INTERVAL_BYTES, read_index
from edgebroker.storage.log.reader import SegmentView, read_cold, verify_segment
from edgebroker.storage.log.recovery import RecoveredLog
from edgebroker.storage.log.segment import NO_TIMESTAMP, segment_path
from edgebroker.storage.log.walk import walk_mapped, walk_start
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import Checkpoint, CorruptRange, Identity
from tests.kit.clock import ManualClock
from tests.kit.storage import TOPIC, StoreHarness, encode, store_settings

SEED = 20240611
MAX_BATCH = 1 << 20
VALUES = [b"a", b"bc", b"def", b"ghij"]


class Kept(NamedTuple):
    start: int
    data: bytes


class Shelf(Quarantine):
    """Remembers what it is given; writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), ManualClock())
        self.kept: list[Kept] = []

    def keep(self, name: str, segment: Path, fd: int, start: int, end: int, reason: str) -> int:
        assert reason
        self.kept.append(Kept(start, files.read_at(fd, end - start, start)))
        return end - start


@dataclass
class Small:
    """A log of four one-record batches in segment 0, an empty segment behind it, and their bytes."""

    directory: Path
    identity: Identity
    raw: bytes
    edges: list[int]  # where each batch begins, and the end

    @property
    def path(self) -> Path:
        return segment_path(self.directory, 0)

    def batch_of(self, position: int) -> int:
        return max(rank for rank, edge in enumerate(self.edges[:-1]) if edge <= position)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    path = tmp_path_factory.mktemp("small") / "data"
    harness = StoreHarness(path, store_settings(segment_bytes=1 << 16))
    harness.create()
    for value in VALUES:
        harness.append(encode(value))
    harness.close()
    directory = path / "topics" / TOPIC / "0"
    raw = segment_path(directory, 0).read_bytes()
    edges = [0]
    while edges[-1] < len(raw):
        edges.append(edges[-1] + batch.read_header(raw, edges[-1]).size)
    assert len(edges) == len(VALUES) + 1
    return Small(directory, read_identity(directory), raw, edges)


def flipped(raw: bytes, bit: int) -> bytes:
    damaged = bytearray(raw)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def view_of(small: Small, points: bytes | None) -> SegmentView:
    return SegmentView(
        name="t/0",
        path=small.path,
        log_id=small.identity.log_id_bytes,
        base=0,
        end_offset=len(VALUES),
        size=len(small.raw),
        base_chain=small.identity.chain,
        sealed=True,
        sealed_ms=1,
        points=points,
        max_batch=MAX_BATCH,
        epoch=1,
        max_epoch=1,
    )


def read_all(view: SegmentView, shelf: Shelf) -> tuple[dict[int, bytes | None], list[CorruptRange]]:
    """Ask for every offset of its own: a reader may begin anywhere."""
    found: dict[int, bytes | None] = {}
    corrupt_ranges = []
    for offset in range(view.base, view.end_offset):
        answer = read_cold(view, offset, 1, shelf)
        files.close(answer.fd)
        if answer.corrupt is not None:
            assert answer.corrupt.first <= offset < answer.corrupt.next and not answer.data
            corrupt_ranges.append(answer.corrupt)
        else:
            assert answer.first_offset <= offset < answer.next_offset
            rows = batch.decode(answer.data, first=offset, last=offset)
            found[offset] = rows[0].value
    return found, corrupt_ranges


def test_every_bit_below_the_checkpoint_costs_one_batch(small: Small) -> None:
    """Sealed, or below the checkpoint: one hole, its bytes kept, the rest readable."""
    fd = files.open_log(small.path)
    healthy, _ = verify_segment(view_of(small, b""), fd)
    files.close(fd)
    try:
        for bit in range(len(small.raw) * 8):
            small.path.write_bytes(flipped(small.raw, bit))
            hit = small.batch_of(bit // 8)
            for points in (healthy.points, None):
                shelf, view = Shelf(), view_of(small, points)
                found, corrupt_ranges = read_all(view, shelf)
                assert corrupt_ranges == [CorruptRange(hit, hit + 1)], (bit, points)
                assert found == {offset: v for offset, v in enumerate(VALUES) if offset != hit}
                start, end = small.edges[hit], small.edges[hit + 1]
                assert shelf.kept == [Kept(start, flipped(small.raw, bit)[start:end])]
            fd = files.open_log(small.path)
            try:
                assert verify_segment(view, fd)[1] == [CorruptRange(hit, hit + 1)]
                checked = walk_mapped(fd, view.size, walk_start(0, 0, epoch=1), base_offset=0, max_batch=MAX_BATCH,
                                      max_epoch=1, limit_offset=len(VALUES))  # fmt: skip
                assert checked.position == small.edges[hit], bit
            finally:
                files.close(fd)
    finally:
        small.path.write_bytes(small.raw)


def recover(small: Small, checkpoint_at: int | None, watermark: int = -1) -> tuple[RecoveredLog, Shelf]:
    """Recover with a checkpoint in front of batch `checkpoint_at` (None: no checkpoint)."""
    checkpoint = None
    if checkpoint_at is not None:
        chain = walk_chain(small, checkpoint_at)
        position = small.edges[checkpoint_at]
        checkpoint = Checkpoint(small.identity.log_id, 0, position, checkpoint_at, chain, 1, NO_TIMESTAMP)
    shelf = Shelf()
    recovered = recovery.Recovery(
        small.directory, small.identity, shelf, max_batch=MAX_BATCH, name="t/0"
    ).run(checkpoint, watermark)  # fmt: skip
    for segment in recovered.segments:
        segment.close()
    return recovered, shelf


def walk_chain(small: Small, rank: int) -> int:
    return segscan.scan(small.raw[: small.edges[rank]], 0, small.identity.chain, 0, MAX_BATCH)[3]


def restore(small: Small) -> None:
    for path in small.directory.glob("*.log"):
        if path != small.path:
            path.unlink()
    small.path.write_bytes(small.raw)


def test_every_bit_above_the_checkpoint_is_cut_and_kept(small: Small) -> None:
    """Nobody was told about these bytes: they are taken for torn, whole batches before them stay."""
    try:
        for bit in range(small.edges[2] * 8, len(small.raw) * 8):
            damaged = flipped(small.raw, bit)
            small.path.write_bytes(damaged)
            hit = small.batch_of(bit // 8)
            recovered, shelf = recover(small, 2)
            assert (recovered.next_offset, recovered.corrupt_ranges) == (hit, []), bit
            assert recovered.torn_bytes == len(small.raw) - small.edges[hit]
            assert shelf.kept == [Kept(small.edges[hit], damaged[small.edges[hit] :])]
            assert small.path.read_bytes() == small.raw[: small.edges[hit]]
            assert recovered.chain == walk_chain(small, hit)
    finally:
        restore(small)


def test_every_bit_that_a_group_certifies_is_a_corrupt_range(small: Small) -> None:
    """A group had read all four: what is damaged is a corrupt range, and new batches begin behind it."""
    try:
        for bit in range(small.edges[1] * 8, len(small.raw) * 8):
            damaged = flipped(small.raw, bit)
            small.path.write_bytes(damaged)
            hit = small.batch_of(bit // 8)
            recovered, shelf = recover(small, 1, watermark=len(VALUES))
            assert (recovered.next_offset, recovered.corrupt_ranges) == (len(VALUES), [CorruptRange(hit, hit + 1)]), bit
            assert shelf.kept == [Kept(small.edges[hit], damaged[small.edges[hit] : small.edges[hit + 1]])]
            assert small.path.read_bytes() == damaged, "bytes that were acknowledged are never changed"
            restore(small)
    finally:
        restore(small)


@pytest.mark.parametrize("checkpoint_at", [None, 0, 2])
def test_the_tail_cut_at_every_byte(small: Small, checkpoint_at: int | None) -> None:
    """What is whole stays; what was begun is kept aside; the next start finds nothing more to do."""
    lowest = small.edges[checkpoint_at or 0]
    try:
        for length in range(lowest, len(small.raw) + 1):
            small.path.write_bytes(small.raw[:length])
            whole = max(edge for edge in small.edges if edge <= length)
            for torn in (length - whole, 0):
                recovered, shelf = recover(small, checkpoint_at)
                assert recovered.next_offset == small.edges.index(whole)
                assert (recovered.corrupt_ranges, recovered.torn_bytes) == ([], torn)
                assert shelf.kept == ([Kept(whole, small.raw[whole:length])] if torn else [])
                assert small.path.read_bytes() == small.raw[:whole]
    finally:
        restore(small)


def test_the_tail_cut_at_every_byte_below_the_checkpoint(small: Small) -> None:
    """The whole log was vouched for: what is missing is a corrupt range, and no offset is given twice."""
    try:
        for length in range(len(small.raw)):
            small.path.write_bytes(small.raw[:length])
            have = max(rank for rank, edge in enumerate(small.edges) if edge <= length)
            recovered, shelf = recover(small, 4)
            assert (recovered.next_offset, recovered.corrupt_ranges) == (4, [CorruptRange(have, 4)])
            assert b"".join(kept.data for kept in shelf.kept) == small.raw[small.edges[have] : length]
            kept_at = small.path if have else small.path.with_suffix(".torn")
            assert kept_at.read_bytes() == small.raw[:length]
            restore(small)
    finally:
        restore(small)


@pytest.mark.parametrize("batch_rank", range(20))
def test_random_bits_through_the_whole_store(batch_rank: int, tmp_path: Path) -> None:
    """The same with everything in place: index, background check, quarantine files, another start."""
    rng = random.Random(SEED + batch_rank)
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=400))
    harness.create()
    values = harness.fill(20, size=20)
    assert len(harness.bases()) > 4
    harness.tick()
    harness.crash()
    path = max(p for p in harness.directory().glob("*.log") if int(p.stem) <= batch_rank)
    raw, position = path.read_bytes(), 0
    while batch.read_header(raw, position).base_offset != batch_rank:
        position += batch.read_header(raw, position).size
    size = batch.read_header(raw, position).size
    bit = rng.randrange(position * 8, (position + size) * 8)
    path.write_bytes(flipped(raw, bit))
    for _ in range(2):
        harness.open()
        if rng.random() < 0.5:
            harness.tick(2.0)
        found, corrupt_ranges = harness.read()
        assert corrupt_ranges == [CorruptRange(batch_rank, batch_rank + 1)], bit
        assert [message.value for message in found] == values[:batch_rank] + values[batch_rank + 1 :]
        kept = [p.read_bytes() for p in (harness.path / "quarantine").glob("*.bytes")]
        assert kept == [flipped(raw, bit)[position : position + size]]
        assert harness.store.problems()["damaged"] == f"{TOPIC}/0"
        harness.crash()


def test_a_damaged_index_is_never_believed(tmp_path: Path) -> None:
    """Any single wrong bit, any length: the index is refused, and the answers are those of the log."""
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=2 * INTERVAL_BYTES))
    harness.create()
    values = harness.fill(60, size=2000)
    harness.crash()
    log = harness.logs()[0]
    index, size = log.with_suffix(".index"), log.stat().st_size
    good = index.read_bytes()
    log_id = read_identity(harness.directory()).log_id_bytes
    healthy = read_index(log, log_id, 0, size)
    assert healthy is not None
    assert read_index(log, log_id, 0, size + 1) is None
    assert read_index(log, bytes(16), 0, size) is None
    for damaged in [flipped(good, bit) for bit in range(len(good) * 8)] + [good[:n] for n in range(len(good))]:
        index.write_bytes(damaged)
        assert read_index(log, log_id, 0, size) is None
    for damaged in (
        b"",
        good[:-40],
        flipped(good, 300),
        good * 2,
        harness.logs()[1].with_suffix(".index").read_bytes(),
    ):
        index.write_bytes(damaged)
        (harness.path / "meta.db").unlink(missing_ok=True)
        harness.open()
        assert harness.values() == values
        again = read_index(log, log_id, 0, size)
        assert again is not None, "it was not made again"
        assert again[:7] == healthy[:7]
        harness.close()
