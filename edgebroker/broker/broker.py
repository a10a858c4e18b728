"""The composition root: loop, engine, publishing, delivery, groups, listeners and admin, wired together.

start() recovers and listens; run() turns until stop() was called (a signal, the tests), then drains: no new
connections, publishes answered SHUTTING_DOWN, what is staged is synced, group offsets stored, the stop marked clean.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgebroker.broker.admin.admin import Admin
from edgebroker.broker.admin.exposition import Exposition
from edgebroker.broker.delivery.cursor import Cursor
from edgebroker.broker.delivery.dead_letters import DeadLetters
from edgebroker.broker.delivery.groups import Groups
from edgebroker.broker.delivery.leases import LeaseLimits, Leases
from edgebroker.broker.delivery.membership import Membership
from edgebroker.broker.delivery.push import Push
from edgebroker.broker.delivery.rebase import CursorRebase
from edgebroker.broker.delivery.refresh import Refreshes
from edgebroker.broker.delivery.table_snapshots import TableSnapshots
from edgebroker.broker.engines import make_engine, store_settings
from edgebroker.broker.feed.digests import Digests
from edgebroker.broker.feed.downstream import Downstream, NodeInfo
from edgebroker.broker.feed.ranges import Ranges
from edgebroker.broker.fleet.tree import Tree
from edgebroker.broker.mirror.fresh_copy import CopySettings
from edgebroker.broker.mirror.promotion import promote
from edgebroker.broker.mirror.resync import Resyncs
from edgebroker.broker.observe.health import Health, Supervisor
from edgebroker.broker.observe.lags import Lags
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.publish.publishing import Publishing, PublishLimits
from edgebroker.broker.sessions.native import Session
from edgebroker.broker.topic_deletion import TopicDeletion
from edgebroker.common.clock import Clock
from edgebroker.common.config import Config, is_loopback, split_list
from edgebroker.common.errors import Code, EdgeBrokerError
from edgebroker.common.types import TopicSettings
from edgebroker.network.http.server import HttpServer
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.transport import Listener, listen
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import ReceiveBuffer
from edgebroker.pipe.candidates import Candidates
from edgebroker.pipe.report import MAX_BATCH_BYTES
from edgebroker.pipe.stream import LogPosition
from edgebroker.storage.engine import Log
from edgebroker.storage.log.staging import Chunk
from edgebroker.storage.store import SegmentStore

if TYPE_CHECKING:
    from edgebroker.broker.mirror.repair import Repairs
    from edgebroker.broker.mirror.upstream import Upstream

log = logging.getLogger(__name__)

MAX_POLL_BYTES = 8 << 20
SWEEP_SECONDS = 1.0
STOP_SECONDS = 20.0
STALL_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """What a session grants its client."""

    heartbeat_ms: int
    idle_ms: int
    max_frame: int
    max_batch: int
    max_record: int
    window_batches: int
    window_bytes: int
    delivery_ms: int
    consume_records: int
    consume_bytes: int
    auto_create: bool
    new_topics: TopicSettings


class Broker:
    """One node. Built from its configuration; everything but stop_threadsafe() belongs to the thread that runs it."""

    def __init__(self, config: Config, clock: Clock, supervisor: Supervisor | None = None) -> None:
        self.config, self.clock, self._supervisor = config, clock, supervisor or Supervisor()
        limits, topics = config.limits, config.topics
        new_topics = TopicSettings(kind=topics.kind, partitions=topics.partitions)
        self.limits = SessionLimits(
            heartbeat_ms=limits.heartbeat_ms,
            idle_ms=limits.idle_timeout_ms,
            max_frame=limits.max_batch_bytes + 4096,
            max_batch=limits.max_batch_bytes,
            max_record=limits.max_record_bytes,
            window_batches=limits.publish_window_batches,
            window_bytes=limits.publish_window_bytes,
            delivery_ms=config.delivery.timeout_ms,
            consume_records=limits.consume_window_records,
            consume_bytes=limits.consume_window_bytes,
            auto_create=topics.auto_create,
            new_topics=new_topics,
        )
        self.loop = Loop(clock)
        self.receive_buffer = ReceiveBuffer()
        self.metrics = Metrics()
        self.engine = make_engine(config, self.loop, clock)
        self.groups = Groups(self.engine)
        self.publishing = Publishing(
            self.engine,
            self.loop,
            self.metrics,
            PublishLimits(
                limits.staged_high_bytes,
                limits.staged_high_bytes // 2,
                limits.max_record_bytes,
                limits.max_inflated_bytes,
                topics.auto_create,
                new_topics,
            ),
        )
        pace = config.delivery
        self.delivery = Push(self.engine, self.loop, self.metrics, pace.timeout_ms / 1000)
        self.refreshing = Refreshes(self.engine, self.groups, self.delivery, self.metrics)
        self.leases = Leases(
            self.engine,
            self.groups,
            self.delivery,
            self.refreshing,
            DeadLetters(self.engine, self.publishing, clock),
            self.loop,
            self.metrics,
            LeaseLimits(pace.timeout_ms / 1000, pace.backoff_ms / 1000, pace.max_backoff_ms / 1000, pace.max_attempts),
        )
        self.membership = Membership(self.engine, self.leases, self.metrics)
        self.snapshots = TableSnapshots(
            self.engine,
            self.publishing,
            self.refreshing,
            self.loop,
            self.metrics,
            lambda client_id: any(session.client_id == client_id for session in self.sessions),
        )
        self.readers = CursorRebase(
            self.engine, self.groups, self.leases, self.delivery, self.refreshing, self._holders
        )
        node = NodeInfo(self.engine.node_uid, config.node.name, self.level)
        self.downstream = Downstream(
            self.engine,
            self.loop,
            clock,
            self.metrics,
            node,
            lambda: self.upstream.path if self.upstream is not None else [],
            config.pipe.max_children,
        )
        self.downstream.on_history_lost(self._history_lost)
        self.topic_deletion = TopicDeletion(
            self.engine,
            self.groups,
            self.membership,
            self.leases,
            self.delivery,
            self.publishing,
            self.snapshots,
            self.downstream,
            self._holders,
            lambda: [session.group for session in self.sessions if session.group is not None],
        )
        self.tree = Tree(
            self.engine,
            self.loop,
            clock,
            self.metrics,
            self.groups,
            self.downstream,
            config,
            level=lambda: self.level,
            problems=self.problems,
            listening=lambda: self.http_address,
            upstream=lambda: self.upstream,
            resyncs=lambda: self.resyncs,
        )
        follows = config.pipe.parents or config.pipe.registry
        self.upstream = self._make_piping(node) if follows and not self.promoted else None
        if follows and self.promoted:
            log.warning(
                "promoted to %s: pipe.parents, pipe.registry and node.level are not followed (see edgebroker promote "
                "--undo)",
                self.level,
            )
        self.resyncs = self._make_resets() if isinstance(self.engine, SegmentStore) else None
        self.ranges = Ranges(self.engine)
        self.digests = Digests(self.engine)
        self.lags = Lags(self.engine)
        self.exposition = Exposition(self)
        self.health = Health(lambda: self.ready, self.problems, lambda: self.upstream, self._supervisor)
        self._repairs: Repairs | None = None
        self.sessions: dict[Session, None] = {}
        self.started_at = clock.monotonic()
        self.ready = False
        self.tcp_address = self.http_address = ("", 0)
        self._listeners: list[Listener] = []
        self._http: HttpServer | None = None
        self._stop_deadline = self._heartbeat_due = self._sweep_due = 0.0
        self._ended = False

    # ---- life ----

    def start(self) -> None:
        """Recover, then listen. Raises EdgeBrokerError when an address cannot be had."""
        self.engine.open(self)
        now = self.loop.now()
        for (group, topic, partition), offset in self.engine.group_offsets().items():
            self.groups.restore(group, topic, partition, offset, now)
        self.downstream.restore()
        self.loop.at_end_of_iteration(self.membership.divide_changed)
        self.loop.at_end_of_iteration(self.delivery.end_iteration)
        self.loop.at_end_of_iteration(self.downstream.end_iteration)
        self._listen()
        self.ready = True
        self._sweep()
        self.tree.start()
        if self.resyncs is not None:
            self.resyncs.start()
        if self.upstream is not None:
            self.upstream.start()
            self.repairs.start()

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
        for listener in self._listeners:
            listener.close()
        self.membership.divide_changed()  # who was told OK in this turn begins where it said
        self.publishing.draining = self.membership.frozen = True
        if self.resyncs is not None:
            self.resyncs.stop()
        if self.upstream is not None:
            self.upstream.stop()
        self.loop.call_later(0.0, self._drain)

    def reconfigure(self, config: Config) -> None:
        """Go on with this configuration, in which only what broker/reload.py names is different."""
        self.config = config
        if isinstance(self.engine, SegmentStore):
            self.engine.reconfigure(store_settings(config))
        if self.upstream is not None:
            self.upstream.limit(config.pipe.bytes_per_second, config.pipe.hours)
        if self.resyncs is not None:
            self.resyncs.settings = self._copy_settings()  # for those that begin from now on

    def stop_threadsafe(self) -> None:
        """stop() from a signal handler or another thread."""
        self.loop.call_soon_threadsafe(self.stop)

    def _drain(self) -> None:
        copied = self.resyncs is None or self.resyncs.idle
        idle = self.engine.flush() and not self.publishing.waiting_bytes and copied
        if not idle and self.loop.now() < self._stop_deadline:
            self.loop.call_later(0.005, self._drain)
            return
        for session in list(self.sessions):
            session.send(frames.write_answer(0, Code.SHUTTING_DOWN, "this node is stopping"))
            session.transport.close_when_drained("the node is stopping")
        self.loop.call_later(0.02, self.loop.stop)

    def _close(self) -> bool:
        for session in list(self.sessions):
            session.transport.close("the node is stopping")
        if self._http is not None:
            self._http.close()
            self.socket_path().unlink(missing_ok=True)
        self.publishing.stop()
        self.exposition.stop()
        self.downstream.store()
        kept = self.tree.stop()
        clean = self.engine.close(5.0) and kept
        self.loop.close()
        return clean

    # ---- connections ----

    def _listen(self) -> None:
        listen_config = self.config.listen
        for key, address in (("tcp", listen_config.tcp), ("http", listen_config.http)):
            if not is_loopback(address):
                log.warning(
                    "listen.%s = %s is reachable from other machines without TLS or authentication "
                    "(allow_insecure = true)",
                    key,
                    address,
                )
        tcp = self._bind("listen.tcp", listen_config.tcp)
        self.tcp_address = tcp.getsockname()[:2]
        self._listeners.append(Listener(self.loop, tcp, self._accept, self._rested))
        self._http = HttpServer(
            self.loop,
            Admin(self).handle,
            self._count_request,
            body_limits={"/v1/pipe": MAX_POLL_BYTES, "/v1/tree/reports": 2 * MAX_BATCH_BYTES},
        )
        http = self._bind("listen.http", listen_config.http)
        self.http_address = http.getsockname()[:2]
        self._listeners.append(Listener(self.loop, http, self._http.accept, self._rested))
        path = self.socket_path()
        self._listeners.append(Listener(self.loop, _listen_unix(path), self._http.accept, self._rested))

    def socket_path(self) -> Path:
        """The unix socket of the admin interface: data directory or, under systemd, the runtime directory."""
        return Path(self.config.listen.socket or Path(self.config.node.data_dir) / "ctl.sock")

    def _bind(self, key: str, address: str) -> socket.socket:
        host, _, port = address.rpartition(":")
        try:
            return listen(host.strip("[]"), int(port))
        except OSError as error:
            raise EdgeBrokerError(
                f"{key} = {address} cannot be used: {error.strerror}; choose another address"
            ) from error

    def _accept(self, sock: socket.socket, peer: str) -> None:
        if len(self.sessions) >= self.config.limits.max_connections:
            self.metrics.connections_refused += 1
            sock.close()
            self._listeners[0].rest()
            return
        self.metrics.connections_opened += 1
        self.sessions[Session(self, sock, peer)] = None

    def _rested(self) -> None:
        self.metrics.accept_rests += 1
        log.warning("no room for more connections (descriptors or limits.max_connections); accepting again shortly")

    def _count_request(self) -> None:
        self.metrics.http_requests += 1

    def session_closed(self, session: Session, reason: str) -> None:
        self.sessions.pop(session, None)
        self.metrics.connections_closed += 1
        log.debug("%s (%s): %s", session.transport.peer, session.client_id, reason)

    def _sweep(self) -> None:
        """Once a second or heartbeat: cut peers that are silent, stuck or never said CONNECT; send heartbeats."""
        now, limits = self.loop.now(), self.config.limits
        idle, heartbeat = limits.idle_timeout_ms / 1000, limits.heartbeat_ms / 1000
        interval = min(SWEEP_SECONDS, heartbeat)
        if self._sweep_due:
            self.metrics.loop_lag.observe(max(0.0, self.clock.monotonic() - self._sweep_due))
        self._sweep_due = self.clock.monotonic() + interval
        self.loop.call_later(interval, self._sweep)
        beat = now >= self._heartbeat_due
        if beat:
            self._heartbeat_due = now + heartbeat - interval
        for session in list(self.sessions):
            transport = session.transport
            silent = now - transport.last_received
            if not session.granted and now - session.opened_at > limits.connect_timeout_ms / 1000:
                transport.close("no CONNECT in time")
            elif transport.backlog and now - transport.last_progress > limits.stuck_timeout_ms / 1000:
                transport.close("the peer takes nothing")
            elif silent > idle and transport.reading and not any(c.deadline for c in session.cursors.values()):
                # Who has records in flight may be busy with them: the delivery timeout judges it.
                self.metrics.idle_timeouts += 1
                transport.close("idle for too long")
            elif session.granted and beat:
                ends = [(*key, cursor.log.durable_end) for key, cursor in session.cursors.items()]
                session.send(frames.write_heartbeat(ends[:1000]))

        for cursor in self.delivery.overdue(now):
            self.membership.timed_out(cursor)
        self.snapshots.sweep()
        self.lags.sample(now)
        self.health.look()

    # ---- the engine's listener ----

    def on_opening(self, done: int, topics: int) -> None:
        self._supervisor.starting(done, topics)

    def on_written(self, log: Log) -> None:
        self.publishing.on_written(log)

    def on_durable(self, log: Log, chunks: list[Chunk]) -> None:
        self.publishing.on_durable(log)
        self.delivery.on_durable(log, chunks)
        self.downstream.on_durable(log)
        self.snapshots.on_durable(log)
        if self.upstream is not None:
            self.upstream.on_durable(log)

    def on_failed(self, log: Log, code: Code, message: str) -> None:
        self.publishing.on_failed(log, code, message)
        self.snapshots.on_failed(log, code, message)
        if self.upstream is not None:
            self.upstream.on_failed(log)

    def on_topic(self, name: str) -> None:
        self.downstream.on_topic(name)
        for log in self.engine.partitions(name):
            self.delivery.settings_changed(log)

    def on_rewritten(self, log: Log) -> None:
        self.downstream.on_rewritten(log)

    def retention_pin(self, log: Log) -> int | None:
        return self.downstream.pinned(log, self.loop.now())

    def retention_floor(self, log: Log) -> int | None:
        now = self.loop.now()
        passed = [
            floor for floor in (self.groups.floor(log, now), self.downstream.floor(log, now)) if floor is not None
        ]
        return min(passed, default=None)

    def _holders(self, log: Log) -> list[Cursor]:
        """Who reads a log now."""
        key = (log.topic, log.partition)
        return [cursor for session in self.sessions if (cursor := session.cursors.get(key)) is not None]

    # ---- the tree ----

    def _make_piping(self, node: NodeInfo) -> Upstream:
        from edgebroker.broker.mirror.mirrors import ReaderHooks
        from edgebroker.broker.mirror.upstream import Upstream  # with its HTTP client, for nodes that have a parent

        pipe, engine = self.config.pipe, self.engine
        assert isinstance(engine, SegmentStore)
        candidates = Candidates(split_list(pipe.parents), random.uniform)
        moves = ReaderHooks(self.readers.cutting, self.readers.cut, self.readers.restarted, self.topic_deletion.delete)
        upstream = Upstream(
            engine,
            self.loop,
            self.metrics,
            node,
            candidates,
            split_list(pipe.topics),
            pipe.bytes_per_second,
            pipe.hours,
            moves,
            self.tree.directed,
        )
        self.tree.follow(engine, upstream)
        return upstream

    def _copy_settings(self) -> CopySettings:
        node, pipe = self.config.node, self.config.pipe
        return CopySettings(node.name, node.level, store_settings(self.config), pipe.bytes_per_second)

    def _make_resets(self) -> Resyncs:
        engine = self.engine
        assert isinstance(engine, SegmentStore)
        return Resyncs(
            engine,
            self.loop,
            self.clock,
            self.metrics,
            self.groups,
            self.refreshing,
            self._copy_settings(),
            lambda: self.upstream,
            self.readers.cut,
            self.readers.restarted,
        )

    @property
    def repairs(self) -> Repairs:
        """Made when it is first needed: it brings an HTTP client."""
        if self._repairs is None:
            from edgebroker.broker.mirror.repair import Repairs

            def parent() -> str:
                return self.upstream.address if self.upstream is not None and self.upstream.connected else ""

            self._repairs = Repairs(self.engine, self.loop, self.metrics, parent, self.publishing)
        return self._repairs

    @property
    def level(self) -> str:
        """The node's place in the tree: configured, or what it was promoted to."""
        return self.engine.level if isinstance(self.engine, SegmentStore) else self.config.node.level

    @property
    def promoted(self) -> bool:
        return isinstance(self.engine, SegmentStore) and self.engine.promoted

    def promote(self, level: str, done: Callable[[Code, str], None]) -> None:
        """Make this node the origin of everything that it mirrors; done once that is durable."""
        engine = self.engine
        if not isinstance(engine, SegmentStore):
            done(Code.INVALID_BATCH, "a node in memory mirrors nothing")
            return

        def end_pipe() -> None:
            upstream, self.upstream = self.upstream, None
            self.tree.let_go()
            if upstream is not None:
                upstream.stop()

        def promoted(code: Code, message: str) -> None:
            self.downstream.become(NodeInfo(engine.node_uid, self.config.node.name, self.level))
            done(code, message)

        promote(engine, self.loop, level, end_pipe, promoted)

    def demote(self, done: Callable[[Code, str], None]) -> None:
        """At the next start the configuration counts again."""
        if not isinstance(self.engine, SegmentStore) or not self.engine.promoted:
            done(Code.UNKNOWN_TOPIC, "this node was not promoted")
            return
        self.engine.change_level(self.config.node.level, False, done)

    def _history_lost(self, log: Log, position: LogPosition) -> None:
        """A child has more of a log of ours than we: nothing may be written over what we acknowledged."""
        self.publishing.history_lost(log, position.offset, position.chain)

    def problems(self) -> dict[str, str]:
        """What is wrong now, by name, for an operator."""
        found = self.engine.problems()
        if self.publishing.lost:
            found["history_lost"] = "; ".join(lost.why for lost in self.publishing.lost.values())
        if self.upstream is not None:
            found.update(self.upstream.problems())
        if self.resyncs is not None:
            found.update(self.resyncs.problems())
        return {**found, **self.tree.problems()}


def _listen_unix(path: Path) -> socket.socket:
    """The admin socket, for its owner only (0600); one left behind by a crash is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise EdgeBrokerError(f"the admin socket {path} cannot be made: {error}; set listen.socket") from error
    finally:
        os.umask(previous)
    sock.listen(64)
    return sock
