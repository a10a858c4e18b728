"""A fresh copy of one topic, loaded from the parent beside the old one: an ordinary store in a directory of its own.

It has its own pipe to the parent, which keeps what the copy has not got yet. After a crash it goes on where it was.
When it is complete, it is closed, and its directory of the topic takes the place of the old one
(storage/rewrite/replace.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgebroker.broker.mirror.mirrors import ReaderHooks
from edgebroker.broker.mirror.upstream import Upstream
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.ports import NodeInfo
from edgebroker.common.outcome import Done, Outcome
from edgebroker.network.http.peers import Peers
from edgebroker.pipe.candidates import Candidates
from edgebroker.storage.engine import Log, MirrorEngine
from edgebroker.storage.types import DurableChunk
from edgebroker.trust.node_name import OWN_DIGITS

CLOSE_SECONDS = 5.0


class CopySettings(NamedTuple):
    """What the copy has from its node."""

    uid: str
    name: str
    level: str
    bytes_per_second: int


class FreshCopy:
    """Owned by the loop thread; it is the listener of its store."""

    def __init__(
        self, store: MirrorEngine, topic: str, parents: Sequence[str], settings: CopySettings, peers: Peers
    ) -> None:
        self.topic, self._loop, self._store = topic, peers.loop, store
        self._store.open(self)
        # Another node than its own, for the parent to keep what it lacks; but one of its family (trust/node_name.py).
        uid = self._store.node_uid[:OWN_DIGITS] + settings.uid[OWN_DIGITS:]
        node = NodeInfo(uid, f"{settings.name} (resync)"[:255], settings.level)
        self._upstream = Upstream(
            self._store,
            peers,
            Metrics(),
            node,
            Candidates(parents, random.uniform),
            [topic],
            settings.bytes_per_second,
            "",
            ReaderHooks(lambda log, offset, then: then(), lambda log: None, lambda log, other: None, self._delete),
            lambda directives: None,
            pin=True,
        )
        self._upstream.start()

    def _delete(self, topic: str, first: int, last: int, done: Done) -> None:
        remover = self._store.remover
        assert remover is not None
        remover.delete(topic, {}, lambda logs: None, done)

    # ---- how far it is ----

    @property
    def logs(self) -> list[Log]:
        return self._store.partitions(self.topic)

    @property
    def records(self) -> int:
        return sum(log.records for log in self.logs)

    def has(self, ends: Sequence[int]) -> bool:
        """Is everything here up to these ends, one for each partition, and nothing damaged?"""
        logs = self.logs
        return len(logs) == len(ends) and all(
            log.durable_end >= end and not log.corrupt_ranges for log, end in zip(logs, ends, strict=True)
        )

    @property
    def problem(self) -> str:
        """Why it does not go on now; "" when it does."""
        refusal = self._store.refusal()
        if refusal is not None:
            return refusal[1]
        waiting = [line.why or line.state for line in self._upstream.lines(self.topic) if line.state != "live"]
        return self._upstream.last_error if not self._upstream.connected else "; ".join(waiting)

    def follow(self, parents: Sequence[str]) -> None:
        """Where the node looks for its parent now."""
        self._upstream.follow_others(parents)

    @property
    def log_ids(self) -> list[str]:
        return [log.identity.log_id for log in self.logs]

    def close(self, then: Callable[[], None]) -> None:
        """End it; `then` is called when everything that came is stored and nothing of it is open any more."""
        self._upstream.stop()

        def wait() -> None:
            if self._store.flush():
                self._store.when_stored(close)
            else:
                self._loop.call_later(0.01, wait)

        def close() -> None:
            # Not marked as a clean stop: that would be a sync on the loop, for a start that checks little anyway.
            self._store.close(CLOSE_SECONDS, mark=False)
            then()

        wait()

    # ---- its store's listener ----

    def on_opening(self, done: int, topics: int) -> None:
        pass

    def on_written(self, log: Log) -> None: ...
    def on_durable(self, log: Log, chunks: Sequence[DurableChunk]) -> None:
        self._upstream.on_durable(log)

    def on_failed(self, log: Log, outcome: Outcome, message: str) -> None:
        self._upstream.on_failed(log)

    def on_topic(self, name: str) -> None: ...
    def on_rewritten(self, log: Log) -> None: ...
    def retention_floor(self, log: Log) -> int | None:
        return None

    def on_full(self) -> bool:
        return False

    def retention_pin(self, log: Log) -> int | None:
        return 0  # what came stays until it is in its place
