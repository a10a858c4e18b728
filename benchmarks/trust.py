"""What a fleet costs: replication over TLS, memory, silent connections, and machines that join through two nodes."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.floods import publish_one_by_one
from benchmarks.node import Node
from benchmarks.rows import RUNS, Row, scaled
from benchmarks.tree import Chain, cpu_seconds, ends
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench.disk import percentile
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.producer import Producer
from edgebroker.common.runtime.clock import sleep
from edgebroker.trust.directory import TrustDirectory
from edgebroker.trust.joining import join
from edgebroker.trust.messages import Join

SILENT, JOINS, AT_ONCE = 1000, 400, 4
MIB = 1 << 20


def joined(node: BrokerProcess) -> bool:
    return bool(call(node.admin, "GET", "/v1/trust")["node"])


def connected(node: BrokerProcess) -> bool:
    parent = call(node.admin, "GET", "/v1/pipe")["parent"]
    return parent is None or bool(parent["connected"])


class FleetChain(Chain):
    """Nodes that have joined a fleet, each through the one above it."""

    def grow(self, *levels: str) -> None:
        for level in levels:
            if not self.nodes:
                self.add(level, EDGEBROKER_TRUST_FLEET="bench")
            else:
                path = self.directory / f"{level}.token"
                path.write_text(self.token([level], 1))
                self.add(level, EDGEBROKER_TRUST_TOKEN_FILE=str(path))
            while not joined(self.nodes[-1]) or not connected(self.nodes[-1]):
                sleep(0.05)

    def token(self, levels: list[str], uses: int) -> str:
        wanted = {"tokens": [{"levels": levels, "uses": uses}]}
        return str(call(self.nodes[0].admin, "POST", "/v1/trust/tokens", wanted)["tokens"][0])


def trust(pinned: bool) -> list[Row]:
    return [*_replication(), *_memory(), *_joins()]


def _replication() -> list[Row]:
    """A child that fetches what its parent has: megabytes a second, in the clear and under TLS, in turns."""
    size = scaled(200) * MIB
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(RUNS):
        for secure in (False, True):
            with FleetChain() as chain:
                if secure:
                    chain.grow("root")
                else:
                    chain.add("root")
                parent = chain.nodes[0]
                with Producer(parent.server, batch_bytes=MIB) as producer:
                    value = os.urandom(64 << 10)
                    for _ in range(size // len(value)):
                        producer.send("prices", value, partition=0)
                    producer.flush(120.0)
                end = ends(parent, "prices")
                token = chain.directory / "token"
                if secure:
                    token.write_text(chain.token(["l2"], 1))
                child = chain.add("l2", **({"EDGEBROKER_TRUST_TOKEN_FILE": str(token)} if secure else {}))
                while ends(child, "prices") <= 0:
                    sleep(0.01)
                begun, first = time.perf_counter(), ends(child, "prices")
                while ends(child, "prices") < end:
                    sleep(0.01)
                found[secure].append((end - first) * len(value) / MIB / (time.perf_counter() - begun))
    plain, secure_rate = (sorted(found[one])[RUNS // 2] for one in (False, True))
    ratio = secure_rate / plain
    figure, reference = f"{secure_rate:.0f} MB/s", f"{plain:.0f} MB/s in the clear"
    return [Row("replication to a child over TLS", figure, reference, ratio, "0.25", ratio >= 0.25)]


def _memory() -> list[Row]:
    """Idle nodes, and one to which a thousand say nothing while a publisher goes on."""
    with Chain() as plain:
        plain.add("root")
        plain.add("l2")
        sleep(3.0)
        before = Node(plain.nodes[1]).memory()[0]
    with FleetChain() as chain:
        chain.grow("root", "l2")
        for node in chain.nodes:
            node.stop()
            node.start()
        sleep(3.0)
        hub = chain.nodes[1]
        idle = Node(hub).memory()[0]
        quiet = percentile(publish_one_by_one(chain.nodes[0].server, 2.0), 0.99)
        host, _, port = chain.nodes[0].pipe.rpartition(":")
        root = Node(chain.nodes[0])
        empty = root.memory()[0]
        sockets = [socket.create_connection((host, int(port))) for _ in range(SILENT)]
        for sock in sockets[::2]:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")  # half a ClientHello
        sleep(1.0)
        full = root.memory()[0]
        felt = percentile(publish_one_by_one(chain.nodes[0].server, 2.0), 0.99)
        for sock in sockets:
            sock.close()
    silent, more = full - empty, idle - before
    bound = max(2 * quiet, 0.010)
    return [
        Row("memory of an idle node of a fleet", f"{idle:.1f} MiB", f"{before:.1f} MiB without", more, "+8 MiB",
            more <= 8),
        Row(f"{SILENT} silent connections, half of them with half a ClientHello", f"{silent:+.1f} MiB",
            f"{empty:.1f} MiB before", silent, "+8 MiB", silent <= 8),
        Row("publish p99 meanwhile", f"{felt * 1000:.1f} ms", f"{quiet * 1000:.1f} ms quiet", felt / quiet,
            "2 x, or 10 ms", felt <= bound),
    ]  # fmt: skip


def _joins() -> list[Row]:
    """Machines that join through a store's server and a hub, four at a time; the processor time of the root, with that
    of its helper process."""
    count = scaled(JOINS * 1000) // 1000
    with FleetChain() as chain, tempfile.TemporaryDirectory() as scratch:
        chain.grow("root", "l2", "pos")
        root, store = chain.nodes[0], chain.nodes[-1]
        token = chain.token(["local"], count)
        ranks = iter(range(count))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    rank = next(ranks, None)
                if rank is None:
                    return
                uid = f"{rank:032x}"
                task = Join(addresses=[store.pipe], token=token, fleet="", uid=uid, name="x", level="local", region="")
                join(TrustDirectory(Path(scratch) / str(rank)), task)

        before, begun = _with_helpers(root.pid), time.perf_counter()
        threads = [threading.Thread(target=work) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds, used = time.perf_counter() - begun, _with_helpers(root.pid) - before
        known = call(root.admin, "GET", "/v1/trust/tokens")["tokens"]
        assert max(one["used"] for one in known) == count
    minutes, cpu = 20_000 * seconds / count / 60, 20_000 * used / count
    return [
        Row("20,000 machines join through three levels", f"{minutes:.1f} min", f"{count} measured, {AT_ONCE} at a time",
            minutes, "10 min", minutes <= 10),
        Row("processor time of the root for it", f"{cpu:.0f} s", "with its helper process", cpu, "60 s", cpu <= 60),
    ]  # fmt: skip


def _with_helpers(pid: int) -> float:
    """Processor seconds of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return cpu_seconds(pid) + sum(cpu_seconds(int(child)) for child in children)
