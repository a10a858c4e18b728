"""Real brokers for tests: the loop in a thread, real sockets on port 0, data in a temporary directory."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from edgebroker.broker.broker import Broker
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common import batch
from edgebroker.common.config import Config, load_config
from edgebroker.common.errors import Code
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import Start
from tests.kit.raw_client import SECONDS, RawClient

T = TypeVar("T")


def config_for(directory: Path, settings: Mapping[str, object] | None = None) -> Config:
    """A configuration on free loopback ports; `settings` are "section.key" -> value."""
    free = {f"listen.{door}": "127.0.0.1:0" for door in ("tcp", "http", "pipe")}
    return load_config(None, {"node.data_dir": str(directory), **free, **(settings or {})}, {})


JSON = {"content-type": "application/json"}


class AheadClock(SystemClock):
    """The machine's clock, set ahead by a test: what takes minutes is over at once, and nothing depends on how busy
    the machine is."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


class RunningBroker:
    """A broker turning in a thread of its own."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clock = AheadClock()
        self.broker = Broker(config, self.clock)
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
        host, port = self.broker.listeners.tcp_address
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
        assert not self.broker.loop.failed_callbacks, "something failed on the loop; the log says what"
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

    def advance(self, seconds: float) -> None:
        """Let time pass for the broker, and let it do what became due."""

        def jump() -> None:
            self.clock.ahead += seconds

        # Timers run behind what other threads posted: in the turn after the jump the sweep has its time.
        self.call(jump)
        self.call(lambda: None)
        self.call(lambda: None)

    def raw(self, client_id: str = "raw", *, granted: bool = True, receive_buffer: int = 0) -> RawClient:
        """A connected raw client; closed with the broker."""
        client = RawClient(self.broker.listeners.tcp_address, receive_buffer)
        self._clients.append(client)
        if granted:
            client.connect(client_id)
        return client

    def drop(self, client: RawClient) -> None:
        """Close a raw client's connection, and wait until the broker has noticed."""
        before = self.call(lambda: self.broker.core.metrics.connections_closed)
        client.close()
        deadline = time.monotonic() + SECONDS
        while self.call(lambda: self.broker.core.metrics.connections_closed) == before:
            assert time.monotonic() < deadline

    @property
    def admin(self) -> str:
        """HOST:PORT of administration."""
        return "{}:{}".format(*self.broker.listeners.http_address)

    @property
    def parent_address(self) -> str:
        """HOST:PORT for the nodes below."""
        return "{}:{}".format(*self.broker.listeners.pipe_address)

    def http(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One admin request: (status, decoded JSON)."""
        return self._ask(self.broker.listeners.http_address, method, path, body)

    def pipe(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request of a node: (status, decoded JSON)."""
        return self._ask(self.broker.listeners.pipe_address, method, path, body)

    def _ask(self, address: tuple[str, int], method: str, path: str, body: object) -> tuple[int, Any]:
        host, port = address
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, JSON)
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


def batch_of(*values: bytes, **options: Any) -> bytes:
    """One batch with these values."""
    return batch.encode([(None, value, 1000 + rank) for rank, value in enumerate(values)], **options)


def numbered(first: int, count: int, size: int = 0) -> bytes:
    """One batch whose values are b"%d" of first, first + 1, ..., padded to `size`."""
    return batch_of(*(b"%d" % (first + rank) + b"." * max(0, size - 10) for rank in range(count)))


def take(consumer: Consumer, count: int) -> list[Record]:
    """So many records by poll(), unacknowledged."""
    found: list[Record] = []
    deadline = time.monotonic() + SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} records came"
        found += consumer.poll(0.5)
    return found


def member(broker: RunningBroker, name: str = "client", **line: Any) -> RawClient:
    """A member of group g of topic t."""
    client = broker.raw(name)
    assert client.subscribe("t", "g", **{"start": Start.COMMITTED, **line}).code is Code.OK
    return client
