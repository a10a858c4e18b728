"""Every frame body written and read back; truncations and garbage raise RemoteProtocolError and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebroker.common.errors import Code, RemoteProtocolError
from edgebroker.common.messages import AckKind, ConsumerAck, GapReason, Holding, Wanted
from edgebroker.common.types import Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import (
    Assigned,
    Assignment,
    Connect,
    Deliver,
    Gap,
    Grants,
    Intent,
    Ready,
    Reset,
    Subscribe,
    TopicMetadata,
)

SEED = 20240503
ID = bytes(range(16))
quick = settings(derandomize=True, deadline=None, max_examples=300, database=None)
I64 = (1 << 63) - 1

CONNECT = Connect(1, 3, "till ü", b"\0token", I64, 32767, ["a", "b" * 255])
GRANTS = Grants(
    1, ID, 10_000, 30_000, 1 << 22, 1 << 22, 1 << 20, 16384, 8 << 20, 60_000, I64, 7,
    [TopicMetadata("a", Code.OK, 4, "table"), TopicMetadata("b", Code.UNKNOWN_TOPIC, 0, "stream")],
)  # fmt: skip
SUBSCRIBE = Subscribe(
    Intent.JOIN, "g", 10, 1 << 20,
    [Wanted("t", rank - 1, start, ID, -1, -rank) for rank, start in enumerate(Start)],
)  # fmt: skip
ASSIGNED = Assigned(
    "g", (1 << 32) - 1,
    [Assignment("t", rank, holding, (1 << 64) - 1, I64 - rank) for rank, holding in enumerate(Holding)],
)  # fmt: skip
AGE = (1 << 32) - 1
GAPS = [Gap(1, 2, GapReason.EXPIRED), Gap(3, 4, GapReason.DAMAGED)]
DELIVER = Deliver("t", 7, ID, 3, 5, 1 << 63, 10, 20, I64, AGE, GAPS, 0)
DELIVER_HEAD = frames.deliver_head(frames.deliver_prefix("t", 7, ID, 3), 5, 1 << 63, 10, 20, I64, AGE, GAPS, 0)
ACKS = [ConsumerAck(kind, "t", 4, 5, 1 << 63, I64) for kind in list(AckKind)[1:]]
ACKS[1] = ACKS[1]._replace(reason="why ü")
HEARTBEAT = [("t", 0, 5), ("u", 1 << 31, -1)]
RESET = Reset(ID, ID[::-1], "t", 3, 0, I64)
READY = Ready(ID, "t", 3, I64)


def body(frame: bytes) -> memoryview:
    length, kind, flags, reserved, _ = frames.HEADER.unpack_from(frame)
    assert (flags, reserved) == (0, 0)
    assert length + 4 == len(frame)
    assert 1 <= kind <= 8
    return memoryview(frame)[16:]


def read_grants(data: memoryview) -> Grants:
    answer = frames.read_ack(data)
    assert isinstance(answer, frames.Answer)
    return frames.read_grants(data, answer.extra_start)


CASES: list[tuple[str, bytes, Callable[[memoryview], Any], Any]] = [
    ("connect", frames.write_connect(1, CONNECT), frames.read_connect, CONNECT),
    ("bare connect", frames.write_connect(1, Connect(1, 0, "", b"", -1, -1, [])), frames.read_connect,
     Connect(1, 0, "", b"", -1, -1, [])),
    ("grants", frames.write_grants(2, GRANTS), read_grants, GRANTS),
    ("subscribe", frames.write_subscribe(3, SUBSCRIBE), frames.read_subscribe, SUBSCRIBE),
    *((intent.name, frames.write_subscribe(3, Subscribe(intent, "g", 0, 0, [])), frames.read_subscribe,
       Subscribe(intent, "g", 0, 0, [])) for intent in Intent),
    ("assigned", frames.write_assigned(ASSIGNED), frames.read_assigned, ASSIGNED),
    ("deliver", DELIVER_HEAD, frames.read_deliver, DELIVER),
    ("bare deliver", frames.deliver_head(frames.deliver_prefix("t", 0, ID, 1), 1, 1, 0, 0, 1, 0, [], 0),
     frames.read_deliver, Deliver("t", 0, ID, 1, 1, 1, 0, 0, 1, 0, [], 0)),
    *((f"ack {ack.kind.name}", frames.write_consumer_ack(4, ack), frames.read_ack, ack) for ack in ACKS),
    ("heartbeat", frames.write_heartbeat(HEARTBEAT), frames.read_heartbeat, HEARTBEAT),
    ("reset", frames.write_reset(5, RESET), frames.read_reset, RESET),
    ("ready", frames.write_ready(6, READY), frames.read_ready, READY),
]  # fmt: skip


@pytest.mark.parametrize(("name", "frame", "read", "expected"), CASES, ids=[case[0] for case in CASES])
def test_written_and_read_back(name: str, frame: bytes, read: Callable[[memoryview], Any], expected: Any) -> None:
    found = read(body(frame))
    if isinstance(found, Deliver):
        assert found.batches_start == len(frame) - 16
        found = found._replace(batches_start=0)
    assert found == expected


@pytest.mark.parametrize(("name", "frame", "read", "expected"), CASES, ids=[case[0] for case in CASES])
def test_every_truncation_and_trailing_byte(
    name: str, frame: bytes, read: Callable[[memoryview], Any], expected: Any
) -> None:
    whole = body(frame)
    for cut in range(len(whole)):
        with pytest.raises(RemoteProtocolError):
            read(whole[:cut])
    if read is not frames.read_deliver:  # batches follow its head
        with pytest.raises(RemoteProtocolError, match=r"longer|not as long as"):
            read(memoryview(bytes(whole) + b"\0"))


@pytest.mark.parametrize("code", Code)
def test_answers(code: Code) -> None:
    data = body(frames.write_answer(9, code, "why ü", 77))
    assert frames.read_ack(data) == frames.Answer(code, 77, "why ü", len(data))
    for cut in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            frames.read_ack(data[:cut])


def test_a_message_that_is_too_long_is_cut() -> None:
    answer = frames.read_ack(body(frames.write_answer(9, Code.OK, "ü" * 50_000)))
    assert isinstance(answer, frames.Answer)
    assert 29_000 < len(answer.message) <= 30_001


@pytest.mark.parametrize("level", range(5))
def test_publish_prefix(level: int) -> None:
    prefix = memoryview(frames.publish_prefix(level, "tüpic", 0xFFFFFFFF))
    if level <= 3:
        assert frames.read_publish_prefix(prefix) == (level, "tüpic", 0xFFFFFFFF)
    else:
        with pytest.raises(RemoteProtocolError, match="ack level"):
            frames.read_publish_prefix(prefix)
    for cut in range(len(prefix)):
        with pytest.raises(RemoteProtocolError):
            frames.read_publish_prefix(prefix[:cut])


def test_names_have_a_limit() -> None:
    with pytest.raises(ValueError, match="255 bytes"):
        frames.publish_prefix(2, "ü" * 128, 0)


def test_a_reason_that_is_too_long_is_cut() -> None:
    ack = ACKS[1]._replace(reason="ü" * 200)
    assert frames.read_ack(body(frames.write_consumer_ack(4, ack))) == ack._replace(reason="ü" * 127)


def patched(frame: bytes, position: int, value: int) -> memoryview:
    data = bytearray(body(frame))
    data[position] = value
    return memoryview(data)


def test_values_that_mean_nothing() -> None:
    deliver = DELIVER_HEAD
    subscribe, assigned = frames.write_subscribe(1, SUBSCRIBE), frames.write_assigned(ASSIGNED)
    cases: list[tuple[Callable[[memoryview], Any], memoryview]] = [
        (frames.read_deliver, patched(deliver, len(deliver) - 16 - 1, 0)),
        (frames.read_deliver, patched(deliver, len(deliver) - 16 - 1, 99)),
        (read_grants, patched(frames.write_grants(1, GRANTS), 78, 0xFF)),
        (frames.read_subscribe, patched(subscribe, 19, len(Start))),
        (frames.read_subscribe, patched(subscribe, 19, 200)),
        (frames.read_subscribe, patched(subscribe, 0, len(Intent))),
        (frames.read_assigned, patched(assigned, 14, 0)),
        (frames.read_assigned, patched(assigned, 14, len(Holding) + 1)),
        (frames.read_ack, patched(frames.write_answer(1, Code.OK), 2, 0xFF)),
        (frames.read_ack, patched(frames.write_answer(1, Code.OK), 0, 4)),
        (frames.read_ack, memoryview(b"")),
        *((frames.read_ack, patched(frames.write_consumer_ack(1, ack), 2, 0xFF)) for ack in ACKS),
        (frames.read_connect, patched(frames.write_connect(1, CONNECT), 0, 0)),
        (frames.read_connect, patched(frames.write_connect(1, CONNECT), 9, 0xFF)),
    ]
    for read, data in cases:
        with pytest.raises(RemoteProtocolError):
            read(data)


READERS = [
    frames.read_connect, read_grants, frames.read_publish_prefix, frames.read_subscribe, frames.read_deliver,
    frames.read_ack, frames.read_heartbeat, frames.read_reset, frames.read_assigned, frames.read_ready,
]  # fmt: skip


@quick
@given(st.binary(max_size=120), st.sampled_from(READERS))
def test_garbage(data: bytes, read: Callable[[memoryview], Any]) -> None:
    if read is read_grants:
        data = bytes(body(frames.write_answer(1, Code.OK))) + data
    try:
        read(memoryview(data))
    except RemoteProtocolError:
        pass


def test_damaged_bodies() -> None:
    rng = random.Random(SEED)
    for _, frame, read, _ in CASES:
        for _ in range(400):
            data = bytearray(body(frame))
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                found = read(memoryview(data))
            except (RemoteProtocolError, AssertionError):
                continue
            assert found is not None
