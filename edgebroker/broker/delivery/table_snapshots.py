"""Snapshots of a table: control batches around all its live keys, written where the table is published.

    begin()    nobody can publish to the topic, and a BEGIN batch is written into every partition
    (reading)  the client reads what is live
    declare()  the client says how much it will write and delete; from now on it can publish
    (records)  the client publishes every live key, and a record without a value for every key that goes
    complete() an END batch into every partition; once it is durable the identity says where the snapshot lies

A snapshot deletes by what it leaves out. So it must not be made from a log that has lost keys, must not delete more
than the topic allows unless its writer names the number, and counts only when as many records were published as
declared. While it is written no other client can publish to the topic (OVERLOADED, retryable): else a snapshot could
put an old value behind a newer one. For the same reason the client's name tells that it writes a snapshot
(SNAPSHOT_CLIENTS): what it publishes when that is over, or after a restart of the node, is FENCED. A snapshot without
END is none: its records are ordinary ones. Control batches are those of Kafka (attribute bit 5; one record whose key is
i16 version 0, i16 type) with the types 100 and 101, and the value is the snapshot's id (16 bytes) and the offset of its
BEGIN batch (i64).
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgebroker.broker.delivery.refresh import Refreshes, complete_from, no_snapshot
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.publish.publishing import Publishing
from edgebroker.common.batch import CONTROL_BIT
from edgebroker.common.names import SNAPSHOT_CLIENTS
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.records import BatchBuilder, restamp
from edgebroker.common.runtime.gather import gather
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.storage.engine import Engine, Log

log = logging.getLogger(__name__)

BEGIN, END = 100, 101
IDLE_SECONDS = 60.0
# Deletions that need no permission, however small the table is.
LEAST_DELETES = 10
# Whom a topic is reserved for until a snapshot was declared.
NOBODY = ""
_KEY = struct.Struct(">hh")
_VALUE = struct.Struct(">16sq")
Count = Annotated[int, Meta(ge=0, le=1 << 62)]


class SnapshotStatus(msgspec.Struct):
    """A table snapshot that is being written."""

    id: str
    client_id: str


class SnapshotPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of PUT /v1/topics/NAME/snapshot/ID: what the snapshot will consist of. `source`: made from the log
    itself, or the whole new content of the table. `keys` will be written, `deleted` ones deleted; so many deletions
    are allowed (-1: as many as the topic allows)."""

    source: Literal["log", "content"]
    keys: Count
    deleted: Count = 0
    allow_deletes: Annotated[int, Meta(ge=-1, le=1 << 62)] = -1


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
    planned: int = -1
    """How many records it will consist of; -1: not declared yet."""


class TableSnapshots:
    """Owned by the loop thread."""

    def __init__(
        self,
        engine: Engine,
        publishing: Publishing,
        refreshes: Refreshes,
        scheduler: Scheduler,
        metrics: Metrics,
        connected: Callable[[str], bool],
    ) -> None:
        self._engine, self._publishing, self._refreshes = engine, publishing, refreshes
        self._scheduler, self._metrics, self._connected = scheduler, metrics, connected
        self._snapshots: dict[str, TableSnapshot] = {}
        self._marking: dict[Log, list[TableSnapshot]] = {}

    def begin(self, topic: str, client_id: str, done: Callable[[Outcome, str, TableSnapshot | None], None]) -> None:
        """Reserve a table for a client and write BEGIN; done with the snapshot once that is durable."""
        logs = self._engine.partitions(topic)
        refusal = self._engine.refusal(spare=True)
        if not client_id.startswith(SNAPSHOT_CLIENTS):
            refusal = (
                Outcome.INVALID,
                f"the client id of a snapshot writer begins with {SNAPSHOT_CLIENTS}, not {client_id!r}",
            )
        elif logs[0].settings.kind != "table":
            refusal = (Outcome.CONFLICT, f"{topic} is a stream; only tables have snapshots")
        elif logs[0].identity.origin != self._engine.node_uid:
            refusal = (Outcome.NOT_ORIGIN, f"{topic} is written by node {logs[0].identity.origin} only; do it there")
        elif topic in self._snapshots:
            refusal = (Outcome.OVERLOADED, f"another snapshot of {topic} is being written; try again in a moment")
        if refusal is not None:
            done(*refusal, None)
            return
        snapshot = TableSnapshot(os.urandom(16), client_id, list(logs))
        self._snapshots[topic] = snapshot
        for partition in logs:
            self._publishing.reserve(partition, NOBODY)
            snapshot.begins[partition] = self._mark(partition, BEGIN, snapshot)
        self._wait(snapshot, lambda outcome, message: done(outcome, message, snapshot))

    def declare(self, topic: str, snapshot_id: str, plan: SnapshotPlan, done: Done) -> None:
        """Let the client publish. NO_SNAPSHOT: the log has lost keys; CONFLICT: it would delete too much."""
        snapshot = self._find(topic, snapshot_id, done)
        if snapshot is None:
            return
        lacking = [each for each in snapshot.logs if complete_from(each) is None]
        most = max(LEAST_DELETES, (plan.keys + plan.deleted) * snapshot.logs[0].settings.max_delete_percent // 100)
        if plan.source == "log" and lacking:
            done(Outcome.NO_SNAPSHOT, no_snapshot(lacking[0]))
        elif plan.deleted > max(most, plan.allow_deletes):
            done(
                Outcome.CONFLICT,
                f"the snapshot would delete {plan.deleted} of the keys of {topic}, more than {most} "
                f"(max_delete_percent); check its content; if it is right: --allow-deletes {plan.deleted}",
            )
        else:
            snapshot.planned = plan.keys + plan.deleted
            for partition in snapshot.logs:
                self._publishing.reserve(partition, snapshot.client_id)
            done(Outcome.OK, "")

    def complete(self, topic: str, snapshot_id: str, done: Done) -> None:
        """Write END; done once the snapshot counts. What the client published before is in it. CONFLICT: that is not
        what was declared; the snapshot is given up."""
        snapshot = self._find(topic, snapshot_id, done)
        if snapshot is None:
            return
        written = sum(each.staged_end - snapshot.begins[each] - 1 for each in snapshot.logs)
        refusal = self._engine.refusal(spare=True)
        if written != snapshot.planned:
            self._free(topic)
            planned = f"{snapshot.planned} were" if snapshot.planned >= 0 else "none was"
            refusal = (
                Outcome.CONFLICT,
                f"the snapshot of {topic} has {written} records, and {planned} declared; it is given up",
            )
        if refusal is not None:
            done(*refusal)
            return

        def ended(outcome: Outcome, message: str) -> None:
            if outcome is not Outcome.OK:
                done(outcome, message)
                return
            noted = gather(len(snapshot.logs), all_noted)
            for partition in snapshot.logs:
                first, end = snapshot.begins[partition], snapshot.ends[partition]
                self._engine.complete_snapshot(partition, first, end, noted)

        def all_noted(outcome: Outcome, message: str) -> None:
            if outcome is Outcome.OK:
                self._metrics.snapshots_completed += 1
                log.info("a snapshot of %s is complete", topic)
                for each in snapshot.logs:
                    self._refreshes.snapshot_completed(each)
            done(outcome, message)

        for partition in snapshot.logs:
            snapshot.ends[partition] = self._mark(partition, END, snapshot) + 1
        self._free(topic)
        self._wait(snapshot, ended)

    def abort(self, topic: str, snapshot_id: str, done: Done) -> None:
        """Give up: what was published stays, as ordinary records."""
        if self._find(topic, snapshot_id, done) is not None:
            self._free(topic)
            done(Outcome.OK, "")

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
                self._settled(snapshot, partition, Outcome.OK, "")

    def on_failed(self, partition: Log, outcome: Outcome, message: str) -> None:
        """What was staged in a log is not in it."""
        for snapshot in list(self._marking.get(partition, ())):
            self._settled(snapshot, partition, outcome, message)

    def still_written(self, topic: str) -> None:
        """The broker itself writes the snapshot of a topic, and is at it."""
        if topic in self._snapshots:
            self._snapshots[topic].active_at = self._scheduler.now()

    def describe(self, topic: str) -> SnapshotStatus | None:
        """Which client writes a snapshot of the topic now, for the admin interface."""
        snapshot = self._snapshots.get(topic)
        return SnapshotStatus(snapshot.id.hex(), snapshot.client_id) if snapshot is not None else None

    def _find(self, topic: str, snapshot_id: str, done: Done) -> TableSnapshot | None:
        snapshot = self._snapshots.get(topic)
        if snapshot is None or snapshot.id.hex() != snapshot_id:
            done(Outcome.FENCED, f"no snapshot {snapshot_id} of {topic} is being written; begin it again")
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

    def _settled(self, snapshot: TableSnapshot, partition: Log, outcome: Outcome, message: str) -> None:
        settled = list(snapshot.waiting) if outcome is not Outcome.OK else [partition]
        for each in settled:
            snapshot.waiting.discard(each)
            self._marking[each].remove(snapshot)
            if not self._marking[each]:
                del self._marking[each]
        if snapshot.waiting or snapshot.done is None:
            return
        if outcome is not Outcome.OK and self._snapshots.get(partition.topic) is snapshot:
            self._free(partition.topic)
        done, snapshot.done = snapshot.done, None
        done(outcome, message)

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
