"""A table that keeps the disk full writes its own snapshot: space comes back, and no key is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgebroker.client.consumer import Consumer
from edgebroker.common import batch
from edgebroker.common.errors import Code
from tests.integration.test_topic_undelete import problems
from tests.kit.brokers import RunningBroker, numbered, running
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

Table = dict[bytes, bytes]
KIB = 1 << 10


@contextmanager
def small(path: Path, kib: int = 4000, **settings: object) -> Iterator[RunningBroker]:
    """A node whose logs may take so much."""
    wanted = {
        "storage.max_bytes": kib * KIB,
        "storage.segment_bytes": 64 * KIB,
        "storage.soft_free_bytes": 0,
        "limits.idle_timeout_ms": 3_600_000,
    }
    with running(path, {**wanted, "storage.hard_free_bytes": 0, **settings}) as broker:
        yield broker


def fill(broker: RunningBroker, rng: random.Random, kib: int, live: Table, codec: Any = "none") -> None:
    """Publish changes of 200 keys until the table has grown by so much."""
    client, done = broker.raw(f"filler-{rng.random()}"), 0
    while done < kib * KIB:
        rows: list[tuple[bytes, bytes | None, int]] = []
        for _ in range(40):
            key = b"key-%d" % rng.randrange(200)
            value = None if rng.random() < 0.1 else b"%d" % rng.randrange(1 << 60) + b"." * 500
            live.pop(key, None)
            if value is not None:
                live[key] = value
            rows.append((key, value, 1000))
        data = batch.encode(rows, codec=codec)
        while (code := client.publish("prices", data).code) is not Code.OK:
            assert code.retryable, code
            pass_time(broker)
        done += len(data)
    broker.drop(client)


def content(broker: RunningBroker) -> tuple[Table, list[Any]]:
    """What a new reader makes of the table, and the gaps that it was told."""
    table: Table = {}
    gaps: list[Any] = []
    end = broker.http("GET", "/v1/topics/prices")[1]["partitions"][0]["durable_end"]
    with Consumer(broker.server, ["prices"], start="earliest", on_gap=gaps.append) as consumer:
        while max(consumer.next_offsets().values(), default=0) < end:
            for record in consumer.poll(0.05):
                assert record.key is not None
                table.pop(record.key, None)
                if record.value is not None:
                    table[record.key] = record.value
                consumer.ack(record)
    return table, gaps


def pass_time(broker: RunningBroker) -> None:
    """A second; less while a snapshot is written, for that takes real time."""
    broker.advance(0.05 if broker.broker.core.snapshot_writer.running else 1.0)


def passes(broker: RunningBroker, condition: Any, what: str) -> None:
    def look() -> Any:
        pass_time(broker)
        return condition()

    wait_for(look, what)


def log_start(broker: RunningBroker) -> int:
    log = broker.broker.engine.log("prices", 0)
    assert log is not None
    return log.log_start


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_table_makes_room_for_the_others(tmp_path: Path, codec: str) -> None:
    """Its history goes as far as the disk wants space, again and again; every key is there, and so is what nobody has
    read yet of the others."""
    rng, live = random.Random(5), Table()
    with small(tmp_path / "data") as broker:
        broker.create("prices", kind="table")
        other, sold = broker.raw("other"), 0
        while sold < 60:
            fill(broker, rng, 120, live, codec)
            answer = other.publish("sales", numbered(sold * 20, 20, size=2000))
            sold += answer.code is Code.OK
            assert answer.code in (Code.OK, Code.DISK_FULL)
            passes(broker, lambda: "disk_full" not in problems(broker), "there is room")
        assert broker.counters()["snapshots_completed"] >= 2
        settled(broker)
        assert content(broker) == (live, [])
        assert broker.broker.engine.log("sales", 0).log_start == 0  # type: ignore[union-attr]


def settled(broker: RunningBroker) -> None:
    """Nothing more is removed."""
    before = -1
    while before != (before := log_start(broker)):
        for _ in range(5):
            broker.advance(1.0)
            broker.http("GET", "/healthz")


def test_a_full_disk_can_be_left(tmp_path: Path) -> None:
    """The table alone fills the budget, and producers are refused; it shrinks by itself."""
    rng, live = random.Random(7), Table()
    with small(tmp_path / "data", 100_000) as broker:
        broker.create("prices", kind="table", partitions=1)
        fill(broker, rng, 3000, live)
    with small(tmp_path / "data", 1500) as broker:
        passes(broker, lambda: "disk_full" in problems(broker), "it is full")
        assert broker.raw("early").publish("prices", numbered(0, 1)).code is Code.DISK_FULL
        passes(broker, lambda: "disk_full" not in problems(broker), "it is not any more")
        settled(broker)
        assert content(broker) == (live, [])
        fill(broker, rng, 50, live)
        assert content(broker) == (live, [])


def test_what_cannot_be_a_snapshot_is_told(tmp_path: Path) -> None:
    """A record without a key is in the table: nothing is removed, and the node says why."""
    live = Table()
    with small(tmp_path / "data", 100_000) as broker:
        broker.create("prices", kind="table")
        assert broker.raw("wrong").publish("prices", batch.encode([(None, b"no key", 1)])).code is Code.OK
        fill(broker, random.Random(1), 2000, live)
    with small(tmp_path / "data", 1500) as broker:
        passes(broker, lambda: "snapshot_failed" in problems(broker), "it is told")
        assert problems(broker)["snapshot_failed"] == "prices: a record has no key"
        assert log_start(broker) == 0
        assert broker.http("GET", "/v1/topics/prices")[1]["snapshot_in_progress"] is None


def test_a_stop_while_it_is_written(tmp_path: Path) -> None:
    """What is there of it are ordinary records; the next run begins again."""
    rng, live = random.Random(9), Table()
    with small(tmp_path / "data", 100_000) as broker:
        broker.create("prices", kind="table")
        fill(broker, rng, 3000, live)
    with small(tmp_path / "data", 1500) as broker:
        passes(broker, lambda: broker.http("GET", "/v1/topics/prices")[1]["snapshot_in_progress"], "it is under way")
    with small(tmp_path / "data", 1500) as broker:
        assert content(broker) == (live, [])
        passes(broker, lambda: "disk_full" not in problems(broker) and log_start(broker) > 0, "it is complete")
        settled(broker)
        assert content(broker) == (live, [])
