"""The node itself over HTTP: how it is, what it has done, its pipe, backups, repair and promotion."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec.structs import replace

from edgebroker.broker.admin.context import AdminContext
from edgebroker.broker.feed.child_stream import ChildStatus
from edgebroker.broker.holders import Holder
from edgebroker.broker.mirror.fencing import Fenced, FenceRequest
from edgebroker.broker.mirror.repair import RepairRequest
from edgebroker.broker.mirror.upstream import ParentStatus
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call
from edgebroker.storage.types import EngineStatus, GroupOffset, LogInventory
from edgebroker.version import __version__


class Alive(msgspec.Struct):
    """The answer of /healthz: the node answers."""

    status: str = "ok"


class LoopStatus(msgspec.Struct):
    """The event loop since the start."""

    iterations: int
    slow_callbacks: int
    failed_callbacks: int


class NodeReport(msgspec.Struct, kw_only=True):
    """The node in numbers. `problems` by name; `counters` since the start (docs/metrics.md). `awaited_topics`: topics
    that are not here, and how many clients wait for them."""

    name: str
    level: str
    uid: str
    version: str
    uptime_seconds: float
    connections: int
    problems: dict[str, str]
    loop: LoopStatus
    publish_waiting_bytes: int
    awaited_topics: dict[str, int]
    counters: dict[str, int | dict[str, int]]
    storage: EngineStatus


class PipeStatus(msgspec.Struct):
    """The parent (null: none), and the children that are connected."""

    parent: ParentStatus | None
    children: list[ChildStatus]


class HolderList(msgspec.Struct):
    """Who holds bytes of the logs, who holds most first."""

    holders: list[Holder]


class Backup(msgspec.Struct):
    """What a backup of this node consists of: the files of its logs, and the committed offsets of its groups."""

    data_dir: str
    uid: str
    logs: list[LogInventory]
    offsets: list[tuple[str, str, int, GroupOffset]]


class Repaired(msgspec.Struct):
    """Records that are whole again, by log; `error`: why not all of them."""

    repaired: dict[str, int]
    error: str


class PromoteRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/promote: the level that the node gets."""

    level: str = "root"


class NodeAdmin:
    """Owned by the loop thread."""

    def __init__(self, context: AdminContext) -> None:
        self._context, self._core = context, context.core

    # ---- showing ----

    def alive(self, call: Call) -> None:
        call.answer(Alive())

    def ready(self, call: Call) -> None:
        verdict = self._context.health.verdict()
        call.answer(verdict, 503 if verdict.status == "not ready" else 200)

    def node(self, call: Call) -> None:
        context, core, loop = self._context, self._core, self._context.loop
        call.answer(
            NodeReport(
                name=context.node.name,
                level=context.mirroring.level,
                uid=core.engine.node_uid,
                version=__version__,
                uptime_seconds=round(context.clock.monotonic() - context.started_at, 3),
                connections=len(context.sessions),
                problems=context.problems(),
                loop=LoopStatus(loop.iterations, loop.slow_callbacks, loop.failed_callbacks),
                publish_waiting_bytes=core.publishing.waiting_bytes,
                awaited_topics=context.sessions.awaited(),
                counters=core.metrics.snapshot(),
                storage=core.engine.status(),
            )
        )

    def pipe(self, call: Call) -> None:
        upstream = self._context.mirroring.upstream
        parent = upstream.describe() if upstream is not None else None
        call.answer(PipeStatus(parent, self._context.downstream.describe()))

    def holders(self, call: Call) -> None:
        self._context.holders.look(lambda found: call.answer(HolderList(found)))

    def forget_child(self, call: Call) -> None:
        name = call.parameters["name"]
        if self._context.downstream.forget(name):
            call.done(Outcome.OK, "")
        else:
            call.refuse(Outcome.NOT_FOUND, f"no child {name} is known here that is not connected")

    def backup(self, call: Call) -> None:
        engine = self._core.engine
        inventory = engine.inventory()
        if inventory is None:
            call.refuse(Outcome.UNSUPPORTED, "the memory engine has no files to copy; set storage.engine = segment")
        elif any(log.rewriting for log in engine.logs()):
            call.refuse(Outcome.OVERLOADED, "a log is being truncated or repaired; try again in a moment")
        else:
            offsets = [(*key, committed) for key, committed in engine.group_offsets().items()]
            data_dir = str(Path(self._context.node.data_dir).absolute())
            call.answer(Backup(data_dir, engine.node_uid, inventory, offsets))

    # ---- changing ----

    def promote(self, call: Call) -> None:
        self._context.mirroring.promote(call.body.level, call.done)

    def demote(self, call: Call) -> None:
        self._context.mirroring.demote(call.done)

    def fence(self, call: Call) -> None:
        """A node that was promoted says which logs it writes now."""
        fencing, wanted = self._context.mirroring.fencing, call.body
        assert isinstance(wanted, FenceRequest)
        call.answer(fencing.fence(wanted) if fencing is not None else Fenced(self._context.node.name, []))

    def repair(self, call: Call) -> None:
        wanted, repairs = call.body, self._context.mirroring.repairs
        assert isinstance(wanted, RepairRequest)
        if repairs is None:
            call.refuse(Outcome.UNSUPPORTED, "the memory engine cannot be damaged; there is nothing to repair")
            return
        source = self._context.tree.address_of(wanted.source)
        if not source:
            why = f"from: the name of a node of this tree, or its HOST:PORT, not {wanted.source!r}; see edgebroker tree"
            call.refuse(Outcome.INVALID, why)
            return
        repairs.repair(
            replace(wanted, source=source),
            lambda repaired, error: call.answer(Repaired(repaired, error), 409 if error else 200),
        )
