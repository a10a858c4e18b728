"""The Python producer: blocking, embeddable, callable from several threads, no asyncio needed.

send() encodes a record into a batch in the caller's thread (accumulator, C); one I/O thread frames, sends, retries and
reconnects (sender.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from edgebroker.client.arguments import MOST_OFFSET, check_client_id, check_time, check_whole
from edgebroker.client.credentials import read_credentials
from edgebroker.client.link import default_client_id
from edgebroker.client.publish.accumulator import Sent
from edgebroker.client.publish.sender import Sender
from edgebroker.client.servers import Servers
from edgebroker.common import codecs
from edgebroker.common.errors import ArgumentError
from edgebroker.common.runtime.threads import start_thread
from edgebroker.common.types import AckLevel

log = logging.getLogger(__name__)

ACK_LEVELS = {level.name.lower(): level for level in AckLevel}


class Producer:
    """Publish records to a broker.

    Creating one starts its I/O thread and returns at once; the connection is opened meanwhile, and opened again
    whenever it is lost. Use it as a context manager, or call close().

    Args:
        server: HOST:PORT of the broker. Several, with commas between: the first one that answers is used, another when
            that one does not any more, and one that is named earlier as soon as it is there again (it is looked for
            every 5 minutes). Batches that were not answered by then are sent to the other one, and may be in both.
        ack: when a record counts as acknowledged: "durable" (the broker has synced it to disk: it survives a power
            cut), "replicated" (nodes below have synced it as well, as many as the topic's `replicas`: it survives the
            loss of the broker), "written" (it survives a crash of the broker) or "none" (nothing is promised or
            answered).
        compression: "none", "gzip", "lz4" or "zstd"; a batch is compressed as a whole, on the I/O thread.
        batch_records: a batch with this many records is sent.
        batch_bytes: a batch of this many bytes is sent.
        linger_ms: a batch that is not full is sent this many milliseconds after its first record.
        max_unacked: send() blocks while this many records are unacknowledged.
        max_unacked_bytes: send() blocks while this many bytes are unacknowledged.
        timeout: seconds until a batch that is not acknowledged fails with UnreachableError; None: never.
        client_id: the name of this producer; a second producer with the same name fences the first. Empty: a new name.
        credentials: the file that `edgebroker token create --app` wrote, for brokers of other machines; empty: that of
            $EDGEBROKER_CREDENTIALS, or none.

    Raises:
        ArgumentError: an argument has a value that is not allowed.

    Threads:
        Every method may be called from any thread; records of one thread keep their order in a partition.

    Durability:
        A record is stored when its future is done without an error. Batches that are sent again after a lost connection
        are not stored twice.
        A process that ends without close() waits up to 10 seconds for acknowledgements, and logs how many are missing.
        After a fork, only the process that made the producer can use it.
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
        credentials: str | Path = "",
    ) -> None:
        if ack not in ACK_LEVELS:
            raise ArgumentError(f"ack {ack!r} is unknown; use one of {', '.join(ACK_LEVELS)}")
        if compression not in codecs.CODEC_BITS:
            raise ArgumentError(f"compression {compression!r} is unknown; use one of {', '.join(codecs.CODEC_BITS)}")
        check_client_id(client_id)
        check_whole("batch_records", batch_records, 1, 1_000_000)
        check_whole("batch_bytes", batch_bytes, 1, 1 << 30)
        check_whole("max_unacked", max_unacked, 1, MOST_OFFSET)
        check_whole("max_unacked_bytes", max_unacked_bytes, 1, MOST_OFFSET)
        check_time("linger_ms", linger_ms, "milliseconds")
        check_time("timeout", timeout)
        self._sender = Sender(
            Servers(server),
            client_id=client_id or default_client_id("producer"),
            credentials=read_credentials(credentials),
            level=ACK_LEVELS[ack],
            codec=codecs.CODEC_BITS[compression],
            linger_seconds=linger_ms / 1000,
            timeout=timeout,
            batch_records=batch_records,
            batch_bytes=batch_bytes,
            max_unacked=max_unacked,
            max_unacked_bytes=max_unacked_bytes,
        )
        self._accumulator = self._sender.accumulator
        if type(self).send is Producer.send:
            # One call for each record: straight into C.
            self.send = self._accumulator.send  # type: ignore[method-assign]
        self._thread = start_thread("edgebroker-producer", self._sender.loop.run)

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        *,
        headers: Iterable[tuple[str, bytes | None]] | None = None,
        partition: int = -1,
        timestamp: int = -1,
    ) -> Sent:
        """Add one record to the open batch of its partition and return its future.

        The batch is sent when it is full or has lingered. The first record of a topic waits for the broker, which says
        how many partitions the topic has; send() blocks as well while too much is unacknowledged.

        Args:
            topic: the name of the topic; the broker creates it when its configuration says so.
            value: the value; None: none, which in a table deletes the key.
            key: records with the same key go to the same partition (Kafka's murmur2 rule) and keep their order; without
                one the batches go to the partitions in turn.
            headers: (name, value) pairs that are stored with the record.
            partition: the partition, from 0; -1: by the key.
            timestamp: milliseconds since 1970; -1: now.

        Returns:
            The future of this record: result() waits for its offset.

        Raises:
            ArgumentError: the record is larger than the broker allows, or the partition does not exist.
            TypeError: a key, a value or a header is not bytes.
            AnswerError: the topic does not exist and the broker does not create it.
            UnreachableError: no broker answered within `timeout`.
            ValueError: the producer is closed.

        Threads:
            Any thread.

        Durability:
            Nothing is stored when it returns. The record is when the future is done without an error.
        """
        return self._accumulator.send(topic, value, key, headers=headers, partition=partition, timestamp=timestamp)

    def open_topic(self, topic: str) -> int:
        """Wait until the broker has described a topic. send() does it by itself for the first record of a topic.

        Args:
            topic: the name of the topic; the broker creates it when its configuration says so.

        Returns:
            How many partitions the topic has.

        Raises:
            AnswerError: the topic does not exist and the broker does not create it.
            UnreachableError: no broker answered within `timeout`.
            ValueError: the producer is closed.

        Threads:
            Any thread.

        Durability:
            A topic that was created by this is stored.
        """
        return self._sender.open_topic(topic).partitions

    def send_many(
        self, topic: str, values: Iterable[bytes | None], key: bytes | None = None, *, partition: int = -1
    ) -> Sent | None:
        """Call send() for each of these values.

        Args:
            topic: the name of the topic.
            values: the values, one for each record.
            key: the key of every record.
            partition: the partition, from 0; -1: by the key.

        Returns:
            The future of the last record; None when there was no value. The others may fail by themselves: flush() and
            look at this one only when all of them go to the same partition.

        Raises:
            ArgumentError, TypeError, AnswerError, UnreachableError, ValueError: as send(); values before the one that
                raised are sent.

        Threads:
            Any thread.

        Durability:
            As send().
        """
        return self._accumulator.send_many(topic, values, key, partition=partition)

    def flush(self, timeout: float | None = None) -> None:
        """Send open batches now and wait until every record is acknowledged or has failed.

        Args:
            timeout: seconds to wait at most; None: no limit but the producer's own `timeout`.

        Raises:
            TimeoutError: some records were still unacknowledged after `timeout`; they stay on their way.

        Threads:
            Any thread.

        Durability:
            Every record sent before has its outcome in its future: flush() itself does not raise what failed.
        """
        self._sender.flush(timeout)

    def close(self, timeout: float | None = 30.0) -> None:
        """Flush, then end the connection and the I/O thread. A second call does nothing.

        What is not acknowledged within `timeout` fails with UnreachableError in its future, and is logged.

        Args:
            timeout: seconds to wait for acknowledgements; None: no limit but the producer's own `timeout`.

        Threads:
            Any thread; a blocked send() of another thread raises ValueError.

        Durability:
            As flush().
        """
        if self.closed:
            return
        try:
            self.flush(timeout)
        except TimeoutError:
            log.error("%d records were not acknowledged when the producer was closed", self.unacked)
        self._sender.close()
        self._thread.join(5.0)
        self._sender.closed()

    def _can_send(self, topic: str) -> bool:
        """Would send() return at once? The topic is known, and there is room. Any thread."""
        return self._accumulator.ready(topic)

    @property
    def client_id(self) -> str:
        """The name under which the broker knows this producer."""
        return self._sender.link.client_id

    @property
    def unacked(self) -> int:
        """How many records are neither acknowledged nor failed. Any thread."""
        return self._accumulator.unacked

    @property
    def closed(self) -> bool:
        """True after close(). Any thread."""
        return self._accumulator.closed

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["Producer", "Sent"]
