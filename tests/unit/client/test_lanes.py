"""Producers whatever happens: refusals, lost connections, timeouts, topics that are created again.

A real Sender with a real accumulator talks, without sockets and threads, to brokers whose partitions are real stages.
Whatever the schedule: what is acknowledged is stored once, what is refused is not stored, and what one partition holds
of a key is in the order in which it was sent.
"""

from __future__ import annotations

import os
import random
import struct
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import pytest

from edgebroker.client.credentials import Credentials
from edgebroker.client.publish import sender as module
from edgebroker.client.publish.accumulator import Sent, TopicBatches
from edgebroker.client.publish.sender import Sender
from edgebroker.common import batch
from edgebroker.common.errors import AnswerError, Code
from edgebroker.common.messages import PublishRun
from edgebroker.common.spans import SPAN
from edgebroker.common.types import AckLevel
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Connection, ReceiveBuffer, Role
from edgebroker.network.wire.frames import Answer, Grants, TopicMetadata
from edgebroker.storage.log.staging import Stage
from tests.kit.clock import ManualClock, ManualScheduler

SCHEDULES = int(os.environ.get("EB_LANE_SCHEDULES", "60"))
MAX = 1 << 20
WINDOW = 4
# Later than any batch was begun, which the accumulator dates by the machine's clock.
NOW = 1e9
FOR_GOOD = (Code.TOO_LARGE, Code.INVALID_BATCH, Code.NOT_ORIGIN)
LATER = (Code.DISK_FULL, Code.STORAGE_TIMEOUT, Code.OVERLOADED)


class Loop(ManualScheduler):
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


class Partition:
    """A stage and what it holds: (offset, key, value) in order."""

    def __init__(self) -> None:
        self.stage = Stage(0, 0, MAX, MAX, WINDOW)
        self.records: list[tuple[int, bytes | None, bytes]] = []

    def append(self, raw: bytes) -> tuple[Code, int]:
        answers, *_ = self.stage.append(b"\0" + raw, struct.pack("=QII", 0, 1, 1 + len(raw)), 0.0)
        offset, code, _ = struct.unpack("=qii", answers)
        while (chunk := self.stage.take(MAX)) is not None:
            for record in batch.decode(bytes(chunk), "", 0):
                self.records.append((record.offset, record.key, record.value or b""))
        return Code(code), offset


class Broker:
    """What a broker does to a producer, as a schedule says: `inbox` holds publishes that it has not seen, `outbox`
    answers that the producer has not seen."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.link: Link | None = None
        self.topics: dict[str, list[Partition]] = {}
        self.past: list[tuple[str, int, Partition]] = []
        self.epoch = 0
        self.inbox: deque[tuple[int, str, int, bytes]] = deque()
        self.outbox: deque[tuple[int, Answer]] = deque()
        self.calm = False

    def create(self, topic: str, partitions: int) -> None:
        if topic in self.topics and self.link is not None:
            self.link.lost(0)  # a broker ends the connections of producers when a topic is deleted
        self.past += [(topic, number, old) for number, old in enumerate(self.topics.get(topic, []))]
        self.topics[topic] = [Partition() for _ in range(partitions)]

    def grants(self, connect: frames.Connect) -> Grants:
        if connect.producer_epoch < 0 or connect.flags & frames.NEW_EPOCH:
            self.epoch += 1
        topics = [
            TopicMetadata(
                name, Code.OK if name in self.topics else Code.UNKNOWN_TOPIC, len(self.topics.get(name, [])), ""
            )
            for name in connect.topics
        ]
        return Grants(1, b"u" * 16, 1000, 5000, MAX, MAX, MAX, WINDOW, MAX, 1000, 7, self.epoch, topics)

    def handle(self) -> None:
        """One publish."""
        correlation, topic, partition, raw = self.inbox.popleft()
        code, offset = self.decide(topic, partition, raw)
        if code is Code.OK or self.rng.random() < 0.5:
            self.outbox.append((correlation, Answer(code, offset, code.name, 0)))
        else:  # a refusal does not wait for the disk: it overtakes
            self.outbox.appendleft((correlation, Answer(code, offset, code.name, 0)))

    def decide(self, topic: str, partition: int, raw: bytes) -> tuple[Code, int]:
        logs = self.topics.get(topic, [])
        if partition >= len(logs):
            return Code.UNKNOWN_TOPIC, -1
        luck = 1.0 if self.calm else self.rng.random()
        if luck < 0.08:
            return self.rng.choice(FOR_GOOD), -1
        if luck < 0.16:
            return self.rng.choice(LATER), -1
        code, offset = logs[partition].append(raw)
        if code is Code.OK and luck < 0.20:
            return Code.NOT_REPLICATED, -1
        return code, offset

    def answer(self) -> None:
        correlation, answer = self.outbox.popleft()
        if self.link is not None and self.link.up:
            self.link.sender.on_answer(correlation, answer)


class Link:
    """edgebroker.client.link.Link, to a Broker."""

    def __init__(
        self, loop: Loop, server: str, client_id: str, sender: Sender, *, credentials: Credentials, connect_body: Any
    ) -> None:
        self.loop, self.server, self.client_id, self.sender, self.token = (
            loop,
            server,
            client_id,
            sender,
            credentials.token,
        )
        self.connect_body: Callable[[], frames.Connect] = connect_body
        self.grants: Grants | None = None
        self.broker: Broker | None = None
        self.correlation = 0
        self.buffer = ReceiveBuffer()
        self.closed = False

    @property
    def up(self) -> bool:
        return self.grants is not None

    def next_correlation(self) -> int:
        self.correlation += 1
        return self.correlation

    def open(self) -> None:
        if self.broker is not None and not self.up and not self.closed:
            self.connection = Connection(Role.BROKER, MAX)
            self.connection.granted = True
            self.grants = self.broker.grants(self.connect_body())
            self.sender.connected(self.grants)

    def lost(self, seen: int = 1 << 30) -> None:
        """The connection ends; the broker has handled so many of the publishes on their way, answers are gone."""
        if self.up and self.broker is not None:
            self.grants = None
            while self.broker.inbox and seen:
                self.broker.handle()
                seen -= 1
            self.broker.inbox.clear()
            self.broker.outbox.clear()
            self.sender.disconnected("lost")

    def reconnect(self, reason: str, pause: float = 0.0) -> None:
        self.lost(cast("Broker", self.broker).rng.randrange(3))
        self.open()

    def send(self, data: bytes) -> bool:
        assert self.up and self.broker is not None
        self.buffer.room[: len(data)] = data
        for event in self.connection.receive(self.buffer, len(data)):
            assert isinstance(event, PublishRun)
            for correlation, start, end in SPAN.iter_unpack(event.spans):
                self.broker.inbox.append((correlation, event.topic, event.partition, bytes(event.data[start:end])))
        return True

    def request(self, correlation: int, data: bytes, done: Callable[[Answer, memoryview], None]) -> bool:
        """CONNECT for metadata; the answer comes in a later turn, unless the connection is another one by then."""
        assert self.broker is not None
        connect, broker, grants = frames.read_connect(memoryview(data)[16:]), self.broker, self.grants

        def answer() -> None:
            if self.grants is grants:
                raw = memoryview(frames.write_grants(correlation, broker.grants(connect)))[16:]
                found = frames.read_ack(raw)
                assert isinstance(found, Answer)
                done(found, raw)

        self.loop.call_later(0.01, answer)
        return True

    def close(self) -> None:
        self.closed = True


class World:
    def __init__(self, seed: int, level: AckLevel = AckLevel.DURABLE) -> None:
        self.rng = random.Random(seed)
        self.clock = ManualClock(NOW)
        self.loop = Loop(self.clock)
        self.broker = Broker(self.rng)
        self.sent: list[tuple[str, bytes | None, int, Sent]] = []
        with patch.object(module, "Loop", lambda clock, slow_level: self.loop), patch.object(module, "Link", Link):
            self.sender = Sender(
                cast("Any", "broker:1"), client_id="p", credentials=Credentials(), level=level, codec=0,
                linger_seconds=0.0, timeout=None, batch_records=3, batch_bytes=MAX, max_unacked=1 << 20,
                max_unacked_bytes=1 << 30,
            )  # fmt: skip
        self.link = cast("Link", self.sender.link)
        self.link.broker, self.broker.link = self.broker, self.link
        self.sender.open_topic = self.open_topic  # type: ignore[method-assign]
        self.loop.turn()

    def open_topic(self, name: str) -> TopicBatches:
        """What a caller's thread waits for."""
        grants = self.broker.grants(frames.Connect(1, 0, "p", b"", 7, 0, [name]))
        self.sender._learn(grants)
        return TopicBatches(name, grants.topics[0].partitions)

    def send(self, topic: str) -> None:
        key = self.rng.choice((None, b"a", b"b", b"c", b"d"))
        number = len(self.sent)
        chosen = 0 if self.rng.random() < 0.1 else -1
        self.sent.append(
            (topic, key if chosen < 0 else None, number,
             self.sender.accumulator.send(topic, b"%d" % number, key, partition=chosen))
        )  # fmt: skip

    def step(self, recreate: bool) -> None:
        act = self.rng.random()
        if act < 0.35:
            self.send(self.rng.choice(sorted(self.broker.topics)))
        elif act < 0.60 and self.broker.inbox:
            self.broker.handle()
        elif act < 0.80 and self.broker.outbox:
            self.broker.answer()
        elif act < 0.83:
            self.link.lost(self.rng.randrange(4))
        elif act < 0.835 and recreate:
            self.broker.create(self.rng.choice(sorted(self.broker.topics)), self.rng.randrange(1, 5))
        elif act < 0.84:
            self.expire()
        else:
            self.pass_time(0.02)

    def expire(self) -> None:
        """So much time passes that some of the batches are too old."""
        lanes = self.sender._lanes.values()
        times = sorted(found.created for lane in lanes for found in (*lane.in_flight, *lane.queue))
        if times:
            self.sender._timeout = NOW - self.rng.choice(times)
            self.clock.seconds, before = NOW, self.clock.seconds
            self.sender._expire()
            self.sender._timeout, self.clock.seconds = None, before

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.loop.turn()
        if not self.link.up and self.rng.random() < 0.5:
            self.link.open()

    def finish(self) -> None:
        """A broker that behaves answers everything."""
        self.broker.calm = True
        for _ in range(5000):
            self.pass_time(0.05)
            while self.broker.inbox:
                self.broker.handle()
            while self.broker.outbox:
                self.broker.answer()
            if self.sender.accumulator.unacked == 0:
                return
        raise AssertionError(f"{self.sender.accumulator.unacked} records are never answered")

    def check(self) -> None:
        logs = self.broker.past + [
            (topic, number, log) for topic, logs in self.broker.topics.items() for number, log in enumerate(logs)
        ]
        times: dict[int, int] = defaultdict(int)
        for topic, number, log in logs:
            seen: set[bytes] = set()
            latest: dict[bytes | None, int] = {}
            for _, _, value in log.records:
                assert value not in seen, f"{topic}/{number} has record {value!r} twice"
                seen.add(value)
                times[int(value)] += 1
                key = self.sent[int(value)][1]
                if key is not None:
                    assert latest.get(key, -1) < int(value), f"{topic}/{number}: key {key!r} goes back to {value!r}"
                    latest[key] = int(value)
        for _, _, number, sent in self.sent:
            error = sent.exception(0.0)
            if error is None:
                assert times[number] >= 1, f"record {number} was acknowledged, and is not stored"
            elif isinstance(error, AnswerError):
                assert times[number] == 0 or error.code in (Code.UNKNOWN_TOPIC, *FOR_GOOD), f"{number}: {error}"
        for topic, partitions in self.broker.topics.items():
            for number, log in enumerate(partitions):
                for _, _, value in log.records:
                    key = self.sent[int(value)][1]
                    if key is not None:
                        assert batch.partition_for(key, len(partitions)) == number, f"{topic}: {value!r} is misplaced"


@pytest.mark.parametrize("seed", range(SCHEDULES))
@pytest.mark.parametrize("recreate", [False, True], ids=["same topics", "topics that are created again"])
def test_whatever_is_refused_lost_or_late(seed: int, recreate: bool) -> None:
    world = World(seed)
    world.broker.create("sales", 2)
    world.broker.create("stock", 1)
    for _ in range(600):
        world.step(recreate)
    world.finish()
    world.check()
