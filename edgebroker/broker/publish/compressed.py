"""Checking the compressed batches of a run, on the checker thread: each is inflated once, bounded."""

from __future__ import annotations

from edgebroker.common import codecs, records
from edgebroker.common.batch import EXPLANATION, HEADER_BYTES, Reason, read_header
from edgebroker.common.errors import CorruptBatchError, InflatedTooLargeError
from edgebroker.common.spans import SPAN, pack_span


def check_compressed(
    data: memoryview, spans: bytes, max_inflated: int, max_record: int
) -> tuple[bytes, list[tuple[int, Reason, str]]]:
    """Inflate every compressed batch of a run once, bounded: (spans of good frames, [(correlation, reason, why)])."""
    good, bad = bytearray(), []
    for correlation, start, end in SPAN.iter_unpack(spans):
        reason, why, position = Reason.OK, "", start
        while position < end and reason == Reason.OK:
            try:
                header = read_header(data[position:end])
                if header.codec:
                    one = data[position : position + header.size]
                    plain = codecs.inflate(header.codec, bytes(one[HEADER_BYTES:]), max_inflated)
                    reason = Reason(records.check_inflated(one, plain, max_record))
                    why = EXPLANATION.get(reason, "")
                position += header.size
            except CorruptBatchError as error:
                if position == start and header_is_unreadable(data[position:end]):
                    break  # staging says exactly what is wrong with it
                too_large = isinstance(error, InflatedTooLargeError)
                reason, why = Reason.TOO_LARGE if too_large else Reason.BAD_RECORD, str(error)
        if reason:
            bad.append((correlation, reason, why))
        else:
            good += pack_span(correlation, start, end)
    return bytes(good), bad


def header_is_unreadable(data: memoryview) -> bool:
    """True when not even the header of a batch holds."""
    return records.header(data)[1] is None
