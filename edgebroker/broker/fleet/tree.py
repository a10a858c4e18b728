"""This node's part in the tree: what it reports upstream, what it receives from below, and, where it is kept, the
registry.

reports from below -> inbox -> fleet -> reporter -> the node above
directives from above (or from the registrar here) -> directed -> discovery and resyncs here, or on to the node below
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgebroker.broker.core import Core
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.broker.fleet.inbox import Inbox
from edgebroker.broker.fleet.pending_directives import PendingDirectives
from edgebroker.broker.fleet.remote_calls import RemoteCalls
from edgebroker.broker.fleet.reports import NodeIdentity, NodeStatus, ParentLink, Reporter
from edgebroker.broker.fleet.standby import Standby, Succession
from edgebroker.broker.fleet.view import Decisions, FleetView
from edgebroker.broker.mirror.discovery import Discovery
from edgebroker.broker.mirror.mirroring import Mirroring
from edgebroker.common.config import Config, is_address, parse_labels, split_list
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.network.http.call import HttpCall, OnResponse
from edgebroker.network.http.peers import Peers
from edgebroker.network.io.listener import host_of
from edgebroker.pipe.fleet import Fleet, FleetMember, find
from edgebroker.pipe.report import AdminCall, Directive, Report, ResyncDirective, StandbyDirective, digest_of_logs

if TYPE_CHECKING:
    from edgebroker.broker.fleet.registrar import Registrar

log = logging.getLogger(__name__)

SETTLED_SECONDS = 180.0
EVERYWHERE = ("0.0.0.0", "[::]", "::", "")


class Tree:
    """Owned by the loop thread. `problems` are this node's as they are now, `listening` is the address of
    its listen.pipe."""

    def __init__(
        self,
        core: Core,
        peers: Peers,
        clock: Clock,
        config: Config,
        downstream: Downstream,
        mirroring: Mirroring,
        problems: Callable[[], dict[str, str]],
        listening: Callable[[], tuple[str, int]],
    ) -> None:
        engine = core.engine
        self._config, self._problems, self._listening = config, problems, listening
        self._peers, self._mirroring, self._uid = peers, mirroring, engine.node_uid
        loop = self._loop = peers.loop
        self._engine, self._started_at = engine, loop.now()
        self.fleet = Fleet(engine.node_uid)
        identity = NodeIdentity(
            engine.node_uid,
            config.node.name,
            config.node.region,
            parse_labels(config.node.labels),
            bool(config.pipe.registry),
        )
        self._reporter = Reporter(core, peers, clock, self.fleet, identity, self._status, self._parent_link)
        self.inbox = Inbox(loop, clock, core.metrics, self.fleet, downstream, self._heard, self._reporter.look_soon)
        self.pending = PendingDirectives(Path(config.node.data_dir), loop, self.fleet, self.inbox.direct)
        self.remote = RemoteCalls(engine.node_uid, loop, self.fleet, self.inbox.direct, self.ask_above)
        self._clock, self._downstream = clock, downstream
        self.standby = Standby(Path(config.node.data_dir), peers, self._parent_place, self._reporter.look_soon)
        self.registrar: Registrar | None = None
        self._succession: Succession | None = None
        if config.registry.enabled:
            self.registrar = self._make_registrar()
        self.view = FleetView(
            loop,
            self.fleet,
            engine.node_uid,
            config.node.name,
            self._decided,
            self._logs_of,
            lambda topic: [one.durable_end for one in engine.partitions(topic)],
            lambda: downstream.evidence(loop.now()),
            self._settled,
        )
        self.discovery = self._discovery()
        mirroring.on_promoted(self.let_go, self._take_over)
        if mirroring.upstream is not None:
            # At once: the nodes below may ask for a parent as soon as this one passes their question on.
            mirroring.upstream.on_parent = self._reporter.look_soon

    def _make_registrar(self) -> Registrar:
        # One node of a tree keeps it: the others need not load it.
        from edgebroker.broker.fleet.registrar import Registrar
        from edgebroker.storage.metadata.registry import RegistryStore

        store = RegistryStore(Path(self._config.node.data_dir), self._loop, self._clock)
        standbys = split_list(self._config.registry.standbys)
        made = Registrar(self._loop, self._clock, self.inbox, store, self.report, self.pending, standbys)
        made.topology.strict = lambda: self._peers.secure is not None
        return made

    def _discovery(self) -> Discovery | None:
        """Where the parent is looked for; None for a node without one."""
        upstream, pipe = self._mirroring.upstream, self._config.pipe
        if upstream is None or self._mirroring.engine is None:
            return None
        return Discovery(
            self._mirroring.engine,
            self._peers,
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
        self.pending.start()
        self.standby.start()
        if self.registrar is not None:
            self.registrar.start()
        elif self._mirroring.engine is not None and self._mirroring.engine.promoted:
            self._take_over()
        if self.discovery is not None:
            self.discovery.start()

    def _take_over(self) -> None:
        """This node was promoted: what it has a copy of is kept here from now on. Blocks for a moment."""
        copy = self.standby.load()
        if self.registrar is not None or copy is None:
            return
        registrar = self.registrar = self._make_registrar()
        if registrar.begun_after(self.standby.path):
            registrar.start()  # it was taken over in an earlier run
        else:
            registrar.take_over(copy)
            log.warning("the registry of node %s is kept here from now on", copy.root)
        followers = {hub.uid: hub.address for hub in copy.hubs if hub.parent == copy.root and hub.uid != self._uid}
        self._succession = Succession(
            self._peers, self._address(), followers, lambda uid: self._downstream.child(uid) is not None
        )

    def let_go(self) -> None:
        """The parent is not followed any more."""
        if self.discovery is not None:
            self.discovery.stop()
        self.discovery = None

    def leave(self, done: Callable[[], None]) -> None:
        """Say goodbye to the parent: done when it was told, or cannot be."""
        self._reporter.leave(done)

    def stop(self) -> bool:
        """True when all that is to be kept is durable."""
        self.let_go()
        self._reporter.stop()
        self.pending.stop()
        self.standby.stop()
        if self._succession is not None:
            self._succession.stop()
        return self.registrar.stop() if self.registrar is not None else True

    def report(self) -> Report:
        """This node about itself."""
        return self._reporter.report()

    def directed(self, directives: list[Directive]) -> None:
        """Handle directives received from the parent."""
        for directive in directives:
            if directive.uid != self._uid:
                if isinstance(directive, AdminCall):
                    self.remote.pass_on(directive)
                else:
                    self.inbox.direct(directive)
            elif isinstance(directive, ResyncDirective):
                self._asked_for(directive)
            elif isinstance(directive, AdminCall):
                self.remote.run(directive)
            elif isinstance(directive, StandbyDirective):
                self.standby.wanted(directive)
            elif self.discovery is not None:
                self.discovery.assigned(directive)

    def resync(self, directive: ResyncDirective, seconds: float, done: Done) -> None:
        """Load something again, here or at a node below: done once it is stored. One for a node below is sent
        until its report names it, for so many seconds."""
        resyncs = self._mirroring.resyncs
        if directive.uid != self._uid:
            self.pending.give(directive, seconds, done)
        elif resyncs is None:
            done(Outcome.UNSUPPORTED, "the memory engine holds no replicas; there is nothing to resync")
        else:
            resyncs.order(directive, done)

    def _asked_for(self, directive: ResyncDirective) -> None:
        """A directive from above: what becomes of it, a refusal too, is told by the report."""

        def done(outcome: Outcome, message: str) -> None:
            if outcome not in (Outcome.OK, Outcome.READ_ONLY):  # what cannot be stored now is sent again
                log.error("the resync that was requested cannot be done: %s", message)
                if self._mirroring.resyncs is not None:
                    self._mirroring.resyncs.refused(directive, message)

        self.resync(directive, 0.0, done)

    def problems(self) -> dict[str, str]:
        found = {}
        if self.registrar is not None and self.registrar.failed:
            found["registry"] = f"registry.db cannot be written: {self.registrar.failed}"
        if self.fleet.refused:
            found["fleet_full"] = f"{self.fleet.refused} reports of nodes beyond the limit were not taken"
        return found

    def address_of(self, node: str) -> str:
        """Where a node of the tree is reached that an operator calls by its name, uid or address: one that reported it,
        a parent that this node may have, or a child that is connected from there. "" when it is none of these."""
        named = [member.address for member in find(self.fleet.members.values(), node)]
        if len(named) == 1 and is_address(named[0]):
            return named[0]
        upstream = self._mirroring.upstream
        above = upstream.candidates.addresses if upstream is not None else []
        known = {*above, *split_list(self._config.pipe.parents), *(one.address for one in self.fleet.members.values())}
        known.update(hub.address for hub in self.standby.describe().hubs)
        there = node in known or host_of(node) in self._downstream.peers()
        return node if there and is_address(node) else ""

    def ask_above(self, path: str, body: bytes, done: OnResponse) -> bool:
        """Pass a question on to the parent; False when there is none."""
        address = self._mirroring.parent_address
        if not address:
            return False
        HttpCall(self._peers, address, "POST", path, body, done)
        return True

    def _heard(self, member: FleetMember) -> None:
        if self.registrar is not None:
            self.registrar.heard(member)

    def _decided(self, uid: str) -> Decisions | None:
        if self.registrar is None:
            return None
        topology = self.registrar.topology
        return Decisions(topology.pins.get(uid, []), uid in topology.draining)

    def _logs_of(self, topic: str) -> int:
        logs = self._engine.partitions(topic)
        return digest_of_logs([one.identity.log_id for one in logs]) if logs else 0

    def _settled(self) -> bool:
        """A registry remembers who there is; else every node has reported some minutes after the start, if ever."""
        return self.registrar is not None or self._loop.now() - self._started_at >= SETTLED_SECONDS

    def _parent_link(self) -> ParentLink | None:
        upstream = self._mirroring.upstream
        if upstream is None or not upstream.connected:
            return None
        return ParentLink(upstream.path[0], upstream.address, upstream.connections)

    def _parent_place(self) -> tuple[str, str]:
        above = self._parent_link()
        return (above.uid, above.address) if above is not None else ("", "")

    def _status(self) -> NodeStatus:
        candidates = self.discovery.digest if self.discovery is not None else 0
        resyncs = self._mirroring.resyncs
        states = resyncs.reports() if resyncs is not None else []
        problems = sorted(self._problems())[:16]
        return NodeStatus(self._mirroring.level, self._address(), candidates, self.standby.digest, problems, states)

    def _address(self) -> str:
        """Where children reach this node; "" when it takes none."""
        if self._mirroring.level == "local" or not (self._config.pipe.max_children and self._config.listen.pipe):
            return ""
        if self._config.pipe.address:
            return self._config.pipe.address
        host, port = self._listening()
        if host in EVERYWHERE:
            host = os.uname().nodename
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
