"""Splitting frames: the extension and a slow twin on the same bytes, cut at every place."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebroker.common import answers as packed
from edgebroker.common.errors import Code
from edgebroker.network.wire import frames, framing
from edgebroker.network.wire.frames import FrameType
from tests.kit.raw_client import write_publish

SEED = 20240503
MAX = 1000
SPAN = struct.Struct("=QII")
PLACED = struct.Struct("=qii")
quick = settings(derandomize=True, deadline=None, max_examples=300, database=None)
Split = tuple[list[tuple[Any, ...]], int, int, tuple[int, int, int]]


def prefix_of(body: bytes) -> bytes | None:
    length = 2 + body[1] + 4 if len(body) > 1 else 0
    return body[:length] if length and len(body) >= length else None


def split_slowly(data: bytes, start: int, max_frame: int) -> Split:
    """framing.split, from the drawing of the header in cext/frames.h."""
    events: list[tuple[Any, ...]] = []
    run: bytes | None = None
    position = start
    while position < len(data):
        head = data[position : position + 16]
        if len(head) < 16:
            return events, position, 1, (0, 0, 0)
        length, kind, flags, reserved, correlation = struct.unpack(">IBBHQ", head)
        size = length + 4
        if length < 12:
            return events, position, 2, (kind, correlation, size)
        if not 1 <= kind <= 8 or flags or reserved:
            return events, position, 3, (kind, correlation, size)
        if size > max_frame:
            return events, position, 4, (kind, correlation, size)
        if position + size > len(data):
            return events, position, 1, (0, 0, size)
        body = data[position + 16 : position + size]
        if kind == 2:
            prefix = prefix_of(body)
            if prefix is None:
                return events, position, 5, (kind, correlation, size)
            span = SPAN.pack(correlation, position + 16 + len(prefix), position + size)
            if prefix == run:
                events[-1] = (*events[-1][:3], events[-1][3] + span)
            else:
                events.append((2, position + 16, position + 16 + len(prefix), span))
            run = prefix
        else:
            events.append((kind, correlation, position + 16, position + size))
            run = None
        position += size
    return events, position, 0, (0, 0, 0)


def some_slowly(data: bytes, start: int, max_frame: int, most: int) -> Split:
    """The same, at most so many events: what comes behind them is not looked at."""
    whole = split_slowly(data, start, max_frame)
    if len(whole[0]) < most:
        return whole
    last = whole[0][most - 1]
    end = last[3] if isinstance(last[3], int) else list(SPAN.iter_unpack(last[3]))[-1][2]
    return whole[0][:most], end, 0, (0, 0, 0)


def same(data: bytes, start: int = 0, max_frame: int = MAX) -> Split:
    found = framing.split(data, start, max_frame)
    assert found == split_slowly(data, start, max_frame)
    return found  # type: ignore[return-value]


def publish(correlation: int, topic: str = "t", partition: int = 0, level: int = 2, payload: bytes = b"batch") -> bytes:
    return write_publish(correlation, frames.publish_prefix(level, topic, partition), payload)


MIX = b"".join(
    [
        frames.frame(FrameType.CONNECT, 1, b"body"),
        publish(2), publish(3), publish(4, payload=b""),
        publish(5, partition=1), publish(6, level=1), publish(7, topic="tt"), publish(8, topic="tt"),
        frames.frame(FrameType.HEARTBEAT, 9),
        publish(10, topic="tt"), publish(2**64 - 1, topic=""),
        frames.frame(FrameType.READY, 11, bytes(100)),
    ]
)  # fmt: skip


def test_whole() -> None:
    events, end, reason, rest = same(MIX)
    assert (end, reason, rest) == (len(MIX), 0, (0, 0, 0))
    assert [event[0] for event in events] == [1, 2, 2, 2, 2, 6, 2, 2, 8]
    runs = [[correlation for correlation, _, _ in SPAN.iter_unpack(event[3])] for event in events if event[0] == 2]
    assert runs == [[2, 3, 4], [5], [6], [7, 8], [10], [2**64 - 1]]


def test_every_truncation() -> None:
    for cut in range(len(MIX) + 1):
        _, end, reason, (_, _, size) = same(MIX[:cut])
        assert end <= cut
        assert reason == (0 if end == cut else 1)
        if size:
            assert same(MIX[: end + size])[1] == end + size


def test_byte_by_byte() -> None:
    """Fed one more byte each time, from where it stopped: the same frames, each as soon as it is whole."""
    position, found = 0, []
    for cut in range(1, len(MIX) + 1):
        events, position, _, _ = same(MIX[:cut], position)
        assert len(events) <= 1
        found += events
    assert position == len(MIX)
    flat = []
    for event in same(MIX)[0]:
        spans = list(SPAN.iter_unpack(event[3])) if event[0] == 2 else [None]
        flat += [(event[0], *span) if span else event for span in spans]
    assert [(e[0], *SPAN.unpack(e[3])) if e[0] == 2 else e for e in found] == flat


@pytest.mark.parametrize("start", [0, 1, 20, len(MIX), len(MIX) + 5])
def test_a_start_inside(start: int) -> None:
    same(MIX, start)
    same(b"x" * start + MIX, start)


def test_trailing_bytes_are_left() -> None:
    for tail in (b"\0", bytes(3), MIX[:15], MIX[:17]):
        assert same(MIX + tail)[1] == len(MIX)


@pytest.mark.parametrize("length", [*range(14), MAX - 5, MAX - 4, MAX - 3, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("kind", [1, 2, 8])
def test_lengths(length: int, kind: int) -> None:
    data = MIX + struct.pack(">IBBHQ", length, kind, 0, 0, 77) + bytes(2000)
    _, end, reason, head = same(data)
    if length < 12:
        assert (end, reason) == (len(MIX), 2)
    elif length + 4 > MAX:
        assert (end, reason, head) == (len(MIX), 4, (kind, 77, length + 4))


@pytest.mark.parametrize("kind", [0, *range(9, 256, 13), 255])
def test_unknown_types(kind: int) -> None:
    assert same(MIX + struct.pack(">IBBHQ", 12, kind, 0, 0, 7))[1:3] == (len(MIX), 3)


@pytest.mark.parametrize(("flags", "reserved"), [(1, 0), (0x80, 0), (0, 1), (0, 0x100)])
def test_flags_must_be_zero(flags: int, reserved: int) -> None:
    assert same(MIX + struct.pack(">IBBHQ", 12, 6, flags, reserved, 7))[1:3] == (len(MIX), 3)


@pytest.mark.parametrize("body", [b"", b"\2", b"\2\0", b"\2\0\0\0\0", b"\2\5abcd", b"\2\xff" + bytes(258)])
def test_a_publish_shorter_than_its_prefix(body: bytes) -> None:
    bad = frames.frame(FrameType.PUBLISH, 7, body)
    assert same(publish(1) + bad)[1:3] == (len(publish(1)), 5)
    assert same(publish(1) + publish(2) + bad + publish(3))[2] == 5


@quick
@given(st.binary(max_size=200), st.integers(0, 220), st.integers(0, 300))
def test_garbage(data: bytes, start: int, max_frame: int) -> None:
    same(data, start, max_frame)


def test_damaged_frames() -> None:
    rng = random.Random(SEED)
    for _ in range(3000):
        data = bytearray(MIX)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 2, 5, 12, 255, rng.randrange(256)])
        same(bytes(data), rng.choice([0, 0, 20]), rng.choice([16, 50, 200, MAX]))


def test_runs_of_random_frames() -> None:
    rng = random.Random(SEED)
    for _ in range(300):
        parts = [
            publish(
                rng.randrange(2**64),
                rng.choice(["", "a", "b"]),
                rng.randrange(2),
                rng.randrange(3),
                bytes(rng.randrange(9)),
            )
            if rng.random() < 0.8
            else frames.frame(FrameType(rng.choice([1, 3, 5, 6])), rng.randrange(99), bytes(rng.randrange(20)))
            for _ in range(rng.randrange(30))
        ]
        data = b"".join(parts)
        assert same(data)[1] == len(data)
        cut = data[: rng.randrange(len(data) + 1)]
        same(cut)
        for most in (1, 2, 5, 30):
            assert framing.split(cut, 0, MAX, most) == some_slowly(cut, 0, MAX, most)


def answers_of(data: bytes) -> list[tuple[int, Code, int, str]]:
    found = []
    for kind, correlation, start, end in framing.split(data, 0, 1 << 20)[0]:
        assert kind == FrameType.ACK
        answer = frames.read_ack(memoryview(data)[start : int(str(end))])
        assert isinstance(answer, frames.Answer)
        found.append((correlation, answer.code, answer.offset, answer.message))
    return found


EXPLANATIONS = [b"", b"one", "zwei ü".encode(), b"x" * 500]


def test_answers_round_trip() -> None:
    rng = random.Random(SEED)
    for count in (0, 1, 2, 50):
        rows = [
            (rng.randrange(2**64), rng.choice(list(Code)), rng.randrange(-1, 2**62), rng.randrange(4))
            for _ in range(count)
        ]
        spans = b"".join(SPAN.pack(correlation, 0, 0) for correlation, _, _, _ in rows)
        answers = b"".join(PLACED.pack(offset, code, reason) for _, code, offset, reason in rows)
        expected = [(c, code, offset, EXPLANATIONS[reason].decode()) for c, code, offset, reason in rows]
        assert answers_of(framing.encode_answers(spans, answers, EXPLANATIONS)) == expected
        assert packed.failed(answers) == sum(code != Code.OK for _, code, _, _ in rows)
        refused = packed.refuse(answers, Code.DISK_FULL)
        for (_, code, offset, reason), (new_offset, new_code, new_reason) in zip(
            rows, PLACED.iter_unpack(refused), strict=True
        ):
            if code is Code.OK:
                assert (new_offset, new_code) == (-1, Code.DISK_FULL)
            else:
                assert (new_offset, new_code, new_reason) == (offset, code, reason)


def test_the_same_answer_as_python_writes() -> None:
    answers = PLACED.pack(42, Code.OK, 0) + PLACED.pack(-1, Code.INVALID_BATCH, 2)
    encoded = framing.encode_answers(SPAN.pack(7, 0, 0) + SPAN.pack(8, 0, 0), answers, EXPLANATIONS)
    assert encoded == frames.write_answer(7, Code.OK, "", 42) + frames.write_answer(8, Code.INVALID_BATCH, "zwei ü")


def test_uniform_answers() -> None:
    assert packed.uniform(0, 3) == b""
    assert list(PLACED.iter_unpack(packed.uniform(3, Code.NOT_ORIGIN))) == [(-1, 2, 0)] * 3


def test_more_answers_than_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="more answers"):
        framing.encode_answers(SPAN.pack(1, 0, 0), packed.uniform(2, 0), EXPLANATIONS)
    with pytest.raises(IndexError):
        framing.encode_answers(SPAN.pack(1, 0, 0), PLACED.pack(0, 4, 9), EXPLANATIONS)
