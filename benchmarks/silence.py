"""How soon ROOT knows of a node that is frozen, killed or stopped, at each level of a tree of five."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from benchmarks.rows import Row
from benchmarks.tree import Chain
from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.common.runtime.clock import sleep

LEVELS = ("l2", "l3", "pos", "local")
MOST_SECONDS = 20.0


def silence(pinned: bool) -> list[Row]:
    """Each kind at each level; the longest time of a kind counts."""
    with Chain() as chain:
        root = chain.add("root")
        call(root.admin, "POST", "/v1/topics", {"name": "prices"})
        for level in LEVELS:
            chain.add(level, EDGEBROKER_NODE_NAME=level)
        below = dict(zip(LEVELS, chain.nodes[1:], strict=True))
        kinds: dict[str, tuple[Callable[[BrokerProcess], Any], Callable[[BrokerProcess], Any]]] = {
            "frozen": (lambda node: os.kill(node.pid, signal.SIGSTOP), lambda node: os.kill(node.pid, signal.SIGCONT)),
            "killed": (lambda node: node.kill(), lambda node: node.start()),
            "stopped": (lambda node: node.stop(), lambda node: node.start()),
        }
        rows = []
        for kind, (lose, bring_back) in kinds.items():
            found = []
            for level in reversed(LEVELS):
                _wait(lambda: not _silent(root, *LEVELS))
                lose(below[level])
                begun = time.perf_counter()
                _wait(lambda level=level: _silent(root, level))  # type: ignore[misc]
                found.append(time.perf_counter() - begun)
                bring_back(below[level])
            by_level = ", ".join(f"{level} {one:.1f}" for level, one in zip(reversed(LEVELS), found, strict=True))
            ratio = max(found) / MOST_SECONDS
            rows.append(Row(f"{kind}: ROOT knows", f"{max(found):.1f} s", by_level, ratio, "20 s", ratio <= 1.0))
        return rows


def _silent(root: BrokerProcess, *names: str) -> list[str]:
    """Which of these are silent, or were not heard of yet."""
    nodes = {node["name"]: node["silent_seconds"] for node in call(root.admin, "GET", "/v1/tree/nodes")["nodes"]}
    return [name for name in names if nodes.get(name, 0.0) >= 0]


def _wait(condition: Callable[[], object]) -> None:
    while not condition():
        sleep(0.05)
