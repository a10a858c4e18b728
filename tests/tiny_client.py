"""A client of edgebroker in one file: written from docs/protocol.md alone, with the standard library alone.

python tiny_client.py HOST:PORT publish TOPIC VALUE... | consume TOPIC GROUP COUNT

One request at a time and no thread: it reads and beats only while it waits, so call it again within idle ms.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import time
from collections import deque, namedtuple
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO

CONNECT, PUBLISH, SUBSCRIBE, DELIVER, ACK, HEARTBEAT, RESET, READY = range(1, 9)
COMMITTED, EARLIEST, LATEST, OFFSET, TIME, POSITION = range(6)
FRAME = struct.Struct(">IBBHQ")  # length, type, flags, reserved, correlation
ANSWER = struct.Struct(">BBHqH")  # kind, zero, code, offset, length of the message
GRANTS = struct.Struct(">H16sIIIIIIIqhH")  # version ... producer id, epoch, count of topics
HANDED = struct.Struct(">I16siIQqqqB")  # DELIVER behind its topic: partition ... count of gaps
GAP = struct.Struct(">qqB")  # first, last, reason
BATCH = struct.Struct(">qiibIhiqqqhii")  # the 61 bytes before the records
WINDOW = 10_000, 512 << 10  # records, bytes: below the 1 MiB from which the broker would not read what is written
NOBODY = -1, -1  # neither producer id nor epoch
CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [(entry >> 1) ^ (0x82F63B78 if entry & 1 else 0) for entry in CRC_TABLE]

Record = namedtuple("Record", "value key headers timestamp offset", defaults=(None, (), 0, -1))
Delivery = namedtuple("Delivery", "topic partition log_id epoch generation lease first last durable_end gaps records")


class Refused(Exception):
    """An answer that is not OK. Its args: code, message, correlation."""


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def put_varint(number: int) -> bytes:
    number, out = (number << 1) ^ (number >> 63), bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def put_sized(data: bytes | None) -> bytes:
    return put_varint(-1) if data is None else put_varint(len(data)) + data


def put_text(text: str) -> bytes:
    return bytes([len(text.encode())]) + text.encode()


def take_varint(body: BytesIO) -> int:
    number = shift = 0
    while (byte := body.read(1)[0]) & 0x80:
        number, shift = number | (byte & 0x7F) << shift, shift + 7
    number |= byte << shift
    return (number >> 1) ^ -(number & 1)


def take_sized(body: BytesIO) -> bytes | None:
    return None if (length := take_varint(body)) < 0 else body.read(length)


def encode_batch(records: list[Record], producer: tuple[int, int] = NOBODY, sequence: int = -1) -> bytes:
    base, latest, count, lines = records[0].timestamp, max(r.timestamp for r in records), len(records), bytearray()
    for delta, record in enumerate(records):
        line = b"\0" + put_varint(record.timestamp - base) + put_varint(delta)
        line += put_sized(record.key) + put_sized(record.value) + put_varint(len(record.headers))
        lines += put_sized(line + b"".join(put_sized(name.encode()) + put_sized(v) for name, v in record.headers))
    fields = 0, count - 1, base, latest, *producer, sequence, count  # from the attributes on
    crc = crc32c(BATCH.pack(0, 0, 0, 2, 0, *fields)[21:] + lines)
    return BATCH.pack(0, 49 + len(lines), 0, 2, crc, *fields) + lines


def decode_batches(data: bytes) -> Iterator[Record]:
    while data:
        offset, length, _, magic, crc, attributes, _, base, _, _, _, _, count = BATCH.unpack_from(data)
        batch, data = data[: 12 + length], data[12 + length :]
        if magic != 2 or crc != crc32c(batch[21:]) or attributes & 7:
            raise ValueError(f"the batch at offset {offset} is damaged or compressed")
        lines = BytesIO(batch[BATCH.size :])
        for _ in range(0 if attributes & 0x20 else count):  # nothing in a control batch is for us
            line = BytesIO(take_sized(lines)[1:])
            timestamp, at, key, value = base + take_varint(line), take_varint(line), take_sized(line), take_sized(line)
            headers = tuple((take_sized(line).decode(), take_sized(line)) for _ in range(take_varint(line)))
            yield Record(value, key, headers, timestamp, offset + at)


def decode_delivery(body: bytes) -> Delivery:
    (*place, gaps), start = HANDED.unpack_from(body, 1 + body[0]), 1 + body[0] + HANDED.size
    batches = start + gaps * GAP.size
    records = [record for record in decode_batches(body[batches:]) if place[5] <= record.offset <= place[6]]
    return Delivery(body[1 : 1 + body[0]].decode(), *place, list(GAP.iter_unpack(body[start:batches])), records)


class TinyClient:
    def __init__(self, server: str, client_id: str, producer: tuple[int, int] = NOBODY) -> None:
        host, port = server.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.close = self.socket.close
        self.correlation, self.beat, self.idle, self.sent, self.heard = 0, 60.0, 60.0, *[time.monotonic()] * 2
        self.answers: dict[int, tuple[int, bytes]] = {}  # correlation: offset, extra
        self.deliveries: deque[Delivery] = deque()
        self.sequences: dict[tuple[str, int], int] = {}
        fields = struct.pack(">4sHH", b"EDGE", 1, 1) + put_text(client_id) + struct.pack(">HqhH", 0, *producer, 0)
        grants = GRANTS.unpack_from(self.request(CONNECT, fields)[1])
        self.beat, self.idle, self.producer = grants[2] / 2000, grants[3] / 1000, grants[9:11]

    def send(self, kind: int, body: bytes, correlation: int = 0) -> None:
        self.socket.sendall(FRAME.pack(12 + len(body), kind, 0, 0, correlation) + body)
        self.sent = time.monotonic()

    def request(self, kind: int, body: bytes) -> tuple[int, bytes]:
        self.correlation += 1
        self.send(kind, body, self.correlation)
        while self.correlation not in self.answers:
            self.handle_frame()
        return self.answers.pop(self.correlation)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (part := self.socket.recv(size - len(data))):
                raise ConnectionError("the broker closed the connection")
            data += part
        return data

    def handle_frame(self) -> None:
        while not select.select([self.socket], [], [], max(0.0, self.sent + self.beat - time.monotonic()))[0]:
            if time.monotonic() - self.heard > self.idle:
                raise ConnectionError("the broker is silent")
            self.send(HEARTBEAT, bytes(2))
        length, kind, _, _, correlation = FRAME.unpack(self.read(FRAME.size))
        if not 12 <= length <= (16 << 20) + (64 << 10):
            raise ConnectionError(f"a frame of {length} bytes")
        body, self.heard = self.read(length - 12), time.monotonic()
        if kind == DELIVER:
            self.deliveries.append(decode_delivery(body))
        elif kind == ACK:
            _, _, code, offset, size = ANSWER.unpack_from(body)
            if code:  # also a state of a subscription, an ACK that is not accepted, the broker's stop
                raise Refused(code, body[14 : 14 + size].decode(), correlation)
            self.answers[correlation] = offset, body[14 + size :]

    def publish(self, topic: str, partition: int, records: list[Record]) -> int:
        """One batch, durable: the offset of its first record, also when an earlier connection had sent it."""
        sequence = self.sequences.get((topic, partition), 0)
        batch = encode_batch(records, self.producer, sequence)
        offset, _ = self.request(PUBLISH, b"\2" + put_text(topic) + struct.pack(">I", partition) + batch)
        self.sequences[topic, partition] = (sequence + len(records)) & 0x7FFFFFFF
        return offset

    def subscribe(self, topic: str, group: str, start: int = EARLIEST, value: int = 0) -> None:
        line = put_text(topic) + struct.pack(">iB16xiq", -1, start, -1, value)
        self.request(SUBSCRIBE, b"\0" + put_text(group) + struct.pack(">IIH", *WINDOW, 1) + line)

    def consume(self, count: int) -> Iterator[Record]:
        """Acknowledges what was handed over when more is asked for. What is left over comes when subscribed again."""
        while count > 0:
            while not self.deliveries:
                self.handle_frame()
            delivery = self.deliveries.popleft()
            yield from delivery.records[:count]
            rest, count = delivery.records[count:], count - len(delivery.records)
            self.ack(delivery, rest[0].offset if rest else delivery.last + 1)

    def ack(self, delivery: Delivery, offset: int) -> None:
        lease = struct.pack(">IIQq", delivery.partition, delivery.generation, delivery.lease, offset)
        self.request(ACK, b"\1" + put_text(delivery.topic) + lease)


def main(server: str, command: str, topic: str, *values: str) -> None:
    with closing(TinyClient(server, f"tiny-{os.getpid()}")) as client:
        if command == "publish":
            now = time.time_ns() // 1_000_000
            print(client.publish(topic, 0, [Record(value.encode(), timestamp=now) for value in values]))
        else:
            client.subscribe(topic, values[0])
            for record in client.consume(int(values[1])):
                print(record.offset, (record.value or b"").decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
