"""Compressed records: bounded, complete, and nothing behind them, whatever the codec."""

from __future__ import annotations

import pytest

from edgebroker.common import codecs
from edgebroker.common.codecs import CODEC_BITS
from edgebroker.common.errors import CorruptBatchError, InflatedTooLargeError

PACKED = [bits for bits in CODEC_BITS.values() if bits]
PLAIN = b"a record, and another one; " * 40


@pytest.mark.parametrize("codec", PACKED)
def test_there_and_back(codec: int) -> None:
    packed = codecs.deflate(codec, PLAIN)
    assert codecs.inflate(codec, packed) == PLAIN
    assert codecs.inflate(codec, packed, len(PLAIN)) == PLAIN
    assert codecs.inflate(codec, codecs.deflate(codec, b"")) == b""
    with pytest.raises(InflatedTooLargeError):
        codecs.inflate(codec, packed, len(PLAIN) - 1)


@pytest.mark.parametrize("codec", PACKED)
def test_what_is_cut_anywhere(codec: int) -> None:
    packed = codecs.deflate(codec, PLAIN)
    for size in range(len(packed)):
        with pytest.raises(CorruptBatchError):
            codecs.inflate(codec, packed[:size])


@pytest.mark.parametrize("codec", PACKED)
def test_something_behind_the_end(codec: int) -> None:
    """A second member is read by some readers and not by others: they would see other records."""
    packed = codecs.deflate(codec, PLAIN)
    for behind in (b"\0", b"garbage", packed, codecs.deflate(codec, b"more")):
        with pytest.raises(CorruptBatchError):
            codecs.inflate(codec, packed + behind)
