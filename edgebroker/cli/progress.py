"""Progress on stderr, on a terminal only."""

from __future__ import annotations

import sys
from typing import Protocol

CLEAR_LINE = "\r\x1b[K" if sys.stderr.isatty() else ""


class Progress(Protocol):
    def update(self, count: int) -> object: ...
    def close(self) -> object: ...


class _NoProgress:
    def update(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


def progress(total: int | None, unit: str, *, quiet: bool = False) -> Progress:
    """A bar of tqdm on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        return _NoProgress()
    from tqdm import tqdm

    bar: Progress = tqdm(total=total, unit=unit, file=sys.stderr, unit_scale=True)
    return bar
