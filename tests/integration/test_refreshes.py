"""The public Consumer while a refresh loads: a staging store that fails, a partition that is lost, places meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgebroker import Consumer, Record
from edgebroker.client.consume.positions import PositionFile
from edgebroker.client.refresh import Refresh
from edgebroker.common import batch
from edgebroker.common.types import Position, TopicPartition
from tests.kit.brokers import SECONDS, RunningBroker, numbered, running
from tests.kit.waiting import wait_for

KEY = TopicPartition("t", 0)
SETTINGS = {
    "storage.engine": "memory",
    "delivery.timeout_ms": 60_000,
    "delivery.backoff_ms": 0,
    "limits.idle_timeout_ms": 86_400_000,
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    """With a table of five keys."""
    with running(tmp_path / "data", SETTINGS) as found:
        found.create("t", kind="table")
        write(found, 0, 5)
        yield found


def write(broker: RunningBroker, first: int, count: int, partition: int = 0) -> None:
    client = broker.raw("writer")
    for rank in range(first, first + count):
        client.publish("t", batch.encode([(b"k%d" % rank, b"v", 1)]), partition=partition)


class Store:
    """A staging store in memory that survives what happens to its consumer. It fails once, at the step it is told: then
    what it was given is not in it. `loaded` is called when it is."""

    def __init__(self, failing: str = "", error: type[BaseException] = OSError) -> None:
        self.visible: list[int] = []
        self.staged: list[int] = []
        self.begun: list[str] = []
        self.switched: list[str] = []
        self.loaded: Callable[[], None] = lambda: None
        self._failing, self._error = failing, error

    def _step(self, name: str) -> None:
        if name == self._failing:
            self._failing = ""
            raise self._error(f"{name}: no room")

    def begin(self, refresh: Refresh) -> int:
        again = self.begun[-1:] == [refresh.reset_id]
        self.begun.append(refresh.reset_id)
        self._step("begin")
        if not again:
            self.staged = []
        return self.staged[-1] + 1 if self.staged else refresh.from_offset

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        if self.staged:
            self._step("load")
        self.staged += [record.offset for record in records]
        self.loaded()

    def switch(self, refresh: Refresh) -> None:
        self._step("switch")
        self.visible = list(self.staged)
        self.switched.append(refresh.reset_id)


def until(done: Callable[[], object], *consumers: Consumer) -> list[Record]:
    """Poll until something holds; the records that came meanwhile, acknowledged."""
    found: list[Record] = []
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{len(found)} records came"
        for consumer in consumers:
            records = consumer.poll(0.02)
            found += records
            if records:
                consumer.ack(records[-1])
    return found


def load_in_part(consumer: Consumer, store: Store) -> None:
    """Poll until the first record of a refresh is loaded, and no more."""
    store.loaded = lambda: consumer.pause(*KEY)
    until(lambda: store.staged, consumer)
    assert store.staged == [0]
    store.loaded = lambda: None


def disconnect(broker: RunningBroker, consumer: Consumer) -> None:
    """Cut its connection, and wait until it has noticed."""
    lost: list[object] = []
    name = consumer.client_id

    def cut() -> None:
        lost.extend(each for each in list(broker.broker.sessions) if each.client_id == name)
        for session in lost:
            session.transport.close("test")  # type: ignore[attr-defined]

    broker.call(cut)
    assert len(lost) == 1


STEPS = [("begin", OSError), ("load", OSError), ("load", KeyboardInterrupt), ("switch", OSError)]


@pytest.mark.parametrize("group", ["g", ""])
@pytest.mark.parametrize(("step", "error"), STEPS)
def test_a_store_that_fails_begins_the_same_refresh_again(
    broker: RunningBroker, group: str, step: str, error: type[BaseException]
) -> None:
    store = Store(step, error)
    with broker.consumer(["t"], group, staging=store, window_records=2) as consumer:
        until(lambda: consumer.assignment, consumer)
        consumer.refresh("t", 0)
        with pytest.raises(error, match="no room"):
            until(lambda: store.switched, consumer)
        assert store.visible == []
        assert until(lambda: broker.counters()["refreshes_done"], consumer) == []
        assert store.visible == [0, 1, 2, 3, 4]
        assert len(store.begun) == 2 and store.begun[0] == store.begun[1]
        assert store.switched == store.begun[:1]
        # What comes behind it is for the caller.
        write(broker, 5, 1)
        assert [record.offset for record in consumer.poll(SECONDS)] == [5]


@pytest.mark.parametrize("how", ["hangs", "hangs elsewhere", "disconnects"])
def test_a_refresh_that_another_member_finishes_is_forgotten(broker: RunningBroker, how: str) -> None:
    """When the partition comes back, its records are for the caller, and its place counts."""
    stores = [Store(), Store()]
    broker.create("u")
    with broker.consumer(["t", "u"], "g", staging=stores[0], window_records=2) as first:
        until(lambda: len(first.assignment) == 2, first)
        if how == "hangs elsewhere":  # then what is in its hands of t is revoked, not lost
            first.pause("u", 0)
            broker.raw("filler").publish("u", numbered(0, 1))
            broker.advance(40)
        first.refresh("t", 0)
        load_in_part(first, stores[0])
        second = broker.consumer(["t"], "g", staging=stores[1])
        until(lambda: len(broker.http("GET", "/v1/groups/g")[1]["members"]) == 2)
        assert KEY in first.assignment
        if how == "disconnects":
            disconnect(broker, first)
        else:
            broker.advance(25 if how == "hangs elsewhere" else 61)
        seen = until(lambda: broker.counters()["refreshes_done"], first, second)
        assert KEY not in first.assignment
        for topic in ("t", "u"):
            first.resume(topic, 0)
        second.close()
        write(broker, 5, 1)
        seen += until(lambda: KEY in first.positions() and first.positions()[KEY].next_offset == 6, first)
        assert [record.offset for record in seen if record.topic == "t"] == [5]
        assert (stores[0].visible, stores[0].staged, len(stores[0].begun)) == ([], [0], 1)
        assert stores[1].visible == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("group", ["g", ""])
def test_places_stand_still_while_a_refresh_loads(broker: RunningBroker, tmp_path: Path, group: str) -> None:
    """What readers see is what was there before; the place moves with it when the store has switched."""
    path, store = tmp_path / "places", Store()

    def stands() -> bool:
        consumer.commit(SECONDS)
        return consumer.positions() == {} and path.read_bytes() == before

    with broker.consumer(["t"], group, position_file=path, staging=store, window_records=2) as consumer:
        while not (records := consumer.poll(SECONDS)) or records[-1].offset < 4:
            consumer.ack(records[-1])
        consumer.ack(records[-1])
        consumer.commit(SECONDS)
        before = path.read_bytes()
        assert PositionFile(path).read()[KEY].next_offset == 5
        write(broker, 5, 2)
        consumer.refresh("t", 0)  # answered behind the announcement
        assert stands()
        load_in_part(consumer, store)
        assert stands()
        consumer.resume(*KEY)
        until(lambda: store.visible, consumer)
        assert consumer.positions()[KEY].next_offset == 7
        consumer.commit(SECONDS)
    assert PositionFile(path).read()[KEY].next_offset == 7


def test_a_reader_of_its_own_is_told_of_its_refresh_again(broker: RunningBroker) -> None:
    """Its refresh was forgotten with its connection. Once it is over, the reader goes on where it stands."""
    store = Store()
    elsewhere = {KEY: Position(b"\x01" * 16, 1, 2)}
    with broker.consumer(["t"], positions=elsewhere, staging=store, window_records=2) as consumer:
        load_in_part(consumer, store)
        disconnect(broker, consumer)
        consumer.resume(*KEY)
        assert until(lambda: store.switched, consumer) == []
        assert store.visible == [0, 1, 2, 3, 4]
        assert len(set(store.begun)) == 2
        write(broker, 5, 1)
        (record,) = consumer.poll(SECONDS)
        consumer.ack(record)
        disconnect(broker, consumer)
        write(broker, 6, 1)
        assert [record.offset for record in consumer.poll(SECONDS)] == [6]
        assert len(store.begun) == 2


def test_a_place_in_a_staging_store_is_not_stored(broker: RunningBroker, tmp_path: Path) -> None:
    """The connection goes in the middle of a refresh, and the reader ends before it is back."""
    path, store = tmp_path / "places", Store()
    PositionFile(path).update({KEY: Position(b"\x01" * 16, 1, 2)})
    with broker.consumer(["t"], position_file=path, staging=store, window_records=2) as consumer:
        load_in_part(consumer, store)
        disconnect(broker, consumer)
        deadline = time.monotonic() + SECONDS
        while consumer.assignment:
            assert time.monotonic() < deadline
        consumer.poll(0.0)
    assert PositionFile(path).read() == {KEY: Position(b"\x01" * 16, 1, 2)}
    with broker.consumer(["t"], position_file=path, staging=store) as consumer:
        assert until(lambda: store.switched, consumer) == []
    assert store.visible == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("start", ["committed", "latest"])
def test_a_reader_that_asked_for_a_refresh_gets_it_after_a_reconnect(broker: RunningBroker, start: str) -> None:
    store = Store()
    with broker.consumer(["t"], start=start, staging=store, window_records=2) as consumer:
        until(lambda: consumer.assignment, consumer)
        write(broker, 5, 1)
        until(lambda: KEY in consumer.positions() and consumer.positions()[KEY].next_offset == 6, consumer)
        consumer.refresh("t", 0)
        load_in_part(consumer, store)
        disconnect(broker, consumer)
        write(broker, 6, 2)
        consumer.resume(*KEY)
        assert until(lambda: store.switched, consumer) == []
        assert store.visible == list(range(8))


def test_a_store_that_failed_and_then_the_connection(broker: RunningBroker) -> None:
    store, elsewhere = Store("load"), {KEY: Position(b"\x01" * 16, 1, 2)}
    with broker.consumer(["t"], positions=elsewhere, staging=store, window_records=2) as consumer:
        with pytest.raises(OSError):
            until(lambda: store.switched, consumer)
        disconnect(broker, consumer)
        assert until(lambda: store.switched, consumer) == []
    assert store.visible == [0, 1, 2, 3, 4]


class Together:
    """A staging store that switches so many partitions in one step, once it is allowed to."""

    def __init__(self, partitions: int, *, allowed: bool = True) -> None:
        self.allowed, self._partitions = allowed, partitions
        self.staged: dict[tuple[str, int], list[int]] = {}
        self.complete: set[str] = set()
        self.visible: dict[tuple[str, int], list[int]] = {}
        self.position: dict[tuple[str, int], Position] = {}
        self.asked = self.steps = 0

    def begin(self, refresh: Refresh) -> int:
        staged = self.staged.setdefault((refresh.topic, refresh.partition), [])
        return staged[-1] + 1 if staged else refresh.from_offset

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        self.staged[refresh.topic, refresh.partition] += [record.offset for record in records]
        self.position[refresh.topic, refresh.partition] = refresh.position

    def switch(self, refresh: Refresh) -> bool:
        self.asked += 1
        if self.visible:
            return True
        self.complete.add(refresh.reset_id)
        if not self.allowed or len(self.complete) < self._partitions:
            return False
        self.visible = {key: list(staged) for key, staged in self.staged.items()}
        self.steps += 1
        return True


def partitions_of(broker: RunningBroker, group: str) -> list[dict[str, Any]]:
    groups = broker.http("GET", "/v1/groups")[1]["groups"]
    return next((one["partitions"] for one in groups if one["name"] == group), [])


def lag(broker: RunningBroker, group: str) -> int:
    """Records that it has not acknowledged; -1 before it has begun."""
    return sum(one["lag"] for one in partitions_of(broker, group)) if partitions_of(broker, group) else -1


def refreshing(broker: RunningBroker, group: str) -> list[bool]:
    return [
        one["refresh"] is not None and one["refresh"]["state"] == "refreshing" for one in partitions_of(broker, group)
    ]


@pytest.fixture
def shelves(broker: RunningBroker) -> RunningBroker:
    """With two tables of five partitions in all, each with a record."""
    broker.create("u", kind="table", partitions=3)
    broker.create("w", kind="table", partitions=2)
    for topic, partitions in (("u", 3), ("w", 2)):
        for partition in range(partitions):
            fill(broker, topic, partition)
    return broker


def fill(broker: RunningBroker, topic: str, partition: int) -> None:
    broker.raw("writer").publish(topic, batch.encode([(b"k", b"v", 1)]), partition=partition)


def test_partitions_and_topics_are_switched_in_one_step(shelves: RunningBroker) -> None:
    store = Together(5)
    with shelves.consumer(["u", "w"], "g", staging=store) as consumer:
        assert len(until(lambda: len(consumer.next_offsets()) == 5 and lag(shelves, "g") == 0, consumer)) == 5
        for topic, partition in list(consumer.next_offsets()):
            consumer.refresh(topic, partition)
        assert until(lambda: store.visible, consumer) == []
        assert store.steps == 1 and sorted(store.visible) == [("u", 0), ("u", 1), ("u", 2), ("w", 0), ("w", 1)]
        wait_for(lambda: not any(refreshing(shelves, "g")), "the broker knows of all")


def test_what_is_published_while_it_is_too_early_is_loaded_too(shelves: RunningBroker) -> None:
    store = Together(5, allowed=False)
    with shelves.consumer(["u", "w"], "g", staging=store) as consumer:
        until(lambda: len(consumer.next_offsets()) == 5 and lag(shelves, "g") == 0, consumer)
        for topic, partition in list(consumer.next_offsets()):
            consumer.refresh(topic, partition)
        assert until(lambda: len(store.complete) == 5, consumer) == []
        fill(shelves, "u", 2)
        assert until(lambda: store.staged["u", 2] == [0, 1] and lag(shelves, "g") == 0, consumer) == []
        assert not store.visible and all(refreshing(shelves, "g"))
        store.allowed = True
        consumer.switch()
        assert store.steps == 1 and store.visible["u", 2] == [0, 1]
        wait_for(lambda: not any(refreshing(shelves, "g")), "the broker knows of all")
        fill(shelves, "u", 2)
        (record,) = until(lambda: lag(shelves, "g") == 0, consumer)
        assert record.offset == 2
    with shelves.consumer(["u", "w"], "h", positions=store.position) as consumer:
        (record,) = until(lambda: lag(shelves, "h") == 0, consumer)
        assert record.offset == 2


def test_a_store_that_waits_survives_a_broker_that_was_restarted(tmp_path: Path) -> None:
    store = Together(1, allowed=False)
    kept = {**SETTINGS, "storage.engine": "segment"}
    with running(tmp_path / "kept", kept) as broker:
        settings = {**kept, "listen.tcp": broker.server}
        broker.create("u", kind="table")
        fill(broker, "u", 0)
        consumer = broker.consumer(["u"], "g", staging=store)
        until(lambda: lag(broker, "g") == 0, consumer)
        consumer.refresh("u", 0)
        until(lambda: store.complete, consumer)
    with running(tmp_path / "kept", settings) as again:
        asked = store.asked
        until(lambda: store.asked > asked, consumer)
        assert not store.visible and refreshing(again, "g") == [True]
        store.allowed = True
        consumer.switch()
        wait_for(lambda: refreshing(again, "g") == [False], "the broker knows")
        consumer.close()
