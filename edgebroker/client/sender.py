"""The I/O side of a producer: from open batches to acknowledged ones.

Batches of a partition are sent in order and carry (producer id, epoch, sequence), so that one that is sent again is not
stored twice. Everything here runs on the producer's I/O thread but for the methods under "the caller's side".
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from edgebroker.client.accumulator import Accumulator, PendingBatch, TopicBatches
from edgebroker.client.link import Link
from edgebroker.common import codecs, records
from edgebroker.common.errors import AnswerError, ArgumentError, Code, EdgeBrokerError, UnreachableError
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import AckLevel
from edgebroker.network.io.loop import Loop
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Event, Refused
from edgebroker.network.wire.frames import Answer, Connect, Grants

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
MAX_SEQUENCE = 0x7FFFFFFF
# What a record may have until the broker has said what it allows.
FIRST_MAX_RECORD = 1 << 20


class PartitionQueue:
    """The batches of one partition in the order in which they are to be stored."""

    __slots__ = ("attempts", "in_flight", "next_sequence", "prefix", "queue", "rewinding")

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self.queue: deque[PendingBatch] = deque()
        self.in_flight: deque[PendingBatch] = deque()
        self.next_sequence = 0
        self.rewinding = False
        self.attempts = 0


class Sender:
    """One producer's connection, and what is on its way through it. Owner of the accumulator and of the link."""

    def __init__(
        self,
        server: str,
        *,
        client_id: str,
        token: bytes,
        level: AckLevel,
        codec: int,
        linger_seconds: float,
        timeout: float | None,
        batch_records: int,
        batch_bytes: int,
        max_unacked: int,
        max_unacked_bytes: int,
    ) -> None:
        self.accumulator = Accumulator(
            self,
            batch_records=batch_records,
            batch_bytes=batch_bytes,
            max_unacked=max_unacked,
            max_unacked_bytes=max_unacked_bytes,
            max_record=FIRST_MAX_RECORD,
        )
        self._level, self._codec = level, codec
        self._linger, self._timeout = linger_seconds, timeout
        self.loop = Loop(SystemClock())
        self.link = Link(self.loop, server, client_id, self, token=token, connect_body=self._connect_body)
        self._producer_id, self._producer_epoch = -1, -1
        self._new_epoch = False
        self._queues: dict[tuple[str, int], PartitionQueue] = {}
        self._waiting_for: dict[int, tuple[PartitionQueue, PendingBatch]] = {}
        self._pumping = self._lingering = False
        self._changed = threading.Condition()
        self._waiters = 0
        self._metadata: dict[str, frames.TopicMetadata] = {}
        self._asked_topics: list[str] = []
        self._last_error: EdgeBrokerError | None = None
        self.loop.call_soon_threadsafe(self.link.open)
        self.loop.call_later(1.0, self._expire)

    # ---- the caller's side ----

    def flush(self, timeout: float | None) -> None:
        """Send open batches now and wait until none is unacknowledged. Raises TimeoutError."""
        self.loop.call_soon_threadsafe(lambda: self._pump(everything=True))
        self._wait(lambda: self.accumulator.unacked == 0, timeout)

    def close(self) -> None:
        """Fail what is not acknowledged yet, and end the loop."""
        self.accumulator.closed = True

        def end() -> None:
            self._fail_all(_closed_error())
            self.link.close()
            self.loop.stop()

        self.loop.call_soon_threadsafe(end)

    def closed(self) -> None:
        """The I/O thread has ended: wake up what still waits for it."""
        self.loop.close()
        self._notify()

    # The accumulator's owner:

    def open_topic(self, name: str) -> TopicBatches:
        """Ask the broker how many partitions a topic has. Raises AnswerError or UnreachableError."""
        self._check_open()

        def ask() -> None:
            if name not in self._asked_topics:
                self._asked_topics.append(name)
            self._ask_metadata()

        self.loop.call_soon_threadsafe(ask)
        try:
            self._wait(lambda: name in self._metadata, self._timeout)
        except TimeoutError:
            raise self._last_error or UnreachableError(f"no broker at {self.link.server} answered in time") from None
        self._check_open()
        found = self._metadata[name]
        if found.partitions == 0:
            del self._metadata[name]
            raise AnswerError(
                found.code, f"topic {name!r} does not exist and the broker does not create it; create it first"
            )
        return TopicBatches(name, found.partitions)

    def batch_full(self) -> None:
        self._check_open()
        if not self._pumping:
            self._pumping = True
            self.loop.call_soon_threadsafe(self._pump)

    def batch_begun(self) -> None:
        self._check_open()
        if not self._lingering:
            self._lingering = True
            self.loop.call_soon_threadsafe(self._linger_on)

    def wait_for_room(self) -> None:
        self._check_open()
        self.loop.call_soon_threadsafe(lambda: self._pump(everything=True))
        own = self.accumulator
        # Until half of it is free: waking up for each acknowledgement would cost more than it brings.
        self._wait(
            lambda: own.unacked <= own.max_unacked // 2 and own.unacked_bytes <= own.max_unacked_bytes // 2, None
        )
        self._check_open()

    @staticmethod
    def encode_headers(headers: Iterable[tuple[str, bytes | None]]) -> tuple[int, bytes]:
        return records.encode_headers(headers)

    @staticmethod
    def invalid(message: str) -> Exception:
        return ArgumentError(message)

    def wait_for(self, batch: PendingBatch, timeout: float | None) -> None:
        """Wait for one batch, sending it now."""
        self.loop.call_soon_threadsafe(lambda: self._pump(everything=True))
        self._wait(lambda: batch.done, timeout)
        if not batch.done:
            raise _closed_error()

    def run_callbacks(self, batch: PendingBatch) -> None:
        callbacks, batch.callbacks = batch.callbacks, None
        for callback, sent in callbacks or ():
            try:
                callback(sent)
            except Exception:
                log.exception("a callback of a sent record failed")

    def _check_open(self) -> None:
        if self.accumulator.closed:
            raise ValueError("the producer is closed")

    def _wait(self, ready: Callable[[], bool], timeout: float | None) -> None:
        with self._changed:
            self._waiters += 1
            try:
                if not self._changed.wait_for(lambda: ready() or self.accumulator.closed, timeout):
                    raise TimeoutError(f"the broker did not acknowledge within {timeout:g} s")
            finally:
                self._waiters -= 1

    def _notify(self) -> None:
        if self._waiters:
            with self._changed:
                self._changed.notify_all()

    # ---- the I/O thread ----

    def _linger_on(self) -> None:
        if self._linger:
            self.loop.call_later(self._linger, self._pump)
        else:
            self._pump()

    def _pump(self, everything: bool = False) -> None:
        """Move full and lingering batches into the queues of their partitions and send what may be sent."""
        self._pumping = self._lingering = False
        now = self.loop.clock_now()
        taken, oldest = self.accumulator.take(now if everything else now - self._linger)
        for batch in taken:
            self._enqueue(batch)
        if oldest and not self._lingering:
            self._lingering = True
            self.loop.call_later(max(0.0, oldest + self._linger - now), self._pump)
        if self.link.up:
            for waiting in self._queues.values():
                if waiting.queue:
                    self._send_queue(waiting)

    def _enqueue(self, batch: PendingBatch) -> None:
        key = (batch.topic, batch.partition)
        found = self._queues.get(key)
        if found is None:
            prefix = frames.publish_prefix(self._level, batch.topic, batch.partition)
            found = self._queues[key] = PartitionQueue(prefix)
        found.queue.append(batch)

    def _send_queue(self, waiting: PartitionQueue) -> None:
        if waiting.rewinding or self._new_epoch or not self.link.up:
            return
        assert self.link.grants is not None
        window = self.link.grants.window_batches
        out: list[bytes] = []
        while waiting.queue and len(waiting.in_flight) < window:
            batch = waiting.queue.popleft()
            correlation = self.link.next_correlation()
            packed = codecs.deflate(self._codec, batch.records()) if self._codec else None
            out.append(
                batch.frame(
                    correlation, waiting.prefix, self._producer_id, self._producer_epoch, waiting.next_sequence,
                    self._codec, packed,
                )
            )  # fmt: skip
            waiting.next_sequence = (waiting.next_sequence + batch.count) & MAX_SEQUENCE
            if self._level == AckLevel.NONE:
                self._finish(batch, -1, None)
                continue
            waiting.in_flight.append(batch)
            self._waiting_for[correlation] = (waiting, batch)
        if out:
            self.link.send(out[0] if len(out) == 1 else b"".join(out))

    # The link's owner:

    def connected(self, grants: Grants) -> None:
        self._last_error = None
        self.accumulator.limit_to(grants.max_record, grants.max_batch)
        changed = (grants.producer_id, grants.producer_epoch) != (self._producer_id, self._producer_epoch)
        self._producer_id, self._producer_epoch = grants.producer_id, grants.producer_epoch
        self._new_epoch = False
        self._learn(grants)
        for each in self._queues.values():
            self._rewind(each, restart=changed)
        self._pump()

    def on_answer(self, correlation: int, answer: Answer) -> None:
        found = self._waiting_for.pop(correlation, None)
        if found is not None:
            self._answered(*found, answer)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Refused):
            log.warning("the broker sent a frame of %d bytes; it was skipped", event.size)

    def disconnected(self, reason: str) -> None:
        log.info("connection lost: %s", reason)

    def connect_failed(self, error: EdgeBrokerError) -> None:
        if self._last_error is None:
            log.warning("%s; retrying until the broker answers", error)
        self._last_error = error
        if isinstance(error, AnswerError) and not error.code.retryable:
            # The broker does not accept this producer: waiting does not help.
            self._fail_all(error)

    def _learn(self, grants: Grants) -> None:
        for topic in grants.topics:
            self._metadata[topic.name] = topic
            if topic.name in self._asked_topics:
                self._asked_topics.remove(topic.name)
        if grants.topics:
            self._notify()
        if self._asked_topics:
            self._ask_metadata()

    def _ask_metadata(self) -> None:
        if not self.link.up or not self._asked_topics:
            return
        correlation = self.link.next_correlation()

        def answered(answer: Answer, body: memoryview) -> None:
            if answer.code is Code.OK:
                self._learn(frames.read_grants(body, answer.extra_start))

        self.link.request(correlation, frames.write_connect(correlation, self._connect_body()), answered)

    def _connect_body(self) -> Connect:
        flags = frames.WANT_PRODUCER | (frames.NEW_EPOCH if self._new_epoch else 0)
        return Connect(
            frames.PROTOCOL_VERSION, flags, self.link.client_id, self.link.token, self._producer_id,
            self._producer_epoch, list(self._asked_topics),
        )  # fmt: skip

    def _answered(self, sent: PartitionQueue, batch: PendingBatch, answer: Answer) -> None:
        if answer.code is Code.OK:
            sent.attempts = 0
            sent.in_flight.remove(batch)
            self._finish(batch, answer.offset, None)
            if sent.queue:
                self._send_queue(sent)
            return
        head = sent.in_flight[0] is batch
        if answer.code.retryable and not (answer.code is Code.OUT_OF_ORDER and head and sent.attempts):
            self._retry_later(sent, answer)
        elif answer.code is Code.OUT_OF_ORDER:
            # The broker no longer knows this sequence: start a new one.
            self._start_epoch(f"{batch.topic}/{batch.partition}: {answer.code.name}")
        else:
            sent.in_flight.remove(batch)
            self._finish(batch, -1, AnswerError(answer.code, answer.message or _advice(answer.code)))
            if answer.code is not Code.FENCED:
                self._start_epoch("a batch was refused")

    def _retry_later(self, sent: PartitionQueue, answer: Answer) -> None:
        """Send everything of this partition again, in order, once what is in flight was answered."""
        if sent.rewinding:
            return
        sent.rewinding = True
        sent.attempts += 1
        pause = min(2.0, RETRY_SECONDS * 2 ** min(sent.attempts, 5))
        if answer.code is not Code.OUT_OF_ORDER:
            log.warning("%s: %s; trying again in %.1f s", answer.code.name, answer.message, pause)
        self._last_error = AnswerError(answer.code, answer.message)

        def again() -> None:
            self._rewind(sent, restart=False)
            self._send_queue(sent)

        self.loop.call_later(pause, again)

    def _start_epoch(self, why: str) -> None:
        if not self._new_epoch:
            self._new_epoch = True
            log.info("a new producer epoch is needed: %s", why)
            self.loop.call_later(0.0, lambda: self.link.reconnect("a new producer epoch is needed"))

    def _rewind(self, sent: PartitionQueue, *, restart: bool) -> None:
        """Put what is in flight back to the head of the queue; with `restart` the sequence starts at 0."""
        sent.rewinding = False
        for batch in reversed(sent.in_flight):
            self._waiting_for.pop(batch.correlation, None)
            sent.queue.appendleft(batch)
        if restart:
            sent.next_sequence = 0
        elif sent.in_flight:
            sent.next_sequence = sent.in_flight[0].sequence
        sent.in_flight.clear()

    def _finish(self, batch: PendingBatch, offset: int, error: Exception | None) -> None:
        self.accumulator.acknowledged(batch, offset, error)
        if batch.callbacks is not None:
            self.run_callbacks(batch)
        self._notify()

    def _expire(self) -> None:
        """Fail batches that waited longer than the timeout."""
        self.loop.call_later(1.0, self._expire)
        if self._timeout is None:
            return
        before = self.loop.clock_now() - self._timeout
        failed = False
        for each in self._queues.values():
            for batches in (each.in_flight, each.queue):
                while batches and batches[0].created < before:
                    batch = batches.popleft()
                    self._waiting_for.pop(batch.correlation, None)
                    failed = failed or batch.correlation >= 0
                    why = f": {self._last_error}" if self._last_error else ""
                    message = f"no acknowledgement within {self._timeout:g} s, the outcome is unknown{why}"
                    self._finish(batch, -1, UnreachableError(message))
        if failed:
            self._start_epoch("a batch timed out")

    def _fail_all(self, error: EdgeBrokerError) -> None:
        taken, _ = self.accumulator.take(self.loop.clock_now())
        for batch in taken:
            self._finish(batch, -1, error)
        for each in self._queues.values():
            for batch in [*each.in_flight, *each.queue]:
                self._finish(batch, -1, error)
            each.in_flight.clear()
            each.queue.clear()


def _closed_error() -> UnreachableError:
    return UnreachableError("the producer was closed; the outcome of this record is unknown")


def _advice(code: Code) -> str:
    if code is Code.FENCED:
        return "another producer with the same client_id started after this one; give each its own client_id"
    return ""
