"""The Python consumer: iterate over records or have a handler called; blocking, embeddable, no asyncio needed.

The broker pushes; one I/O thread (subscriber.py) receives what it pushes, the caller's thread decodes and handles it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from edgebroker.client import arguments
from edgebroker.client.arguments import StartFrom
from edgebroker.client.consume.handed_out import HandedOut, key_of
from edgebroker.client.consume.partition_state import PartitionState
from edgebroker.client.consume.positions import PositionFile
from edgebroker.client.consume.receiver import Callbacks, Receiver
from edgebroker.client.consume.refresh_loader import RefreshLoader
from edgebroker.client.consume.subscriber import Subscriber
from edgebroker.client.credentials import read_credentials
from edgebroker.client.link import default_client_id
from edgebroker.client.refresh import Staging
from edgebroker.client.servers import Servers
from edgebroker.common.errors import ArgumentError, GapError
from edgebroker.common.messages import NO_LOG_ID, AckKind, Wanted
from edgebroker.common.names import check_group_name
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.runtime.threads import start_thread
from edgebroker.common.types import Delivery, Position, TopicPartition

POSITIONS_SECONDS = 1.0


class Consumer:
    """Read topics, alone or as a member of a consumer group.

    Creating one starts its I/O thread and returns at once; it joins its group as soon as it is connected, and again
    after each reconnect. Records come at least once, in order within a partition. Use it as a context manager, or call
    close().

    Args:
        server: HOST:PORT of the broker. Several, with commas between: the first one that answers is used, another when
            that one does not any more or has been behind this consumer for 30 seconds, and one that is named earlier as
            soon as it is there again (it is looked for every 5 minutes). Reading goes on at the same position.
        topics: the names of the topics.
        group: the name of the consumer group: the broker assigns each partition to one member. Empty: a reader without
            a group, which gets every partition and of which the broker stores nothing.
        start: where a partition begins that has no committed offset and no position: "committed" (then earliest),
            "earliest", "latest", an offset, or "@TIME" in milliseconds since 1970. One that is taken over from another
            member continues at the committed offset.
        positions: the reader's own positions by (topic, partition); they win over the committed offsets of the group.
        position_file: a file that keeps these positions: written by commit() and close(), and once a second while
            records are acknowledged. One consumer at a time.
        auto_ack: records are acknowledged when the ones after them are asked for: by the next poll(), and by the
            iteration as it moves on (a delivery, 1,000 records or a second's worth at a time); also by commit(), and
            at the end of a `with` block that no exception ends. What ack() was called for is left to the caller.
            False: only ack() does.
        window_records: how many records may be in flight; 0: what the broker allows.
        window_bytes: how many bytes may be in flight; 0: what the broker allows.
        on_delivery: called with each Delivery before its records are handed out or loaded: the batches as the broker
            has stored them, for a copy of the log. What comes again after a reconnect is given again.
        on_gap: called with a GapError instead of raising it.
        on_assigned: called with the partitions that were assigned.
        on_revoked: called with the partitions that are being revoked, or were lost. A partition is released when
            on_revoked has returned and everything that was handed out of it is acknowledged.
        staging: where a snapshot refresh is loaded; without one it raises ResetRequiredError.
        missing_topic: what to do when the broker does not have a topic: "wait" for it (a warning in the log names it),
            as on a terminal whose first records have not come yet, or "raise" AnswerError. `start` counts from when
            the topic is there.
        timeout: seconds without a connection until polling raises UnreachableError; None: it waits for ever.
        client_id: the name of this member. Empty: a new one.
        credentials: the file that `edgebroker token create --app` wrote, for brokers of other machines; empty: that of
            $EDGEBROKER_CREDENTIALS, or none.

    Raises:
        ArgumentError: an argument has a value that is not allowed.
        PositionFileError: the position file cannot be read.

    Threads:
        A consumer belongs to one thread, which also runs the callbacks; only in_progress() and close() may be called
        from any thread. For several workers create several consumers with the same group.

    Durability:
        Acknowledgements are stored by the broker soon after they arrive; commit() waits for it. After a crash, what was
        not stored is delivered again.
    """

    def __init__(
        self,
        server: str = "127.0.0.1:7420",
        topics: Sequence[str] = (),
        group: str = "",
        *,
        start: StartFrom = "committed",
        positions: Mapping[tuple[str, int], Position] | None = None,
        position_file: str | Path | None = None,
        auto_ack: bool = True,
        window_records: int = 0,
        window_bytes: int = 0,
        on_delivery: Callable[[Delivery], object] | None = None,
        on_gap: Callable[[GapError], object] | None = None,
        on_assigned: Callable[[Sequence[TopicPartition]], object] | None = None,
        on_revoked: Callable[[Sequence[TopicPartition]], object] | None = None,
        staging: Staging | None = None,
        missing_topic: Literal["wait", "raise"] = "wait",
        timeout: float | None = None,
        client_id: str = "",
        credentials: str | Path = "",
    ) -> None:
        topics = arguments.check_topics(topics)
        if problem := check_group_name(group):
            raise ArgumentError(problem)
        if missing_topic not in ("wait", "raise"):
            raise ArgumentError(f"missing_topic={missing_topic!r}: use wait or raise")
        arguments.check_client_id(client_id)
        arguments.check_whole("window_records", window_records, 0, arguments.MOST_WINDOW)
        arguments.check_whole("window_bytes", window_bytes, 0, arguments.MOST_WINDOW)
        arguments.check_time("timeout", timeout)
        begin = arguments.parse_from(start)
        self._group = group
        self._position_file = PositionFile(position_file) if position_file is not None else None
        stored = self._position_file.read() if self._position_file is not None else {}
        self._positions_due = 0.0
        self._handling: list[Record] = []  # what run() has given to the handler
        self._subscriber = Subscriber(
            Servers(server),
            client_id=client_id or default_client_id("consumer"),
            credentials=read_credentials(credentials),
            group=group,
            topics=topics,
            start=begin,
            positions={**stored, **(positions or {})},
            window=(window_records, window_bytes),
            wait_for_topics=missing_topic == "wait",
        )
        self._handed_out = HandedOut(auto_ack, self._state_of, self._acknowledge, SystemClock().monotonic)
        self._loader = RefreshLoader(self._subscriber, staging)
        self._receiver = Receiver(
            self._subscriber,
            self._loader,
            Callbacks(on_delivery, on_gap, on_assigned, on_revoked),
            timeout,
            self._keep_positions,
            self._take_back,
        )
        self._thread = start_thread("edgebroker-consumer", self._subscriber.run)
        # One that is dropped without close() leaves its group.
        weakref.finalize(self, self._subscriber.close).atexit = False

    # ---- receiving ----

    @property
    def group(self) -> str:
        """The name of the consumer group; empty for a reader without one."""
        return self._group

    @property
    def client_id(self) -> str:
        """The name under which the broker knows this member."""
        return self._subscriber.link.client_id

    @property
    def durable_ends(self) -> dict[TopicPartition, int]:
        """The high watermark of each partition as far as the broker has sent it; minus next_offsets() it is the lag."""
        return self._subscriber.durable_ends

    @property
    def assignment(self) -> set[TopicPartition]:
        """The partitions that this consumer holds now."""
        with self._subscriber.changed:
            return {key for key, state in self._subscriber.partitions.items() if state.held}

    @property
    def silent_seconds(self) -> float:
        """How long ago the broker sent something, if only that there is nothing new; infinite while it is not
        connected. Any thread."""
        return self._subscriber.link.silent_seconds

    @property
    def closed(self) -> bool:
        """True after close(). Any thread."""
        return self._subscriber.closed

    @property
    def expired(self) -> int:
        """How many records were left out because they had outlived the time to live in their header."""
        return self._receiver.expired

    def __iter__(self) -> Iterator[Record]:
        """Iterate over records; blocks while there are none, and ends after close().

        A loop that is left can be continued: the next loop, or poll(), gets the rest of the delivery. Raises what
        poll() raises. With `auto_ack` records are acknowledged as the iteration moves on. Leaving the loop acknowledges
        those before the last one, which an exception may have left half done: what comes next acknowledges it, another
        loop, poll(), commit(), or the end of the `with` block.
        """
        try:
            yield from self._handed_out.each(lambda: self._receiver.receive(None))
        finally:
            self._handed_out.left()

    def poll(self, timeout: float | None = None) -> list[Record]:
        """Wait for the next delivery and return its records.

        With `auto_ack` this acknowledges what the poll() before returned; without, call ack().

        Args:
            timeout: seconds to wait at most; None: no limit.

        Returns:
            The records of one partition, in order; [] after `timeout`, or when the consumer was closed.

        Raises:
            GapError: records will not be delivered, and there is no `on_gap`.
            ResetRequiredError: a snapshot refresh was announced, and there is no `staging`.
            AnswerError: the broker refuses the subscription: a topic was deleted, or does not exist and is not waited
                for, for instance. Who polls on waits for a topic that was deleted.
            CorruptBatchError: a batch cannot be decoded, though it is what the broker stored.
            UnreachableError: there was no connection for the `timeout` of the consumer.
            Exception: what a callback or the staging store raises.

        Threads:
            The thread of the consumer, which runs the callbacks inside.
        """
        self._handed_out.handled()
        arguments.check_time("timeout", timeout)
        return self._handed_out.all(lambda: self._receiver.receive(timeout))

    def _next_record(self, timeout: float | None) -> Record | None:
        """One step of an iteration; None when no record came within `timeout` seconds, or the consumer was closed."""
        return self._handed_out.next(lambda: self._receiver.receive(timeout))

    def _state_of(self, key: TopicPartition) -> PartitionState:
        return self._subscriber.partitions.get(key) or PartitionState()

    def run(self, handler: Callable[[list[Record]], object], batch_size: int = 10, *, retry: bool = False) -> None:
        """Call a handler with records, and acknowledge them when it returns. Returns after close().

        An exception of the handler is a negative acknowledgement of the first record that it was given: that record is
        delivered again, after a pause and isolated, until it succeeds or the broker makes it a dead letter.

        Args:
            handler: called with a list of records of one partition.
            batch_size: how many records the handler gets at most.
            retry: True: run() continues meanwhile with other partitions; False: the exception ends run(), and calling
                it again continues.

        Raises:
            Exception: what poll() raises, and without `retry` what the handler raises.

        Threads:
            The thread of the consumer, which runs the handler.

        Durability:
            As ack().
        """
        while True:
            records = self.poll(None)
            if not records:
                return
            self._handed_out.decided(key_of(records[0]))  # piece by piece, below
            for start in range(0, len(records), batch_size):
                piece = records[start : start + batch_size]
                handling = self._handling = list(piece)
                try:
                    handler(piece)
                except Exception as error:
                    self.nack(piece[0], f"{type(error).__name__}: {error}")
                    if not retry:
                        raise
                if not handling:
                    break  # seek() or nack() took the rest back
                self.ack(handling[-1])

    # ---- acknowledging ----

    def ack(self, record: Record) -> None:
        """Acknowledge this record and everything before it in its partition.

        Args:
            record: the last record that is handled.

        Threads:
            The thread of the consumer.

        Durability:
            Returns at once; commit() waits until the broker has stored it.
        """
        self.ack_to(record.topic, record.partition, record.offset + 1)

    def ack_to(self, topic: str, partition: int, next_offset: int) -> None:
        """Acknowledge everything before an offset.

        Has no effect on records that this consumer does not hold any more: they are delivered again, here or elsewhere.

        Args:
            topic: the topic.
            partition: the partition.
            next_offset: the offset after the last record that is handled.

        Threads:
            The thread of the consumer.

        Durability:
            Returns at once; commit() waits until the broker has stored it.
        """
        key = TopicPartition(topic, partition)
        self._handed_out.decided(key)
        self._acknowledge(key, next_offset)

    def _acknowledge(self, key: TopicPartition, next_offset: int) -> None:
        self._subscriber.acknowledge(key, next_offset)
        self._keep_positions()

    def nack(self, record: Record, reason: str = "") -> None:
        """Report that this record could not be handled, and acknowledge everything before it in its partition.

        It is delivered again, after a pause and isolated, and nothing after it before that. When the broker's attempts
        are used up it becomes a dead letter.

        Args:
            record: the record; what was handed out after it does not count any more.
            reason: stored with the dead letter.

        Threads:
            The thread of the consumer.

        Durability:
            Returns at once.
        """
        self._nack(record, reason, AckKind.NEGATIVE)

    def reject(self, record: Record, reason: str = "") -> None:
        """Report that this record can never be handled, and acknowledge everything before it in its partition.

        The broker makes it a dead letter at once, however many attempts are left, then delivers what follows. A node
        that is started again before the dead letter is stored delivers the record once more.

        Args:
            record: the record; what was handed out after it does not count any more.
            reason: stored with the dead letter.

        Threads:
            The thread of the consumer.

        Durability:
            Returns at once. The group goes past the record when the dead letter is stored.
        """
        self._nack(record, reason, AckKind.REJECT)

    def _nack(self, record: Record, reason: str, kind: AckKind) -> None:
        self._subscriber.nack(key_of(record), record.offset, reason, kind)
        self._take_back(key_of(record))

    def in_progress(self) -> None:
        """Report that what was handed out is still being handled: the broker's delivery timeout starts again.

        Threads:
            Any thread.
        """
        self._subscriber.in_progress()

    def commit(self, timeout: float | None = 30.0) -> None:
        """Wait until the broker has stored what was acknowledged so far, and write the position file.

        With `auto_ack`, everything that was handed out counts as handled.

        Partitions that were lost meanwhile count as done: their committed offset is another member's.

        Args:
            timeout: seconds to wait at most; None: no limit.

        Raises:
            TimeoutError: the broker did not confirm it in time; the acknowledgements stay on their way.

        Threads:
            The thread of the consumer.

        Durability:
            The committed offsets and the position file are stored when it returns.
        """
        self._handed_out.handled()
        done = threading.Event()
        self._subscriber.confirm(done.set)
        if not done.wait(timeout):
            raise TimeoutError(f"the broker did not confirm the acknowledgements within {timeout:g} s")
        self._write_positions()

    # ---- positions ----

    def seek(self, topic: str, partition: int, start: StartFrom) -> None:
        """Continue elsewhere in a partition; what was received and not handed out is dropped.

        Args:
            topic: the topic.
            partition: the partition.
            start: "committed", "earliest", "latest", an offset, or "@TIME" in milliseconds since 1970.

        Raises:
            ArgumentError: `start` is none of these.

        Threads:
            The thread of the consumer.
        """
        kind, value = arguments.parse_from(start)
        arguments.check_whole("partition", partition, 0, arguments.MOST_PARTITION)
        self._subscriber.seek(Wanted(topic, partition, kind, NO_LOG_ID, -1, value))
        self._take_back(TopicPartition(topic, partition))

    def pause(self, topic: str, partition: int) -> None:
        """Hand out nothing of a partition until resume(); it stays assigned.

        While a record of it is isolated after a failure, the other partitions of this consumer wait as well.

        Args:
            topic: the topic.
            partition: the partition.

        Threads:
            The thread of the consumer.
        """
        self._subscriber.set_paused(TopicPartition(topic, partition), True)

    def resume(self, topic: str, partition: int) -> None:
        """Hand out the records of a paused partition again.

        Args:
            topic: the topic.
            partition: the partition.

        Threads:
            The thread of the consumer.
        """
        self._subscriber.set_paused(TopicPartition(topic, partition), False)

    def next_offsets(self) -> dict[TopicPartition, int]:
        """The next offset to hand out of each partition that is held.

        Threads:
            The thread of the consumer.
        """
        with self._subscriber.changed:
            return {key: state.handed_out for key, state in self._subscriber.partitions.items() if state.held}

    def positions(self) -> dict[tuple[str, int], Position]:
        """The positions after the last acknowledged records, by (topic, partition).

        A reader without a group that stores them with its data, in one transaction, and gives them back as `positions`
        has the effect of each record exactly once. A partition whose refresh is being loaded is left out.

        Threads:
            The thread of the consumer.
        """
        with self._subscriber.changed:
            return {
                (key.topic, key.partition): Position(state.log_id, state.epoch, state.acked)
                for key, state in self._subscriber.partitions.items()
                # While a refresh is loaded, what readers see is at its position of before.
                if state.acked >= 0 and any(state.log_id) and not state.refreshing
            }

    def position_after(self, record: Record) -> Position:
        """The position after a record that was handed out.

        Stored with what the record led to, in one transaction and before ack(), and given back as `positions`, it makes
        the effect of each record happen exactly once.

        Args:
            record: one that this consumer has handed out.

        Raises:
            ArgumentError: it has handed out nothing of this partition.

        Threads:
            The thread of the consumer.
        """
        log_id, epoch = self._state_of(key_of(record)).handed_out_of
        if epoch < 0:
            raise ArgumentError(f"this consumer has handed out nothing of {record.topic}/{record.partition}")
        return Position(log_id, epoch, record.offset + 1)

    def _keep_positions(self) -> None:
        """Write the position file when it is due."""
        if self._position_file is not None and self._subscriber.loop.clock_now() >= self._positions_due:
            self._write_positions()

    def _write_positions(self) -> None:
        if self._position_file is not None:
            self._position_file.update(self.positions())
            self._positions_due = self._subscriber.loop.clock_now() + POSITIONS_SECONDS

    def applied(self, topic: str, partition: int, next_offset: int) -> None:
        """Tell the broker what the readers of your own store see.

        For who acknowledges what is stored and shows it later: `edgebroker tree`, `wait` and `group describe` tell
        what is applied from what is only stored. Without it, what is acknowledged counts as applied.

        Args:
            topic: the topic.
            partition: the partition.
            next_offset: the offset after the last record that readers see.

        Threads:
            Any thread. Returns at once; the broker is told within half a second, and again after each reconnect.
        """
        self._subscriber.report_applied(TopicPartition(topic, partition), next_offset)

    def refresh(self, topic: str, partition: int, timeout: float | None = 30.0) -> None:
        """Ask the broker for a snapshot refresh of a partition that this consumer holds.

        Returns when the broker has accepted it; the records are loaded by poll(), through `staging`.

        Args:
            topic: the topic.
            partition: the partition.
            timeout: seconds to wait for the answer; None: no limit.

        Raises:
            AnswerError: NO_SNAPSHOT: something of the table is missing and it has no complete snapshot; STALE: this
                consumer does not hold the partition.
            UnreachableError: there is no connection.
            TimeoutError: the broker did not answer in time.

        Threads:
            The thread of the consumer.
        """
        self._loader.request(TopicPartition(topic, partition), timeout)

    def switch(self) -> None:
        """Ask the staging store again about refreshes that it did not switch yet.

        Nothing is asked of it about one that is not complete. What poll() loads asks as well.

        Raises:
            Exception: what Staging.switch() raises; the broker then announces the refresh again.

        Threads:
            The thread of the consumer.
        """
        self._loader.switch()

    # ---- ending ----

    def close(self) -> None:
        """Send the last acknowledgements, leave the group, and write the position file. A second call does nothing.

        Iterations end, and a poll() that waits returns [].

        Threads:
            Any thread.

        Durability:
            The position file is stored when it returns. Acknowledgements are sent; call commit() before to be sure.
        """
        if self._subscriber.closed:
            return
        self._subscriber.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        self._write_positions()

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._handed_out.handled()
        self.close()

    # ---- inside ----

    def _take_back(self, key: TopicPartition) -> None:
        """Nothing more of a partition is handed out of what was received."""
        if self._handling and (self._handling[0].topic, self._handling[0].partition) == key:
            self._handling.clear()
        self._handed_out.take_back(key)


__all__ = ["Consumer"]
