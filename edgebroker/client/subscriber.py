"""The I/O side of a consumer: what it holds, what arrived for it, and what it has to say to the broker.

Everything here runs on the consumer's I/O thread but for the methods under "the caller's side". Both sides share
`places` and `arrived`, under the lock of `ready`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Condition

from edgebroker.client.link import Link
from edgebroker.common.clock import SystemClock
from edgebroker.common.errors import AnswerError, Code, EdgeBrokerError
from edgebroker.common.types import Position, Start, TopicPartition
from edgebroker.network.io.loop import Loop, TimerHandle
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Event, Frame
from edgebroker.network.wire.frames import (
    AckKind,
    Answer,
    Assigned,
    ConsumerAck,
    Deliver,
    FrameType,
    Grants,
    Holding,
    Intent,
    Reset,
    Subscribe,
    Wanted,
)

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.02
# After a delivery that was damaged: the broker may have to fetch it first.
DAMAGED_SECONDS = 1.0
LEAVE_SECONDS = 1.0
NOBODYS_LOG_ID = b"\xff" * 16


class PartitionState:
    """Where this consumer stands in one partition.

    acked <= handed <= expected: acknowledged, handed to the caller, arrived. `awaiting` is the SUBSCRIBE whose answer
    must come before anything of the partition counts again (-1: not sent yet). `leaving`: the broker takes it back,
    `revoking`: and still waits for what was handed out. `kept`: the place is the caller's own
    and wins over what the group committed. `passed` are ranges without a record for the handler; they are acknowledged
    together with the last record before them.
    """

    __slots__ = (
        "acked", "asked", "awaiting", "epoch", "expected", "generation", "handed", "held", "kept", "lease", "leaving",
        "log_id", "old_lease", "parked", "passed", "paused", "refreshing", "resuming", "revoking", "stored", "wanted",
    )  # fmt: skip

    def __init__(self, wanted: Wanted | None = None) -> None:
        self.wanted = wanted
        self.kept = wanted is not None and wanted.start is Start.POSITION
        self.log_id, self.epoch = (wanted.log_id, wanted.epoch) if wanted is not None else (frames.NO_LOG_ID, -1)
        self.generation = self.lease = 0
        self.old_lease = (0, 0)
        self.refreshing = False
        self.acked = self.handed = self.expected = self.stored = -1
        self.awaiting = self.asked = 0
        self.held = self.leaving = self.resuming = self.revoking = self.paused = False
        self.passed: deque[tuple[int, int]] = deque()
        self.parked: deque[Arrived] = deque()

    def void(self) -> None:
        """The lease is over; nothing that was pushed under it counts any more."""
        if self.lease:
            self.old_lease = (self.generation, self.lease)
        self.lease = 0
        self.passed.clear()
        self.parked.clear()


@dataclass(slots=True)
class Arrived:
    """One DELIVER, undecoded, and when it came."""

    deliver: Deliver
    batches: bytes
    at: float


@dataclass(slots=True)
class Notice:
    """A partition was assigned, is being revoked, or was revoked; `late`: after a REVOKING that was not followed."""

    holding: Holding
    partition: TopicPartition
    late: bool = False


Item = Arrived | Notice | Reset | EdgeBrokerError


class Subscriber:
    """One member of a group (of none, for an empty name)."""

    def __init__(
        self,
        server: str,
        client_id: str,
        token: bytes,
        group: str,
        topics: Sequence[str],
        start: tuple[Start, int],
        positions: Mapping[tuple[str, int], Position],
        window: tuple[int, int],
    ) -> None:
        self._group, self._topics, self._start, self._window = group, list(topics), start, window
        self.places: dict[TopicPartition, PartitionState] = {}
        for (topic, partition), place in positions.items():
            if topic not in topics:
                continue  # kept for another consumer
            wanted = Wanted(topic, partition, Start.POSITION, place.log_id, place.epoch, place.next_offset)
            self.places[TopicPartition(topic, partition)] = PartitionState(wanted)
        self.arrived: deque[Item] = deque()
        self.ready = Condition()
        self.durable_ends: dict[TopicPartition, int] = {}
        self.loop = Loop(SystemClock())
        self.link = Link(self.loop, server, client_id, self, token=token)
        self.down_since: float | None = self.loop.clock_now()
        self.last_error: EdgeBrokerError | None = None
        self.closed = False
        self._joined = False
        self._asked: dict[int, PartitionState] = {}
        self._paused_timer: TimerHandle | None = None
        self.loop.call_soon_threadsafe(self.link.open)

    # ---- the caller's side ----

    def acknowledge(self, key: TopicPartition, next_offset: int) -> bool:
        """Everything before next_offset is done. False when it is not about records handed out under this lease."""
        with self.ready:
            place = self.places.get(key)
            if place is None or next_offset > place.handed:
                return False
            passed = place.passed
            while passed and next_offset >= passed[0][0]:
                next_offset = max(next_offset, passed.popleft()[1])
            if next_offset <= place.acked:
                return True
            place.acked = next_offset
        self.loop.call_soon_threadsafe(lambda: self._acknowledge(key, place))
        return True

    def passed(self, key: TopicPartition, first: int, following: int) -> None:
        """There is no record for the handler in [first, following)."""
        with self.ready:
            place = self.places[key]
            place.passed.append((first, following))
            done = place.acked
        self.acknowledge(key, done)

    def refuse(self, key: TopicPartition, offset: int, reason: str) -> None:
        """The record at this offset could not be handled: it is delivered again, after a pause, and alone."""
        with self.ready:
            place = self.places.get(key)
            if place is None or not place.lease or not place.acked <= offset < place.handed:
                return
            place.acked = offset
            ack = ConsumerAck(AckKind.NEGATIVE, *key, place.generation, place.lease, offset, reason)
            place.handed = offset
            place.void()
            self._drop(key)
        self._post(frames.write_consumer_ack(0, ack))

    def deliver_again(self, key: TopicPartition, first: int, why: str) -> None:
        """What was delivered from `first` on cannot be read: neither that nor anything behind it is handed out, and
        the broker delivers again what is not acknowledged. On another connection, for it checks what it sends then."""
        with self.ready:
            place = self.places[key]
            place.handed = first
            place.void()
            self._drop(key)
        log.warning("%s; asking for it again", why)
        self.loop.call_soon_threadsafe(lambda: self.link.reconnect(why, DAMAGED_SECONDS))

    def appeared(self, key: TopicPartition) -> None:
        """Tell the broker, which took a partition away for silence, that this member is there: by a stale ACK."""
        with self.ready:
            generation, lease = self.places[key].old_lease
        ack = ConsumerAck(AckKind.IN_PROGRESS, *key, generation, lease, 0)
        self._post(frames.write_consumer_ack(0, ack))

    def in_progress(self, *, paused: bool = False) -> None:
        """The handler is busy with what it was handed: the broker shall wait on."""
        with self.ready:
            data = [
                frames.write_consumer_ack(
                    0, ConsumerAck(AckKind.IN_PROGRESS, *key, place.generation, place.lease, place.acked)
                )
                for key, place in self.places.items()
                if place.lease and (place.paused if paused else place.handed > place.acked)
            ]
        if data:
            self._post(b"".join(data))

    def seek(self, wanted: Wanted) -> None:
        """Begin elsewhere in one partition: nothing that was pushed so far counts any more."""
        key = TopicPartition(wanted.topic, wanted.partition)
        with self.ready:
            place = self.places.get(key)
            if place is None:
                place = self.places[key] = PartitionState()
            place.wanted = wanted
            place.acked = place.handed = -1
            place.void()
            place.awaiting = -1
            self._drop(key)
        self.loop.call_soon_threadsafe(lambda: self._subscribe([wanted]))

    def returned(self, key: TopicPartition) -> None:
        """Release a partition that is being revoked, once all that was handed out of it is acknowledged."""
        with self.ready:
            place = self.places[key]
            if not place.revoking or place.acked < place.handed:
                return
            place.revoking = False
            line = Wanted(*key, Start.COMMITTED, frames.NO_LOG_ID, -1, 0)
        self.loop.call_soon_threadsafe(lambda: self._tell_group(Intent.RELEASE, [line]))

    def refreshed(self, key: TopicPartition) -> None:
        """The refresh of a partition is over."""
        with self.ready:
            self.places[key].refreshing = False

    def set_paused(self, key: TopicPartition, paused: bool) -> None:
        with self.ready:
            place = self.places.setdefault(key, PartitionState())
            place.paused = paused
            if not paused:
                self.arrived.extendleft(reversed(place.parked))
                place.parked.clear()
                self.ready.notify()

    def confirm(self, done: Callable[[], None]) -> None:
        """Have everything acknowledged so far confirmed as stored; done is called on the I/O thread."""
        with self.ready:
            targets = {
                key: place.acked
                for key, place in self.places.items()
                if place.acked > place.stored and (place.held or place.resuming)
            }
        self.loop.call_soon_threadsafe(lambda: self._confirm(targets, done))

    def request(self, write: Callable[[int], bytes], done: Callable[[Answer | None], None]) -> None:
        """Send something that is answered; done gets the answer on the I/O thread, None when it cannot be sent."""

        def send() -> None:
            correlation = self.link.next_correlation()
            if not self.link.request(correlation, write(correlation), lambda answer, body: done(answer)):
                done(None)

        self.loop.call_soon_threadsafe(send)

    def close(self) -> None:
        """Leave the group and end the I/O thread; what was acknowledged before is sent first."""
        with self.ready:
            self.closed = True
            self.ready.notify_all()

        def end() -> None:
            self.link.close()
            self.loop.stop()

        def leave() -> None:
            lines = [Wanted(topic, -1, Start.COMMITTED, frames.NO_LOG_ID, -1, 0) for topic in self._topics]
            if self.link.up:
                self._tell_group(Intent.LEAVE, lines, end)
                self.loop.call_later(LEAVE_SECONDS, end)
            else:
                end()

        self.loop.call_soon_threadsafe(leave)

    def _post(self, data: bytes) -> None:
        def send() -> None:
            self.link.send(data)

        self.loop.call_soon_threadsafe(send)

    # ---- the I/O thread: speaking ----

    def _acknowledge(self, key: TopicPartition, place: PartitionState) -> None:
        if place.lease:
            ack = ConsumerAck(AckKind.CUMULATIVE, *key, place.generation, place.lease, place.acked)
            self.link.send(frames.write_consumer_ack(0, ack))
        if place.revoking:
            self.returned(key)

    def _confirm(self, targets: dict[TopicPartition, int], done: Callable[[], None]) -> None:
        for key, wanted in list(targets.items()):
            place = self.places[key]
            moved = place.acked < wanted or not (place.held or place.resuming)
            if place.stored >= wanted or moved:
                del targets[key]
            elif self.link.up and place.lease and not place.asked:
                place.asked = self.link.next_correlation()
                self._asked[place.asked] = place
                ack = ConsumerAck(AckKind.CUMULATIVE, *key, place.generation, place.lease, place.acked)
                self.link.send(frames.write_consumer_ack(place.asked, ack))
        if not targets or self.closed:
            done()
        else:
            self.loop.call_later(RETRY_SECONDS, lambda: self._confirm(targets, done))

    def _subscribe(self, wanted: list[Wanted]) -> None:
        correlation = self.link.next_correlation()
        data = frames.write_subscribe(correlation, Subscribe(Intent.JOIN, self._group, *self._window, wanted))
        for line in wanted:
            place = self.places.get(TopicPartition(line.topic, line.partition))
            if place is not None:
                place.awaiting = correlation
        self.link.request(correlation, data, lambda answer, body: self._on_state(correlation, answer), once=False)

    def _tell_group(self, intent: Intent, lines: list[Wanted], answered: Callable[[], None] = lambda: None) -> None:
        """Leave, or release what is being revoked."""
        correlation = self.link.next_correlation()
        data = frames.write_subscribe(correlation, Subscribe(intent, self._group, 0, 0, lines))
        self.link.request(correlation, data, lambda answer, body: answered())

    def _keep_paused(self, seconds: float) -> None:
        """What waits in paused partitions is not overdue."""
        self.in_progress(paused=True)
        self._paused_timer = self.loop.call_later(seconds, lambda: self._keep_paused(seconds))

    # ---- the I/O thread: listening ----

    def connected(self, grants: Grants) -> None:
        self.down_since, self.last_error = None, None
        # A partition that this member never held goes on where its group was put by the first SUBSCRIBE.
        kind, value = (Start.COMMITTED, 0) if self._joined and self._group else self._start
        wanted = [Wanted(topic, -1, kind, frames.NO_LOG_ID, -1, value) for topic in self._topics]
        with self.ready:
            # The broker takes the last line about a partition.
            wanted += [line for key, place in self.places.items() if (line := self._resumed(key, place)) is not None]
        self._subscribe(wanted)
        if self._paused_timer is None:
            self._keep_paused(grants.delivery_ms / 3000)

    def _resumed(self, key: TopicPartition, place: PartitionState) -> Wanted | None:
        """Where to go on after a reconnect: behind what was acknowledged here, unless another member went on since."""
        if place.refreshing and not self._group:
            # The broker has forgotten the refresh of a reader of its own: no log is its own, so it gets another.
            return Wanted(*key, Start.POSITION, NOBODYS_LOG_ID, -1, 0)
        if place.acked < 0:
            return place.wanted
        kind = Start.POSITION if place.kept or not self._group else Start.RESUME
        return Wanted(*key, kind, place.log_id, place.epoch, place.acked) if place.resuming else None

    def _on_state(self, correlation: int, answer: Answer) -> None:
        if answer.code is Code.OK:
            self._joined = True
            with self.ready:
                for place in self.places.values():
                    if place.awaiting == correlation:
                        place.awaiting = 0
        elif answer.code.retryable:
            log.warning("%s: %s", answer.code.name, answer.message)
        else:
            self._put(AnswerError(answer.code, answer.message))

    def on_answer(self, correlation: int, answer: Answer) -> None:
        place = self._asked.pop(correlation, None)
        if place is not None and place.asked == correlation:
            place.asked = 0
            if answer.code is Code.OK:
                place.stored = max(place.stored, answer.offset)

    def on_event(self, event: Event) -> None:
        if not isinstance(event, Frame):
            self.link.reconnect("the broker sent a frame that is too large, or of a kind it must not send")
        elif event.type == FrameType.DELIVER:
            self._on_deliver(event)
        elif event.type == FrameType.SUBSCRIBE:
            self._on_assigned(frames.read_assigned(event.body))
        elif event.type == FrameType.HEARTBEAT:
            for topic, partition, end in frames.read_heartbeat(event.body):
                self.durable_ends[TopicPartition(topic, partition)] = end
        elif event.type == FrameType.RESET:
            self._on_reset(frames.read_reset(event.body))

    def _on_assigned(self, assigned: Assigned) -> None:
        for line in assigned.lines:
            key = TopicPartition(line.topic, line.partition)
            with self.ready:
                place = self.places.setdefault(key, PartitionState())
                if place.awaiting:
                    continue  # sent before the broker heard of the seek
                self._drop(key)
                if line.holding is Holding.ASSIGNED:
                    if not place.held:
                        self.arrived.append(Notice(Holding.ASSIGNED, key))
                    place.void()
                    place.held, place.leaving, place.revoking, place.resuming = True, False, False, False
                    place.lease, place.generation = line.lease, assigned.generation
                    place.acked = place.handed = place.expected = line.offset
                    place.stored = -1
                elif line.holding is Holding.REVOKING:
                    place.leaving = place.revoking = True
                    place.parked.clear()
                    self.arrived.append(Notice(Holding.REVOKING, key))
                else:
                    self._lose(key, place)
                self.ready.notify()

    def _lose(self, key: TopicPartition, place: PartitionState) -> None:
        if place.held and (not place.leaving or place.revoking):
            self.arrived.append(Notice(Holding.REVOKED, key, late=place.leaving))
        place.held = place.leaving = place.revoking = False
        if place.refreshing:
            # Its place is one in a staging store. A group's refresh is announced to whoever holds the partition next.
            place.acked = place.handed = -1
            place.refreshing = not self._group
        place.void()

    def _on_reset(self, reset: Reset) -> None:
        key = TopicPartition(reset.topic, reset.partition)
        with self.ready:
            place = self.places.setdefault(key, PartitionState())
            place.void()
            place.log_id, place.epoch = reset.log_id, -1
            place.acked = place.handed = -1  # what was acknowledged before is of other data
            place.refreshing = True
            self._drop(key)
            self.arrived.append(reset)
            self.ready.notify()

    def _on_deliver(self, event: Frame) -> None:
        deliver = frames.read_deliver(event.body)
        key = TopicPartition(deliver.topic, deliver.partition)
        self.durable_ends[key] = deliver.durable_end
        with self.ready:
            place = self.places.get(key)
            if place is None or place.awaiting or deliver.lease != place.lease or place.leaving:
                return
            if deliver.first != place.expected:
                self.link.reconnect(f"{deliver.topic}/{deliver.partition}: offset {place.expected} was expected next")
                return
            place.log_id, place.epoch = deliver.log_id, deliver.epoch
            place.expected = deliver.last + 1
            self.arrived.append(Arrived(deliver, bytes(event.body[deliver.batches_start :]), self.loop.now()))
            self.ready.notify()

    def lost(self, reason: str) -> None:
        with self.ready:
            self.down_since = self.loop.clock_now()
            self._asked.clear()
            for key, place in self.places.items():
                place.resuming = place.resuming or place.held
                place.asked = place.awaiting = 0
                self._lose(key, place)
            self.arrived = deque(item for item in self.arrived if isinstance(item, Notice | EdgeBrokerError))
            self.ready.notify()
        log.info("connection lost: %s", reason)

    def unreachable(self, error: EdgeBrokerError) -> None:
        self.last_error = error

    def _put(self, item: Item) -> None:
        with self.ready:
            self.arrived.append(item)
            self.ready.notify()

    def _drop(self, key: TopicPartition) -> None:
        """Forget what arrived of a partition and was not handed out (under the lock)."""
        self.arrived = deque(
            item
            for item in self.arrived
            if not isinstance(item, Arrived) or (item.deliver.topic, item.deliver.partition) != key
        )
