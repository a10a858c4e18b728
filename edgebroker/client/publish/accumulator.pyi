from collections.abc import Callable, Iterable
from typing import Any, Protocol

class PendingBatch:
    """Records for one partition until they are acknowledged; what the futures of those records look at."""

    topic: str
    partition: int
    count: int
    created: float
    base_offset: int
    error: Exception | None
    done: bool
    callbacks: list[tuple[Callable[[Sent], object], Sent]] | None
    sequence: int  # -1: it has none yet
    correlation: int
    ordinal: int
    sendings: int
    answer: Any  # what the owner keeps of the last answer
    chosen: bool  # the caller chose the partition
    moved: list[Sent] | None  # where its records are now
    @property
    def size(self) -> int: ...
    def records(self) -> bytes: ...
    def frame(
        self,
        correlation: int,
        prefix: bytes,
        producer_id: int,
        producer_epoch: int,
        sequence: int,
        codec: int = 0,
        packed: bytes | None = None,
    ) -> bytes:
        """A whole PUBLISH frame; remembers its correlation."""

class Sent:
    """The future of one record, as Producer.send() returns it.

    Threads:
        Every method may be called from any thread.
    """

    @property
    def topic(self) -> str:
        """The topic of the record."""

    @property
    def partition(self) -> int:
        """The partition that the record was put into. While it is not done, a topic that is created again with another
        number of partitions may move it."""

    def done(self) -> bool:
        """Tell whether the record is acknowledged or has failed. Never blocks."""

    def result(self, timeout: float | None = None) -> int:
        """Send the open batches now and wait until this record is acknowledged.

        Args:
            timeout: seconds to wait at most; None: no limit but the producer's own `timeout`.

        Returns:
            The offset of the record, or -1 at ack level "none".

        Raises:
            TimeoutError: it was not acknowledged within `timeout`; it still may be, later.
            AnswerError: the broker refused the record.
            UnreachableError: no acknowledgement within the producer's `timeout`, or the producer was closed before;
                whether the record is stored is unknown.

        Durability:
            When it returns, the record is as durable as the producer's `ack` says.
        """

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait like result(), and return what went wrong instead of raising it.

        Args:
            timeout: seconds to wait at most; None: no limit but the producer's own `timeout`.

        Returns:
            None when the record is acknowledged, else what result() would raise.

        Raises:
            TimeoutError: the outcome was not known within `timeout`.
        """

    def add_done_callback(self, callback: Callable[[Sent], object]) -> None:
        """Have `callback` called with this future once the record is acknowledged or has failed.

        It is called on the producer's I/O thread, where it must not block, or at once when the record is done. An
        exception that it raises on the I/O thread is logged and goes no further.

        Args:
            callback: called with this future as its only argument.
        """

class TopicBatches:
    """The open batch of each partition of a topic."""

    name: str
    partitions: int
    def __init__(self, name: str, partitions: int) -> None: ...

class AccumulatorOwner(Protocol):
    """What an accumulator calls, in the caller's thread."""

    def open_topic(self, name: str) -> TopicBatches:
        """Find out how many partitions a topic has."""

    def batch_full(self) -> None:
        """take() has something new."""

    def batch_begun(self) -> None:
        """There is an open batch, which take() gives when it is old enough."""

    def wait_for_room(self) -> None:
        """Block while too much is unacknowledged; raise when the accumulator is closed."""

    def encode_headers(self, headers: Iterable[tuple[str, bytes | None]]) -> tuple[int, bytes]: ...
    def invalid(self, message: str) -> Exception:
        """The error to raise for an argument that is not allowed."""

    def too_large(self, message: str) -> Exception:
        """The one to raise for a record that is larger than the broker allows."""

    def wait_for(self, batch: PendingBatch, timeout: float | None) -> None:
        """Block until a batch is done."""

    def run_callbacks(self, batch: PendingBatch) -> None:
        """Call the callbacks of a batch that is done."""

class Accumulator:
    """What happens in the caller's thread for each record.

    The owner provides open_topic(name) -> TopicBatches, batch_full(), batch_begun(), wait_for_room(), which raises
    when `closed`, invalid(message) and too_large(message) -> an exception, encode_headers(), and what Sent needs:
    wait_for() and run_callbacks(). It calls acknowledged() for each batch that take() gave it.
    """

    unacked: int
    unacked_bytes: int
    max_unacked: int
    max_unacked_bytes: int
    batch_records: int
    batch_bytes: int
    max_record: int
    closed: bool
    def __init__(
        self,
        owner: AccumulatorOwner,
        *,
        batch_records: int,
        batch_bytes: int,
        max_unacked: int,
        max_unacked_bytes: int,
        max_record: int,
    ) -> None: ...
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
        """Producer.send(), which documents it."""

    def send_many(
        self, topic: str, values: Iterable[bytes | None], key: bytes | None = None, *, partition: int = -1
    ) -> Sent | None:
        """Producer.send_many(), which documents it."""

    def ready(self, topic: str) -> bool:
        """Would send() not wait?"""

    def limit_to(self, max_record: int, max_batch: int) -> None:
        """What the broker allows, in bytes."""

    def take(self, older_than: float) -> tuple[list[PendingBatch], float]:
        """The full batches and those begun before a monotonic time, in order; when the oldest that stays was begun
        (0: none stays)."""

    def repartition(self, name: str, partitions: int) -> None:
        """From now on a topic has so many partitions (0: ask again with its next record). Its open batches are full."""

    def move(self, batch: PendingBatch, partitions: int) -> list[PendingBatch]:
        """Put the records of a batch into batches for as many partitions, in the order that they have; their futures
        follow. Not for a batch whose partition the caller chose."""

    def acknowledged(self, batch: PendingBatch, base_offset: int, error: Exception | None) -> None:
        """A batch is over: its futures are done (callbacks are the owner's business)."""
