"""Where a member begins: what it asks for counts when the partition was free, else the committed offset does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, Wanted
from edgebroker.common.types import Position, Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import FrameType, Intent, Subscribe
from tests.kit.brokers import SECONDS, RunningBroker, config_for, numbered, running
from tests.kit.raw_client import RawClient


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    """With ten records in each of t's two partitions; the tests are about the second one."""
    with running(tmp_path / "data", {"storage.engine": "memory"}) as found:
        found.create("t", partitions=2)
        producer = found.raw("producer")
        for partition in range(2):
            for offset in range(10):
                producer.publish("t", numbered(offset, 1), partition=partition)
        yield found


def position_of(broker: RunningBroker, value: int) -> Position:
    line = broker.http("GET", "/v1/topics/t")[1]["partitions"][1]
    return Position(bytes.fromhex(line["log_id"]), line["epoch"], value)


def line_about(broker: RunningBroker, start: Start, value: int, partition: int = 1) -> Wanted:
    """A line that asks to begin somewhere; it names the log and its epoch where that counts."""
    place = position_of(broker, value) if start in (Start.POSITION, Start.RESUME) else Position(bytes(16), -1, value)
    return Wanted("t", partition, start, place.log_id, place.epoch, value)


def join(broker: RunningBroker, name: str, line: Wanted, group: str = "g") -> RawClient:
    client = broker.raw(name)
    assert client.subscribe_raw(Subscribe(Intent.JOIN, group, 0, 0, [line])).code is Code.OK
    return client


def committed(broker: RunningBroker, group: str = "g") -> int:
    lines = broker.http("GET", f"/v1/groups/{group}")[1]["partitions"]
    return next(int(line["committed"]) for line in lines if line["partition"] == 1)


FROM_START = Wanted("t", 1, Start.EARLIEST, NO_LOG_ID, -1, 0)
STARTS = [
    (Start.COMMITTED, 0), (Start.EARLIEST, 0), (Start.LATEST, 0), (Start.OFFSET, 7), (Start.TIME, 1000),
    (Start.POSITION, 7), (Start.RESUME, 7),
]  # fmt: skip


@pytest.mark.parametrize(("start", "value"), STARTS)
@pytest.mark.parametrize(("how", "expected"), [("idle", 10), ("released", 4), ("left", 4), ("closed", 4)])
def test_what_is_taken_over_begins_at_the_groups_place(
    broker: RunningBroker, start: Start, value: int, how: str, expected: int
) -> None:
    partition = -1 if how in ("idle", "released") else 1
    first = join(broker, "first", FROM_START._replace(partition=partition))
    lease = first.assigned(1)
    while first.deliver().head[1:8:6] != (1, 9):
        pass
    assert first.acked(lease, expected) is Code.OK
    second = join(broker, "second", line_about(broker, start, value, partition))
    if how == "released":
        first.release("t", 1)
    elif how == "left":
        first.leave("t", 1)
    elif how == "closed":
        first.close()
    assert second.assigned().offset == expected
    assert committed(broker) == expected


@pytest.mark.parametrize(
    ("start", "value", "expected"),
    [
        (Start.COMMITTED, 0, 0), (Start.EARLIEST, 0, 0), (Start.LATEST, 0, 10), (Start.OFFSET, 7, 7),
        (Start.TIME, 0, 0), (Start.POSITION, 7, 7), (Start.RESUME, 7, 7), (Start.RESUME, 10, 10),
    ],
)  # fmt: skip
def test_what_nobody_held_begins_where_the_member_says(
    broker: RunningBroker, start: Start, value: int, expected: int
) -> None:
    client = join(broker, "client", line_about(broker, start, value))
    assert client.assigned().offset == expected
    assert committed(broker) == expected
    # Said once: when it comes to the same member again, the committed offset counts.
    assert client.acked(client.deliver().head, 10) is Code.OK if expected < 10 else True
    client.leave("t", 1)
    assert join(broker, "other", line_about(broker, Start.COMMITTED, 0)).assigned().offset == 10


@pytest.mark.parametrize(
    ("value", "expected", "why"),
    [
        (7, 7, "own"),  # its acknowledgements were lost with the connection
        (10, 10, "own"),
        (1, 4, "own"),  # it never goes back
        (-5, 4, "own"),
        (11, 4, "own"),  # beyond the end: not of this log, whatever it says
        (7, 4, "another log"),
        (7, 4, "another epoch"),
        (7, 4, "another member"),
        (7, 4, "an operator"),
        (7, 4, "an operator and a restart"),
        (7, 7, "a restart"),
    ],
)
def test_resume(tmp_path: Path, value: int, expected: int, why: str) -> None:
    with running(tmp_path / "data") as broker:
        broker.create("t", partitions=2)
        broker.raw("producer").publish("t", numbered(0, 10), partition=1)
        first = join(broker, "client", FROM_START)
        assert first.acked(first.deliver().head, 4) is Code.OK
        first.leave("t", 1)
        line = line_about(broker, Start.RESUME, value)
        if why == "another log":
            line = line._replace(log_id=b"\x07" * 16)
        elif why == "another epoch":
            line = line._replace(epoch=line.epoch + 1)
        elif why == "another member":
            other = join(broker, "other", FROM_START._replace(start=Start.COMMITTED))
            other.deliver()
            other.leave("t", 1)
        elif why.startswith("an operator"):
            move = {"topic": "t", "partition": 1, "to": "4"}
            assert broker.http("POST", "/v1/groups/g/offsets", move)[0] == 200
        if not why.endswith("a restart"):
            assert join(broker, "client", line).assigned().offset == expected
            return
    with running(tmp_path / "data") as broker:
        # Whoever held it before the restart is not known: nobody went on since the broker runs.
        assert join(broker, "client", line).assigned().offset == expected


@pytest.mark.parametrize(("name", "expected"), [("client", 2), ("other", 4)])
def test_a_position_counts_behind_an_own_connection_that_lingers(
    broker: RunningBroker, name: str, expected: int
) -> None:
    first = join(broker, "client", FROM_START)
    assert first.acked(first.deliver().head, 1) is Code.OK
    while not first.silent(FrameType.DELIVER):
        first.deliver()
    assert first.acked(first.assigned(), 4) is Code.OK
    second = join(broker, name, line_about(broker, Start.POSITION, 2))
    assert second.silent(FrameType.DELIVER)
    first.close()
    assert second.assigned().offset == expected


def test_a_line_for_what_is_held_counts_at_once(broker: RunningBroker) -> None:
    client = join(broker, "client", FROM_START)
    assert client.assigned().offset == 0
    for start, value, expected in [(Start.OFFSET, 3, 3), (Start.POSITION, 1, 1), (Start.LATEST, 0, 10)]:
        line = line_about(broker, start, value)
        assert client.subscribe_raw(Subscribe(Intent.JOIN, "g", 0, 0, [line])).code is Code.OK
        assert client.assigned().offset == expected
        assert committed(broker) == expected


def test_a_reader_without_a_group(tmp_path: Path) -> None:
    with running(tmp_path / "data") as broker:
        broker.raw("producer").publish("t", numbered(0, 10))
        readers = [broker.raw(f"reader-{rank}") for rank in range(2)]
        for rank, reader in enumerate(readers):
            assert reader.subscribe("t", "").code is Code.OK
            notice = reader.assigned()
            assert (notice.group, notice.offset) == ("", 0)
            # Everybody gets everything, and may acknowledge it; only this connection knows.
            delivered = reader.deliver()
            assert delivered.offsets == list(range(10))
            assert reader.acked(delivered.head, 4 + rank) is Code.OK
        assert broker.http("GET", "/v1/groups")[1] == {"groups": []}
        assert broker.call(broker.broker.engine.group_offsets) == {}
        clients = broker.http("GET", "/v1/clients")[1]["clients"]
        assert {(client["client_id"], client["group"]) for client in clients} >= {("reader-0", ""), ("reader-1", "")}
        # A failure is one for this reader, too.
        assert readers[0].nack(delivered.head, 6) is Code.STALE  # that was the other's lease
        assert readers[1].nack(delivered.head, 6, "no") is Code.OK
        broker.advance(1)
        assert readers[1].deliver().offsets == [6]
        assert readers[1].subscribe("t", "named").code is Code.STALE
        readers[0].close()
        assert broker.raw("reader-0").subscribe("t", "", start=Start.COMMITTED).code is Code.OK
    with running(tmp_path / "data") as broker:
        assert broker.http("GET", "/v1/groups")[1] == {"groups": []}


@pytest.mark.parametrize(("before", "code", "expected"), [(True, Code.OK, 10), (False, Code.SHUTTING_DOWN, -1)])
def test_joining_while_the_node_stops(tmp_path: Path, before: bool, code: Code, expected: int) -> None:
    """Who is told OK has its place, also when the node stops in the same turn."""
    broker = RunningBroker(config_for(tmp_path / "data"))
    try:
        client = broker.raw()
        client.publish("t", numbered(0, 10))
        here, sent = threading.Event(), threading.Event()

        def hold_the_loop() -> None:
            here.set()
            assert sent.wait(SECONDS)
            if not before:
                broker.broker.stop()

        broker.broker.loop.call_soon_threadsafe(hold_the_loop)
        assert here.wait(SECONDS)
        line = Wanted("t", -1, Start.LATEST, NO_LOG_ID, -1, 0)
        client.send(frames.write_subscribe(9, Subscribe(Intent.JOIN, "g", 0, 0, [line])))
        broker.broker.stop_threadsafe()  # done behind what the sockets brought
        sent.set()
        assert client.answer(9).code is code
    finally:
        assert broker.stop()
    with running(tmp_path / "data") as again:
        status, group = again.http("GET", "/v1/groups/g")
        assert (group["partitions"][0]["committed"] if status == 200 else -1) == expected


@pytest.mark.parametrize(("first", "expected"), [("join", 4), ("leave", 10)])
def test_who_held_a_partition_when_the_line_came(broker: RunningBroker, first: str, expected: int) -> None:
    """Also when its holder goes in the same turn: the partition is handed on at the committed offset."""
    holder = join(broker, "holder", FROM_START)
    assert holder.acked(holder.deliver().head, 4) is Code.OK
    newcomer = broker.raw("newcomer")
    sessions = {session.client_id: session for session in broker.broker.sessions}
    latest = Subscribe(Intent.JOIN, "g", 0, 0, [FROM_START._replace(start=Start.LATEST)])
    steps = [
        lambda: sessions["newcomer"]._on_subscribe(99, latest),
        lambda: sessions["holder"].transport.close("gone"),
    ]
    broker.call(lambda: [step() for step in (steps if first == "join" else reversed(steps))])
    assert newcomer.assigned().offset == expected
