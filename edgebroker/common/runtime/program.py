"""Starting this program again."""

from __future__ import annotations

import sys

# The verb of the helper process that does what needs keys; see trust/worker.py.
TRUST_WORKER = "trust-worker"


def program() -> list[str]:
    """The command that starts this program, from source or as a frozen binary."""
    if getattr(sys, "frozen", False):
        return [sys.executable]
    return [sys.executable, "-m", "edgebroker"]
