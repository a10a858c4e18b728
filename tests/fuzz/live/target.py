"""What a target is: a way to play a peer to a node."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tests.fuzz.live.node import Case, Node


class Target:
    """One for each node."""

    settings: dict[str, object] = {}

    def play(self, node: Node, random: Random) -> None:
        """One execution. Raises Finding."""
        raise NotImplementedError

    def replay(self, node: Node, cases: Sequence[Case]) -> None:
        """What was sent before, again."""
        for case in cases:
            node.send(case)

    def close(self) -> None: ...
