"""Other people's readers on our segment files, and other people's batches in our log."""

from pathlib import Path
from typing import Any

import pytest
from aiokafka.record import MemoryRecords as AioRecords
from kafka.record import MemoryRecords as KafkaRecords
from kafka.record.default_records import DefaultRecordBatchBuilder

from edgebroker.common import batch
from edgebroker.common.errors import Code
from tests.kit.storage import StoreHarness, store_settings

CODECS = ("none", "gzip", "lz4", "zstd")


def rows(records: Any) -> list[tuple[int, int, bytes | None, bytes | None]]:
    """(offset, timestamp, key, value) of everything a foreign reader finds; CRCs are checked."""
    found = []
    while (one := records.next_batch()) is not None:
        assert one.validate_crc()
        found += [(record.offset, record.timestamp, record.key, record.value) for record in one]
    return found


def fill(harness: StoreHarness) -> list[tuple[int, int, bytes | None, bytes | None]]:
    """Batches in every codec, over several segments; what they hold."""
    expected: list[tuple[int, int, bytes | None, bytes | None]] = []
    for number in range(24):
        messages = [
            (None if item % 3 else b"key-%d" % item, None if item == 4 else b"value %d " % item * 20, 1000 + item)
            for item in range(6)
        ]
        encoded = batch.encode(messages, codec=CODECS[number % 4], headers=[("h", b"1"), ("n", None)])
        offset = harness.append_inflated(encoded)
        expected += [(offset + item, stamp, key, value) for item, (key, value, stamp) in enumerate(messages)]
    return expected


@pytest.mark.parametrize("reader", [KafkaRecords, AioRecords])
def test_foreign_readers_read_our_segment_files(tmp_path: Path, reader: Any) -> None:
    harness = StoreHarness(tmp_path / "node", store_settings(segment_bytes=3000))
    harness.create()
    expected = fill(harness)
    segments = list(harness.log().segments)
    assert len(segments) >= 3
    data = [segment.path.read_bytes()[: segment.size] for segment in segments]
    harness.close()
    if reader is AioRecords:
        pytest.importorskip("cramjam", reason="aiokafka reads lz4 and zstd only with cramjam")
    assert [row for piece in data for row in rows(reader(piece))] == expected


@pytest.mark.parametrize("codec", [0, 1, 3, 4])
def test_batches_of_a_foreign_writer_are_stored_and_read_back(tmp_path: Path, codec: int) -> None:
    builder = DefaultRecordBatchBuilder(2, codec, False, -1, -1, -1, 1 << 20)
    for item in range(10):
        builder.append(item, timestamp=5000 + item, key=b"k%d" % item, value=b"v" * 50, headers=[("h", b"x")])
    harness = StoreHarness(tmp_path / "node")
    harness.create()
    assert harness.append_inflated(bytes(builder.build())) == 0
    found, corrupt_ranges = harness.read()
    assert not corrupt_ranges
    assert [(row.offset, row.value, row.timestamp) for row in found] == [
        (item, b"v" * 50, 5000 + item) for item in range(10)
    ]
    harness.close()


def test_a_refused_batch_is_refused_by_its_code(tmp_path: Path) -> None:
    harness = StoreHarness(tmp_path / "node")
    harness.create()
    assert Code(harness.stage(b"not a batch" * 10)[0].code) is Code.INVALID_BATCH
    harness.close()
