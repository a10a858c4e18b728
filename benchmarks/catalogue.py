"""An application with a catalogue of a million keys: loaded again, started, and asked meanwhile, beside bare SQLite.

Look-ups over HTTP are made by wrk (the Debian package).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.application import APPLICATIONS, HEAD, bare_database
from benchmarks.node import DIRECTORY, Node, running
from benchmarks.rows import Row, scaled
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench.disk import percentile
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer

KEYS, PARTITIONS, LOOK_SECONDS, VISIBLE = 1_000_000, 2, 5.0, 600
SOURCE = HEAD + APPLICATIONS["view"][1]
RANDOM_KEYS = """
math.randomseed(os.time())
request = function() return wrk.format("GET", string.format("/v1/latest/prices/key-%%07d", math.random(0, %d))) end
"""


class Till:
    """The application as a process."""

    def __init__(self, directory: Path, node: Node) -> None:
        self.directory, self.node = directory, node
        self.source = directory / "till.py"
        self.source.write_text(SOURCE)
        self.database = directory / "edgebroker-till" / "app.db"
        self.http = "127.0.0.1:7439"
        self._environment = {
            **os.environ,
            "EDGEBROKER_APP_SERVER": node.server,
            "EDGEBROKER_APP_NODE": "bench",
            "EDGEBROKER_APP_HTTP": self.http,
            "EDGEBROKER_APP_LOG_LEVEL": "warning",
        }
        self._command = [sys.executable, "-m", "edgebroker", "app", "run", str(self.source)]
        self.pid = 0

    def configure(self, **keys: str) -> None:
        """Set keys of its configuration, for the next start."""
        self._environment.update({f"EDGEBROKER_APP_{name.upper()}": value for name, value in keys.items()})

    @contextmanager
    def running(self) -> Iterator[float]:
        """How long it took to be ready, in seconds."""
        begun = time.perf_counter()
        process = subprocess.Popen(self._command, cwd=self.directory, env=self._environment)
        self.pid = process.pid
        try:
            while not self._is_ready():
                time.sleep(0.005)
            yield time.perf_counter() - begun
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30.0)

    def _is_ready(self) -> bool:
        try:
            return bool(call(self.http, "GET", "/v1/stats")["ready"])
        except Exception:
            return False

    def memory(self, name: str) -> float:
        """VmRSS or VmHWM in MB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+)", text)
        assert found is not None
        return int(found[1]) * 1024 / 1e6

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read(self, sql: str) -> list[tuple[object, ...]]:
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def load_again(self) -> float:
        """Have the catalogue loaded again; how long that took."""
        ((before,),) = self.read("SELECT generation FROM _generations")
        begun = time.perf_counter()
        call(self.http, "POST", "/v1/reset", {"topic": "prices"})
        while self.read("SELECT generation FROM _generations") == [(before,)]:
            time.sleep(0.01)
        return time.perf_counter() - begun


def catalogue(pinned: bool) -> list[Row]:
    """The rows of docs/benchmarks.md about a catalogue."""
    directory = Path(tempfile.mkdtemp(prefix="edgebroker-bench-", dir=DIRECTORY))
    count, rows = scaled(KEYS), list[Row]()
    order = list(range(count))
    random.Random(1).shuffle(order)
    try:
        with running(pinned=pinned) as node:
            call(node.process.admin, "POST", "/v1/topics", {"name": "prices", "partitions": PARTITIONS})
            values = _publish(node, order)
            bare = bare_database(directory / "bare", sorted(values), "INSERT")
            till = Till(directory, node)
            with till.running():
                _wait_for_rows(till, count)
            with till.running() as ready:
                rows.append(
                    Row("start to ready, nothing new", f"{ready * 1000:.0f} ms", "-", 1.0, "500 ms", ready <= 0.5)
                )
                idle = till.memory("VmRSS")
                rows.append(Row("idle, resident", f"{idle:.0f} MB", "-", 1.0, "40 MB", idle <= 40))
                rows.append(_until_visible(till, node))
                rows += _look_ups(till, directory, count)
            with till.running():
                again = _loaded_again(till, bare, count)
                rows += again.rows
            rows.append(_rebuilt(till, node, again.seconds, ready, count))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return rows


def _publish(node: Node, order: list[int]) -> list[tuple[bytes, bytes]]:
    values = [
        (b"key-%07d" % number, json.dumps({"code": f"c{number}", "cents": number, "name": "n" * 40}).encode())
        for number in order
    ]
    with Producer(node.server) as producer:
        for key, value in values:
            producer.send("prices", value, key)
    return values


def _wait_for_rows(till: Till, count: int) -> None:
    while till.read("SELECT count(*) FROM prices") != [(count,)]:
        time.sleep(0.1)


def _until_visible(till: Till, node: Node) -> Row:
    """From send() to a consumer, and to a reader of the view in another process, by turns."""
    pushed, visible = list[float](), list[float]()
    connection = sqlite3.connect(f"file:{till.database}?mode=ro", uri=True)
    with Producer(node.server) as producer, Consumer(node.server, ["prices"], start="latest") as consumer:
        while len(consumer.assignment) < PARTITIONS:
            consumer.poll(0.1)
        for number in range(VISIBLE):
            value = json.dumps({"code": "c0", "cents": -number - 1, "name": "n" * 40}).encode()
            begun = time.perf_counter()
            producer.send("prices", value, b"key-0000000")
            if number % 2:
                while not consumer.poll(1.0):
                    pass
                pushed.append(time.perf_counter() - begun)
            else:
                sql = "SELECT 1 FROM prices WHERE key='key-0000000' AND cents=?"
                while connection.execute(sql, (-number - 1,)).fetchone() is None:
                    pass
                visible.append(time.perf_counter() - begun)
                while not consumer.poll(1.0):
                    pass
    connection.close()
    push, view = percentile(sorted(pushed), 0.5), percentile(sorted(visible), 0.5)
    return Row(
        "publish to visible in the view, p50", f"{view * 1e3:.2f} ms", f"push {push * 1e3:.2f} ms", view / push,
        "push + 0.3 ms", view <= push + 0.3e-3,
    )  # fmt: skip


def _look_ups(till: Till, directory: Path, count: int) -> list[Row]:
    speed, p99 = _sql_look_ups(till, count, LOOK_SECONDS)
    rows = [
        Row("look-up, SQL from another process", f"{speed / 1e3:.0f} k/s, p99 {p99 * 1e6:.0f} us", "-", 1.0,
            "80 k/s, 60 us", speed >= 80e3 and p99 <= 60e-6)
    ]  # fmt: skip
    speed, p99 = _http_look_ups(till, directory, count, LOOK_SECONDS)
    rows.append(
        Row("look-up, HTTP, 16 connections", f"{speed / 1e3:.1f} k/s, p99 {p99 * 1e3:.1f} ms", "-", 1.0,
            "16 k/s, 2.5 ms", speed >= 16e3 and p99 <= 2.5e-3)
    )  # fmt: skip
    with_load: list[float] = []
    loading = threading.Thread(target=lambda: with_load.append(till.load_again()))
    loading.start()
    time.sleep(0.5)
    busy, busy_p99 = _http_look_ups(till, directory, count, LOOK_SECONDS)
    loading.join()
    good = busy >= speed / 2 and busy_p99 <= 4 * p99
    rows.append(
        Row("the same while the catalogue is loaded", f"{busy / 1e3:.1f} k/s, p99 {busy_p99 * 1e3:.1f} ms",
            f"{speed / 1e3:.1f} k/s, {p99 * 1e3:.1f} ms", busy / speed, "half the rate, p99 x 4", good)
    )  # fmt: skip
    return rows


def _sql_look_ups(till: Till, count: int, seconds: float) -> tuple[float, float]:
    """(look-ups a second, 99th percentile in seconds) of random keys, in this process."""
    connection = sqlite3.connect(f"file:{till.database}?mode=ro", uri=True)
    rng, took, until = random.Random(2), list[float](), time.perf_counter() + seconds
    begun = time.perf_counter()
    while time.perf_counter() < until:
        key = f"key-{rng.randrange(count):07d}"
        first = time.perf_counter()
        row = connection.execute("SELECT * FROM prices WHERE key=?", (key,)).fetchone()
        took.append(time.perf_counter() - first)
        assert row is not None
    elapsed = time.perf_counter() - begun
    connection.close()
    return len(took) / elapsed, percentile(sorted(took), 0.99)


def _http_look_ups(till: Till, directory: Path, count: int, seconds: float) -> tuple[float, float]:
    script = directory / "keys.lua"
    script.write_text(RANDOM_KEYS % (count - 1))
    command = ["wrk", "-t1", "-c16", f"-d{seconds:g}s", "--latency", "-s", str(script), f"http://{till.http}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Non-2xx" not in text, text
    speed, p99 = re.search(r"Requests/sec:\s+([\d.]+)", text), re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
    assert speed is not None and p99 is not None, text
    return float(speed[1]), float(p99[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[p99[2]]


class LoadedAgain(NamedTuple):
    """How long it took, and what is shown of it."""

    seconds: float
    rows: list[Row]


def _rebuilt(till: Till, node: Node, loaded: float, ready: float, count: int) -> Row:
    """Another version of the view, from the copy, beside the same from the broker without what the network takes: what
    a consumer needs for all records that does nothing with them."""
    till.configure(copy="on")
    for path in till.database.parent.iterdir():
        path.unlink(missing_ok=True) if not path.is_dir() else shutil.rmtree(path)
    with till.running():
        _wait_for_rows(till, count)
    till.source.write_text(SOURCE.replace("view=", "version=2, view="))
    with till.running() as took:
        assert till.read("SELECT version FROM _generations") == [(2,)]
    begun, records = time.perf_counter(), 0
    with Consumer(node.server, ["prices"]) as consumer:
        while records < count:
            records += len(consumer.poll(1.0))
    network = time.perf_counter() - begun
    reference = loaded - network
    broker = f"from the broker {loaded:.1f} s, network {network:.1f} s"
    return Row("rebuilt from the copy", f"{took - ready:.1f} s", broker, (took - ready) / reference,
               "1.2 x without the network", took - ready <= 1.2 * reference)  # fmt: skip


def _loaded_again(till: Till, bare: float, count: int) -> LoadedAgain:
    """The catalogue again, while another process looks for a mixture of generations."""
    mixed, reads, worst, over = [0], [0], [0.0], threading.Event()

    def check() -> None:
        connection = sqlite3.connect(f"file:{till.database}?mode=ro", uri=True, isolation_level=None)
        while not over.is_set():
            begun = time.perf_counter()
            connection.execute("BEGIN")
            first = connection.execute("SELECT count(*) FROM (SELECT 1 FROM prices LIMIT 100)").fetchone()
            last = connection.execute("SELECT 1 FROM prices WHERE key=?", (f"key-{count - 1:07d}",)).fetchone()
            connection.execute("ROLLBACK")
            worst[0] = max(worst[0], time.perf_counter() - begun)
            reads[0] += 1
            mixed[0] += first != (100,) or last is None
            time.sleep(0.001)
        connection.close()

    checker = threading.Thread(target=check)
    checker.start()
    before = till.processor_seconds()
    took = till.load_again()
    spent = till.processor_seconds() - before
    over.set()
    checker.join()
    peak = till.memory("VmHWM")
    rows = [
        Row("loaded again, shuffled keys", f"{took:.1f} s, {spent:.1f} s of processor",
            f"bare sorted fill {bare:.1f} s", took / bare, "3 x the bare fill", took <= 3 * bare),
        Row("reads meanwhile", f"{reads[0]:,}, {mixed[0]} mixed, worst {worst[0] * 1e3:.0f} ms", "-", 1.0, "0 mixed",
            not mixed[0]),
        Row("peak, resident", f"{peak:.0f} MB", "-", 1.0, "80 MB", peak <= 80),
    ]  # fmt: skip
    return LoadedAgain(took, rows)
