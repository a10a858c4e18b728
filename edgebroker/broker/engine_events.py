"""What the engine says about its logs, passed on to those whom it concerns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgebroker.broker.core import Core
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.broker.holders import Holders
from edgebroker.broker.mirror.mirroring import Mirroring
from edgebroker.broker.sessions.sessions import Sessions
from edgebroker.broker.trust.trust_topic import TrustTopic
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.storage.engine import Log
from edgebroker.storage.types import DurableChunk


class EngineEvents:
    """The listener of a node's engine. `opening` is called while it is opened: (topics done, topics in all)."""

    def __init__(
        self,
        core: Core,
        scheduler: Scheduler,
        sessions: Sessions,
        downstream: Downstream,
        mirroring: Mirroring,
        holders: Holders,
        trust: TrustTopic,
        opening: Callable[[int, int], None],
    ) -> None:
        self._core, self._scheduler, self._sessions, self._downstream = core, scheduler, sessions, downstream
        self._mirroring, self._holders, self._opening = mirroring, holders, opening
        self._trust = trust

    def on_opening(self, done: int, topics: int) -> None:
        self._opening(done, topics)

    def on_written(self, log: Log) -> None:
        self._core.publishing.on_written(log)

    def on_durable(self, log: Log, chunks: Sequence[DurableChunk]) -> None:
        core = self._core
        core.publishing.on_durable(log)
        core.push.on_durable(log, chunks)
        self._downstream.on_durable(log)
        core.table_snapshots.on_durable(log)
        self._mirroring.on_durable(log)
        self._trust.on_durable(log)

    def on_failed(self, log: Log, outcome: Outcome, message: str) -> None:
        self._core.publishing.on_failed(log, outcome, message)
        self._core.table_snapshots.on_failed(log, outcome, message)
        self._mirroring.on_failed(log)

    def on_topic(self, name: str) -> None:
        self._downstream.on_topic(name)
        for log in self._core.engine.partitions(name):
            self._core.push.settings_changed(log)
        self._sessions.on_topic(name)

    def on_rewritten(self, log: Log) -> None:
        self._downstream.on_rewritten(log)

    def retention_pin(self, log: Log) -> int | None:
        return self._downstream.pinned(log, self._scheduler.now())

    def retention_floor(self, log: Log) -> int | None:
        return self._holders.floor(log, self._scheduler.now())

    def on_full(self) -> bool:
        return self._holders.give_up(self._scheduler.now())
