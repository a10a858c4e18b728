"""What an honest publisher feels while connections beside it send as much nonsense as the node takes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.node import Node, running
from benchmarks.rows import DURABLE, Row, scaled
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench.disk import percentile
from edgebroker.common import batch
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Connect

KINDS = {
    "ack": "stale acknowledgements",
    "heartbeat": "HEARTBEAT",
    "connect": "CONNECT again",
    "topics": "CONNECT with 1,000 topics",
    "join": "JOIN and LEAVE",
    "reset": "RESET of what it does not hold",
    "epoch": "new producer epochs",
    "get": "pipelined GET",
}
CONNECTIONS = 20
SECONDS = 5.0
MOST_P99, MOST = 0.010, 0.100


def floods(pinned: bool) -> list[Row]:
    """Each kind against quiet times just before it."""
    rows = []
    seconds = SECONDS * scaled(100_000) / 100_000
    for kind, name in KINDS.items():
        with running(pinned=pinned) as node:
            call(node.process.admin, "POST", "/v1/topics", {"name": "prices"})
            quiet = publish_one_by_one(node.server, seconds)
            before = node.memory()[0]
            with _flood(node, kind):
                flooded = publish_one_by_one(node.server, seconds)
                grown = node.memory()[0] - before
        p99, most = percentile(flooded, 0.99), max(flooded)
        bound = max(2 * percentile(quiet, 0.99), MOST_P99)
        rows.append(
            Row(
                f"{CONNECTIONS} x {name}",
                f"p99 {p99 * 1e3:.1f} ms, max {most * 1e3:.0f} ms, {grown:+.0f} MiB",
                f"quiet p99 {percentile(quiet, 0.99) * 1e3:.1f} ms, max {max(quiet) * 1e3:.0f} ms",
                max(p99 / bound, most / MOST),
                "p99 <= 2 x quiet or 10 ms, max 100 ms",
                p99 <= bound and most <= MOST,
            )
        )
    return rows


@contextmanager
def _flood(node: Node, kind: str) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.flooder", kind, node.server, node.process.admin, str(CONNECTIONS)]
    flooder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert flooder.stdout is not None
    try:
        assert flooder.stdout.readline(), "the flood did not begin"
        yield
    finally:
        flooder.communicate()


def publish_one_by_one(server: str, seconds: float) -> list[float]:
    """Latencies of durable publishes one after the other, of 200 bytes."""
    host, _, port = server.rpartition(":")
    found: list[float] = []
    with socket.create_connection((host, int(port)), 60.0) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(frames.write_connect(1, Connect(1, 0, "honest", b"", -1, -1, [])))
        sock.recv(1 << 16)
        prefix = frames.publish_prefix(DURABLE, "prices", 0)
        body = prefix + batch.encode([(b"key", b"x" * 200, 1000)])
        frame = frames.HEADER.pack(len(body) + 12, frames.FrameType.PUBLISH, 0, 0, 9) + body
        end = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end:
            sock.sendall(frame)
            answer = sock.recv(1 << 16)
            while answer[4] == frames.FrameType.HEARTBEAT and len(answer) < 50:
                answer = sock.recv(1 << 16)
            found.append(time.perf_counter() - begun)
    return found
