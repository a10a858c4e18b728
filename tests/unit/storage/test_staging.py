"""Stage against a model that reads the whole log anew for every decision; chunks, windows, dumps, recycled memory."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebroker.common import batch, records
from edgebroker.common.batch import Reason
from edgebroker.common.errors import Code
from edgebroker.storage.log import staging
from edgebroker.storage.log.staging import Stage
from tests.kit import oracles

MAX = 1 << 20
SEED = 20240504
ENTRY = struct.Struct("<qiiII")


def one(sequence: int = -1, count: int = 1, producer: int = 7, epoch: int = 0, tag: bytes = b"", **codec: str) -> bytes:
    """A batch of `count` records; a negative sequence makes it one without a producer."""
    rows = [(tag, b"%d" % i, 1000 + i) for i in range(count)]
    producer, epoch = (-1, -1) if sequence < 0 else (producer, epoch)
    return batch.encode(rows, producer_id=producer, producer_epoch=epoch, base_sequence=sequence, **codec)  # type: ignore[arg-type]


def send(stage: Stage, *frames: bytes, inflated: bool = False) -> tuple[list[tuple[int, ...]], int, int, int]:
    """Append one run of frames, with other bytes between them: (answers, frames handled, wait, new records)."""
    data, spans = b"", b""
    for i, raw in enumerate(frames):
        data += b"\xee\xee"
        spans += struct.pack("=QII", i, len(data), len(data) + len(raw))
        data += raw
    answers, handled, wait, new = stage.append(data + b"\xee", spans, 5.0, inflated)
    assert len(answers) == 16 * handled
    return list(struct.iter_unpack("=qii", answers)), handled, wait, new


def codes(stage: Stage, *frames: bytes) -> list[int]:
    return [code for _, code, _ in send(stage, *frames)[0]]


def entries(packed: bytes) -> list[tuple[int, ...]]:
    return [entry[:4] for entry in ENTRY.iter_unpack(packed)]


def drain(stage: Stage, max_bytes: int = 1 << 30) -> bytes:
    taken = b""
    while (chunk := stage.take(max_bytes)) is not None:
        taken += bytes(chunk)
    return taken


# ---- against the model ----


class Twin:
    """A Stage and its model, fed the same; the model keeps what was taken, so that a rollback may reach into it."""

    def __init__(self, rng: random.Random, window: int) -> None:
        self.rng, self.window = rng, window
        start = rng.choice((0, 1000, 1 << 40))
        self.stage = Stage(start, 3, MAX, MAX, window)
        self.model = oracles.StageModel(start, 3, window)
        self.staged_from = start

    def frame(self) -> bytes:
        """A frame that is new, repeated, from the past, ahead, of another epoch, damaged, or anonymous."""
        rng = self.rng
        producer, count = rng.randrange(3), rng.choice((1, 1, 2, 3))
        known = self.model.recent(producer)
        kind = rng.choice(["next"] * 8 + ["repeat"] * 4 + ["gap", "epoch", "zombie", "other", "bad", "anonymous"])
        if kind == "anonymous":
            return one(count=count)
        if not known:
            return one(rng.choice((0, 0, 0, 5)), count, producer, rng.randrange(3))
        last = known[-1].header
        following = (last.base_sequence + last.count) % (1 << 31)
        if kind == "bad":
            return one(following, count, producer, last.producer_epoch)[:-1]
        if kind == "repeat":
            return rng.choice([s for s in self.model.log if s.header.producer_id == producer][-self.window - 2 :]).raw
        if kind in ("epoch", "zombie"):
            epoch = max(0, last.producer_epoch + (1 if kind == "epoch" else -1))
            return one(rng.choice((0, 0, following)), count, producer, epoch)
        if kind in ("gap", "other"):
            return one(
                rng.choice((following + 1, max(0, following - 1), 0)), count, producer, last.producer_epoch, b"?"
            )
        run = b""
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            run += one(following, count, producer, last.producer_epoch)
            following = (following + count) % (1 << 31)
        return run

    def step(self) -> None:
        rng, stage, model = self.rng, self.stage, self.model
        choice = rng.random()
        if choice < 0.7:
            snapshot = model.copy()
            frames = []
            for _ in range(rng.choice((1, 1, 2, 5))):
                frames.append(self.frame())
                model.append(frames[-1:])
            self.model = model = snapshot
            answers, wait, new = model.append(frames)
            assert send(stage, *frames) == (answers, len(frames), wait, new)
        elif choice < 0.85:
            self.take(rng.choice((1, 200, 500, 1 << 30)))
        elif choice < 0.92 and model.log:
            point = rng.choice([*[s.offset for s in model.log if s.offset < self.staged_from][-4:], self.staged_from])
            if model.undoes_little(point):
                stage.rollback(point, stage.epoch)
                model.rollback(point)
                self.staged_from = point
                assert (stage.pending_bytes, stage.take(1)) == (0, None)
        else:
            self.check_dump()
        assert (stage.next_offset, stage.epoch) == (model.next_offset, model.epoch)
        ids = {s.header.producer_id for s in model.log} - {-1}
        assert stage.producer_count == len(ids)

    def take(self, max_bytes: int) -> None:
        chunk = self.stage.take(max_bytes)
        staged = [s for s in self.model.log if s.offset >= self.staged_from]
        want: list[oracles.Sent] = []
        for sent in staged:
            if want and sum(len(w.raw) for w in want) + len(sent.raw) > max_bytes:
                break
            want.append(sent)
        if chunk is None:
            assert not staged
            return
        assert bytes(chunk) == b"".join(w.raw for w in want)
        assert (len(chunk), chunk.first_offset) == (sum(len(w.raw) for w in want), self.staged_from)
        self.staged_from = want[-1].offset + want[-1].header.count
        assert chunk.next_offset == self.staged_from
        assert self.stage.pending_bytes == sum(len(s.raw) for s in staged[len(want) :])

    def expected_dump(self, below: int) -> dict[int, tuple[int, list[tuple[int, ...]]]]:
        found = {}
        for producer in {s.header.producer_id for s in self.model.log} - {-1}:
            known = self.model.recent(producer, below)
            rows = [(s.offset, s.header.base_sequence, s.header.count, s.header.crc) for s in known]
            if rows:
                found[producer] = (known[-1].header.producer_epoch, rows)
        return found

    def check_dump(self) -> None:
        """What is dumped is what the log says; a Stage that loads it, or replays the log, dumps the same."""
        for below in (self.model.next_offset, self.staged_from):
            dumped = self.stage.dump(below)
            assert {d[0]: (d[1], entries(d[3])) for d in dumped} == self.expected_dump(below)
        loaded = Stage(self.model.next_offset, 3, MAX, MAX, self.window)
        loaded.load(self.stage.dump(self.model.next_offset))
        replayed = Stage(self.model.next_offset, 3, MAX, MAX, self.window)
        raw = b"".join(s.raw for s in self.model.log)
        assert replayed.replay(raw + b"\x00torn", 1.0) == len(raw)
        for other in (loaded, replayed):
            dumped = other.dump(self.model.next_offset)
            assert {d[0]: (d[1], entries(d[3])) for d in dumped} == self.expected_dump(1 << 62)
            probe = self.frame()
            assert send(other, probe)[0] == self.model.copy().append([probe])[0]


@pytest.mark.parametrize("window", [1, 2, 5, 20])
@given(seed=st.integers(0, 1 << 32))
@settings(derandomize=True, deadline=None, max_examples=100, database=None)
def test_random_sequences_equal_the_model(window: int, seed: int) -> None:
    twin = Twin(random.Random(seed), window)
    for _ in range(60):
        twin.step()
    twin.check_dump()


def test_dumped_entries_have_no_stray_bytes() -> None:
    stage = Stage(0, 0, MAX, MAX, 20)
    codes(stage, *(one(i) for i in range(12)))
    assert [entry[4] for entry in ENTRY.iter_unpack(stage.dump(12)[0][3])] == [0] * 12


def test_frames_are_taken_whole_or_not_at_all() -> None:
    """The second batch of a frame is refused: the first must not be stored, for the producer will send both again."""
    stage = Stage(0, 0, MAX, MAX, 5)
    assert send(stage, one() + one(3)) == ([(-1, Code.OUT_OF_ORDER, 0)], 1, 0, 0)
    assert (stage.next_offset, stage.pending_bytes, stage.take(1)) == (0, 0, None)
    assert send(stage, one(0) + one(1) + one(5), one(0)) == ([(-1, Code.OUT_OF_ORDER, 0), (0, 0, 0)], 2, 1, 1)


def test_a_rollback_of_more_than_the_window_lets_the_producer_send_again() -> None:
    """Batches 2 to 9 were staged but not stored; the window of five holds none of the stored ones any more."""
    stage = Stage(0, 0, MAX, MAX, 5)
    sent = [one(i) for i in range(10)]
    assert codes(stage, *sent) == [0] * 10
    stage.rollback(2, stage.epoch)
    assert codes(stage, one(3)) == [Code.OUT_OF_ORDER]
    assert send(stage, *sent[2:])[0] == [(i, 0, 0) for i in range(2, 10)]


def test_a_rollback_of_a_new_epoch_returns_to_the_old_one() -> None:
    stage = Stage(0, 0, MAX, MAX, 5)
    assert codes(stage, one(0), one(1), one(0, epoch=1)) == [0, 0, 0]
    stage.rollback(2, stage.epoch)
    assert send(stage, one(1), one(2), one(0, epoch=1))[0] == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]


# ---- runs, codecs, limits ----


def test_numbers_and_epoch_are_written_and_the_rest_is_kept() -> None:
    stage = Stage(41, 6, MAX, MAX, 5)
    frames = [one(count=2), one(0, 3), one() + one(3, 1)]
    assert send(stage, *frames) == ([(41, 0, 0), (43, 0, 0), (46, 0, 0)], 3, 48, 7)
    chunk = stage.take(1 << 30)
    assert chunk is not None and memoryview(chunk).readonly and chunk.address
    raw = bytes(chunk)
    assert [r.offset for r in batch.decode(raw)] == list(range(41, 48))
    assert oracles.scan(raw, 41, 0, 6).good_end == len(raw) == len(chunk)
    assert raw[:8] + raw[16 : len(frames[0])] == struct.pack(">q", 41) + frames[0][16:]
    with pytest.raises(TypeError, match="read-only"):
        memoryview(chunk)[0] = 1


def test_a_refused_frame_does_not_stop_the_run() -> None:
    stage = Stage(0, 0, MAX, 400, 5)
    bad = bytearray(one())
    bad[-1] ^= 1
    answers, handled, wait, new = send(
        stage, one(), bytes(bad), b"", bytes(70), one(count=2), batch.encode([(None, bytes(500), 0)])
    )
    assert answers == [
        (0, 0, 0),
        (-1, Code.INVALID_BATCH, Reason.BAD_CRC),
        (-1, Code.INVALID_BATCH, Reason.TRUNCATED),
        (-1, Code.INVALID_BATCH, Reason.ZEROES),
        (1, 0, 0),
        (-1, Code.TOO_LARGE, Reason.TOO_LARGE),
    ]
    assert (handled, wait, new) == (6, 3, 3)
    assert send(stage) == ([], 0, 0, 0)


@pytest.mark.parametrize("codec", ["gzip", "lz4", "zstd"])
def test_a_compressed_frame_stops_the_run(codec: str) -> None:
    stage = Stage(0, 0, MAX, MAX, 5)
    packed = one(codec=codec, count=3)
    assert send(stage, one(), one() + packed, one()) == ([(0, 0, 0)], 1, 1, 1)
    assert send(stage, packed) == ([], 0, 0, 0)
    assert stage.next_offset == 1
    assert send(stage, one() + packed, one(), inflated=True) == ([(1, 0, 0), (5, 0, 0)], 2, 6, 5)
    damaged = packed[:-1] + bytes([packed[-1] ^ 1])
    assert send(stage, damaged, packed) == ([(-1, Code.INVALID_BATCH, Reason.BAD_CRC)], 1, 0, 0)


def test_spans_outside_of_the_buffer() -> None:
    stage = Stage(0, 0, MAX, MAX, 5)
    raw = one()
    for span in ((0, len(raw) + 1), (5, 4), (len(raw) + 1, len(raw) + 1)):
        with pytest.raises(ValueError, match="span"):
            stage.append(raw, struct.pack("=QII", 0, *span), 0.0)
    assert (stage.next_offset, stage.pending_bytes) == (0, 0)


def test_codes_are_those_of_the_table() -> None:
    stage = Stage(0, 0, 300, MAX, 5)
    snappy = bytearray(one())
    snappy[22] = 2
    big = batch.encode([(None, bytes(400), 0)])
    found = codes(stage, one(0), one(2), one(0, epoch=1), one(1), bytes(snappy), big, b"?" * 80)
    want = [
        Code.OK,
        Code.OUT_OF_ORDER,
        Code.OK,
        Code.FENCED,
        Code.UNSUPPORTED_CODEC,
        Code.TOO_LARGE,
        Code.INVALID_BATCH,
    ]
    assert found == want


def test_a_duplicate_waits_for_its_first_copy() -> None:
    stage = Stage(10, 0, MAX, MAX, 5)
    send(stage, one(0, 2), one(2, 3))
    assert send(stage, one(0, 2)) == ([(10, 0, 0)], 1, 12, 0)
    assert send(stage, one(0, 2) + one(2, 3) + one(5)) == ([(10, 0, 0)], 1, 16, 1)
    assert codes(stage, one(0, 2, tag=b"x"), one(0, 1), one(2, 2)) == [Code.OUT_OF_ORDER] * 3


def test_sequences_wrap() -> None:
    stage = Stage(0, 0, MAX, MAX, 5)
    top = (1 << 31) - 2
    before = records.restamp(one(top - 1), 0, 0)
    assert stage.append_numbered(before, 0.0) == (len(before), 0)
    frames = [one(top, 3), one(1, 2), one(3, 1)]
    assert codes(stage, *frames) == [0, 0, 0]
    assert send(stage, *frames)[0] == [(1, 0, 0), (4, 0, 0), (6, 0, 0)]


def test_expire_forgets_idle_producers() -> None:
    stage = Stage(0, 0, MAX, MAX, 5)
    for now, producer in ((1.0, 1), (2.0, 2), (3.0, 3)):
        raw = one(0, producer=producer)
        stage.append(raw, struct.pack("=QII", 0, 0, len(raw)), now)
    assert (stage.expire(2.0), stage.producer_count, stage.expire(3.0), stage.producer_count) == (1, 2, 1, 1)
    assert codes(stage, one(1, producer=2), one(1, producer=3)) == [Code.OUT_OF_ORDER, 0]


# ---- numbered batches, recovery ----


def test_append_numbered() -> None:
    first, second, third = (records.restamp(one(i, 2), 50 + i, 4 + i // 4) for i in (0, 2, 4))
    stage = Stage(50, 4, MAX, MAX, 5)
    assert stage.append_numbered(first + second[:-1], 1.0) == (len(first), Reason.TRUNCATED)
    assert (stage.next_offset, stage.epoch) == (52, 4)
    assert stage.append_numbered(first, 1.0) == (0, Reason.BAD_OFFSET)
    assert stage.append_numbered(third, 1.0) == (0, Reason.BAD_OFFSET)
    assert stage.append_numbered(records.restamp(second, -1, 3), 1.0) == (0, Reason.BAD_EPOCH)
    assert stage.append_numbered(second[:-1] + b"?", 1.0) == (0, Reason.BAD_CRC)
    assert stage.append_numbered(second + third, 1.0) == (len(second + third), 0)
    assert (stage.next_offset, stage.epoch, stage.append_numbered(b"", 1.0)) == (56, 5, (0, 0))
    assert drain(stage) == first + second + third
    assert send(stage, one(2, 2), one(6))[0] == [(52, 0, 0), (56, 0, 0)]


@pytest.mark.parametrize("way", ["replay", "numbered"])
@pytest.mark.parametrize("epoch", [2, 3])
def test_a_log_in_which_a_producer_began_anew(way: str, epoch: int) -> None:
    """It expired and came back with sequence 0, perhaps with an older epoch: the end of the log is what counts."""
    raw, parts = (
        b"",
        [one(0, epoch=3), one(1, epoch=3), one(2, epoch=3), one(0, 2, epoch=epoch), one(2, 2, epoch=epoch)],
    )
    for part, offset in zip(parts, (0, 1, 2, 3, 5), strict=True):
        raw += records.restamp(part, offset, 0)
    stage = Stage(0, 0, MAX, MAX, 9)
    if way == "replay":
        assert stage.replay(raw, 0.0) == len(raw)
        stage.resume(7, 0)
    else:
        assert stage.append_numbered(raw, 0.0) == (len(raw), 0)
    assert send(stage, *parts[3:], one(4, epoch=epoch))[0] == [(3, 0, 0), (5, 0, 0), (7, 0, 0)]


def test_resume() -> None:
    stage = Stage(5, 1, MAX, MAX, 5)
    send(stage, one())
    with pytest.raises(ValueError, match="staged"):
        stage.resume(9, 2)
    drain(stage)
    stage.resume(9, 2)
    assert send(stage, one())[0] == [(9, 0, 0)]
    assert batch.read_header(drain(stage)).epoch == 2


# ---- memory ----


def test_chunks_outlive_the_stage_and_the_recycled_memory() -> None:
    rng = random.Random(SEED)
    stage, kept, expected = Stage(0, 0, MAX, MAX, 5), [], []
    for turn in range(200):
        raw = batch.encode([(None, rng.randbytes(rng.choice((10, 3000, 90_000))), turn)])
        send(stage, raw)
        if turn % 3 == 2:
            size = rng.choice((1, 5000, 1 << 30))
            while (chunk := stage.take(size)) is not None:
                kept.append((chunk, bytes(chunk)))
                expected.append(bytes(chunk))
        if kept and rng.random() < 0.5:
            chunk, copy = kept.pop(rng.randrange(len(kept)))
            assert bytes(chunk) == copy, f"seed {SEED} turn {turn}"
    expected.append(drain(stage))
    del stage
    assert all(bytes(chunk) == copy for chunk, copy in kept)
    found = batch.decode(b"".join(expected))
    assert [(r.offset, r.timestamp) for r in found] == [(i, i) for i in range(200)]
    del kept, chunk
    assert staging.trim() > 0
    assert staging.trim() == 0


def test_a_view_keeps_the_chunk_alive() -> None:
    stage = Stage(0, 0, MAX, MAX, 5)
    send(stage, one())
    view = memoryview(stage.take(1))
    copy = bytes(view)
    for _ in range(20):
        send(stage, one(count=3))
        stage.take(1 << 20)
    assert bytes(view) == copy


def test_producers_that_are_invented_are_forgotten_in_turn() -> None:
    """The one heard of longest ago goes first; who goes on publishing is known."""
    stage, most = Stage(0, 3, MAX, MAX, 5), staging.MOST_PRODUCERS
    assert codes(stage, one(0, producer=1), one(0, producer=2)) == [Code.OK, Code.OK]
    for producer in range(3, most + 50):
        assert codes(stage, one(0, producer=producer)) == [Code.OK]
        if producer % 50 == 0:
            assert codes(stage, one(producer // 50, producer=1)) == [Code.OK], producer
    assert stage.producer_count == most
    assert codes(stage, one(1, producer=2)) == [Code.OUT_OF_ORDER], "it was not heard of"
    assert codes(stage, one((most + 49) // 50, producer=1)) == [Code.OK]
