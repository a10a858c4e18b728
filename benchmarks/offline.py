"""Seven days without a parent: what the child costs meanwhile, that it never gives up, and that nothing is missing."""

from __future__ import annotations

import hashlib
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.leaping import LeapingBroker
from benchmarks.node import DIRECTORY
from benchmarks.rows import Row, scaled
from benchmarks.tree import FREE
from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import EdgeBrokerError

HOURS = 7 * 24
HOUR_SECONDS = 3600
BEFORE, EACH_HOUR, READ_EACH_HOUR = 12_000, 300, 60
TOPIC, RECORD_BYTES = "prices", 1000
DRIFT_MIB = 1.0
PATIENCE_SECONDS = 60.0
_RESET = struct.pack("ii", 1, 0)


class Gate:
    """A way to `target` (HOST:PORT) that can be shut in three ways: nobody listens, every connection is reset at once,
    or it is taken and nothing is ever said on it."""

    REFUSED, RESET, MUTE, OPEN = "refused", "reset", "mute", "open"

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener: socket.socket | None = None
        self._port = 0
        self._taken: set[socket.socket] = set()
        self._state = self.REFUSED
        self.turn(self.OPEN)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def turn(self, state: str) -> None:
        """From now on so; what is connected is cut."""
        self._state = state
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for sock in list(self._taken):
            self._end(sock)
        if state != self.REFUSED:
            self._listener = socket.create_server(("127.0.0.1", self._port))
            self._port = self._listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(self._listener, state), daemon=True).start()

    def _accept(self, listener: socket.socket, state: str) -> None:
        while True:
            try:
                lower, _ = listener.accept()
            except OSError:
                return
            if state == self.RESET:
                lower.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                lower.close()
                continue
            self._taken.add(lower)
            upper = None
            if state == self.OPEN:
                upper = socket.create_connection(self._target)
                self._taken.add(upper)
                threading.Thread(target=self._pass_on, args=(upper, lower), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(lower, upper), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket | None) -> None:
        try:
            while data := source.recv(1 << 18):
                if target is not None:
                    target.sendall(data)
        except OSError:
            pass
        for sock in (source, target):
            if sock is not None:
                self._end(sock)

    def _end(self, sock: socket.socket) -> None:
        self._taken.discard(sock)
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        sock.close()


def offline(pinned: bool) -> list[Row]:
    """The line is cut in turns in three ways. Each hour the parent is published to, and an application reads from the
    child: what it was given before, in order."""
    hours = max(24, scaled(HOURS * 1000) // 1000)
    directory = Path(tempfile.mkdtemp(prefix="edgebroker-bench-", dir=DIRECTORY))
    quiet = {**FREE, "EDGEBROKER_LOG_LEVEL": "error", "EDGEBROKER_STORAGE_SEGMENT_BYTES": str(1 << 20)}
    parent = BrokerProcess(directory / "parent", settings={**quiet, "EDGEBROKER_NODE_LEVEL": "root"})
    child: LeapingBroker | None = None
    try:
        parent.start()
        gate = Gate(parent.pipe)
        below = {**quiet, "EDGEBROKER_NODE_LEVEL": "l2", "EDGEBROKER_PIPE_PARENTS": gate.address}
        child = LeapingBroker(directory / "child", below)
        with Producer(parent.server) as producer:
            _publish(producer, BEFORE)
            _wait(lambda: _end(child) == BEFORE)
            handed = Handed(child.server)
            handed.read(READ_EACH_HOUR)
            child.leap(HOUR_SECONDS)
            before = child.resident()
            lost = _lost(child)
            resident, attempts = list[float](), list[int]()
            for hour in range(hours):
                gate.turn((Gate.REFUSED, Gate.RESET, Gate.MUTE)[hour % 3])
                child.leap(HOUR_SECONDS)
                handed.read(READ_EACH_HOUR)
                _publish(producer, EACH_HOUR)
                resident.append(child.resident())
                failed = _lost(child)
                attempts.append(failed - lost)
                lost = failed
        assert _end(child) == BEFORE
        gate.turn(Gate.OPEN)
        waited = _leap_until_connected(child)
        begun = time.perf_counter()
        wanted = BEFORE + hours * EACH_HOUR
        _wait(lambda: _end(child) == wanted)
        took = time.perf_counter() - begun
        handed.read(wanted - len(handed.offsets))
        child.leap(60)
        after = child.resident()
        child.stop()
        parent.stop()
        same = _digest(directory / "parent") == _digest(directory / "child")
    finally:
        for node in (child, parent):
            if node is not None:
                node.kill()
        shutil.rmtree(directory, ignore_errors=True)
    drift, total = max(resident) - resident[0], sum(attempts)
    whole = same and handed.offsets == list(range(wanted))
    days = f"{hours / 24:g} days offline"
    return [
        Row(f"{days}: the child's memory", f"{resident[0]:.1f} MiB after the first hour, {max(resident):.1f} at most",
            f"{before:.1f} before, {after:.1f} a minute after it", drift, f"+{DRIFT_MIB:g} MiB", drift <= DRIFT_MIB),
        Row("the same: attempts to reconnect", f"{total}", f"at least {min(attempts)} in every hour",
            hours * HOUR_SECONDS / total, "never gives up", min(attempts) > 0),
        Row("the line is back", f"connected after {waited} s", "seconds", waited, "35", waited <= 35),
        Row(f"the same: {hours * EACH_HOUR} records of {RECORD_BYTES} bytes caught up",
            f"{took:.2f} s", f"lost or repeated: {'none' if whole else 'SOME'}", took, "60 s", whole and took <= 60),
    ]  # fmt: skip


class Handed:
    """An application at the child: it comes, reads some records, and goes. `offsets` is what it was handed."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.offsets: list[int] = []

    def read(self, count: int) -> None:
        wanted = len(self.offsets) + count
        with Consumer(self._server, [TOPIC], "labels") as consumer:
            while len(self.offsets) < wanted:
                for record in consumer.poll(PATIENCE_SECONDS)[: wanted - len(self.offsets)]:
                    self.offsets.append(record.offset)
                    consumer.ack(record)
            consumer.commit()


def _publish(producer: Producer, count: int) -> None:
    for _ in range(count):
        producer.send(TOPIC, b"x" * RECORD_BYTES, partition=0)
    producer.flush(PATIENCE_SECONDS)


def _end(child: LeapingBroker) -> int:
    try:
        return int(call(child.admin, "GET", f"/v1/topics/{TOPIC}")["partitions"][0]["durable_end"])
    except EdgeBrokerError:
        return -1


def _lost(child: LeapingBroker) -> int:
    """How often an attempt failed, or a connection was lost."""
    return int(call(child.admin, "GET", "/v1/node")["counters"]["pipe_lost"])


def _leap_until_connected(child: LeapingBroker) -> int:
    """Seconds of the child's time."""
    for second in range(600):
        for _ in range(10):
            if call(child.admin, "GET", "/v1/pipe")["parent"]["connected"]:
                return second
            time.sleep(0.005)
        child.leap(1)
    raise RuntimeError("the child does not come back")


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the child does not catch up")
        time.sleep(0.02)


def _digest(directory: Path) -> str:
    found = hashlib.sha256()
    for path in sorted((directory / "topics" / TOPIC / "0").glob("*.log")):
        found.update(path.read_bytes())
    return found.hexdigest()
