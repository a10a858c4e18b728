"""The work that is measured, one function a row of the table in docs/benchmarks.md."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import peers
from benchmarks.node import DIRECTORY, Node, running
from edgebroker.cli.bench import disk, native_client
from edgebroker.cli.bench.disk import percentile
from edgebroker.cli.bench.workloads import python_consume, python_produce

PEERS = peers.load()
RUNS = int(os.environ.get("EB_BENCH_RUNS", "3"))
# Long enough for ten seconds at the rates that are reached; EB_BENCH_SCALE=0.1 for a quick look.
SCALE = float(os.environ.get("EB_BENCH_SCALE", "1"))
DURABLE, WRITTEN = 2, 1
HERE = Path(DIRECTORY)


class Row(NamedTuple):
    """One result: a figure, what it is compared with, and what was to be reached."""

    work: str
    figure: str
    reference: str
    ratio: float
    target: str
    reached: bool


def number(key: str) -> float:
    return float(PEERS[key])


def median_of(measure: Callable[[int], float]) -> tuple[float, float, float]:
    """(median, least, most) of RUNS measurements."""
    found = sorted(measure(run) for run in range(RUNS))
    return statistics.median(found), found[0], found[-1]


def rate(values: tuple[float, float, float]) -> str:
    middle, low, high = (value / 1e6 for value in values)
    return f"{middle:.2f} M/s [{low:.2f}-{high:.2f}]"


def scaled(count: int) -> int:
    return max(1000, int(count * SCALE))


def publish(pinned: bool) -> list[Row]:
    """Twice each: the volume that the peers were measured with, on a fresh broker, and runs of ten seconds or more."""
    best, synced = number("publish_unsynced"), number("publish_synced")
    rows = []

    def raw(node: Node, count: int, batch: int, name: str) -> tuple[float, float, float]:
        def measure(run: int) -> float:
            topic = f"{name}{run}".encode()
            return count / native_client.produce(node.host, node.port, topic, count, 128, batch, 10_000, DURABLE, topic)

        return median_of(measure)

    def python(node: Node, count: int, name: str) -> tuple[float, float, float]:
        return median_of(
            lambda run: count / python_produce(node.server, f"{name}{run}", count, 128, 100, 10_000, "durable")
        )

    for label, scale in (("1 M records", 0), ("10 s or more", 1)):
        with running(pinned=pinned) as node:
            values = raw(node, scaled(20_000_000) if scale else 1_000_000, 100, "c")
            rows.append(peer_row(f"publish 128 B, C client, {label}", values, best, 8.0, "best unsynced peer"))
        with running(pinned=pinned) as node:
            values = python(node, scaled(10_000_000) if scale else 1_000_000, "p")
            rows.append(peer_row(f"publish 128 B, Python client, {label}", values, best, 3.0, "best unsynced peer"))
        with running(pinned=pinned) as node:
            values = raw(node, scaled(10_000_000) if scale else 1_000_000, 1, "s")
            rows.append(peer_row(f"publish one record per batch, {label}", values, synced, 10.0, "Redis synced"))
    return rows


def publish_1k(pinned: bool) -> list[Row]:
    count = scaled(2_000_000)
    ratios, figures = [], []
    with running(pinned=pinned) as node:
        for run in range(RUNS):
            raw = disk.sequential(HERE, count * 1024 // 2, 1 << 20, sync_each=False)
            seconds = native_client.produce(
                node.host, node.port, b"k%d" % run, count, 1024, 100, 10_000, DURABLE, b"k%d" % run
            )
            figures.append(count / seconds)
            ratios.append(count * 1024 / seconds / raw)
    ratio = statistics.median(ratios)
    figure = f"{statistics.median(figures) / 1e3:.0f} k/s, {statistics.median(figures) * 1024 / 1e6:.0f} MB/s"
    return [Row("publish 1 KiB, C client", figure, "raw sequential write synced once", ratio, "0.45", ratio >= 0.45)]


def one_by_one(pinned: bool) -> list[Row]:
    durable, written = [], []
    medians: list[tuple[float, float]] = []
    count = scaled(10_000)
    with running(pinned=pinned) as node:
        for run in range(RUNS):
            floor = percentile(disk.append_and_sync(HERE, 500), 0.5)
            ping = percentile(native_client.ping(20_000, 0 if pinned else -1), 0.5)
            first = native_client.one_by_one(node.host, node.port, b"o", count, 128, DURABLE, b"d%d" % run)
            second = native_client.one_by_one(node.host, node.port, b"o", count, 128, WRITTEN, b"w%d" % run)
            durable.append(percentile(first, 0.5) / (floor + ping))
            written.append(percentile(second, 0.5) / ping)
            medians.append((percentile(first, 0.5) * 1e6, percentile(second, 0.5) * 1e6))
    a, b = statistics.median(durable), statistics.median(written)
    first_us, second_us = (statistics.median(values) for values in zip(*medians, strict=True))
    return [
        Row("one at a time, durable, p50", f"{first_us:.0f} us", "append+fdatasync + ping-pong", a, "1.3", a <= 1.3),
        Row("one at a time, written, p50", f"{second_us:.0f} us", "ping-pong", b, "1.5", b <= 1.5),
    ]


def drain(pinned: bool) -> list[Row]:
    best, rows, count = number("drain"), [], 1_000_000
    with running(pinned=pinned) as node:
        for batch, c_target, python_target in ((100, 1.5, 2.0), (1, 2.0, 1.5)):
            topic = b"drain%d" % batch
            native_client.produce(node.host, node.port, topic, count, 128, batch, 10_000, DURABLE, topic)
            values = median_of(
                lambda run, topic=topic: (
                    count
                    / native_client.consume(
                        node.host, node.port, topic, b"c-%s-%d" % (topic, run), count, 100_000, b"drain"
                    )
                )
            )
            name = f"drain 1 M, batches of {batch}"
            rows.append(peer_row(f"{name}, C client", values, best, c_target, "best peer"))
            values = median_of(lambda run, topic=topic: count / python_consume(node.server, topic.decode(), count))
            reached = values[0] >= python_target * 1e6
            rows.append(
                Row(
                    f"{name}, Python",
                    rate(values),
                    "records a second",
                    values[0] / 1e6,
                    f"{python_target} M/s",
                    reached,
                )
            )
    return rows


def push(pinned: bool) -> list[Row]:
    ratios, p50s, p99s = [], [], []
    count = scaled(10_000)
    with running(pinned=pinned) as node:
        for run in range(RUNS):
            topic = b"push%d" % run
            native_client.one_by_one(node.host, node.port, topic, 1, 128, DURABLE, b"make%d" % run)
            floor = percentile(disk.append_and_sync(HERE, 500), 0.5) + percentile(
                native_client.ping(20_000, 0 if pinned else -1), 0.5
            )
            found = native_client.push(
                node.host, node.port, topic, b"g%d" % run, count, 128, 1000.0, DURABLE, b"p%d" % run
            )
            p50s.append(percentile(found, 0.5) * 1e6)
            p99s.append(percentile(found, 0.99) * 1e6)
            ratios.append(percentile(found, 0.5) / floor)
    ratio, p99 = statistics.median(ratios), statistics.median(p99s)
    best = number("push_synced_p99_us")
    return [
        Row("push at 1,000/s, p50", f"{statistics.median(p50s):.0f} us", "append+fdatasync + ping-pong", ratio, "1.3",
            ratio <= 1.3),
        Row("push at 1,000/s, p99", f"{p99:.0f} us", f"best synced peer {best:.0f} us", p99 / best, "1.0", p99 < best),
    ]  # fmt: skip


def connections(pinned: bool) -> list[Row]:
    count = scaled(400_000)
    with running(pinned=pinned) as node:
        values = median_of(
            lambda run: count / native_client.many(node.host, node.port, b"m", 64, count, 128, DURABLE, b"m%d" % run)
        )
    return [
        Row("64 connections, one at a time each", f"{values[0] / 1e3:.1f} k/s [{values[1] / 1e3:.1f}-"
            f"{values[2] / 1e3:.1f}]", "records a second", values[0] / 1e3, "40 k/s", values[0] >= 40_000)
    ]  # fmt: skip


def start_after_kill(pinned: bool) -> list[Row]:
    """A node with 1 GB stored, killed, started again: milliseconds until it accepts."""
    taken = []
    with running(pinned=pinned) as node:
        fill(node, 1_000_000_000)
        for _ in range(RUNS):
            node.process.kill()
            began = time.perf_counter()
            node.process.start()
            taken.append((time.perf_counter() - began) * 1000)
    middle = statistics.median(taken)
    return [
        Row(
            "start with 1 GB after SIGKILL",
            f"{middle:.0f} ms",
            "to both ports answering",
            middle,
            "300 ms",
            middle <= 300,
        )
    ]


def fill(node: Node, size: int) -> int:
    """Store about `size` bytes of payload in 1 KiB records; returns the records."""
    count = size // 1024
    native_client.produce(node.host, node.port, b"fill", count, 1024, 100, 10_000, DURABLE, b"fill")
    return count


def peer_row(work: str, values: tuple[float, float, float], best: float, target: float, against: str) -> Row:
    ratio = values[0] / best
    return Row(work, rate(values), f"{against} {best / 1e6:.2f} M/s", ratio, f"{target:g} x", ratio >= target)
