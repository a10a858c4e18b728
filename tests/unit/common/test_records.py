"""Records and batches: round trips, the slow twin, every damage, Kafka's own clients, and bounded codecs."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import random
import struct
import tracemalloc
import warnings
from collections.abc import Iterator
from functools import partial
from types import ModuleType

import lz4.frame
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebroker.common import batch, codecs, records
from edgebroker.common.batch import Reason
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code, CorruptBatchError
from edgebroker.storage.log.staging import Stage
from tests.kit import oracles

SEED = 20240502
MAX = 1 << 20
NAMES: list[codecs.CodecName] = ["none", "gzip", "lz4", "zstd"]
INFLATE = partial(codecs.inflate, limit=1 << 24)
quick = settings(derandomize=True, deadline=None, max_examples=150, database=None)

blobs = st.none() | st.binary(max_size=80)
times = st.integers(-(1 << 61), 1 << 61) | st.integers(0, 1 << 41)
header_lists = st.lists(st.tuples(st.text(max_size=12), blobs), max_size=4)
messages = st.lists(st.tuples(blobs, blobs, times, header_lists), min_size=1, max_size=12)
SMALL = [(b"key", b"value", 1_700_000_000_000), (None, b"", 1_699_999_999_000), (b"", None, 1_700_000_000_500)]
HEADERS = [("trace", b"\x00\xff"), ("größe", None), ("", b"")]


def build(rows: list, codec: codecs.CodecName = "none", **producer: int) -> bytes:
    builder = records.BatchBuilder()
    for key, value, timestamp, headers in rows:
        builder.append(value, key, timestamp, *records.encode_headers(headers))
    return batch.finish(builder, codec, **producer)


def stage_reason(data: bytes, max_batch: int = MAX, max_record: int = MAX) -> tuple[int, int]:
    """(code, reason) that a fresh Stage gives for one frame."""
    stage = Stage(0, 0, max_batch, max_record, 5)
    answers, frames, _, new = stage.append(data, struct.pack("<QII", 7, 0, len(data)), 0.0, True)
    assert frames == 1
    offset, code, reason = struct.unpack("<qii", answers)
    assert (offset >= 0) == (code == 0) == (new > 0)
    return code, reason


def reseal(data: bytes | bytearray, **changes: int) -> bytes:
    """Change header fields by name, then make the CRC right again."""
    head = oracles.HEADER.pack(*oracles.Header(*oracles.HEADER.unpack(data[:61]))._replace(**changes))
    covered = head[21:] + data[61:]
    return head[:17] + struct.pack(">I", crc32c(covered)) + covered


def rows_of(found: list[records.Record]) -> list[tuple]:
    return [(r.offset, r.timestamp, r.key, r.value, r.headers) for r in found]


@pytest.mark.parametrize("codec", NAMES)
@given(rows=messages)
@quick
def test_round_trip_and_oracle(codec: codecs.CodecName, rows: list) -> None:
    raw = build(rows, codec)
    found = rows_of(batch.decode(raw, "t", 3))
    assert found == [(i, t, k, v, tuple(h)) for i, (k, v, t, h) in enumerate(rows)]
    assert (found, len(raw), Reason.OK) == oracles.decode(raw, INFLATE)
    head = batch.read_header(raw)
    assert (head.count, head.size, head.codec) == (len(rows), len(raw), codecs.CODEC_BITS[codec])
    assert (head.base_timestamp, head.max_timestamp) == (rows[0][2], max(row[2] for row in rows))
    assert stage_reason(raw) == (0, 0)


@given(rows=messages, offset=st.integers(0, 1 << 60), first=st.integers(-2, 14), last=st.integers(-2, 14))
@quick
def test_decode_keeps_the_offsets_asked_for(rows: list, offset: int, first: int, last: int) -> None:
    raw = b"".join(records.restamp(build(rows), offset + i * len(rows), 4) for i in range(2))
    found = batch.decode(raw, first=offset + first, last=offset + last)
    everything = [r[0] for r in oracles.decode(raw, INFLATE)[0]]
    assert [r.offset for r in found] == [o for o in everything if offset + first <= o <= offset + last]
    assert batch.read_header(raw).epoch == 4


def test_record_is_a_plain_object() -> None:
    record = batch.decode(batch.encode([(b"k", None, -5)], headers=HEADERS), "orders", 9)[0]
    assert (record.topic, record.partition, record.offset, record.timestamp) == ("orders", 9, 0, -5)
    assert record.headers == tuple(HEADERS)
    assert "orders" in repr(record)
    with pytest.raises(AttributeError):
        record.offset = 1


@given(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-(1 << 33), 1 << 33), st.integers(0, 4))
@quick
def test_varint_oracle_inverts(value: int, cut: int) -> None:
    raw = oracles.write_varint(value)
    assert oracles.read_varint(raw, 0, len(raw), 64) == (value, len(raw))
    with pytest.raises(oracles.Bad):
        oracles.read_varint(raw, 0, max(0, len(raw) - 1 - cut), 64)


def compare(data: bytes, context: object) -> None:
    """Extension and oracle say the same about any bytes, as a client's batch and as something to decode."""
    expected = oracles.client_reason(data, MAX, MAX)
    assert stage_reason(data) == (expected.code, expected), context
    found, good_end, reason = records.decode(data, INFLATE, "", 0, -(1 << 63))
    assert (rows_of(found), good_end, reason) == oracles.decode(data, INFLATE), context


def test_truncated_at_every_byte() -> None:
    raw = batch.encode(SMALL, headers=HEADERS) + batch.encode(SMALL[:1])
    for size in range(len(raw)):
        compare(raw[:size], size)


def test_every_bit_flipped() -> None:
    raw = bytearray(batch.encode(SMALL, headers=HEADERS))
    for bit in range(len(raw) * 8):
        raw[bit // 8] ^= 1 << bit % 8
        compare(bytes(raw), f"bit {bit}")
        assert stage_reason(bytes(raw))[0] or bit // 8 < 8 or 12 <= bit // 8 < 16, "only offset and epoch are open"
        raw[bit // 8] ^= 1 << bit % 8


def test_every_bit_and_byte_of_the_records_flipped_under_a_good_crc() -> None:
    rng = random.Random(SEED)
    good = batch.encode(SMALL, headers=HEADERS)
    changed = [(i, good[i] ^ 1 << b) for i in range(61, len(good)) for b in range(8)]
    changed += [(i, rng.randrange(256)) for i in range(61, len(good)) for _ in range(8)]
    for i, byte in changed:
        raw = bytearray(good)
        raw[i] = byte
        sealed = reseal(raw)
        compare(sealed, f"byte {i} = {byte}")
        plain = sealed[61:]
        expected = oracles.client_reason(sealed)
        assert records.check_inflated(bytearray(sealed), plain, MAX) == expected, f"byte {i} = {byte}"


def test_random_bytes() -> None:
    rng = random.Random(SEED + 1)
    good = batch.encode(SMALL, headers=HEADERS)
    for turn in range(1500):
        body = rng.randbytes(rng.randrange(120))
        if turn % 3:
            body = bytearray(good[61:])
            for _ in range(rng.randrange(1, 4)):
                body[rng.randrange(len(body))] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            del body[rng.randrange(len(body)) : rng.choice((0, len(body)))]
        raw = reseal(good[:61] + body, length=len(body) + 49) if turn % 5 else bytes(body)
        compare(raw, f"seed {SEED + 1} turn {turn}")


BASE = batch.encode(SMALL, producer_id=5, producer_epoch=0, base_sequence=0)
REFUSED = {
    "control": ({"attributes": 0x20}, Reason.BAD_ATTRIBUTES),
    "transactional": ({"attributes": 0x10}, Reason.BAD_ATTRIBUTES),
    "log append time": ({"attributes": 0x08}, Reason.BAD_ATTRIBUTES),
    "high attribute": ({"attributes": -0x8000}, Reason.BAD_ATTRIBUTES),
    "snappy": ({"attributes": 2}, Reason.BAD_CODEC),
    "codec 5": ({"attributes": 5}, Reason.BAD_CODEC),
    "codec 7": ({"attributes": 7}, Reason.BAD_CODEC),
    "magic 1": ({"magic": 1}, Reason.BAD_MAGIC),
    "no records": ({"count": 0, "last_delta": -1}, Reason.BAD_COUNT),
    "negative count": ({"count": -1, "last_delta": -2}, Reason.BAD_COUNT),
    "count above last delta": ({"count": 4}, Reason.BAD_COUNT),
    "count above the size": ({"count": 1 << 30, "last_delta": (1 << 30) - 1}, Reason.BAD_COUNT),
    "one record less": ({"count": 2, "last_delta": 1}, Reason.BAD_RECORD),
    "one record more": ({"count": 4, "last_delta": 3}, Reason.BAD_RECORD),
    "producer without epoch": ({"producer_epoch": -1}, Reason.BAD_PRODUCER),
    "producer without sequence": ({"base_sequence": -1}, Reason.BAD_PRODUCER),
    "timestamp overflow": ({"base_timestamp": (1 << 63) - 1}, Reason.BAD_TIMESTAMP),
    "length below a header": ({"length": 48}, Reason.BAD_LENGTH),
    "negative length": ({"length": -1}, Reason.BAD_LENGTH),
    "length beyond the data": ({"length": 1000}, Reason.TRUNCATED),
    "length beyond the limit": ({"length": MAX}, Reason.TOO_LARGE),
    "header only": ({"length": 49}, Reason.BAD_COUNT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_has_its_own_reason(name: str) -> None:
    changes, reason = REFUSED[name]
    raw = reseal(BASE, **changes)
    assert stage_reason(raw) == (reason.code, reason)
    assert oracles.client_reason(raw) is reason
    assert reason in batch.EXPLANATION


@pytest.mark.parametrize("codec", ["none", "gzip"])
@pytest.mark.parametrize(
    "fields",
    [
        {"producer_epoch": -1, "base_sequence": 0},
        {"producer_epoch": 0, "base_sequence": 0},
        {"producer_id": -2},
        {"max_timestamp": 1_700_000_000_501},
        {"max_timestamp": 1_700_000_000_499},
        {"max_timestamp": -1},
    ],
    ids=str,
)
def test_what_clients_write_is_set_right(codec: codecs.CodecName, fields: dict[str, int]) -> None:
    """As Kafka's broker does: no producer id, no producer; the maximum timestamp is the latest record's."""
    good = batch.encode(SMALL, codec=codec)
    raw = bytearray(reseal(good, **fields))
    if codec != "none":
        assert records.check_inflated(raw, INFLATE(codecs.CODEC_BITS[codec], bytes(raw[61:])), MAX) == 0
    stage = Stage(0, 0, MAX, MAX, 5)
    answers, *_ = stage.append(raw, struct.pack("=QII", 1, 0, len(raw)), 0.0, True)
    assert struct.unpack("=qii", answers) == (0, 0, 0)
    stored = bytes(stage.take(MAX) or b"")
    header = batch.read_header(stored)
    assert (header.max_timestamp, header.producer_id) == (1_700_000_000_500, fields.get("producer_id", -1))
    assert rows_of(batch.decode(stored)) == rows_of(batch.decode(good))
    assert stage.producer_count == 0


def test_a_repeat_is_recognised_although_it_is_set_right() -> None:
    raw = reseal(BASE, max_timestamp=0)
    stage = Stage(0, 0, MAX, MAX, 5)
    first, second = (stage.append(raw, struct.pack("=QII", 1, 0, len(raw)), 0.0) for _ in range(2))
    assert first[0] == second[0] == struct.pack("=qii", 0, 0, 0)
    assert (first[3], second[3]) == (len(SMALL), 0)
    stored = bytes(stage.take(MAX) or b"")
    again = Stage(0, 0, MAX, MAX, 5)
    assert again.replay(stored, 0.0) == len(stored)
    again.resume(len(SMALL), 0)
    assert again.append(raw, struct.pack("=QII", 1, 0, len(raw)), 0.0)[3] == 0, "after a restart, too"


def test_codes_of_the_refusals() -> None:
    assert stage_reason(reseal(BASE, attributes=2))[0] == Code.UNSUPPORTED_CODEC
    assert stage_reason(BASE, max_batch=len(BASE) - 1) == (Code.TOO_LARGE, Reason.TOO_LARGE)
    largest = max(oracles.read_record(BASE, 61).size, 1)
    assert stage_reason(BASE, max_record=largest) == (0, 0)
    assert stage_reason(BASE, max_record=largest - 1) == (Code.TOO_LARGE, Reason.TOO_LARGE)
    assert stage_reason(bytes(100)) == (Code.INVALID_BATCH, Reason.ZEROES)
    assert stage_reason(b"") == (Code.INVALID_BATCH, Reason.TRUNCATED)
    assert set(batch.EXPLANATION) == set(Reason) - {Reason.OK}


def test_check_inflated_and_headers() -> None:
    packed = bytearray(batch.encode(SMALL, codec="zstd"))
    plain = INFLATE(4, packed[61:])
    assert records.check_inflated(packed, plain, MAX) == 0
    assert records.check_inflated(packed, plain[:-1], MAX) == Reason.BAD_RECORD
    assert records.check_inflated(packed, plain + b"\0", MAX) == Reason.BAD_RECORD
    assert records.check_inflated(packed, plain, 4) == Reason.TOO_LARGE
    assert records.check_inflated(packed[:40], plain, MAX) == Reason.TRUNCATED
    assert records.header(packed, len(packed)) == (Reason.TRUNCATED, None)
    assert records.header(packed, len(packed) + 1) == (Reason.TRUNCATED, None)
    with pytest.raises(CorruptBatchError, match="cut off"):
        batch.read_header(packed, 1000)
    for wrong in ([(b"name", b"")], [("name", "text")]):
        with pytest.raises(TypeError, match="header"):
            records.encode_headers(wrong)  # type: ignore[arg-type]


def test_control_batches_are_hidden() -> None:
    raw = reseal(BASE, attributes=0x20) + records.restamp(BASE, 3)
    assert [r.offset for r in batch.decode(raw)] == [3, 4, 5]


def test_restamp_needs_a_whole_header() -> None:
    """A copy shorter than the fields it writes would be written beyond its end."""
    with pytest.raises(ValueError, match=r"."):
        records.restamp(b"0123456789", 5)
    with pytest.raises(ValueError, match=r"."):
        records.restamp(BASE[:60], 5)


def test_timestamps_too_far_apart_are_refused_when_encoding() -> None:
    """The delta does not fit into 64 bits: the broker would refuse what was built."""
    builder = records.BatchBuilder()
    builder.append(b"", None, -(1 << 62))
    with pytest.raises((OverflowError, ValueError)):
        builder.append(b"", None, (1 << 63) - 1)


# ---- Kafka's clients ----


def peer_module(peer: str, codec: str, name: str) -> ModuleType:
    """A module of Kafka's client; skips when that client has no package for the codec."""
    needs = {"aiokafka": {"lz4": "cramjam", "zstd": "cramjam"}, "kafka": {"lz4": "lz4", "zstd": "zstandard"}}
    package = needs[peer].get(codec)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{peer} has no {codec} without the package {package}")
    with warnings.catch_warnings():  # theirs, at import
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{peer}.record{name}")


def peer_records(module: ModuleType, raw: bytes) -> Iterator[tuple]:
    reader = module.MemoryRecords(raw)
    while (found := reader.next_batch()) is not None:
        assert found.validate_crc()
        for r in found:
            yield r.offset, r.timestamp, r.key, r.value, tuple(r.headers)


ROWS = [(k, v * 40 if v else v, t, HEADERS if i % 2 else []) for i, (k, v, t) in enumerate(SMALL * 20)]


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("peer", ["kafka", "aiokafka"])
def test_peer_reads_our_batches(peer: str, codec: codecs.CodecName) -> None:
    module = peer_module(peer, codec, "")
    one = build(ROWS, codec, producer_id=9, producer_epoch=1, base_sequence=0)
    raw = records.restamp(one, 100, 2) + records.restamp(one, 100 + len(ROWS), 2)
    found = list(peer_records(module, raw))
    assert found == [(100 + i, t, k, v, tuple(h)) for i, (k, v, t, h) in enumerate(ROWS + ROWS)]


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("peer", ["kafka", "aiokafka"])
def test_we_read_batches_of_the_peer(peer: str, codec: codecs.CodecName) -> None:
    module = peer_module(peer, codec, ".default_records")
    builder = module.DefaultRecordBatchBuilder(2, codecs.CODEC_BITS[codec], 0, -1, -1, -1, MAX)
    for i, (key, value, timestamp, headers) in enumerate(ROWS):
        assert builder.append(i, timestamp, key, value, headers) is not None
    raw = bytes(builder.build())
    assert batch.read_header(raw).codec == codecs.CODEC_BITS[codec]
    assert stage_reason(raw) == (0, 0)
    if codec != "none":
        plain = INFLATE(codecs.CODEC_BITS[codec], raw[61:])
        assert records.check_inflated(bytearray(raw), plain, MAX) == 0
    assert rows_of(batch.decode(raw)) == [(i, t, k, v, tuple(h)) for i, (k, v, t, h) in enumerate(ROWS)]


# The first six are the vectors of Kafka's own test suite.
MURMUR2 = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


def test_murmur2() -> None:
    for key, expected in MURMUR2.items():
        assert records.murmur2(key) == expected & 0xFFFFFFFF == oracles.murmur2(key), key
        assert batch.partition_for(key, 12) == (expected & 0x7FFFFFFF) % 12
    rng = random.Random(SEED + 2)
    for turn in range(500):
        key = rng.randbytes(rng.randrange(40))
        assert records.murmur2(key) == oracles.murmur2(key), f"seed {SEED + 2} turn {turn}"


# ---- codecs are bounded ----


def packed_by(codec: str, plain: bytes) -> bytes:
    if codec == "zstd, no size":
        return zstandard.ZstdCompressor(write_content_size=False).compress(plain)
    if codec == "zstd, checksum":
        return zstandard.ZstdCompressor(write_checksum=True).compress(plain)
    if codec == "lz4, checksum":
        return bytes(lz4.frame.compress(plain, content_checksum=True, block_checksum=True))
    if codec == "gzip":
        return gzip.compress(plain, mtime=0)
    return codecs.deflate(codecs.CODEC_BITS[codec], plain)  # type: ignore[index]


VARIANTS = {"gzip": 1, "lz4": 3, "lz4, checksum": 3, "zstd": 4, "zstd, no size": 4, "zstd, checksum": 4}


@pytest.mark.parametrize("variant", VARIANTS)
def test_limit_is_exact_and_bombs_stay_small(variant: str) -> None:
    plain = bytes(5000)
    assert codecs.inflate(VARIANTS[variant], packed_by(variant, plain), 5000) == plain
    with pytest.raises(CorruptBatchError, match=r"more than 4999|cannot be read"):
        codecs.inflate(VARIANTS[variant], packed_by(variant, plain), 4999)
    bomb = packed_by(variant, bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBatchError):
            codecs.inflate(VARIANTS[variant], bomb, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_off_and_damaged_packed_records(variant: str) -> None:
    rng = random.Random(SEED + 3)
    plain = rng.randbytes(300) + bytes(300)
    packed = packed_by(variant, plain)
    kept = []
    for size in range(len(packed)):
        try:
            codecs.inflate(VARIANTS[variant], packed[:size])
            kept.append(len(packed) - size)
        except CorruptBatchError:
            pass
    assert kept == [], "bytes missing at the end that nobody noticed"
    for turn in range(300):
        raw = bytearray(packed)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        try:
            assert len(codecs.inflate(VARIANTS[variant], bytes(raw), 4096)) <= 4096, f"seed {SEED + 3} turn {turn}"
        except CorruptBatchError:
            pass


def test_window_of_a_zstd_frame_is_bounded() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    out = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(out, closefd=False) as stream:
        stream.write(b"x" * 100)
    with pytest.raises(CorruptBatchError):
        codecs.inflate(4, out.getvalue(), 1 << 20)


@pytest.mark.parametrize("codec", [0, 2, 5, 6, 7])
def test_codecs_without_a_package_are_refused(codec: int) -> None:
    with pytest.raises(CorruptBatchError, match="not supported"):
        codecs.inflate(codec, b"")
    with pytest.raises(ValueError, match="no codec"):
        codecs.deflate(codec, b"")
