"""A progress bar on stderr, only where somebody sees it."""

from __future__ import annotations

import sys
from typing import Protocol


class Progress(Protocol):
    def update(self, count: int) -> object: ...
    def close(self) -> object: ...


class _Silent:
    def update(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


def progress(total: int | None, unit: str, *, quiet: bool = False) -> Progress:
    """tqdm on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        return _Silent()
    from tqdm import tqdm

    bar: Progress = tqdm(total=total, unit=unit, file=sys.stderr, unit_scale=True)
    return bar
