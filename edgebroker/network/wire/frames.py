"""The bodies of the eight frame types, written and read (docs/protocol.md draws every byte).

Writing returns whole frames. Reading takes a body and raises RemoteProtocolError when it does not fit.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple, TypeVar

from edgebroker.common.errors import Code, RemoteProtocolError
from edgebroker.common.messages import AckKind, ConsumerAck, GapReason, Holding, Wanted
from edgebroker.common.names import printable
from edgebroker.common.types import Start

PROTOCOL_VERSION = 1
MAGIC = b"EDGE"
HEADER = struct.Struct(">IBBHQ")
HEADER_BYTES = HEADER.size
NO_RESET = bytes(16)

WANT_PRODUCER, NEW_EPOCH = 1, 2
# What one frame may name: topics of a CONNECT, lines of a SUBSCRIBE, partitions of a HEARTBEAT.
MOST_TOPICS, MOST_LINES, MOST_ENDS = 1000, 2000, 1000


class FrameType(IntEnum):
    CONNECT = 1
    PUBLISH = 2
    SUBSCRIBE = 3
    DELIVER = 4
    ACK = 5
    HEARTBEAT = 6
    RESET = 7
    READY = 8


class Intent(IntEnum):
    """What a client's SUBSCRIBE wants: to join, to leave, or to release a partition that is being revoked."""

    JOIN = 0
    LEAVE = 1
    RELEASE = 2


class Connect(NamedTuple):
    version: int
    flags: int
    client_id: str
    token: bytes
    producer_id: int
    producer_epoch: int
    topics: list[str]


class TopicMetadata(NamedTuple):
    name: str
    code: Code
    partitions: int
    kind: str


class Grants(NamedTuple):
    """What the answer to CONNECT allows. Sizes in bytes, times in milliseconds."""

    version: int
    node_uid: bytes
    heartbeat_ms: int
    idle_ms: int
    max_frame: int
    max_batch: int
    max_record: int
    window_batches: int
    window_bytes: int
    delivery_ms: int
    producer_id: int
    producer_epoch: int
    topics: list[TopicMetadata]


class Subscribe(NamedTuple):
    intent: Intent
    group: str
    window_records: int
    window_bytes: int
    wanted: list[Wanted]


class Gap(NamedTuple):
    first: int
    last: int
    reason: GapReason


class Assignment(NamedTuple):
    """One line of a broker's SUBSCRIBE: what the member holds now, under which lease, and from which offset on."""

    topic: str
    partition: int
    holding: Holding
    lease: int
    offset: int


class Assigned(NamedTuple):
    group: str
    generation: int
    lines: list[Assignment]


class Deliver(NamedTuple):
    """`batches_start` is where the batches begin in the body; every record is at least age_ms old at this node."""

    topic: str
    partition: int
    log_id: bytes
    epoch: int
    generation: int
    lease: int
    first: int
    last: int
    durable_end: int
    age_ms: int
    gaps: list[Gap]
    batches_start: int


class Answer(NamedTuple):
    code: Code
    offset: int
    message: str
    extra_start: int


class Reset(NamedTuple):
    """A refresh. From a client: reset id NO_RESET asks for one; the id announced accepts it, from `from_offset` on."""

    reset_id: bytes
    log_id: bytes
    topic: str
    partition: int
    from_offset: int
    target: int


class Ready(NamedTuple):
    """A refresh is done: what readers see is the new data up to next_offset."""

    reset_id: bytes
    topic: str
    partition: int
    next_offset: int


class BodyReader:
    """Reads fields one after the other and never past the end."""

    __slots__ = ("_data", "position")

    def __init__(self, data: memoryview, position: int = 0) -> None:
        self._data, self.position = data, position

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        start = self.position
        if start + layout.size > len(self._data):
            raise RemoteProtocolError("a frame body is shorter than its fields")
        self.position += layout.size
        return layout.unpack_from(self._data, start)

    def raw(self, length: int) -> bytes:
        start = self.position
        if start + length > len(self._data):
            raise RemoteProtocolError("a frame body is shorter than its fields")
        self.position += length
        return bytes(self._data[start : self.position])

    def text(self) -> str:
        (length,) = self.take(_U8)
        try:
            return self.raw(length).decode()
        except UnicodeDecodeError as error:
            raise RemoteProtocolError("a name is not UTF-8") from error

    def end(self) -> None:
        if self.position != len(self._data):
            raise RemoteProtocolError("a frame body is longer than its fields")


_U8 = struct.Struct(">B")
_U16 = struct.Struct(">H")
_CONNECT_HEAD = struct.Struct(">4sHH")
_PRODUCER = struct.Struct(">qh")
_GRANTS = struct.Struct(">H16sIIIIIIIIqhH")
_TOPIC = struct.Struct(">HIB")
_SUBSCRIBE = struct.Struct(">B")
_WINDOW = struct.Struct(">IIH")
_WANTED = struct.Struct(">iB16siq")
_ASSIGNED = struct.Struct(">IH")
_ASSIGNMENT = struct.Struct(">IBQq")
_DELIVER = struct.Struct(">I16siIQqqqIB")
_DELIVER_LOG = struct.Struct(">I16si")
_DELIVER_REST = struct.Struct(">IQqqqIB")
_GAP = struct.Struct(">qqB")
_ANSWER = struct.Struct(">BBHqH")
_CONSUMER_ACK = struct.Struct(">IIQq")
_RESET = struct.Struct(">16s16s")
_RESET_RANGE = struct.Struct(">Iqq")
_READY = struct.Struct(">Iq")
_LAG = struct.Struct(">Iq")


_E = TypeVar("_E", bound=IntEnum)


def _known(kind: type[_E], value: int) -> _E:
    try:
        return kind(value)
    except ValueError as error:
        raise RemoteProtocolError(f"{kind.__name__} {value} is unknown") from error


def _at_most(count: int, most: int, what: str) -> int:
    if count > most:
        raise RemoteProtocolError(f"{what}: {count}; one frame may have {most}")
    return count


def frame(frame_type: FrameType, correlation: int, *parts: bytes) -> bytes:
    """A whole frame."""
    body = b"".join(parts)
    return HEADER.pack(len(body) + 12, frame_type, 0, 0, correlation) + body


def _text(value: str) -> bytes:
    raw = value.encode()
    if len(raw) > 255:
        raise ValueError(f"a name may take 255 bytes, this one takes {len(raw)}")
    return _U8.pack(len(raw)) + raw


def write_connect(correlation: int, connect: Connect) -> bytes:
    return frame(
        FrameType.CONNECT,
        correlation,
        _CONNECT_HEAD.pack(MAGIC, connect.version, connect.flags),
        _text(connect.client_id),
        _U16.pack(len(connect.token)) + connect.token,
        _PRODUCER.pack(connect.producer_id, connect.producer_epoch),
        _U16.pack(len(connect.topics)),
        *(_text(topic) for topic in connect.topics),
    )


def read_connect(body: memoryview) -> Connect:
    reader = BodyReader(body)
    if reader.raw(4) != MAGIC:
        raise RemoteProtocolError("a connection begins with a CONNECT frame that carries the magic EDGE")
    version, flags = reader.take(struct.Struct(">HH"))
    client_id = reader.text()
    (token_length,) = reader.take(_U16)
    token = reader.raw(token_length)
    producer_id, producer_epoch = reader.take(_PRODUCER)
    (count,) = reader.take(_U16)
    topics = [reader.text() for _ in range(_at_most(count, MOST_TOPICS, "topics of a CONNECT"))]
    reader.end()
    return Connect(version, flags, client_id, token, producer_id, producer_epoch, topics)


def write_grants(correlation: int, grants: Grants) -> bytes:
    """The answer OK to a CONNECT."""
    return frame(
        FrameType.ACK,
        correlation,
        _ANSWER.pack(AckKind.ANSWER, 0, Code.OK, -1, 0),
        _GRANTS.pack(*grants[:12], len(grants.topics)),
        *(
            _text(topic.name) + _TOPIC.pack(topic.code, topic.partitions, topic.kind == "table")
            for topic in grants.topics
        ),
    )


def read_grants(body: memoryview, start: int) -> Grants:
    reader = BodyReader(body, start)
    *fields, count = reader.take(_GRANTS)
    topics = []
    for _ in range(count):
        name = reader.text()
        code, partitions, table = reader.take(_TOPIC)
        topics.append(TopicMetadata(name, _known(Code, code), partitions, "table" if table else "stream"))
    reader.end()
    return Grants._make([*fields, topics])


def publish_prefix(level: int, topic: str, partition: int) -> bytes:
    return _U8.pack(level) + _text(topic) + struct.pack(">I", partition)


def read_publish_prefix(prefix: memoryview) -> tuple[int, str, int]:
    """(ack level, topic, partition)."""
    reader = BodyReader(prefix)
    (level,) = reader.take(_U8)
    topic = reader.text()
    (partition,) = reader.take(struct.Struct(">I"))
    if level > 3:
        raise RemoteProtocolError(f"ack level {level} is unknown; use 0 none, 1 written, 2 durable or 3 replicated")
    return level, topic, partition


def write_subscribe(correlation: int, subscribe: Subscribe) -> bytes:
    return frame(
        FrameType.SUBSCRIBE,
        correlation,
        _SUBSCRIBE.pack(subscribe.intent),
        _text(subscribe.group),
        _WINDOW.pack(subscribe.window_records, subscribe.window_bytes, len(subscribe.wanted)),
        *(
            _text(line.topic) + _WANTED.pack(line.partition, line.start, line.log_id, line.epoch, line.value)
            for line in subscribe.wanted
        ),
    )


def read_subscribe(body: memoryview) -> Subscribe:
    reader = BodyReader(body)
    (intent,) = reader.take(_SUBSCRIBE)
    group = reader.text()
    window_records, window_bytes, count = reader.take(_WINDOW)
    wanted = []
    for _ in range(_at_most(count, MOST_LINES, "lines of a SUBSCRIBE")):
        topic = reader.text()
        partition, start, log_id, epoch, value = reader.take(_WANTED)
        wanted.append(Wanted(topic, partition, _known(Start, start), log_id, epoch, value))  # type: ignore[arg-type]
    reader.end()
    return Subscribe(_known(Intent, intent), group, window_records, window_bytes, wanted)


def write_assigned(assigned: Assigned) -> bytes:
    """A broker's SUBSCRIBE."""
    return frame(
        FrameType.SUBSCRIBE,
        0,
        _text(assigned.group),
        _ASSIGNED.pack(assigned.generation, len(assigned.lines)),
        *(_text(line.topic) + _ASSIGNMENT.pack(*line[1:]) for line in assigned.lines),
    )


def read_assigned(body: memoryview) -> Assigned:
    reader = BodyReader(body)
    group = reader.text()
    generation, count = reader.take(_ASSIGNED)
    lines = []
    for _ in range(count):
        topic = reader.text()
        partition, holding, lease, offset = reader.take(_ASSIGNMENT)
        lines.append(Assignment(topic, partition, _known(Holding, holding), lease, offset))
    reader.end()
    return Assigned(group, generation, lines)


def deliver_prefix(topic: str, partition: int, log_id: bytes, epoch: int) -> bytes:
    """What every DELIVER of a log begins with."""
    return _text(topic) + _DELIVER_LOG.pack(partition, log_id, epoch)


def deliver_head(
    prefix: bytes,
    generation: int,
    lease: int,
    first: int,
    last: int,
    durable_end: int,
    age_ms: int,
    gaps: list[Gap],
    batch_bytes: int,
) -> bytes:
    """Everything of a DELIVER frame before its batches, which follow from memory or by sendfile."""
    rest = _DELIVER_REST.pack(generation, lease, first, last, durable_end, age_ms, len(gaps))
    if gaps:
        rest += b"".join(_GAP.pack(*gap) for gap in gaps)
    length = len(prefix) + len(rest) + batch_bytes + 12
    return HEADER.pack(length, FrameType.DELIVER, 0, 0, 0) + prefix + rest


def read_deliver(body: memoryview) -> Deliver:
    reader = BodyReader(body)
    topic = reader.text()
    *fields, count = reader.take(_DELIVER)
    gaps = []
    for _ in range(count):
        first, last, reason = reader.take(_GAP)
        gaps.append(Gap(first, last, _known(GapReason, reason)))
    return Deliver._make([topic, *fields, gaps, reader.position])


def write_answer(correlation: int, code: Code, message: str = "", offset: int = -1) -> bytes:
    raw = message.encode()[:60000]
    return frame(FrameType.ACK, correlation, _ANSWER.pack(AckKind.ANSWER, 0, code, offset, len(raw)), raw)


_WITH_REASON = (AckKind.NEGATIVE, AckKind.REJECT)


def write_consumer_ack(correlation: int, ack: ConsumerAck) -> bytes:
    return frame(
        FrameType.ACK,
        correlation,
        _U8.pack(ack.kind),
        _text(ack.topic),
        _CONSUMER_ACK.pack(ack.partition, ack.generation, ack.lease, ack.offset),
        _text(_cut(ack.reason)) if ack.kind in _WITH_REASON else b"",
    )


def _cut(text: str) -> str:
    """As much of a text as fits."""
    return text.encode()[:255].decode(errors="ignore")


def read_ack(body: memoryview) -> Answer | ConsumerAck:
    if not body:
        raise RemoteProtocolError("an ACK without a body")
    kind = body[0]
    if kind == AckKind.CUMULATIVE:  # by far the most frequent one
        end = 2 + body[1] if len(body) > 1 else 2
        if len(body) != end + _CONSUMER_ACK.size:
            raise RemoteProtocolError("a frame body is not as long as its fields")
        try:
            return ConsumerAck(AckKind.CUMULATIVE, str(body[2:end], "utf-8"), *_CONSUMER_ACK.unpack_from(body, end))
        except UnicodeDecodeError as error:
            raise RemoteProtocolError("a name is not UTF-8") from error
    if kind == AckKind.ANSWER:
        reader = BodyReader(body)
        _, _, code, offset, length = reader.take(_ANSWER)
        message = printable(reader.raw(length).decode(errors="replace"))
        return Answer(_known(Code, code), offset, message, reader.position)
    if kind > AckKind.REJECT:
        raise RemoteProtocolError(f"ACK kind {kind} is unknown")
    reader = BodyReader(body, 1)
    topic = reader.text()
    partition, generation, lease, offset = reader.take(_CONSUMER_ACK)
    reason = reader.text() if kind in _WITH_REASON else ""
    reader.end()
    return ConsumerAck(AckKind(kind), topic, partition, generation, lease, offset, reason)


def write_heartbeat(ends: list[tuple[str, int, int]]) -> bytes:
    """`ends`: (topic, partition, durable end) of what the peer is subscribed to."""
    return frame(
        FrameType.HEARTBEAT,
        0,
        _U16.pack(len(ends)),
        *(_text(topic) + _LAG.pack(partition, end) for topic, partition, end in ends),
    )


def read_heartbeat(body: memoryview) -> list[tuple[str, int, int]]:
    reader = BodyReader(body)
    (count,) = reader.take(_U16)
    ends = []
    for _ in range(_at_most(count, MOST_ENDS, "partitions of a HEARTBEAT")):
        topic = reader.text()
        partition, end = reader.take(_LAG)
        ends.append((topic, partition, end))
    reader.end()
    return ends


def write_reset(correlation: int, reset: Reset) -> bytes:
    return frame(
        FrameType.RESET,
        correlation,
        _RESET.pack(reset.reset_id, reset.log_id),
        _text(reset.topic),
        _RESET_RANGE.pack(reset.partition, reset.from_offset, reset.target),
    )


def read_reset(body: memoryview) -> Reset:
    reader = BodyReader(body)
    reset_id, log_id = reader.raw(16), reader.raw(16)
    topic = reader.text()
    partition, from_offset, target = reader.take(_RESET_RANGE)
    reader.end()
    return Reset(reset_id, log_id, topic, partition, from_offset, target)


def write_ready(correlation: int, ready: Ready) -> bytes:
    return frame(
        FrameType.READY,
        correlation,
        ready.reset_id,
        _text(ready.topic),
        _READY.pack(ready.partition, ready.next_offset),
    )


def read_ready(body: memoryview) -> Ready:
    reader = BodyReader(body)
    reset_id = reader.raw(16)
    topic = reader.text()
    partition, next_offset = reader.take(_READY)
    reader.end()
    return Ready(reset_id, topic, partition, next_offset)
