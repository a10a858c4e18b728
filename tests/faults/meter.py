"""What the processes of a fleet take of memory, descriptors and disk, and whether it stays so.

meter = Meter(fleet)
problems = meter.read()     # at rest, again and again
print(meter)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from .fleet import Fleet, Node

# What a process may ever hold, and by how much it may grow once it is warm. A node here has four partitions and a
# handful of connections.
MOST_RSS_BYTES = 96 << 20
GROWTH_RSS_BYTES = 12 << 20
GROWTH_FDS = 8
# A process is warm when it was read so often.
WARM_READINGS = 2


class Reading(NamedTuple):
    """Of one process at one time. Segments that are read stay open, so that they are counted apart from the other
    descriptors; `removed` files are open although nobody finds them any more, and take their place on the disk."""

    rss_bytes: int
    fds: int
    segments: int
    removed: int
    disk_bytes: int


class Meter:
    """Remembers what each process took when it was warm. `most_disk_bytes`: what a data directory may hold."""

    def __init__(self, fleet: Fleet, most_disk_bytes: int) -> None:
        self._fleet, self._most_disk_bytes = fleet, most_disk_bytes
        self._counts: dict[int, int] = {}
        self._warm: dict[int, Reading] = {}
        self._last: dict[str, Reading] = {}

    def read(self) -> list[str]:
        """Look at every process; what is too much, in words."""
        found = []
        for name, node in self._fleet.nodes.items():
            now = self._last[name] = _reading(node)
            count = self._counts[node.pid] = self._counts.get(node.pid, 0) + 1
            if count <= WARM_READINGS:
                self._warm[node.pid] = now
            warm = self._warm[node.pid]
            found += [f"{name} holds {now.rss_bytes >> 20} MiB"] if now.rss_bytes > MOST_RSS_BYTES else []
            grown = now.rss_bytes - warm.rss_bytes > GROWTH_RSS_BYTES
            found += [f"{name} grew from {warm.rss_bytes >> 20} to {now.rss_bytes >> 20} MiB"] if grown else []
            found += [f"{name}: {warm.fds} descriptors became {now.fds}"] if now.fds - warm.fds > GROWTH_FDS else []
            found += [f"{name}: {now.removed} removed files are open"] if now.removed else []
            over = now.disk_bytes > self._most_disk_bytes
            found += [f"{name}: {now.disk_bytes} bytes on disk, at most {self._most_disk_bytes}"] if over else []
        return found

    def __str__(self) -> str:
        lines = [
            f"{name} {now.rss_bytes / (1 << 20):.1f} MiB, {now.fds} + {now.segments} descriptors, "
            f"{now.disk_bytes / (1 << 20):.1f} MiB on disk"
            for name, now in self._last.items()
        ]
        return "; ".join(lines)


def _reading(node: Node) -> Reading:
    proc = Path("/proc") / str(node.pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    rss = int(status["VmRSS"].split()[0]) << 10
    targets = _targets(proc / "fd")
    removed = sum(target.endswith(" (deleted)") for target in targets)
    segments = sum(target.endswith(".log") and target.startswith(str(node.directory)) for target in targets)
    return Reading(rss, len(targets) - segments - removed, segments, removed, disk_bytes(node.directory))


def _targets(directory: Path) -> list[str]:
    """What the descriptors of a process are open on."""
    found = []
    for path in directory.iterdir():
        try:
            found.append(os.readlink(path))
        except FileNotFoundError:
            pass  # closed meanwhile
    return found


def disk_bytes(directory: Path) -> int:
    """What lies in a directory, as the file system counts it."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            pass  # removed meanwhile
    return total
