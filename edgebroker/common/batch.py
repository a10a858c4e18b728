"""RecordBatch v2, the one format from the producer to the disk of the last terminal (bytes: cext/recordbatch.h).

This file names what the C core returns, and joins it with the codecs.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from edgebroker.common import codecs, records
from edgebroker.common.errors import Code, CorruptBatchError, DamagedBatchError
from edgebroker.common.records import BatchBuilder, Record

if TYPE_CHECKING:
    from typing_extensions import Buffer

HEADER_BYTES = 61
CONTROL_BIT = 0x20
# The largest batch that any configuration allows to store: what a scan of stored bytes believes.
STORED_BATCH_BYTES = 16 << 20


class Reason(IntEnum):
    """Why a batch was refused or a scan stopped; the numbers are those of cext/recordbatch.h."""

    OK = 0
    TRUNCATED = 1
    BAD_LENGTH = 2
    BAD_MAGIC = 3
    BAD_CRC = 4
    BAD_OFFSET = 5
    BAD_EPOCH = 6
    BAD_ATTRIBUTES = 7
    BAD_CODEC = 8
    BAD_COUNT = 9
    BAD_PRODUCER = 10
    BAD_RECORD = 11
    BAD_TIMESTAMP = 12
    TOO_LARGE = 13
    ZEROES = 14

    @property
    def code(self) -> Code:
        """What a producer is answered when its batch was refused for this reason."""
        return _CODES.get(self, Code.INVALID_BATCH)


_CODES = {Reason.OK: Code.OK, Reason.BAD_CODEC: Code.UNSUPPORTED_CODEC, Reason.TOO_LARGE: Code.TOO_LARGE}

EXPLANATION = {
    Reason.TRUNCATED: "the batch is cut off",
    Reason.BAD_LENGTH: "the batch length is smaller than a header",
    Reason.BAD_MAGIC: "only RecordBatch magic 2 is understood",
    Reason.BAD_CRC: "the CRC-32C does not match the batch",
    Reason.BAD_OFFSET: "the base offset does not continue the log",
    Reason.BAD_EPOCH: "the epoch goes back",
    Reason.BAD_ATTRIBUTES: "attributes other than a codec are not allowed from a client",
    Reason.BAD_CODEC: "the codec is not supported; use none, gzip, lz4 or zstd",
    Reason.BAD_COUNT: "the record count and the last offset delta do not fit each other or the size",
    Reason.BAD_PRODUCER: "a batch with a producer id needs an epoch and a sequence",
    Reason.BAD_RECORD: "a record's lengths, offset delta or header do not fit",
    Reason.BAD_TIMESTAMP: "a record's timestamp is too large",
    Reason.TOO_LARGE: "a record or the batch is larger than this broker allows",
    Reason.ZEROES: "zero bytes where a batch should begin",
}


class BatchHeader(NamedTuple):  # `count` hides tuple.count, which is not needed on a header
    """The header of a stored batch. Sizes in bytes, timestamps in milliseconds."""

    base_offset: int
    size: int
    epoch: int
    crc: int
    attributes: int
    count: int  # type: ignore[assignment]
    base_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int

    @property
    def codec(self) -> int:
        return self.attributes & 7

    @property
    def last_offset(self) -> int:
        return self.base_offset + self.count - 1


def read_header(data: Buffer, position: int = 0) -> BatchHeader:
    """The header at `position`; the shape is checked, the CRC is not. Raises CorruptBatchError."""
    reason, fields = records.header(data, position)
    if fields is None:
        raise CorruptBatchError(EXPLANATION[Reason(reason)])
    return BatchHeader(*fields)


def encode(
    messages: Iterable[tuple[bytes | None, bytes | None, int]],
    *,
    codec: codecs.CodecName = "none",
    headers: Iterable[tuple[str, bytes | None]] = (),
    producer_id: int = -1,
    producer_epoch: int = -1,
    base_sequence: int = -1,
) -> bytes:
    """Encode (key, value, timestamp in ms) messages into one batch with base offset 0; `headers` go on every record."""
    builder = BatchBuilder()
    count, raw = records.encode_headers(headers)
    for key, value, timestamp in messages:
        builder.append(value, key, timestamp, count, raw)
    return finish(builder, codec, producer_id, producer_epoch, base_sequence)


def finish(
    builder: BatchBuilder,
    codec: codecs.CodecName = "none",
    producer_id: int = -1,
    producer_epoch: int = -1,
    base_sequence: int = -1,
) -> bytes:
    """Close a builder into a batch, compressing its records as a whole."""
    bits = codecs.CODEC_BITS[codec]
    packed = codecs.deflate(bits, builder.records()) if bits else None
    return builder.build(packed, bits, producer_id, producer_epoch, base_sequence)


def decode(
    data: Buffer,
    topic: str = "",
    partition: int = 0,
    first: int = 0,
    last: int = (1 << 63) - 1,
    max_inflated: int = 16 << 20,
) -> list[Record]:
    """The records of whole batches with offsets in [first, last]. Raises DamagedBatchError at the first bad batch,
    CorruptBatchError when one cannot be inflated."""
    found, good_end, reason = records.decode(
        data, partial(codecs.inflate, limit=max_inflated), topic, partition, first, last
    )
    if reason:
        raise DamagedBatchError(f"{topic}/{partition}: bad batch at byte {good_end}: {EXPLANATION[Reason(reason)]}")
    return found


def partition_for(key: bytes, partitions: int) -> int:
    """Kafka's rule: the same key always goes to the same partition."""
    return (records.murmur2(key) & 0x7FFFFFFF) % partitions
