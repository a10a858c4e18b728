"""Starting this program again."""

from __future__ import annotations

import sys


def program() -> list[str]:
    """The command that starts this program, from source or as a frozen binary."""
    if getattr(sys, "frozen", False):
        return [sys.executable]
    return [sys.executable, "-m", "edgebroker"]
