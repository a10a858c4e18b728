from collections.abc import Callable, Iterable

from typing_extensions import Buffer

class Record:
    """One record as a consumer receives it; immutable, and not created by callers.

    Attributes:
        topic: the topic that it was read from.
        partition: the partition, from 0.
        offset: its number in the partition, the same at every node of the tree.
        timestamp: milliseconds since 1970, as the producer set it.
        key: bytes, or None.
        value: bytes, or None: in a table this deletes the key.
        headers: a tuple of (name, bytes or None), in the producer's order.
    """

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> tuple[tuple[str, bytes | None], ...]: ...

def decode(
    data: Buffer,
    inflate: Callable[[int, bytes], bytes],
    topic: str,
    partition: int,
    first: int = 0,
    last: int = ...,
    max_batch: int = ...,
) -> tuple[list[Record], int, int]:
    """Decode whole batches, keeping offsets in [first, last]; control batches are hidden.

    Every batch's CRC is verified; `inflate(codec, packed)` is called for compressed ones and its exceptions pass.
    Returns (records, good_end, reason): the bytes understood and why decoding stopped (0: all of it).
    """

def header(data: Buffer, position: int = 0) -> tuple[int, tuple[int, ...] | None]:
    """Return (reason, fields) of the batch header at `position`; edgebroker.common.batch names the fields."""

def chain(data: Buffer, value: int) -> int:
    """The chain checksum behind whole, checked batches that follow a place where it is `value`."""

def check_inflated(batch_bytes: bytearray | memoryview, plain: Buffer, max_record: int) -> int:
    """Check the inflated records of a compressed client batch, and set its maximum timestamp right; the reason, 0 when
    they are good."""

def murmur2(key: Buffer) -> int:
    """Kafka's murmur2 of a key, as an unsigned 32-bit number."""

def encode_headers(headers: Iterable[tuple[str, bytes | None]]) -> tuple[int, bytes]:
    """Encode record headers once for BatchBuilder.append: (count, bytes). TypeError names what is wrong."""

class BatchBuilder:
    """Encodes records one after the other into the body of one batch. Not thread-safe."""

    count: int
    @property
    def size(self) -> int: ...
    def append(
        self,
        value: bytes | None,
        key: bytes | None,
        timestamp: int,
        header_count: int = 0,
        headers: bytes = b"",
    ) -> None: ...
    def records(self) -> bytes: ...
    def build(
        self,
        packed: bytes | None = None,
        attributes: int = 0,
        producer_id: int = -1,
        producer_epoch: int = -1,
        base_sequence: int = -1,
    ) -> bytes: ...

def restamp(batch: Buffer, base_offset: int = -1, epoch: int = -1) -> bytes:
    """A copy with another base offset and epoch, as an origin assigns them (both lie outside the CRC)."""
