"""`edgebroker bench all`: benchmark this machine, and print one page that says what to expect of it.

The references come first: a raw append with its sync, raw sequential writes, a ping-pong over loopback. Then a broker
is compared with them, in a directory of its own, with idle I/O priority and at most MOST_BYTES on the disk, so that it
may run on a terminal in use. On a busy machine all figures are worse; the ratios hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from edgebroker.cli.bench import native_client
from edgebroker.cli.bench.disk import CLOCK, append_and_sync, percentile, sequential
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.cli.progress import progress
from edgebroker.client.servers import Servers
from edgebroker.common.errors import ConfigError
from edgebroker.version import __version__

MOST_BYTES = 256 << 20
NEEDED_BYTES = 2 * MOST_BYTES
DURABLE, WRITTEN = 2, 1
SIZE, BATCH, UNACKED = 128, 100, 10_000
RECORDS = 400_000
REFERENCE_BYTES = 48 << 20
SINGLES, PUSHES, PUSH_RATE = 300, 500, 200.0


class BenchmarkResult(NamedTuple):
    """One line of the page. `ratio` compares with `reference`: above 1 is slower for times and faster for rates."""

    name: str
    value: float
    unit: str
    reference: str
    ratio: float | None


def bench_all(options: argparse.Namespace) -> int:
    directory = Path(options.directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    free = psutil.disk_usage(str(directory)).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"{directory}: {free >> 20} MiB free, but the benchmark needs {NEEDED_BYTES >> 20} MiB; choose another disk"
        )
    path = Path(options.report) if options.report else None
    if path is not None:
        try:
            path.touch()
        except OSError as error:
            raise ConfigError(f"--report {path}: {error.strerror}") from error
    psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)  # inherited by the broker
    with tempfile.TemporaryDirectory(prefix="edgebroker-bench-", dir=directory) as scratch:
        found = _measure(Path(scratch))
    report = {
        "version": __version__,
        "machine": platform.node(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "directory": str(directory.resolve()),
        "load": round(os.getloadavg()[0], 2),
        "results": [result._asdict() for result in found],
        "verdict": verdict(found),
    }
    text = page(report, found)
    print(json.dumps(report) + "\n" if options.json else text, end="")
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n" if path.suffix == ".json" else text)
    return 0


def _measure(directory: Path) -> list[BenchmarkResult]:
    found: list[BenchmarkResult] = []
    syncs: list[float] = []
    sync = ping = raw = 0.0
    node = BrokerProcess(
        directory / "node",
        settings={"EDGEBROKER_STORAGE_MAX_BYTES": str(MOST_BYTES), "EDGEBROKER_STORAGE_SEGMENT_BYTES": str(16 << 20)},
    )

    def references() -> None:
        nonlocal sync, ping, raw
        syncs.extend(append_and_sync(directory, SINGLES))
        sync, ping = percentile(syncs, 0.5), percentile(native_client.ping(5000), 0.5)
        raw = sequential(directory, REFERENCE_BYTES, 1 << 20, sync_each=False)
        found.append(BenchmarkResult("disk: append 4 KiB and sync, p50", sync * 1e3, "ms", "", None))
        found.append(BenchmarkResult("disk: append 4 KiB and sync, p99", percentile(syncs, 0.99) * 1e3, "ms", "", None))
        found.append(BenchmarkResult("disk: sequential writes, synced once", raw / 1e6, "MB/s", "", None))
        found.append(BenchmarkResult("loopback: ping-pong, p50", ping * 1e6, "us", "", None))

    def start() -> None:
        began = CLOCK.monotonic()
        node.start()
        found.append(
            BenchmarkResult("start of an empty node until ready", (CLOCK.monotonic() - began) * 1e3, "ms", "", None)
        )

    def client() -> tuple[bytes, int]:
        server = Servers(node.server).current
        return server.host.encode(), server.port

    def singles() -> None:
        for level, name, floor, against in (
            (DURABLE, "durable", sync + ping, "append and sync + ping-pong"),
            (WRITTEN, "written", ping, "ping-pong"),
        ):
            taken = native_client.one_by_one(*client(), b"singles", SINGLES, SIZE, level, name.encode())
            value = percentile(taken, 0.5)
            found.append(
                BenchmarkResult(f"publish one at a time, {name}, p50", value * 1e3, "ms", against, value / floor)
            )

    def batched() -> None:
        seconds = native_client.produce(*client(), b"batched", RECORDS, SIZE, BATCH, UNACKED, DURABLE, b"batched")
        rate = RECORDS / seconds
        found.append(
            BenchmarkResult("publish in batches, durable", rate, "records/s", "sequential writes", rate * SIZE / raw)
        )

    def drain() -> None:
        seconds = native_client.consume(*client(), b"batched", b"drain", RECORDS, 0, b"drain")
        rate = RECORDS / seconds
        found.append(BenchmarkResult("drain a topic", rate, "records/s", "sequential writes", rate * SIZE / raw))

    def push() -> None:
        taken = native_client.push(*client(), b"singles", b"push", PUSHES, SIZE, PUSH_RATE, DURABLE, b"push")
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            value = percentile(taken, share)
            floor = percentile(syncs, share) + ping
            against = f"append and sync {name} + ping-pong"
            found.append(BenchmarkResult(f"push to a consumer, {name}", value * 1e3, "ms", against, value / floor))

    def connections() -> None:
        seconds = native_client.many(*client(), b"many", 32, 32 * 60, SIZE, DURABLE, b"many")
        rate = 32 * 60 / seconds
        found.append(
            BenchmarkResult("32 clients, one at a time each", rate, "records/s", "one sync a record", rate * sync)
        )

    def memory() -> None:
        rss = psutil.Process(node.pid).memory_info()
        found.append(
            BenchmarkResult("memory of the node, without mapped files", (rss.rss - rss.shared) / 2**20, "MiB", "", None)
        )

    def restart() -> None:
        node.kill()
        began = CLOCK.monotonic()
        node.start()
        found.append(
            BenchmarkResult("start after SIGKILL until ready", (CLOCK.monotonic() - began) * 1e3, "ms", "", None)
        )
        node.stop()

    steps: list[Callable[[], None]] = [references, start, singles, batched, drain, push, connections, memory, restart]
    bar = progress(len(steps), "step")
    try:
        for step in steps:
            step()
            bar.update(1)
    finally:
        bar.close()
        node.kill()
    return found


def verdict(found: list[BenchmarkResult]) -> list[str]:
    """What the figures mean, in sentences."""
    values = {result.name: result.value for result in found}
    sync, single = values["disk: append 4 KiB and sync, p50"], values["publish one at a time, durable, p50"]
    batched = values["publish in batches, durable"]
    kind = "fast" if sync < 2 else "normal for a good disk" if sync < 8 else "slow" if sync < 30 else "very slow"
    sentences = [
        f"This disk syncs in {sync:.1f} ms ({kind}): expect {_round(1000 / single)} durable single publishes a second "
        f"from one client, {_round(batched)} in batches.",
        f"A consumer receives a published record after {values['push to a consumer, p50']:.1f} ms (99th "
        f"percentile {values['push to a consumer, p99']:.1f} ms).",
        f"After a crash the node is ready {values['start after SIGKILL until ready'] / 1000:.1f} s after its restart.",
    ]
    if sync >= 8:
        sentences.append("Publish in batches on this disk, or let clients share a sync (storage.commit_interval_ms).")
    if values["disk: append 4 KiB and sync, p99"] > 10 * sync:
        sentences.append(
            "The slowest syncs (1 %) take more than ten times the median: the disk is busy, worn, or low-grade flash."
        )
    ratios = [r.ratio for r in found if r.ratio is not None and r.name.startswith(("publish one", "push"))]
    if statistics.median(ratios) > 5:
        sentences.append(
            "The broker does not reach what the disk allows: the processor is the limit, or the machine is busy."
        )
    return sentences


def _round(value: float) -> str:
    """Two significant digits, which is as precise as such a figure is."""
    if value < 10:
        return f"{value:.1f}"
    digits = 10 ** (len(str(int(value))) - 2)
    return f"{round(value / digits) * digits:,}"


def page(report: Mapping[str, object], found: list[BenchmarkResult]) -> str:
    memory = report["memory_bytes"]
    assert isinstance(memory, int)
    lines = [
        f"edgebroker {report['version']} on {report['machine']}: {report['cores']} cores, {memory / 2**30:.1f} GiB, "
        f"kernel {report['kernel']}, load {report['load']}",
        f"disk with {report['directory']}",
        "",
    ]
    for result in found:
        against = f"{result.ratio:8.2f} x {result.reference}" if result.ratio is not None else ""
        lines.append(
            f"{result.name:44} {result.value:12,.{2 if result.value < 10 else 0}f} {result.unit:10}{against}".rstrip()
        )
    return "\n".join([*lines, "", *verdict(found)]) + "\n"
