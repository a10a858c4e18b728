"""CRC-32C: published vectors, an independent package, the portable path, and a bit-by-bit twin."""

from __future__ import annotations

import random
import warnings

import pytest

from edgebroker.common.crc32c import crc32c, crc32c_portable, implementation
from tests.kit import oracles

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import google_crc32c

SEED = 20240501
# RFC 3720, appendix B.4; the last is the check value of the CRC catalogues.
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (
        bytes.fromhex(
            "01c000000000000000000000000000001400000000000400000000140000001828000000000000000200000000000000"
        ),
        0xD9963A56,
    ),
    (b"123456789", 0xE3069283),
    (b"", 0),
]
# Around the widths and the block sizes at which the code changes its path.
EDGES = sorted(
    {max(0, n + d) for n in (0, 8, 16, 64, 256, 768, 1536, 4096, 12288, 24576, 16384) for d in range(-9, 10)}
)


@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_published_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert crc32c_portable(data) == expected
    assert oracles.crc32c(data) == expected
    assert oracles.crc32c_bitwise(data) == expected


def test_implementation_is_named() -> None:
    assert implementation() in ("hardware", "portable")


def test_every_size_around_the_block_edges() -> None:
    pool = random.Random(SEED).randbytes(max(EDGES))
    for size in EDGES:
        data = pool[:size]
        expected = google_crc32c.value(data)
        assert crc32c(data) == expected, size
        assert crc32c_portable(data) == expected, size


def test_random_sizes_and_alignments() -> None:
    rng = random.Random(SEED)
    pool = memoryview(rng.randbytes(80_000))
    for turn in range(3000):
        start = rng.randrange(64)
        size = rng.choice((rng.randrange(64), rng.randrange(1500), rng.randrange(40_000 if turn % 10 == 0 else 3000)))
        view = pool[start : start + size]
        expected = google_crc32c.value(bytes(view))
        context = f"seed {SEED} turn {turn} start {start} size {size}"
        assert crc32c(view) == expected, context
        assert crc32c_portable(view) == expected, context


def test_continuing_a_value_equals_one_call() -> None:
    rng = random.Random(SEED + 1)
    pool = rng.randbytes(60_000)
    for turn in range(1500):
        size = rng.randrange(60_000 if turn % 20 == 0 else 5000)
        cuts = sorted(rng.randrange(size + 1) for _ in range(rng.randrange(4)))
        value = portable = 0
        for low, high in zip([0, *cuts], [*cuts, size], strict=True):
            value = crc32c(pool[low:high], value)
            portable = crc32c_portable(pool[low:high], portable)
        whole = google_crc32c.value(pool[:size])
        assert (value, portable) == (whole, whole), f"seed {SEED + 1} turn {turn} size {size} cuts {cuts}"


def test_any_start_value_equals_the_oracle() -> None:
    rng = random.Random(SEED + 2)
    for turn in range(400):
        data, value = rng.randbytes(rng.randrange(300)), rng.getrandbits(32)
        expected = oracles.crc32c(data, value)
        assert oracles.crc32c_bitwise(data[:40], value) == oracles.crc32c(data[:40], value)
        assert crc32c(data, value) == crc32c_portable(data, value) == expected, f"seed {SEED + 2} turn {turn}"


def test_every_single_bit_changes_the_value() -> None:
    data = bytearray(random.Random(SEED + 3).randbytes(900))
    seen = {crc32c(data)}
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(crc32c(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(seen) == len(data) * 8 + 1


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_contiguous_buffer_is_taken(kind: type) -> None:
    assert crc32c(kind(b"123456789")) == 0xE3069283


def test_what_is_not_a_buffer_or_a_value_is_refused() -> None:
    with pytest.raises(TypeError):
        crc32c("123456789")  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        crc32c(memoryview(b"123456789")[::2])
    for value in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            crc32c(b"", value)
