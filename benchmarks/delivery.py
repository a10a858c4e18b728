"""Groups and fan-out: many readers of one topic, drains with acknowledgements, laggards, partitions that move."""

from __future__ import annotations

import selectors
import socket
import statistics
import subprocess
import sys
import time

from benchmarks.node import Node, running
from benchmarks.rows import DURABLE, RUNS, Row, fill, median_of, number, peer_row, scaled
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench import native_client
from edgebroker.cli.bench.disk import percentile
from edgebroker.client.producer import Producer
from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, Holding, Wanted
from edgebroker.common.types import Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Connection, Frame, ReceiveBuffer, Role
from edgebroker.network.wire.frames import Connect, FrameType, Intent, Subscribe

READERS, LAGGARDS = 1000, 10
MEMBERS, PARTITIONS = 10, 20
PUSHES, PUSH_RATE = 200, 10.0
GIGABYTE = 1_000_000_000


def fanout(pinned: bool) -> list[Row]:
    ready = []
    with running(pinned=pinned) as node:

        def measure(run: int) -> float:
            name = b"fan%d" % run
            seconds, _, _ = native_client.fanout(node.host, node.port, name, 100, 20_000, 128, 100, 0.0, name)
            return 100 * 20_000 / seconds

        values = median_of(measure)
        for run in range(RUNS):
            name = b"many%d" % run
            ready.append(native_client.fanout(node.host, node.port, name, READERS, 1, 128, 1, 0.0, name)[1])
    together = statistics.median(ready)
    return [
        peer_row("fan-out, 1 producer, 100 consumers, 20,000 x 128 B", values, number("fanout"), 1.2, "best peer"),
        Row(
            f"{READERS:,} consumers connect, subscribe and receive",
            f"{together * 1000:.0f} ms",
            "seconds",
            together,
            "2 s",
            together <= 2.0,
        ),
    ]


def acknowledged(pinned: bool) -> list[Row]:
    """Every delivery acknowledged on its own, the committed offset committed."""
    count = 1_000_000
    with running(pinned=pinned) as node:
        native_client.produce(node.host, node.port, b"acked", count, 128, 100, 10_000, DURABLE, b"acked")

        def drain(run: int, window: int) -> float:
            group = b"g%d-%d" % (window, run)
            return count / native_client.consume(node.host, node.port, b"acked", group, count, window, b"acked")

        best = number("acknowledged_drain")
        return [
            peer_row(
                f"drain 1 M, every delivery acknowledged, window {window:,}",
                median_of(lambda run, window=window: drain(run, window)),  # type: ignore[misc]
                best,
                5.0,
                "best of Redis XACK, NATS explicit",
            )
            for window in (10_000, 1_000)
        ]


def laggards(pinned: bool) -> list[Row]:
    """Readers at the end of a topic, without and with others that read it from its beginning, again and again."""
    with running(pinned=pinned, settings={"EDGEBROKER_LIMITS_STUCK_TIMEOUT_MS": "60000"}) as node:
        count = fill(node, int(GIGABYTE * min(1.0, scaled(1_000_000) / 1_000_000)))

        def pushes(run: str) -> tuple[float, float]:
            name = run.encode()
            times = native_client.fanout(node.host, node.port, b"fill", READERS, PUSHES, 128, 1, PUSH_RATE, name)[2]
            return percentile(times, 0.99), node.memory()[0]

        ratios, extra, p99s = [], [], []
        for run in range(RUNS):
            alone, before = pushes(f"alone{run}")
            readers = subprocess.Popen(
                [sys.executable, "-c", _LAGGARDS, node.host.decode(), str(node.port), str(count), str(LAGGARDS)]
            )
            try:
                time.sleep(1.0)
                beside, after = pushes(f"beside{run}")
                assert readers.poll() is None, "the laggards ended early"
            finally:
                readers.terminate()
                readers.wait()
            ratios.append(beside / alone)
            extra.append(after - before)
            p99s.append((alone * 1000, beside * 1000))
    ratio, memory = statistics.median(ratios), statistics.median(extra)
    alone_ms, beside_ms = (statistics.median(values) for values in zip(*p99s, strict=True))
    return [
        Row(
            f"push p99 to {READERS:,} consumers with {LAGGARDS} laggards",
            f"{beside_ms:.1f} ms",
            f"{alone_ms:.1f} ms without",
            ratio,
            "2.0",
            ratio <= 2.0,
        ),
        Row("resident memory with the laggards", f"{memory:+.1f} MiB", "without", memory, "+32 MiB", memory <= 32),
    ]


_LAGGARDS = """
import os, sys, threading
from edgebroker.cli.bench import native_client
host, port, count, readers = sys.argv[1].encode(), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
os.nice(10)  # the measuring client shall not wait for a core because of these
def lag(rank):
    for turn in range(1000):
        native_client.consume(host, port, b"fill", b"", count, 0, b"lag%d-%d" % (rank, turn))
threads = [threading.Thread(target=lag, args=(rank,)) for rank in range(readers)]
[thread.start() for thread in threads]
"""


def rebalance(pinned: bool) -> list[Row]:
    """A member joins a group of nine, and goes again: until every partition is with whom it belongs to."""
    joins, leaves = [], []
    with running(pinned=pinned) as node:
        topic = {"name": "shared", "partitions": PARTITIONS}
        call(node.process.admin, "POST", "/v1/topics", topic)
        with Producer(node.server) as producer:
            members = [_Member(node, rank) for rank in range(MEMBERS - 1)]
            crew = _Crew(members, producer)
            crew.until(lambda: sum(len(member.held) for member in members) == PARTITIONS)
            for run in range(10 * RUNS):
                newcomer = _Member(node, MEMBERS + run)
                members.append(newcomer)
                began = time.perf_counter()
                crew.add(newcomer)
                crew.until(lambda newcomer=newcomer: len(newcomer.held) == PARTITIONS // MEMBERS)  # type: ignore[misc]
                joins.append(time.perf_counter() - began)
                began = time.perf_counter()
                crew.remove(members.pop())
                crew.until(lambda: sum(len(member.held) for member in members) == PARTITIONS)
                leaves.append(time.perf_counter() - began)
            crew.finish()
    slowest = max(max(joins), max(leaves)) * 1000
    middle = f"join {statistics.median(joins) * 1000:.1f} ms, leave {statistics.median(leaves) * 1000:.1f} ms"
    return [
        Row(
            f"rebalance, {MEMBERS} members, {PARTITIONS} partitions",
            f"{middle}, slowest {slowest:.1f} ms; {crew.twice} of {crew.handled:,} records handled twice",
            "milliseconds",
            slowest,
            "50 ms",
            slowest < 50 and crew.twice == 0,
        )
    ]


class _Member:
    """One connection of the group: acknowledges what it gets at once."""

    def __init__(self, node: Node, rank: int) -> None:
        self.socket = socket.create_connection((node.host.decode(), node.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.held: dict[int, int] = {}
        self.leaving = self.left = False
        self._connection = Connection(Role.CLIENT, 1 << 24)
        self._buffer = ReceiveBuffer()
        self.socket.sendall(
            frames.write_connect(1, Connect(frames.PROTOCOL_VERSION, 0, f"member-{rank}", b"", -1, -1, []))
        )
        self._events()
        self.socket.setblocking(False)

    def join(self) -> None:
        line = Wanted("shared", -1, Start.COMMITTED, NO_LOG_ID, -1, 0)
        self.socket.sendall(frames.write_subscribe(2, Subscribe(Intent.JOIN, "crew", 0, 0, [line])))

    def leave(self) -> None:
        self.leaving = True
        line = Wanted("shared", -1, Start.COMMITTED, NO_LOG_ID, -1, 0)
        self.socket.sendall(frames.write_subscribe(3, Subscribe(Intent.LEAVE, "crew", 0, 0, [line])))

    def _events(self) -> list[Frame]:
        received = self.socket.recv_into(self._buffer.room)
        return [event for event in self._connection.receive(self._buffer, received) if isinstance(event, Frame)]

    def turn(self) -> list[tuple[int, int]]:
        """Handle what came; (partition, offset) of the records that were handled."""
        handled = []
        for event in self._events():
            if event.type == FrameType.ACK and event.correlation == 3:
                self.left = True
            elif event.type == FrameType.DELIVER and not self.leaving:
                deliver = frames.read_deliver(event.body)
                handled += [(deliver.partition, offset) for offset in range(deliver.first, deliver.last + 1)]
                ack = ConsumerAck(
                    AckKind.CUMULATIVE, "shared", deliver.partition, deliver.generation, deliver.lease, deliver.last + 1
                )
                self.socket.sendall(frames.write_consumer_ack(0, ack))
            elif event.type == FrameType.SUBSCRIBE:
                for line in frames.read_assigned(event.body).lines:
                    if line.holding is Holding.ASSIGNED:
                        self.held[line.partition] = line.lease
                    elif line.holding is Holding.REVOKED:
                        self.held.pop(line.partition, None)
        return handled


class _Crew:
    """The members of the group in one thread, with records coming all the time."""

    def __init__(self, members: list[_Member], producer: Producer) -> None:
        self._selector = selectors.DefaultSelector()
        self._producer, self._publishing = producer, True
        self._seen: set[tuple[int, int]] = set()
        self.handled = self.twice = self._sent = 0
        for member in members:
            self.add(member)

    def add(self, member: _Member) -> None:
        self._selector.register(member.socket, selectors.EVENT_READ, member)
        member.join()

    def remove(self, member: _Member) -> None:
        """As a process does that ends well: it leaves, handles nothing more, and closes the connection."""
        member.leave()
        self.until(lambda: member.left)
        self._selector.unregister(member.socket)
        member.socket.close()

    def until(self, done) -> None:  # type: ignore[no-untyped-def]
        deadline = time.perf_counter() + 10.0
        while not done():
            assert time.perf_counter() < deadline, "the partitions were not divided"
            self._turn(0.001)

    def finish(self) -> None:
        """Everything that was published was handled."""
        self._publishing = False
        self._producer.flush()
        self.until(lambda: len(self._seen) == self._sent)

    def _turn(self, seconds: float) -> None:
        for partition in range(PARTITIONS if self._publishing else 0):
            self._producer.send("shared", b"x" * 100, partition=partition)
            self._sent += 1
        for key, _ in self._selector.select(seconds):
            for handled in key.data.turn():
                self.handled += 1
                if handled in self._seen:
                    self.twice += 1
                self._seen.add(handled)
