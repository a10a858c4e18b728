"""Peers that are many, slow, silent, stuck or rude: nobody else notices, and none of them costs more than a cursor. And
one that was written from the document alone, in its dealings with groups, failures and refreshes."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, Wanted
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import FrameType
from tests.kit import tiny_client
from tests.kit.brokers import SECONDS, RawClient, RunningBroker, batch_of, numbered, running
from tests.kit.raw_client import write_publish
from tests.kit.tiny_client import Record, TinyClient

FAST = {
    "limits.heartbeat_ms": 100,
    "limits.idle_timeout_ms": 400,
    "limits.connect_timeout_ms": 200,
    "limits.stuck_timeout_ms": 300,
}


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", {**FAST, "storage.engine": "memory"}) as found:
        yield found


def test_heartbeats_carry_the_durable_end(fast: RunningBroker) -> None:
    client = fast.raw()
    client.publish("t", numbered(0, 5))
    client.subscribe("t")
    ends: list[tuple[str, int, int]] = []
    while not ends:
        ends = frames.read_heartbeat(memoryview(client.take(FrameType.HEARTBEAT).body))
    assert ends == [("t", 0, 5)]


def test_heartbeats_come_as_often_as_promised(fast: RunningBroker) -> None:
    client = fast.raw()
    client.take(FrameType.HEARTBEAT)
    began = time.monotonic()
    for _ in range(5):
        client.send(frames.write_heartbeat([]))
        client.take(FrameType.HEARTBEAT)
    # A client may take the broker for dead after idle_timeout_ms: several must fit into it.
    assert time.monotonic() - began < 5 * 0.4


def test_a_silent_client_is_cut_and_a_living_one_is_not(fast: RunningBroker) -> None:
    silent, living = fast.raw("silent"), fast.raw("living")
    with selectors.DefaultSelector() as selector:
        selector.register(silent.socket, selectors.EVENT_READ)
        ended = False
        while not ended:
            living.send(frames.write_heartbeat([]))
            living.take(FrameType.HEARTBEAT)
            if selector.select(0):
                ended = not silent.socket.recv(1 << 16)
    assert fast.counters()["idle_timeouts"] == 1
    assert living.publish("t", batch_of(b"v")).code is Code.OK


@pytest.mark.parametrize("trickle", [False, True])
def test_connect_must_come_in_time(fast: RunningBroker, trickle: bool) -> None:
    client = fast.raw(granted=False)
    began = time.monotonic()
    client.socket.settimeout(0.05)
    connect = frames.write_connect(1, frames.Connect(1, 0, "x" * 200, b"", -1, -1, []))
    position, ended = 0, False
    while not ended and time.monotonic() - began < SECONDS:
        try:
            if trickle and position < len(connect) - 1:
                client.socket.send(connect[position : position + 1])
                position += 1
            ended = not client.socket.recv(100)
        except TimeoutError:
            continue
        except OSError:
            ended = True
    assert ended
    assert 0.2 <= time.monotonic() - began < 3.0


@pytest.mark.parametrize(
    "rude",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 64,
        b"\xff" * 64,
        frames.write_heartbeat([]),
        frames.frame(FrameType.CONNECT, 1, b"EDGF" + bytes(30)),
        frames.frame(FrameType.CONNECT, 1, b"EDGE"),
        frames.write_connect(1, frames.Connect(1, 0, "", b"", -1, -1, [])),
        write_publish(1, frames.publish_prefix(2, "t", 0), batch_of(b"v")),
        frames.frame(FrameType.CONNECT, 1, b"x" * 5000)[:4500],
    ],
    ids=lambda data: repr(data[:12]),
)
def test_rude_bytes_end_the_connection_at_once(fast: RunningBroker, rude: bytes) -> None:
    client = fast.raw(granted=False)
    client.send(rude)
    assert client.ended()
    assert fast.raw().publish("t", batch_of(b"v")).code is Code.OK


def test_a_peer_that_takes_nothing_is_cut(fast: RunningBroker) -> None:
    producer = fast.raw("producer")
    for first in range(16):
        producer.publish("t", numbered(first, 1, 1_000_000))
    stuck = fast.raw("stuck", receive_buffer=4096)
    stuck.send(
        frames.write_subscribe(
            1,
            frames.Subscribe(
                frames.Intent.JOIN,
                "g",
                0,
                64 << 20,
                [Wanted("t", 0, frames.Start.EARLIEST, NO_LOG_ID, -1, 0)],
            ),
        )
    )
    deadline = time.monotonic() + SECONDS
    while fast.http("GET", "/v1/node")[1]["connections"] == 2:
        assert time.monotonic() < deadline
        producer.send(frames.write_heartbeat([]))
        with contextlib.suppress(OSError):
            stuck.send(frames.write_heartbeat([]))  # it lives, it only takes nothing
    assert fast.counters()["idle_timeouts"] == 0
    assert producer.publish("t", batch_of(b"v")).code is Code.OK


def test_a_slow_consumer_costs_a_cursor(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        producer, fast = broker.raw("producer"), broker.raw("fast")
        broker.create("t")
        slow = broker.raw("slow", receive_buffer=4096)
        for client, group in ((fast, "fast"), (slow, "slow")):
            client.subscribe("t", group, size=64 << 20)
        high = 0
        for first in range(40):
            assert producer.publish("t", numbered(first, 1, 500_000)).code is Code.OK
            assert fast.deliver().offsets == [first]
            sessions = list(broker.broker.sessions)
            high = max(high, *(session.transport.backlog for session in sessions))
        assert 0 < high < 1_000_000  # one batch of 20 MB
        seen: list[int] = []
        while len(seen) < 40:
            seen += slow.deliver().offsets
        assert seen == list(range(40))


def test_many_partitions_behind_a_slow_socket(tmp_path: Path) -> None:
    """When a socket drains, every partition with something to send gets its turn without piling up calls."""
    count = 400
    with running(tmp_path / "data") as broker:
        broker.create("big")
        broker.create("many", partitions=count)
        producer = broker.raw("producer")
        for first in range(8):
            producer.publish("big", numbered(first, 1, 1_000_000))
        slow = broker.raw("slow", receive_buffer=4096)
        lines = [Wanted(topic, -1, frames.Start.EARLIEST, NO_LOG_ID, -1, 0) for topic in ("big", "many")]
        slow.send(frames.write_subscribe(1, frames.Subscribe(frames.Intent.JOIN, "g", 0, 0, lines)))
        deadline = time.monotonic() + SECONDS
        while not any(session.transport.backlog for session in list(broker.broker.sessions)):
            assert time.monotonic() < deadline
        for partition in range(count):
            producer.publish("many", batch_of(b"v"), partition=partition, wait=False)
        for _ in range(count):
            assert producer.answer().code is Code.OK
        seen = {"big": 0, "many": 0}
        while seen != {"big": 8, "many": count}:
            delivered = slow.deliver()
            seen[delivered.head.topic] += len(delivered.records)
        assert producer.publish("many", batch_of(b"v")).code is Code.OK


def test_many_clients(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        broker.create("t")
        clients = [broker.raw(f"client-{rank}") for rank in range(200)]
        for rank, client in enumerate(clients):
            client.subscribe("t", f"group-{rank}", start=frames.Start.LATEST)
        for client in clients:
            client.publish("t", batch_of(client.socket.getsockname().__repr__().encode()), wait=False)
        for client in clients:
            assert client.answer().code is Code.OK
            seen = 0
            while seen < len(clients):
                delivered = client.deliver()
                assert delivered.head.first == seen
                seen += len(delivered.records)
        assert broker.http("GET", "/v1/node")[1]["connections"] == 200
        assert len(broker.http("GET", "/v1/clients")[1]["clients"]) == 200


def test_more_clients_than_allowed_are_refused(tmp_path: Path) -> None:
    with running(tmp_path / "data", {"limits.max_connections": 3, "storage.engine": "memory"}) as broker:
        clients = [broker.raw(f"client-{rank}") for rank in range(3)]
        extra = broker.raw(granted=False)
        assert extra.ended()
        assert broker.counters()["connections_refused"] == 1
        clients.pop().close()
        again = broker.raw(granted=False)
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                again.connect("again")
                break
            except (EOFError, OSError):
                assert time.monotonic() < deadline
                again = broker.raw(granted=False)
        assert again.publish("t", batch_of(b"v")).code is Code.OK
        assert clients[0].publish("t", batch_of(b"v")).code is Code.OK


@pytest.mark.slow
def test_a_broker_that_runs_out_of_descriptors_lives(tmp_path: Path) -> None:
    broker = BrokerProcess(tmp_path / "data", command=["sh", "-c", 'ulimit -n 128; exec "$@"', "sh"])
    with broker:
        host, port = broker.server.split(":")
        address = (host, int(port))
        first = RawClient(address)
        flood: list[socket.socket] = []
        try:
            first.connect("first")
            assert first.publish("t", batch_of(b"before")).code is Code.OK
            for _ in range(300):
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(address)
                flood.append(sock)
            # It has none left for connections, and serves who is there.
            while len(os.listdir(f"/proc/{broker.pid}/fd")) < 94:
                assert broker.process is not None
                assert broker.process.poll() is None
            for rank in range(20):
                assert first.publish("t", batch_of(b"during %d" % rank)).offset == 1 + rank
            for sock in flood:
                sock.close()
            again = RawClient(address)
            try:
                again.connect("again")
                assert again.publish("t", batch_of(b"after")).offset == 21
            finally:
                again.close()
        finally:
            first.close()
            for sock in flood:
                sock.close()
    assert broker.process is not None
    assert broker.process.returncode == 0


class Watched(TinyClient):
    """One that does not wait for ever; heartbeats wake it."""

    def handle_frame(self) -> None:
        super().handle_frame()
        assert time.monotonic() < self.deadline, "what was waited for did not come"


def tiny(broker: RunningBroker, name: str) -> contextlib.closing[TinyClient]:
    Watched.deadline = time.monotonic() + SECONDS
    return contextlib.closing(Watched(broker.server, name))


def listen(client: TinyClient) -> None:
    """Handle what came before the answer to a request that changes nothing."""
    client.subscribe("t", "g", partition=9, intent=tiny_client.RELEASE)


def values(delivery: tiny_client.Delivery) -> list[bytes | None]:
    return [record.value for record in delivery.records]


def test_tiny_clients_share_a_topic(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, tiny(broker, "one") as one, tiny(broker, "two") as two:
        broker.create("t", partitions=4)
        for partition in range(4):
            one.publish("t", partition, [Record(b"%d" % partition)])
        one.subscribe("t", "g")
        assert len(list(one.consume(4))) == 4
        two.subscribe("t", "g")
        while len(two.leases) < 2:
            listen(one)
            listen(two)
        # Who gave them up is told before the other gets them, and may still have to read it.
        listen(one)
        assert not one.leases.keys() & two.leases.keys()
        assert len(one.leases) == 2
        for partition in range(4):
            one.publish("t", partition, [Record(b"again")])
        # Each gets its own; what the first one had handled does not come again.
        for client in (one, two):
            deliveries = [client.next_delivery(), client.next_delivery()]
            assert {delivery[:2] for delivery in deliveries} == set(client.leases)
            assert [values(delivery) for delivery in deliveries] == [[b"again"], [b"again"]]
            assert all(client.ack(delivery, delivery.last + 1) for delivery in deliveries)
        one.close()
        while len(two.leases) < 4:
            listen(two)


def test_a_tiny_client_gives_back_what_it_has_at_hand(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, tiny(broker, "one") as one, tiny(broker, "two") as two:
        broker.create("t", partitions=2)
        for partition in range(2):
            one.publish("t", partition, [Record(b"%d" % partition)])
        one.subscribe("t", "g")
        held = [one.next_delivery(), one.next_delivery()]
        two.subscribe("t", "g")
        while len(one.leases) == 2:
            listen(one)
        given = two.next_delivery()
        (lost,) = (delivery for delivery in held if delivery[:2] == given[:2])
        assert (values(given), one.ack(lost, 1), two.ack(given, 1)) == (values(lost), False, True)
        kept = next(delivery for delivery in held if delivery is not lost)
        assert one.ack(kept, 0, tiny_client.IN_PROGRESS)
        assert one.ack(kept, 1)


def test_a_tiny_client_refuses_a_record(tmp_path: Path) -> None:
    settings = {"delivery.backoff_ms": 1, "delivery.max_attempts": 2}
    with running(tmp_path / "data", settings) as broker, tiny(broker, "one") as client:
        client.publish("t", 0, [Record(b"good"), Record(b"bad", b"key", (("h", b"v"),), 5), Record(b"next")])
        client.subscribe("t", "g")
        first = client.next_delivery()
        assert values(first) == [b"good", b"bad", b"next"]
        assert client.ack(first, 1, tiny_client.NEGATIVE, "no")
        alone = client.next_delivery()
        assert values(alone) == [b"bad"]
        assert not client.ack(first, 3)  # that lease is over
        assert client.ack(alone, 1, tiny_client.NEGATIVE, "never")
        behind = client.next_delivery()
        assert values(behind) == [b"next"]
        assert client.ack(behind, 3)
        client.subscribe("t", "g", intent=tiny_client.LEAVE)
        with tiny(broker, "two") as reader:
            reader.subscribe("t.dlq", "")
            (letter,) = reader.consume(1)
        assert letter._replace(headers=letter.headers[:1]) == Record(b"bad", b"key", (("h", b"v"),), 5, 0)
        said = {name.removeprefix("eb-dlq-"): value for name, value in letter.headers[1:]}
        assert int(said.pop("time")) > 0
        assert said == {
            "topic": b"t", "partition": b"0", "offset": b"1", "group": b"g", "attempts": b"2", "reason": b"never",
        }  # fmt: skip


def test_a_tiny_client_is_refreshed(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, tiny(broker, "one") as client:
        client.publish("t", 0, [Record(b"%d" % number) for number in range(100)])
        client.subscribe("t", "g")
        assert len(list(client.consume(100))) == 100
        staging: list[Record] = []
        visible: list[Record] = []
        client.ask_refresh("t", 0)
        client.refresh(staging.extend, lambda: visible.extend(staging))
        assert [record.offset for record in visible] == list(range(100))
        refresh = broker.http("GET", "/v1/groups/g")[1]["partitions"][0]["refresh"]
        assert (refresh["state"], refresh["from"], refresh["target"]) == ("ready", 0, None)
        # An operator asks as well; what comes behind the refresh is delivered as ever.
        assert broker.http("POST", "/v1/groups/g/refresh", {"topic": "t"})[0] == 200
        while not client.refreshes:
            client.handle_frame()
        client.refresh(lambda records: None, lambda: None)
        client.publish("t", 0, [Record(b"new")])
        assert [record.value for record in client.consume(1)] == [b"new"]


def test_a_tiny_client_whose_place_is_in_another_log(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker, tiny(broker, "one") as client:
        client.publish("t", 0, [Record(b"a"), Record(b"b")])
        line = tiny_client.put_text("t") + tiny_client.pack(">iB16siq", 0, tiny_client.POSITION, b"\x07" * 16, 3, 9)
        client.request(tiny_client.SUBSCRIBE, b"\0" + tiny_client.put_text("g") + bytes(9) + b"\1" + line)
        loaded: list[Record] = []
        while not client.refreshes:
            client.handle_frame()
        client.refresh(loaded.extend, lambda: None)
        assert [record.value for record in loaded] == [b"a", b"b"]
        with pytest.raises(tiny_client.Refused) as refused:
            client.ask_refresh("t", 5)
        assert refused.value.args[0] == Code.STALE
