"""`make test-attack` or `python -m tests.attack [NUMBER...] [--seconds S]`: attack real nodes and print a table."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.node import DIRECTORY
from tests.attack.rows import ATTACKS
from tests.attack.stand import Stand


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.attack", description=__doc__)
    parser.add_argument("numbers", nargs="*", help="which attacks; all without any")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each goes on")
    options = parser.parse_args()
    print("| | attack | what became of it | held |\n|---|---|---|---|")
    broken = 0
    for row in ATTACKS:
        if options.numbers and not {*options.numbers} & {*row.number.split(", ")}:
            continue
        for _ in range(2):  # what does not hold is tried once more: machines are noisy
            with (
                tempfile.TemporaryDirectory(prefix="edgebroker-attack-", dir=DIRECTORY) as directory,
                Stand.started(Path(directory), options.seconds, row.descriptors) as stand,
            ):
                figure, held = row.run(stand)
            if held:
                break
        broken += not held
        print(f"| {row.number} | {row.what} | {figure} | {'yes' if held else '**no**'} |", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
