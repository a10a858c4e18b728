"""Tables, counts, sizes and durations as people read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their longest cell, two spaces apart."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def json_line(fields: object) -> str:
    """One line of JSON: text as it is, unless a terminal would obey it."""
    line = json.dumps(fields, ensure_ascii=False)
    return line if line.isprintable() else json.dumps(fields)


def counted(count: int, noun: str, plural: str = "") -> str:
    """1 node, 2 nodes."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def date_and_time(wall_ms: int) -> str:
    """In the time zone of this machine."""
    return datetime.fromtimestamp(wall_ms / 1000).astimezone().isoformat(" ", "seconds")
