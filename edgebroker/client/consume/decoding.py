"""From a delivery to the records that the caller gets: decoded, complete, and within their time to live."""

from __future__ import annotations

from edgebroker.client.consume.partition_state import ReceivedDelivery
from edgebroker.common import batch
from edgebroker.common.errors import DamagedBatchError
from edgebroker.common.records import Record

TTL_HEADER = "eb-ttl-ms"


def decode(delivery: ReceivedDelivery) -> list[Record]:
    """The records of a delivery. Raises DamagedBatchError where bytes changed on the way, CorruptBatchError where a
    batch cannot be inflated."""
    deliver = delivery.deliver
    records = batch.decode(delivery.batches, deliver.topic, deliver.partition, deliver.first, deliver.last)
    if len(records) != deliver.last + 1 - deliver.first and not deliver.gaps:
        check_dense(delivery.batches, deliver.first, deliver.last)
    return records


def within_ttl(records: list[Record], age_ms: float) -> list[Record]:
    """The records that have not outlived the time to live in their own header."""
    return [record for record in records if not record.headers or not has_outlived(record, age_ms)]


def check_dense(batches: bytes, first: int, last: int) -> None:
    """Check that batches cover [first, last] where some of it are not records, as with control batches. The base offset
    of a batch is outside its CRC. Raises DamagedBatchError."""
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


def has_outlived(record: Record, age_ms: float) -> bool:
    """Is the time to live in the header of a record shorter than that?"""
    for name, value in record.headers:
        if name == TTL_HEADER and value is not None and value.isdigit():
            # Longer ones are for ever, and take long to read.
            return len(value) <= 18 and int(value) < age_ms
    return False
