"""The fleet: 4,000 stores with 4 terminals each report to one ROOT; how long `edgebroker tree` takes, what it costs."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path

import msgspec

from benchmarks.node import connected_child
from benchmarks.rows import Row, scaled
from benchmarks.tree import Chain, cpu_seconds
from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.cli.main import main
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.pipe.report import MAX_BATCH_BYTES, GroupReport, Report, TopicReport

TERMINALS = 4
SENDER = f"{1:032x}"
HUBS = 20
TOPICS = [("prices", 4), ("items", 4), ("promotions", 2), ("settings", 1), ("receipts", 4), ("labels", 1)]


def fleet(pinned: bool) -> list[Row]:
    """Everything is made known; then everything reports twice, with other offsets; then an operator looks."""
    stores = scaled(4000)
    with Chain() as chain:
        root = chain.add("root", EDGEBROKER_REGISTRY_ENABLED="true")
        empty = _memory(root)
        with connected_child(root.pipe, SENDER):
            sender = Sender(root)
            for number in range(3):
                if number == 1:
                    begun, before = time.perf_counter(), cpu_seconds(root.pid)
                for report in _reports(stores, number + 1):
                    sender.add(report)
                sender.send()
            spent = cpu_seconds(root.pid) - before
            took = time.perf_counter() - begun
        nodes = stores * (1 + TERMINALS) + HUBS
        looks = []
        for _ in range(5):
            begun = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert main(["tree", "--admin", root.admin]) == 0
            looks.append(time.perf_counter() - begun)
        assert any(line.split()[:2] == ["local", str(stores * TERMINALS)] for line in printed.getvalue().splitlines())
        begun = time.perf_counter()
        found = call(root.admin, "GET", "/v1/tree/applied?topic=prices&end=0:1000000&label=region=eu")
        waited = time.perf_counter() - begun
        assert found["nodes"] == stores * TERMINALS, found
        memory = _memory(root)
    each = spent / nodes / 2 * 1e6
    look = sorted(looks)[len(looks) // 2]
    return [
        Row(f"tree of {nodes} nodes", f"{look:.2f} s", "seconds", look, "1", look <= 1.0),
        Row("wait's question about them", f"{waited:.2f} s", "seconds", waited, "1", waited <= 1.0),
        Row("ROOT's memory with them", f"{memory:.0f} MiB", f"empty {empty:.0f} MiB", memory, "200", memory < 200),
        Row("ROOT's CPU for a report", f"{each:.0f} us", f"{2 * nodes / took:.0f} reports/s", each, "", True),
    ]


class Sender:
    """A hub that passes on what it heard."""

    def __init__(self, root: BrokerProcess) -> None:
        self._address = root.pipe
        self._nodes: list[dict[str, object]] = []
        self._bytes = 0

    def add(self, report: Report) -> None:
        raw = msgspec.json.encode(report)
        self._nodes.append({"report": msgspec.json.decode(raw)})
        self._bytes += len(raw) + 64
        if self._bytes > MAX_BATCH_BYTES - 4096:
            self.send()

    def send(self) -> None:
        # A session of its own for each: one that brings too many new nodes is sent again.
        batch = {"sender": SENDER, "session": "bench", "number": 0, "nodes": self._nodes}
        batch["wall_ms"] = SystemClock().wall_ms()
        while True:
            try:
                call(self._address, "POST", "/v1/tree/reports", batch)
                break
            except EdgeBrokerError as error:
                assert "new nodes" in str(error), error
                time.sleep(0.5)
        self._nodes, self._bytes = [], 0


def _reports(stores: int, number: int) -> list[Report]:
    found = [_report(hub + 1, "l3", f"eu/r{hub}", 0, number) for hub in range(HUBS)]
    for store in range(stores):
        hub = store % HUBS
        uid = 1000 + store * 10
        region = f"eu/r{hub}/store-{store}"
        found.append(_report(uid, "pos", region, hub + 1, number))
        found += [_report(uid + till, "local", region, uid, number) for till in range(1, TERMINALS + 1)]
    return found


def _report(uid: int, level: str, region: str, parent: int, number: int) -> Report:
    topics = [
        TopicReport(name, [900_000 + number] * parts, [GroupReport("till", [900_000 + uid % 2 * number] * parts)])
        for name, parts in TOPICS
    ]
    return Report(
        uid=f"{uid:032x}",
        name=f"{level}-{uid}",
        level=level,
        version="0.1.0",
        boot=f"{uid:016x}",
        number=number,
        region=region,
        labels={"format": "express" if uid % 3 else "city", "wave": str(uid % 5)},
        address=f"10.0.0.1:{uid % 60000 + 1}" if level != "local" else "",
        parent=f"{parent:032x}",
        managed=True,
        topics=topics,
    )


def _memory(node: BrokerProcess) -> float:
    return int(Path(f"/proc/{node.pid}/statm").read_text().split()[1]) * 4096 / (1 << 20)
