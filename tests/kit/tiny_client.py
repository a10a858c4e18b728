"""A client of edgebroker in one file: written from docs/protocol.md alone, with the standard library alone."""

import select
import socket
import time
from collections import deque, namedtuple
from collections.abc import Callable, Iterator
from functools import reduce
from io import BytesIO
from struct import calcsize, pack, unpack

CONNECT, PUBLISH, SUBSCRIBE, DELIVER, ACK, HEARTBEAT, RESET, READY = range(1, 9)
JOIN, LEAVE, RELEASE, ASSIGNED, REVOKING, REVOKED = 0, 1, 2, 1, 2, 3  # SUBSCRIBE of the client, of the broker
COMMITTED, EARLIEST, LATEST, OFFSET, TIME, POSITION, RESUME = range(7)
CUMULATIVE, NEGATIVE, IN_PROGRESS = range(1, 4)
WINDOW = 10_000, 512 << 10  # records, bytes: below the 1 MiB from which the broker would not read what is written
OK, STALE, NOBODY = 0, 14, (-1, -1)  # codes; neither producer id nor epoch
CRC_TABLE = [reduce(lambda crc, _: (crc >> 1) ^ (crc & 1) * 0x82F63B78, range(8), byte) for byte in range(256)]

Record = namedtuple("Record", "value key headers timestamp offset", defaults=(None, (), 0, -1))
Delivery = namedtuple("Delivery", "topic partition log epoch generation lease first last durable_end age gaps records")
Refused = type("Refused", (Exception,), {"__doc__": "An answer that is not OK. Its args: code, message."})


def crc32c(data: bytes) -> int:
    return reduce(lambda crc, byte: (crc >> 8) ^ CRC_TABLE[(crc ^ byte) & 0xFF], data, 0xFFFFFFFF) ^ 0xFFFFFFFF


def put_text(text: str) -> bytes:
    return bytes([len(text.encode())]) + text.encode()


def put_varint(number: int) -> bytes:
    number = (number << 1) ^ (number >> 63)
    groups = [(number >> shift) & 0x7F for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def put_sized(data: bytes | None) -> bytes:
    return put_varint(-1) if data is None else put_varint(len(data)) + data


class Fields(BytesIO):  # of a frame or of a record, read one after the other
    def take(self, layout: str) -> tuple:
        return unpack(">" + layout, self.read(calcsize(">" + layout)))

    def text(self) -> str:
        return self.read(self.read(1)[0]).decode()

    def varint(self) -> int:
        number = shift = 0
        while (byte := self.read(1)[0]) & 0x80:
            number, shift = number | (byte & 0x7F) << shift, shift + 7
        number |= byte << shift
        return (number >> 1) ^ -(number & 1)

    def sized(self) -> bytes | None:
        return None if (length := self.varint()) < 0 else self.read(length)


def encode_batch(records: list[Record], producer: tuple[int, int], sequence: int) -> bytes:
    base, latest, count, lines = records[0].timestamp, max(r.timestamp for r in records), len(records), bytearray()
    for delta, record in enumerate(records):
        line = b"\0" + put_varint(record.timestamp - base) + put_varint(delta)
        line += put_sized(record.key) + put_sized(record.value) + put_varint(len(record.headers))
        lines += put_sized(line + b"".join(put_sized(name.encode()) + put_sized(v) for name, v in record.headers))
    checked = pack(">hiqqqhii", 0, count - 1, base, latest, *producer, sequence, count) + lines
    return pack(">qiibI", 0, 9 + len(checked), 0, 2, crc32c(checked)) + checked


def decode_batches(body: Fields) -> Iterator[Record]:
    while head := body.read(21):
        offset, length, _, magic, crc = unpack(">qiibI", head)
        batch = Fields(body.read(length - 9))
        attributes, _, base, *_, count = batch.take("hiqqqhii")
        assert magic == 2 and crc == crc32c(batch.getvalue()) and not attributes & 7, f"batch {offset} is damaged"
        for _ in range(0 if attributes & 0x20 else count):  # nothing in a control batch is for us
            line = Fields(batch.sized()[1:])
            timestamp, at, key, value = base + line.varint(), line.varint(), line.sized(), line.sized()
            headers = tuple((line.sized().decode(), line.sized()) for _ in range(line.varint()))
            yield Record(value, key, headers, timestamp, offset + at)


class TinyClient:
    """One request at a time and no thread: it reads and beats only while it waits, so call it within idle ms."""

    def __init__(self, server: str, client_id: str, producer: tuple[int, int] = NOBODY) -> None:
        self.socket = socket.create_connection(server.rsplit(":", 1))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.close = self.socket.close
        self.correlation, self.beat, self.idle, self.sent, self.heard = 0, 60.0, 60.0, *[time.monotonic()] * 2
        self.answers = {}  # by correlation; what is left in it are states of partitions and the broker's stop
        self.leases, self.sequences, self.deliveries, self.refreshes = {}, {}, deque(), deque()
        body = b"EDGE" + pack(">HH", 1, 1) + put_text(client_id) + pack(">HqhH", 0, *producer, 0)
        grants = self.request(CONNECT, body)[-1].take("H16sIIIIIIIIqhH")
        self.beat, self.idle, self.producer = grants[2] / 2000, grants[3] / 1000, grants[10:12]

    def send(self, kind: int, body: bytes, correlation: int = 0) -> None:
        self.socket.sendall(pack(">IBBHQ", 12 + len(body), kind, 0, 0, correlation) + body)
        self.sent = time.monotonic()

    def request(self, kind: int, body: bytes, codes: tuple[int, ...] = (OK,)) -> tuple[int, int, str, Fields]:
        correlation = self.correlation = self.correlation + 1
        self.send(kind, body, correlation)
        while correlation not in self.answers:
            self.handle_frame()
        code, _, message, _ = answer = self.answers.pop(correlation)
        if code not in codes:
            raise Refused(code, message)
        return answer

    def read(self, size: int) -> Fields:
        data = self.socket.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise ConnectionError("the broker closed the connection")
        return Fields(data)

    def handle_frame(self) -> None:
        while not select.select([self.socket], [], [], max(0.0, self.sent + self.beat - time.monotonic()))[0]:
            if time.monotonic() - self.heard > self.idle:
                raise ConnectionError("the broker is silent")
            self.send(HEARTBEAT, bytes(2))
        length, kind, _, _, correlation = self.read(16).take("IBBHQ")
        assert 12 <= length <= (16 << 20) + (64 << 10), f"a frame of {length} bytes"
        body, self.heard = self.read(length - 12), time.monotonic()
        if kind == DELIVER:
            topic, (*place, age, gaps) = body.text(), body.take("I16siIQqqqIB")
            gaps = [body.take("qqB") for _ in range(gaps)]  # offsets that will not come, and why
            records = [each for each in decode_batches(body) if place[5] <= each.offset <= place[6]]
            if self.leases.get((topic, place[0])) == tuple(place[3:5]):
                self.deliveries.append(Delivery(topic, *place, age, gaps, records))
        elif kind == SUBSCRIBE:
            group, (generation, count) = body.text(), body.take("IH")
            for _ in range(count):
                topic, (partition, holding, lease, _) = body.text(), body.take("IBQq")
                self.forget(topic, partition)
                if holding == ASSIGNED:
                    self.leases[topic, partition] = generation, lease
                elif holding == REVOKING:  # what was handed over of it is acknowledged: only then frames are read
                    self.subscribe(topic, group, partition=partition, intent=RELEASE)
        elif kind == RESET:
            self.refreshes.append((*body.take("16s16s"), body.text(), *body.take("Iqq")))
            self.forget(*self.refreshes[-1][2:4])
        elif kind in (ACK, READY):
            _, _, code, offset, size = body.take("BBHqH") if kind == ACK else (0, 0, OK, -1, 0)
            self.answers[correlation] = code, offset, body.read(size).decode(), body

    def forget(self, topic: str, partition: int) -> None:
        self.leases.pop((topic, partition), None)
        self.deliveries = deque(each for each in self.deliveries if each[:2] != (topic, partition))

    def publish(self, topic: str, partition: int, records: list[Record]) -> int:
        """One batch, durable: the offset of its first record, also when an earlier connection had sent it."""
        sequence = self.sequences.get((topic, partition), 0)
        batch = encode_batch(records, self.producer, sequence)
        _, offset, _, _ = self.request(PUBLISH, b"\2" + put_text(topic) + pack(">I", partition) + batch)
        self.sequences[topic, partition] = (sequence + len(records)) & 0x7FFFFFFF
        return offset

    def subscribe(self, topic: str, group: str, start=EARLIEST, value=0, partition=-1, intent=JOIN) -> None:
        line = put_text(topic) + pack(">iB16xiq", partition, start, -1, value)
        self.request(SUBSCRIBE, bytes([intent]) + put_text(group) + pack(">IIH", *WINDOW, 1) + line)

    def next_delivery(self) -> Delivery:
        while not self.deliveries:
            self.handle_frame()
        return self.deliveries.popleft()

    def consume(self, count: int) -> Iterator[Record]:
        """Acknowledges what was handed over when more is asked for. What is left over comes when subscribed again."""
        while count > 0:
            delivery = self.next_delivery()
            yield from delivery.records[:count]
            rest, count = delivery.records[count:], count - len(delivery.records)
            self.ack(delivery, rest[0].offset if rest else delivery.last + 1)

    def ack(self, delivery: Delivery, offset: int, kind: int = CUMULATIVE, reason: str = "") -> bool:
        """Everything before offset is done; NEGATIVE: the record there failed. False: the lease was over before."""
        lease = pack(">IIQq", delivery.partition, delivery.generation, delivery.lease, offset)
        body = bytes([kind]) + put_text(delivery.topic) + lease + (put_text(reason) if kind == NEGATIVE else b"")
        if kind == NEGATIVE:
            self.forget(*delivery[:2])
        return self.request(ACK, body, (OK, STALE))[0] == OK

    def ask_refresh(self, topic: str, partition: int) -> None:
        self.request(RESET, bytes(32) + put_text(topic) + pack(">Iqq", partition, 0, 0))

    def refresh(self, load: Callable[[list[Record]], object], replacement: Callable[[], object]) -> None:
        """Follow the RESET that came: load() puts records beside what readers see, then switch() shows them."""
        reset_id, log, topic, partition, following, target = self.refreshes.popleft()
        place = put_text(topic) + pack(">I", partition)
        self.request(RESET, reset_id + log + place + pack(">qq", following, target))
        while following < target:
            delivery = self.next_delivery()
            load(delivery.records)
            following = delivery.last + 1
            self.ack(delivery, following)
        replacement()
        self.request(READY, reset_id + place + pack(">q", following))
