"""The composition root: loop, engine, core, sessions, both sides of the pipe, the tree and the admin interface.

start() recovers and listens; run() turns the loop until stop() was called (a signal, the tests), then drains: no new
connections, publishes answered SHUTTING_DOWN, what is staged is synced, group offsets stored, the stop marked clean.
"""

from __future__ import annotations

import logging

from edgebroker.broker.access.access import Access
from edgebroker.broker.admin.context import AdminContext
from edgebroker.broker.admin.exposition import Exposition
from edgebroker.broker.admin.routes import pipe_routes, routes
from edgebroker.broker.core import build_core, lease_limits, problems_of, publish_limits
from edgebroker.broker.engine_events import EngineEvents
from edgebroker.broker.engines import make_engine, store_settings
from edgebroker.broker.feed.digests import Digests
from edgebroker.broker.feed.downstream import Downstream
from edgebroker.broker.feed.ranges import Ranges
from edgebroker.broker.fleet.tree import Tree
from edgebroker.broker.holders import Holders
from edgebroker.broker.listeners import Listeners, names_of
from edgebroker.broker.mirror.mirroring import Mirroring
from edgebroker.broker.observe.health import Health, Supervisor
from edgebroker.broker.observe.lags import Lags
from edgebroker.broker.ports import NodeInfo
from edgebroker.broker.reload import Changes, merge
from edgebroker.broker.sessions.limits import session_limits
from edgebroker.broker.sessions.sessions import Sessions
from edgebroker.broker.topic_deletion import TopicDeletion
from edgebroker.broker.trust.authority import Authority
from edgebroker.broker.trust.node_trust import NodeTrust
from edgebroker.common.config import Config
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import in_turns
from edgebroker.network.http.router import Router
from edgebroker.network.http.server import HttpServer
from edgebroker.network.io.loop import Loop
from edgebroker.pipe.report import Directive
from edgebroker.pipe.stream import LogPosition
from edgebroker.storage.engine import Log

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
STOP_SECONDS = 20.0


class Broker:
    """One node. Built from its configuration; everything but stop_threadsafe() belongs to the thread that runs it."""

    def __init__(self, config: Config, clock: Clock, supervisor: Supervisor | None = None) -> None:
        self.config, self.clock = config, clock
        supervisor = supervisor or Supervisor()
        self.loop = loop = Loop(clock)
        self.engine = engine = make_engine(config, loop, clock)
        self.core = core = build_core(engine, loop, clock, publish_limits(config), lease_limits(config))
        self.trust = NodeTrust(core, loop, clock, config, lambda: self.mirroring.known_addresses())
        self.access = Access(self.trust, core, loop, clock, config.node.region)
        self.sessions = sessions = Sessions(core, loop, session_limits(config), config.limits, self.access)
        self.downstream = self._make_downstream()
        self.topic_deletion = TopicDeletion(core, self.downstream, sessions)
        self.downstream.rules = self.trust.rules.sender_refusal
        peers, follow = self.trust.peers, self.topic_deletion.follow
        self.mirroring = Mirroring(core, peers, clock, config, self.downstream, follow, self._directed)
        self.holders = holders = Holders(core, self.downstream, config.storage, loop)
        topic, opening = self.trust.topic, supervisor.starting
        self.events = EngineEvents(core, loop, sessions, self.downstream, self.mirroring, holders, topic, opening)
        self.listeners = Listeners(loop, core.metrics, config, self.trust, self.access.bans)
        self.tree = Tree(core, peers, clock, config, self.downstream, self.mirroring, self.problems, self._listening)
        self.tree.inbox.may_report = self.trust.rules.may_report
        self.lags = Lags(engine, loop)
        self.digests = Digests(engine)
        self.health = Health(lambda: self.ready, self.problems, lambda: self.mirroring.missing_parent, supervisor)
        self._make_admin()
        self.ready = self._said_goodbye = False
        self._stop_deadline = self._sweep_due = 0.0

    def _make_downstream(self) -> Downstream:
        config, engine, core = self.config, self.engine, self.core
        level = engine.mirrors.level if engine.mirrors is not None else config.node.level
        node = NodeInfo(engine.node_uid, config.node.name, level)
        downstream = Downstream(
            engine,
            self.loop,
            self.clock,
            core.metrics,
            node,
            lambda: self.mirroring.path,
            config.pipe.max_children,
        )

        def history_lost(log: Log, position: LogPosition) -> None:
            core.publishing.claimed(log, position.offset, position.chain, position.beyond)

        downstream.on_history_lost(history_lost)
        downstream.awaited, downstream.confirmed = core.publishing.waits_for_children, core.publishing.confirm
        core.publishing.ask_children = downstream.ask
        return downstream

    def _make_admin(self) -> None:
        context = AdminContext(
            core=self.core,
            loop=self.loop,
            peers=self.trust.peers,
            clock=self.clock,
            node=self.config.node,
            sessions=self.sessions,
            downstream=self.downstream,
            ranges=Ranges(self.engine),
            digests=self.digests,
            mirroring=self.mirroring,
            tree=self.tree,
            health=self.health,
            lags=self.lags,
            topic_deletion=self.topic_deletion,
            holders=self.holders,
            trust=self.trust,
            access=self.access,
            authority=Authority(
                self.trust, self.core.metrics, self.loop, self.clock, self.tree.ask_above, self.access.audit.record
            ),
            problems=self.problems,
            started_at=self.clock.monotonic(),
        )
        self.exposition = Exposition(context)
        table, names = routes(context, self.exposition), names_of(self.config)
        admin = Router(table, self.access.refusal, names, self.access.done)
        self.tree.remote.handler = admin.handle
        self._http = self._make_server(admin)
        self._pipe = self._make_server(Router(pipe_routes(context), self.trust.rules.refusal, names))
        self.trust.on_identity += [self.listeners.on_identity, self.mirroring.on_identity]
        self.trust.on_erase = self.stop
        self.trust.lonely = lambda: bool(self.mirroring.missing_parent)
        self.trust.on_revoked += [self._pipe.shut_out, self.sessions.shut_out, self.mirroring.shut_out]

    def _make_server(self, router: Router) -> HttpServer:
        receiving = self.sessions.receiving
        return HttpServer(self.loop, receiving, router.handle, self._count_request, router.body_limit)

    # ---- life ----

    def start(self) -> None:
        """Recover, then listen. Raises EdgeBrokerError when an address cannot be had."""
        self.trust.open()
        self.access.open()
        self.engine.open(self.events)
        now = self.loop.now()
        for (group, topic, partition), offset in self.engine.group_offsets().items():
            self.core.groups.restore(group, topic, partition, offset, now)
        self.downstream.restore()
        self.core.publishing.compare_restored()
        self.loop.at_end_of_iteration(self.core.membership.rebalance)
        self.loop.at_end_of_iteration(self.core.push.end_iteration)
        self.loop.at_end_of_iteration(self.downstream.end_iteration)
        self.listeners.open(self.sessions, self._http, self._pipe)
        self.ready = True
        self._sweep()
        self.core.snapshot_writer.start(makes_room=self.config.storage.on_full != "refuse")
        self.tree.start()
        self.mirroring.start()
        self.trust.start()

    def run(self) -> bool:
        """Turn until stopped. True when the stop was clean."""
        self.loop.run()
        return self._close()

    def stop(self) -> None:
        """Begin to stop: drain, sync, end."""
        if self._stop_deadline:
            return
        log.info("stopping")
        self.ready = False
        self._stop_deadline = self.loop.now() + STOP_SECONDS
        self.listeners.close()
        core = self.core
        core.membership.freeze()
        core.publishing.draining = True
        self.tree.leave(self._left)
        self.mirroring.stop()
        self.loop.call_later(0.0, self._drain)

    def _left(self) -> None:
        self._said_goodbye = True

    def stop_threadsafe(self) -> None:
        """stop() from a signal handler or another thread."""
        self.loop.call_soon_threadsafe(self.stop)

    def reload(self, new: Config) -> Changes:
        """Take over what can change while the node runs (broker/reload.py); what that was, and what needs a restart."""
        self.config, changes = merge(self.config, new)
        self.engine.reconfigure(store_settings(self.config))
        self.sessions.config, self.holders.config = self.config.limits, self.config.storage
        self.mirroring.reconfigure(self.config)
        return changes

    def _drain(self) -> None:
        idle = self.engine.flush() and not self.core.publishing.waiting_bytes and self.mirroring.idle
        idle = idle and self._said_goodbye
        if not idle and self.loop.now() < self._stop_deadline:
            self.loop.call_later(0.005, self._drain)
            return
        self.sessions.say_farewell()
        self.loop.call_later(0.02, self.loop.stop)

    def _close(self) -> bool:
        self.sessions.close()
        self._http.close()
        self._pipe.close()
        self.core.publishing.stop()
        self.exposition.stop()
        self.downstream.store()
        kept = self.tree.stop()
        self.trust.stop()
        clean = self.engine.close(5.0) and kept
        self.loop.close()
        return clean

    def _sweep(self) -> None:
        """Once a second, or heartbeat: look after connections, deadlines, lags and problems."""
        core, interval = self.core, min(SWEEP_SECONDS, self.config.limits.heartbeat_ms / 1000)
        if self._sweep_due:
            core.metrics.loop_lag.observe(max(0.0, self.clock.monotonic() - self._sweep_due))
        self._sweep_due = self.clock.monotonic() + interval
        self.loop.call_later(interval, self._sweep)
        now = self.loop.now()
        in_turns(self.loop, self.sessions.sweep(interval), lambda: None)
        core.table_snapshots.sweep()
        self.lags.sample(now)
        self.health.check()

    # ---- wiring ----

    def problems(self) -> dict[str, str]:
        """What is wrong now, by name, for an operator."""
        found = problems_of(self.core, lambda: self.holders.sentences(self.loop.now()))
        return {**found, **self.mirroring.problems(), **self.tree.problems(), **self.trust.problems()}

    def _directed(self, directives: list[Directive]) -> None:
        self.tree.directed(directives)

    def _listening(self) -> tuple[str, int]:
        return self.listeners.pipe_address

    def _count_request(self) -> None:
        self.core.metrics.http_requests += 1
