"""The admin interface: JSON over HTTP for operators, scripts and the command line (docs/protocol.md lists it; the tree
and its registry are in broker/admin/fleet.py).

GET /healthz  /readyz  /metrics
GET /v1/node  /v1/topics  /v1/topics/NAME  /v1/groups  /v1/groups/NAME  /v1/clients  /v1/pipe
GET /v1/backup
POST /v1/topics   PATCH|DELETE /v1/topics/NAME   POST /v1/topics/NAME/snapshot   POST|DELETE /v1/topics/NAME/snapshot/ID
POST /v1/groups/NAME/offsets   POST /v1/groups/NAME/refresh   DELETE /v1/groups/NAME
POST /v1/topics/NAME/accept   POST /v1/pipe   POST /v1/pipe/range   POST /v1/pipe/digest
POST /v1/repair
POST|DELETE /v1/promote
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

import msgspec

from edgebroker.broker.admin.fleet import TreeAdmin
from edgebroker.broker.admin.offsets import GroupOperations, Move, MoveRequest, RefreshRequest
from edgebroker.broker.admin.responses import refusal, report
from edgebroker.broker.delivery.cursor import Cursor, Key
from edgebroker.broker.delivery.groups import Group
from edgebroker.broker.delivery.table_snapshots import TableSnapshot
from edgebroker.common.config import is_address
from edgebroker.common.errors import Code
from edgebroker.common.names import check_group_name, check_topic_name
from edgebroker.common.types import TopicSettings
from edgebroker.network.http.server import Reply, Request, Response
from edgebroker.storage.engine import Log
from edgebroker.storage.store import SegmentStore
from edgebroker.version import __version__

if TYPE_CHECKING:
    from edgebroker.broker.broker import Broker
    from edgebroker.broker.sessions.native import Session

T = TypeVar("T")
# Items of a list that are rendered in one turn of the loop.
SLICE = 50
MAX_PARTITIONS = 1024
MIN_SEGMENT_BYTES = 64 << 10


class NewTopic(TopicSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/topics: a name and settings."""

    name: str


class PromoteRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/promote: the level that the node gets."""

    level: str = "root"


class SnapshotRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/topics/NAME/snapshot: the client id of the producer that will write it."""

    client_id: str


class Admin:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._tree = TreeAdmin(broker.tree, broker.resyncs, broker.engine.node_uid)
        self._operations = GroupOperations(broker.engine, broker.groups, broker.leases, broker.refreshing)

    def handle(self, request: Request, reply: Reply) -> None:
        parts = [unquote(part) for part in request.path.split("?")[0].strip("/").split("/")]
        match request.method, parts:
            case (("GET" | "HEAD"), ["healthz"]):
                reply(Response(200, {"status": "ok"}))
            case (("GET" | "HEAD"), ["readyz"]):
                verdict = self._broker.health.verdict()
                reply(Response(503 if verdict["status"] == "not ready" else 200, verdict))
            case "GET", ["metrics"]:
                self._broker.exposition.answer(reply)
            case "GET", ["v1", "node"]:
                reply(Response(200, self._node()))
            case "GET", ["v1", "topics"]:
                self._list("topics", sorted(self._broker.engine.topics()), self._topic, reply)
            case "GET", ["v1", "topics", name]:
                reply(Response(200, self._topic(name)) if self._broker.engine.partitions(name) else _no_topic(name))
            case "POST", ["v1", "topics"]:
                self._create(request, reply)
            case "PATCH", ["v1", "topics", name]:
                self._alter(name, request, reply)
            case "DELETE", ["v1", "topics", name]:
                self._delete(name, report(reply))
            case "POST", ["v1", "topics", name, "snapshot"]:
                self._begin_snapshot(name, request, reply)
            case "POST", ["v1", "topics", name, "snapshot", snapshot]:
                self._broker.snapshots.complete(name, snapshot, report(reply))
            case "DELETE", ["v1", "topics", name, "snapshot", snapshot]:
                self._broker.snapshots.abort(name, snapshot, report(reply))
            case "POST", ["v1", "topics", name, "accept"]:
                self._accept(name, report(reply))
            case "GET", ["v1", "pipe"]:
                reply(Response(200, self._pipe()))
            case "POST", ["v1", "pipe"]:
                self._broker.downstream.answer(request, reply)
            case "POST", ["v1", "pipe", "range"]:
                self._broker.ranges.answer(request, reply)
            case "POST", ["v1", "pipe", "digest"]:
                self._broker.digests.answer(request, reply)
            case "POST", ["v1", "repair"]:
                self._repair(request, reply)
            case _, ["v1", ("tree" | "registry" | "resyncs"), *_]:
                self._tree.handle(request, parts[1:], reply)
            case "GET", ["v1", "backup"]:
                reply(self._backup())
            case "POST", ["v1", "promote"]:
                self._promote(request, reply)
            case "DELETE", ["v1", "promote"]:
                self._broker.demote(report(reply))
            case "GET", ["v1", "groups"]:
                self._list("groups", self._sorted_groups(), self._group, reply)
            case "GET", ["v1", "groups", name]:
                found = self._broker.groups.find(name)
                reply(Response(200, self._group(found)) if found is not None else _no_group(name))
            case (("POST" | "DELETE"), ["v1", "groups", name, *verb]):
                self._operate(name, [request.method, *verb], request, reply)
            case "GET", ["v1", "clients"]:
                self._list("clients", list(self._broker.sessions), self._client, reply)
            case _, ["healthz" | "readyz" | "metrics"] | ["v1", "node" | "topics" | "groups" | "clients" | "pipe", *_]:
                reply(Response(405, {"error": f"{request.method} is not allowed for {request.path}"}))
            case _:
                reply(Response(404, {"error": f"there is no {request.path}"}))

    def _list(self, name: str, items: Sequence[T], render: Callable[[T], object], reply: Reply) -> None:
        """Answer with a list, rendering a slice of it a turn: thousands of groups must not hold up the pushes."""
        found: list[object] = []

        def turn() -> None:
            found.extend(render(item) for item in items[len(found) : len(found) + SLICE])
            if len(found) < len(items):
                self._broker.loop.call_later(0.0, turn)
            else:
                reply(Response(200, {name: found}))

        turn()

    def _node(self) -> dict[str, object]:
        broker = self._broker
        return {
            "name": broker.config.node.name,
            "level": broker.level,
            "uid": broker.engine.node_uid,
            "version": __version__,
            "uptime_seconds": round(broker.clock.monotonic() - broker.started_at, 3),
            "connections": len(broker.sessions),
            "problems": broker.problems(),
            "loop": {
                "iterations": broker.loop.iterations,
                "slow_callbacks": broker.loop.slow_callbacks,
                "failed_callbacks": broker.loop.failed_callbacks,
            },
            "publish_waiting_bytes": broker.publishing.waiting_bytes,
            "counters": broker.metrics.snapshot(),
            "storage": broker.engine.describe(),
        }

    def _topic(self, name: str) -> dict[str, object]:
        logs = self._broker.engine.partitions(name)
        return {
            "name": name,
            "settings": msgspec.to_builtins(logs[0].settings),
            "snapshot_in_progress": self._broker.snapshots.describe(name),
            "partitions": [self._partition(log) for log in logs],
        }

    def _partition(self, log: Log) -> dict[str, object]:
        return {
            "partition": log.partition,
            "log_id": log.identity.log_id,
            "origin": log.identity.origin,
            "epoch": log.epoch,
            "log_start": log.log_start,
            "durable_end": log.durable_end,
            "written_end": log.written_end,
            "records_in": log.records_in,
            "snapshot": {"first": log.identity.snapshot[0], "last": log.identity.snapshot[1] - 1}
            if log.identity.snapshot[0] >= 0
            else None,
            **log.describe(),
        }

    def _sorted_groups(self) -> list[Group]:
        return sorted(self._broker.groups.all(), key=lambda group: group.name)

    def _group(self, group: Group) -> dict[str, object]:
        wanted = {
            (topic, log.partition)
            for entry in group.members.values()
            for topic in entry.topics
            for log in self._broker.engine.partitions(topic)
        }
        wanted.update(key for entry in group.members.values() for key in entry.pins)
        return {
            "name": group.name,
            "generation": group.generation,
            "members": [
                {"client_id": member.client_id, "partitions": len(member.cursors), "unresponsive": entry.unresponsive}
                for member, entry in group.members.items()
            ],
            "partitions": [
                self._group_partition(group, key)
                for key in sorted(group.committed_offsets.keys() | group.holders.keys() | wanted)
            ],
        }

    def _group_partition(self, group: Group, key: Key) -> dict[str, object]:
        log = self._broker.engine.log(*key)
        committed, cursor = group.committed_offsets.get(key), group.holders.get(key)
        offset = committed.next_offset if committed is not None else -1
        wanted_by = len(self._broker.membership.candidates(group, key))
        refresh = None
        if committed is not None and committed.reset_id:
            refresh = {
                "reset_id": committed.reset_id,
                "from": committed.reset_from,
                "target": committed.target if committed.refreshing else None,
                "state": "refreshing" if committed.refreshing else "ready",
            }
        return {
            "topic": key[0],
            "partition": key[1],
            "committed": offset,
            "log_id": committed.log_id if committed is not None else "",
            "durable_end": log.durable_end if log is not None else -1,
            "lag": log.durable_end - max(offset, 0) if log is not None else -1,
            "lag_seconds": self._lag_seconds(log, max(offset, 0)) if log is not None else -1,
            "attempts": committed.attempts if committed is not None else 0,
            "reason": group.reasons.get(key, ""),
            "refresh": refresh,
            "standbys": wanted_by - (1 if cursor is not None else 0),
            "member": self._cursor(cursor) if cursor is not None else None,
        }

    def _lag_seconds(self, log: Log, next_offset: int) -> float:
        return round(self._broker.lags.seconds(log, next_offset, self._broker.loop.now()), 1)

    def _cursor(self, cursor: Cursor) -> dict[str, object]:
        now = self._broker.loop.now()
        return {
            "client_id": cursor.member.client_id,
            "topic": cursor.log.topic,
            "partition": cursor.log.partition,
            "state": cursor.state,
            "why": cursor.why,
            "isolated": cursor.isolated,
            "revoking": cursor.revoking,
            "next_offset": cursor.next_offset,
            "acked": cursor.acked,
            "in_flight": cursor.in_flight,
            "in_flight_bytes": cursor.in_flight_bytes,
            "generation": cursor.generation,
            "lease": cursor.lease,
            "last_ack_seconds_ago": round(now - cursor.last_ack, 3) if cursor.last_ack else None,
        }

    def _client(self, session: Session) -> dict[str, object]:
        transport = session.transport
        return {
            "client_id": session.client_id,
            "address": transport.peer,
            "group": session.group.name if session.group is not None else "",
            "bytes_in": transport.bytes_in,
            "bytes_out": transport.bytes_out,
            "backlog_bytes": transport.backlog,
            "paused": transport.paused,
            "idle_seconds": round(self._broker.loop.now() - transport.last_received, 3),
            "partitions": [self._cursor(cursor) for cursor in session.cursors.values()],
        }

    def _create(self, request: Request, reply: Reply) -> None:
        try:
            new = msgspec.json.decode(request.body, type=NewTopic)
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return
        settings = msgspec.convert(
            {name: value for name, value in msgspec.structs.asdict(new).items() if name != "name"}, TopicSettings
        )
        problem = check_topic_name(new.name) or check_settings(settings)
        if problem:
            reply(Response(400, {"error": problem}))
            return

        def done(code: Code, message: str) -> None:
            if code is Code.OK:
                reply(Response(201, self._topic(new.name)))
            else:
                status = 409 if code is Code.NAME_CLASH else 503
                reply(Response(status, {"error": message, "code": code.name}))

        self._broker.engine.create_topic(new.name, settings, done)

    def _pipe(self) -> dict[str, object]:
        broker = self._broker
        parent = broker.upstream.describe() if broker.upstream is not None else None
        return {"parent": parent, "children": broker.downstream.describe()}

    def _backup(self) -> Response:
        engine = self._broker.engine
        if not isinstance(engine, SegmentStore):
            return Response(409, {"error": "a node in memory has no files to copy"})
        if any(log.rewriting for log in engine.logs()):
            return Response(503, {"error": "a log is being cut or healed; try again in a moment"})
        offsets: list[list[object]] = [
            [*key, msgspec.to_builtins(committed)] for key, committed in engine.group_offsets().items()
        ]
        return Response(
            200,
            {
                "data_dir": str(Path(self._broker.config.node.data_dir).absolute()),
                "uid": engine.node_uid,
                "logs": [log.inventory() for log in engine.logs()],
                "offsets": offsets,
            },
        )

    def _promote(self, request: Request, reply: Reply) -> None:
        try:
            level = msgspec.json.decode(request.body, type=PromoteRequest).level
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return
        self._broker.promote(level, report(reply))

    def _repair(self, request: Request, reply: Reply) -> None:
        from edgebroker.broker.mirror.repair import RepairRequest  # with its HTTP client

        try:
            wanted = msgspec.json.decode(request.body, type=RepairRequest)
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return
        if not is_address(wanted.source):
            reply(Response(400, {"error": f"from: HOST:PORT of a node's HTTP interface, not {wanted.source!r}"}))
            return

        def done(repaired: dict[str, int], error: str) -> None:
            reply(Response(409 if error else 200, {"repaired": repaired, "error": error}))

        self._broker.repairs.repair(wanted, done)

    def _accept(self, name: str, done: Callable[[Code, str], None]) -> None:
        """An operator accepts what cannot be undone: that records are lost, or that the parent has another log."""
        broker = self._broker
        logs = broker.engine.partitions(name)
        lost = [log for log in logs if log in broker.publishing.lost]
        if lost:
            self._operations.accept_loss(name, lost, broker.publishing.loss_accepted, done)
        elif logs and broker.upstream is not None:
            broker.upstream.accept(name, done)
        else:
            done(Code.UNKNOWN_TOPIC, f"there is nothing to accept about topic {name} on this node")

    def _delete(self, name: str, done: Callable[[Code, str], None]) -> None:
        """For everybody: children delete it as well."""
        engine = self._broker.engine
        others = {log.identity.origin for log in engine.partitions(name)} - {engine.node_uid}
        if others:
            done(Code.NOT_ORIGIN, f"{name} is written by node {', '.join(others)}; delete it there")
        elif not isinstance(engine, SegmentStore):
            done(Code.INVALID_BATCH, "a node in memory keeps its topics until it stops")
        else:

            def deleted(code: Code, message: str) -> None:
                if code is Code.OK and self._broker.upstream is not None:
                    self._broker.upstream.free(name)
                done(code, message)

            self._broker.topic_deletion.delete(name, deleted)

    def _begin_snapshot(self, name: str, request: Request, reply: Reply) -> None:
        if not self._broker.engine.partitions(name):
            reply(_no_topic(name))
            return
        try:
            client_id = msgspec.json.decode(request.body, type=SnapshotRequest).client_id
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return

        def done(code: Code, message: str, snapshot: TableSnapshot | None) -> None:
            if code is Code.OK and snapshot is not None:
                first = {str(log.partition): offset for log, offset in snapshot.begins.items()}
                reply(Response(201, {"id": snapshot.id.hex(), "first": first}))
            else:
                reply(refusal(code, message))

        self._broker.snapshots.begin(name, client_id, done)

    def _operate(self, name: str, verb: list[str], request: Request, reply: Reply) -> None:
        group = self._broker.groups.find(name)
        if verb not in (["DELETE"], ["POST", "offsets"], ["POST", "refresh"]):
            reply(Response(405, {"error": f"{request.method} is not allowed for {request.path}"}))
            return
        if group is None and verb != ["POST", "offsets"]:
            reply(_no_group(name))
            return
        if verb == ["DELETE"]:
            assert group is not None
            problem = self._operations.delete(group)
            if problem:
                reply(Response(409, {"error": problem}))
            else:
                self._broker.engine.when_stored(lambda: reply(Response(200, {})))
            return
        try:
            if verb[1] == "refresh":
                assert group is not None
                self._operations.refresh(
                    group, msgspec.json.decode(request.body, type=RefreshRequest), self._refreshed(group, reply)
                )
                return
            wanted = msgspec.json.decode(request.body, type=MoveRequest)
        except msgspec.DecodeError as error:
            reply(Response(400, {"error": str(error)}))
            return
        problem = check_group_name(name) if name else "a group has a name"
        if problem:
            reply(Response(400, {"error": problem}))
            return

        def moved(moves: list[Move], error: str) -> None:
            if error:
                reply(Response(409, {"error": error}))
                return
            lines = [
                {"topic": log.topic, "partition": log.partition, "from": before, "to": after}
                for log, before, after in moves
            ]
            reply(Response(200, {"group": name, "dry_run": wanted.dry_run, "partitions": lines}))

        # What is refused or only looked at makes no group.
        self._operations.move(group or Group(name, self._broker.loop.now()), wanted, moved)

    def _refreshed(self, group: Group, reply: Reply) -> Callable[[Code, str], None]:
        def done(code: Code, message: str) -> None:
            reply(Response(200, self._group(group)) if code is Code.OK else refusal(code, message))

        return done

    def _alter(self, name: str, request: Request, reply: Reply) -> None:
        logs = self._broker.engine.partitions(name)
        if not logs:
            reply(_no_topic(name))
            return
        if logs[0].identity.origin != self._broker.engine.node_uid:
            origin = logs[0].identity.origin
            reply(refusal(Code.NOT_ORIGIN, f"{name} is written by node {origin} only; change its settings there"))
            return
        try:
            changes = msgspec.json.decode(request.body, type=dict[str, object])
            settings = msgspec.convert({**msgspec.structs.asdict(logs[0].settings), **changes}, TopicSettings)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            reply(Response(400, {"error": str(error)}))
            return
        old = logs[0].settings
        problem = check_settings(settings)
        if (settings.partitions, settings.kind) != (old.partitions, old.kind):
            problem = "the number of partitions and the kind of a topic are fixed when it is created"
        if problem:
            reply(Response(400, {"error": problem}))
            return

        def done(code: Code, message: str) -> None:
            if code is Code.OK:
                for log in logs:
                    self._broker.delivery.settings_changed(log)
                reply(Response(200, self._topic(name)))
            else:
                reply(Response(503, {"error": message, "code": code.name}))

        self._broker.engine.alter_topic(name, settings, done)


def check_settings(settings: TopicSettings) -> str:
    """Why these settings make no sense; "" when they do."""
    if not 1 <= settings.partitions <= MAX_PARTITIONS:
        return f"partitions: 1 to {MAX_PARTITIONS}, not {settings.partitions}"
    if settings.segment_bytes and not MIN_SEGMENT_BYTES <= settings.segment_bytes <= 1 << 30:
        return f"segment_bytes: {MIN_SEGMENT_BYTES} to {1 << 30}, or 0 for the node's default"
    if settings.message_ttl_ms and settings.kind == "table":
        return "message_ttl_ms: a table keeps its records; only streams have a time to live"
    for name in ("retention_ms", "retention_bytes", "segment_ms", "message_ttl_ms"):
        if getattr(settings, name) < 0:
            return f"{name}: at least 0"
    return ""


def _no_group(name: str) -> Response:
    return Response(404, {"error": f"there is no group {name} on this node"})


def _no_topic(name: str) -> Response:
    return Response(404, {"error": f"there is no topic {name} on this node"})
