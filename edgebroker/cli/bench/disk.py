"""What the disk of this machine can do: the references that benchmarks are compared with."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from edgebroker.common.runtime.clock import SystemClock

CLOCK = SystemClock()


def append_and_sync(directory: Path, count: int, size: int = 4096) -> list[float]:
    """Seconds of each append of `size` bytes with its fdatasync."""
    data = b"\x07" * size
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        fd, taken = file.fileno(), []
        for number in range(count):
            began = CLOCK.monotonic()
            os.pwrite(fd, data, number * size)
            os.fdatasync(fd)
            taken.append(CLOCK.monotonic() - began)
        return taken


def sequential(directory: Path, total: int, chunk: int, *, sync_each: bool) -> float:
    """Bytes a second of sequential writes, synced after each or once at the end."""
    data = b"\x07" * chunk
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        fd, began = file.fileno(), CLOCK.monotonic()
        for position in range(0, total, chunk):
            os.pwrite(fd, data, position)
            if sync_each:
                os.fdatasync(fd)
        os.fdatasync(fd)
        return total / (CLOCK.monotonic() - began)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed; 0 when there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0
