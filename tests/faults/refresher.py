"""A consumer with a store of its own, as a process that stops at each step of a refresh until it is told to go on.

    python -m tests.faults.refresher '{"server": ..., "topic": ..., "group": ..., "store": ..., "window": 40}'

It writes "at STEP RESET_ID" and reads a line before it goes on; STEPS are in the order in which they come.
"""

import json
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from edgebroker.client.consumer import Consumer
from edgebroker.client.refresh import Refresh
from edgebroker.common.records import Record
from edgebroker.network.wire import frames

STEPS = ("announced", "begun", "accepted", "loading", "unswitched", "switched", "ready")
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS visible (key TEXT PRIMARY KEY, value TEXT);
    CREATE TABLE IF NOT EXISTS staged (key TEXT PRIMARY KEY, value TEXT);
    CREATE TABLE IF NOT EXISTS places (store TEXT PRIMARY KEY, reset_id TEXT, next_offset INTEGER);
    CREATE TABLE IF NOT EXISTS switches (reset_id TEXT);
    INSERT OR IGNORE INTO places VALUES ('visible', '', 0);
"""


class Visible(NamedTuple):
    """Rows, the refresh they came with, the offset up to which they go, and every switch there ever was."""

    rows: dict[str, str]
    reset_id: str
    next_offset: int
    switches: list[str]


class Store:
    """Visible and staged rows in SQLite. A row of a table is its key, one of a stream its offset."""

    def __init__(self, path: str | Path, report: Callable[[str, str], None] = lambda step, reset_id: None) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, timeout=20.0, check_same_thread=False)
        self._database.executescript(_SCHEMA)
        self._report = report

    # ---- staging ----

    def begin(self, refresh: Refresh) -> int:
        self._report("announced", refresh.reset_id)
        with self._database as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM places WHERE store = 'staged' AND reset_id != ?", [refresh.reset_id])
            shown, staged = self.place("visible"), self.place("staged")
            if shown[0] == refresh.reset_id:
                wanted = shown[1]
            elif staged[0] == refresh.reset_id:
                wanted = staged[1]
            else:
                wanted = refresh.from_offset
                database.execute("DELETE FROM staged")
                database.execute("INSERT INTO places VALUES ('staged', ?, ?)", [refresh.reset_id, wanted])
        self._report("begun", refresh.reset_id)
        return wanted

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        self._report("accepted", refresh.reset_id)
        self.put("staged", records, refresh.next_offset)
        self._report("loading", refresh.reset_id)

    def switch(self, refresh: Refresh) -> None:
        if self.place("visible")[0] == refresh.reset_id:
            return
        self._report("unswitched", refresh.reset_id)
        with self._database as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM visible")
            database.execute("INSERT INTO visible SELECT * FROM staged")
            database.execute(
                "INSERT OR REPLACE INTO places VALUES ('visible', ?, ?)", [refresh.reset_id, refresh.next_offset]
            )
            database.execute("INSERT INTO switches VALUES (?)", [refresh.reset_id])
        self._report("switched", refresh.reset_id)

    # ---- rows ----

    def place(self, store: str) -> tuple[str, int]:
        """Which refresh a store holds, and up to which offset."""
        found = self._database.execute("SELECT reset_id, next_offset FROM places WHERE store = ?", [store]).fetchone()
        return found or ("", -1)

    def put(self, store: str, records: Sequence[Record], next_offset: int) -> None:
        """Take records over, each once, in one transaction with the place behind them."""
        with self._database as database:
            database.execute("BEGIN IMMEDIATE")
            known = self.place(store)[1]
            for record in records:
                if record.offset < known:
                    continue
                key = record.key.decode() if record.key is not None else str(record.offset)
                if record.value is None:
                    database.execute(f"DELETE FROM {store} WHERE key = ?", [key])
                else:
                    database.execute(f"INSERT OR REPLACE INTO {store} VALUES (?, ?)", [key, record.value.decode()])
            if next_offset > known:
                database.execute("UPDATE places SET next_offset = ? WHERE store = ?", [next_offset, store])

    def add(self, key: str) -> None:
        """A row that only a refresh removes."""
        self._database.execute("INSERT INTO visible VALUES (?, '')", [key])

    def visible(self) -> Visible:
        """What is there at one moment."""
        with self._database as database:
            database.execute("BEGIN")
            rows = dict(database.execute("SELECT key, value FROM visible").fetchall())
            switches = [row[0] for row in database.execute("SELECT reset_id FROM switches")]
            return Visible(rows, *self.place("visible"), switches)

    def close(self) -> None:
        self._database.close()


def report(step: str, reset_id: str) -> None:
    print(f"at {step} {reset_id}", flush=True)
    if not sys.stdin.readline():
        sys.exit("the test is gone")


def watch_ready(consumer: Consumer) -> None:
    """Stop the I/O thread behind each READY: it is sent, its answer is not read."""
    link = consumer._subscriber.link
    request = link.request

    def watched(correlation: int, data: bytes, *rest: object, **options: object) -> bool:
        sent = request(correlation, data, *rest, **options)  # type: ignore[arg-type]
        if sent and frames.HEADER.unpack_from(data)[1] == frames.FrameType.READY:
            report("ready", frames.read_ready(memoryview(data)[frames.HEADER_BYTES :]).reset_id.hex())
        return sent

    link.request = watched  # type: ignore[method-assign]


def main() -> None:
    options = json.loads(sys.argv[1])
    store = Store(options["store"], report)
    with Consumer(
        options["server"],
        [options["topic"]],
        options["group"],
        client_id="refresher",
        auto_ack=False,
        staging=store,
        window_records=options["window"],
    ) as consumer:
        watch_ready(consumer)
        while True:
            records = consumer.poll(None)
            store.put("visible", records, records[-1].offset + 1)
            consumer.ack(records[-1])


if __name__ == "__main__":
    main()
