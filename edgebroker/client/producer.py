"""The Python producer: blocking, embeddable, safe to use from several threads, no asyncio needed.

send() puts a record into a batch in the caller's thread; one I/O thread frames, sends, retries and reconnects. Batches
of a partition are sent in order and carry (producer id, epoch, sequence), so that a retry stores nothing twice.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType

from edgebroker.client.accumulator import Accumulator, Batch, Sent, Topic
from edgebroker.client.link import Link
from edgebroker.common import codecs, records
from edgebroker.common.clock import SystemClock
from edgebroker.common.errors import AnswerError, Code, EdgeBrokerError, UnreachableError
from edgebroker.common.threads import start_thread
from edgebroker.common.types import AckLevel
from edgebroker.network.io.loop import Loop
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Event, Refused
from edgebroker.network.wire.frames import Answer, Connect, Grants

log = logging.getLogger(__name__)

ACK_LEVELS = {"none": AckLevel.NONE, "written": AckLevel.WRITTEN, "durable": AckLevel.DURABLE}
RETRY_SECONDS = 0.1
MAX_SEQUENCE = 0x7FFFFFFF


class Lane:
    """The batches of one partition in the order in which they are to be stored."""

    __slots__ = ("attempts", "in_flight", "next_sequence", "prefix", "queue", "rewinding")

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self.queue: deque[Batch] = deque()
        self.in_flight: deque[Batch] = deque()
        self.next_sequence = 0
        self.rewinding = False
        self.attempts = 0


class Producer(Accumulator):
    """Publish records to a broker.

    server          HOST:PORT
    ack             "durable" (synced, the default), "written" (survives the process) or "none"
    compression     "none", "gzip", "lz4" or "zstd"; a batch is compressed as a whole
    batch_records, batch_bytes, linger_ms   a batch is sent when it is full, or this long after its first record
    max_unacked, max_unacked_bytes          send() blocks above either
    timeout         seconds until an unacknowledged batch fails with UnreachableError (its outcome is then unknown);
                    None: try for ever
    client_id       name of this producer; a second producer with the same name fences the first
    """

    def __init__(
        self,
        server: str = "127.0.0.1:7420",
        *,
        ack: str = "durable",
        compression: codecs.CodecName = "none",
        batch_records: int = 1000,
        batch_bytes: int = 256 << 10,
        linger_ms: float = 0.0,
        max_unacked: int = 100_000,
        max_unacked_bytes: int = 32 << 20,
        timeout: float | None = 120.0,
        client_id: str = "",
        token: bytes = b"",
    ) -> None:
        if ack not in ACK_LEVELS:
            raise ValueError(f"ack {ack!r} is unknown; use one of {', '.join(ACK_LEVELS)}")
        if compression not in codecs.CODEC_BITS:
            raise ValueError(f"compression {compression!r} is unknown; use one of {', '.join(codecs.CODEC_BITS)}")
        super().__init__(batch_records, batch_bytes, max_unacked, max_unacked_bytes, 1 << 20)
        self._level, self._codec = ACK_LEVELS[ack], codecs.CODEC_BITS[compression]
        self._linger, self._timeout = linger_ms / 1000, timeout
        self._loop = Loop(SystemClock())
        name = client_id or f"producer-{socket.gethostname()[:40]}-{os.getpid()}-{os.urandom(4).hex()}"
        self._link = Link(self._loop, server, name, self, token=token)
        self._link.ask_with(self._connect_body)
        self._producer_id, self._producer_epoch = -1, -1
        self._new_epoch = False
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._waiting_for: dict[int, tuple[Lane, Batch]] = {}
        self._pumping = self._lingering = False
        self._changed = threading.Condition()
        self._waiters = 0
        self._metadata: dict[str, frames.TopicMetadata] = {}
        self._asked_topics: list[str] = []
        self._last_error: EdgeBrokerError | None = None
        self._loop.call_soon_threadsafe(self._link.open)
        self._loop.call_later(1.0, self._expire)
        self._thread = start_thread("edgebroker-producer", self._loop.run)

    # ---- the caller's side ----

    @property
    def client_id(self) -> str:
        return self._link.client_id

    def flush(self, timeout: float | None = None) -> None:
        """Send open batches now and wait until everything is acknowledged or failed. TimeoutError when it is not."""
        self._loop.call_soon_threadsafe(lambda: self._pump(everything=True))
        self._wait(lambda: self.unacked == 0, timeout)

    def close(self, timeout: float | None = 30.0) -> None:
        """flush(), then end. What could not be sent within `timeout` seconds fails."""
        if self.closed:
            return
        try:
            self.flush(timeout)
        except TimeoutError:
            log.error("%d records were not acknowledged when the producer was closed", self.unacked)
        self.closed = True

        def end() -> None:
            self._fail_all(_closed_error())
            self._link.close()
            self._loop.stop()

        self._loop.call_soon_threadsafe(end)
        self._thread.join(5.0)
        self._loop.close()
        self._notify()

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what Accumulator asks for, in the caller's thread ----

    def open_topic(self, name: str) -> Topic:
        """Learn how many partitions a topic has. Raises AnswerError or UnreachableError."""
        self._check_open()

        def ask() -> None:
            if name not in self._asked_topics:
                self._asked_topics.append(name)
            self._ask_metadata()

        self._loop.call_soon_threadsafe(ask)
        try:
            self._wait(lambda: name in self._metadata, self._timeout)
        except TimeoutError:
            raise self._last_error or UnreachableError(f"no broker at {self._link.server} answered in time") from None
        self._check_open()
        found = self._metadata[name]
        if found.partitions == 0:
            del self._metadata[name]
            raise AnswerError(found.code, f"topic {name} does not exist and the broker does not create it")
        return Topic(name, found.partitions)

    def batch_full(self) -> None:
        self._check_open()
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon_threadsafe(self._pump)

    def batch_begun(self) -> None:
        self._check_open()
        if not self._lingering:
            self._lingering = True
            self._loop.call_soon_threadsafe(self._linger_on)

    def wait_for_room(self) -> None:
        self._check_open()
        self._loop.call_soon_threadsafe(lambda: self._pump(everything=True))
        # Until half of it is free: waking up for each acknowledgement would cost more than it brings.
        self._wait(
            lambda: self.unacked <= self.max_unacked // 2 and self.unacked_bytes <= self.max_unacked_bytes // 2, None
        )
        self._check_open()

    @staticmethod
    def encode_headers(headers: Iterable[tuple[str, bytes | None]]) -> tuple[int, bytes]:
        return records.encode_headers(headers)

    def wait_for(self, batch: Batch, timeout: float | None) -> None:
        """Wait for one batch, sending it now."""
        self._loop.call_soon_threadsafe(lambda: self._pump(everything=True))
        self._wait(lambda: batch.done, timeout)
        if not batch.done:
            raise _closed_error()

    def run_callbacks(self, batch: Batch) -> None:
        callbacks, batch.callbacks = batch.callbacks, None
        for callback, sent in callbacks or ():
            try:
                callback(sent)
            except Exception:
                log.exception("a callback of a sent record failed")

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the producer is closed")

    def _wait(self, ready: Callable[[], bool], timeout: float | None) -> None:
        with self._changed:
            self._waiters += 1
            try:
                if not self._changed.wait_for(lambda: ready() or self.closed, timeout):
                    raise TimeoutError("the broker did not acknowledge in time")
            finally:
                self._waiters -= 1

    def _notify(self) -> None:
        if self._waiters:
            with self._changed:
                self._changed.notify_all()

    # ---- the I/O thread ----

    def _linger_on(self) -> None:
        if self._linger:
            self._loop.call_later(self._linger, self._pump)
        else:
            self._pump()

    def _pump(self, everything: bool = False) -> None:
        """Move sealed and lingering batches into their lanes and send what may be sent."""
        self._pumping = self._lingering = False
        now = self._loop.clock_now()
        taken, oldest = self.take(now if everything else now - self._linger)
        for batch in taken:
            self._enqueue(batch)
        if oldest and not self._lingering:
            self._lingering = True
            self._loop.call_later(max(0.0, oldest + self._linger - now), self._pump)
        if self._link.up:
            for lane in self._lanes.values():
                if lane.queue:
                    self._send_lane(lane)

    def _enqueue(self, batch: Batch) -> None:
        key = (batch.topic, batch.partition)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(frames.publish_prefix(self._level, batch.topic, batch.partition))
        lane.queue.append(batch)

    def _send_lane(self, lane: Lane) -> None:
        if lane.rewinding or self._new_epoch or not self._link.up:
            return
        assert self._link.grants is not None
        window = self._link.grants.window_batches
        out: list[bytes] = []
        while lane.queue and len(lane.in_flight) < window:
            batch = lane.queue.popleft()
            correlation = self._link.next_correlation()
            packed = codecs.deflate(self._codec, batch.records()) if self._codec else None
            out.append(
                batch.frame(
                    correlation, lane.prefix, self._producer_id, self._producer_epoch, lane.next_sequence,
                    self._codec, packed,
                )
            )  # fmt: skip
            lane.next_sequence = (lane.next_sequence + batch.count) & MAX_SEQUENCE
            if self._level == AckLevel.NONE:
                self._finish(batch, -1, None)
                continue
            lane.in_flight.append(batch)
            self._waiting_for[correlation] = (lane, batch)
        if out:
            self._link.send(out[0] if len(out) == 1 else b"".join(out))

    def connected(self, grants: Grants) -> None:
        self._last_error = None
        self.limit_to(grants.max_record, grants.max_batch)
        changed = (grants.producer_id, grants.producer_epoch) != (self._producer_id, self._producer_epoch)
        self._producer_id, self._producer_epoch = grants.producer_id, grants.producer_epoch
        self._new_epoch = False
        self._learn(grants)
        for lane in self._lanes.values():
            self._rewind(lane, restart=changed)
        self._pump()

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
        if not self._link.up or not self._asked_topics:
            return
        correlation = self._link.next_correlation()

        def answered(answer: Answer, body: memoryview) -> None:
            if answer.code is Code.OK:
                self._learn(frames.read_grants(body, answer.extra_start))

        self._link.request(correlation, frames.write_connect(correlation, self._connect_body()), answered)

    def _connect_body(self) -> Connect:
        flags = frames.WANT_PRODUCER | (frames.NEW_EPOCH if self._new_epoch else 0)
        return Connect(
            frames.PROTOCOL_VERSION, flags, self._link.client_id, self._link.token, self._producer_id,
            self._producer_epoch, list(self._asked_topics),
        )  # fmt: skip

    def on_answer(self, correlation: int, answer: Answer) -> None:
        found = self._waiting_for.pop(correlation, None)
        if found is not None:
            self._answered(*found, answer)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Refused):
            log.warning("the broker sent a frame of %d bytes; it was skipped", event.size)

    def _answered(self, lane: Lane, batch: Batch, answer: Answer) -> None:
        if answer.code is Code.OK:
            lane.attempts = 0
            lane.in_flight.remove(batch)
            self._finish(batch, answer.offset, None)
            if lane.queue:
                self._send_lane(lane)
            return
        head = lane.in_flight[0] is batch
        if answer.code.retryable and not (answer.code is Code.OUT_OF_ORDER and head and lane.attempts):
            self._retry_later(lane, answer)
        elif answer.code is Code.OUT_OF_ORDER:
            # The broker no longer knows this sequence: begin a new one.
            self._begin_epoch(f"{batch.topic}/{batch.partition}: {answer.code.name}")
        else:
            lane.in_flight.remove(batch)
            self._finish(batch, -1, AnswerError(answer.code, answer.message or _advice(answer.code)))
            if answer.code is not Code.FENCED:
                self._begin_epoch("a batch was refused")

    def _retry_later(self, lane: Lane, answer: Answer) -> None:
        """Send everything of this lane again, in order, once what is under way was answered."""
        if lane.rewinding:
            return
        lane.rewinding = True
        lane.attempts += 1
        pause = min(2.0, RETRY_SECONDS * 2 ** min(lane.attempts, 5))
        if answer.code is not Code.OUT_OF_ORDER:
            log.warning("%s: %s; trying again in %.1f s", answer.code.name, answer.message, pause)
        self._last_error = AnswerError(answer.code, answer.message)

        def again() -> None:
            self._rewind(lane, restart=False)
            self._send_lane(lane)

        self._loop.call_later(pause, again)

    def _begin_epoch(self, why: str) -> None:
        if not self._new_epoch:
            self._new_epoch = True
            log.info("a new producer epoch is needed: %s", why)
            self._loop.call_later(0.0, lambda: self._link.reconnect("a new producer epoch is needed"))

    def _rewind(self, lane: Lane, *, restart: bool) -> None:
        """Put what is in flight back in front; with `restart` the sequence begins at 0."""
        lane.rewinding = False
        for batch in reversed(lane.in_flight):
            self._waiting_for.pop(batch.correlation, None)
            lane.queue.appendleft(batch)
        if restart:
            lane.next_sequence = 0
        elif lane.in_flight:
            lane.next_sequence = lane.in_flight[0].sequence
        lane.in_flight.clear()

    def _finish(self, batch: Batch, offset: int, error: Exception | None) -> None:
        self.acknowledged(batch, offset, error)
        if batch.callbacks is not None:
            self.run_callbacks(batch)
        self._notify()

    def lost(self, reason: str) -> None:
        log.info("connection lost: %s", reason)

    def unreachable(self, error: EdgeBrokerError) -> None:
        if self._last_error is None:
            log.warning("%s; trying again until it works", error)
        self._last_error = error
        if isinstance(error, AnswerError) and not error.code.retryable:
            # The broker will not have this producer: waiting does not help.
            self._fail_all(error)

    def _expire(self) -> None:
        """Fail batches that waited longer than the timeout."""
        self._loop.call_later(1.0, self._expire)
        if self._timeout is None:
            return
        before = self._loop.clock_now() - self._timeout
        failed = False
        for lane in self._lanes.values():
            for queue in (lane.in_flight, lane.queue):
                while queue and queue[0].created < before:
                    batch = queue.popleft()
                    self._waiting_for.pop(batch.correlation, None)
                    failed = failed or batch.correlation >= 0
                    why = f": {self._last_error}" if self._last_error else ""
                    self._finish(
                        batch,
                        -1,
                        UnreachableError(f"no acknowledgement within {self._timeout:g} s, the outcome is unknown{why}"),
                    )
        if failed:
            self._begin_epoch("a batch timed out")

    def _fail_all(self, error: EdgeBrokerError) -> None:
        taken, _ = self.take(self._loop.clock_now())
        for batch in taken:
            self._finish(batch, -1, error)
        for lane in self._lanes.values():
            for batch in [*lane.in_flight, *lane.queue]:
                self._finish(batch, -1, error)
            lane.in_flight.clear()
            lane.queue.clear()


def _closed_error() -> UnreachableError:
    return UnreachableError("the producer was closed; the outcome of this record is unknown")


def _advice(code: Code) -> str:
    if code is Code.FENCED:
        return "another producer with the same client_id began after this one; give each its own client_id"
    return ""


__all__ = ["Producer", "Sent"]
