"""One client connection: what it may do, and the order in which its frames are handled.

Frames are handled one after the other. While one has to wait (a compressed batch at the checker, a topic being made,
too much staged), the session is held: it keeps a copy of what it has read and is not read any further.
"""

from __future__ import annotations

import secrets
import socket
from collections import deque
from typing import TYPE_CHECKING

from edgebroker.broker.groups import Cursor
from edgebroker.broker.naming import check_group_name
from edgebroker.common.errors import Code, RemoteProtocolError
from edgebroker.common.types import Start
from edgebroker.network import frames
from edgebroker.network.connection import Connection, Event, Frame, PublishRun, ReceiveBuffer, Refused, Role
from edgebroker.network.frames import (
    AckKind,
    Answer,
    ConsumerAck,
    FrameType,
    Grants,
    Subscribe,
    TopicMetadata,
    Wanted,
)
from edgebroker.network.transport import Transport, tune
from edgebroker.storage.engine import Log

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
        "group_name",
        "opened_at",
        "transport",
    )

    def __init__(self, broker: Broker, sock: socket.socket, peer: str) -> None:
        self._broker = broker
        self._connection = Connection(Role.BROKER, broker.limits.max_frame)
        self._deferred: deque[Event] | None = None
        self._holds = 0
        self.client_id = ""
        self.group_name = ""
        self.opened_at = broker.loop.now()
        self.cursors: dict[tuple[str, int], Cursor] | None = None
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
        if self.cursors:
            for cursor in list(self.cursors.values()):
                self._broker.delivery.pump(cursor)

    def on_closed(self, reason: str) -> None:
        for cursor in list((self.cursors or {}).values()):
            self._leave(cursor)
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
        else:
            self._answer(
                event.correlation, Code.UNSUPPORTED_VERSION, "refreshing by RESET is not served by this release"
            )

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
                producer_id, epoch = secrets.randbits(63), 0
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
        problem = check_group_name(subscribe.group)
        if problem:
            self._answer(correlation, Code.UNKNOWN_TOPIC, problem)
            return
        if self.group_name not in ("", subscribe.group):
            self._answer(
                correlation, Code.STALE, f"this connection reads for group {self.group_name}; use another connection"
            )
            return
        if subscribe.leave:
            self._on_leave(correlation, subscribe)
            return
        if not subscribe.wanted:
            raise RemoteProtocolError("SUBSCRIBE without topics")
        lines: dict[Log, Wanted] = {}  # a later line about a partition replaces an earlier one
        for wanted in subscribe.wanted:
            logs = self._broker.engine.partitions(wanted.topic)
            chosen = logs if wanted.partition == -1 else logs[wanted.partition : wanted.partition + 1]
            if not chosen or wanted.partition < -1:
                what = f"topic {wanted.topic}" + (f" partition {wanted.partition}" if logs else "")
                self._answer(correlation, Code.UNKNOWN_TOPIC, f"{what} does not exist on this node")
                return
            lines.update((log, wanted) for log in chosen)
        self.group_name = subscribe.group
        self._answer(correlation, Code.OK)
        for log, wanted in lines.items():
            self._subscribe(correlation, subscribe, log, wanted)

    def _subscribe(self, correlation: int, subscribe: Subscribe, log: Log, wanted: Wanted) -> None:
        self.cursors = self.cursors if self.cursors is not None else {}
        key = (log.topic, log.partition)
        old = self.cursors.get(key)
        if old is not None and old.state == "standby":
            self._leave(old)
        elif old is not None:
            self._broker.delivery.stop(old)
        group = self._broker.groups.group(subscribe.group, self._broker.loop.now())
        records = max(1, min(subscribe.window_records or self._broker.limits.consume_records, 1 << 20))
        size = max(1, min(subscribe.window_bytes or self._broker.limits.consume_bytes, 64 << 20))
        cursor = Cursor(group, log, self, records, size)
        cursor.subscribe_correlation, cursor.start = correlation, wanted
        self.cursors[key] = cursor
        if self._broker.groups.join(cursor):
            self.begin(cursor)

    def begin(self, cursor: Cursor) -> None:
        """The partition is this session's: find out where to begin, then push."""
        wanted, log = cursor.start, cursor.log
        assert isinstance(wanted, Wanted)
        place = cursor.group.offsets.get((log.topic, log.partition))
        match wanted.start:
            case Start.POSITION if wanted.log_id not in (frames.NO_LOG_ID, log.identity.log_id_bytes):
                self._broker.delivery.announce_reset(cursor)
                return
            case Start.POSITION | Start.OFFSET:
                offset = wanted.value
            case Start.LATEST:
                offset = log.durable_end
            case Start.EARLIEST:
                offset = log.log_start
            case Start.TIME:
                self._broker.engine.offset_at_time(
                    log, wanted.value, lambda offset, error: self._begin_at(cursor, offset, error)
                )
                return
            case _:
                offset = log.log_start
                if place is not None and place.log_id == log.identity.log_id:
                    offset = place.next_offset
        self._begin_at(cursor, offset, "")

    def _begin_at(self, cursor: Cursor, offset: int, error: str) -> None:
        if cursor.state != "starting" or self.transport.closed:
            return
        if error:
            self._answer(cursor.subscribe_correlation, Code.STORAGE_TIMEOUT, error)
            self._leave(cursor)
            return
        wanted = cursor.start
        assert isinstance(wanted, Wanted)
        fresh = (cursor.log.topic, cursor.log.partition) not in cursor.group.offsets
        if (fresh or wanted.start != Start.COMMITTED) and 0 <= offset <= cursor.log.durable_end:
            # Where a group begins is its place, also when it never acknowledges anything.
            self._broker.delivery.commit(cursor, offset)
        self._broker.delivery.start(cursor, max(0, offset))

    def _on_leave(self, correlation: int, subscribe: Subscribe) -> None:
        for wanted in subscribe.wanted:
            for key, cursor in list((self.cursors or {}).items()):
                if key[0] == wanted.topic and wanted.partition in (-1, key[1]):
                    self._leave(cursor)
        self._answer(correlation, Code.OK)

    def _leave(self, cursor: Cursor) -> None:
        self._broker.delivery.stop(cursor)
        if self.cursors is not None:
            self.cursors.pop((cursor.log.topic, cursor.log.partition), None)
        following = self._broker.groups.leave(cursor)
        if following is not None:
            following.member.begin(following)  # type: ignore[attr-defined]

    def _on_ack(self, event: Frame) -> None:
        ack = frames.read_ack(event.body)
        if isinstance(ack, Answer):
            raise RemoteProtocolError("a client answers nothing that this release asks")
        if ack.kind is not AckKind.CUMULATIVE:
            self._answer(
                event.correlation, Code.UNSUPPORTED_VERSION, f"{ack.kind.name} acknowledgements are not served yet"
            )
            return
        self._on_consumer_ack(event.correlation, ack)

    def _on_consumer_ack(self, correlation: int, ack: ConsumerAck) -> None:
        cursor = (self.cursors or {}).get((ack.topic, ack.partition))
        if cursor is None or not self._broker.delivery.acknowledge(cursor, ack):
            self._answer(
                correlation,
                Code.STALE,
                f"{ack.topic}/{ack.partition}: the acknowledgement of {ack.offset} belongs to an earlier lease or to "
                "records that are not in flight; it changed nothing",
            )
            return
        if correlation:
            self._broker.engine.when_stored(lambda: self._answer(correlation, Code.OK, offset=ack.offset))
