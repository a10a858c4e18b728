"""One client connection: what it may do, and the order in which its frames are handled.

Frames are handled one after the other. While one has to wait (a compressed batch at the checker, a topic being made,
too much staged), the session is held: it keeps a copy of what it has read and is not read any further.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from typing import TYPE_CHECKING

from edgebroker.broker.delivery.cursor import Cursor, Key
from edgebroker.broker.delivery.groups import Group
from edgebroker.common.errors import Code, RemoteProtocolError
from edgebroker.common.names import check_group_name
from edgebroker.network.io.transport import Transport, tune
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Connection, Event, Frame, PublishRun, ReceiveBuffer, Refused, Role
from edgebroker.network.wire.frames import Answer, FrameType, Grants, Intent, Ready, Reset, Subscribe, TopicMetadata

if TYPE_CHECKING:
    from edgebroker.broker.broker import Broker

MAX_EPOCH = 32767


class Session:
    """Owner of a transport. Everything here runs on the loop thread."""

    __slots__ = (
        "_broker",
        "_connection",
        "_deferred",
        "_holds",
        "client_id",
        "cursors",
        "group",
        "opened_at",
        "transport",
    )

    def __init__(self, broker: Broker, sock: socket.socket, peer: str) -> None:
        self._broker = broker
        self._connection = Connection(Role.BROKER, broker.limits.max_frame)
        self._deferred: deque[Event] | None = None
        self._holds = 0
        self.client_id = ""
        self.group: Group | None = None
        self.opened_at = broker.loop.now()
        self.cursors: dict[Key, Cursor] = {}
        tune(sock)
        self.transport = Transport(broker.loop, sock, broker.receive_buffer, self, peer)

    @property
    def granted(self) -> bool:
        return self._connection.granted

    # ---- the transport's owner ----

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        try:
            events = self._connection.receive(buffer, received)
        except RemoteProtocolError:
            self._broker.metrics.protocol_errors += 1
            raise
        for rank, event in enumerate(events):
            if self._holds:
                self._defer(events[rank:])
                return
            self._handle(event)
            if self.transport.closed:
                return

    def on_drained(self) -> None:
        for cursor in list(self.cursors.values()):
            self._broker.delivery.pump(cursor)

    def on_closed(self, reason: str) -> None:
        if self.group is not None:
            self._broker.membership.vanished(self, self.group)
        self._deferred = None
        self._broker.session_closed(self, reason)

    # ---- what others ask of a session ----

    def send(self, data: bytes) -> None:
        self.transport.send(data)

    def hold(self) -> None:
        self._holds += 1
        self.transport.pause()

    def release(self) -> None:
        """Go on with what was read, then with reading."""
        self._holds -= 1
        deferred = self._deferred
        while deferred and not self._holds and not self.transport.closed:
            try:
                self._handle(deferred.popleft())
            except RemoteProtocolError as error:
                self.transport.close_when_drained(str(error))
                return
        if not self._holds and not self.transport.closed:
            self._deferred = None
            self.transport.resume()

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

    # ---- frames ----

    def _handle(self, event: Event) -> None:
        if isinstance(event, PublishRun):
            rest = self._broker.publishing.submit(self, event)
            if rest is not None:
                self.hold()
                if self._broker.engine.log(rest.topic, rest.partition) is None:
                    self._broker.publishing.create(self, rest, self.release)
                else:
                    self._broker.publishing.inflate(self, rest, self.release)
        elif isinstance(event, Refused):
            self._broker.metrics.frames_refused += 1
            limit = self._broker.limits.max_frame
            self._answer(
                event.correlation, Code.TOO_LARGE, f"a frame of {event.size} bytes; this broker allows {limit}"
            )
        elif event.type == FrameType.ACK:
            self._on_ack(event)
        elif event.type == FrameType.HEARTBEAT:
            frames.read_heartbeat(event.body)
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
            self._broker.metrics.refused(code.name)
        self.send(frames.write_answer(correlation, code, message, offset))

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
        self.client_id = connect.client_id
        producer_id, producer_epoch = -1, -1
        if connect.flags & frames.WANT_PRODUCER:
            known = self._broker.engine.producer(connect.client_id)
            if known is not None and known[0] == connect.producer_id and 0 <= connect.producer_epoch < known[1]:
                self._answer(
                    event.correlation,
                    Code.FENCED,
                    f"another producer named {connect.client_id} began after this one; give each its own client id",
                )
                return
            producer_id, producer_epoch = self._grant_producer(connect)
        limits = self._broker.limits
        grants = Grants(
            version=frames.PROTOCOL_VERSION,
            node_uid=bytes.fromhex(self._broker.engine.node_uid),
            heartbeat_ms=limits.heartbeat_ms,
            idle_ms=limits.idle_ms,
            max_frame=limits.max_frame,
            max_batch=limits.max_batch,
            max_record=limits.max_record,
            window_batches=limits.window_batches,
            window_bytes=limits.window_bytes,
            delivery_ms=limits.delivery_ms,
            producer_id=producer_id,
            producer_epoch=producer_epoch,
            topics=[self._metadata(topic) for topic in connect.topics],
        )
        self._connection.granted = True
        self.send(frames.write_grants(event.correlation, grants))

    def _grant_producer(self, connect: frames.Connect) -> tuple[int, int]:
        """The id bound to this client id; a client that was here before keeps its epoch, another fences it."""
        engine = self._broker.engine
        known = engine.producer(connect.client_id)
        named = min(connect.producer_id, connect.producer_epoch) >= 0
        mine = named and (known is None or known[0] == connect.producer_id)
        if mine and not connect.flags & frames.NEW_EPOCH and (known is None or known[1] <= connect.producer_epoch):
            granted = (connect.producer_id, connect.producer_epoch)
        else:
            producer_id, epoch = known or ((connect.producer_id, connect.producer_epoch) if mine else (-1, -1))
            epoch = max(epoch, connect.producer_epoch if mine else -1) + 1
            if producer_id < 0 or epoch > MAX_EPOCH:
                producer_id, epoch = int.from_bytes(os.urandom(8), "big") >> 1, 0
            granted = (producer_id, epoch)
        if granted != known:
            engine.grant_producer(connect.client_id, *granted)
        return granted

    def _metadata(self, topic: str) -> TopicMetadata:
        logs = self._broker.engine.partitions(topic)
        if logs:
            return TopicMetadata(topic, Code.OK, len(logs), logs[0].settings.kind)
        new = self._broker.limits.new_topics
        return TopicMetadata(
            topic, Code.UNKNOWN_TOPIC, new.partitions if self._broker.limits.auto_create else 0, new.kind
        )

    # ---- consuming ----

    def _on_subscribe(self, correlation: int, subscribe: Subscribe) -> None:
        broker = self._broker
        problem = check_group_name(subscribe.group)
        if problem:
            self._answer(correlation, Code.UNKNOWN_TOPIC, problem)
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
                broker.membership.leave(self, self.group, subscribe.wanted)
            elif self.group is not None:
                broker.membership.release(self, self.group, subscribe.wanted)
            self._answer(correlation, Code.OK)
            return
        if not subscribe.wanted:
            raise RemoteProtocolError("SUBSCRIBE without topics")
        if broker.membership.frozen:
            self._answer(correlation, Code.SHUTTING_DOWN, "this node is stopping; connect again in a moment")
            return
        for wanted in subscribe.wanted:
            logs = broker.engine.partitions(wanted.topic)
            if not -1 <= wanted.partition < max(1, len(logs)) or not logs:
                what = f"topic {wanted.topic}" + (f" partition {wanted.partition}" if logs else "")
                self._answer(correlation, Code.UNKNOWN_TOPIC, f"{what} does not exist on this node")
                return
        if self.group is None or subscribe.group:
            # Looked up again: when this connection has left its group, an operator may have deleted it.
            self.group = broker.groups.group(subscribe.group, broker.loop.now())
        records = max(1, min(subscribe.window_records or broker.limits.consume_records, 1 << 20))
        size = max(1, min(subscribe.window_bytes or broker.limits.consume_bytes, 64 << 20))
        self._answer(correlation, Code.OK)
        if self.transport.closed:
            return
        broker.membership.subscribe(self, self.group, subscribe, correlation, (records, size))

    def _on_ack(self, event: Frame) -> None:
        ack = frames.read_ack(event.body)
        if isinstance(ack, Answer):
            raise RemoteProtocolError("a client answers nothing that a broker asks")
        if self.group is None or not self._broker.membership.acknowledge(self, self.group, ack):
            self._answer(
                event.correlation,
                Code.STALE,
                f"{ack.topic}/{ack.partition}: the acknowledgement of {ack.offset} belongs to an earlier lease or to "
                "records that are not in flight; it changed nothing",
            )
            return
        if event.correlation:
            correlation, offset = event.correlation, ack.offset
            self._broker.engine.when_stored(lambda: self._answer(correlation, Code.OK, offset=offset))

    # ---- refreshing ----

    def _on_reset(self, correlation: int, reset: Reset) -> None:
        cursor = self.cursors.get((reset.topic, reset.partition))
        if cursor is None:
            self._answer(correlation, Code.STALE, f"{reset.topic}/{reset.partition} is not held by this member")
        elif reset.reset_id == frames.NO_RESET:
            self._broker.refreshing.begin(
                cursor.group, cursor.log, lambda code, message: self._answer(correlation, code, message)
            )
        elif self._broker.leases.accept(cursor, reset.reset_id, reset.from_offset):
            self._answer(correlation, Code.OK)
        else:
            self._answer(
                correlation,
                Code.FENCED,
                f"{cursor.log.name}: refresh {reset.reset_id.hex()} is not the one under way",
            )

    def _on_ready(self, correlation: int, ready: Ready) -> None:
        cursor = self.cursors.get((ready.topic, ready.partition))
        if cursor is None:
            self._answer(correlation, Code.STALE, f"{ready.topic}/{ready.partition} is not held by this member")
            return

        def done(code: Code, message: str) -> None:
            if code is Code.OK:
                self._broker.membership.refreshed(cursor.group)
                self.send(frames.write_ready(correlation, ready))
            else:
                self._answer(correlation, code, message)

        self._broker.refreshing.ready(cursor.group, cursor.log, ready, done)
