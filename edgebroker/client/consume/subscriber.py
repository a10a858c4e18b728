"""The I/O side of a consumer: the partitions that it holds, what it has received, and what it sends.

Everything here runs on the consumer's I/O thread but for the methods under "the caller's side". Both sides share
`partitions` and `incoming`, under the lock of `changed`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from threading import Condition

from edgebroker.client import lifetime
from edgebroker.client.consume.missing_topics import MissingTopics
from edgebroker.client.consume.partition_state import AssignmentChange, Incoming, PartitionState, ReceivedDelivery
from edgebroker.client.credentials import Credentials
from edgebroker.client.link import Link
from edgebroker.client.servers import Servers
from edgebroker.common.errors import AnswerError, Code, EdgeBrokerError
from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, Holding, Wanted
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import Position, Start, TopicPartition
from edgebroker.network.io.loop import Loop, TimerHandle
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Event, Frame
from edgebroker.network.wire.frames import Answer, Assigned, FrameType, Grants, Intent, Reset, Subscribe

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.02
# After a damaged delivery: the broker may have to repair it first.
DAMAGED_SECONDS = 1.0
LEAVE_SECONDS = 1.0
REFUSED_SECONDS = 5.0
# The broker is told so often what is applied.
APPLIED_SECONDS = 0.2
# A broker may be so long behind a position before another one is tried.
BEHIND_SECONDS = 30.0
UNKNOWN_LOG_ID = b"\xff" * 16


class Subscriber:
    """One member of a group (of none, for an empty name)."""

    def __init__(
        self,
        servers: Servers,
        *,
        client_id: str,
        credentials: Credentials,
        group: str,
        topics: Sequence[str],
        start: tuple[Start, int],
        positions: Mapping[tuple[str, int], Position],
        window: tuple[int, int],
        wait_for_topics: bool,
    ) -> None:
        self._group, self._topics, self._start, self._window = group, list(topics), start, window
        self.partitions: dict[TopicPartition, PartitionState] = {}
        for (topic, partition), position in positions.items():
            if topic not in topics:
                continue  # kept for another consumer
            wanted = Wanted(topic, partition, Start.POSITION, position.log_id, position.epoch, position.next_offset)
            self.partitions[TopicPartition(topic, partition)] = PartitionState(wanted)
        self.incoming: deque[Incoming] = deque()
        self.changed = Condition()
        self.durable_ends: dict[TopicPartition, int] = {}
        self.loop = Loop(SystemClock(), slow_level=logging.DEBUG)
        self.link = Link(self.loop, servers, client_id, self, credentials=credentials)
        self.down_since: float | None = self.loop.clock_now()
        self.last_error: EdgeBrokerError | None = None
        self.closed = False
        # It belongs to the process that this one was forked from.
        self.orphaned = False
        # Topics that were subscribed to; the subscriptions that this connection accepted, and those that it refused for
        # a moment; topics that are not there.
        self._joined: set[str] = set()
        self._accepted: set[int] = set()
        self._refused: set[int] = set()
        self._missing = MissingTopics(self.loop, self.link, self._found, self._put) if wait_for_topics else None
        # Nothing was ever acknowledged; partitions that were waiting for it at the last heartbeat.
        self._never_acked = True
        self._waiting: set[TopicPartition] = set()
        # The broker is about to be told what is applied.
        self._telling = False
        self._asked: dict[int, PartitionState] = {}
        self._paused_timer: TimerHandle | None = None
        lifetime.begin(self)
        self.loop.call_soon_threadsafe(self.link.open)

    # ---- the caller's side ----

    def acknowledge(self, key: TopicPartition, next_offset: int) -> bool:
        """Everything before next_offset is done. False when it is not about records handed out under this lease."""
        with self.changed:
            state = self.partitions.get(key)
            if state is None or next_offset > state.handed_out:
                return False
            skipped = state.skipped
            while skipped and next_offset >= skipped[0][0]:
                next_offset = max(next_offset, skipped.popleft()[1])
            if next_offset <= state.acked:
                return True
            state.acked, self._never_acked = next_offset, False
        self.loop.call_soon_threadsafe(lambda: self._acknowledge(key, state))
        return True

    def skip(self, key: TopicPartition, first: int, end: int) -> None:
        """There is no record for the handler in [first, end)."""
        with self.changed:
            state = self.partitions[key]
            state.skipped.append((first, end))
            done = state.acked
        self.acknowledge(key, done)

    def nack(self, key: TopicPartition, offset: int, reason: str, kind: AckKind = AckKind.NEGATIVE) -> None:
        """The record at this offset could not be handled: it is delivered again, after a pause, and isolated. REJECT:
        it is made a dead letter."""
        with self.changed:
            state = self.partitions.get(key)
            if state is None or not state.lease or not state.acked <= offset < state.handed_out:
                return
            state.acked = offset
            ack = ConsumerAck(kind, *key, state.generation, state.lease, offset, reason)
            state.handed_out = offset
            state.end_lease()
            self._drop(key)
        self._post(frames.write_consumer_ack(0, ack))

    def deliver_again(self, key: TopicPartition, first: int, why: str) -> None:
        """What was delivered from `first` on cannot be read: none of it is handed out, and the broker delivers again
        what is not acknowledged. Over a new connection: the broker checks first what it sends there."""
        with self.changed:
            state = self.partitions[key]
            state.handed_out = first
            state.end_lease()
            self._drop(key)
        log.warning("%s; asking for it again", why)
        self.loop.call_soon_threadsafe(lambda: self.link.reconnect(why, DAMAGED_SECONDS))

    def report_presence(self, key: TopicPartition) -> None:
        """Send a stale ACK to the broker, which revoked a partition as unresponsive: this member is there again."""
        with self.changed:
            generation, lease = self.partitions[key].old_lease
        ack = ConsumerAck(AckKind.IN_PROGRESS, *key, generation, lease, 0)
        self._post(frames.write_consumer_ack(0, ack))

    def in_progress(self, *, paused: bool = False) -> None:
        """Extend the delivery timeout of what was handed out, or of what waits in paused partitions."""
        with self.changed:
            data = [
                frames.write_consumer_ack(
                    0, ConsumerAck(AckKind.IN_PROGRESS, *key, state.generation, state.lease, state.acked)
                )
                for key, state in self.partitions.items()
                if state.lease and (state.paused if paused else state.handed_out > state.acked)
            ]
        if data:
            self._post(b"".join(data))

    def seek(self, wanted: Wanted) -> None:
        """Start elsewhere in one partition: nothing that was delivered so far counts any more."""
        key = TopicPartition(wanted.topic, wanted.partition)
        with self.changed:
            state = self.partitions.get(key)
            if state is None:
                state = self.partitions[key] = PartitionState()
            state.wanted = wanted
            state.acked = state.handed_out = -1
            state.end_lease()
            state.awaiting = -1
            self._drop(key)
        self.loop.call_soon_threadsafe(lambda: self._subscribe([wanted]))

    def release_revoked(self, key: TopicPartition) -> None:
        """Release a partition that is being revoked, once all that was handed out of it is acknowledged."""
        with self.changed:
            state = self.partitions[key]
            if not state.revoking or state.acked < state.handed_out:
                return
            state.revoking = False
            line = Wanted(*key, Start.COMMITTED, NO_LOG_ID, -1, 0)
        self.loop.call_soon_threadsafe(lambda: self._send_intent(Intent.RELEASE, [line]))

    def end_refresh(self, key: TopicPartition) -> None:
        """The refresh of a partition is over."""
        with self.changed:
            self.partitions[key].refreshing = False

    def report_applied(self, key: TopicPartition, next_offset: int) -> None:
        """Readers of what the caller has stored see everything before next_offset."""
        with self.changed:
            self.partitions.setdefault(key, PartitionState()).applied = next_offset
            told, self._telling = self._telling, True
        if not told:
            self.loop.call_soon_threadsafe(self._tell_applied_later)

    def set_paused(self, key: TopicPartition, paused: bool) -> None:
        with self.changed:
            state = self.partitions.setdefault(key, PartitionState())
            state.paused = paused
            if not paused:
                self.incoming.extendleft(reversed(state.parked))
                state.parked.clear()
                self.changed.notify()

    def confirm(self, done: Callable[[], None]) -> None:
        """Call `done`, on the I/O thread, once the broker has stored everything acknowledged so far."""
        with self.changed:
            targets = {
                key: state.acked
                for key, state in self.partitions.items()
                if state.acked > state.stored and (state.held or state.resuming)
            }
        self.loop.call_soon_threadsafe(lambda: self._confirm(targets, done))

    def request(self, write: Callable[[int], bytes], done: Callable[[Answer | None], None]) -> None:
        """Send a request; `done` gets the answer on the I/O thread, None when it cannot be sent."""

        def send() -> None:
            correlation = self.link.next_correlation()
            if not self.link.request(correlation, write(correlation), lambda answer, body: done(answer)):
                done(None)

        self.loop.call_soon_threadsafe(send)

    def close(self) -> None:
        """Leave the group and end the I/O thread; what was acknowledged before is sent first. A second call does
        nothing."""
        if self.closed:
            return
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        lifetime.end(self)

        def end() -> None:
            self.link.close()
            self.loop.stop()

        def leave() -> None:
            lines = [Wanted(topic, -1, Start.COMMITTED, NO_LOG_ID, -1, 0) for topic in self._topics]
            if self.link.up:
                self._send_intent(Intent.LEAVE, lines, end)
                self.loop.call_later(LEAVE_SECONDS, end)
            else:
                end()

        self.loop.call_soon_threadsafe(leave)

    def forked(self) -> None:
        self.closed = self.orphaned = True
        self.changed = Condition()
        self.link.forked()

    def ended(self) -> None:
        """What is not acknowledged is delivered again; the end of the connection leaves the group."""

    def _post(self, data: bytes) -> None:
        def send() -> None:
            self.link.send(data)

        self.loop.call_soon_threadsafe(send)

    # ---- the I/O thread: sending ----

    def run(self) -> None:
        """The I/O thread, until close()."""
        self.loop.run()
        self.loop.close()

    def _acknowledge(self, key: TopicPartition, state: PartitionState) -> None:
        if state.lease:
            ack = ConsumerAck(AckKind.CUMULATIVE, *key, state.generation, state.lease, state.acked)
            self.link.send(frames.write_consumer_ack(0, ack))
        if state.revoking:
            self.release_revoked(key)

    def _confirm(self, targets: dict[TopicPartition, int], done: Callable[[], None]) -> None:
        for key, wanted in list(targets.items()):
            state = self.partitions[key]
            moved = state.acked < wanted or not (state.held or state.resuming)
            if state.stored >= wanted or moved:
                del targets[key]
            elif self.link.up and state.lease and not state.asked:
                state.asked = self.link.next_correlation()
                self._asked[state.asked] = state
                ack = ConsumerAck(AckKind.CUMULATIVE, *key, state.generation, state.lease, state.acked)
                self.link.send(frames.write_consumer_ack(state.asked, ack))
        if not targets or self.closed:
            done()
        else:
            self.loop.call_later(RETRY_SECONDS, lambda: self._confirm(targets, done))

    def _subscribe(self, wanted: list[Wanted]) -> None:
        """One request, or several when one cannot name it all: what is about one topic stays together."""
        part: list[Wanted] = []
        for _, lines in groupby(sorted(wanted, key=lambda line: line.topic), lambda line: line.topic):
            more = list(lines)
            if part and len(part) + len(more) > frames.MOST_LINES:
                self._request_lines(part)
                part = []
            part += more
        self._request_lines(part)

    def _request_lines(self, wanted: list[Wanted]) -> None:
        correlation = self.link.next_correlation()
        data = frames.write_subscribe(correlation, Subscribe(Intent.JOIN, self._group, *self._window, wanted))
        for line in wanted:
            state = self.partitions.get(TopicPartition(line.topic, line.partition))
            if state is not None:
                state.awaiting = correlation
        topics = dict.fromkeys(line.topic for line in wanted)
        self.link.request(
            correlation, data, lambda answer, body: self._on_state(correlation, list(topics), answer), once=False
        )

    def _send_intent(self, intent: Intent, lines: list[Wanted], answered: Callable[[], None] = lambda: None) -> None:
        """Leave, or release what is being revoked."""
        correlation = self.link.next_correlation()
        data = frames.write_subscribe(correlation, Subscribe(intent, self._group, 0, 0, lines))
        self.link.request(correlation, data, lambda answer, body: answered())

    def _tell_applied_later(self) -> None:
        self.loop.call_later(APPLIED_SECONDS, self._tell_applied)

    def _tell_applied(self) -> None:
        """Tell the broker what is applied now, of partitions where it does not know."""
        with self.changed:
            self._telling = False
            states = [
                (key, state)
                for key, state in self.partitions.items()
                if state.held and state.applied >= 0 and state.applied != state.applied_sent
            ]
            for first in range(0, len(states), frames.MOST_ENDS):
                lines = [(*key, state.applied) for key, state in states[first : first + frames.MOST_ENDS]]
                self.link.send(frames.write_heartbeat(lines))
            for _, state in states:
                state.applied_sent = state.applied

    def _keep_paused(self, seconds: float) -> None:
        """What waits in paused partitions is not overdue."""
        self.in_progress(paused=True)
        self._paused_timer = self.loop.call_later(seconds, lambda: self._keep_paused(seconds))

    # ---- the I/O thread: receiving ----

    def connected(self, grants: Grants) -> None:
        self.down_since, self.last_error = None, None
        self._found(self._topics)
        if self._paused_timer is None:
            self._keep_paused(grants.delivery_ms / 3000)

    def _found(self, topics: Sequence[str]) -> None:
        """Subscribe to topics that exist, as far as is known."""
        wanted = []
        for topic in topics:
            # Partitions that this member never held continue at the committed offset, which the first SUBSCRIBE set.
            kind, value = (Start.COMMITTED, 0) if topic in self._joined and self._group else self._start
            wanted.append(Wanted(topic, -1, kind, NO_LOG_ID, -1, value))
        with self.changed:
            # The broker takes the last line about a partition.
            for key, state in self.partitions.items():
                line = self._resumed(key, state) if key.topic in topics else None
                if line is not None:
                    wanted.append(line)
        self._subscribe(wanted)

    def _resumed(self, key: TopicPartition, state: PartitionState) -> Wanted | None:
        """Where to continue after a reconnect: after what was acknowledged here, unless another member got further."""
        if state.refreshing and not self._group:
            # The broker has forgotten the refresh of a reader without a group; a position in no known log gets another.
            return Wanted(*key, Start.POSITION, UNKNOWN_LOG_ID, -1, 0)
        if state.acked < 0:
            return state.wanted
        kind = Start.POSITION if state.kept or not self._group else Start.RESUME
        return Wanted(*key, kind, state.log_id, state.epoch, state.acked) if state.resuming else None

    def _on_state(self, correlation: int, topics: list[str], answer: Answer) -> None:
        accepted = correlation in self._accepted
        if answer.code is Code.OK:
            self._joined.update(topics)
            self._accepted.add(correlation)
            if self._missing is not None:
                self._missing.accepted()
            with self.changed:
                for state in self.partitions.values():
                    if state.awaiting == correlation:
                        state.awaiting = 0
        elif answer.code.retryable and not accepted:
            log.warning("cannot subscribe yet: %s: %s; trying again", answer.code.name, answer.message)
            self._refused.add(correlation)
            self.loop.call_later(REFUSED_SECONDS, lambda: self._again(correlation, topics))
        elif answer.code.retryable:
            log.warning("nothing comes for now: %s: %s", answer.code.name, answer.message)
            if answer.code is Code.BEHIND:
                self._behind(answer)
        elif answer.code is Code.UNKNOWN_TOPIC and self._missing is not None:
            error = AnswerError(answer.code, answer.message)
            (self._missing.deleted if accepted else self._missing.refused)(topics, error)
        else:
            self._put(AnswerError(answer.code, answer.message))

    def _again(self, correlation: int, topics: list[str]) -> None:
        """A subscription was refused for a moment. Another connection has subscribed by itself."""
        if correlation in self._refused:
            self._refused.discard(correlation)
            self._found(topics)

    def on_answer(self, correlation: int, answer: Answer) -> None:
        state = self._asked.pop(correlation, None)
        if state is not None and state.asked == correlation:
            state.asked = 0
            if answer.code is Code.OK:
                state.stored = max(state.stored, answer.offset)

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
            if self._never_acked:
                self._look_for_acknowledgements()
        elif event.type == FrameType.RESET:
            self._on_reset(frames.read_reset(event.body))

    def _look_for_acknowledgements(self) -> None:
        """Warn once of a window that is full because nothing is ever acknowledged: at two heartbeats in a row there is
        more, and everything that came was handed out."""
        with self.changed:
            waiting = {
                key
                for key, state in self.partitions.items()
                if state.held and state.acked < state.handed_out == state.expected < self.durable_ends.get(key, 0)
            }
            stuck = sorted(waiting & self._waiting)
            count = sum(self.partitions[key].handed_out - self.partitions[key].acked for key in stuck)
        self._waiting = waiting
        if stuck:
            self._never_acked = False
            log.warning(
                "%s: the broker sends no more, because none of the %d records that were handed out is acknowledged; "
                "call ack() for what is handled, or use auto_ack=True",
                ", ".join(f"{key.topic}/{key.partition}" for key in stuck[:10]),
                count,
            )

    def _behind(self, answer: Answer) -> None:
        """The broker has not yet got what comes next in a partition. Another one may have it."""
        waiting = [key for key, state in self.partitions.items() if state.held and state.expected == answer.offset]

        def look() -> None:
            for key in waiting:
                state = self.partitions[key]
                if state.held and state.expected == answer.offset:
                    self.link.elsewhere(answer.message)
                    return

        self.loop.call_later(BEHIND_SECONDS, look)

    def _on_assigned(self, assigned: Assigned) -> None:
        for line in assigned.lines:
            key = TopicPartition(line.topic, line.partition)
            with self.changed:
                state = self.partitions.setdefault(key, PartitionState())
                if state.awaiting:
                    continue  # sent before the broker processed the seek
                self._drop(key)
                if line.holding is Holding.ASSIGNED:
                    if not state.held:
                        self.incoming.append(AssignmentChange(Holding.ASSIGNED, key))
                    state.end_lease()
                    state.held, state.leaving, state.revoking, state.resuming = True, False, False, False
                    state.lease, state.generation = line.lease, assigned.generation
                    state.acked = state.handed_out = state.expected = line.offset
                    state.stored = state.applied_sent = -1
                    if state.applied >= 0 and not self._telling:
                        self._telling = True
                        self._tell_applied_later()
                elif line.holding is Holding.REVOKING:
                    state.leaving = state.revoking = True
                    state.parked.clear()
                    self.incoming.append(AssignmentChange(Holding.REVOKING, key))
                else:
                    self._lose(key, state)
                self.changed.notify()

    def _lose(self, key: TopicPartition, state: PartitionState) -> None:
        if state.held and (not state.leaving or state.revoking):
            self.incoming.append(AssignmentChange(Holding.REVOKED, key, late=state.leaving))
        state.held = state.leaving = state.revoking = False
        if state.refreshing:
            # The position is one in a staging store. A group's refresh is announced to the next holder.
            state.acked = state.handed_out = -1
            state.refreshing = not self._group
        state.end_lease()

    def _on_reset(self, reset: Reset) -> None:
        key = TopicPartition(reset.topic, reset.partition)
        with self.changed:
            state = self.partitions.setdefault(key, PartitionState())
            state.end_lease()
            state.log_id, state.epoch = reset.log_id, -1
            state.acked = state.handed_out = -1  # what was acknowledged before is of other data
            state.refreshing = True
            self._drop(key)
            self.incoming.append(reset)
            self.changed.notify()

    def _on_deliver(self, event: Frame) -> None:
        deliver = frames.read_deliver(event.body)
        key = TopicPartition(deliver.topic, deliver.partition)
        self.durable_ends[key] = deliver.durable_end
        with self.changed:
            state = self.partitions.get(key)
            if state is None or state.awaiting or deliver.lease != state.lease or state.leaving:
                return
            if deliver.first != state.expected:
                self.link.reconnect(f"{deliver.topic}/{deliver.partition}: offset {state.expected} was expected next")
                return
            state.log_id, state.epoch = deliver.log_id, deliver.epoch
            state.expected = deliver.last + 1
            self.incoming.append(
                ReceivedDelivery(key, deliver, bytes(event.body[deliver.batches_start :]), self.loop.now())
            )
            self.changed.notify()

    def disconnected(self, reason: str) -> None:
        self._accepted.clear()
        self._refused.clear()
        if self._missing is not None:
            self._missing.forget()
        with self.changed:
            self.down_since = self.loop.clock_now()
            self._asked.clear()
            for key, state in self.partitions.items():
                state.resuming = state.resuming or state.held
                state.asked = state.awaiting = 0
                self._lose(key, state)
            self.incoming = deque(
                item for item in self.incoming if isinstance(item, AssignmentChange | EdgeBrokerError)
            )
            self.changed.notify()
        log.info("connection lost: %s", reason)

    def connect_failed(self, error: EdgeBrokerError, permanent: bool) -> None:
        self.last_error = error
        if permanent:
            self._put(error)

    def _put(self, item: Incoming) -> None:
        with self.changed:
            self.incoming.append(item)
            self.changed.notify()

    def _drop(self, key: TopicPartition) -> None:
        """Forget what was received of a partition and is not handed out (under the lock)."""
        self.incoming = deque(
            item for item in self.incoming if not isinstance(item, ReceivedDelivery) or item.partition != key
        )
