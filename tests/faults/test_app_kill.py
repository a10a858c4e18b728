"""kill -9 of a real application, and of its broker, at random moments while records come, topics are loaded again, and
views are built from the copy: after another version, and after the database was lost.

After each kill another program reads the local database: its rows have to be those of the records below the positions
that it says, no matter what was cut off. At last the copy has the bytes of the broker. EB_APP_KILL_CYCLES says how many
times (15), EB_APP_KILL_SEED with which seed.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import EdgeBrokerError
from tests.kit.applications import environment
from tests.kit.waiting import wait_for

from .traffic import SETTINGS, pass_time

CYCLES = int(os.environ.get("EB_APP_KILL_CYCLES", "15"))
SEED = int(os.environ.get("EB_APP_KILL_SEED", "20261130"))
PARTITIONS, KEYS, DELETED = 2, 400, 0.02
SOURCE = """
import msgspec
from edgebroker.consumer import consumer


class Price(msgspec.Struct):
    cents: int


@consumer("prices", view=Price, version=VERSION)
class Prices: ...
"""

Rows = dict[bytes, int]


class Snapshot(NamedTuple):
    """What is seen at one moment: the next offset of each partition, the rows, and whether some are loaded again."""

    positions: dict[int, int]
    rows: Rows
    loading: bool


class Publisher(threading.Thread):
    """Sets and deletes keys at random until it is stopped, a few records at a time."""

    def __init__(self, server: str) -> None:
        super().__init__()
        self._producer, self._rng = Producer(server), random.Random(SEED + 1)
        self._ended = threading.Event()
        self.failure: EdgeBrokerError | None = None

    def run(self) -> None:
        number = 0
        try:
            while not self._ended.is_set():
                for _ in range(self._rng.randrange(1, 200)):
                    key, number = self._rng.randrange(KEYS), number + 1
                    value = None if self._rng.random() < DELETED else json.dumps({"cents": number}).encode()
                    self._producer.send("prices", value, b"c%d" % key, partition=key % PARTITIONS)
                self._producer.flush()
                pass_time(self._rng.uniform(0.0, 0.05))
        except EdgeBrokerError as error:
            self.failure = error

    def stop(self) -> None:
        self._ended.set()
        self.join()
        self._producer.close()


class Till:
    """The application as a process, and its database as another program reads it."""

    def __init__(self, directory: Path, server: str, data: Path | None = None) -> None:
        data = data if data is not None else directory / "edgebroker-till"
        self._source, self.path = directory / "till.py", data / "app.db"
        self._versions = 0
        self.change()
        self._environment = environment(server, DATA_DIR=str(data), COPY="on")
        self.log = directory / "till.log"
        self.process: subprocess.Popen[bytes] | None = None

    def change(self) -> None:
        """Another version, for the next start."""
        self._versions += 1
        self._source.write_text(SOURCE.replace("VERSION", str(self._versions)))

    def lose(self) -> None:
        """The database, which is not running, is gone."""
        for path in self.path.parent.glob("app.db*"):
            path.unlink()

    def copied(self) -> list[bytes]:
        """The logs of its copy."""
        return stored(self.path.parent / "copy" / "topics")

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "edgebroker", "app", "run", str(self._source)]
            self.process = subprocess.Popen(command, cwd=self._source.parent, env=self._environment, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def read(self, path: Path | None = None) -> Snapshot | None:
        """What the database has, or a copy of it; None before there is something."""
        path = path if path is not None else self.path
        if not path.exists():
            return None
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            connection.execute("BEGIN")
            positions = dict(connection.execute("SELECT partition, next_offset FROM _position WHERE topic='prices'"))
            rows = {key.encode(): cents for key, cents in connection.execute("SELECT key, cents FROM prices")}
            ((loading,),) = connection.execute("SELECT count(*) FROM _loading WHERE target >= 0")
        except sqlite3.OperationalError as error:
            # Before its first transaction there are no tables; anything else is a fault.
            assert "no such table" in str(error), error
            return None
        finally:
            connection.close()
        return Snapshot(positions, rows, loading > 0)


def read_log(broker: BrokerProcess) -> dict[int, list[tuple[bytes, int | None]]]:
    """Key and cents of each record, by partition in the order of the offsets, which have no gaps here."""
    lines = call(broker.admin, "GET", "/v1/topics/prices")["partitions"]
    ends = {line["partition"]: line["durable_end"] for line in lines}
    found: dict[int, list[tuple[bytes, int | None]]] = {partition: [] for partition in ends}
    with Consumer(broker.server, ["prices"], start="earliest", auto_ack=False) as consumer:
        while any(len(found[partition]) < end for partition, end in ends.items()):
            records = consumer.poll(10.0)
            assert records, "the log can be read to its end"
            for record in records:
                assert record.offset == len(found[record.partition]) and record.key is not None
                cents = None if record.value is None else json.loads(record.value)["cents"]
                found[record.partition].append((record.key, cents))
            consumer.ack(records[-1])
    return found


def stored(directory: Path) -> list[bytes]:
    """The bytes of the logs below a directory, in the order of their names."""
    logs = sorted(path.parent for path in directory.rglob("identity"))
    return [b"".join(path.read_bytes() for path in sorted(log.glob("*.log"))) for log in logs]


def fold(log: dict[int, list[tuple[bytes, int | None]]], positions: dict[int, int]) -> Rows:
    """The rows that the records below these positions make."""
    rows: Rows = {}
    for partition, end in positions.items():
        for key, cents in log[partition][:end]:
            rows.pop(key, None)
            if cents is not None:
                rows[key] = cents
    return rows


@pytest.mark.slow
def test_kills_of_an_application_tear_nothing(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    snapshots: list[Snapshot] = []
    refreshes = changes = losses = 0
    with BrokerProcess(tmp_path / "data", settings=SETTINGS | {"EDGEBROKER_LOG_LEVEL": "warning"}) as broker:
        call(broker.admin, "POST", "/v1/topics", {"name": "prices", "partitions": PARTITIONS})
        till, publisher = Till(tmp_path, broker.server), Publisher(broker.server)
        publisher.start()
        try:
            for _ in range(CYCLES):
                till.start()
                pass_time(rng.uniform(0.2, 1.0))
                if rng.random() < 0.4:
                    refreshes += refresh(broker)
                    pass_time(rng.uniform(0.0, 0.3))
                if rng.random() < 0.2:
                    broker.kill()
                    broker.start()
                till.kill()
                if (found := till.read()) is not None:
                    snapshots.append(found)
                if rng.random() < 0.2:
                    till.change()
                    changes += 1
                elif rng.random() < 0.1:
                    till.lose()
                    losses += 1
            count = check_all(broker, till, publisher, snapshots, f"EB_APP_KILL_SEED={SEED}")
            logs = stored(tmp_path / "data" / "topics" / "prices")
            assert len(logs) == PARTITIONS and all(logs)
            wait_for(lambda: till.copied() == logs, "the copy has all of it")
        finally:
            publisher.stop()
            till.kill()
    torn = sum(one.loading for one in snapshots)
    print(f"{CYCLES} kills, {count} records, {refreshes} refreshes, {changes} versions, {losses} databases lost, "
          f"{torn} kills while loading")  # fmt: skip


def check_all(broker: BrokerProcess, till: Till, publisher: Publisher, snapshots: list[Snapshot], context: str) -> int:
    """Each snapshot, and what the application has at last, is that of the log; how many records that has."""
    publisher.stop()
    assert publisher.failure is None
    log = read_log(broker)
    ends = {partition: len(records) for partition, records in log.items()}
    till.start()
    wait_for(lambda: (found := till.read()) is not None and (found.positions, found.loading) == (ends, False),
             "it has all of the records", 60.0)  # fmt: skip
    last = till.read()
    assert last is not None
    for number, snapshot in enumerate([*snapshots, last]):
        assert snapshot.rows == fold(log, snapshot.positions), f"{context}, snapshot {number}"
    assert "Traceback" not in till.log.read_text()
    return sum(ends.values())


def refresh(broker: BrokerProcess) -> int:
    """Have the topic loaded again; 0 when it cannot be now, because the application has not begun or is loading."""
    try:
        call(broker.admin, "POST", "/v1/groups/till.till-7/refresh", {"topic": "prices"})
    except EdgeBrokerError:
        return 0
    return 1
