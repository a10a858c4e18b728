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
from edgebroker.broker.feed.children import Feeding
from edgebroker.broker.fleet.inbox import Overseeing
from edgebroker.broker.fleet.registrar import Registrar
from edgebroker.broker.fleet.reports import Above, Itself, Moment, Reporting
from edgebroker.broker.fleet.view import TreeView
from edgebroker.broker.mirror.discovery import Parents
from edgebroker.broker.mirror.resync import Resets
from edgebroker.broker.mirror.upstream import Piping
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.common.clock import Clock
from edgebroker.common.config import Config, parse_labels, split_list
from edgebroker.common.errors import Code
from edgebroker.network.http.call import Ask
from edgebroker.network.io.loop import Loop
from edgebroker.pipe.fleet import Fleet, Member
from edgebroker.pipe.report import Order, Report, ResetOrder, digest_of_logs
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
        feeding: Feeding,
        config: Config,
        *,
        level: Callable[[], str],
        problems: Callable[[], dict[str, str]],
        listening: Callable[[], tuple[str, int]],
        piping: Callable[[], Piping | None],
        resets: Callable[[], Resets | None],
    ) -> None:
        self._config, self._level, self._problems, self._listening = config, level, problems, listening
        self._loop, self._piping, self._resets, self._uid = loop, piping, resets, engine.node_uid
        self._engine, self._started_at = engine, loop.now()
        self.fleet = Fleet(engine.node_uid)
        itself = Itself(
            engine.node_uid,
            config.node.name,
            config.node.region,
            parse_labels(config.node.labels),
            bool(config.pipe.registry),
        )
        self._reporting = Reporting(engine, groups, loop, clock, metrics, self.fleet, itself, self._moment, self._above)
        self.overseeing = Overseeing(loop, clock, metrics, self.fleet, feeding, self._heard)
        self.registrar: Registrar | None = None
        if config.registry.enabled:
            store = RegistryStore(Path(config.node.data_dir), loop, clock)
            self.registrar = Registrar(loop, clock, self.overseeing, store, self.report)
        self.view = TreeView(
            loop, self.fleet, engine.node_uid, config.node.name, self._decided, self._logs_of, self._settled
        )
        self.parents: Parents | None = None

    def follow(self, engine: MirrorEngine, piping: Piping) -> None:
        """This node has a parent, or is told of one."""
        pipe = self._config.pipe
        self.parents = Parents(
            engine,
            self._loop,
            piping.candidates,
            split_list(pipe.parents),
            split_list(pipe.registry),
            lambda: piping.connected,
            piping.again,
            self.report,
        )

    def start(self) -> None:
        self._reporting.start()
        self.overseeing.start()
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
        self._reporting.stop()
        return self.registrar.stop() if self.registrar is not None else True

    def report(self) -> Report:
        """This node about itself."""
        return self._reporting.report()

    def directed(self, orders: list[Order]) -> None:
        """Word from the top came down the pipe."""
        for order in orders:
            if order.uid != self._uid:
                self.overseeing.direct(order)
            elif isinstance(order, ResetOrder):
                self.reset(order, _note)
            elif self.parents is not None:
                self.parents.assigned(order)

    def reset(self, order: ResetOrder, done: Done) -> None:
        """Load something afresh, here or at a node below: done once it is stored here, or on its way."""
        resets = self._resets()
        if order.uid != self._uid:
            told = self.overseeing.direct(order)
            done(Code.OK if told else Code.BEHIND, "" if told else "that node is not connected; order it again later")
        elif resets is None:
            done(Code.INVALID_BATCH, "a node in memory loads nothing afresh")
        else:
            resets.order(order, done)

    def problems(self) -> dict[str, str]:
        found = {}
        if self.registrar is not None and self.registrar.failed:
            found["registry"] = f"registry.db cannot be written: {self.registrar.failed}"
        if self.fleet.refused:
            found["fleet_full"] = f"{self.fleet.refused} reports of nodes beyond the limit were not taken"
        return found

    def ask_above(self, path: str, body: bytes, told: Callable[[int, bytes, str], None]) -> bool:
        """Pass a question on to the parent; False when there is none."""
        piping = self._piping()
        if piping is None or not piping.connected:
            return False
        Ask(self._loop, piping.address, "POST", path, body, told)
        return True

    def _heard(self, member: Member) -> None:
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

    def _above(self) -> Above | None:
        piping = self._piping()
        if piping is None or not piping.connected:
            return None
        return Above(piping.path[0], piping.address, piping.connections)

    def _moment(self) -> Moment:
        candidates = self.parents.digest if self.parents is not None else 0
        resets = self._resets()
        states = resets.reports() if resets is not None else []
        return Moment(self._level(), self._address(), candidates, sorted(self._problems())[:16], states)

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
