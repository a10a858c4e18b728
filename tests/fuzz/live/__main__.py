"""Fuzz a whole node: python -m tests.fuzz.live SECONDS [TARGET...] [--seed SEED] | --replay FILE

Each target runs for so many seconds. A finding is printed with the seed, and with a file of its input that --replay
sends to a fresh node; the input is made smaller when a fresh node shows the finding. Exit: 0 nothing found, 1 findings.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.live.node import Case
from tests.fuzz.live.running import TARGETS, Found, run, shows, smaller
from tests.kit import watchdog


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.live", description="fuzz a whole node")
    parser.add_argument("seconds", type=int, nargs="?", default=60)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seed", default=str(int.from_bytes(os.urandom(3), "big")))
    parser.add_argument("--replay", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    logging.getLogger("edgebroker").addHandler(logging.NullHandler())
    watchdog.install()
    if arguments.replay is not None:
        return _replay(arguments.replay)
    status = 0
    for name in arguments.targets or TARGETS:
        executions, findings = run(name, arguments.seed, _for(arguments.seconds))
        print(f"{name}: {executions} executions, {len(findings)} findings", flush=True)
        for found in findings:
            print(_told(name, found))
            status = 1
    return status


def _for(seconds: int) -> Callable[[int], bool]:
    until = time.monotonic() + seconds
    return lambda executions: time.monotonic() < until


def _replay(path: Path) -> int:
    told = json.loads(path.read_text())
    cases = [Case(door, [bytes.fromhex(piece) for piece in pieces]) for door, pieces in told["cases"]]
    why = shows(told["target"], cases)
    print(why or "nothing is found")
    return 1 if why else 0


def _told(name: str, found: Found) -> str:
    """What there is to say about a finding; its input is in a file then."""
    cases = smaller(name, found.cases)
    told = {
        "target": name,
        "seed": found.seed,
        "cases": [[door, [one.hex() for one in pieces]] for door, pieces in cases],
    }
    handle, path = tempfile.mkstemp(prefix=f"edgebroker-fuzz-{name}-", suffix=".json")
    with open(handle, "w") as file:
        json.dump(told, file)
    size = sum(len(piece) for case in cases for piece in case.pieces)
    shown = "".join(f"\n    {door}: {b''.join(pieces)[:500]!r}" for door, pieces in cases[-3:])
    return f"  {found.why}\n    --seed {found.seed} {name}; {size} bytes in {path}{shown}"


if __name__ == "__main__":
    sys.exit(main())
