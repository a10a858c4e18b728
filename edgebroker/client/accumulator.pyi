from collections.abc import Callable, Iterable

class Batch:
    """Records for one partition on their way; kept until acknowledged."""

    topic: str
    partition: int
    count: int
    created: float
    base_offset: int
    error: Exception | None
    done: bool
    callbacks: list[tuple[Callable[[Sent], object], Sent]] | None
    sequence: int
    correlation: int
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
        """A whole PUBLISH frame; remembers correlation and sequence."""

class Sent:
    """The future of one record."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    def done(self) -> bool: ...
    def result(self, timeout: float | None = None) -> int:
        """Wait for the acknowledgement: the record's offset (-1 at ack level none). Raises what went wrong."""

    def exception(self, timeout: float | None = None) -> Exception | None: ...
    def add_done_callback(self, callback: Callable[[Sent], object]) -> None:
        """Call back with this future when it is done; on the I/O thread, or at once."""

class Topic:
    name: str
    partitions: int
    def __init__(self, name: str, partitions: int) -> None: ...

class Accumulator:
    """What happens in the caller's thread for each record; base of Producer."""

    unacked: int
    unacked_bytes: int
    max_unacked: int
    max_unacked_bytes: int
    batch_records: int
    batch_bytes: int
    max_record: int
    closed: bool
    def __init__(
        self, batch_records: int, batch_bytes: int, max_unacked: int, max_unacked_bytes: int, max_record: int
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
        """Put one record into the batch of its partition and return its future. Blocks while too much is
        unacknowledged. The partition follows from the key (Kafka's murmur2 rule); without a key batches go round.
        `timestamp` in ms since 1970, -1: now. ValueError when the record is too large or the partition unknown."""

    def send_many(
        self, topic: str, values: Iterable[bytes | None], key: bytes | None = None, *, partition: int = -1
    ) -> Sent | None:
        """send() for each value; the last future, None when there was no value."""

    def limit_to(self, max_record: int, max_batch: int) -> None: ...
    def take(self, older_than: float) -> tuple[list[Batch], float]: ...
    def acknowledged(self, batch: Batch, base_offset: int, error: Exception | None) -> None: ...
