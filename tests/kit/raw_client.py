"""A client that speaks the wire by hand.

It reads the frame header itself, not with the library, so that the protocol tests see the bytes that a client in
another language would see; and it holds the broker to what every lease promises (LeaseWatch).
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, NamedTuple

from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, Holding, Wanted
from edgebroker.common.records import Record
from edgebroker.common.types import AckLevel, Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Answer, Connect, Deliver, FrameType, Grants, Intent, Ready, Reset, Subscribe

SECONDS = 30.0
HEADER = struct.Struct(">IBBHQ")


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


class Notice(NamedTuple):
    """One line of a broker's SUBSCRIBE. It can be acknowledged under, like the head of a DELIVER."""

    group: str
    generation: int
    topic: str
    partition: int
    holding: Holding
    lease: int
    offset: int


class Lease(NamedTuple):
    """What a client may be delivered: from where on, under which lease; nothing more while it is being revoked."""

    lease: int
    generation: int
    expected: int
    revoking: bool


class LeaseWatch:
    """What every client may rely on, checked for every frame of every test: deliveries begin at the offset of the
    ASSIGNED before them, without gaps, under its lease, and end with REVOKING."""

    def __init__(self) -> None:
        self._leases: dict[tuple[str, int], Lease] = {}

    def notices(self, body: bytes) -> list[Notice]:
        assigned = frames.read_assigned(memoryview(body))
        found = [Notice(assigned.group, assigned.generation, *line) for line in assigned.lines]
        for notice in found:
            key, lease = (notice.topic, notice.partition), Lease(notice.lease, notice.generation, notice.offset, False)
            if notice.holding is Holding.ASSIGNED:
                assert lease.lease != self._leases.get(key, lease._replace(lease=-1)).lease
                self._leases[key] = lease
            elif notice.holding is Holding.REVOKING:
                self._leases[key] = self._leases.get(key, lease)._replace(revoking=True)
            else:
                self._leases.pop(key, None)
        return found

    def delivered(self, body: bytes) -> None:
        head = frames.read_deliver(memoryview(body))
        lease = self._leases.get((head.topic, head.partition))
        assert lease == (head.lease, head.generation, head.first, False), f"{lease} does not allow {head}"
        assert lease is not None
        self._leases[head.topic, head.partition] = lease._replace(expected=head.last + 1)


def write_publish(correlation: int, prefix: bytes, batches: bytes) -> bytes:
    """A PUBLISH frame; `prefix` is of publish_prefix()."""
    size = len(prefix) + len(batches) + 12
    return frames.HEADER.pack(size, FrameType.PUBLISH, 0, 0, correlation) + prefix + batches


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
        self._watch = LeaseWatch()
        self._notices: list[Notice] = []
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
        body = self._exactly(length - 12)
        if kind == FrameType.SUBSCRIBE:
            assert correlation == 0
            self._notices += self._watch.notices(body)
        elif kind == FrameType.DELIVER:
            self._watch.delivered(body)
        return RawFrame(kind, correlation, body)

    def _frame_before(self, deadline: float) -> RawFrame:
        """The next frame; heartbeats do not put the deadline off."""
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not come")
        return self.frame()

    def take(self, kind: FrameType, correlation: int | None = None) -> RawFrame:
        """The next frame of a type (and correlation); others are kept for later takes, in order."""
        for rank, found in enumerate(self._aside):
            if found.type == kind and correlation in (None, found.correlation):
                return self._aside.pop(rank)
        deadline = time.monotonic() + SECONDS
        while True:
            found = self._frame_before(deadline)
            if found.type == kind and correlation in (None, found.correlation):
                return found
            if found.type != FrameType.SUBSCRIBE:
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

    def notice(self, holding: Holding | None = None, partition: int | None = None) -> Notice:
        """What the broker said next about a partition (this one, that) that comes or goes; others are kept."""
        deadline = time.monotonic() + SECONDS
        while True:
            for rank, found in enumerate(self._notices):
                if holding in (None, found.holding) and partition in (None, found.partition):
                    return self._notices.pop(rank)
            frame = self._frame_before(deadline)
            if frame.type != FrameType.SUBSCRIBE:
                self._aside.append(frame)

    def assigned(self, partition: int | None = None) -> Notice:
        return self.notice(Holding.ASSIGNED, partition)

    def notices(self) -> list[Notice]:
        """Every notice that had been sent before the answer to a request that we make now."""
        self._touch()
        found, self._notices = self._notices, []
        return found

    def silent(self, kind: FrameType | None = None) -> bool:
        """True when nothing (of that type) had been sent before the answer to a request that we make now; notices are
        not counted."""
        self._touch()
        return not any(kind in (None, found.type) for found in self._aside if found.type != FrameType.HEARTBEAT)

    def _touch(self) -> None:
        self.subscribe_raw(Subscribe(Intent.RELEASE, self._group or "no-such-group", 0, 0, []))

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
        self.send(write_publish(correlation, frames.publish_prefix(level, topic, partition), b"".join(batches)))
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
        log_id: bytes = NO_LOG_ID,
        records: int = 0,
        size: int = 0,
    ) -> Answer:
        wanted = [Wanted(topic, partition, start, log_id, -1, value)]
        return self.subscribe_raw(Subscribe(Intent.JOIN, group, records, size, wanted))

    def leave(self, topic: str, partition: int = -1) -> Answer:
        return self._give_back(Intent.LEAVE, topic, partition)

    def release(self, topic: str, partition: int) -> Answer:
        """Give back a partition that is being revoked, whatever of it is in flight."""
        return self._give_back(Intent.RELEASE, topic, partition)

    def _give_back(self, intent: Intent, topic: str, partition: int) -> Answer:
        wanted = [Wanted(topic, partition, Start.COMMITTED, NO_LOG_ID, -1, 0)]
        return self.subscribe_raw(Subscribe(intent, self._group, 0, 0, wanted))

    def ack(self, head: Deliver | Notice, offset: int, *, wait: bool = True, **changes: Any) -> Answer | None:
        """Acknowledge everything before `offset` under the lease of a DELIVER."""
        correlation = self.next_correlation() if wait else 0
        ack = ConsumerAck(AckKind.CUMULATIVE, head.topic, head.partition, head.generation, head.lease, offset)
        self.send(frames.write_consumer_ack(correlation, ack._replace(**changes)))
        return self.answer(correlation) if wait else None

    def acked(self, head: Deliver | Notice, offset: int, **changes: Any) -> Code:
        """The answer to an acknowledgement of any kind."""
        answer = self.ack(head, offset, **changes)
        assert answer is not None
        return answer.code

    def nack(self, head: Deliver | Notice, offset: int, reason: str = "") -> Code:
        """Say that the record at `offset` could not be handled, and that everything before it was."""
        return self.acked(head, offset, kind=AckKind.NEGATIVE, reason=reason)

    def in_progress(self, head: Deliver | Notice) -> Code:
        return self.acked(head, 0, kind=AckKind.IN_PROGRESS)

    # ---- refreshing ----

    def ask_reset(self, topic: str, partition: int = 0) -> Answer:
        """Ask for a refresh of a partition that we hold."""
        return self._send_reset(Reset(frames.NO_RESET, NO_LOG_ID, topic, partition, 0, 0))

    def accept(self, reset: Reset, from_offset: int | None = None) -> Answer:
        """Accept a refresh, from its beginning or where we stand in it."""
        return self._send_reset(reset if from_offset is None else reset._replace(from_offset=from_offset))

    def _send_reset(self, reset: Reset) -> Answer:
        correlation = self.next_correlation()
        self.send(frames.write_reset(correlation, reset))
        return self.answer(correlation)

    def send_ready(self, reset: Reset, next_offset: int) -> int:
        """Say that a refresh is done; the correlation of the answer."""
        correlation = self.next_correlation()
        self.send(frames.write_ready(correlation, Ready(reset.reset_id, reset.topic, reset.partition, next_offset)))
        return correlation

    def ready(self, reset: Reset, next_offset: int) -> Ready:
        """The broker's READY to ours; what refuses it is found with answer(send_ready(...))."""
        return frames.read_ready(memoryview(self.take(FrameType.READY, self.send_ready(reset, next_offset)).body))
