"""One connection of the native protocol: what its client may do, and the order in which its frames are handled.

Frames are handled one after the other, for half a millisecond; a client that sent more gets its next turn when others
had theirs, and when it takes its answers. While a frame has to wait (a compressed batch at the checker, a topic being
created, too much staged), the session is held. In both cases it keeps a copy of what it has read, and is not read any
further.

The core knows a session as a Publisher and a Member (broker/ports.py): this is where its facts become bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Protocol

from edgebroker.broker.access.access import Access, Caller
from edgebroker.broker.access.tenants import Share
from edgebroker.broker.core import Core
from edgebroker.broker.delivery.state import Cursor, Group
from edgebroker.broker.ports import Key
from edgebroker.broker.publish.producers import ProducerId
from edgebroker.broker.sending import file_range
from edgebroker.broker.sessions.deliveries import deliver_head
from edgebroker.broker.sessions.limits import SessionLimits, reached_limit
from edgebroker.common.batch import EXPLANATION, Reason
from edgebroker.common.errors import Code, RemoteProtocolError
from edgebroker.common.messages import GapReason, Holding, PublishRun
from edgebroker.common.names import TRUST_TOPIC, check_group_name, check_topic_name
from edgebroker.common.outcome import Outcome
from edgebroker.common.spans import SPAN
from edgebroker.common.types import AckLevel
from edgebroker.network.io.channel import Channel
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.receiving import Receiving
from edgebroker.network.io.transport import Transport
from edgebroker.network.wire import frames, framing
from edgebroker.network.wire.connection import Connection, Event, Frame, ReceiveBuffer, Refused, Role
from edgebroker.network.wire.frames import (
    Answer,
    Assigned,
    Assignment,
    FrameType,
    Gap,
    Intent,
    Ready,
    Reset,
    Subscribe,
    TopicMetadata,
)
from edgebroker.storage.types import FileSlice, GroupOffset

SHARE_SECONDS = 0.0005
# A frame has to be complete so soon after it began, and a second later for each MiB of it.
FRAME_SECONDS, MIB = 10.0, 1 << 20
# Topics that are remembered for the operator when a client waits for them.
MOST_WAITED = 3
# Who is not known may try again after this.
REFUSED_SECONDS = 1.0
# CONNECTs on a connection that are answered at once, and how many a second beyond that.
CONNECTS_AT_ONCE, CONNECTS_A_SECOND = 100, 20
_EXPLANATIONS = [EXPLANATION.get(reason, "").encode() for reason in Reason]


class SessionHost(Protocol):
    """Where a session lives."""

    core: Core
    limits: SessionLimits
    loop: Loop
    receiving: Receiving
    receive_buffer: ReceiveBuffer
    access: Access

    def closed(self, session: Session, reason: str) -> None:
        """The connection is over."""

    def wanted_from(self, peer: str, more: int) -> int:
        """How many partitions the consumers of this address would subscribe to; 0 for those of this machine."""


class Session:
    """Owner of a transport; a Publisher and a Member. Everything here runs on the loop thread."""

    __slots__ = (
        "_connected_at",
        "_connection",
        "_connects",
        "_copied",
        "_core",
        "_deferred",
        "_drain_first",
        "_handling",
        "_holds",
        "_host",
        "_in_turn",
        "_rights_seen",
        "caller",
        "client_id",
        "cursors",
        "expects_topics",
        "group",
        "opened_at",
        "producer_id",
        "share",
        "transport",
        "waits_for",
    )

    def __init__(self, host: SessionHost, channel: Channel, peer: str) -> None:
        self._host, self._core = host, host.core
        self._connection = Connection(Role.BROKER, host.limits.max_frame)
        self._deferred: deque[Event] | None = None
        self._holds = self._copied = 0
        # CONNECTs of late, and when the last one was.
        self._connects = self._connected_at = 0.0
        # A frame is being handled: what holds and releases meanwhile leaves the next ones to that loop.
        self._handling = self._in_turn = self._drain_first = False
        self.client_id = ""
        # Who it is, once it said CONNECT, and which of its rights were looked at.
        self.caller: Caller | None = None
        self._rights_seen = 0
        # Of a tenant, if the application is one's.
        self.share: Share | None = None
        self.group: Group | None = None
        self.opened_at = host.loop.now()
        self.cursors: dict[Key, Cursor] = {}
        # A producer was told how many partitions a topic would have that is not there.
        self.producer_id, self.expects_topics = -1, False
        # Topics that a consumer asked about and this node does not have.
        self.waits_for: list[str] = []
        self.transport = Transport(host.loop, channel, host.receive_buffer, self, peer)

    @property
    def granted(self) -> bool:
        return self._connection.granted

    # ---- the transport's owner ----

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        clock = self._host.loop.clock_now
        try:
            events = self._connection.receive(buffer, received)
            until = clock() + SHARE_SECONDS if len(events) > 1 else 0.0
            for rank, event in enumerate(events):
                if self._holds or (rank and clock() > until):
                    self._defer(events[rank:])
                    break
                self._handle(event)
                if self.transport.closed:
                    return
        except RemoteProtocolError:
            self._core.metrics.protocol_errors += 1
            raise
        if not self._holds:
            if self._deferred or self._connection.waiting:
                self._wait_for_turn()
            else:
                self.transport.resume()
        self._count_bytes(begun=bool(events))
        if self.share is not None and (seconds := self.share.tenant.received.take(received)):
            self.hold()
            self._host.loop.call_later(seconds, self.release)

    def on_drained(self) -> None:
        if self._drain_first:
            self._drain_first = False
            self._host.loop.call_in_turn(self._my_turn)
        self._core.push.pump_all(self)

    def on_closed(self, reason: str) -> None:
        if self.group is not None:
            self._core.membership.vanished(self, self.group)
        if self.client_id:
            self._core.producers.gone(self.client_id)
        self._deferred = None
        self._join_tenant(None)
        self._host.receiving.handled(self.transport)
        self._host.closed(self, reason)

    # ---- a publisher ----

    def answered(self, spans: bytes, answers: bytes) -> None:
        self.transport.send(framing.encode_answers(spans, answers, _EXPLANATIONS))

    def refused(self, spans: bytes, outcome: Outcome, why: str) -> None:
        self.rejected(spans, outcome.code, why)

    def rejected(self, spans: bytes, code: int, why: str) -> None:
        answers = [frames.write_answer(correlation, Code(code), why) for correlation, _, _ in SPAN.iter_unpack(spans)]
        self.transport.send(b"".join(answers))

    def hold(self) -> None:
        self._holds += 1
        self.transport.pause()

    def release(self) -> None:
        """Handle what was read, then read on."""
        self._holds -= 1
        if not self._holds and not self._in_turn and not self._handling:
            self._work()

    def _work(self) -> None:
        """Handle what waits, as much as is one's share; with nothing left, read on."""
        connection, transport, clock = self._connection, self.transport, self._host.loop.clock_now
        until = clock() + SHARE_SECONDS
        try:
            while not self._holds and not transport.closed:
                if self._deferred:
                    self._handle(self._deferred.popleft())
                elif connection.waiting:
                    self._deferred, self._copied = deque(connection.more()), 0
                    continue
                else:
                    self._deferred, self._copied = None, 0
                    transport.resume()
                    break
                if clock() > until or transport.held_up:
                    self._wait_for_turn()
                    break
        except RemoteProtocolError as error:
            self._core.metrics.protocol_errors += 1
            transport.close_when_drained(str(error))
        if not transport.closed:
            self._count_bytes(begun=True)

    def _count_bytes(self, *, begun: bool) -> None:
        """Say how many bytes wait here, and for whom; `begun`: an unfinished frame is a new one."""
        connection, receiving = self._connection, self._host.receiving
        size = connection.held + self._copied
        if not size:
            receiving.handled(self.transport)
        elif self._deferred or connection.waiting:
            receiving.waits(self.transport, size)
        else:
            seconds = FRAME_SECONDS + connection.unfinished / MIB
            receiving.unfinished(self.transport, size, seconds, begun=begun)

    def _wait_for_turn(self) -> None:
        """Go on when others had their turn, and the client has taken its answers."""
        self._in_turn = True
        self.transport.pause()
        self._drain_first = self.transport.held_up
        if not self._drain_first:
            self._host.loop.call_in_turn(self._my_turn)

    def _my_turn(self) -> None:
        self._in_turn = False
        if not self._holds:
            self._work()

    def _defer(self, events: list[Event]) -> None:
        """Keep events beyond the life of the receive buffer."""
        kept: deque[Event] = deque()
        copies: dict[int, memoryview] = {}
        for event in events:
            if isinstance(event, PublishRun):
                copy = copies.get(id(event.data))
                if copy is None:
                    copy = copies[id(event.data)] = memoryview(bytes(event.data))
                kept.append(event._replace(data=copy))
            elif isinstance(event, Frame):
                kept.append(event._replace(body=memoryview(bytes(event.body))))
            else:
                kept.append(event)
        self._deferred = kept
        self._copied = sum(map(len, copies.values())) + sum(len(one.body) for one in kept if isinstance(one, Frame))

    # ---- a member ----

    @property
    def writable(self) -> bool:
        transport = self.transport
        return not transport.backlog and not transport.closed and (self.share is None or self.share.may_send)

    def deliver(self, cursor: Cursor, first: int, next_offset: int, data: memoryview, age_ms: int) -> None:
        self.transport.send_pair(deliver_head(cursor, first, next_offset, len(data), age_ms), data)
        if self.share is not None:
            self.share.sent(len(data))

    def deliver_file(self, cursor: Cursor, first: int, next_offset: int, piece: FileSlice, age_ms: int) -> None:
        head = deliver_head(cursor, first, next_offset, piece.length, age_ms)
        file, transport = piece.file, self.transport
        file.hold()
        transport.send_file(head, file_range(self._core.engine, file, piece.position, piece.length, transport.supply))
        if self.share is not None:
            self.share.sent(piece.length)

    def gap(self, cursor: Cursor, first: int, next_offset: int, reason: GapReason) -> None:
        self.transport.send(deliver_head(cursor, first, next_offset, 0, 0, [Gap(first, next_offset - 1, reason)]))

    def assigned(self, cursor: Cursor, holding: Holding) -> None:
        line = Assignment(*cursor.key, holding, cursor.lease, cursor.next_offset)
        told = frames.write_assigned(Assigned(cursor.group.name, cursor.generation, [line]))
        if holding is not Holding.ASSIGNED:
            self.transport.send(told)
            return
        # Where there is nothing to read, that is known at once.
        self.transport.send_pair(told, memoryview(frames.write_heartbeat([(*cursor.key, cursor.log.durable_end)])))

    def state(self, cursor: Cursor, outcome: Outcome, why: str) -> None:
        self.transport.send(frames.write_answer(cursor.correlation, outcome.code, why, cursor.next_offset))

    def announce_refresh(self, cursor: Cursor, committed: GroupOffset) -> None:
        log_id = cursor.log.identity.log_id_bytes
        reset = Reset(bytes.fromhex(committed.reset_id), log_id, *cursor.key, committed.reset_from, committed.target)
        self.transport.send(frames.write_reset(cursor.correlation, reset))

    # ---- frames ----

    def _handle(self, event: Event) -> None:
        self._handling = True
        try:
            self._dispatch(event)
        finally:
            self._handling = False

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, PublishRun):
            if self._may_publish(event):
                self._core.publishing.submit(self, event)
        elif isinstance(event, Refused):
            self._core.metrics.frames_refused += 1
            limit = self._host.limits.max_frame
            self._answer(
                event.correlation, Code.TOO_LARGE, f"a frame of {event.size} bytes; this broker allows {limit}"
            )
        elif event.type == FrameType.ACK:
            self._on_ack(event)
        elif event.type == FrameType.HEARTBEAT:
            for topic, partition, offset in frames.read_heartbeat(event.body):
                cursor = self.cursors.get((topic, partition))
                if cursor is not None:
                    self._core.groups.apply(cursor, offset)
        elif event.type == FrameType.SUBSCRIBE:
            self._on_subscribe(event.correlation, frames.read_subscribe(event.body))
        elif event.type == FrameType.CONNECT:
            self._on_connect(event)
        elif event.type == FrameType.RESET:
            self._on_reset(event.correlation, frames.read_reset(event.body))
        else:
            self._on_ready(event.correlation, frames.read_ready(event.body))

    def _answer(self, correlation: int, code: Code, message: str = "", offset: int = -1) -> None:
        if code is not Code.OK:
            self._core.metrics.refused(code.name)
        self.transport.send(frames.write_answer(correlation, code, message, offset))

    def _on_connect(self, event: Frame) -> None:
        connect = frames.read_connect(event.body)
        if connect.version != frames.PROTOCOL_VERSION:
            self._answer(
                event.correlation,
                Code.UNSUPPORTED_VERSION,
                f"protocol version {connect.version}; this broker speaks {frames.PROTOCOL_VERSION}",
            )
            self.transport.close_when_drained("unsupported protocol version")
            return
        if not connect.client_id:
            raise RemoteProtocolError("CONNECT without a client id")
        access, transport = self._host.access, self.transport
        caller, why = access.caller(connect.token, transport.identity, transport.peer, connect.client_id)
        if self.caller not in (None, caller):
            caller, why = None, why or "this connection belongs to another principal or token; open one for each"
        if caller is None:
            self._answer(event.correlation, Code.UNAUTHORISED, why)
            self.hold()  # nothing more is heard
            self._host.loop.call_later(REFUSED_SECONDS, lambda: transport.close(why))
            return
        if crowded := self._join_tenant(caller):
            self._answer(event.correlation, Code.OVERLOADED, crowded)
            transport.close_when_drained(crowded)
            return
        self.caller, self._rights_seen = caller, caller.changes
        producers = self._core.producers
        if self.client_id:
            producers.gone(self.client_id)
        # Applications may have clients of the same name: each is another one.
        self.client_id = f"{caller.name}/{connect.client_id}" if caller.remote else connect.client_id
        producers.arrived(self.client_id)
        producer = ProducerId()
        if connect.flags & frames.WANT_PRODUCER:
            own = ProducerId(connect.producer_id, connect.producer_epoch)
            if producers.is_fenced(self.client_id, own):
                self._answer(
                    event.correlation,
                    Code.FENCED,
                    f"another producer named {connect.client_id} began after this one; give each its own client id",
                )
                return
            producer = producers.grant(self.client_id, own, new_epoch=bool(connect.flags & frames.NEW_EPOCH))
        self.producer_id = producer.id
        limits = self._host.limits
        metadata = {topic: self._metadata(topic) for topic in dict.fromkeys(connect.topics)}
        unknown = [name for name, found in metadata.items() if found.code is not Code.OK]
        self.waits_for = unknown[:MOST_WAITED] if not connect.flags & frames.WANT_PRODUCER else []
        self.expects_topics = bool(unknown) and limits.auto_create and producer.id >= 0
        topics = [metadata[topic] for topic in connect.topics]
        grants = limits.grants(bytes.fromhex(self._core.engine.node_uid), producer, topics)
        self._connection.granted = True
        self.transport.send(frames.write_grants(event.correlation, grants))
        self._rest_after_many()

    def _rest_after_many(self) -> None:
        """Who connects again and again waits between two of them: each may ask about a thousand topics."""
        now = self._host.loop.now()
        self._connects = max(0.0, self._connects - (now - self._connected_at) * CONNECTS_A_SECOND) + 1
        self._connected_at = now
        if self._connects > CONNECTS_AT_ONCE:
            self.hold()
            loop = self._host.loop
            loop.call_later(1 / CONNECTS_A_SECOND, lambda: loop.call_in_turn(self.release))

    def _metadata(self, topic: str) -> TopicMetadata:
        logs, limits = self._core.engine.partitions(topic), self._host.limits
        if logs:
            return TopicMetadata(topic, Code.OK, len(logs), logs[0].settings.kind)
        new = limits.new_topics
        return TopicMetadata(topic, Code.UNKNOWN_TOPIC, new.partitions if limits.auto_create else 0, new.kind)

    def _may_publish(self, run: PublishRun) -> bool:
        """Has the client the right to, and room? Else its batches are answered here."""
        assert self.caller is not None  # the protocol begins with CONNECT
        new = self._host.limits.new_topics.partitions if self._core.engine.log(run.topic, 0) is None else 0
        code, why = self._host.access.publish_refusal(self.caller, self.transport.peer, run.topic, len(run.data), new)
        if code is Code.OK:
            return True
        self._core.metrics.refused(code.name)
        if run.level != AckLevel.NONE:
            self.rejected(run.spans, code, why)
        return False

    def _join_tenant(self, caller: Caller | None) -> str:
        """Be a connection of the tenant of this caller, and of no other; why that is not possible, "" when it is."""
        tenant = self._host.access.tenants.of(caller.name) if caller is not None and caller.remote else None
        share = self.share
        if tenant is not (share.tenant if share is not None else None):
            if tenant is not None and (crowded := tenant.refusal("connections", 1)):
                return crowded
            if share is not None:
                share.leave()
            loop, push = self._host.loop, self._core.push
            self.share = Share(tenant, loop, lambda: push.pump_all(self)) if tenant is not None else None
        return ""

    # ---- consuming ----

    def _on_subscribe(self, correlation: int, subscribe: Subscribe) -> None:
        core, limits = self._core, self._host.limits
        problem = check_group_name(subscribe.group)
        if problem:
            self._answer(correlation, Code.INVALID_REQUEST, problem)
            return
        if self.group is not None and self.group.name != subscribe.group:
            self._answer(
                correlation,
                Code.STALE,
                f"this connection reads for group {self.group.name or '(none)'}; use another connection",
            )
            return
        if subscribe.intent is not Intent.JOIN:
            if self.group is not None and subscribe.intent is Intent.LEAVE:
                core.membership.leave(self, self.group, subscribe.wanted)
            elif self.group is not None:
                core.membership.release(self, self.group, subscribe.wanted)
            self._answer(correlation, Code.OK)
            return
        if not subscribe.wanted:
            raise RemoteProtocolError("SUBSCRIBE without topics")
        if core.membership.frozen:
            self._answer(correlation, Code.SHUTTING_DOWN, "this node is stopping; connect again in a moment")
            return
        new = bool(subscribe.group) and core.groups.find(subscribe.group) is None
        if missing := self._not_allowed([one.topic for one in subscribe.wanted], subscribe.group):
            self._answer(correlation, Code.UNAUTHORISED, missing)
            return
        if crowded := self._host.access.tenants.refusal(subscribe.group, "groups", int(new)):
            self._answer(correlation, Code.OVERLOADED, crowded)
            return
        for wanted in subscribe.wanted:
            if wanted.partition < -1 or core.engine.log(wanted.topic, max(wanted.partition, 0)) is None:
                known = core.engine.log(wanted.topic, 0) is not None
                what = f"topic {wanted.topic}" + (f" partition {wanted.partition}" if known else "")
                self._answer(correlation, Code.UNKNOWN_TOPIC, f"{what} does not exist on this node")
                return
            if wanted.topic == TRUST_TOPIC:
                self._answer(correlation, Code.UNKNOWN_TOPIC, check_topic_name(wanted.topic))
                return
        reached = reached_limit(core, limits, self, subscribe, partial(self._host.wanted_from, self.transport.peer))
        if reached is not None:
            name, what, why = reached
            core.limits.reached(name, what)
            self._answer(correlation, Code.OVERLOADED, why)
            return
        if self.group is None or subscribe.group:
            # Looked up again: when this connection has left its group, an operator may have deleted it.
            self.group = core.groups.group(subscribe.group, self._host.loop.now())
        records = max(1, min(subscribe.window_records or limits.consume_records, 1 << 20))
        size = max(1, min(subscribe.window_bytes or limits.consume_bytes, 64 << 20))
        self._answer(correlation, Code.OK)
        if self.transport.closed:
            return
        core.membership.subscribe(self, self.group, subscribe.wanted, correlation, (records, size))

    def _not_allowed(self, topics: Iterable[str], group: str) -> str:
        """Why these topics may not be read in this group; "" when they may."""
        assert self.caller is not None  # the protocol begins with CONNECT
        for topic in topics:
            if missing := self._host.access.missing(self.caller, self.transport.peer, "consume", topic, group):
                return missing
        return ""

    def check_rights(self) -> None:
        """Who is not known any more is cut, and who reads what it may not read any more."""
        caller, access = self.caller, self._host.access
        if caller is None or self.transport.closed:
            return
        if access.is_over(caller):
            self.transport.close("the token does not count any more")
        elif crowded := self._join_tenant(caller):
            self.transport.close(crowded)
        elif caller.changes != self._rights_seen:
            self._rights_seen = caller.changes
            wanted = self._core.membership.topics_of(self)
            if self.group is not None and (missing := self._not_allowed(wanted, self.group.name)):
                self.transport.close(missing)

    def _on_ack(self, event: Frame) -> None:
        ack = frames.read_ack(event.body)
        if isinstance(ack, Answer):
            raise RemoteProtocolError("unexpected answer: a client does not answer the broker")
        if self.group is None or not self._core.membership.acknowledge(self, self.group, ack):
            self._answer(
                event.correlation,
                Code.STALE,
                f"{ack.topic}/{ack.partition}: the acknowledgement of {ack.offset} belongs to an earlier lease or to "
                "records that are not in flight; it changed nothing",
            )
            return
        if event.correlation:
            correlation, offset = event.correlation, ack.offset
            self._core.engine.when_stored(lambda: self._answer(correlation, Code.OK, offset=offset))

    # ---- refreshing ----

    def _held(self, correlation: int, topic: str, partition: int) -> Cursor | None:
        cursor = self.cursors.get((topic, partition))
        if cursor is None:
            self._answer(correlation, Code.STALE, f"{topic}/{partition} is not held by this member")
        return cursor

    def _on_reset(self, correlation: int, reset: Reset) -> None:
        cursor = self._held(correlation, reset.topic, reset.partition)
        if cursor is None:
            return
        if reset.reset_id == frames.NO_RESET:
            self._core.refreshes.begin(
                cursor.group, cursor.log, lambda outcome, message: self._answer(correlation, outcome.code, message)
            )
        elif self._core.leases.accept(cursor, reset.reset_id, reset.from_offset):
            self._answer(correlation, Code.OK)
        else:
            self._answer(
                correlation,
                Code.FENCED,
                f"{cursor.log.name}: refresh {reset.reset_id.hex()} is not the one under way",
            )

    def _on_ready(self, correlation: int, ready: Ready) -> None:
        cursor = self._held(correlation, ready.topic, ready.partition)
        if cursor is None:
            return
        group = cursor.group

        def done(outcome: Outcome, message: str) -> None:
            if outcome is Outcome.OK:
                self._core.membership.refreshed(group)
                self.transport.send(frames.write_ready(correlation, ready))
            else:
                self._answer(correlation, outcome.code, message)

        self._core.refreshes.ready(group, cursor.log, ready.reset_id, ready.next_offset, done)

    # ---- what the host says to every client ----

    def heartbeat(self) -> None:
        """Keep the connection alive, with the durable ends of what the client reads."""
        cursors = islice(self.cursors.values(), frames.MOST_ENDS)
        self.transport.send(frames.write_heartbeat([(*cursor.key, cursor.log.durable_end) for cursor in cursors]))

    def farewell(self) -> None:
        """The node is stopping: say so, then close."""
        self.transport.send(frames.write_answer(0, Code.SHUTTING_DOWN, "this node is stopping"))
        self.transport.close_when_drained("the node is stopping")
