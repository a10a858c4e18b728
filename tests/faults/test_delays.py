"""A disk that takes its time: nothing but what needs the disk may wait for it.

Delays are switched on in turn in syncs, writes and cold reads of a running broker. EB_DELAY_MS says how long (300).
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.network.wire import frames
from tests.kit.waiting import wait_for

from . import shim
from .checker import History, read_back, value_of
from .traffic import CLOCK, PARTITIONS, SETTINGS, Writer

pytestmark = [pytest.mark.skipif(not shim.available(), reason="needs Linux and gcc"), pytest.mark.slow]

DELAY_MS = int(os.environ.get("EB_DELAY_MS", "300"))
TOPIC = "orders"
WAVE = 400
# Who waits for the disk waits for at least one delay. A second is more than any busy test machine takes.
PING_SECONDS = min(0.8 * DELAY_MS / 1000, 1.0)
HEARTBEAT = {"EDGEBROKER_LIMITS_HEARTBEAT_MS": "500", "EDGEBROKER_LIMITS_IDLE_TIMEOUT_MS": "2000"}


class Pinger:
    """Asks over a raw connection and over HTTP, again and again, and keeps how long each answer took."""

    def __init__(self, broker: BrokerProcess) -> None:
        self._broker = broker
        self._stop = threading.Event()
        self.pings: list[float] = []
        self.health: list[float] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        host, _, port = self._broker.server.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), 10.0) as sock, sock.makefile("rb") as stream:
                correlation = 0
                while not self._stop.wait(0.01):
                    correlation += 1
                    self.pings.append(self._ping(sock, stream, correlation))
                    begun = CLOCK.monotonic()
                    call(self._broker.admin, "GET", "/healthz")
                    self.health.append(CLOCK.monotonic() - begun)
        except BaseException as error:
            self.error = error

    @staticmethod
    def _ping(sock: socket.socket, stream: BinaryIO, correlation: int) -> float:
        asked = frames.Connect(frames.PROTOCOL_VERSION, 0, "pinger", b"", -1, -1, [])
        begun = CLOCK.monotonic()
        sock.sendall(frames.write_connect(correlation, asked))
        while True:
            length, kind, _, _, answered = frames.HEADER.unpack(stream.read(frames.HEADER_BYTES))
            stream.read(length + 4 - frames.HEADER_BYTES)
            if kind == frames.FrameType.ACK and answered == correlation:
                return CLOCK.monotonic() - begun

    def stop(self) -> tuple[float, float]:
        """99th percentiles in seconds: of pings, of /healthz."""
        self._stop.set()
        self._thread.join(20.0)
        if self.error is not None:
            raise self.error
        return p99(self.pings), p99(self.health)


def p99(samples: list[float]) -> float:
    return sorted(samples)[len(samples) * 99 // 100]


@contextmanager
def slow_broker(path: Path, rule: str, settings: dict[str, str]) -> Iterator[tuple[BrokerProcess, Path]]:
    """A broker with a topic, and the file that switches its delays on."""
    switch, root = path / "switch", path / "data"
    environment = shim.environment([f"{rule}:*:delay={DELAY_MS}"], root, switch)
    broker = BrokerProcess(root, settings=SETTINGS | HEARTBEAT | settings, environment=environment)
    broker.start()
    try:
        call(broker.admin, "POST", "/v1/topics", {"name": TOPIC, "partitions": PARTITIONS})
        yield broker, switch
    finally:
        switch.unlink(missing_ok=True)
        broker.kill()


def publish(broker: BrokerProcess, history: History) -> None:
    with Producer(broker.server, client_id="before", timeout=30.0) as producer:
        for n in range(WAVE):
            history.sending("q", n)
            producer.send(TOPIC, value_of("q", n, 1000), partition=n % PARTITIONS)


def read_wave(broker: BrokerProcess, start: str, seconds: float) -> float:
    """How long it takes a new consumer to get the first wave."""
    with Consumer(broker.server, [TOPIC], start=start, auto_ack=False) as consumer:
        found: set[tuple[int, int]] = set()

        def arrived() -> bool:
            for record in consumer.poll(0.05):
                consumer.ack(record)
                if record.offset < WAVE // PARTITIONS:
                    found.add((record.partition, record.offset))
            return len(found) >= WAVE

        return wait_for(arrived, "the records published before", seconds)


@pytest.mark.parametrize("op", ["fdatasync", "pwrite"])
def test_only_acknowledgements_wait_for_a_slow_disk(tmp_path: Path, op: str) -> None:
    history = History()
    with slow_broker(tmp_path, f"{op}:.log$", {}) as (broker, switch):
        publish(broker, history)
        switch.touch()
        writer = Writer(history, broker.server, "w", TOPIC, seed=1)
        begun, acks = CLOCK.monotonic(), len(history.acks)
        pinger = Pinger(broker)
        delivery = read_wave(broker, "earliest", 10.0)
        wait_for(lambda: CLOCK.monotonic() - begun > 5 * DELAY_MS / 1000, "five delays", 60.0)
        ping, health = pinger.stop()
        slow = len(history.acks) - acks
        switch.unlink()
        writer.stop(60.0)
        history.check(TOPIC, read_back(broker, TOPIC))
        print(
            f"{op} +{DELAY_MS} ms: ping p99 {ping * 1e3:.1f} ms, /healthz p99 {health * 1e3:.1f} ms, "
            f"stored records delivered in {delivery * 1e3:.0f} ms, {slow} slow acknowledgements"
        )
        assert ping < PING_SECONDS
        assert health < PING_SECONDS
        assert delivery < 1.0
        assert broker.stop() == 0


def test_a_cold_read_that_hangs_is_given_up_and_tried_again(tmp_path: Path) -> None:
    settings = {"EDGEBROKER_STORAGE_READ_TIMEOUT_MS": "100", "EDGEBROKER_STORAGE_VERIFY_BYTES_PER_SECOND": "0"}
    history = History()
    with slow_broker(tmp_path, "pread:.log$", settings) as (broker, switch):
        publish(broker, history)
        # After a clean stop nothing is verified yet: all of it has to come through the reader.
        assert broker.stop() == 0
        broker.start()
        switch.touch()
        pinger = Pinger(broker)
        with Consumer(broker.server, [TOPIC], start="earliest", auto_ack=False) as consumer:
            consumer.poll(0.0)
            wait_for(lambda: _node(broker)["read_timeouts"] > 0, "a read times out", 10.0 + DELAY_MS / 100)
            wait_for(lambda: "disk_stalled" in _readiness(broker), "/readyz says disk_stalled", 5.0 + DELAY_MS / 100)
            with Producer(broker.server, client_id="meanwhile", timeout=10.0) as producer:
                history.sending("w", 0)
                begun = CLOCK.monotonic()
                producer.send(TOPIC, value_of("w", 0, 100), partition=0).result(10.0)
                stored = CLOCK.monotonic() - begun
            ping, health = pinger.stop()
            switch.unlink()
            missing = {(partition, offset) for partition in range(PARTITIONS) for offset in range(WAVE // PARTITIONS)}

            def arrived() -> bool:
                for record in consumer.poll(0.05):
                    consumer.ack(record)
                    missing.discard((record.partition, record.offset))
                return not missing

            resumed = wait_for(arrived, "delivery goes on by itself", 10.0 + 2 * DELAY_MS / 1000)
        wait_for(lambda: _readiness(broker) == "", "/readyz is ready again", 10.0)
        print(
            f"pread +{DELAY_MS} ms: ping p99 {ping * 1e3:.1f} ms, /healthz p99 {health * 1e3:.1f} ms, "
            f"a publish took {stored * 1e3:.0f} ms, delivery went on after {resumed:.2f} s"
        )
        assert ping < PING_SECONDS
        assert health < PING_SECONDS
        assert stored < 0.5
        history.check(TOPIC, read_back(broker, TOPIC))


def _node(broker: BrokerProcess) -> dict[str, int]:
    found: dict[str, int] = call(broker.admin, "GET", "/v1/node")["storage"]
    return found


def _readiness(broker: BrokerProcess) -> str:
    """Why the node is not ready; "" when it is."""
    try:
        call(broker.admin, "GET", "/readyz")
    except EdgeBrokerError as error:
        return f"{error} {call(broker.admin, 'GET', '/v1/node')['problems']}"
    return ""
