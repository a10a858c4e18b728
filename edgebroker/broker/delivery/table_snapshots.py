"""Snapshots of a table: control batches around all its live keys, written where the table is published.

    begin()    the topic is reserved for one client, and a BEGIN batch is written into every partition
    (records)  the client publishes every live key
    complete() an END batch into every partition; once it is durable the identity says where the snapshot lies

While it is written nobody else can publish to the topic (OVERLOADED, retryable): else a snapshot could put an old value
behind a newer one. For the same reason the client's name tells that it writes a snapshot (SNAPSHOT_CLIENTS): what it
publishes when that is over, or after a restart of the node, is FENCED. A snapshot without END is none: its records are
ordinary ones. Control batches are those of Kafka
(attribute bit 5; one record whose key is i16 version 0, i16 type) with the types 100 and 101, and the value is the
snapshot's id (16 bytes) and the offset of its BEGIN batch (i64).
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from edgebroker.broker.delivery.refresh import Refreshes
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.publish.publishing import Publishing
from edgebroker.common.batch import CONTROL_BIT
from edgebroker.common.errors import Code
from edgebroker.common.names import SNAPSHOT_CLIENTS
from edgebroker.common.records import BatchBuilder, restamp
from edgebroker.common.scheduler import Scheduler
from edgebroker.storage.engine import Engine, Log

log = logging.getLogger(__name__)

BEGIN, END = 100, 101
IDLE_SECONDS = 60.0
_KEY = struct.Struct(">hh")
_VALUE = struct.Struct(">16sq")

Done = Callable[[Code, str], None]


@dataclass(slots=True, eq=False)
class TableSnapshot:
    """One being written. `begins`: the offset of the BEGIN batch of each partition; `ends` behind the END batches."""

    id: bytes
    client_id: str
    logs: list[Log]
    begins: dict[Log, int] = field(default_factory=dict)
    ends: dict[Log, int] = field(default_factory=dict)
    waiting: set[Log] = field(default_factory=set)
    done: Done | None = None
    active_at: float = 0.0


class TableSnapshots:
    """Owned by the loop thread."""

    def __init__(
        self,
        engine: Engine,
        publishing: Publishing,
        refreshing: Refreshes,
        scheduler: Scheduler,
        metrics: Metrics,
        connected: Callable[[str], bool],
    ) -> None:
        self._engine, self._publishing, self._refreshes = engine, publishing, refreshing
        self._scheduler, self._metrics, self._connected = scheduler, metrics, connected
        self._snapshots: dict[str, TableSnapshot] = {}
        self._marking: dict[Log, list[TableSnapshot]] = {}

    def begin(self, topic: str, client_id: str, done: Callable[[Code, str, TableSnapshot | None], None]) -> None:
        """Reserve a table for a client and write BEGIN; done with the snapshot once that is durable."""
        logs = self._engine.partitions(topic)
        refusal = self._engine.refusal()
        if not client_id.startswith(SNAPSHOT_CLIENTS):
            refusal = (Code.INVALID_BATCH, f"the client id of who writes a snapshot begins with {SNAPSHOT_CLIENTS}")
        elif logs[0].settings.kind != "table":
            refusal = (Code.INVALID_BATCH, f"{topic} is a stream; only tables have snapshots")
        elif logs[0].identity.origin != self._engine.node_uid:
            refusal = (Code.NOT_ORIGIN, f"{topic} is written by node {logs[0].identity.origin} only; do it there")
        elif topic in self._snapshots:
            refusal = (Code.OVERLOADED, f"another snapshot of {topic} is being written; try again in a moment")
        if refusal is not None:
            done(*refusal, None)
            return
        snapshot = TableSnapshot(os.urandom(16), client_id, list(logs))
        self._snapshots[topic] = snapshot
        for partition in logs:
            self._publishing.reserve(partition, client_id)
            snapshot.begins[partition] = self._mark(partition, BEGIN, snapshot)
        self._wait(snapshot, lambda code, message: done(code, message, snapshot))

    def complete(self, topic: str, snapshot_id: str, done: Done) -> None:
        """Write END; done once the snapshot counts. What the client published before is in it."""
        snapshot = self._find(topic, snapshot_id, done)
        if snapshot is None:
            return
        refusal = self._engine.refusal()
        if refusal is not None:
            done(*refusal)
            return

        def ended(code: Code, message: str) -> None:
            if code is not Code.OK:
                done(code, message)
                return
            answers: list[tuple[Code, str]] = []

            def noted(code: Code, message: str) -> None:
                answers.append((code, message))
                if len(answers) < len(snapshot.logs):
                    return
                failed = next((answer for answer in answers if answer[0] is not Code.OK), None)
                if failed is not None:
                    done(*failed)
                else:
                    self._metrics.snapshots_completed += 1
                    log.info("a snapshot of %s is complete", topic)
                    for each in snapshot.logs:
                        self._refreshes.snapshot_completed(each)
                    done(Code.OK, "")

            for partition in snapshot.logs:
                self._engine.complete_snapshot(
                    partition,
                    snapshot.begins[partition],
                    snapshot.ends[partition],
                    noted,
                )

        for partition in snapshot.logs:
            snapshot.ends[partition] = self._mark(partition, END, snapshot) + 1
        self._free(topic)
        self._wait(snapshot, ended)

    def abort(self, topic: str, snapshot_id: str, done: Done) -> None:
        """Give up: what was published stays, as ordinary records."""
        if self._find(topic, snapshot_id, done) is not None:
            self._free(topic)
            done(Code.OK, "")

    def give_up(self, topic: str) -> None:
        """The topic is deleted."""
        if topic in self._snapshots:
            self._free(topic)

    def sweep(self) -> None:
        """Give up snapshots whose client is gone."""
        now = self._scheduler.now()
        for topic, snapshot in list(self._snapshots.items()):
            if not snapshot.active_at or self._connected(snapshot.client_id):
                snapshot.active_at = now
            elif now - snapshot.active_at > IDLE_SECONDS:
                log.warning("the snapshot of %s by %s was given up: its client is gone", topic, snapshot.client_id)
                self._free(topic)

    def on_durable(self, partition: Log) -> None:
        """A log grew."""
        for snapshot in list(self._marking.get(partition, ())):
            end = snapshot.ends.get(partition, snapshot.begins[partition] + 1)
            if partition.durable_end >= end:
                self._settled(snapshot, partition, Code.OK, "")

    def on_failed(self, partition: Log, code: Code, message: str) -> None:
        """What was staged in a log is not in it."""
        for snapshot in list(self._marking.get(partition, ())):
            self._settled(snapshot, partition, code, message)

    def describe(self, topic: str) -> dict[str, object] | None:
        """Who writes a snapshot of the topic now, for the admin interface."""
        snapshot = self._snapshots.get(topic)
        return {"id": snapshot.id.hex(), "client_id": snapshot.client_id} if snapshot is not None else None

    def _find(self, topic: str, snapshot_id: str, done: Done) -> TableSnapshot | None:
        snapshot = self._snapshots.get(topic)
        if snapshot is None or snapshot.id.hex() != snapshot_id:
            done(Code.FENCED, f"no snapshot {snapshot_id} of {topic} is being written; begin it again")
            return None
        return snapshot

    def _free(self, topic: str) -> None:
        for partition in self._snapshots.pop(topic).logs:
            self._publishing.free(partition)

    def _wait(self, snapshot: TableSnapshot, done: Done) -> None:
        """Until the control batches just appended are durable in every partition."""
        snapshot.waiting, snapshot.done = set(snapshot.logs), done
        for partition in snapshot.logs:
            self._marking.setdefault(partition, []).append(snapshot)

    def _settled(self, snapshot: TableSnapshot, partition: Log, code: Code, message: str) -> None:
        settled = list(snapshot.waiting) if code is not Code.OK else [partition]
        for each in settled:
            snapshot.waiting.discard(each)
            self._marking[each].remove(snapshot)
            if not self._marking[each]:
                del self._marking[each]
        if snapshot.waiting or snapshot.done is None:
            return
        if code is not Code.OK and self._snapshots.get(partition.topic) is snapshot:
            self._free(partition.topic)
        done, snapshot.done = snapshot.done, None
        done(code, message)

    def _mark(self, partition: Log, kind: int, snapshot: TableSnapshot) -> int:
        """Append a control batch; its offset."""
        offset = partition.staged_end
        builder = BatchBuilder()
        value = _VALUE.pack(snapshot.id, snapshot.begins.get(partition, offset))
        builder.append(value, _KEY.pack(0, kind), 0)
        data = restamp(builder.build(None, CONTROL_BIT), offset, partition.epoch)
        taken, reason = self._engine.append_numbered(partition, memoryview(data))
        assert taken == len(data), (partition.name, reason)
        return offset
