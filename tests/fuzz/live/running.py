"""Targets by name, run from a seed: node after node, each for some executions; and what was found."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar
from unittest.mock import patch

from tests.fuzz.live.http import Http
from tests.fuzz.live.json import Json, JsonBelow
from tests.fuzz.live.node import Case, Finding, Node
from tests.fuzz.live.parent import Parent
from tests.fuzz.live.pipe import Pipe
from tests.fuzz.live.sessions import Sessions
from tests.fuzz.live.target import Target

TARGETS: dict[str, type[Target]] = {
    "http": Http,
    "json": Json,
    "json-below": JsonBelow,
    "pipe": Pipe,
    "parent": Parent,
    "sessions": Sessions,
}
OF_A_NODE, BETWEEN_CHECKS = 500, 100
SMALLER_SECONDS = 20.0
T = TypeVar("T")


class Found(NamedTuple):
    """What is wrong, the seed of the run in which the first node shows it, and what was sent last."""

    why: str
    seed: str
    cases: list[Case]


def run(name: str, seed: str, more: Callable[[int], bool]) -> tuple[int, list[Found]]:
    """Play a target as long as more(executions); how many there were, and what they found, each thing once."""
    executions = 0
    findings: dict[str, Found] = {}
    for number in count():
        executions, found = _play(name, f"{seed}+{number}" if number else seed, executions, more)
        if found is not None:
            findings.setdefault(re.sub(r"\d+", "", found.why)[-300:], found)
        if not more(executions):
            break
    return executions, list(findings.values())


def _play(name: str, seed: str, executions: int, more: Callable[[int], bool]) -> tuple[int, Found | None]:
    """One node."""
    random = Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as directory:
        target, node = _start(name, Path(directory))
        try:
            for number in range(1, OF_A_NODE + 1):
                if not more(executions):
                    break
                executions += 1
                target.play(node, random)
                if number % BETWEEN_CHECKS == 0:
                    node.check()
                    del node.cases[:-BETWEEN_CHECKS]  # a timer may fail later than what set it
            node.check_records()
        except Finding as finding:
            return executions, Found(str(finding), seed, list(node.cases))
        finally:
            target.close()
            node.close()
    return executions, None


def _start(name: str, directory: Path) -> tuple[Target, Node]:
    target = TARGETS[name]()
    # Ids and leases are the same for every node, and so is what peers say of them.
    with patch("os.urandom", Random(0).randbytes):
        return target, Node(directory, target.settings)


def shows(name: str, cases: Sequence[Case]) -> str:
    """What a fresh node makes of these; "" when nothing is wrong."""
    with tempfile.TemporaryDirectory() as directory:
        target, node = _start(name, Path(directory))
        try:
            target.replay(node, cases)
            node.check_records()
        except Finding as finding:
            return str(finding)
        finally:
            target.close()
            node.close()
    return ""


def smaller(name: str, cases: list[Case]) -> list[Case]:
    """As little of these as a fresh node needs; all when they show nothing there."""
    until = time.monotonic() + SMALLER_SECONDS
    if not shows(name, cases):
        return cases
    cases = _reduced(cases, lambda kept: bool(shows(name, kept)), until)
    if len(cases) == 1:
        door, pieces = cases[0]
        cases = [Case(door, _reduced(pieces, lambda kept: bool(shows(name, [Case(door, kept)])), until))]
    return cases


def _reduced(items: list[T], fails: Callable[[list[T]], bool], until: float) -> list[T]:
    """The items without those that are not needed, taken away in ever smaller runs."""
    size = len(items) // 2
    while size and time.monotonic() < until:
        for first in range(0, len(items), size):
            fewer = items[:first] + items[first + size :]
            if fewer and time.monotonic() < until and fails(fewer):
                items = fewer
                break
        else:
            size //= 2
    return items
