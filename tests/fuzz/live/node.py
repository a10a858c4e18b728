"""A real node that is turned by hand in this thread, its peers, and what must not happen to it.

Nothing waits for another thread but the disk's: thousands of connections in a second, and the same ones for the same
seed. Whatever is wrong is raised as a Finding by the call in which it shows.
"""

from __future__ import annotations

import logging
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edgebroker.broker.broker import Broker
from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, Wanted
from edgebroker.common.types import AckLevel, Start
from edgebroker.network.io.channel import PlainChannel
from edgebroker.network.io.transport import Transport
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Connect, FrameType, Intent, Subscribe
from tests.kit import watchdog
from tests.kit.brokers import AheadClock, batch_of, config_for, numbered
from tests.kit.raw_client import HEADER, write_publish

SECONDS = 10.0
# What differs from node to node stands in the cases as a placeholder of the same length: the node's uid, the ids of the
# logs t/0 and table/0, and of the snapshot that was begun last.
NODE, LOG, TABLE, SNAPSHOT = "a0" * 16, "b1" * 16, "b2" * 16, "b3" * 16
# Behind an empty piece so much time passes for the node.
PAUSE_SECONDS = 100.0
DOORS = ("http", "pipe", "tcp")
WRONG = re.compile(rb"HTTP/1\.1 500|Traceback|\b[A-Z][a-z]+[A-Za-z]*(?:Error|Exception)\b|<class |object at 0x|msgspec")
SETTINGS = {
    "node.name": "fuzzed",
    "listen.pipe": "127.0.0.1:0",
    "topics.auto_create": True,
    "registry.enabled": True,
    "limits.max_partitions": 200,
    "limits.max_groups": 200,
    "storage.segment_bytes": 64 << 10,
}


class Finding(Exception):
    """Something that no peer may bring about."""


class Case(NamedTuple):
    """What one peer sent by one door, piece by piece; an empty piece is a pause."""

    door: str
    pieces: list[bytes]


class LogWatch(logging.Handler):
    """Keeps what the log says about failures."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            self.failures.append(f"the log: {text}: {logging.Formatter().formatException(record.exc_info)}")
        elif "Traceback" in text:
            self.failures.append(f"the log: {text}")


class Node:
    """With topics t and table, a group g, and topic honest, of which no peer knows."""

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
        self._config = config_for(directory, {**SETTINGS, **settings})
        self.cases: list[Case] = []
        self.names: dict[bytes, bytes] = {}
        self.published = 1
        # Ends of batches of t, with the chain there.
        self.points: list[tuple[int, int]] = []
        self.sockets: set[socket.socket] = set()
        self._watch, self._log = LogWatch(), logging.getLogger("edgebroker")
        self._log.addHandler(self._watch)
        self._log.propagate = False
        self._log.setLevel(logging.INFO)
        self._running = False
        self._start()
        self._furnish()

    def _start(self) -> None:
        self.clock = AheadClock()
        self.broker = Broker(self._config, self.clock)
        self.loop = self.broker.loop
        self._running = True
        self.broker.start()

    def _furnish(self) -> None:
        self.ask("POST", "/v1/topics", b'{"name":"table","kind":"table"}')
        for topic, size in (("t", 100), ("table", 0), ("t", 100), ("t", 100), ("honest", 0)):
            self.publish(topic, batch_of(b"row") if topic == "table" else numbered(0, 5, size))
            log = self.broker.engine.log("t", 0)
            self.points += [(log.durable_end, log.chain)] if log is not None and topic == "t" else []
        self.read_back("t", 15, "g")
        engine = self.broker.engine
        real = [engine.node_uid, *(one.identity.log_id for one in (engine.log("t", 0), engine.log("table", 0)) if one)]
        for placeholder, name in zip((NODE, LOG, TABLE), real, strict=True):
            self.names[placeholder.encode()] = name.encode()
            self.names[bytes.fromhex(placeholder)] = bytes.fromhex(name)
        self.cases.clear()

    def close(self) -> None:
        try:
            self._stop()
        finally:
            watchdog.found.clear()
            self._log.removeHandler(self._watch)
            self._log.propagate = True
            self._log.setLevel(logging.NOTSET)

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        for one in self.sockets:
            one.close()
        self.clock.ahead += PAUSE_SECONDS  # a publish that waits for nodes below would hold the stop up
        self.loop.turn(0.0)
        self.broker.stop()
        self.loop.run()
        for key in list(self.loop._selector.get_map().values()):
            owner = getattr(key.data, "__self__", None)
            if isinstance(owner, Transport):  # a question to another node: a process ends with it
                owner.close("the node is stopping")
        self.broker._close()

    def reopen(self) -> None:
        """Stop the node, and start it with what it has stored."""
        self._stop()
        try:
            self._start()
        except Exception as error:
            raise Finding(f"the node does not start again: {error!r}") from error

    # ---- turning ----

    def turn(self, wait: float = 0.0) -> None:
        """One turn of the loop; a Finding when something is wrong after it."""
        self.loop.turn(wait)
        found = [*self._watch.failures, *watchdog.found]
        if found or self.loop.failed_callbacks:
            raise Finding("; ".join(found) or "a callback failed")

    def settle(self) -> None:
        """Until nothing is left to do at once."""
        self.turn()
        for _ in range(1000):
            if not (self.loop._turns or self.loop._ready or self.loop._posted):
                return
            self.turn()

    def until(self, condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Finding(f"not within {seconds:g} s: {what}")
            self.turn(0.01)

    def pause(self) -> None:
        self.clock.ahead += PAUSE_SECONDS
        for _ in range(3):
            self.turn()

    # ---- peers ----

    def connect(self, door: str, *, tcp: bool = False) -> Peer:
        """A connection, by TCP or as a pair of sockets; a new case begins with it."""
        listeners, broker = self.broker.listeners, self.broker
        if tcp:
            addresses = (listeners.http_address, listeners.pipe_address, listeners.tcp_address)
            ours = socket.create_connection(addresses[DOORS.index(door)])
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves no port behind
            self.turn()
        else:
            ours, theirs = socket.socketpair()
            accept = (broker._http.accept, broker._pipe.accept, broker.sessions.accept)[DOORS.index(door)]
            accept(PlainChannel(theirs), "127.0.0.1:1")
        self.cases.append(Case(door, []))
        self.sockets.add(ours)
        return Peer(self, ours, self.cases[-1].pieces)

    def send(self, case: Case, *, tcp: bool = False) -> bytes:
        """All of a case; what the node answers to it at once."""
        peer = self.connect(case.door, tcp=tcp)
        for piece in case.pieces:
            peer.send(piece)
        peer.close()
        return bytes(peer.received)

    # ---- the honest client ----

    def check(self) -> None:
        """Is the node there for others?"""
        if self.ask("GET", "/healthz") != 200:
            raise Finding("GET /healthz is not answered 200")
        self.publish("honest", batch_of(b"%d" % self.published))
        self.published += 1

    def check_records(self) -> None:
        """Is the node there again after a restart, with all records of the honest client in their order?"""
        self.reopen()
        self.check()
        values = self.read_back("honest", self.published + 4, f"reader-{self.published}")[5:]
        if values != [b"%d" % number for number in range(1, self.published)]:
            raise Finding("records of the honest client are not as they were published")

    def ask(self, method: str, path: str, body: bytes = b"") -> int:
        """The status of an honest request."""
        peer = self.connect("http", tcp=True)
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        peer.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.until(lambda: b"\r\n\r\n" in peer.take(), f"an answer to {method} {path}")
        peer.close()
        self.cases.pop()
        return int(peer.received.split()[1])

    def _client(self) -> Peer:
        peer = self.connect("tcp", tcp=True)
        peer.send(frames.write_connect(1, Connect(frames.PROTOCOL_VERSION, 0, "honest", b"", -1, -1, [])))
        self._granted(peer, 1)
        return peer

    def _granted(self, peer: Peer, correlation: int) -> None:
        found: list[bytes] = []

        def answered() -> bool:
            found.extend(body for kind, number, body in peer.frames() if (kind, number) == (FrameType.ACK, correlation))
            return bool(found)

        self.until(answered, f"an answer to the honest client, of {bytes(peer.received)!r}")
        answer = frames.read_ack(memoryview(found[0]))
        if not isinstance(answer, frames.Answer) or answer.code is not Code.OK:
            raise Finding(f"the honest client is answered {answer}")

    def publish(self, topic: str, batches: bytes) -> None:
        peer = self._client()
        peer.send(write_publish(2, frames.publish_prefix(AckLevel.DURABLE, topic, 0), batches))
        self._granted(peer, 2)
        peer.close()
        self.cases.pop()

    def read_back(self, topic: str, count: int, group: str) -> list[bytes | None]:
        """The values of a topic's first records, as a group reads them."""
        peer = self._client()
        wanted = [Wanted(topic, -1, Start.EARLIEST, NO_LOG_ID, -1, 0)]
        peer.send(frames.write_subscribe(2, Subscribe(Intent.JOIN, group, 0, 0, wanted)))
        values: list[bytes | None] = []

        def delivered() -> bool:
            for kind, _, body in peer.frames():
                if kind == FrameType.DELIVER:
                    head = frames.read_deliver(memoryview(body))
                    records = batch.decode(body[head.batches_start :], topic, 0, head.first, head.last)
                    values.extend(record.value for record in records)
            return len(values) >= count

        self.until(delivered, f"all records of {topic} are delivered")
        peer.close()
        self.cases.pop()
        return values


class Peer:
    """The other end of a connection to the node."""

    def __init__(self, node: Node, ours: socket.socket, pieces: list[bytes]) -> None:
        ours.setblocking(False)
        self._node, self._socket, self._pieces = node, ours, pieces
        self.received = bytearray()
        self._read = 0
        self.over = False

    def send(self, piece: bytes) -> None:
        """Have a piece handled, as far as that can be done at once."""
        self._pieces.append(piece)
        if not piece:
            self._node.pause()
        for placeholder, name in self._node.names.items():
            piece = piece.replace(placeholder, name)
        left = memoryview(piece)
        for _ in range(100):
            if not len(left) or self.over:
                break
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                pass  # it is not read: a pipelined request waits for the answer before it
            except OSError:
                self.over = True
            self._node.settle()
            self.take()

    def take(self) -> bytearray:
        """All that came until now; a Finding when it tells what no peer may know."""
        try:
            while not self.over:
                piece = self._socket.recv(1 << 18)
                self.received += piece
                self.over = not piece
                found = WRONG.search(piece)
                if found:
                    raise Finding(f"the answer has {found[0]!r}: {piece[:2000]!r}")
        except BlockingIOError:
            pass
        except OSError:
            self.over = True
        return self.received

    def frames(self) -> list[tuple[int, int, bytes]]:
        """Frames of the binary protocol that came since the last call: type, correlation, body."""
        self.take()
        found = []
        while len(self.received) - self._read >= HEADER.size:
            size, kind, _, _, correlation = HEADER.unpack_from(self.received, self._read)
            if self._read + 4 + size > len(self.received):
                break
            found.append((kind, correlation, bytes(self.received[self._read + HEADER.size : self._read + 4 + size])))
            self._read += 4 + size
        return found

    def close(self) -> None:
        self._node.sockets.discard(self._socket)
        self._socket.close()
        self._node.turn()
