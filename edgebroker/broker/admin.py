"""The admin interface: JSON over HTTP for operators, scripts and the command line (docs/protocol.md lists it).

GET /healthz  /readyz  /v1/node  /v1/topics  /v1/topics/NAME  /v1/groups  /v1/groups/NAME  /v1/clients
POST /v1/topics   PATCH /v1/topics/NAME
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from edgebroker.broker.groups import Cursor, Group
from edgebroker.broker.naming import check_topic_name
from edgebroker.common.errors import Code
from edgebroker.common.types import TopicSettings
from edgebroker.network.http import Reply, Request, Response
from edgebroker.storage.engine import Log
from edgebroker.version import __version__

if TYPE_CHECKING:
    from edgebroker.broker.broker import Broker
    from edgebroker.broker.session import Session

MAX_PARTITIONS = 1024
MIN_SEGMENT_BYTES = 64 << 10


class NewTopic(TopicSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/topics: a name and settings."""

    name: str


class Admin:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def handle(self, request: Request, reply: Reply) -> None:
        parts = [unquote(part) for part in request.path.split("?")[0].strip("/").split("/")]
        match request.method, parts:
            case (("GET" | "HEAD"), ["healthz"]):
                reply(Response(200, {"status": "ok"}))
            case (("GET" | "HEAD"), ["readyz"]):
                reply(self._ready())
            case "GET", ["v1", "node"]:
                reply(Response(200, self._node()))
            case "GET", ["v1", "topics"]:
                reply(Response(200, {"topics": [self._topic(name) for name in sorted(self._broker.engine.topics())]}))
            case "GET", ["v1", "topics", name]:
                reply(Response(200, self._topic(name)) if self._broker.engine.partitions(name) else _no_topic(name))
            case "POST", ["v1", "topics"]:
                self._create(request, reply)
            case "PATCH", ["v1", "topics", name]:
                self._alter(name, request, reply)
            case "GET", ["v1", "groups"]:
                reply(Response(200, {"groups": [self._group(group) for group in self._sorted_groups()]}))
            case "GET", ["v1", "groups", name]:
                found = [group for group in self._sorted_groups() if group.name == name]
                reply(Response(200, self._group(found[0])) if found else Response(404, {"error": f"no group {name}"}))
            case "GET", ["v1", "clients"]:
                reply(Response(200, {"clients": [self._client(session) for session in self._broker.sessions]}))
            case _, ["healthz" | "readyz"] | ["v1", "node" | "topics" | "groups" | "clients", *_]:
                reply(Response(405, {"error": f"{request.method} is not allowed for {request.path}"}))
            case _:
                reply(Response(404, {"error": f"there is no {request.path}"}))

    def _ready(self) -> Response:
        broker = self._broker
        problems = broker.engine.problems()
        checks = {"started": "ok" if broker.ready else "stopping or starting", "storage": "ok"}
        blocking = {name: why for name, why in problems.items() if name in ("read_only", "disk_full", "disk_stalled")}
        if blocking:
            checks["storage"] = "; ".join(f"{name}: {why}" for name, why in blocking.items())
        ok = broker.ready and not blocking
        warnings = {name: why for name, why in problems.items() if name not in blocking}
        status = "ok" if ok and not warnings else "degraded" if ok else "not ready"
        return Response(200 if ok else 503, {"status": status, "checks": checks, "warnings": warnings})

    def _node(self) -> dict[str, object]:
        broker = self._broker
        return {
            "name": broker.config.node.name,
            "level": broker.config.node.level,
            "uid": broker.engine.node_uid,
            "version": __version__,
            "uptime_seconds": round(broker.clock.monotonic() - broker.started_at, 3),
            "connections": len(broker.sessions),
            "problems": broker.engine.problems(),
            "loop": {
                "turns": broker.loop.turns,
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
            **log.describe(),
        }

    def _sorted_groups(self) -> list[Group]:
        return sorted(self._broker.groups.all(), key=lambda group: group.name)

    def _group(self, group: Group) -> dict[str, object]:
        partitions = []
        for key in sorted(group.offsets.keys() | group.holders.keys()):
            log = self._broker.engine.log(*key)
            place, cursor = group.offsets.get(key), group.holders.get(key)
            committed = place.next_offset if place is not None else -1
            partitions.append(
                {
                    "topic": key[0],
                    "partition": key[1],
                    "committed": committed,
                    "log_id": place.log_id if place is not None else "",
                    "durable_end": log.durable_end if log is not None else -1,
                    "lag": log.durable_end - max(committed, 0) if log is not None else -1,
                    "standbys": len(group.standbys.get(key, ())),
                    "member": self._cursor(cursor) if cursor is not None else None,
                }
            )
        return {"name": group.name, "generation": group.generation, "partitions": partitions}

    def _cursor(self, cursor: Cursor) -> dict[str, object]:
        now = self._broker.loop.now()
        return {
            "client_id": cursor.member.client_id,
            "topic": cursor.log.topic,
            "partition": cursor.log.partition,
            "state": cursor.state,
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
            "group": session.group_name,
            "bytes_in": transport.bytes_in,
            "bytes_out": transport.bytes_out,
            "backlog_bytes": transport.backlog,
            "paused": transport.paused,
            "idle_seconds": round(self._broker.loop.now() - transport.last_received, 3),
            "partitions": [self._cursor(cursor) for cursor in (session.cursors or {}).values()],
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

    def _alter(self, name: str, request: Request, reply: Reply) -> None:
        logs = self._broker.engine.partitions(name)
        if not logs:
            reply(_no_topic(name))
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
    for name in ("retention_ms", "retention_bytes", "segment_ms"):
        if getattr(settings, name) < 0:
            return f"{name}: at least 0"
    return ""


def _no_topic(name: str) -> Response:
    return Response(404, {"error": f"there is no topic {name} on this node"})
