"""Real brokers for tests: the loop in a thread, real sockets on port 0, data in a temporary directory.

RawClient speaks the wire by hand (its own reading of the frame header, not the library's), so that the protocol tests
see the bytes that a client in another language would see.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from edgebroker.broker.broker import Broker
from edgebroker.common import batch
from edgebroker.common.clock import SystemClock
from edgebroker.common.config import Config, load_config
from edgebroker.common.errors import Code
from edgebroker.common.records import Record
from edgebroker.common.types import AckLevel, Start
from edgebroker.network import frames
from edgebroker.network.consumer import Consumer
from edgebroker.network.frames import (
    AckKind,
    Answer,
    Connect,
    ConsumerAck,
    Deliver,
    FrameType,
    Grants,
    Reset,
    Subscribe,
    Wanted,
)
from edgebroker.network.producer import Producer

T = TypeVar("T")
SECONDS = 10.0
HEADER = struct.Struct(">IBBHQ")


def config_for(directory: Path, settings: Mapping[str, object] | None = None) -> Config:
    """A configuration on free loopback ports; `settings` are "section.key" -> value."""
    free = {"node.data_dir": str(directory), "listen.tcp": "127.0.0.1:0", "listen.http": "127.0.0.1:0"}
    return load_config(None, {**free, **(settings or {})}, {})


class RunningBroker:
    """A broker turning in a thread of its own."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.broker = Broker(config, SystemClock())
        self.broker.start()
        self.clean: bool | None = None
        self._failure: BaseException | None = None
        self._clients: list[RawClient] = []
        self._thread = threading.Thread(target=self._run, name="test-broker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.clean = self.broker.run()
        except BaseException as failure:
            self._failure = failure

    @property
    def server(self) -> str:
        host, port = self.broker.tcp_address
        return f"{host}:{port}"

    def stop(self) -> bool:
        """Stop as SIGTERM does; True when the stop was clean. Raises what ended the loop, if something did."""
        self.broker.stop_threadsafe()
        self._thread.join(30.0)
        for client in self._clients:
            client.close()
        if self._failure is not None:
            raise self._failure
        assert not self._thread.is_alive(), "the broker did not stop"
        assert self.clean is not None
        return self.clean

    def call(self, function: Callable[[], T]) -> T:
        """Run something on the loop thread and give back what it returns."""
        found: list[T] = []
        done = threading.Event()

        def work() -> None:
            try:
                found.append(function())
            finally:
                done.set()

        self.broker.loop.call_soon_threadsafe(work)
        assert done.wait(SECONDS)
        return found[0]

    def raw(self, client_id: str = "raw", *, granted: bool = True, receive_buffer: int = 0) -> RawClient:
        """A connected raw client; closed with the broker."""
        client = RawClient(self.broker.tcp_address, receive_buffer)
        self._clients.append(client)
        if granted:
            client.connect(client_id)
        return client

    def http(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One admin request: (status, decoded JSON)."""
        host, port = self.broker.http_address
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"null")
        finally:
            connection.close()

    def counters(self) -> dict[str, Any]:
        return self.http("GET", "/v1/node")[1]["counters"]

    def refused(self, code: Code) -> int:
        return self.counters()["refused_by_code"].get(code.name, 0)

    def create(self, topic: str, **settings: object) -> None:
        status, answer = self.http("POST", "/v1/topics", {"name": topic, **settings})
        assert status == 201, answer

    def producer(self, **options: Any) -> Producer:
        return Producer(self.server, **options)

    def consumer(self, topics: Sequence[str], group: str = "", **options: Any) -> Consumer:
        return Consumer(self.server, topics, group, **options)


@contextmanager
def running(directory: Path, settings: Mapping[str, object] | None = None) -> Iterator[RunningBroker]:
    """A broker with its data in `directory`, stopped at the end whatever happened."""
    broker = RunningBroker(config_for(directory, settings))
    try:
        yield broker
    finally:
        broker.stop()


class RawFrame(NamedTuple):
    type: int
    correlation: int
    body: bytes


class Delivered(NamedTuple):
    """A DELIVER and the records wanted in it."""

    head: Deliver
    records: list[Record]
    batches: bytes

    @property
    def offsets(self) -> list[int]:
        return [record.offset for record in self.records]


class RawClient:
    """Frames by hand over a blocking socket; every wait has a deadline."""

    def __init__(self, address: tuple[str, int], receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(SECONDS)
        self.socket.connect(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._aside: list[RawFrame] = []
        self._correlation = 100
        self.grants: Grants | None = None

    def close(self) -> None:
        self.socket.close()

    def next_correlation(self) -> int:
        self._correlation += 1
        return self._correlation

    # ---- receiving ----

    def _exactly(self, count: int) -> bytes:
        while len(self._rest) < count:
            piece = self.socket.recv(1 << 20)
            if not piece:
                raise EOFError("the broker closed the connection")
            self._rest += piece
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def frame(self) -> RawFrame:
        """The next frame; EOFError at the end of the stream, TimeoutError when nothing comes."""
        length, kind, flags, reserved, correlation = HEADER.unpack(self._exactly(16))
        assert (flags, reserved) == (0, 0)
        return RawFrame(kind, correlation, self._exactly(length - 12))

    def take(self, kind: FrameType, correlation: int | None = None) -> RawFrame:
        """The next frame of a type (and correlation); others are kept for later takes, in order."""
        for rank, found in enumerate(self._aside):
            if found.type == kind and correlation in (None, found.correlation):
                return self._aside.pop(rank)
        while True:
            found = self.frame()
            if found.type == kind and correlation in (None, found.correlation):
                return found
            self._aside.append(found)

    def answer(self, correlation: int | None = None) -> Answer:
        answer = frames.read_ack(memoryview(self.take(FrameType.ACK, correlation).body))
        assert isinstance(answer, Answer)
        return answer

    def deliver(self) -> Delivered:
        body = self.take(FrameType.DELIVER).body
        head = frames.read_deliver(memoryview(body))
        raw = body[head.batches_start :]
        return Delivered(head, batch.decode(raw, head.topic, head.partition, head.first, head.last), raw)

    def reset(self) -> Reset:
        return frames.read_reset(memoryview(self.take(FrameType.RESET).body))

    def silent(self, kind: FrameType | None = None) -> bool:
        """True when nothing (of that type) had been sent before the answer to a request that we make now."""
        self.subscribe_raw(Subscribe(True, "no-such-group" if not self._group else self._group, 0, 0, []))
        return not any(kind in (None, found.type) for found in self._aside if found.type != FrameType.HEARTBEAT)

    def ended(self) -> bool:
        """True when the broker closes the connection; what it sends before that is dropped."""
        try:
            while True:
                self.frame()
        except (EOFError, ConnectionResetError):
            return True

    # ---- sending ----

    _group = ""

    def send(self, *data: bytes) -> None:
        self.socket.sendall(b"".join(data))

    def connect(self, client_id: str = "raw", *, version: int = frames.PROTOCOL_VERSION, **fields: Any) -> Grants:
        values = {"flags": 0, "token": b"", "producer_id": -1, "producer_epoch": -1, "topics": [], **fields}
        correlation = self.next_correlation()
        self.send(frames.write_connect(correlation, Connect(version=version, client_id=client_id, **values)))
        found = self.take(FrameType.ACK, correlation)
        answer = frames.read_ack(memoryview(found.body))
        assert isinstance(answer, Answer)
        assert answer.code is Code.OK, answer
        self.grants = frames.read_grants(memoryview(found.body), answer.extra_start)
        return self.grants

    def publish(
        self, topic: str, *batches: bytes, partition: int = 0, level: int = AckLevel.DURABLE, wait: bool = True
    ) -> Answer:
        """One frame; its answer (with `wait`)."""
        correlation = self.next_correlation()
        self.send(frames.write_publish(correlation, frames.publish_prefix(level, topic, partition), b"".join(batches)))
        return self.answer(correlation) if wait else Answer(Code.OK, -1, "", 0)

    def subscribe_raw(self, subscribe: Subscribe) -> Answer:
        correlation = self.next_correlation()
        self._group = subscribe.group
        self.send(frames.write_subscribe(correlation, subscribe))
        return self.answer(correlation)

    def subscribe(
        self,
        topic: str,
        group: str = "group",
        *,
        start: Start = Start.EARLIEST,
        value: int = 0,
        partition: int = -1,
        log_id: bytes = frames.NO_LOG_ID,
        records: int = 0,
        size: int = 0,
    ) -> Answer:
        wanted = [Wanted(topic, partition, start, log_id, -1, value)]
        return self.subscribe_raw(Subscribe(False, group, records, size, wanted))

    def leave(self, topic: str, partition: int = -1) -> Answer:
        wanted = [Wanted(topic, partition, Start.COMMITTED, frames.NO_LOG_ID, -1, 0)]
        return self.subscribe_raw(Subscribe(True, self._group, 0, 0, wanted))

    def ack(self, head: Deliver, offset: int, *, wait: bool = True, **changes: Any) -> Answer | None:
        """Acknowledge everything before `offset` under the lease of a DELIVER."""
        correlation = self.next_correlation() if wait else 0
        ack = ConsumerAck(AckKind.CUMULATIVE, head.topic, head.partition, head.generation, head.lease, offset)
        self.send(frames.write_consumer_ack(correlation, ack._replace(**changes)))
        return self.answer(correlation) if wait else None


def batch_of(*values: bytes, **options: Any) -> bytes:
    """One batch with these values."""
    return batch.encode([(None, value, 1000 + rank) for rank, value in enumerate(values)], **options)


def numbered(first: int, count: int, size: int = 0) -> bytes:
    """One batch whose values are b"%d" of first, first + 1, ..., padded to `size`."""
    return batch_of(*(b"%d" % (first + rank) + b"." * max(0, size - 10) for rank in range(count)))
