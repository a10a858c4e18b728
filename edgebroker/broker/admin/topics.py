"""Topics over HTTP: listing, creating, altering, deleting them, and writing table snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from edgebroker.broker.admin.context import AdminContext
from edgebroker.broker.admin.listing import list_in_slices
from edgebroker.broker.admin.offsets import GroupOperations
from edgebroker.broker.delivery.table_snapshots import SnapshotStatus, TableSnapshot
from edgebroker.common.config import split_list
from edgebroker.common.names import check_topic_name
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.types import TopicSettings
from edgebroker.network.http.router import Call
from edgebroker.storage.engine import Log
from edgebroker.storage.types import DeletedTopic, OffsetRange

MAX_PARTITIONS = 1024
MAX_REPLICAS = 16
MAX_SETTING = (1 << 63) - 1
MIN_SEGMENT_BYTES = 64 << 10


class NewTopic(TopicSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/topics: a name and settings."""

    name: str


class SnapshotRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/topics/NAME/snapshot: the client id of the producer that will write it."""

    client_id: str


class SnapshotRange(msgspec.Struct):
    """Where the newest complete table snapshot lies: offsets first to last."""

    first: int
    last: int


class SnapshotBegun(msgspec.Struct):
    """The answer to POST /v1/topics/NAME/snapshot: its id, and the offset of its BEGIN batch in each partition."""

    id: str
    first: dict[str, int]


class PartitionStatus(msgspec.Struct, kw_only=True):
    """One log. `durable_end` is the high watermark; `records_in`: appended since the start; `checkpoint` -1: none."""

    partition: int
    log_id: str
    origin: str
    epoch: int
    log_start: int
    durable_end: int
    written_end: int
    records_in: int
    snapshot: SnapshotRange | None
    segments: int
    bytes: int
    producers: int
    staged_bytes: int
    checkpoint: int
    damaged: list[OffsetRange]
    gaps: list[OffsetRange]


class TopicStatus(msgspec.Struct, kw_only=True):
    """A topic with its settings and partitions. `snapshot_in_progress`: a table snapshot that is being written."""

    name: str
    settings: TopicSettings
    snapshot_in_progress: SnapshotStatus | None
    partitions: list[PartitionStatus]


Topics = list[TopicStatus]


class TopicList(msgspec.Struct):
    """All topics of the node, by name."""

    topics: list[TopicStatus]


class NewName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/topics/NAME/rename and /undelete: the name that the topic gets ("": its own)."""

    name: str = ""


class DeletedTopicList(msgspec.Struct):
    """`topics`: deleted, and their files are still there. `refused`: topics that are not taken from a parent because
    this node was told that they are deleted."""

    topics: list[DeletedTopic]
    refused: list[str]


class TopicAdmin:
    """Owned by the loop thread."""

    def __init__(self, context: AdminContext, operations: GroupOperations) -> None:
        self._context, self._core, self._engine = context, context.core, context.core.engine
        self._operations = operations

    # ---- showing ----

    def list(self, call: Call) -> None:
        self._show(sorted(self._engine.topics()), lambda found: call.answer(TopicList(found)))

    def describe(self, call: Call) -> None:
        self._tell(call, call.parameters["name"])

    def _changeable(self, name: str, call: Call) -> bool:
        """Is it there, and may users change it?"""
        return self._users(name, call) and self._exists(name, call)

    def _users(self, name: str, call: Call) -> bool:
        """Is it a topic of users, not one of the broker?"""
        if name.startswith("__"):
            call.refuse(Outcome.INVALID, check_topic_name(name))
        return not name.startswith("__")

    def _exists(self, name: str, call: Call) -> bool:
        if self._engine.partitions(name):
            return True
        call.refuse(Outcome.NOT_FOUND, f"there is no topic {name} on this node")
        return False

    def _tell(self, call: Call, name: str, status: int = 200) -> None:
        """Answer with a topic, as it is now."""
        if self._exists(name, call):
            self._show([name], lambda found: call.answer(found[0], status))

    def _show(self, names: Sequence[str], done: Callable[[Topics], None]) -> None:
        def rendered() -> Iterator[object]:
            for name in names:
                logs = self._engine.partitions(name)
                if logs:  # it may be gone meanwhile
                    yield TopicStatus(
                        name=name,
                        settings=logs[0].settings,
                        snapshot_in_progress=self._core.table_snapshots.describe(name),
                        partitions=[],
                    )
                yield from map(_partition, logs)

        list_in_slices(self._context.loop, rendered(), TopicStatus, done)

    # ---- changing ----

    def create(self, call: Call) -> None:
        new: NewTopic = call.body
        fields = {name: value for name, value in msgspec.structs.asdict(new).items() if name != "name"}
        settings = TopicSettings(**fields)
        problem = check_topic_name(new.name) or check_settings(settings)
        if problem:
            call.refuse(Outcome.INVALID, problem)
            return
        problem = self._core.publishing.no_room(new.name, settings.partitions)
        if problem:
            call.refuse(Outcome.OVERLOADED, problem)
            return

        def created(outcome: Outcome, message: str) -> None:
            if outcome is Outcome.OK:
                self._tell(call, new.name, 201)
            else:
                call.refuse(outcome, message)

        self._engine.create_topic(new.name, settings, created)

    def alter(self, call: Call) -> None:
        name = call.parameters["name"]
        if not self._changeable(name, call):
            return
        logs, changes = self._engine.partitions(name), call.body
        old, origin = logs[0].settings, logs[0].identity.origin
        if origin != self._engine.node_uid:
            call.refuse(Outcome.NOT_ORIGIN, f"{name} is written by node {origin} only; change its settings there")
            return
        try:
            settings = msgspec.convert({**msgspec.structs.asdict(old), **changes}, TopicSettings)
        except msgspec.ValidationError as error:
            call.refuse(Outcome.INVALID, f"the body is not as expected: {error}")
            return
        problem = check_settings(settings)
        if (settings.partitions, settings.kind) != (old.partitions, old.kind):
            problem = "the number of partitions and the kind of a topic are fixed when it is created"
        if problem:
            call.refuse(Outcome.INVALID, problem)
            return

        def altered(outcome: Outcome, message: str) -> None:
            if outcome is not Outcome.OK:
                call.refuse(outcome, message)
                return
            for log in logs:
                self._core.push.settings_changed(log)
            self._tell(call, name)

        self._engine.alter_topic(name, settings, altered)

    def delete(self, call: Call) -> None:
        """At its origin, here and at every node below; anywhere else the copy of this node."""
        name = call.parameters["name"]
        if self._users(name, call) and self._deletable(name, call):
            self._context.topic_deletion.delete(name, self._freed(name, call))

    def rename(self, call: Call) -> None:
        """A topic under another name is another topic with the same records."""
        name, new = call.parameters["name"], call.body.name
        if self._changeable(name, call) and self._deletable(name, call) and self._nameable(new, call):
            self._context.topic_deletion.rename(name, new, self._freed(name, call))

    def deleted(self, call: Call) -> None:
        """What can be taken back, and what is not taken from a parent any more."""
        found = self._context.topic_deletion.deleted_topics()
        gone = {one.topic for one in self._engine.tombstones.values()} - {one.topic for one in found}
        call.answer(DeletedTopicList(found, sorted(gone)))

    def undelete(self, call: Call) -> None:
        name = call.parameters["name"]
        new = call.body.name or name
        if self._nameable(new, call):
            self._context.topic_deletion.undelete(name, new, self._freed(name, call))

    def _deletable(self, name: str, call: Call) -> bool:
        others = {log.identity.origin for log in self._engine.partitions(name)} - {self._engine.node_uid}
        if not others or not self._context.mirroring.carries(name):
            return True
        call.refuse(
            Outcome.NOT_ORIGIN,
            f"{name} is written by node {', '.join(others)}: delete it there. Deleted here, it would be fetched again "
            f"from the parent; edgebroker resync --topic {name} does that without a pause for its readers",
        )
        return False

    def _nameable(self, name: str, call: Call) -> bool:
        problem = check_topic_name(name)
        if problem:
            call.refuse(Outcome.INVALID, problem)
        return not problem

    def _freed(self, name: str, call: Call) -> Done:
        def freed(outcome: Outcome, message: str) -> None:
            if outcome is Outcome.OK:
                self._context.mirroring.topic_deleted(name)
            call.done(outcome, message)

        return freed

    def accept(self, call: Call) -> None:
        """Accept what cannot be undone: that records are lost, or that the parent has another log."""
        name, publishing = call.parameters["name"], self._core.publishing
        logs = self._engine.partitions(name)
        lost = [log for log in logs if log in publishing.lost]
        if lost:
            self._operations.accept_loss(name, lost, publishing.loss_accepted, call.done)
        elif logs:
            self._context.mirroring.accept(name, call.done)
        else:
            call.refuse(Outcome.NOT_FOUND, f"there is nothing to accept about topic {name} on this node")

    # ---- table snapshots ----

    def begin_snapshot(self, call: Call) -> None:
        name = call.parameters["name"]
        if not self._changeable(name, call):
            return

        def begun(outcome: Outcome, message: str, snapshot: TableSnapshot | None) -> None:
            if outcome is Outcome.OK and snapshot is not None:
                first = {str(log.partition): offset for log, offset in snapshot.begins.items()}
                call.answer(SnapshotBegun(snapshot.id.hex(), first), 201)
            else:
                call.refuse(outcome, message)

        self._core.table_snapshots.begin(name, call.body.client_id, begun)

    def declare_snapshot(self, call: Call) -> None:
        self._core.table_snapshots.declare(call.parameters["name"], call.parameters["id"], call.body, call.done)

    def complete_snapshot(self, call: Call) -> None:
        self._core.table_snapshots.complete(call.parameters["name"], call.parameters["id"], call.done)

    def abort_snapshot(self, call: Call) -> None:
        self._core.table_snapshots.abort(call.parameters["name"], call.parameters["id"], call.done)


def _partition(log: Log) -> PartitionStatus:
    first, end = log.identity.snapshot
    status: dict[str, Any] = msgspec.structs.asdict(log.status())
    return PartitionStatus(
        partition=log.partition,
        log_id=log.identity.log_id,
        origin=log.identity.origin,
        epoch=log.epoch,
        log_start=log.log_start,
        durable_end=log.durable_end,
        written_end=log.written_end,
        records_in=log.records_in,
        snapshot=SnapshotRange(first, end - 1) if first >= 0 else None,
        **status,
    )


def check_settings(settings: TopicSettings) -> str:
    """Why these settings make no sense; "" when they do."""
    if not 1 <= settings.partitions <= MAX_PARTITIONS:
        return f"partitions: 1 to {MAX_PARTITIONS}, not {settings.partitions}"
    if settings.segment_bytes and not MIN_SEGMENT_BYTES <= settings.segment_bytes <= 1 << 30:
        return f"segment_bytes: {MIN_SEGMENT_BYTES} to {1 << 30}, or 0 for the node's default"
    if settings.message_ttl_ms and settings.kind == "table":
        return "message_ttl_ms: a table keeps its records; only streams have a time to live"
    if not 0 <= settings.max_delete_percent <= 100:
        return f"max_delete_percent: 0 to 100, not {settings.max_delete_percent}"
    if not 1 <= settings.replicas <= MAX_REPLICAS:
        return f"replicas: 1 to {MAX_REPLICAS}, not {settings.replicas}"
    nodes = split_list(settings.replica_nodes)
    if nodes and len(nodes) < settings.replicas:
        return f"replica_nodes: {settings.replicas} replicas need at least as many nodes, not {len(nodes)}"
    for name in ("retention_ms", "retention_bytes", "segment_ms", "message_ttl_ms", "hold_ms", "hold_bytes"):
        if not 0 <= getattr(settings, name) <= MAX_SETTING:
            return f"{name}: 0 to {MAX_SETTING}"
    return ""
