"""The time to live in the header of a record."""

from __future__ import annotations

import pytest

from edgebroker.client.consume.decoding import TTL_HEADER, within_ttl
from edgebroker.common import batch


@pytest.mark.parametrize(
    ("value", "age_ms", "kept"),
    [
        (b"1000", 999.0, True),
        (b"1000", 1001.0, False),
        (b"0", 0.5, False),
        (b"9" * 18, 1e9, True),
        (b"9" * 5000, 1e9, True),
        (b"1" + b"0" * 5000, 1e9, True),
        (b"", 1e9, True),
        (b"-5", 1e9, True),
        ("²".encode(), 1e9, True),
        (None, 1e9, True),
    ],
)
def test_any_value(value: bytes | None, age_ms: float, kept: bool) -> None:
    """What is not a number, or one of more digits than any time has, does not shorten the life of a record."""
    [record] = batch.decode(batch.encode([(b"k", b"v", 1000)], headers=[(TTL_HEADER, value)]))
    assert within_ttl([record], age_ms) == ([record] if kept else [])
