"""The I/O side of a producer: from open batches to acknowledged ones.

Batches of a partition are sent in order and carry (producer id, epoch, sequence), so that one that is sent again is not
stored twice. Everything here runs on the producer's I/O thread but for the methods under "the caller's side".
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from edgebroker.client import lifetime
from edgebroker.client.arguments import check_time, check_topic
from edgebroker.client.credentials import Credentials
from edgebroker.client.link import Link
from edgebroker.client.publish.accumulator import Accumulator, PendingBatch, TopicBatches
from edgebroker.client.publish.lane import Lane
from edgebroker.client.servers import Servers
from edgebroker.common import codecs, records
from edgebroker.common.errors import (
    AnswerError,
    ArgumentError,
    Code,
    EdgeBrokerError,
    RecordTooLargeError,
    UnreachableError,
)
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import AckLevel
from edgebroker.network.io.loop import Loop
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Event, Refused
from edgebroker.network.wire.frames import Answer, Connect, Grants

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
# What the broker refuses for the moment is said so often, whatever the number of partitions.
SAY_SECONDS = 10.0
# How long a process that ends waits for acknowledgements.
EXIT_SECONDS = 10.0
# What a record may have until the broker has said what it allows.
FIRST_MAX_RECORD = 1 << 20


class Sender:
    """One producer's connection, and what is on its way through it. Owner of the accumulator and of the link."""

    def __init__(
        self,
        servers: Servers,
        *,
        client_id: str,
        credentials: Credentials,
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
        self.loop = Loop(SystemClock(), slow_level=logging.DEBUG)
        self.link = Link(self.loop, servers, client_id, self, credentials=credentials, connect_body=self._connect_body)
        self._producer_id, self._producer_epoch = -1, -1
        # A new producer epoch is needed: nothing new is sent before it is known what of the old one is stored.
        self._renewing = self._reconnecting = False
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._waiting_for: dict[int, tuple[Lane, PendingBatch]] = {}
        self._pumping = self._lingering = False
        self._changed = threading.Condition()
        self._waiters = 0
        self._metadata: dict[str, frames.TopicMetadata] = {}
        self._asked_topics: list[str] = []
        self._partitions: dict[str, int] = {}
        # Topics whose partition count has to be looked up again, and those that have another one now.
        self._doubted: set[str] = set()
        self._moving: dict[str, int] = {}
        # When a refusal may be said again.
        self._said: dict[Code, float] = {}
        # The last failure; one that waiting does not mend.
        self._last_error: EdgeBrokerError | None = None
        self._refusal: EdgeBrokerError | None = None
        self._why_closed = "the producer is closed"
        lifetime.begin(self)
        self.loop.call_soon_threadsafe(self.link.open)
        self.loop.call_later(1.0, self._expire)

    # ---- the caller's side ----

    def flush(self, timeout: float | None) -> None:
        """Send open batches now and wait until none is unacknowledged. Raises TimeoutError."""
        check_time("timeout", timeout)
        if self.accumulator.unacked:
            self._check_open()
        self.loop.call_soon_threadsafe(lambda: self._pump(everything=True))
        self._wait(lambda: self.accumulator.unacked == 0, timeout)

    def close(self) -> None:
        """Fail what is not acknowledged yet, and end the loop."""
        self.accumulator.closed = True
        lifetime.end(self)

        def end() -> None:
            self._fail_all(_closed_error())
            self.link.close()
            self.loop.stop()

        self.loop.call_soon_threadsafe(end)

    def closed(self) -> None:
        """The I/O thread has ended: wake up what still waits for it."""
        self.loop.close()
        self._notify()

    def forked(self) -> None:
        self._why_closed = "the producer was made before the process forked; make another one in this process"
        self.accumulator.closed = True
        self._changed = threading.Condition()
        self.link.forked()

    def ended(self) -> None:
        try:
            self.flush(EXIT_SECONDS)
        except TimeoutError:
            log.error("%d records were not acknowledged when the process ended", self.accumulator.unacked)

    # The accumulator's owner:

    def open_topic(self, name: str) -> TopicBatches:
        """Ask the broker how many partitions a topic has. Raises AnswerError or UnreachableError."""
        self._check_open()
        check_topic(name)
        self._metadata.pop(name, None)

        def ask() -> None:
            if name not in self._asked_topics:
                self._asked_topics.append(name)
            self._ask_metadata()

        self.loop.call_soon_threadsafe(ask)
        try:
            self._wait(lambda: name in self._metadata or self._refusal is not None, self._timeout)
        except TimeoutError:
            raise self._last_error or UnreachableError(f"no broker at {self.link.server} answered in time") from None
        self._check_open()
        if self._refusal is not None:
            raise self._refusal
        found = self._metadata.get(name)
        if found is None:  # another thread asks as well
            return self.open_topic(name)
        if found.partitions == 0:
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
        try:
            return records.encode_headers(headers)
        except UnicodeEncodeError as error:
            raise ArgumentError(f"the name of a header, {error.object!r}, is not text that UTF-8 can hold") from error

    invalid, too_large = ArgumentError, RecordTooLargeError

    def wait_for(self, batch: PendingBatch, timeout: float | None) -> None:
        """Wait for one batch, sending it now."""
        self.loop.call_soon_threadsafe(lambda: self._pump(everything=True))
        self._wait(lambda: batch.done or batch.moved is not None, timeout)
        if not batch.done and batch.moved is None:
            raise _closed_error()

    def run_callbacks(self, batch: PendingBatch) -> None:
        callbacks, batch.callbacks = batch.callbacks, None
        for callback, sent in callbacks or ():
            try:
                callback(sent)
            except BaseException:  # SystemExit as well: this is not the thread to end
                log.exception("a callback of a sent record failed")

    def _check_open(self) -> None:
        if self.accumulator.closed:
            raise ValueError(self._why_closed)

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
            for lane in self._lanes.values():
                if lane.queue:
                    self._send(lane)

    def _enqueue(self, batch: PendingBatch) -> None:
        key = (batch.topic, batch.partition)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(
                batch.topic, frames.publish_prefix(self._level, batch.topic, batch.partition)
            )
        lane.queue.append(batch)

    def _send(self, lane: Lane) -> None:
        """Send what may be sent of a lane."""
        if not self.link.up or not lane.queue:
            return
        if self._level is AckLevel.NONE:
            self._send_unanswered(lane)
            return
        assert self.link.grants is not None
        out: list[bytes] = []
        new = not self._renewing and lane.topic not in self._moving
        for batch in lane.take(self.link.grants.window_batches, new=new):
            out.append(self._frame(lane, batch, self._producer_id, self._producer_epoch, batch.sequence))
            self._waiting_for[batch.correlation] = (lane, batch)
        if out:
            self.link.send(out[0] if len(out) == 1 else b"".join(out))

    def _send_unanswered(self, lane: Lane) -> None:
        """Nothing is sent again, so that nothing needs a sequence: one that is lost would stop all that follow."""
        batches = list(lane.queue)
        lane.queue.clear()
        self.link.send(b"".join(self._frame(lane, batch, -1, -1, -1) for batch in batches))
        for batch in batches:
            self._finish(batch, -1, None)

    def _frame(self, lane: Lane, batch: PendingBatch, producer_id: int, epoch: int, sequence: int) -> bytes:
        packed = codecs.deflate(self._codec, batch.records()) if self._codec else None
        return batch.frame(self.link.next_correlation(), lane.prefix, producer_id, epoch, sequence, self._codec, packed)

    # The link's owner:

    def connected(self, grants: Grants) -> None:
        self._last_error = self._refusal = None
        self.accumulator.limit_to(grants.max_record, grants.max_batch)
        epoch_before = (self._producer_id, self._producer_epoch)
        self._producer_id, self._producer_epoch = grants.producer_id, grants.producer_epoch
        if (grants.producer_id, grants.producer_epoch) != epoch_before:
            self._renewing = False
            for lane in self._lanes.values():
                lane.begin_epoch()
        self._learn(grants, fresh=True)
        self._pump()
        self._try_renew()

    def on_answer(self, correlation: int, answer: Answer) -> None:
        found = self._waiting_for.pop(correlation, None)
        if found is not None:
            self._answered(*found, answer)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Refused):
            log.warning("the broker sent a frame of %d bytes; it was skipped", event.size)

    def disconnected(self, reason: str) -> None:
        self._waiting_for.clear()
        self._doubted.clear()
        self._reconnecting = False
        for lane in self._lanes.values():
            lane.settle(connected=False)
            self._renewing = self._renewing or lane.needs_epoch
        log.info("connection lost: %s", reason)

    def connect_failed(self, error: EdgeBrokerError, permanent: bool) -> None:
        if self._last_error is None and not permanent:
            log.warning("%s; retrying until the broker answers", error)
        self._last_error = error
        if permanent:
            self._refusal = error
            self._fail_all(error)
            self._notify()

    # Topics and their partition counts:

    def _learn(self, grants: Grants, *, fresh: bool = False) -> None:
        """What the broker says about topics. `fresh`: nothing was sent over this connection yet. What was sent before
        is then stored in partitions that are no more, if at all: a broker ends connections when a topic is deleted."""
        for topic in grants.topics:
            name, known = topic.name, self._partitions.get(topic.name)
            self._metadata[name] = topic
            if name in self._asked_topics:
                self._asked_topics.remove(name)
            self._moving.pop(name, None)
            if known is None and topic.partitions:
                self._partitions[name] = topic.partitions
            elif known is not None and not topic.partitions:
                # Its next record asks again.
                self.accumulator.repartition(name, 0)
            elif known is not None and known != topic.partitions:
                self._moving[name] = topic.partitions
                for lane in self._lanes_of(name) if fresh else ():
                    lane.begin_epoch()
            if name in self._doubted:
                self._doubted.remove(name)
                self._no_longer_doubted(name)
        for name in sorted(self._moving):
            self._try_move(name)
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

        connect = self._connect(0, self._asked_topics)
        self.link.request(correlation, frames.write_connect(correlation, connect), answered)

    def _connect_body(self) -> Connect:
        """What a connection begins with. A topic may have been made anew meanwhile, with other partitions."""
        in_use = [name for name in self._partitions if name not in self._asked_topics]
        return self._connect(frames.NEW_EPOCH if self._renewing and self._resolved else 0, self._asked_topics + in_use)

    def _connect(self, flags: int, topics: list[str]) -> Connect:
        return Connect(
            frames.PROTOCOL_VERSION, frames.WANT_PRODUCER | flags, self.link.client_id, self.link.token,
            self._producer_id, self._producer_epoch, topics[: frames.MOST_TOPICS],
        )  # fmt: skip

    def _doubt(self, topic: str) -> None:
        """The broker does not know a partition: is the topic gone, or has it other partitions now?"""
        if topic not in self._doubted:
            self._doubted.add(topic)
            self._asked_topics.append(topic)
            self._ask_metadata()

    def _no_longer_doubted(self, topic: str) -> None:
        for lane in self._lanes_of(topic):
            for batch in list(lane.in_flight):
                if batch.answer is not None and batch.answer.code is Code.UNKNOWN_TOPIC and topic not in self._moving:
                    lane.dropped(batch)
                    self._finish(batch, -1, AnswerError(batch.answer.code, batch.answer.message))
            self._settle(lane)

    def _lanes_of(self, topic: str) -> list[Lane]:
        return [self._lanes[key] for key in sorted(self._lanes) if key[0] == topic]

    def _try_move(self, topic: str) -> None:
        """Put what is not stored into the partitions that a topic has now, once it is known what is not."""
        if not all(lane.resolved for lane in self._lanes_of(topic)):
            return
        partitions = self._partitions[topic] = self._moving.pop(topic)
        log.warning("topic %s has another number of partitions now: %d", topic, partitions)
        self.accumulator.repartition(topic, partitions)
        for batch in self.accumulator.take(0.0)[0]:
            self._enqueue(batch)
        batches: list[PendingBatch] = []
        for lane in self._lanes_of(topic):
            batches += lane.queue
            lane.queue.clear()
        self._lanes = {key: lane for key, lane in self._lanes.items() if key[0] != topic}
        for batch in batches:
            if not batch.chosen:
                for moved in self.accumulator.move(batch, partitions):
                    self._enqueue(moved)
            elif batch.partition < partitions:
                batch.sequence, batch.sendings = -1, 0
                self._enqueue(batch)
            else:
                message = f"topic {topic} has no partition {batch.partition} any more; it has {partitions} now"
                self._finish(batch, -1, AnswerError(Code.UNKNOWN_TOPIC, message))
        self._notify()
        self._renew("a topic has other partitions")

    # Answers:

    def _answered(self, lane: Lane, batch: PendingBatch, answer: Answer) -> None:
        if answer.code is Code.OK:
            lane.stored(batch)
            self._finish(batch, answer.offset, None)
        elif answer.code.retryable:
            lane.returned(batch, answer)
        elif answer.code is Code.UNKNOWN_TOPIC:
            lane.returned(batch, answer)
            self._doubt(batch.topic)
        else:
            if answer.code is Code.FENCED:
                lane.fenced(batch)
            else:
                lane.dropped(batch)
            self._finish(batch, -1, AnswerError(answer.code, answer.message or _advice(answer.code)))
        self._settle(lane)

    def _settle(self, lane: Lane) -> None:
        """Go on with a lane, if it can."""
        if lane.unsettled:
            if lane.unanswered or any(batch.topic in self._doubted for batch in lane.in_flight):
                return
            refusals = [batch.answer for batch in lane.in_flight if batch.answer is not None]
            if lane.settle(connected=self.link.up):
                self._pause(lane, refusals[0])
            if lane.needs_epoch:
                self._renew("whether a batch is stored is unknown")
        self._send(lane)
        if self._moving:
            for topic in sorted(self._moving):
                self._try_move(topic)
        if self._renewing:
            self._try_renew()

    def _pause(self, lane: Lane, refusal: Answer) -> None:
        """The broker asked to try again."""
        lane.paused = True
        seconds = min(2.0, RETRY_SECONDS * 2 ** min(lane.attempts, 5))
        now = self.loop.now()
        if refusal.code is not Code.OUT_OF_ORDER and now >= self._said.get(refusal.code, 0.0):
            self._said[refusal.code] = now + SAY_SECONDS
            why = refusal.message or _advice(refusal.code)
            log.warning("topic %s: %s; its records are kept, and sent until they are stored", lane.topic, why)
        self._last_error = AnswerError(refusal.code, refusal.message)

        def again() -> None:
            lane.paused = False
            self._send(lane)

        self.loop.call_later(seconds, again)

    @property
    def _resolved(self) -> bool:
        return all(lane.resolved for lane in self._lanes.values())

    def _renew(self, why: str) -> None:
        """Begin a new producer epoch as soon as nothing is in doubt: what is in flight would be stored twice."""
        if not self._renewing:
            self._renewing = True
            log.info("a new producer epoch is needed: %s", why)
        self._try_renew()

    def _try_renew(self) -> None:
        if self._renewing and self.link.up and not self._reconnecting and self._resolved:
            self._reconnecting = True
            self.loop.call_later(0.0, lambda: self.link.reconnect("a new producer epoch is needed"))

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
        for lane in list(self._lanes.values()):
            for batch in [*lane.in_flight, *lane.queue]:
                if batch.created >= before:
                    break
                self._waiting_for.pop(batch.correlation, None)
                lane.dropped(batch, unknown=True)
                self._finish(batch, -1, UnreachableError(self._why_late(batch)))
        for lane in list(self._lanes.values()):
            self._settle(lane)

    def _why_late(self, batch: PendingBatch) -> str:
        why = f": {self._last_error}" if self._last_error else ""
        if batch.sendings:
            return f"no acknowledgement within {self._timeout:g} s, the outcome is unknown{why}"
        return f"it could not be sent within {self._timeout:g} s{why}"

    def _fail_all(self, error: EdgeBrokerError) -> None:
        taken, _ = self.accumulator.take(self.loop.clock_now())
        lanes, self._lanes = self._lanes, {}
        self._waiting_for.clear()
        for batch in [*taken, *(batch for lane in lanes.values() for batch in (*lane.in_flight, *lane.queue))]:
            self._finish(batch, -1, error)


def _closed_error() -> UnreachableError:
    return UnreachableError("the producer was closed; the outcome of this record is unknown")


def _advice(code: Code) -> str:
    if code is Code.FENCED:
        return "another producer with the same client_id started after this one; give each its own client_id"
    if code is Code.DISK_FULL:
        return "the broker has no space on its disk"
    if code is Code.OVERLOADED:
        return "the broker takes no more at the moment"
    return f"the broker answered {code.name}"
