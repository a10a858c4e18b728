"""Applications: records through handlers and into views, against a bare loop and a bare database in the same minute."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks.node import DIRECTORY, Node, running
from benchmarks.rows import Row, median_of, rate, scaled
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common import batch, records
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import Position, TopicPartition
from edgebroker.consumer.config import AppConfig
from edgebroker.consumer.database import CACHE_KIB, CHECKPOINT_PAGES, AppDatabase
from edgebroker.consumer.declare.application import load_module, read_application
from edgebroker.consumer.handling.calls import Calls
from edgebroker.consumer.handling.effect import Effect, Portion
from edgebroker.consumer.handling.watch import Watch
from edgebroker.consumer.instance import MOST_RECORDS, Instance
from edgebroker.consumer.views import Views

COUNT, KEYS, TRANSACTIONS = 300_000, 100_000, 100_000
HEAD = """
import msgspec
from edgebroker.consumer import consumer, message_handler


class Price(msgspec.Struct):
    code: str
    cents: int
    name: str


"""
APPLICATIONS = {
    "no-op": ("handler of bytes", "@message_handler('prices')\ndef handle(value: bytes): pass\n", 1.5),
    "struct": ("handler of a struct", "@message_handler('prices')\ndef handle(price: Price): pass\n", 1.0),
    "structs": (
        "handler of batches of structs",
        "@message_handler('prices', batch=1000)\ndef handle(prices: list[Price]): pass\n",
        1.0,
    ),
    "view": ("view, 100,000 keys", "@consumer('prices', view=Price)\nclass Prices: ...\n", 0.0),
}


class Price(msgspec.Struct):
    code: str
    cents: int
    name: str


def applications(pinned: bool) -> list[Row]:
    rows = []
    directory = Path(tempfile.mkdtemp(prefix="edgebroker-bench-", dir=DIRECTORY))
    count = scaled(COUNT)
    try:
        with running(pinned=pinned) as node:
            values = _publish(node, count)
            loop = median_of(lambda run: count / _bare_loop(node, count))
            bare = median_of(lambda run: count / bare_database(directory / f"bare-{run}", values))
            for name, (work, text, target) in APPLICATIONS.items():
                source = directory / f"application_{name.replace('-', '_')}.py"
                source.write_text(HEAD + text)
                found = median_of(_measured(node, source, count))
                if name == "view":
                    ratio = found[0] / bare[0]
                    rows.append(
                        Row(work, rate(found), f"bare sqlite3 {rate(bare)}", ratio, "85 % of bare", ratio >= 0.85)
                    )
                else:
                    reference = f"bare loop {rate(loop)}"
                    reached = found[0] >= target * 1e6
                    rows.append(Row(work, rate(found), reference, found[0] / loop[0], f"{target} M/s", reached))
        rows += [_transactions(directory, size, target) for size, target in ((1000, 0.85), (100, 0.75))]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return rows


def _publish(node: Node, count: int) -> list[tuple[bytes, bytes]]:
    values = [
        (
            b"key-%06d" % (number % KEYS),
            json.dumps({"code": f"c{number % KEYS}", "cents": number, "name": "n" * 40}).encode(),
        )
        for number in range(count)
    ]
    with Producer(node.server) as producer:
        for key, value in values:
            producer.send("prices", value, key)
    return values


def _bare_loop(node: Node, count: int) -> float:
    """A consumer that looks at each record."""
    begun = time.perf_counter()
    with Consumer(node.server, ["prices"], start="earliest") as consumer:
        seen = 0
        while seen < count:
            for _ in consumer.poll():
                seen += 1
    return time.perf_counter() - begun


def bare_database(
    directory: Path,
    values: list[tuple[bytes, bytes]],
    insert: str = "INSERT OR REPLACE",
    size: int = MOST_RECORDS,
    before: int = 0,
) -> float:
    """Seconds to decode and store the same rows, so many to a transaction; those `before` do not count."""
    directory.mkdir()
    database = sqlite3.connect(directory / "bare.db", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    database.execute(f"PRAGMA cache_size=-{CACHE_KIB}")  # as an application has it
    database.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    database.execute(
        "CREATE TABLE prices (key PRIMARY KEY, code TEXT, cents INTEGER, name TEXT, a, b, c) WITHOUT ROWID"
    )
    decode = msgspec.json.Decoder(Price).decode
    begun = time.perf_counter()
    for first in range(0, len(values), size):
        if first == before:
            begun = time.perf_counter()
        rows = []
        for key, value in values[first : first + size]:
            price = decode(value)
            rows.append((key.decode(), price.code, price.cents, price.name, 0, first, 1))
        database.execute("BEGIN")
        database.executemany(f"{insert} INTO prices VALUES (?,?,?,?,?,?,?)", rows)
        database.execute("COMMIT")
    took = time.perf_counter() - begun
    database.close()
    return took


def _transactions(directory: Path, size: int, target: float) -> Row:
    """Records of random keys into a view that has all of them, so many in a transaction, without a broker; and the same
    rows into a bare database."""
    rng, count = random.Random(3), scaled(TRANSACTIONS) // size * size
    values = [_value(number) for number in range(KEYS)] + [_value(rng.randrange(KEYS)) for _ in range(count)]
    found = median_of(lambda run: count / _view(directory / f"view-{size}-{run}", values, size))
    bare = median_of(
        lambda run: count / bare_database(directory / f"bare-{size}-{run}", values, size=size, before=KEYS)
    )
    ours, reference = (f"{one[0] / 1e3:.1f} k/s [{one[1] / 1e3:.1f}-{one[2] / 1e3:.1f}]" for one in (found, bare))
    ratio = found[0] / bare[0]
    work, goal = f"view, random keys, {size:,} records a transaction", f"{target:.0%} of bare"
    return Row(work, ours, f"bare sqlite3 {reference}", ratio, goal, ratio >= target)


def _view(directory: Path, values: list[tuple[bytes, bytes]], size: int) -> float:
    """Seconds for the values behind the first of all keys."""
    source = directory.with_name("application_view.py")
    source.write_text(HEAD + APPLICATIONS["view"][1])
    topic = read_application(load_module(str(source)), "bench", {}).topics["prices"]
    database, clock, key = AppDatabase(directory, 1), SystemClock(), TopicPartition("prices", 0)
    calls = Calls(database, Watch(clock.monotonic), clock, "bench", logging.getLogger("bench"))
    effect = Effect(topic, database, Views(database, clock), calls, clock.wall_ms)
    pieces = []
    for first in range(0, len(values), size):
        data = batch.encode([(*one, 1000) for one in values[first : first + size]])
        pieces.append(batch.decode(records.restamp(data, first, 1), *key))
    begun = 0.0
    for number, piece in enumerate(pieces):
        if number * size == KEYS:
            begun = time.perf_counter()
        with database.transaction():
            effect.apply(Portion(key, piece))
            database.set_positions({key: Position(bytes(16), 1, piece[-1].offset + 1)})
    took = time.perf_counter() - begun
    database.close()
    return took


def _value(number: int) -> tuple[bytes, bytes]:
    return b"key-%06d" % number, json.dumps({"code": f"c{number}", "cents": number, "name": "n" * 40}).encode()


class Nobody:
    """No program listens to changes."""

    def published(
        self, topic: str, rows: Sequence[tuple[object, ...]], deleted: Sequence[tuple[object, ...]]
    ) -> None: ...
    def reset(self, topic: str) -> None: ...


def _measured(node: Node, source: Path, count: int) -> Callable[[int], float]:
    def measure(run: int) -> float:
        application = read_application(load_module(str(source)), "bench", {})
        database = AppDatabase(source.parent / f"{source.stem}-{run}", 1)
        config = AppConfig(name=f"{source.stem}-{run}", node="bench", server=node.server)
        instance = Instance(application, database, config, Nobody(), None)
        thread = threading.Thread(target=instance.run)
        begun = time.perf_counter()
        thread.start()
        while (position := instance.positions().get(("prices", 0))) is None or position.next_offset < count:
            time.sleep(0.002)
        took = time.perf_counter() - begun
        instance.stop()
        thread.join()
        database.close()
        return count / took

    return measure
