"""Clients when their process forks or ends.

A forked child has the objects of its parent and none of its threads: what it published would wait for ever. A process
that ends takes its threads along: what was sent and is not acknowledged would be gone without a word.
"""

from __future__ import annotations

import atexit
import os
from typing import Protocol


class Living(Protocol):
    """What has an I/O thread."""

    def forked(self) -> None:
        """This is a child of the process that made it: let go of its sockets, which are the parent's, and refuse."""

    def ended(self) -> None:
        """The process ends: finish in a few seconds, or say what is not finished."""


_living: set[Living] = set()


def begin(client: Living) -> None:
    _living.add(client)


def end(client: Living) -> None:
    _living.discard(client)


def _forked() -> None:
    clients = list(_living)
    _living.clear()
    for client in clients:
        client.forked()


def _ended() -> None:
    for client in list(_living):
        client.ended()


os.register_at_fork(after_in_child=_forked)
atexit.register(_ended)
