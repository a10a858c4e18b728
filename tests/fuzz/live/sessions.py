"""Sessions of the binary protocol, of clients that react to what the broker says and get some of their frames wrong."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from edgebroker.common import batch
from edgebroker.common.codecs import CodecName
from edgebroker.common.errors import Code, RemoteProtocolError
from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, Wanted
from edgebroker.common.types import Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Connect, FrameType, Intent, Ready, Reset, Subscribe
from tests.fuzz.live.mutation import cut, mutated
from tests.fuzz.live.node import LOG, Finding, Node, Peer
from tests.fuzz.live.target import Target
from tests.kit.brokers import numbered
from tests.kit.raw_client import HEADER, write_publish

TOPICS = ["t", "table", "u", "v.dlq", "", "a" * 255]
GROUPS = ["h", "k", ""]
NUMBERS = [-1, 0, 1, 5, 15, 1 << 31, (1 << 62) + 1, -(1 << 63), (1 << 63) - 1]
LOG_IDS = [NO_LOG_ID, bytes.fromhex(LOG), b"\xff" * 16]
T = TypeVar("T")
READERS = {
    FrameType.SUBSCRIBE: frames.read_assigned,
    FrameType.DELIVER: frames.read_deliver,
    FrameType.ACK: frames.read_ack,
    FrameType.HEARTBEAT: frames.read_heartbeat,
    FrameType.RESET: frames.read_reset,
    FrameType.READY: frames.read_ready,
}


class Sessions(Target):
    settings = {"delivery.max_attempts": 2, "delivery.backoff_ms": 1}

    def play(self, node: Node, random: Random) -> None:
        """One session; one in three does nothing wrong."""
        client = _Client(random)
        peer = node.connect("tcp", tcp=random.random() < 0.1)
        if random.random() < 0.97:
            peer.send(
                frames.write_connect(1, Connect(1, random.randrange(4), f"c{random.randrange(20)}", b"", -1, -1, ["t"]))
            )
        wrong = random.choice((0.0, 0.05, 0.2))
        for _ in range(random.choice((1, 3, 10, 30))):
            data = b"".join(client.frame() for _ in range(random.choice((1, 1, 2, 5))))
            if random.random() < wrong:
                data = mutated(random, data) if random.random() < 0.6 else client.misdrawn(data)
            for piece in cut(random, data):
                peer.send(piece)
            if random.random() < 0.2:
                node.turn(0.0005)
            client.hear(peer)
            if peer.over:
                break
        if random.random() < 0.003:
            peer.send(b"")
            client.hear(peer)
        peer.close()


class _Client:
    def __init__(self, random: Random) -> None:
        self._random, self._correlation = random, 1
        # What was assigned last, as (topic, partition, generation, lease, offset); the last refresh.
        self._lease = ("t", 0, 1, 1 << 40, 0)
        self._producer, self._sequence = (-1, -1), 0
        self._reset = Reset(frames.NO_RESET, NO_LOG_ID, "t", 0, 0, 0)

    def hear(self, peer: Peer) -> None:
        """What the broker said; all of it has to be right."""
        for kind, _, body in peer.frames():
            view = memoryview(body)
            try:
                found = READERS[FrameType(kind)](view)
            except (RemoteProtocolError, ValueError, KeyError) as error:
                raise Finding(
                    f"the broker sent a frame of type {kind} that is none: {error}: {body[:200]!r}"
                ) from error
            if isinstance(found, frames.Assigned):
                for line in found.lines:
                    self._lease = (line.topic, line.partition, found.generation, line.lease, max(0, line.offset))
            elif isinstance(found, frames.Deliver):
                self._lease = (found.topic, found.partition, found.generation, found.lease, found.last + 1)
                self._check(found, body)
            elif isinstance(found, frames.Answer) and found.extra_start < len(body):
                grants = frames.read_grants(view, found.extra_start)
                if self._producer != (grants.producer_id, grants.producer_epoch):
                    self._producer, self._sequence = (grants.producer_id, grants.producer_epoch), 0
            elif isinstance(found, Reset):
                self._reset = found

    def _check(self, head: frames.Deliver, body: bytes) -> None:
        try:
            batch.decode(body[head.batches_start :], head.topic, head.partition, head.first, head.last)
        except Exception as error:
            raise Finding(f"what is delivered cannot be read: {error!r}: {head}") from error

    def misdrawn(self, data: bytes) -> bytes:
        """The first frame with another header."""
        size, kind, flags, reserved, correlation = HEADER.unpack_from(data)
        match self._random.randrange(4):
            case 0:
                size = self._random.choice((0, 11, 12, size - 1, size + 1, 1 << 23, (64 << 20) + 1, (1 << 32) - 1))
            case 1:
                kind = self._random.randrange(12)
            case 2:
                flags, reserved = self._random.choice(((1, 0), (0, 1), (255, 65535)))
            case _:
                correlation = self._random.choice((0, 1, (1 << 64) - 1))
        return HEADER.pack(size, kind, flags, reserved, correlation) + data[HEADER.size :]

    def frame(self) -> bytes:
        """What a client may say next."""
        random = self._random
        self._correlation += 1
        number = self._usual(self._correlation, [0])
        topic = self._usual(random.choice(("t", "t", "t", "table", "u")), TOPICS)
        match random.randrange(10):
            case 0 | 1:
                level = self._usual(random.choice((0, 1, 2, 2)), [3, 3, 3, 4])
                prefix = frames.publish_prefix(level, topic, self._usual(0, [1, 99, (1 << 32) - 1]))
                return write_publish(number, prefix, b"".join(self._batch() for _ in range(random.choice((1, 1, 2)))))
            case 2 | 3:
                lines = [self._wanted(topic) for _ in range(self._usual(1, [0, 2, 3]))]
                window = self._usual((0, 0), [(1, 1), (10, 100), ((1 << 32) - 1, (1 << 32) - 1)])
                intent = random.choice((Intent.JOIN, Intent.JOIN, Intent.JOIN, Intent.LEAVE, Intent.RELEASE))
                return frames.write_subscribe(number, Subscribe(intent, self._usual("g", GROUPS), *window, lines))
            case 4 | 5 | 6:
                lease_topic, partition, generation, lease, offset = self._lease
                offset = self._usual(offset, [0, max(0, offset - 1), min(offset + 1, NUMBERS[-1]), *NUMBERS])
                kind = random.choice((AckKind.CUMULATIVE, AckKind.CUMULATIVE, *list(AckKind)[2:]))
                reason = random.choice(("", "no", "\0", "é" * 100))
                lease = self._usual(lease, [0, lease ^ 1, (1 << 64) - 1])
                ack = ConsumerAck(kind, self._usual(lease_topic, TOPICS), partition, generation, lease, offset, reason)
                return frames.write_consumer_ack(number, ack)
            case 7:
                asked = self._usual(self._reset, [Reset(frames.NO_RESET, NO_LOG_ID, topic, 0, 0, 0)] * 5)
                asked = asked._replace(from_offset=self._usual(asked.from_offset, NUMBERS))
                if random.random() < 0.5:
                    return frames.write_reset(number, asked)
                return frames.write_ready(number, Ready(asked.reset_id, asked.topic, asked.partition, asked.target))
            case 8:
                fields = (random.randrange(4), f"c{random.randrange(20)}", b"x" * random.randrange(3))
                producer = self._usual(self._producer, [(-1, -1), (1, 0), (-(1 << 63), 32767), (5, -1)])
                topics = random.choices(TOPICS, k=self._usual(2, [0, 1000, 1001]))
                return frames.write_connect(number, Connect(self._usual(1, [0, 65535]), *fields, *producer, topics))
            case _:
                return self._usual(
                    frames.write_heartbeat([(topic, 0, 5)]),
                    [frames.write_answer(number, Code.OK, "x"), frames.write_heartbeat([(topic, 0, 5)] * 1001)],
                )

    def _usual(self, usual: T, odd: Sequence[T]) -> T:
        """What is right, nearly always."""
        return usual if self._random.random() < 0.93 else self._random.choice(odd)

    def _wanted(self, topic: str) -> Wanted:
        start = self._usual(self._random.choice((Start.COMMITTED, Start.EARLIEST)), list(Start))
        partition = self._usual(-1, [0, 1, 99, -2, (1 << 31) - 1])
        epoch = self._usual(-1, [0, 1, (1 << 31) - 1, -(1 << 31)])
        return Wanted(topic, partition, start, self._random.choice(LOG_IDS), epoch, self._usual(0, NUMBERS))

    def _batch(self) -> bytes:
        random = self._random
        rows = [
            (random.choice((None, b"", b"k")), random.choice((None, b"", b"v" * 50)), 1000)
            for _ in range(random.randrange(1, 4))
        ]
        codecs: list[CodecName] = ["none", "none", "none", "gzip", "lz4", "zstd"]
        sequence = self._usual(self._sequence, [0, 5, self._sequence - 1]) if self._producer[0] >= 0 else -1
        self._sequence += len(rows)
        made = batch.encode(
            rows,
            codec=random.choice(codecs),
            base_sequence=sequence,
            producer_id=self._producer[0],
            producer_epoch=self._producer[1],
        )
        wrong = random.random()
        if wrong < 0.04:
            return mutated(random, made)
        return numbered(0, 2, 5000) if wrong < 0.1 else made
