"""The listener of an engine that passes on to a core what concerns it, as broker/engine_events.py does for a node."""

from __future__ import annotations

from collections.abc import Sequence

from edgebroker.broker.core import Core
from edgebroker.common.outcome import Outcome
from edgebroker.storage.engine import Log
from edgebroker.storage.types import DurableChunk


class CoreListener:
    """For a core without a tree."""

    core: Core

    def on_opening(self, done: int, topics: int) -> None: ...

    def on_written(self, log: Log) -> None:
        self.core.publishing.on_written(log)

    def on_durable(self, log: Log, chunks: Sequence[DurableChunk]) -> None:
        self.core.publishing.on_durable(log)
        self.core.push.on_durable(log, chunks)

    def on_failed(self, log: Log, outcome: Outcome, message: str) -> None:
        raise AssertionError("memory does not fail")

    def on_topic(self, name: str) -> None: ...
    def on_rewritten(self, log: Log) -> None: ...

    def retention_pin(self, log: Log) -> int | None:
        return None

    def retention_floor(self, log: Log) -> int | None:
        return None

    def on_full(self) -> bool:
        return False
