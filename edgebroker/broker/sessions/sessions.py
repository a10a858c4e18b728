"""All connections of the native protocol: accepting, cutting those that are silent or stuck, heartbeats, the end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator

from edgebroker.broker.access.access import Access
from edgebroker.broker.core import Core
from edgebroker.broker.sessions.limits import SessionLimits
from edgebroker.broker.sessions.native import Session
from edgebroker.common.config import LimitsConfig
from edgebroker.network.io.channel import Channel
from edgebroker.network.io.listener import host_of, is_local
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.receiving import Receiving
from edgebroker.network.wire.connection import RECEIVE_BYTES

MOST_AWAITED = 20

log = logging.getLogger(__name__)


class Sessions:
    """Owned by the loop thread. `config` holds the limits that may change while the node runs."""

    def __init__(self, core: Core, loop: Loop, limits: SessionLimits, config: LimitsConfig, access: Access) -> None:
        self.core, self.loop, self.limits, self.config, self.access = core, loop, limits, config, access
        self.receiving = Receiving(loop, config.receive_bytes)
        self.receive_buffer = self.receiving.buffer(RECEIVE_BYTES)
        self._sessions: dict[Session, None] = {}
        self._per_host: Counter[str] = Counter()
        self._heartbeat_due = 0.0
        self._closed_for_room = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions))

    def accept(self, channel: Channel, peer: str) -> bool:
        """Take a connection, unless there are as many as the limits allow. False: there is no place for anybody."""
        host = host_of(peer)
        full = len(self._sessions) >= self.config.max_connections
        if full or (self._per_host[host] >= self.config.per_address_connections and not is_local(peer)):
            name = "max_connections" if full else "per_address_connections"
            self.core.limits.reached(name, f"a connection from {host} was refused")
            self.core.metrics.connections_refused += 1
            channel.close()
            return not full
        self.core.metrics.connections_opened += 1
        self._sessions[Session(self, channel, peer)] = None
        self._per_host[host] += 1
        return True

    def wanted_from(self, peer: str, more: int) -> int:
        """How many partitions the consumers of this address would subscribe to; 0 for those of this machine."""
        if is_local(peer):
            return 0
        host = host_of(peer)
        there = (session for session in self._sessions if host_of(session.transport.peer) == host)
        return more + sum(map(self.core.membership.wanted_of, there))

    def closed(self, session: Session, reason: str) -> None:
        if session in self._sessions:
            del self._sessions[session]
            host = host_of(session.transport.peer)
            self._per_host[host] -= 1
            if not self._per_host[host]:
                del self._per_host[host]
        self.core.metrics.connections_closed += 1
        log.debug("%s (%s): %s", session.transport.peer, session.client_id, reason)

    def sweep(self, interval: float) -> Iterator[None]:
        """Every `interval` seconds, in steps: cut peers that are silent, stuck or never said CONNECT; send heartbeats;
        take back what was not acknowledged in time."""
        now, limits = self.loop.now(), self.config
        self.receiving.limit = limits.receive_bytes
        self.receiving.sweep()
        if self.receiving.closed > self._closed_for_room:
            more, self._closed_for_room = self.receiving.closed - self._closed_for_room, self.receiving.closed
            self.core.limits.reached(
                "receive_bytes", "connections were closed that did not complete what they began", more
            )
        beat = now >= self._heartbeat_due
        if beat:
            self._heartbeat_due = now + limits.heartbeat_ms / 1000 - interval
        for session in self:
            yield
            transport = session.transport
            if transport.closed:
                continue
            if not session.granted and now - session.opened_at > limits.connect_timeout_ms / 1000:
                transport.close("no CONNECT in time")
            elif transport.backlog and now - transport.last_progress > limits.stuck_timeout_ms / 1000:
                transport.close("send stalled: the peer is not reading")
            elif (
                now - transport.last_received > limits.idle_timeout_ms / 1000
                and transport.reading
                and not any(cursor.deadline for cursor in session.cursors.values())
            ):
                # A member with records in flight may be busy with them: the delivery timeout judges it.
                self.core.metrics.idle_timeouts += 1
                transport.close("idle for too long")
            else:
                session.check_rights()
                if session.granted and beat and not transport.closed:
                    session.heartbeat()
        for cursor in self.core.push.overdue(now):
            self.core.membership.timed_out(cursor)
            yield

    def awaited(self) -> dict[str, int]:
        """Topics that this node does not have, and how many clients wait for each; the ones that most wait for."""
        counts = Counter(name for session in self._sessions for name in session.waits_for)
        return dict(counts.most_common(MOST_AWAITED))

    def on_topic(self, name: str) -> None:
        """A topic is there: were producers told that it would have another number of partitions?"""
        if len(self.core.engine.partitions(name)) not in (0, self.limits.new_topics.partitions):
            self._ask_again(f"topic {name} was created", lambda session: session.expects_topics)

    def on_topic_deleted(self, name: str) -> None:
        """What producers know of a topic is wrong."""
        self._ask_again(f"topic {name} was deleted", lambda session: session.producer_id >= 0)

    def _ask_again(self, why: str, which: Callable[[Session], bool]) -> None:
        """Have producers connect again, and ask. What they have sent and this node has not read counts for nothing: it
        may be meant for partitions that do not exist."""
        for session in self:
            if which(session):
                session.transport.close(f"{why}: connect again")

    def shut_out(self, whose: Callable[[str], bool]) -> None:
        """Cut the connections of peers with these identities."""
        for session in self:
            if whose(session.transport.identity):
                session.transport.close("it is not let in any more")

    def say_farewell(self) -> None:
        """The node is stopping."""
        for session in self:
            session.farewell()

    def close(self) -> None:
        """Cut what is left."""
        for session in self:
            session.transport.close("the node is stopping")
