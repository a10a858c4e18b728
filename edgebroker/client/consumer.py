"""The Python consumer: iterate over records or have a handler called; blocking, embeddable, no asyncio needed.

The broker pushes; one I/O thread (subscriber.py) collects what it pushes, the caller's thread decodes and handles. At
least once, in order per partition. Give each thread or process a consumer of its own with the same group: the broker
divides the partitions among them.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from edgebroker.client.positions import PositionFile
from edgebroker.client.refresh import Refresh, Staging
from edgebroker.client.subscriber import Arrived, Item, Notice, PartitionState, Subscriber
from edgebroker.common import batch
from edgebroker.common.errors import (
    AnswerError,
    Code,
    CorruptBatchError,
    DamagedBatchError,
    EdgeBrokerError,
    GapError,
    ResetRequiredError,
    UnreachableError,
)
from edgebroker.common.records import Record
from edgebroker.common.threads import start_thread
from edgebroker.common.types import Position, Start, TopicPartition
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Answer, Gap, Holding, Ready, Reset, Wanted

From = int | str
_NAMED = {"committed": Start.COMMITTED, "earliest": Start.EARLIEST, "latest": Start.LATEST}
AUTO_ACK_RECORDS = 1000
POSITIONS_SECONDS = 1.0
TTL_HEADER = "eb-ttl-ms"


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


class Consumer:
    """Read topics as a member of a group; every method belongs to one thread, but for close() and in_progress().

    server       HOST:PORT
    topics       names; the broker hands each partition to one member of the group
    group        name of the consumer group; "": a reader of its own, of which the broker stores nothing
    start        where a partition begins that nobody in the group holds: committed (else earliest), earliest, latest,
                 an offset, or @TIME; one that is taken over from another member begins at the group's place
    positions    the reader's own places by (topic, partition): they win over what the group committed
    position_file   keep these places in a file: on commit(), close(), and once a second while records are acknowledged
    auto_ack     acknowledge as the iteration moves on: what one delivery brought, at most 1,000 records at a time, when
                 the record behind it is asked for; else call ack()
    window_records, window_bytes   how much may be in flight; 0: what the broker gives
    on_gap       called with a GapError instead of raising it
    on_assigned, on_revoked   called, in the thread that polls, with the partitions that come and go; one that goes is
                 given back when on_revoked has returned and all that was handed out of it is acknowledged
    staging      where a full refresh is loaded; without one it raises ResetRequiredError
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
        position_file: str | Path | None = None,
        auto_ack: bool = True,
        window_records: int = 0,
        window_bytes: int = 0,
        on_gap: Callable[[GapError], object] | None = None,
        on_assigned: Callable[[Sequence[TopicPartition]], object] | None = None,
        on_revoked: Callable[[Sequence[TopicPartition]], object] | None = None,
        staging: Staging | None = None,
        timeout: float | None = None,
        client_id: str = "",
        token: bytes = b"",
    ) -> None:
        if isinstance(topics, str):
            raise TypeError("topics is a sequence of names, not one name")
        if not topics:
            raise ValueError("name at least one topic to consume")
        begin = parse_from(start)
        self._group, self._auto_ack, self._timeout = group, auto_ack, timeout
        self._on_gap, self._on_assigned, self._on_revoked, self._staging = on_gap, on_assigned, on_revoked, staging
        self._position_file = PositionFile(position_file) if position_file is not None else None
        stored = self._position_file.read() if self._position_file is not None else {}
        self._positions_due = 0.0
        self._handing: list[Record] = []
        # What the iteration has not handed out of a delivery yet, the last record that it did, and their lease.
        self._rest: deque[Record] = deque()
        self._given: Record | None = None
        self._given_count = self._rest_lease = 0
        self._refreshes: dict[TopicPartition, Refresh] = {}
        self._switched: dict[str, int] = {}
        self.expired = 0
        name = client_id or f"consumer-{socket.gethostname()[:40]}-{os.getpid()}-{os.urandom(4).hex()}"
        self._subscriber = Subscriber(
            server, name, token, group, topics, begin, {**stored, **(positions or {})}, (window_records, window_bytes)
        )
        self._thread = start_thread("edgebroker-consumer", self._subscriber.loop.run)

    # ---- receiving ----

    @property
    def group(self) -> str:
        return self._group

    @property
    def client_id(self) -> str:
        return self._subscriber.link.client_id

    @property
    def durable_ends(self) -> dict[TopicPartition, int]:
        """The end of each log as far as the broker told: minus the own position it is the lag."""
        return self._subscriber.durable_ends

    @property
    def assignment(self) -> set[TopicPartition]:
        """The partitions held now."""
        with self._subscriber.ready:
            return {key for key, place in self._subscriber.places.items() if place.held}

    def __iter__(self) -> Iterator[Record]:
        """Records for ever; blocks while there are none. Ends after close(). Whoever leaves the loop gets the rest when
        asking again: the next loop, or poll()."""
        while (record := self._next_record()) is not None:
            yield record

    def _next_record(self) -> Record | None:
        """One record of the iteration; those before it are acknowledged a delivery, or 1,000 records, at a time."""
        rest = self._rest
        if rest and self._lease_of(rest[0]) != self._rest_lease:
            rest.clear()  # the partition was lost, or moved: it comes again
        if self._given is not None and (not rest or self._given_count >= AUTO_ACK_RECORDS):
            given, self._given, self._given_count = self._given, None, 0
            if self._auto_ack and self._lease_of(given) == self._rest_lease:
                self.ack(given)
        if not rest:
            rest.extend(self._receive(None))
            if not rest:
                return None
            self._rest_lease = self._lease_of(rest[0])
        self._given = rest.popleft()
        self._given_count += 1
        return self._given

    def _lease_of(self, record: Record) -> int:
        place = self._subscriber.places.get(TopicPartition(record.topic, record.partition))
        return place.lease if place is not None else 0

    def poll(self, timeout: float | None = None) -> list[Record]:
        """The records of the next delivery, in order; [] after `timeout` seconds or when the consumer was closed.

        With auto_ack the caller must acknowledge by asking again through iteration or run(); poll() itself does not.
        Raises GapError (without on_gap), ResetRequiredError (without staging), AnswerError, UnreachableError.
        """
        rest, self._rest = self._rest, deque()
        if rest and self._lease_of(rest[0]) == self._rest_lease:
            return list(rest)
        return self._receive(timeout)

    def _receive(self, timeout: float | None) -> list[Record]:
        deadline = None if timeout is None else self._subscriber.loop.clock_now() + timeout
        while True:
            item = self._next(deadline)
            if item is None:
                return []
            if isinstance(item, EdgeBrokerError):
                raise item
            if isinstance(item, Notice):
                self._on_notice(item)
            elif isinstance(item, Reset):
                self._on_reset(item)
            else:
                try:
                    records = self._decode(item)
                except DamagedBatchError as error:
                    key = TopicPartition(item.deliver.topic, item.deliver.partition)
                    self._subscriber.deliver_again(key, item.deliver.first, str(error))
                    continue
                refresh = self._refreshes.get(TopicPartition(item.deliver.topic, item.deliver.partition))
                if refresh is not None:
                    self._load(refresh, records, item.deliver.last + 1)
                for gap in item.deliver.gaps:
                    self._gap(item.deliver.topic, item.deliver.partition, gap)
                if records and refresh is None:
                    return records

    def run(self, handler: Callable[[list[Record]], object], batch_size: int = 10, *, retry: bool = False) -> None:
        """Call the handler with up to batch_size records of one partition at a time; acknowledge when it returns.

        An exception of the handler is a negative acknowledgement of the first record that it was given: that comes
        again, after a pause and alone, until it succeeds or the broker makes it a dead letter. With `retry` run() goes
        on meanwhile; else the exception ends it, and calling it again goes on.
        """
        while True:
            records = self.poll(None)
            if not records:
                return
            for start in range(0, len(records), batch_size):
                piece = records[start : start + batch_size]
                handing = self._handing = list(piece)
                try:
                    handler(piece)
                except Exception as error:
                    self.nack(piece[0], f"{type(error).__name__}: {error}")
                    if not retry:
                        raise
                if not handing:
                    break  # seek() or nack() took the rest back
                self.ack(handing[-1])

    # ---- acknowledging ----

    def ack(self, record: Record) -> None:
        """Acknowledge this record and everything before it in its partition."""
        self.ack_to(record.topic, record.partition, record.offset + 1)

    def ack_to(self, topic: str, partition: int, next_offset: int) -> None:
        """Acknowledge everything before next_offset. Returns at once; commit() waits until it is stored.

        Without effect for records that this consumer does not hold any more: they were or will be delivered again.
        """
        self._subscriber.acknowledge(TopicPartition(topic, partition), next_offset)
        if self._position_file is not None and self._subscriber.loop.clock_now() >= self._positions_due:
            self._write_positions()

    def nack(self, record: Record, reason: str = "") -> None:
        """This record could not be handled; everything before it in its partition was. It is delivered again, after a
        pause and alone, nothing behind it before; with the broker's attempts used up it becomes a dead letter."""
        key = TopicPartition(record.topic, record.partition)
        self._subscriber.refuse(key, record.offset, reason)
        self._take_back(key)

    def in_progress(self) -> None:
        """What was handed out is still being handled: the broker's delivery timeout begins anew. From any thread."""
        self._subscriber.in_progress()

    def commit(self, timeout: float | None = 30.0) -> None:
        """Wait until the broker has stored what was acknowledged so far (and the position file is written). Raises
        TimeoutError. Partitions that were lost meanwhile count as done: their place is somebody else's."""
        done = threading.Event()
        self._subscriber.confirm(done.set)
        if not done.wait(timeout):
            raise TimeoutError("the broker did not confirm the acknowledgements in time")
        self._write_positions()

    # ---- places ----

    def seek(self, topic: str, partition: int, start: From) -> None:
        """Go on elsewhere: what was pushed before and not handed out is dropped."""
        kind, value = parse_from(start)
        self._subscriber.seek(Wanted(topic, partition, kind, frames.NO_LOG_ID, -1, value))
        self._take_back(TopicPartition(topic, partition))

    def pause(self, topic: str, partition: int) -> None:
        """Hand out nothing of a partition until resume(); it stays assigned. When a record of it comes alone after a
        failure, this consumer's other partitions wait for that as well."""
        self._subscriber.set_paused(TopicPartition(topic, partition), True)

    def resume(self, topic: str, partition: int) -> None:
        self._subscriber.set_paused(TopicPartition(topic, partition), False)

    def handed(self) -> dict[TopicPartition, int]:
        """The next offset that each partition held will hand out."""
        with self._subscriber.ready:
            return {key: place.handed for key, place in self._subscriber.places.items() if place.held}

    def positions(self) -> dict[tuple[str, int], Position]:
        """The places behind the last acknowledged records, to be kept by the caller and given back as `positions`."""
        with self._subscriber.ready:
            return {
                (key.topic, key.partition): Position(place.log_id, place.epoch, place.acked)
                for key, place in self._subscriber.places.items()
                # While a refresh is loaded, what readers see stands where it stood before.
                if place.acked >= 0 and any(place.log_id) and not place.refreshing
            }

    def _write_positions(self) -> None:
        if self._position_file is not None:
            self._position_file.update(self.positions())
            self._positions_due = self._subscriber.loop.clock_now() + POSITIONS_SECONDS

    # ---- refreshing ----

    def refresh(self, topic: str, partition: int, timeout: float | None = 30.0) -> None:
        """Ask for a full refresh of a partition that this consumer holds; it arrives through staging.

        Raises AnswerError (NO_SNAPSHOT: a table that is not complete any more; STALE: not held), TimeoutError.
        """
        ask = Reset(frames.NO_RESET, frames.NO_LOG_ID, topic, partition, 0, 0)
        answer = self._ask(lambda correlation: frames.write_reset(correlation, ask), timeout)
        if answer.code is not Code.OK:
            raise AnswerError(answer.code, answer.message)

    def _on_reset(self, reset: Reset) -> None:
        key = TopicPartition(reset.topic, reset.partition)
        refresh = Refresh(
            reset.reset_id.hex(), reset.log_id, reset.topic, reset.partition, reset.from_offset, reset.target
        )
        self._take_back(key)
        if self._staging is None:
            raise ResetRequiredError(reset.topic, reset.partition, reset.log_id, reset.from_offset)
        if refresh.reset_id in self._switched:
            refresh.next_offset = self._switched[refresh.reset_id]
        else:
            try:
                refresh.next_offset = self._staging.begin(refresh)
            except BaseException:
                self._begin_again(refresh)
                raise
        accept = reset._replace(from_offset=refresh.next_offset)
        self._subscriber.request(lambda correlation: frames.write_reset(correlation, accept), lambda answer: None)
        self._refreshes[key] = refresh
        if refresh.complete:
            self._finish(refresh)

    def _load(self, refresh: Refresh, records: list[Record], next_offset: int) -> None:
        assert self._staging is not None
        refresh.next_offset = next_offset
        try:
            self._staging.load(refresh, records)
        except BaseException:
            self._begin_again(refresh)
            raise
        self.ack_to(refresh.topic, refresh.partition, next_offset)
        if refresh.complete:
            self._finish(refresh)

    def _finish(self, refresh: Refresh) -> None:
        """Switch, once for a refresh, and say READY; unanswered, the broker announces it again after a reconnect."""
        assert self._staging is not None
        if refresh.reset_id not in self._switched:
            try:
                self._staging.switch(refresh)
            except BaseException:
                self._begin_again(refresh)
                raise
            self._switched[refresh.reset_id] = refresh.next_offset
        self._subscriber.refreshed(TopicPartition(refresh.topic, refresh.partition))
        self._refreshes.pop(TopicPartition(refresh.topic, refresh.partition), None)
        ready = Ready(bytes.fromhex(refresh.reset_id), refresh.topic, refresh.partition, refresh.next_offset)
        self._subscriber.request(lambda correlation: frames.write_ready(correlation, ready), lambda answer: None)

    def _begin_again(self, refresh: Refresh) -> None:
        """The staging store failed: the broker announces the refresh again, and begin() says where it stands."""
        self._refreshes.pop(TopicPartition(refresh.topic, refresh.partition), None)
        wanted = Wanted(refresh.topic, refresh.partition, Start.COMMITTED, frames.NO_LOG_ID, -1, 0)
        self._subscriber.seek(wanted)

    def _ask(self, write: Callable[[int], bytes], timeout: float | None) -> Answer:
        found: list[Answer | None] = []
        done = threading.Event()

        def answered(answer: Answer | None) -> None:
            found.append(answer)
            done.set()

        self._subscriber.request(write, answered)
        if not done.wait(timeout):
            raise TimeoutError("the broker did not answer in time")
        if found[0] is None:
            raise self._subscriber.last_error or UnreachableError(f"no broker at {self._subscriber.link.server}")
        return found[0]

    # ---- ending ----

    def close(self) -> None:
        """Send the last acknowledgements and leave the group. Iterators end."""
        if self._subscriber.closed:
            return
        self._subscriber.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
            self._subscriber.loop.close()
        self._write_positions()

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside ----

    def _next(self, deadline: float | None) -> Item | None:
        """What arrived next; records count as handed out from here on."""
        subscriber = self._subscriber
        with subscriber.ready:
            while not subscriber.closed:
                while subscriber.arrived:
                    item = subscriber.arrived.popleft()
                    if not isinstance(item, Arrived):
                        return item
                    place = subscriber.places[TopicPartition(item.deliver.topic, item.deliver.partition)]
                    if place.paused:
                        place.parked.append(item)
                    elif item.deliver.lease == place.lease:
                        self._hand_out(item, place)
                        return item
                now = subscriber.loop.clock_now()
                waits = [1.0] if self._timeout is not None else []
                down = subscriber.down_since
                if self._timeout is not None and down is not None and now - down >= self._timeout:
                    return subscriber.last_error or UnreachableError(f"no broker at {subscriber.link.server}")
                if deadline is not None:
                    if now >= deadline:
                        return None
                    waits.append(deadline - now)
                subscriber.ready.wait(min(waits) if waits else None)
            return None

    @staticmethod
    def _hand_out(item: Arrived, place: PartitionState) -> None:
        place.handed = item.deliver.last + 1

    def _decode(self, item: Arrived) -> list[Record]:
        deliver = item.deliver
        records = batch.decode(item.batches, deliver.topic, deliver.partition, deliver.first, deliver.last)
        if len(records) != deliver.last + 1 - deliver.first and not deliver.gaps:
            check_dense(item.batches, deliver.first, deliver.last)
        age_ms = deliver.age_ms + (self._subscriber.loop.clock_now() - item.at) * 1000
        if age_ms >= 1.0:
            records = self._within_ttl(records, age_ms)
        seen = records[-1].offset + 1 if records else deliver.first
        if seen <= deliver.last:
            # Nothing for the handler behind here (control batches, gaps, expired): done with when all before it is.
            self._subscriber.passed(TopicPartition(deliver.topic, deliver.partition), seen, deliver.last + 1)
        return records

    def _within_ttl(self, records: list[Record], age_ms: float) -> list[Record]:
        """Leave out records that have outlived their own time to live."""
        kept = [record for record in records if not record.headers or not _expired(record, age_ms)]
        self.expired += len(records) - len(kept)
        return kept

    def _gap(self, topic: str, partition: int, gap: Gap) -> None:
        error = GapError(topic, partition, gap.first, gap.last, gap.reason.name)
        if self._on_gap is None:
            raise error
        self._on_gap(error)

    def _on_notice(self, notice: Notice) -> None:
        if notice.holding is Holding.ASSIGNED:
            if self._on_assigned is not None:
                self._on_assigned([notice.partition])
            return
        self._refreshes.pop(notice.partition, None)
        try:
            if self._on_revoked is not None and not notice.late:
                self._on_revoked([notice.partition])
        finally:
            if notice.holding is Holding.REVOKING:
                self._subscriber.returned(notice.partition)
            else:
                self._subscriber.appeared(notice.partition)

    def _take_back(self, key: TopicPartition) -> None:
        """What is being handed out of a partition ends here."""
        if self._handing and (self._handing[0].topic, self._handing[0].partition) == key:
            self._handing.clear()
        if self._given is not None and (self._given.topic, self._given.partition) == key:
            self._given, self._given_count = None, 0
        if self._rest and (self._rest[0].topic, self._rest[0].partition) == key:
            self._rest.clear()


def check_dense(batches: bytes, first: int, last: int) -> None:
    """Some of [first, last] are no records: fine when control batches stand there. Raises DamagedBatchError when
    nothing does, for the base offset of a batch lies outside of its CRC."""
    expected, position = None, 0
    while position < len(batches):
        header = batch.read_header(batches, position)
        if header.base_offset != expected if expected is not None else header.base_offset > first:
            raise DamagedBatchError(
                f"a batch at {header.base_offset}, not at {first if expected is None else expected}"
            )
        expected, position = header.last_offset + 1, position + header.size
    if expected is None or expected <= last:
        raise DamagedBatchError(f"the delivery of {first} to {last} ends at {expected}")


def _expired(record: Record, age_ms: float) -> bool:
    for name, value in record.headers:
        if name == TTL_HEADER and value is not None and value.isdigit():
            return int(value) < age_ms
    return False


__all__ = ["Consumer", "CorruptBatchError", "parse_from"]
