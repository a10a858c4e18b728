"""`make bench-gate`: has any row that matters lost a quarter since its figure was last accepted?

Every row is a score: a figure of the broker divided by what the bare machine reached in the same minute (a loop of
plain Python, a ping-pong over loopback, an append with its fdatasync, a raw write, a bare interpreter's start). More is
better for all of them. Scores are compared with benchmarks/accepted.json, medians with medians. A row that seems to
have lost is measured again before it counts as lost, because machines are noisy.

    python -m benchmarks.gate             measure and compare; exit code 1 names the rows that lost a quarter
    python -m benchmarks.gate ROW...      only these
    python -m benchmarks.gate --accept    measure, then write the scores down as the accepted ones
    python -m benchmarks.gate --against DIRECTORY
                                          measure this checkout and another one, built beside it, in turns: the ratio
                                          of each row (this one by the other one), pair by pair
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.node import DIRECTORY, Node, running
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench import disk, native_client
from edgebroker.cli.bench.disk import percentile
from edgebroker.cli.bench.workloads import python_consume, python_produce
from edgebroker.client.producer import Producer

ACCEPTED = Path(__file__).with_name("accepted.json")
MOST_LOST = 0.25
RUNS = 5
# How often a row that seems to have lost is measured again.
AGAIN = 2
DURABLE = 2
HERE = Path(DIRECTORY)
RECORDS = 500_000


# ---- what the bare machine does ----


def spin() -> float:
    """Passes a second of a loop of plain Python: what bounds everything that the processor bounds."""
    count, seen, began = 400_000, {}, time.perf_counter()
    for number in range(count):
        seen[number & 1023] = number.to_bytes(8, "big")
    return count / (time.perf_counter() - began)


def ping() -> float:
    """Round trips a second over loopback, between two threads."""
    return 1 / percentile(native_client.ping(5_000, -1), 0.5)


def sync() -> float:
    """Appends of 4 KiB with their fdatasync and a ping-pong, a second: the least that an acknowledgement can take."""
    return 1 / (percentile(disk.append_and_sync(HERE, 200), 0.5) + percentile(native_client.ping(5_000, -1), 0.5))


def raw() -> float:
    """Bytes a second of a sequential write, synced once."""
    return disk.sequential(HERE, 256 << 20, 1 << 20, sync_each=False)


def interpreter() -> float:
    """Starts a second of a bare interpreter with the modules that every program has."""
    began = time.perf_counter()
    for _ in range(3):
        subprocess.run([sys.executable, "-c", "import argparse, json, logging, selectors, sqlite3"], check=True)
    return 3 / (time.perf_counter() - began)


def one() -> float:
    """For a bound that is absolute."""
    return 1.0


# ---- what the broker does ----


class Work(NamedTuple):
    """One row: `measure` gives a figure of which more is better."""

    measure: Callable[[Node, int], float]
    reference: Callable[[], float]


def publish(node: Node, run: int) -> float:
    """Records a second: 128 B, batches of 100, C client."""
    name = b"publish%d" % run
    return RECORDS / native_client.produce(node.host, node.port, name, RECORDS, 128, 100, 10_000, DURABLE, name)


def publish_python(node: Node, run: int) -> float:
    """Records a second: 128 B, the Python producer."""
    return RECORDS / python_produce(node.server, f"python{run}", RECORDS, 128, 100, 10_000, "durable")


def publish_singly(node: Node, run: int) -> float:
    """Records a second: a record per batch, C client."""
    name = b"single%d" % run
    return RECORDS / native_client.produce(node.host, node.port, name, RECORDS, 128, 1, 10_000, DURABLE, name)


def publish_1k(node: Node, run: int) -> float:
    """Bytes a second: 1 KiB records, 10,000 unacknowledged."""
    return _publish_1k(node, run, 10_000)


def publish_1k_wide(node: Node, run: int) -> float:
    """Bytes a second: 1 KiB records, 40,000 unacknowledged."""
    return _publish_1k(node, run, 40_000)


def _publish_1k(node: Node, run: int, window: int) -> float:
    name, count = b"wide%d-%d" % (window, run), 200_000
    seconds = native_client.produce(node.host, node.port, name, count, 1024, 100, window, DURABLE, name)
    return count * 1024 / seconds


def one_by_one(node: Node, run: int) -> float:
    """Durable acknowledgements a second, one record at a time."""
    return 1 / percentile(
        native_client.one_by_one(node.host, node.port, b"one", 2_000, 128, DURABLE, b"one%d" % run), 0.5
    )


def drain(node: Node, run: int) -> float:
    """Records a second: batches of 100, C client."""
    _fill(node)
    return RECORDS / native_client.consume(node.host, node.port, b"drain", b"c%d" % run, RECORDS, 100_000, b"drain")


def drain_python(node: Node, run: int) -> float:
    """Records a second: the Python consumer, every record decoded and handed over."""
    _fill(node)
    return RECORDS / python_consume(node.server, "drain", RECORDS)


def _fill(node: Node) -> None:
    if not any(topic["name"] == "drain" for topic in call(node.process.admin, "GET", "/v1/topics")["topics"]):
        native_client.produce(node.host, node.port, b"drain", RECORDS, 128, 100, 10_000, DURABLE, b"drain")


def fanout(node: Node, run: int) -> float:
    """Records a second that arrive at 100 consumers."""
    name = b"fan%d" % run
    return 100 * 5_000 / native_client.fanout(node.host, node.port, name, 100, 5_000, 128, 100, 0.0, name)[0]


def push(node: Node, run: int) -> float:
    """One by the median of the time from publish to push, at 1,000 records a second."""
    name = b"push%d" % run
    native_client.one_by_one(node.host, node.port, name, 1, 128, DURABLE, b"make%d" % run)
    found = native_client.push(node.host, node.port, name, b"g%d" % run, 2_000, 128, 1000.0, DURABLE, name)
    return 1 / percentile(found, 0.5)


def partitions(node: Node, run: int) -> float:
    """Rounds a second: one record into each of 16 partitions, beside another writer; until all are acknowledged."""
    topic, ended = f"busy{run}", threading.Event()
    call(node.process.admin, "POST", "/v1/topics", {"name": topic, "partitions": 16})

    def write() -> None:
        while not ended.is_set():
            name = b"beside%d" % run
            native_client.produce(node.host, node.port, name, 20_000, 1024, 100, 1_000, DURABLE, name)

    writer = threading.Thread(target=write)
    taken = []
    with Producer(node.server) as producer:
        writer.start()
        try:
            for _ in range(50):
                began = time.perf_counter()
                for partition in range(16):
                    producer.send(topic, b"x" * 128, partition=partition)
                producer.flush(30.0)
                taken.append(time.perf_counter() - began)
        finally:
            ended.set()
            writer.join()
    return 1 / percentile(taken, 0.5)


def start(node: Node, run: int) -> float:
    """Starts a second, of a node with a gigabyte's worth of nothing: until both ports answer."""
    with running() as fresh:
        fresh.process.kill()
        began = time.perf_counter()
        fresh.process.start()
        return 1 / (time.perf_counter() - began)


def memory(node: Node, run: int) -> float:
    """One by the MiB that an idle node keeps resident."""
    with running() as fresh:
        time.sleep(1.0)
        return 1 / fresh.memory()[0]


ROWS = {
    "publish": Work(publish, spin),
    "publish-python": Work(publish_python, spin),
    "publish-singly": Work(publish_singly, spin),
    "publish-1k": Work(publish_1k, raw),
    "publish-1k-wide": Work(publish_1k_wide, raw),
    "one-by-one": Work(one_by_one, sync),
    "drain": Work(drain, spin),
    "drain-python": Work(drain_python, spin),
    "fanout": Work(fanout, spin),
    "push": Work(push, sync),
    "partitions": Work(partitions, sync),
    "start": Work(start, interpreter),
    "memory": Work(memory, one),
}


def score(name: str, runs: int = RUNS) -> float:
    """The median of the scores of one row, each against a reference taken just before and just after it."""
    work, found = ROWS[name], []
    with running() as node:
        for run in range(runs):
            before = work.reference()
            figure = work.measure(node, run)
            found.append(figure / ((before + work.reference()) / 2))
    return statistics.median(found)


# ---- the gate ----


def compare(names: list[str]) -> int:
    """Print each row beside what was accepted; 1 when one lost more than MOST_LOST."""
    accepted = json.loads(ACCEPTED.read_text())
    print(
        f"accepted at {accepted['commit']}, {accepted['date']}\n{'row':<16} {'accepted':>12} {'now':>12} {'ratio':>7}"
    )
    lost = []
    for name in names:
        before, now = accepted["scores"][name], score(name)
        for _ in range(AGAIN):
            if now < before * (1 - MOST_LOST):
                now = max(now, score(name))
        print(f"{name:<16} {before:>12.5g} {now:>12.5g} {now / before:>7.2f}", flush=True)
        if now < before * (1 - MOST_LOST):
            lost.append(name)
    print(f"lost more than a quarter: {', '.join(lost)}" if lost else "no row lost more than a quarter")
    return 1 if lost else 0


def accept(names: list[str]) -> int:
    """Write the scores of now down, each the median of three."""
    known = json.loads(ACCEPTED.read_text())["scores"] if ACCEPTED.exists() else {}
    scores = {**known, **{name: float(f"{statistics.median(score(name) for _ in range(3)):.5g}") for name in names}}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "scores": scores}
    ACCEPTED.write_text(json.dumps(found, indent=2) + "\n")
    print(ACCEPTED.read_text(), end="")
    return 0


def against(names: list[str], other: Path, pairs: int) -> int:
    """Each row here and in another checkout, in turns: the ratios' median and range."""
    for name in names:
        ratios = []
        for _ in range(pairs):
            here, there = (_elsewhere(place, name) for place in (Path.cwd(), other))
            ratios.append(here / there)
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{name:<16} {middle:>7.3f} [{low:.3f}-{high:.3f}]", flush=True)
    return 0


def _elsewhere(checkout: Path, name: str) -> float:
    command = [str(checkout / ".venv/bin/python"), "-m", "benchmarks.gate", "--score", name]
    return float(subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gate", description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which rows; all without any")
    parser.add_argument("--accept", action="store_true", help="write the scores down as the accepted ones")
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="another checkout, built")
    parser.add_argument("--pairs", type=int, default=5, help="with --against: how many pairs of runs")
    parser.add_argument("--score", action="store_true", help="print the score of one row, and nothing else")
    options = parser.parse_args()
    names = options.rows or list(ROWS)
    if options.score:
        print(score(names[0], 3))
        return 0
    if options.against is not None:
        return against(names, options.against, options.pairs)
    return accept(names) if options.accept else compare(names)


if __name__ == "__main__":
    sys.exit(main())
