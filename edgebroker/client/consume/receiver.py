"""The caller's side of receiving: takes what the I/O thread received, decodes it, runs the callbacks.

Subscriber.incoming -> a delivery -> decoded, without what has expired -> records, or the staging store
                    -> an assignment, a refresh, an error -> callbacks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgebroker.client.consume import decoding
from edgebroker.client.consume.partition_state import AssignmentChange, Incoming, PartitionState, ReceivedDelivery
from edgebroker.client.consume.refresh_loader import RefreshLoader
from edgebroker.client.consume.subscriber import Subscriber
from edgebroker.common.errors import DamagedBatchError, EdgeBrokerError, GapError, UnreachableError
from edgebroker.common.messages import Holding
from edgebroker.common.records import Record
from edgebroker.common.types import Delivery, TopicPartition
from edgebroker.network.wire.frames import Gap, Reset


class Callbacks(NamedTuple):
    """What the caller wants to be told: deliveries, gaps (None: they are raised), partitions that were assigned, or
    are revoked."""

    on_delivery: Callable[[Delivery], object] | None
    on_gap: Callable[[GapError], object] | None
    on_assigned: Callable[[Sequence[TopicPartition]], object] | None
    on_revoked: Callable[[Sequence[TopicPartition]], object] | None


class Receiver:
    """Belongs to the thread of the consumer. `timeout`: seconds without a connection that are an error; `loaded` is
    called when records went into the staging store, `take_back` when what was handed out of a partition does not count
    any more. `expired` counts the records that had outlived their time to live."""

    def __init__(
        self,
        subscriber: Subscriber,
        loader: RefreshLoader,
        callbacks: Callbacks,
        timeout: float | None,
        loaded: Callable[[], None],
        take_back: Callable[[TopicPartition], None],
    ) -> None:
        self._subscriber, self._loader, self._callbacks, self._timeout = subscriber, loader, callbacks, timeout
        self._loaded, self._take_back = loaded, take_back
        self.expired = 0

    def receive(self, timeout: float | None) -> list[Record]:
        """The records of the next delivery; [] after `timeout` seconds, or when the consumer was closed."""
        clock = self._subscriber.loop.clock_now
        deadline = None if timeout is None else clock() + timeout
        while True:
            item = self._next(deadline)
            if item is None:
                return []
            if isinstance(item, EdgeBrokerError):
                raise item
            if isinstance(item, AssignmentChange):
                self._change_assignment(item)
            elif isinstance(item, Reset):
                self._take_back(TopicPartition(item.topic, item.partition))
                self._loader.begin(item)
            else:
                try:
                    records = self._decode(item)
                except DamagedBatchError as error:
                    self._subscriber.deliver_again(item.partition, item.deliver.first, str(error))
                    continue
                if self._callbacks.on_delivery is not None:
                    one = item.deliver
                    self._callbacks.on_delivery(
                        Delivery(*item.partition, one.log_id, one.epoch, one.first, one.last, item.batches)
                    )
                refreshing = self._loader.loading(item.partition)
                if refreshing:
                    self._loader.load(item.partition, records, item.deliver.last + 1, item.deliver.epoch)
                    self._loaded()
                for gap in item.deliver.gaps:
                    self._gap(item.partition, gap)
                if records and not refreshing:
                    return records
            # A refresh may go on for minutes; who polls has other things to do.
            if deadline is not None and clock() >= deadline:
                return []

    def _next(self, deadline: float | None) -> Incoming | None:
        """What was received next; records count as handed out from here on."""
        subscriber = self._subscriber
        with subscriber.changed:
            while not subscriber.closed:
                while subscriber.incoming:
                    item = subscriber.incoming.popleft()
                    if not isinstance(item, ReceivedDelivery):
                        return item
                    state = subscriber.partitions[item.partition]
                    if state.paused:
                        state.parked.append(item)
                    elif item.deliver.lease == state.lease:
                        self._hand_out(item, state)
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
                subscriber.changed.wait(min(waits) if waits else None)
        if subscriber.orphaned:
            raise ValueError("the consumer was made before the process forked; make another one in this process")
        return None

    @staticmethod
    def _hand_out(item: ReceivedDelivery, state: PartitionState) -> None:
        state.handed_out = item.deliver.last + 1
        state.handed_out_of = (item.deliver.log_id, item.deliver.epoch)

    def _decode(self, item: ReceivedDelivery) -> list[Record]:
        records = decoding.decode(item)
        deliver = item.deliver
        age_ms = deliver.age_ms + (self._subscriber.loop.clock_now() - item.received_at) * 1000
        if age_ms >= 1.0:
            kept = decoding.within_ttl(records, age_ms)
            self.expired += len(records) - len(kept)
            records = kept
        seen = records[-1].offset + 1 if records else deliver.first
        if seen <= deliver.last:
            # No record for the handler after here (control batches, gaps, expired): done when all before it is.
            self._subscriber.skip(item.partition, seen, deliver.last + 1)
        return records

    def _gap(self, key: TopicPartition, gap: Gap) -> None:
        error = GapError(*key, gap.first, gap.last, gap.reason.name)
        if self._callbacks.on_gap is None:
            raise error
        self._callbacks.on_gap(error)

    def _change_assignment(self, change: AssignmentChange) -> None:
        if change.holding is Holding.ASSIGNED:
            if self._callbacks.on_assigned is not None:
                self._callbacks.on_assigned([change.partition])
            return
        self._loader.forget(change.partition)
        try:
            if self._callbacks.on_revoked is not None and not change.late:
                self._callbacks.on_revoked([change.partition])
        finally:
            if change.holding is Holding.REVOKING:
                self._subscriber.release_revoked(change.partition)
            else:
                self._subscriber.report_presence(change.partition)
