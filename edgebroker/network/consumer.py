"""The Python consumer: iterate over records or have a handler called; blocking, embeddable, no asyncio needed.

The broker pushes; one I/O thread collects what it pushes, the caller's thread decodes and handles. At least once, in
order per partition: after a reconnect the consumer goes on behind the last record that it acknowledged.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from edgebroker.common import batch
from edgebroker.common.clock import SystemClock
from edgebroker.common.errors import (
    AnswerError,
    Code,
    CorruptBatchError,
    EdgeBrokerError,
    GapError,
    ResetRequiredError,
    UnreachableError,
)
from edgebroker.common.records import Record
from edgebroker.common.threads import start_thread
from edgebroker.common.types import Position, Start, TopicPartition
from edgebroker.network import frames
from edgebroker.network.connection import Event, Frame
from edgebroker.network.frames import (
    AckKind,
    Answer,
    ConsumerAck,
    Deliver,
    FrameType,
    Gap,
    Grants,
    Subscribe,
    Wanted,
)
from edgebroker.network.link import Link
from edgebroker.network.loop import Loop

log = logging.getLogger(__name__)

From = int | str
_NAMED = {"committed": Start.COMMITTED, "earliest": Start.EARLIEST, "latest": Start.LATEST}
AUTO_ACK_RECORDS = 1000
RETRY_SECONDS = 0.02


def parse_from(value: From) -> tuple[Start, int]:
    """earliest, latest, committed, an offset, or @TIME in milliseconds since 1970. ValueError says what is allowed."""
    if isinstance(value, int):
        return Start.OFFSET, value
    if value in _NAMED:
        return _NAMED[value], 0
    if value.startswith("@") and value[1:].lstrip("-").isdigit():
        return Start.TIME, int(value[1:])
    if value.isdigit():
        return Start.OFFSET, int(value)
    raise ValueError(f"{value!r}: use earliest, latest, committed, an offset, or @TIME in ms since 1970")


class _Place:
    """Where this consumer stands in one partition."""

    __slots__ = (
        "acked",
        "awaiting",
        "epoch",
        "expected",
        "generation",
        "lease",
        "log_id",
        "next_offset",
        "passed",
        "wanted",
    )

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.log_id = frames.NO_LOG_ID
        self.epoch = self.generation = self.lease = 0
        self.acked = self.next_offset = self.expected = -1
        # What comes before the answer to this SUBSCRIBE belongs to an earlier one (-1: it is not sent yet).
        self.awaiting = 0
        # Ranges without a record for the handler, acknowledged together with the last record before them.
        self.passed: deque[tuple[int, int]] = deque()

    def start_over(self, wanted: Wanted) -> None:
        """Nothing that was pushed so far counts any more."""
        self.wanted, self.acked, self.next_offset = wanted, -1, -1
        self.lease, self.awaiting, self.passed = 0, -1, deque()


@dataclass(slots=True)
class _Arrived:
    """One DELIVER, undecoded."""

    deliver: Deliver
    batches: bytes


class Consumer:
    """Read topics as a member of a group.

    server       HOST:PORT
    topics       names; every partition of each is read
    group        name of the consumer group
    start        where a group without a committed offset... or any reader begins: committed (else earliest),
                 earliest, latest, an offset, or @TIME
    positions    the reader's own places by (topic, partition): they win over what the group committed
    auto_ack     acknowledge as the iteration moves on: what one delivery brought, at most 1,000 records at a time, when
                 the record behind it is asked for; else call ack()
    window_records, window_bytes   how much may be in flight; 0: what the broker gives
    on_gap       called with a GapError instead of raising it
    timeout      seconds without any broker until iterating raises UnreachableError; None: wait for ever
    """

    def __init__(
        self,
        server: str = "127.0.0.1:7420",
        topics: Sequence[str] = (),
        group: str = "",
        *,
        start: From = "committed",
        positions: Mapping[tuple[str, int], Position] | None = None,
        auto_ack: bool = True,
        window_records: int = 0,
        window_bytes: int = 0,
        on_gap: Callable[[GapError], object] | None = None,
        timeout: float | None = None,
        client_id: str = "",
        token: bytes = b"",
    ) -> None:
        if isinstance(topics, str):
            raise TypeError("topics is a sequence of names, not one name")
        if not topics:
            raise ValueError("name at least one topic to consume")
        self._start, self._group = parse_from(start), group or f"reader-{secrets.token_hex(8)}"
        self._auto_ack, self._on_gap, self._timeout = auto_ack, on_gap, timeout
        self._window = (window_records, window_bytes)
        self._topics = list(topics)
        self._places: dict[TopicPartition, _Place] = {}
        for (topic, partition), position in (positions or {}).items():
            wanted = Wanted(topic, partition, Start.POSITION, position.log_id, position.epoch, position.next_offset)
            self._places[TopicPartition(topic, partition)] = _Place(wanted)
        self._arrived: deque[_Arrived | EdgeBrokerError] = deque()
        self._ready = threading.Condition()
        self._resuming = False
        self._handing: list[Record] = []
        self._closed = False
        self._up_since: float | None = None
        self._down_since: float | None = None
        self._last_error: EdgeBrokerError | None = None
        self._stored: set[int] = set()
        self.durable_ends: dict[TopicPartition, int] = {}
        self.redelivered = 0
        self._loop = Loop(SystemClock())
        self._down_since = self._loop.clock_now()
        name = client_id or f"consumer-{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._link = Link(self._loop, server, name, self, token=token)
        self._metadata: dict[str, int] = {}
        self._loop.call_soon_threadsafe(self._link.open)
        self._thread = start_thread("edgebroker-consumer", self._loop.run)

    # ---- the caller's side ----

    @property
    def group(self) -> str:
        return self._group

    def __iter__(self) -> Iterator[Record]:
        """Records for ever; blocks while there are none. Ends after close()."""
        while True:
            records = self.poll(None)
            if not records:
                return
            yield from self._one_by_one(records)

    def _one_by_one(self, records: list[Record]) -> Iterator[Record]:
        for start in range(0, len(records), AUTO_ACK_RECORDS):
            piece = self._handing = records[start : start + AUTO_ACK_RECORDS]
            last = piece[-1]
            yield from piece
            if not piece:
                return  # seek() took the rest back
            if self._auto_ack:
                self.ack(last)

    def poll(self, timeout: float | None = None) -> list[Record]:
        """The records of the next delivery, in order; [] after `timeout` seconds or when the consumer was closed.

        With auto_ack the caller must acknowledge by asking again through iteration or run(); poll() itself does not.
        Raises GapError (without on_gap), ResetRequiredError, AnswerError, UnreachableError.
        """
        deadline = None if timeout is None else self._loop.clock_now() + timeout
        while True:
            arrived = self._next_arrived(deadline)
            if arrived is None:
                return []
            if isinstance(arrived, EdgeBrokerError):
                raise arrived
            records = self._decode(arrived)
            if records:
                return records

    def run(self, handler: Callable[[list[Record]], object], batch_size: int = 10) -> None:
        """Call the handler with up to batch_size records of one partition at a time; acknowledge when it returns.

        An exception of the handler ends run(); what it was given is delivered again later.
        """
        while True:
            records = self.poll(None)
            if not records:
                return
            for start in range(0, len(records), batch_size):
                piece = records[start : start + batch_size]
                handing = self._handing = list(piece)
                handler(piece)
                if not handing:
                    break  # seek() took the rest back
                self.ack(handing[-1])

    def ack(self, record: Record) -> None:
        """Acknowledge this record and everything before it in its partition."""
        self.ack_to(record.topic, record.partition, record.offset + 1)

    def ack_to(self, topic: str, partition: int, next_offset: int) -> None:
        """Acknowledge everything before next_offset. Returns at once; commit() waits until it is stored."""
        place = self._places[TopicPartition(topic, partition)]
        passed = place.passed
        while passed and next_offset >= passed[0][0]:
            next_offset = max(next_offset, passed.popleft()[1])
        if next_offset <= place.acked:
            return
        place.acked = next_offset
        self._loop.call_soon_threadsafe(lambda: self._send_ack(topic, partition, place, 0))

    def commit(self, timeout: float | None = 30.0) -> None:
        """Wait until the broker has stored what was acknowledged so far. Raises TimeoutError."""
        waiting: set[int] = set()
        posted = threading.Event()

        def send() -> None:
            if not self._link.up and not self._closed:
                # The next subscription carries the places that have no lease then.
                self._loop.call_later(RETRY_SECONDS, send)
                return
            for key, place in list(self._places.items()):
                if place.acked >= 0 and place.lease:
                    correlation = self._link.next_correlation()
                    waiting.add(correlation)
                    self._send_ack(key.topic, key.partition, place, correlation)
            posted.set()

        self._loop.call_soon_threadsafe(send)
        with self._ready:
            done = self._ready.wait_for(lambda: posted.is_set() and waiting <= self._stored, timeout)
        if not done:
            raise TimeoutError("the broker did not confirm the acknowledgements in time")
        self._stored -= waiting

    def seek(self, topic: str, partition: int, start: From) -> None:
        """Go on elsewhere: what was pushed before and not handed out is dropped."""
        kind, value = parse_from(start)
        key = TopicPartition(topic, partition)
        wanted = Wanted(topic, partition, kind, frames.NO_LOG_ID, -1, value)
        with self._ready:
            place = self._places.get(key)
            if place is None:
                place = self._places[key] = _Place(wanted)
            place.start_over(wanted)
            self._arrived = deque(
                item
                for item in self._arrived
                if not isinstance(item, _Arrived) or (item.deliver.topic, item.deliver.partition) != key
            )
            if self._handing and (self._handing[0].topic, self._handing[0].partition) == key:
                self._handing.clear()
        self._loop.call_soon_threadsafe(lambda: self._subscribe([wanted]))

    def positions(self) -> dict[tuple[str, int], Position]:
        """The places behind the last acknowledged records, to be kept by the caller and given back as `positions`."""
        return {
            (key.topic, key.partition): Position(place.log_id, place.epoch, place.acked)
            for key, place in list(self._places.items())
            if place.acked >= 0
        }

    def close(self) -> None:
        """Send the last acknowledgements and leave the group. Iterators end."""
        if self._closed:
            return
        with self._ready:
            self._closed = True
            self._ready.notify_all()

        def end() -> None:
            self._link.close()
            self._loop.stop()

        self._loop.call_soon_threadsafe(end)
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
            self._loop.close()

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_arrived(self, deadline: float | None) -> _Arrived | EdgeBrokerError | None:
        with self._ready:
            while not self._arrived:
                if self._closed:
                    return None
                now = self._loop.clock_now()
                waits = [1.0] if self._timeout is not None else []
                if deadline is not None:
                    if now >= deadline:
                        return None
                    waits.append(deadline - now)
                down = self._down_since
                if self._timeout is not None and down is not None and now - down >= self._timeout:
                    return self._last_error or UnreachableError(f"no broker at {self._link.server}")
                self._ready.wait(min(waits) if waits else None)
            return self._arrived.popleft()

    def _decode(self, arrived: _Arrived) -> list[Record]:
        deliver = arrived.deliver
        place = self._places[TopicPartition(deliver.topic, deliver.partition)]
        if deliver.lease != place.lease or deliver.first < place.next_offset:
            return []
        records = batch.decode(arrived.batches, deliver.topic, deliver.partition, deliver.first, deliver.last)
        place.next_offset = deliver.last + 1
        if not records:
            # Nothing for the handler in this range (control batches, gaps): done with when all before it is.
            place.passed.append((deliver.first, deliver.last + 1))
            self.ack_to(deliver.topic, deliver.partition, place.acked)
        for gap in deliver.gaps:
            self._gap(deliver, gap)
        return records

    def _gap(self, deliver: Deliver, gap: Gap) -> None:
        error = GapError(deliver.topic, deliver.partition, gap.first, gap.last, gap.reason.name)
        if self._on_gap is None:
            raise error
        self._on_gap(error)

    # ---- the I/O thread ----

    def _put(self, item: _Arrived | EdgeBrokerError) -> None:
        with self._ready:
            self._arrived.append(item)
            self._ready.notify()

    def connected(self, grants: Grants) -> None:
        self._down_since, self._last_error = None, None
        # A partition that delivered nothing yet goes on where its group was put by the first SUBSCRIBE.
        kind, value = (Start.COMMITTED, 0) if self._resuming else self._start
        wanted = [Wanted(topic, -1, kind, frames.NO_LOG_ID, -1, value) for topic in self._topics]
        with self._ready:
            # The broker takes the last line about a partition.
            wanted += [self._resumed(place) for place in self._places.values()]
        self._subscribe(wanted)

    def _resumed(self, place: _Place) -> Wanted:
        """Where to go on after a reconnect: behind what was acknowledged here."""
        place.lease, place.passed = 0, deque()
        if place.acked >= 0:
            place.next_offset = -1
            wanted = place.wanted
            return Wanted(wanted.topic, wanted.partition, Start.POSITION, place.log_id, place.epoch, place.acked)
        return place.wanted

    def _subscribe(self, wanted: list[Wanted]) -> None:
        correlation = self._link.next_correlation()
        data = frames.write_subscribe(correlation, Subscribe(False, self._group, *self._window, wanted))
        for line in wanted:
            place = self._places.get(TopicPartition(line.topic, line.partition))
            if place is not None:
                place.awaiting = correlation
        self._link.request(correlation, data, lambda answer, body: self._on_state(correlation, answer), once=False)

    def _on_state(self, correlation: int, answer: Answer) -> None:
        if answer.code is Code.OK:
            self._resuming = True
            with self._ready:
                for place in self._places.values():
                    if place.awaiting == correlation:
                        place.awaiting = 0
        elif answer.code.retryable:
            log.warning("%s: %s", answer.code.name, answer.message)
        else:
            self._put(AnswerError(answer.code, answer.message))

    def on_answer(self, correlation: int, answer: Answer) -> None:
        if correlation and answer.code in (Code.OK, Code.STALE):
            with self._ready:
                self._stored.add(correlation)
                self._ready.notify_all()

    def on_event(self, event: Event) -> None:
        if not isinstance(event, Frame):
            self._link.reconnect("the broker sent a frame that is too large, or of a kind it must not send")
            return
        if event.type == FrameType.DELIVER:
            self._on_deliver(event)
        elif event.type == FrameType.HEARTBEAT:
            for topic, partition, end in frames.read_heartbeat(event.body):
                self.durable_ends[TopicPartition(topic, partition)] = end
        elif event.type == FrameType.RESET:
            reset = frames.read_reset(event.body)
            self._put(ResetRequiredError(reset.topic, reset.partition, reset.log_id, reset.from_offset))

    def _on_deliver(self, event: Frame) -> None:
        deliver = frames.read_deliver(event.body)
        key = TopicPartition(deliver.topic, deliver.partition)
        with self._ready:
            place = self._places.get(key)
            if place is None:
                kind, value = self._start
                place = self._places[key] = _Place(Wanted(*key, kind, frames.NO_LOG_ID, -1, value))
            if place.awaiting:
                return  # sent before the broker heard of the seek
            if place.lease == 0:
                place.lease, place.generation = deliver.lease, deliver.generation
                place.log_id, place.epoch = deliver.log_id, deliver.epoch
                if place.acked < 0:
                    place.acked = deliver.first
            elif deliver.lease != place.lease:
                return
            elif deliver.first != place.expected:
                self._link.reconnect(f"{deliver.topic}/{deliver.partition}: offset {place.expected} was expected next")
                return
            place.expected = deliver.last + 1
            self.durable_ends[key] = deliver.durable_end
            self._put(_Arrived(deliver, bytes(event.body[deliver.batches_start :])))

    def _send_ack(self, topic: str, partition: int, place: _Place, correlation: int) -> None:
        if place.lease:
            ack = ConsumerAck(AckKind.CUMULATIVE, topic, partition, place.generation, place.lease, place.acked)
            self._link.send(frames.write_consumer_ack(correlation, ack))

    def lost(self, reason: str) -> None:
        with self._ready:
            self._down_since = self._loop.clock_now()
            self._arrived = deque(item for item in self._arrived if not isinstance(item, _Arrived))
        log.info("connection lost: %s", reason)

    def unreachable(self, error: EdgeBrokerError) -> None:
        self._last_error = error


__all__ = ["Consumer", "CorruptBatchError", "parse_from"]
