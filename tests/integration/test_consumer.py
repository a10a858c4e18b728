"""The public Consumer: places, seeking, acknowledging, gaps, and going on after the connection was lost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edgebroker import Record
from edgebroker.client.refresh import Refresh
from edgebroker.common.errors import ArgumentError, GapError, ResetRequiredError
from edgebroker.common.types import Position
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, config_for, numbered, running, take
from tests.kit.waiting import wait_for


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


class Loading:
    """A staging store in memory."""

    def __init__(self) -> None:
        self.loaded: list[int] = []
        self.visible: list[int] = []

    def begin(self, refresh: Refresh) -> int:
        self.loaded = []
        return refresh.from_offset

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        self.loaded += [record.offset for record in records]

    def switch(self, refresh: Refresh) -> None:
        self.visible = self.loaded


def fill(broker: RunningBroker, count: int, topic: str = "t", each: int = 1, partition: int = 0) -> None:
    """`count` records in batches of `each`, values 0, 1, ..."""
    client = broker.raw("fill")
    for first in range(0, count, each):
        client.publish(topic, numbered(first, each), partition=partition)


def offsets(records: list[Record]) -> list[int]:
    return [record.offset for record in records]


def committed(broker: RunningBroker, group: str, partition: int = 0) -> int:
    return int(broker.http("GET", f"/v1/groups/{group}")[1]["partitions"][partition]["committed"])


def test_iterating_acknowledges_what_was_handled(broker: RunningBroker) -> None:
    fill(broker, 10, each=5)
    with broker.consumer(["t"], "g", window_records=5) as consumer:
        found = iter(consumer)
        assert [next(found).offset for _ in range(6)] == [0, 1, 2, 3, 4, 5]
        wait_for(lambda: committed(broker, "g") == 5, "a delivery is acknowledged when all of it was handled")
        consumer.commit(SECONDS)
        assert committed(broker, "g") == 6, "commit() means what was handed out"
    with broker.consumer(["t"], "g") as consumer:
        assert offsets(take(consumer, 4)) == [6, 7, 8, 9]


def test_polling_acknowledges_what_the_poll_before_returned(broker: RunningBroker) -> None:
    """The loop that users of other clients write."""
    fill(broker, 15, each=5)
    with broker.consumer(["t"], "g", window_records=5) as consumer:
        assert offsets(consumer.poll(SECONDS)) == [0, 1, 2, 3, 4]
        assert offsets(consumer.poll(SECONDS)) == [5, 6, 7, 8, 9]
        wait_for(lambda: committed(broker, "g") == 5, "what was returned before is handled")
    wait_for(lambda: committed(broker, "g") == 10, "the block ended without an exception")
    with pytest.raises(ZeroDivisionError), broker.consumer(["t"], "g") as consumer:
        assert offsets(consumer.poll(SECONDS)) == [10, 11, 12, 13, 14]
        raise ZeroDivisionError
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        assert offsets(consumer.poll(SECONDS)) == [10, 11, 12, 13, 14], "half done counts as not done"
        consumer.poll(0.0)
        consumer.commit(SECONDS)
    assert committed(broker, "g") == 10


def test_what_the_caller_acknowledges_is_left_to_the_caller(broker: RunningBroker) -> None:
    fill(broker, 10, each=10)
    with broker.consumer(["t"], "g") as consumer:
        records = consumer.poll(SECONDS)
        consumer.ack(records[3])
        consumer.poll(0.0)
        consumer.commit(SECONDS)
        assert committed(broker, "g") == 4
    with broker.consumer(["t"], "g") as consumer:
        consumer.nack(consumer.poll(SECONDS)[2], "no")
        consumer.poll(0.0)
        consumer.commit(SECONDS)
        assert committed(broker, "g") == 6


def test_a_handler_that_is_interrupted_has_not_handled_its_records(broker: RunningBroker) -> None:
    fill(broker, 10, each=10)

    def handle(records: list[Record]) -> None:
        if records[0].offset:
            raise KeyboardInterrupt

    with broker.consumer(["t"], "g") as consumer:
        try:
            consumer.run(handle, 4)
        except KeyboardInterrupt:
            pass
    wait_for(lambda: committed(broker, "g") == 4, "the first piece")
    with broker.consumer(["t"], "g") as consumer:
        assert next(iter(consumer)).offset == 4


def test_leaving_a_loop_acknowledges_what_was_before_the_last_record(broker: RunningBroker) -> None:
    fill(broker, 10, each=10)
    with pytest.raises(ZeroDivisionError), broker.consumer(["t"], "g") as consumer:
        for record in consumer:
            if record.offset == 4:
                raise ZeroDivisionError
    wait_for(lambda: committed(broker, "g") == 4, "the one that failed comes again")
    with broker.consumer(["t"], "g") as consumer:
        for record in consumer:
            if record.offset == 6:
                break
    wait_for(lambda: committed(broker, "g") == 7, "a loop that ended well handled its last one")


def test_a_slow_handler_is_acknowledged_by_time(broker: RunningBroker) -> None:
    """Not only when a delivery of many records is over: its lease would be gone by then."""
    fill(broker, 10, each=10)
    with broker.consumer(["t"], "g") as consumer:
        found = iter(consumer)
        for offset in range(4):
            assert next(found).offset == offset
            consumer._handed_out._ack_due = 0.0  # a second has passed
        wait_for(lambda: committed(broker, "g") == 3, "those before the one in hand are acknowledged")


def test_explicit_acknowledgement(broker: RunningBroker) -> None:
    fill(broker, 10, each=5)
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        records = take(consumer, 10)
        consumer.commit(SECONDS)
        assert committed(broker, "g") == 0
        consumer.ack(records[6])
        consumer.ack(records[2])  # behind what was acknowledged already: nothing
        consumer.commit(SECONDS)
        assert committed(broker, "g") == 7
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        found = iter(consumer)
        assert [next(found).offset for _ in range(3)] == [7, 8, 9]


def test_run_hands_over_pieces_and_acknowledges_them(broker: RunningBroker) -> None:
    fill(broker, 25, each=25)
    pieces: list[list[int]] = []
    with broker.consumer(["t"], "g") as consumer:

        def handle(records: list[Record]) -> None:
            pieces.append(offsets(records))
            if pieces[-1][-1] == 24:
                raise KeyError("enough")

        with pytest.raises(KeyError):
            consumer.run(handle, batch_size=10)
        consumer.commit(SECONDS)
    assert pieces == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    assert committed(broker, "g") == 20


def test_positions_kept_by_the_client_win(broker: RunningBroker) -> None:
    broker.create("t", partitions=2)
    for partition in (0, 1):
        fill(broker, 10, partition=partition)
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        records = take(consumer, 20)
        for record in records:
            if record.offset == (3 if record.partition == 0 else 7):
                consumer.ack(record)
        kept = consumer.positions()
    assert {place: position.next_offset for place, position in kept.items()} == {("t", 0): 4, ("t", 1): 8}
    for group in ("g", "another", "g"):
        with broker.consumer(["t"], group, positions=kept, auto_ack=False) as consumer:
            found = take(consumer, 8)
        assert sorted((r.partition, r.offset) for r in found) == [*((0, n) for n in range(4, 10)), (1, 8), (1, 9)]
    # The partition that is not among the positions begins where the group (or start) says.
    with broker.consumer(["t"], "third", positions={("t", 0): kept["t", 0]}) as consumer:
        assert sorted(offsets(take(consumer, 16))) == sorted([*range(4, 10), *range(10)])


def test_a_position_is_known_before_it_is_acknowledged(broker: RunningBroker) -> None:
    """A program that dies between its transaction and the acknowledgement goes on where its transaction ended."""
    fill(broker, 10)
    with broker.consumer(["t"], "g", auto_ack=False) as consumer:
        records = take(consumer, 10)
        kept = {("t", 0): consumer.position_after(records[6])}
        assert consumer.positions() == {("t", 0): kept["t", 0]._replace(next_offset=0)}
    with broker.consumer(["t"]) as other, pytest.raises(ArgumentError, match="has handed out nothing of t/0"):
        other.position_after(records[6])
    with broker.consumer(["t"], "g", positions=kept) as consumer:
        assert offsets(take(consumer, 3)) == [7, 8, 9]


def test_where_a_log_ends_is_known_at_once(broker: RunningBroker) -> None:
    """Also when there is nothing to read; time stands still here, so no heartbeat is due."""
    broker.create("t")
    with broker.consumer(["t"], "g") as consumer:
        wait_for(lambda: consumer.poll(0.0) == [] and consumer.durable_ends == {("t", 0): 0}, "it is told")


def test_a_position_in_another_log(broker: RunningBroker) -> None:
    fill(broker, 3)
    positions = {("t", 0): Position(b"\x01" * 16, 1, 2)}
    with broker.consumer(["t"], "g", positions=positions) as consumer:
        with pytest.raises(ResetRequiredError) as reset:
            consumer.poll(SECONDS)
        assert (reset.value.topic, reset.value.partition, reset.value.log_start) == ("t", 0, 0)
        consumer.seek("t", 0, reset.value.log_start)  # that is no way around the refresh
        with pytest.raises(ResetRequiredError, match="staging store"):
            consumer.poll(SECONDS)
    loading = Loading()
    with broker.consumer(["t"], "g", positions=positions, staging=loading) as consumer:
        deadline = time.monotonic() + SECONDS
        while not loading.visible:
            assert time.monotonic() < deadline
            assert consumer.poll(0.02) == []
        assert loading.visible == [0, 1, 2]
        # What comes behind the refresh is for the caller again.
        broker.raw().publish("t", numbered(3, 1))
        assert offsets(take(consumer, 1)) == [3]
        assert consumer.positions()["t", 0].log_id == reset.value.log_id


def test_seek(broker: RunningBroker) -> None:
    fill(broker, 100, each=5)
    with broker.consumer(["t"], "g", window_records=20) as consumer:
        assert consumer.poll(SECONDS)[0].offset == 0
        for target in (50, 0, 99, 7):
            consumer.seek("t", 0, target)
            records = consumer.poll(SECONDS)
            assert records[0].offset == target
            consumer.ack(records[-1])
        for target in (90, 20, 30):  # several at once: the last one counts
            consumer.seek("t", 0, target)
        assert offsets(take(consumer, 20)) == list(range(30, 50))
        consumer.seek("t", 0, "earliest")
        assert consumer.poll(SECONDS)[0].offset == 0
        consumer.seek("t", 0, "latest")
        assert consumer.poll(0.05) == []
        broker.raw().publish("t", batch_of(b"new"))
        assert offsets(take(consumer, 1)) == [100]


def test_seek_while_iterating_drops_the_rest(broker: RunningBroker) -> None:
    fill(broker, 30, each=10)
    with broker.consumer(["t"], "g") as consumer:
        seen: list[int] = []
        for record in consumer:
            seen.append(record.offset)
            if seen == [0, 1, 2]:
                consumer.seek("t", 0, 25)
            if record.offset == 29:
                break
        assert seen == [0, 1, 2, 25, 26, 27, 28, 29]


def test_going_on_after_a_restart_on_the_same_port(tmp_path: Path) -> None:
    first = RunningBroker(config_for(tmp_path / "data"))
    settings = {"listen.tcp": first.server}
    first.create("t", partitions=3)
    fill(first, 10)
    consumer = first.consumer(["t"], "g", auto_ack=False)
    try:
        records = take(consumer, 10)
        consumer.ack(records[5])
        first.stop()
        with running(tmp_path / "data", settings) as second:
            again = take(consumer, 4)
            assert offsets(again) == [6, 7, 8, 9]
            # Partitions that had nothing to deliver before are still read.
            for partition in (1, 2):
                fill(second, 3, partition=partition)
            assert sorted((r.partition, r.offset) for r in take(consumer, 6)) == [
                (partition, offset) for partition in (1, 2) for offset in range(3)
            ]
            consumer.ack(again[-1])
            consumer.commit(SECONDS)
            assert committed(second, "g") == 10
    finally:
        consumer.close()


def test_latest_misses_nothing_that_came_while_the_connection_was_down(tmp_path: Path) -> None:
    first = RunningBroker(config_for(tmp_path / "data"))
    fill(first, 5)
    consumer = first.consumer(["t"], "g", start="latest")
    try:
        deadline = time.monotonic() + SECONDS
        while not first.http("GET", "/v1/groups")[1]["groups"]:
            assert time.monotonic() < deadline
        settings = {"listen.tcp": first.server}
        first.stop()
        with running(tmp_path / "data") as hidden:
            fill(hidden, 3)
        with running(tmp_path / "data", settings):
            assert offsets(take(consumer, 3)) == [5, 6, 7]
    finally:
        consumer.close()


@pytest.mark.parametrize("group", ["g", ""])
@pytest.mark.parametrize(("target", "expected"), [(2, 2), (8, 8), ("earliest", 0)])
def test_seeking_while_there_is_no_broker(tmp_path: Path, group: str, target: int | str, expected: int) -> None:
    """What was acknowledged before does not count any more."""
    first = RunningBroker(config_for(tmp_path / "data"))
    fill(first, 10)
    consumer = first.consumer(["t"], group, auto_ack=False)
    try:
        consumer.ack(take(consumer, 10)[5])
        consumer.commit(SECONDS)
        first.stop()
        deadline = time.monotonic() + SECONDS
        while consumer.assignment:
            assert time.monotonic() < deadline
        consumer.seek("t", 0, target)
        with running(tmp_path / "data", {"listen.tcp": first.server}):
            assert offsets(take(consumer, 10 - expected)) == list(range(expected, 10))
    finally:
        consumer.close()


def cut_short(directory: Path) -> int:
    """A log whose first segments retention has removed; where it begins now."""
    settings = {"storage.segment_bytes": 64 << 10, "storage.retention_bytes": 100_000}
    with running(directory, settings) as broker:
        client = broker.raw()
        for first in range(0, 1000, 10):
            client.publish("t", numbered(first, 10, 500))
        deadline = time.monotonic() + SECONDS
        while not (start := broker.http("GET", "/v1/topics/t")[1]["partitions"][0]["log_start"]):
            assert time.monotonic() < deadline
    return int(start)


def test_a_gap_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    cut_short(directory)
    with running(directory) as broker:
        start = broker.http("GET", "/v1/topics/t")[1]["partitions"][0]["log_start"]
        with broker.consumer(["t"], "raises", start=3) as consumer:
            with pytest.raises(GapError) as gap:
                consumer.poll(SECONDS)
            assert (gap.value.first, gap.value.last, gap.value.reason) == (3, start - 1, "RETENTION")
            assert consumer.poll(SECONDS)[0].offset == start
        told: list[GapError] = []
        with broker.consumer(["t"], "told", start=3, on_gap=told.append, window_records=10) as consumer:
            # The gap is larger than the window: it must not stand in its own way.
            assert offsets([next(iter(consumer))]) == [start]
            assert [(gap.first, gap.last) for gap in told] == [(3, start - 1)]
        with broker.consumer(["t"], "passed", start=3, on_gap=told.append, auto_ack=False) as consumer:
            # Nobody handles a gap: that it was seen is stored with nothing else acknowledged.
            assert consumer.poll(SECONDS)[0].offset == start
            consumer.commit(SECONDS)
            assert committed(broker, "passed") == start
        with broker.consumer(["t"], "patient", start=3, window_records=10) as consumer:
            with pytest.raises(GapError):
                consumer.poll(SECONDS)
            assert consumer.poll(SECONDS)[0].offset == start


def test_records_before_a_gap_are_not_acknowledged_by_it(tmp_path: Path) -> None:
    settings = {"storage.segment_bytes": 64 << 10}
    with running(tmp_path / "data", settings) as broker:
        client = broker.raw()
        broker.create("t", on_damage="skip")
        for first in range(0, 400, 10):
            client.publish("t", numbered(first, 10, 500))
    segment = sorted((tmp_path / "data" / "topics" / "t" / "0").glob("*.log"))[0]
    data = bytearray(segment.read_bytes())
    data[data.index(b"....", len(data) // 2)] ^= 0x40
    segment.write_bytes(data)
    with running(tmp_path / "data", settings) as broker:
        told: list[GapError] = []
        with broker.consumer(["t"], "g", auto_ack=False, on_gap=told.append) as consumer:
            records = take(consumer, 390)
            assert len(told) == 1
            consumer.commit(SECONDS)
            assert committed(broker, "g") == 0
            consumer.ack(records[records.index(next(r for r in records if r.offset > told[0].last)) - 1])
            consumer.commit(SECONDS)
            assert committed(broker, "g") == told[0].last + 1


def test_a_window_that_is_full_and_never_acknowledged(broker: RunningBroker, caplog: pytest.LogCaptureFixture) -> None:
    """One sentence says why nothing comes any more, and what to do."""
    fill(broker, 10, each=5)
    with broker.consumer(["t"], "g", window_records=5, auto_ack=False) as consumer:
        assert len(consumer.poll(SECONDS)) == 5

        def said() -> list[str]:
            broker.advance(broker.config.limits.heartbeat_ms / 1000)
            assert consumer.poll(0.0) == []
            return [record.message for record in caplog.records if "acknowledged" in record.message]

        wait_for(said, "it is told")
        assert said() == [
            "t/0: the broker sends no more, because none of the 5 records that were handed out is acknowledged; call "
            "ack() for what is handled, or use auto_ack=True"
        ]
        consumer.ack_to("t", 0, 5)
        assert offsets(consumer.poll(SECONDS)) == [5, 6, 7, 8, 9]


def test_who_acknowledges_is_told_nothing(broker: RunningBroker, caplog: pytest.LogCaptureFixture) -> None:
    fill(broker, 15, each=5)
    with broker.consumer(["t"], "g", window_records=5, auto_ack=False) as consumer:
        consumer.ack(consumer.poll(SECONDS)[-1])
        assert len(consumer.poll(SECONDS)) == 5
        for _ in range(5):
            broker.advance(broker.config.limits.heartbeat_ms / 1000)
            consumer.poll(0.05)
    assert not [record for record in caplog.records if "acknowledged" in record.message]
