"""The tree: how fast a mirror catches up, what a hop costs, and how many children one parent feeds."""

from __future__ import annotations

import os
import selectors
import shutil
import socket
import statistics
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import msgspec

from benchmarks.line import Line
from benchmarks.node import DIRECTORY
from benchmarks.rows import RUNS, Row, scaled
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench import disk, native_client
from edgebroker.cli.bench.disk import percentile
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.crc32c import crc32c
from edgebroker.common.runtime.clock import sleep
from edgebroker.pipe.stream import Kind, LogPosition, Poll

DURABLE, REPLICATED = 2, 3
FREE = {"EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0", "EDGEBROKER_STORAGE_SOFT_FREE_BYTES": "0"}


class Chain:
    """Nodes that follow each other, in a directory of their own."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="edgebroker-bench-", dir=DIRECTORY))
        self.nodes: list[BrokerProcess] = []

    def add(self, level: str, **settings: str) -> BrokerProcess:
        """Another node, below the last one."""
        wanted = {**FREE, "EDGEBROKER_NODE_LEVEL": level, "EDGEBROKER_LOG_LEVEL": "warning", **settings}
        if self.nodes:
            wanted.setdefault("EDGEBROKER_PIPE_PARENTS", self.nodes[-1].pipe)
        node = BrokerProcess(self.directory / wanted.get("EDGEBROKER_NODE_NAME", level), settings=wanted)
        node.start()
        self.nodes.append(node)
        return node

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *error: object) -> None:
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def ends(node: BrokerProcess, topic: str) -> int:
    try:
        return sum(part["durable_end"] for part in call(node.admin, "GET", f"/v1/topics/{topic}")["partitions"])
    except Exception:
        return -1


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bare_sendfile(paths: list[Path]) -> float:
    """CPU seconds of a process that sends these files over loopback by sendfile, to somebody who throws them away."""
    server = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        sink = socket.create_connection(server.getsockname())
        buffer = bytearray(1 << 20)
        while sink.recv_into(buffer):
            pass
        os._exit(0)
    peer, _ = server.accept()
    begun = time.process_time()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        position, size = 0, os.fstat(fd).st_size
        while position < size:
            position += os.sendfile(peer.fileno(), fd, position, min(1 << 20, size - position))
        os.close(fd)
    spent = time.process_time() - begun
    peer.close()
    server.close()
    os.waitpid(pid, 0)
    return spent


def catch_up(pinned: bool) -> list[Row]:
    """A new child takes 2 GB over one hop, durable at the child."""
    rates, costs, raws = [], [], []
    for _ in range(RUNS):
        with Chain() as chain:
            parent = chain.add("root")
            call(parent.admin, "POST", "/v1/topics", {"name": "bulk"})
            host, _, port = parent.server.rpartition(":")
            records = scaled(2_000_000)
            native_client.produce(host.encode(), int(port), b"bulk", records, 1024, 250, 10_000, DURABLE, b"bulk")
            size = call(parent.admin, "GET", "/v1/topics/bulk")["partitions"][0]["bytes"]
            raws.append(disk.sequential(Path(DIRECTORY), min(size, 512 << 20), 1 << 20, sync_each=True))
            before = cpu_seconds(parent.pid)
            child = chain.add("l2")
            begun = time.perf_counter()
            while ends(child, "bulk") < records:
                sleep(0.02)
            rates.append(size / (time.perf_counter() - begun))
            spent = cpu_seconds(parent.pid) - before
            costs.append(
                spent / bare_sendfile(sorted((chain.directory / "root" / "topics" / "bulk" / "0").glob("*.log")))
            )
    ratio = statistics.median(rate / raw for rate, raw in zip(rates, raws, strict=True))
    cost = statistics.median(costs)
    figure, raw = statistics.median(rates) / 1e6, statistics.median(raws) / 1e6
    return [
        Row(
            "mirror catches up, one hop",
            f"{figure:.0f} MB/s",
            f"1 MiB write + fdatasync {raw:.0f} MB/s",
            ratio,
            "0.6",
            ratio >= 0.6,
        ),
        Row(
            "parent's CPU for it", f"{cost:.2f} x", "bare sendfile of the same bytes", cost, "at most 1.4", cost <= 1.4
        ),
    ]


def hops(pinned: bool) -> list[Row]:
    """1,000 records a second from ROOT to LOCAL, durable at every hop, against the first of the four hops."""
    ratios, ones, fours = [], [], []
    count = max(3000, scaled(10_000))
    for _ in range(RUNS):
        with Chain() as chain:
            top = chain.add("root")
            call(top.admin, "POST", "/v1/topics", {"name": "prices", "urgent": True})
            for level in ("l2", "l3", "pos", "local"):
                chain.add(level)
            bottom = chain.nodes[-1]
            while ends(bottom, "prices") < 0:
                sleep(0.02)
            taken = [_arrivals(node, count) for node in (chain.nodes[1], bottom)]
            with Producer(top.server) as producer:
                due = time.perf_counter()
                for _ in range(count):
                    due += 0.001
                    while (left := due - time.perf_counter()) > 0:
                        sleep(left)
                    producer.send("prices", b"%.9f" % time.perf_counter())
            found = [percentile(one.result(), 0.99) for one in taken]
            ones.append(found[0])
            fours.append(found[1])
            ratios.append(found[1] / found[0])
    ratio = statistics.median(ratios)
    return [
        Row("ROOT to LOCAL, 4 hops, 1,000/s, p99", f"{statistics.median(fours) * 1000:.1f} ms",
            f"one hop {statistics.median(ones) * 1000:.1f} ms", ratio, "at most 4.5", ratio <= 4.5),
    ]  # fmt: skip


def replicated(pinned: bool) -> list[Row]:
    """One record at a time, acknowledged when one of two hubs has it durably, against durable here and, once more, what
    the hub does: a hop and a sync."""
    ratios, found = [], []
    count = scaled(5_000)
    with Chain() as chain:
        top = chain.add("root")
        call(top.admin, "POST", "/v1/topics", {"name": "o", "urgent": True})
        for name in ("hub-a", "hub-b"):
            hub = chain.add("l2", EDGEBROKER_PIPE_PARENTS=top.pipe, EDGEBROKER_NODE_NAME=name)
            while ends(hub, "o") < 0:
                sleep(0.02)
        host, port = top.server.rsplit(":", 1)

        def median_seconds(level: int, name: bytes) -> float:
            taken = native_client.one_by_one(host.encode(), int(port), b"o", count, 128, level, name)
            return percentile(taken, 0.5)

        for run in range(RUNS):
            more = percentile(disk.append_and_sync(Path(DIRECTORY), 500), 0.5)
            more += percentile(native_client.ping(20_000, -1), 0.5)
            durable, both = median_seconds(DURABLE, b"d%d" % run), median_seconds(REPLICATED, b"r%d" % run)
            ratios.append(both / (durable + more))
            found.append((both * 1e6, durable * 1e6, more * 1e6))
    ratio = statistics.median(ratios)
    both_us, durable_us, more_us = (statistics.median(values) for values in zip(*found, strict=True))
    against = f"durable here {durable_us:.0f} us + ping-pong + append+fdatasync {more_us:.0f} us"
    work = "one at a time, replicated to one of two hubs, p50"
    return [Row(work, f"{both_us:.0f} us", against, ratio, "1.5", ratio <= 1.5)]


def _arrivals(node: BrokerProcess, count: int) -> Future[list[float]]:
    """Read in a thread of its own how long each record took to come here."""
    found: Future[list[float]] = Future()

    def read() -> None:
        taken: list[float] = []
        with Consumer(node.server, ["prices"]) as consumer:
            while len(taken) < count:
                for record in consumer.poll(None):
                    taken.append(time.perf_counter() - float(record.value or b"0"))
                    consumer.ack(record)
        found.set_result(taken)

    threading.Thread(target=read, daemon=True).start()
    return found


def children(pinned: bool) -> list[Row]:
    """2,000 simulated children wait at one parent; a producer publishes 1,000 records a second for ten seconds."""
    count, seconds = 2000, 10.0
    with Chain() as chain:
        parent = chain.add("root", EDGEBROKER_LIMITS_MAX_CONNECTIONS="4000")
        call(parent.admin, "POST", "/v1/topics", {"name": "prices"})
        part = call(parent.admin, "GET", "/v1/topics/prices")["partitions"][0]
        crowd = Crowd(parent.admin, part["log_id"], count)
        frames_before, cpu_before = _frames(parent), cpu_seconds(parent.pid)
        crowd.run(parent.server, seconds)
        frames, spent = _frames(parent) - frames_before, cpu_seconds(parent.pid) - cpu_before
        memory = int(Path(f"/proc/{parent.pid}/statm").read_text().split()[1]) * 4096 / (1 << 20)
        crowd.close()
    lag = percentile(crowd.lags, 0.99)
    each = spent / frames * 1e6
    return [
        Row("2,000 children, 1,000 records/s: lag p99", f"{lag * 1000:.0f} ms", "seconds", lag, "0.5", lag < 0.5),
        Row("the same: parent's CPU per frame", f"{each:.1f} us", f"{frames / seconds:.0f} frames/s", each, "25 us",
            each <= 25),
        Row("the same: parent's memory", f"{memory:.0f} MiB", "MiB", memory, "160", memory < 160),
    ]  # fmt: skip


def _frames(node: BrokerProcess) -> int:
    return int(call(node.admin, "GET", "/v1/node")["counters"]["pipe_frames_out"])


class Crowd:
    """Many children in one process: they poll once, and time when what they are sent was published."""

    def __init__(self, admin: str, log_id: str, count: int) -> None:
        host, _, port = admin.rpartition(":")
        chain = crc32c(bytes.fromhex(log_id))
        self._selector = selectors.DefaultSelector()
        self.lags: list[float] = []
        self._sent: dict[int, float] = {}
        self._sockets = []
        for number in range(count):
            position = LogPosition("prices", 0, log_id, 1, 0, chain)
            poll = Poll(uid=f"{number:032x}", name=f"child-{number}", level="pos", topics=["prices"], logs=[position])
            body = msgspec.json.encode(poll)
            sock = socket.create_connection((host, int(port)))
            sock.sendall(
                b"POST /v1/pipe HTTP/1.1\r\nhost: x\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            sock.setblocking(False)
            self._sockets.append(sock)
            self._selector.register(sock, selectors.EVENT_READ)
            if number % 200 == 199:
                sleep(0.05)

    def run(self, server: str, seconds: float) -> None:
        """Publish for a while and read what comes."""
        stop = threading.Event()
        writer = threading.Thread(target=self._write, args=(server, seconds, stop), daemon=True)
        writer.start()
        buffer = bytearray(1 << 16)
        end = time.perf_counter() + seconds + 3.0
        while time.perf_counter() < end:
            for key, _ in self._selector.select(0.2):
                size = key.fileobj.recv_into(buffer)  # type: ignore[union-attr]
                now = time.perf_counter()
                # The header of a DATA frame stands behind the size of its chunk, its offset at 12.
                at = buffer.find(b"\r\n", 0, min(size, 12)) + 2
                if size > at + 32 and buffer[at + 4] == Kind.DATA:
                    offset = int.from_bytes(buffer[at + 12 : at + 20], "big")
                    published = self._sent.get(offset)
                    if published is not None:
                        self.lags.append(now - published)
            if stop.is_set() and not self._selector.select(0.0):
                break
        writer.join()

    def _write(self, server: str, seconds: float, stop: threading.Event) -> None:
        with Producer(server) as producer:
            due = time.perf_counter()
            for number in range(int(seconds * 1000)):
                due += 0.001
                while (left := due - time.perf_counter()) > 0:
                    sleep(left)
                self._sent[number] = time.perf_counter()
                producer.send("prices", b"x" * 128, partition=0)
        stop.set()

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._selector.close()


def narrow_line(pinned: bool) -> list[Row]:
    """Batches of 1 MiB over 512 kbit/s with 400 ms there and back, the connection reset every five seconds."""
    rate, size = 64_000.0, 1 << 20
    with Chain() as chain:
        parent = chain.add("root")
        with Producer(parent.server, batch_bytes=size, linger_ms=1000.0) as producer:
            for _ in range(3 * 16):
                producer.send("prices", os.urandom(size // 16 - 40), partition=0)
            producer.flush(60.0)
        needed = call(parent.admin, "GET", "/v1/topics/prices")["partitions"][0]["bytes"]
        line = Line(parent.pipe, rate, 0.2, 5.0)
        child = chain.add("l2", EDGEBROKER_PIPE_PARENTS=line.address)
        deadline = time.monotonic() + 10 * needed / rate
        while ends(child, "prices") < 48 and time.monotonic() < deadline:
            sleep(0.1)
        arrived, received, used = ends(child, "prices") == 48, line.delivered, line.delivered / (line.seconds * rate)
        cuts = line.cuts
        line.close()
    ratio = received / needed
    return [
        Row("512 kbit/s, 400 ms, cut every 5 s: received / needed", f"{ratio:.3f}", f"{cuts} cuts", ratio, "1.1",
            arrived and ratio < 1.1),
        Row("the same: share of the line from the first byte to the cut", f"{used:.0%}", "of 64 kB/s", used, "0.85",
            used >= 0.85),
    ]  # fmt: skip
