"""Producer and Consumer for asyncio: the same clients, none of whose calls blocks the event loop.

The calls that may wait run on a thread of the client, in the order in which they are made; results come back to the
loop. Nothing else of this package needs asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import TypeVar

from edgebroker.client.arguments import StartFrom
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.client.publish.accumulator import Sent
from edgebroker.common.records import Record
from edgebroker.common.runtime.threads import Worker
from edgebroker.common.types import Position, TopicPartition

T = TypeVar("T")
# A consumer that waits for records looks so often whether something else is to be done.
SLICE_SECONDS = 0.05


class _Thread:
    """One thread, and the calls that wait for it."""

    def __init__(self, name: str) -> None:
        self._worker: Worker | None = Worker(name)
        self.waiting = 0

    def call(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Run a job on the thread; a future of what it returns or raises."""
        if self._worker is None:
            raise ValueError("the client is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self.waiting += 1

        def done(result: T | None, error: BaseException | None) -> None:
            self.waiting -= 1
            if future.done():
                return  # cancelled: the job is over all the same
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = job()
            except BaseException as raised:
                error = raised
            _post(loop, lambda: done(result, error))

        self._worker.submit(run)
        return future

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop(0.0)
            self._worker = None


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        pass  # the loop is closed: nobody waits any more


class AsyncProducer:
    """A Producer for asyncio: `AsyncProducer(Producer("127.0.0.1:7420"))`.

    Use it as an asynchronous context manager, or await close().

    Args:
        producer: what publishes; it belongs to this object from now on.

    Threads:
        The thread of one event loop.

    Durability:
        As Producer: a record is stored when its future is done without an error.
    """

    def __init__(self, producer: Producer) -> None:
        self._producer, self._thread = producer, _Thread("async-producer")

    async def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        *,
        headers: Iterable[tuple[str, bytes | None]] | None = None,
        partition: int = -1,
        timestamp: int = -1,
    ) -> asyncio.Future[int]:
        """Add one record to the open batch of its partition and return the future of its offset.

        It waits, without blocking the loop, for the first record of a topic and while too much is unacknowledged. The
        records of one task keep their order.

        Args:
            topic, value, key, headers, partition, timestamp: as for Producer.send().

        Returns:
            A future of the offset: await it, or gather many. What it raises is what Sent.result() raises.

        Raises:
            ArgumentError, TypeError, AnswerError, UnreachableError, ValueError: as Producer.send().
        """

        def send() -> Sent:
            return self._producer.send(topic, value, key, headers=headers, partition=partition, timestamp=timestamp)

        at_once = not self._thread.waiting and self._producer._can_send(topic)
        sent = send() if at_once else await self._thread.call(send)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()

        def done() -> None:
            error = sent.exception(0.0)
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(sent.result(0.0))

        sent.add_done_callback(lambda sent: _post(loop, done))
        return future

    async def send_and_wait(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        *,
        headers: Iterable[tuple[str, bytes | None]] | None = None,
        partition: int = -1,
        timestamp: int = -1,
    ) -> int:
        """send(), and wait until the record is acknowledged; returns its offset.

        Args:
            topic, value, key, headers, partition, timestamp: as for Producer.send().

        Raises:
            ArgumentError, TypeError, AnswerError, UnreachableError, ValueError: as send() and its future.
        """
        return await (await self.send(topic, value, key, headers=headers, partition=partition, timestamp=timestamp))

    async def flush(self, timeout: float | None = None) -> None:
        """Producer.flush(): send open batches now and wait until every record is acknowledged or has failed.

        Args:
            timeout: seconds to wait at most; None: no limit but the producer's own `timeout`.

        Raises:
            TimeoutError: some records were still unacknowledged after `timeout`.
        """
        await self._thread.call(lambda: self._producer.flush(timeout))

    async def close(self, timeout: float | None = 30.0) -> None:
        """Producer.close(): flush, then end the connection. A second call does nothing.

        Args:
            timeout: seconds to wait for acknowledgements; None: no limit but the producer's own `timeout`.
        """
        if not self._producer.closed:
            await self._thread.call(lambda: self._producer.close(timeout))
        self._thread.stop()

    async def __aenter__(self) -> AsyncProducer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncConsumer:
    """A Consumer for asyncio: `AsyncConsumer(Consumer("127.0.0.1:7420", ["prices"], group="labels"))`.

    Iterate over it with `async for`, or await poll(), which is faster for many small records. Use it as an asynchronous
    context manager, or await close(). Acknowledging is as for Consumer, with and without `auto_ack`.

    Args:
        consumer: what reads; it belongs to this object from now on. Its callbacks and its staging store run on a
            thread of their own, not on the loop.

    Threads:
        The thread of one event loop. Several tasks may call it; one of them at a time should poll or iterate.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer, self._thread = consumer, _Thread("async-consumer")
        # What was asked of the thread and not taken, because the task that asked was cancelled.
        self._records: asyncio.Future[list[Record]] | None = None
        self._record: asyncio.Future[Record | None] | None = None

    async def __aiter__(self) -> AsyncIterator[Record]:
        """Iterate over records; waits while there are none, and ends after close().

        Raises what Consumer.poll() raises.
        """
        while not self._consumer.closed:
            if self._record is None:
                self._record = self._thread.call(lambda: self._consumer._next_record(SLICE_SECONDS))
            try:
                record = await asyncio.shield(self._record)
            finally:
                if self._record.done():
                    self._record = None
            if record is not None:
                yield record

    async def poll(self, timeout: float | None = None) -> list[Record]:
        """Consumer.poll(): wait for the next delivery and return its records.

        A poll that is cancelled loses nothing: the next one returns what it would have.

        Args:
            timeout: seconds to wait at most; None: no limit.

        Returns:
            The records of one partition, in order; [] after `timeout`, or when the consumer was closed.

        Raises:
            Exception: what Consumer.poll() raises.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while not self._consumer.closed:
            rest = SLICE_SECONDS if deadline is None else max(0.0, min(SLICE_SECONDS, deadline - loop.time()))
            if self._records is None:
                self._records = self._thread.call(lambda: self._consumer.poll(rest))  # noqa: B023 it is called first
            try:
                records = await asyncio.shield(self._records)
            finally:
                if self._records.done():
                    self._records = None
            if records or (deadline is not None and loop.time() >= deadline):
                return records
        return []

    async def ack(self, record: Record) -> None:
        """Consumer.ack(): everything of this partition up to this record is handled.

        Args:
            record: one that was returned.
        """
        await self._thread.call(lambda: self._consumer.ack(record))

    async def nack(self, record: Record, reason: str = "") -> None:
        """Consumer.nack(): the record could not be handled; it is delivered again.

        Args:
            record: one that was returned.
            reason: why, for the dead letter.
        """
        await self._thread.call(lambda: self._consumer.nack(record, reason))

    async def reject(self, record: Record, reason: str = "") -> None:
        """Consumer.reject(): the record can never be handled; it becomes a dead letter at once.

        Args:
            record: one that was returned.
            reason: why, for the dead letter.
        """
        await self._thread.call(lambda: self._consumer.reject(record, reason))

    async def in_progress(self) -> None:
        """Consumer.in_progress(): more time for what was handed out."""
        await self._thread.call(self._consumer.in_progress)

    async def commit(self, timeout: float | None = 30.0) -> None:
        """Consumer.commit(): wait until the broker has stored what was acknowledged.

        Args:
            timeout: seconds to wait at most; None: no limit.

        Raises:
            TimeoutError: it was not stored within `timeout`.
        """
        await self._thread.call(lambda: self._consumer.commit(timeout))

    async def seek(self, topic: str, partition: int, start: StartFrom) -> None:
        """Consumer.seek(): go on elsewhere in a partition.

        Args:
            topic: the name of the topic.
            partition: the partition.
            start: "committed", "earliest", "latest", an offset, or "@TIME" in milliseconds since 1970.

        Raises:
            ArgumentError: `start` is none of these.
        """
        await self._thread.call(lambda: self._consumer.seek(topic, partition, start))

    async def positions(self) -> dict[tuple[str, int], Position]:
        """Consumer.positions(): the positions after the last acknowledged records, by (topic, partition)."""
        return await self._thread.call(self._consumer.positions)

    async def position_after(self, record: Record) -> Position:
        """Consumer.position_after(): the position after a record, to be stored with its effect.

        Args:
            record: one that was returned.

        Raises:
            ArgumentError: nothing of this partition was returned.
        """
        return await self._thread.call(lambda: self._consumer.position_after(record))

    async def applied(self, topic: str, partition: int, next_offset: int) -> None:
        """Consumer.applied(): what the readers of your own store see.

        Args:
            topic: the topic.
            partition: the partition.
            next_offset: the offset after the last record that readers see.
        """
        await self._thread.call(lambda: self._consumer.applied(topic, partition, next_offset))

    async def switch(self) -> None:
        """Consumer.switch(): ask the staging store again about refreshes that it did not switch yet.

        Raises:
            Exception: what Staging.switch() raises.
        """
        await self._thread.call(self._consumer.switch)

    async def next_offsets(self) -> dict[TopicPartition, int]:
        """Consumer.next_offsets(): where reading stands."""
        return await self._thread.call(self._consumer.next_offsets)

    async def close(self) -> None:
        """Consumer.close(): leave the group. Iterations end, and a poll() that waits returns []."""
        if not self._consumer.closed:
            await self._thread.call(self._consumer.close)
        self._thread.stop()

    async def __aenter__(self) -> AsyncConsumer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._thread.call(lambda: self._consumer.__exit__(kind, error, trace))
        self._thread.stop()


__all__ = ["AsyncConsumer", "AsyncProducer"]
