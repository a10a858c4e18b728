"""This node's part in looking after the tree: what it reports, what it hears, and, where it is kept, the registry.

below -> overseeing -> fleet -> reporting -> the node above
the node above (or the registrar here) -> directed -> this node's parents, or on towards the node it is for
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path

from edgebroker.broker.delivery.groups import Groups
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.broker.fleet.inbox import Inbox
from edgebroker.broker.fleet.registrar import Registrar
from edgebroker.broker.fleet.reports import NodeIdentity, NodeStatus, ParentLink, Reporter
from edgebroker.broker.fleet.view import FleetView
from edgebroker.broker.mirror.discovery import Parents
from edgebroker.broker.mirror.resync import Resyncs
from edgebroker.broker.mirror.upstream import Upstream
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.common.clock import Clock
from edgebroker.common.config import Config, parse_labels, split_list
from edgebroker.common.errors import Code
from edgebroker.network.http.call import HttpCall
from edgebroker.network.io.loop import Loop
from edgebroker.pipe.fleet import Fleet, FleetMember
from edgebroker.pipe.report import Directive, Report, ResyncDirective, digest_of_logs
from edgebroker.storage.engine import Done, Engine, MirrorEngine
from edgebroker.storage.metadata.registry import RegistryStore

log = logging.getLogger(__name__)

SETTLED_SECONDS = 180.0
EVERYWHERE = ("0.0.0.0", "[::]", "::", "")


class Tree:
    """Owned by the loop thread. `level` and `problems` are this node's as they are now, `listening` its HTTP address,
    `piping` what follows its parent (None without one), `resets` what loads topics afresh (None in memory)."""

    def __init__(
        self,
        engine: Engine,
        loop: Loop,
        clock: Clock,
        metrics: Metrics,
        groups: Groups,
        downstream: Downstream,
        config: Config,
        *,
        level: Callable[[], str],
        problems: Callable[[], dict[str, str]],
        listening: Callable[[], tuple[str, int]],
        upstream: Callable[[], Upstream | None],
        resyncs: Callable[[], Resyncs | None],
    ) -> None:
        self._config, self._level, self._problems, self._listening = config, level, problems, listening
        self._loop, self._upstream, self._resyncs, self._uid = loop, upstream, resyncs, engine.node_uid
        self._engine, self._started_at = engine, loop.now()
        self.fleet = Fleet(engine.node_uid)
        itself = NodeIdentity(
            engine.node_uid,
            config.node.name,
            config.node.region,
            parse_labels(config.node.labels),
            bool(config.pipe.registry),
        )
        self._reporter = Reporter(engine, groups, loop, clock, metrics, self.fleet, itself, self._moment, self._above)
        self.inbox = Inbox(loop, clock, metrics, self.fleet, downstream, self._heard)
        self.registrar: Registrar | None = None
        if config.registry.enabled:
            store = RegistryStore(Path(config.node.data_dir), loop, clock)
            self.registrar = Registrar(loop, clock, self.inbox, store, self.report)
        self.view = FleetView(
            loop, self.fleet, engine.node_uid, config.node.name, self._decided, self._logs_of, self._settled
        )
        self.parents: Parents | None = None

    def follow(self, engine: MirrorEngine, upstream: Upstream) -> None:
        """This node has a parent, or is told of one."""
        pipe = self._config.pipe
        self.parents = Parents(
            engine,
            self._loop,
            upstream.candidates,
            split_list(pipe.parents),
            split_list(pipe.registry),
            lambda: upstream.connected,
            upstream.again,
            self.report,
        )

    def start(self) -> None:
        self._reporter.start()
        self.inbox.start()
        if self.registrar is not None:
            self.registrar.start()
        if self.parents is not None:
            self.parents.start()

    def let_go(self) -> None:
        """The parent is not followed any more."""
        if self.parents is not None:
            self.parents.stop()
        self.parents = None

    def stop(self) -> bool:
        """True when all that is to be kept is durable."""
        self.let_go()
        self._reporter.stop()
        return self.registrar.stop() if self.registrar is not None else True

    def report(self) -> Report:
        """This node about itself."""
        return self._reporter.report()

    def directed(self, directives: list[Directive]) -> None:
        """Word from the top came down the pipe."""
        for order in directives:
            if order.uid != self._uid:
                self.inbox.direct(order)
            elif isinstance(order, ResyncDirective):
                self.reset(order, _note)
            elif self.parents is not None:
                self.parents.assigned(order)

    def reset(self, order: ResyncDirective, done: Done) -> None:
        """Load something afresh, here or at a node below: done once it is stored here, or on its way."""
        resyncs = self._resyncs()
        if order.uid != self._uid:
            told = self.inbox.direct(order)
            done(Code.OK if told else Code.BEHIND, "" if told else "that node is not connected; order it again later")
        elif resyncs is None:
            done(Code.INVALID_BATCH, "a node in memory loads nothing afresh")
        else:
            resyncs.order(order, done)

    def problems(self) -> dict[str, str]:
        found = {}
        if self.registrar is not None and self.registrar.failed:
            found["registry"] = f"registry.db cannot be written: {self.registrar.failed}"
        if self.fleet.refused:
            found["fleet_full"] = f"{self.fleet.refused} reports of nodes beyond the limit were not taken"
        return found

    def ask_above(self, path: str, body: bytes, told: Callable[[int, bytes, str], None]) -> bool:
        """Pass a question on to the parent; False when there is none."""
        upstream = self._upstream()
        if upstream is None or not upstream.connected:
            return False
        HttpCall(self._loop, upstream.address, "POST", path, body, told)
        return True

    def _heard(self, member: FleetMember) -> None:
        if self.registrar is not None:
            self.registrar.heard(member)

    def _decided(self, uid: str) -> dict[str, object]:
        if self.registrar is None:
            return {}
        topology = self.registrar.topology
        return {"pins": topology.pins.get(uid, []), "draining": uid in topology.draining}

    def _logs_of(self, topic: str) -> int:
        logs = self._engine.partitions(topic)
        return digest_of_logs([one.identity.log_id for one in logs]) if logs else 0

    def _settled(self) -> bool:
        """A registry remembers who there is; else every node has reported some minutes after the start, if ever."""
        return self.registrar is not None or self._loop.now() - self._started_at >= SETTLED_SECONDS

    def _above(self) -> ParentLink | None:
        upstream = self._upstream()
        if upstream is None or not upstream.connected:
            return None
        return ParentLink(upstream.path[0], upstream.address, upstream.connections)

    def _moment(self) -> NodeStatus:
        candidates = self.parents.digest if self.parents is not None else 0
        resyncs = self._resyncs()
        states = resyncs.reports() if resyncs is not None else []
        return NodeStatus(self._level(), self._address(), candidates, sorted(self._problems())[:16], states)

    def _address(self) -> str:
        """Where children reach this node; "" when it takes none."""
        if self._level() == "local" or not self._config.pipe.max_children:
            return ""
        if self._config.pipe.address:
            return self._config.pipe.address
        host, port = self._listening()
        if host in EVERYWHERE:
            host = socket.gethostname()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _note(code: Code, message: str) -> None:
    """What came of an order from above: the report tells the rest."""
    if code is not Code.OK:
        log.error("the reset that was ordered cannot be done: %s", message)
