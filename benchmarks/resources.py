"""Memory, disk wear, many topics, look-ups: what a node costs, not how fast it is."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.node import DIRECTORY, running
from benchmarks.rows import DURABLE, Row, fill, scaled
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench import native_client
from edgebroker.cli.bench.disk import percentile
from edgebroker.client.producer import Producer
from edgebroker.common import batch
from edgebroker.network.wire import frames
from edgebroker.storage import files
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.types import FileSlice


def memory(pinned: bool) -> list[Row]:
    rows = []
    with running(pinned=pinned) as node:
        time.sleep(2.0)
        idle, anonymous = node.memory()
        rows.append(
            Row("memory, idle", f"{idle:.0f} MiB resident, {anonymous:.0f} anonymous", "", idle, "32 MiB", idle <= 32)
        )
        count = fill(node, 1_000_000_000)
        native_client.consume(node.host, node.port, b"fill", b"drain", count, 0, b"drain")
        time.sleep(3.0)
        _, after = node.memory()
        rows.append(
            Row("anonymous memory after 1 GB in and out", f"+{after - anonymous:.1f} MiB", "idle", after - anonymous,
                "+4 MiB", after - anonymous <= 4)
        )  # fmt: skip
    with running(pinned=pinned) as node:
        sockets = []
        for number in range(10_000):
            sock = socket.create_connection((node.host.decode(), node.port))
            connect = frames.Connect(frames.PROTOCOL_VERSION, 0, f"idle-{number}", b"", -1, -1, [])
            sock.sendall(frames.write_connect(1, connect))
            sockets.append(sock)
        for sock in sockets:
            sock.recv(4096)
        time.sleep(2.0)
        resident, _ = node.memory()
        rows.append(
            Row("memory with 10,000 idle connections", f"{resident:.0f} MiB", "", resident, "48 MiB", resident <= 48)
        )
        for sock in sockets:
            sock.close()
    return rows


def many_topics(pinned: bool) -> list[Row]:
    """64 topics with 50 records a second each, pushes timed on one of them."""
    with running(pinned=pinned) as node:
        native_client.one_by_one(node.host, node.port, b"one", 1, 128, DURABLE, b"make")
        count = scaled(500)
        alone = percentile(
            native_client.push(node.host, node.port, b"one", b"g0", count, 128, 50.0, DURABLE, b"alone"), 0.99
        )
        before, _ = node.memory()
        ended = threading.Event()
        load = threading.Thread(target=_publish_to_many, args=(node.server, ended))
        load.start()
        time.sleep(1.0)
        among = percentile(
            native_client.push(node.host, node.port, b"one", b"g1", count, 128, 50.0, DURABLE, b"among"), 0.99
        )
        resident, _ = node.memory()
        topics = call(node.process.admin, "GET", "/v1/topics")["topics"]
        data = sum(part["bytes"] for topic in topics for part in topic["partitions"])
        used = sum(path.stat().st_blocks * 512 for path in node.process.directory.rglob("*.log"))
        ended.set()
        load.join()
    return [
        Row("64 topics x 50/s: push p99", f"{among * 1e6:.0f} us", f"one topic {alone * 1e6:.0f} us", among / alone,
            "3 x", among / alone <= 3),
        Row("64 topics: memory", f"+{resident - before:.1f} MiB", "one topic", resident - before, "+8 MiB",
            resident - before <= 8),
        Row("64 topics: disk beyond the data", f"{(used - data) / 2**20:.0f} MiB", "", (used - data) / 2**20, "64 MiB",
            used - data <= 64 << 20),
    ]  # fmt: skip


def many_partitions(pinned: bool) -> list[Row]:
    """10,000 partitions with 1,024 descriptors: made, written to, left alone, and started again."""
    topics, each = 10, scaled(1000)
    with running(pinned=pinned, descriptors=1024) as node:
        process = node.process
        for number in range(topics):
            call(process.admin, "POST", "/v1/topics", {"name": f"many-{number}", "partitions": each})
        made, _ = node.memory()
        with Producer(node.server) as producer:
            _one_each(producer, topics, each)
            seconds = min(_one_each(producer, topics, each) for _ in range(3))
            one_topic = min(_one_each(producer, 1, each, records=topics * each) for _ in range(3))
        most = max(_descriptors(process.pid) for _ in range(3))
        resident, _ = node.memory()
        time.sleep(3.0)
        idle = psutil.Process(process.pid)
        began = sum(idle.cpu_times()[:2])
        time.sleep(10.0)
        used = (sum(idle.cpu_times()[:2]) - began) * 10
        process.stop()
        before = time.monotonic()
        process.start()
        started = time.monotonic() - before
        fresh, _ = node.memory()
    count = topics * each
    return [
        Row(f"{count:,} partitions: memory once made", f"{made:.0f} MiB", "", made, "reported", True),
        Row("  and written to by one producer", f"{resident:.0f} MiB", "", resident, "reported", True),
        Row("  and after a start", f"{fresh:.0f} MiB", "", fresh, "reported", True),
        Row("  descriptors of 1,024", f"{most}", "", most, "below 256", most < 256),
        Row("  a record for each", f"{count / seconds:,.0f}/s", f"to a tenth of them {count / one_topic:,.0f}/s",
            one_topic / seconds, "reported", True),
        Row("  idle", f"{used:.1f} % of a core", "", used, "reported", True),
        Row("  start", f"{started:.1f} s", "", started, "reported", True),
    ]  # fmt: skip


def _one_each(producer: Producer, topics: int, each: int, records: int = 0) -> float:
    """Seconds until a record is stored in every partition, or so many in all of them in turn."""
    began = time.monotonic()
    for number in range(records or topics * each):
        producer.send(f"many-{number // each % topics}", b"x" * 50, partition=number % each)
    producer.flush()
    return time.monotonic() - began


def _descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def _publish_to_many(server: str, ended: threading.Event) -> None:
    value = b"x" * 128
    with Producer(server) as producer:
        while not ended.is_set():
            began = time.monotonic()
            for number in range(63):
                producer.send(f"many-{number}", value)
            time.sleep(max(0.0, 0.02 - (time.monotonic() - began)))


def wear(pinned: bool) -> list[Row]:
    """Device bytes written for each payload byte; the whole device is counted, so the machine should be quiet."""
    rows = []
    for interval in (0, 20):
        for rate in (1, 100, 1000):
            settings = {"EDGEBROKER_STORAGE_COMMIT_INTERVAL_MS": str(interval)}
            with running(pinned=pinned, settings=settings) as node, Producer(node.server) as producer:
                producer.send("wear", b"x").result(10.0)
                time.sleep(0.5)
                count = max(5, int(rate * 10))
                before = _device_bytes()
                began = time.monotonic()
                for number in range(count):
                    time.sleep(max(0.0, began + number / rate - time.monotonic()))
                    producer.send("wear", b"x" * 128)
                producer.flush()
                written = _device_bytes() - before
            ratio = written / (count * 128)
            rows.append(
                Row(f"disk wear at {rate}/s, commit interval {interval} ms",
                    f"{written / count / 1024:.1f} KiB/record", "device bytes per payload byte", ratio, "reported",
                    True)
            )  # fmt: skip
    return rows


def _device_bytes() -> int:
    counters = psutil.disk_io_counters()
    assert counters is not None
    return int(counters.write_bytes)


def lookups(pinned: bool) -> list[Row]:
    """Look-ups by offset in active and sealed segments, and sequential reading, on the store itself."""
    from tests.kit.storage import StoreHarness, store_settings

    with tempfile.TemporaryDirectory(dir=DIRECTORY) as directory:
        harness = StoreHarness(Path(directory) / "node", store_settings(segment_bytes=64 << 20))
        harness.create()
        run = [batch.encode([(None, b"x" * 128, 1)] * 100)] * 50
        for _ in range(scaled(1_000_000) // 5000):
            harness.append(*run)
        log = harness.log()
        rows = []
        for name, segment in (("sealed", log.segments[0]), ("active", log.active)):
            if segment.fd < 0:
                harness.read_cold(segment.base)
            low, high = segment.base, min(segment.end_offset, log.durable_end)
            times = []
            for number in range(5000):
                offset = low + (number * 7919) % (high - low)
                began = time.perf_counter()
                _look_up(harness, log, offset)
                times.append(time.perf_counter() - began)
            p99 = percentile(times, 0.99) * 1000
            rows.append(Row(f"look-up by offset, {name}, p99", f"{p99:.3f} ms", "", p99, "0.2 ms", p99 < 0.2))
            began, offset, seen = time.perf_counter(), low, 0
            while offset < high:
                found = log.find(offset, 1 << 20, 1 << 30)
                assert isinstance(found, FileSlice)
                data = files.read_at(found.file.fd, found.length, found.position)
                seen += len(batch.decode(data, first=offset))
                offset = found.next_offset
            speed = seen / (time.perf_counter() - began) / 1e6
            rows.append(Row(f"sequential read, {name}", f"{speed:.1f} M records/s", "", speed, "2 M/s", speed >= 2))
        harness.close()
    return rows


def _look_up(harness: Any, log: PartitionLog, offset: int) -> int:
    """The base offset of the batch that holds an offset; through the reader thread where the cache has it not."""
    found = log.find(offset, 16 << 10, 1 << 30)
    if isinstance(found, FileSlice):
        return found.first_offset
    cold: int = harness.read_cold(offset, 16 << 10).first_offset
    return cold
