"""The node that is attacked, and what honest users of it feel meanwhile.

A node of the middle with a child below it, both real processes; a publisher that stores one record after the other; an
operator at the unix socket. Everything is measured quiet first, then under the attack, then after it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.floods import publish_one_by_one
from benchmarks.node import Node
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench.disk import percentile
from edgebroker.cli.broker_process import BrokerProcess

# What is allowed: p99 at most twice the quiet one or 10 ms, never more than 100 ms; a quiet machine is assumed.
MOST_P99, MOST = 0.010, 0.100
FREE = {"EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0", "EDGEBROKER_STORAGE_SOFT_FREE_BYTES": "0"}


class Felt(NamedTuple):
    """What an honest user felt: latencies of publishes, the slowest look at the unix socket (seconds), memory (MiB)."""

    p99: float
    most: float
    operator: float
    memory: float


class Stand:
    """One node under attack, for so many seconds, with a limit of descriptors (0: the usual one). `quiet` is how it was
    before, `felt` how it was meanwhile, `after` when it was over."""

    def __init__(self, directory: Path, seconds: float, descriptors: int) -> None:
        limited = ["prlimit", f"--nofile={descriptors}"] if descriptors else []
        roles = {"EDGEBROKER_NODE_LEVEL": "l3", "EDGEBROKER_REGISTRY_ENABLED": "true", "EDGEBROKER_NODE_NAME": "hub"}
        self.process = BrokerProcess(directory / "hub", settings={**FREE, **roles}, command=limited)
        self._directory, self._seconds = directory, seconds
        self._running = [self.process]

    @classmethod
    @contextmanager
    def started(cls, directory: Path, seconds: float, descriptors: int) -> Iterator[Stand]:
        """A fresh one, and its end."""
        stand = cls(directory, seconds, descriptors)
        try:
            stand.start()
            yield stand
        finally:
            stand.close()

    def start(self) -> None:
        self.process.start()
        below = {"EDGEBROKER_NODE_LEVEL": "local", "EDGEBROKER_PIPE_PARENTS": self.process.pipe}
        self.child = BrokerProcess(self._directory / "till", settings={**FREE, **below})
        self._running.append(self.child)
        self.child.start()
        call(self.socket, "POST", "/v1/topics", {"name": "prices"})
        self.quiet = self.feel(1.0)

    @property
    def socket(self) -> str:
        return f"unix:{self.process.directory / 'ctl.sock'}"

    @property
    def memory(self) -> float:
        return Node(self.process).memory()[0]

    def feel(self, seconds: float) -> Felt:
        """Publish for so long, and look at the unix socket in between."""
        latencies, operator, memory = [], 0.0, 0.0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            latencies += publish_one_by_one(self.process.server, min(0.5, seconds))
            begun = time.perf_counter()
            call(self.socket, "GET", "/v1/node")
            operator = max(operator, time.perf_counter() - begun)
            memory = max(memory, self.memory)
        return Felt(percentile(latencies, 0.99), max(latencies), operator, memory)

    @contextmanager
    def attacked(self, kind: str, count: int, module: str = "tests.attack.attacker") -> Iterator[dict[str, object]]:
        """Somebody attacks meanwhile; what that one got is in the dictionary afterwards."""
        command = [sys.executable, "-m", module, kind]
        command += [self.process.server, self.process.admin, self.process.pipe, str(count)]
        attacker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        found: dict[str, object] = {}
        assert attacker.stdout is not None
        try:
            assert attacker.stdout.readline(), "the attacker failed"
            yield found
        finally:
            said, _ = attacker.communicate(timeout=120.0)
            found.update(json.loads(said) if said.strip() else {})

    def under(self, kind: str, count: int, module: str = "tests.attack.attacker") -> dict[str, object]:
        """Attack, and measure; what the attacker got."""
        with self.attacked(kind, count, module) as got:
            self.felt = self.feel(self._seconds)
        time.sleep(3.0)  # what is freed is given back with the next tick
        self.after = self.feel(0.5)
        return got

    @property
    def unmoved(self) -> bool:
        """Did honest users feel no more than is allowed?"""
        bound = max(2 * self.quiet.p99, MOST_P99)
        return self.felt.p99 <= bound and self.felt.most <= MOST

    @property
    def child_follows(self) -> bool:
        """Has the child all that was published?"""
        end = self.end(self.socket)
        deadline = time.monotonic() + 10.0
        while self.end(self.child.admin) < end and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.end(self.child.admin) >= end

    @staticmethod
    def end(admin: str) -> int:
        """Where the log of the topic ends at a node."""
        return int(call(admin, "GET", "/v1/topics/prices")["partitions"][0]["durable_end"])

    def figures(self) -> str:
        felt, quiet = self.felt, self.quiet
        return (
            f"p99 {felt.p99 * 1e3:.1f} ms, max {felt.most * 1e3:.0f} (quiet {quiet.p99 * 1e3:.1f}, "
            f"{quiet.most * 1e3:.0f}); operator {felt.operator * 1e3:.0f} ms; "
            f"{felt.memory - quiet.memory:+.0f} MiB, then {self.after.memory - quiet.memory:+.0f}"
        )

    def close(self) -> None:
        for process in self._running:
            process.kill()
