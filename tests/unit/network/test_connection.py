"""The sans-IO Connection: every case whole, byte by byte and with trailing bytes; two of them against each other."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebroker.common.errors import Code, LocalProtocolError, RemoteProtocolError
from edgebroker.common.messages import PublishRun
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import (
    BEFORE_CONNECT_BYTES,
    FROM_BROKER,
    FROM_CLIENT,
    HEADROOM_BYTES,
    SKIP_BYTES,
    Connection,
    Event,
    Frame,
    ReceiveBuffer,
    Role,
)
from edgebroker.network.wire.frames import Connect, FrameType, Grants
from tests.kit.raw_client import write_publish

SEED = 20240503
MAX = 300_000
MOST = 3
SPAN = struct.Struct("=QII")
quick = settings(derandomize=True, deadline=None, max_examples=200, database=None)
# An event as plain data, PUBLISH runs taken apart: how a run was cut by recv() does not matter.
Plain = tuple[object, ...]


class Side:
    """A Connection and what it received so far; the buffer is shared, as on a loop."""

    def __init__(self, role: Role = Role.BROKER, *, granted: bool = True, buffer: ReceiveBuffer | None = None) -> None:
        self.connection = Connection(role, MAX)
        self.connection._most = MOST if role is Role.BROKER else self.connection._most
        self.connection.granted = granted
        self.buffer = buffer or ReceiveBuffer()
        self.seen: list[Plain] = []

    def feed(self, data: bytes, piece: int = 1 << 20) -> list[Plain]:
        """Receive in pieces; the events of this data, copied at once as their views ask for."""
        before = len(self.seen)
        for start in range(0, len(data), piece):
            part = data[start : start + piece]
            self.buffer.room[: len(part)] = part
            self.seen += plain(self.connection.receive(self.buffer, len(part)))
            # Somebody else's bytes come next into the same buffer.
            self.buffer.room[: len(part)] = b"\xaa" * len(part)
            while self.connection.waiting:
                events = self.connection.more()
                assert len(events) <= MOST + 1, "a frame that is refused comes besides"
                self.seen += plain(events)
        return self.seen[before:]


def plain(events: Iterable[Event]) -> list[Plain]:
    found: list[Plain] = []
    for event in events:
        if isinstance(event, PublishRun):
            for correlation, start, end in SPAN.iter_unpack(event.spans):
                found.append((2, correlation, event.level, event.topic, event.partition, bytes(event.data[start:end])))
        elif isinstance(event, Frame):
            found.append((event.type, event.correlation, bytes(event.body)))
        else:
            found.append(("refused", *event))
    return found


def publish(correlation: int, topic: str = "t", payload: bytes = b"batch", level: int = 2, partition: int = 0) -> bytes:
    return write_publish(correlation, frames.publish_prefix(level, topic, partition), payload)


def expected_publish(correlation: int, topic: str = "t", payload: bytes = b"batch") -> Plain:
    return 2, correlation, 2, topic, 0, payload


def large(correlation: int, size: int) -> bytes:
    return frames.frame(FrameType.SUBSCRIBE, correlation, bytes(range(256)) * (size // 256))


def refusable(kind: FrameType, correlation: int) -> bytes:
    return frames.frame(kind, correlation, bytes(BIG))


BIG = MAX + 1
BEAT = frames.frame(FrameType.HEARTBEAT, 0, b"\0\0")
CASES: dict[str, tuple[bytes, list[Plain]]] = {
    "one frame": (BEAT, [(6, 0, b"\0\0")]),
    "an empty body": (frames.frame(FrameType.READY, 5), [(8, 5, b"")]),
    "a publish": (publish(1), [expected_publish(1)]),
    "a run": (publish(1) + publish(2) + publish(3), [expected_publish(n) for n in (1, 2, 3)]),
    "two places": (publish(1) + publish(2, "u") + publish(3), [
        expected_publish(1), expected_publish(2, "u"), expected_publish(3)]),
    "mixed": (publish(1) + BEAT + publish(2), [expected_publish(1), (6, 0, b"\0\0"), expected_publish(2)]),
    "as large as the headroom": (large(1, HEADROOM_BYTES) + BEAT, [
        (3, 1, bytes(range(256)) * (HEADROOM_BYTES // 256)), (6, 0, b"\0\0")]),
    "larger than the headroom": (publish(1) + large(2, 200_000) + publish(3), [
        expected_publish(1), (3, 2, bytes(range(256)) * (200_000 // 256)), expected_publish(3)]),
    "refused": (publish(1) + frames.frame(FrameType.PUBLISH, 2, bytes(BIG)) + publish(3), [
        expected_publish(1), ("refused", 2, 2, BIG + 16), expected_publish(3)]),
    "refused twice": (refusable(FrameType.RESET, 1) + refusable(FrameType.READY, 2) + BEAT, [
        ("refused", 7, 1, BIG + 16), ("refused", 8, 2, BIG + 16), (6, 0, b"\0\0")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("piece", [1 << 20, 65536, 4096, 1000, 17, 16, 7, 1])
def test_in_pieces(name: str, piece: int) -> None:
    data, expected = CASES[name]
    if piece < 1000 and len(data) > 100_000:
        piece += 4999
    side = Side()
    assert side.feed(data, piece) == expected
    assert side.feed(BEAT) == [(6, 0, b"\0\0")]


@pytest.mark.parametrize("name", CASES)
def test_with_trailing_bytes(name: str) -> None:
    data, expected = CASES[name]
    follower = publish(99, "after", b"x" * 50)
    for cut in (1, 15, 16, 17, len(follower) - 1):
        side = Side()
        assert side.feed(data + follower[:cut]) == expected
        assert side.feed(follower[cut:]) == [(2, 99, 2, "after", 0, b"x" * 50)]


def test_every_cut_of_a_stream() -> None:
    data = publish(1) + BEAT + publish(2, "u") + publish(3, "u", b"") + frames.frame(FrameType.RESET, 4, b"body")
    whole = Side().feed(data)
    for cut in range(len(data) + 1):
        side = Side()
        assert side.feed(data[:cut]) + side.feed(data[cut:]) == whole


def test_larger_than_the_receive_buffer() -> None:
    side = Side(buffer=ReceiveBuffer(5000))
    data = large(1, 200_000) + publish(2) + frames.frame(FrameType.PUBLISH, 3, bytes(BIG)) + publish(4)
    side.feed(data, 5000)
    assert [event[1] for event in side.seen] == [1, 2, 2, 4]
    assert side.seen[2] == ("refused", 2, 3, BIG + 16)
    assert side.seen[0] == (3, 1, bytes(range(256)) * (200_000 // 256))
    assert side.seen[-1] == expected_publish(4)


def test_a_refused_frame_is_not_buffered() -> None:
    side = Side()
    header = frames.HEADER.pack(SKIP_BYTES - 4, FrameType.PUBLISH, 0, 0, 7)
    assert side.feed(publish(1) + header) == [expected_publish(1), ("refused", 2, 7, SKIP_BYTES)]
    zeros = bytes(1 << 20)
    for _ in range((SKIP_BYTES >> 20) - 1):
        assert side.feed(zeros) == []
        assert len(side.connection._tail) == 0
    assert side.feed(bytes((1 << 20) - 16) + publish(8)) == [expected_publish(8)]


@pytest.mark.parametrize(
    "bad",
    [
        struct.pack(">IBBHQ", 11, 6, 0, 0, 1),
        struct.pack(">IBBHQ", 12, 0, 0, 0, 1),
        struct.pack(">IBBHQ", 12, 9, 0, 0, 1),
        struct.pack(">IBBHQ", 12, 6, 1, 0, 1),
        struct.pack(">IBBHQ", SKIP_BYTES, 6, 0, 0, 1),
        struct.pack(">IBBHQ", 0xFFFFFFFF, 2, 0, 0, 1),
        frames.frame(FrameType.PUBLISH, 1, b"\2\5ab"),
        publish(1, level=4),
        frames.frame(FrameType.PUBLISH, 1, b"\2\2\xff\xff\0\0\0\0batch"),
        frames.frame(FrameType.DELIVER, 1),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=range(11),
)
@pytest.mark.parametrize("piece", [1 << 20, 1])
def test_dead_after_an_error(bad: bytes, piece: int) -> None:
    side = Side()
    with pytest.raises(RemoteProtocolError):
        side.feed(publish(1) + bad, piece)
    for _ in range(2):
        with pytest.raises(LocalProtocolError):
            side.feed(BEAT)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", FrameType)
def test_who_may_send_what(role: Role, kind: FrameType) -> None:
    side = Side(role)
    data = publish(1) if kind is FrameType.PUBLISH else frames.frame(kind, 1)
    if kind in (FROM_CLIENT if role is Role.BROKER else FROM_BROKER):
        assert len(side.feed(data)) == 1
    else:
        with pytest.raises(RemoteProtocolError, match=f"a {kind.name} frame is not allowed"):
            side.feed(data)


@pytest.mark.parametrize("kind", sorted(FROM_CLIENT - {FrameType.CONNECT}))
def test_connect_comes_first(kind: FrameType) -> None:
    side = Side(granted=False)
    with pytest.raises(RemoteProtocolError, match="not allowed here"):
        side.feed(publish(1) if kind is FrameType.PUBLISH else frames.frame(kind, 1))


@pytest.mark.parametrize("piece", [1 << 20, 1000, 1])
def test_only_4_kib_before_connect_is_granted(piece: int) -> None:
    side = Side(granted=False)
    fits = frames.frame(FrameType.CONNECT, 1, bytes(BEFORE_CONNECT_BYTES - 16))
    assert side.feed(fits, piece) == [(1, 1, bytes(BEFORE_CONNECT_BYTES - 16))]
    side = Side(granted=False)
    with pytest.raises(RemoteProtocolError, match="before CONNECT"):
        side.feed(frames.frame(FrameType.CONNECT, 1, bytes(BEFORE_CONNECT_BYTES)), piece)
    side = Side(granted=False)
    with pytest.raises(RemoteProtocolError):
        side.feed(frames.HEADER.pack(BIG, FrameType.CONNECT, 0, 0, 1))


def test_connections_share_a_buffer() -> None:
    buffer = ReceiveBuffer()
    sides = [Side(buffer=buffer) for _ in range(3)]
    streams = [publish(n, f"topic-{n}", b"%d" % n * 100) + large(n, 100_000) + BEAT for n in range(3)]
    rng = random.Random(SEED)
    positions = [0, 0, 0]
    while any(position < len(stream) for position, stream in zip(positions, streams, strict=True)):
        which = rng.randrange(3)
        size = rng.choice([1, 10, 1000, 30_000])
        sides[which].feed(streams[which][positions[which] : positions[which] + size])
        positions[which] += size
    for side, stream in zip(sides, streams, strict=True):
        assert side.seen == Side().feed(stream)


def test_random_streams_in_random_pieces() -> None:
    rng = random.Random(SEED)
    for _ in range(60):
        data, expected = b"", []
        for _ in range(rng.randrange(1, 8)):
            more, events = rng.choice(list(CASES.values()))
            data, expected = data + more, expected + events
        side, position = Side(), 0
        while position < len(data):
            size = rng.choice([1, 15, 16, 100, 5000, 70_000, 1 << 20])
            side.feed(data[position : position + size])
            position += size
        assert side.seen == expected


@quick
@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([BEAT, publish(1), publish(2, "u")]))), st.booleans())
def test_garbage_raises_one_kind_of_error(pieces: list[bytes], granted: bool) -> None:
    for role in Role:
        side = Side(role, granted=granted)
        try:
            for piece in pieces:
                side.feed(piece)
        except RemoteProtocolError:
            with pytest.raises(LocalProtocolError):
                side.feed(BEAT)


def test_damaged_streams_raise_one_kind_of_error() -> None:
    rng = random.Random(SEED)
    base = b"".join(data for data, _ in CASES.values() if len(data) < 1000)
    for _ in range(2000):
        data = bytearray(base)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            Side().feed(bytes(data), rng.choice([1 << 20, 50, 3]))
        except RemoteProtocolError:
            pass


def test_two_sides_talk() -> None:
    """A client and a broker without a socket: what one writes is what the other reads."""
    client, broker = Side(Role.CLIENT), Side(Role.BROKER, granted=False)
    connect = Connect(1, 0, "till", b"", -1, -1, ["t"])
    [(kind, correlation, body)] = broker.feed(frames.write_connect(1, connect))
    assert (kind, correlation) == (FrameType.CONNECT, 1)
    assert frames.read_connect(memoryview(body)) == connect  # type: ignore[arg-type]
    broker.connection.granted = True
    grants = Grants(1, bytes(16), 1000, 3000, MAX, MAX, 1000, 10, 1000, 60_000, -1, -1, [])
    [(kind, correlation, body)] = client.feed(frames.write_grants(1, grants))
    assert (kind, correlation) == (FrameType.ACK, 1)
    for number in range(2, 200):
        [(*_, payload)] = broker.feed(publish(number, payload=b"%d" % number))
        assert payload == b"%d" % number
        answer = frames.write_answer(number, Code.OK, "", number)
        head = frames.deliver_head(frames.deliver_prefix("t", 0, bytes(16), 1), 1, 1, 0, 0, 1, 0, [], 5)
        found = client.feed(answer + head + b"bytes", 13)
        assert [event[:2] for event in found] == [(FrameType.ACK, number), (FrameType.DELIVER, 0)]
        assert isinstance(found[1][2], bytes)
        assert found[1][2].endswith(b"bytes")
    with pytest.raises(RemoteProtocolError):
        client.feed(publish(1))
