"""Scanning stored batches: the slow twin on every damage, cutting, seeking, index points, and the SIGBUS guard."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebroker.common import batch, records
from edgebroker.common.batch import Reason
from edgebroker.storage.log import segscan
from tests.kit import oracles

SEED = 20240503
MAX = 1 << 20
INT64_MIN = -(1 << 63)
POINT = struct.Struct("<IIIIqqq")
quick = settings(derandomize=True, deadline=None, max_examples=200, database=None)


def segment(sizes: list[int], base: int = 0, epoch: int = 1, value: int = 9) -> tuple[bytes, list[oracles.Header]]:
    """Stored batches of so many records each, and their headers; timestamps rise and fall."""
    raw, headers = b"", []
    for i, size in enumerate(sizes):
        rows = [(b"k%d" % n, bytes([i % 256]) * value, 1000 * i - 7 * n * i) for n in range(size)]
        one = records.restamp(batch.encode(rows, codec="none"), base, epoch + i // 2)
        headers.append(oracles.Header(*oracles.HEADER.unpack(one[:61])))
        raw += one
        base += size
    return raw, headers


def reseal(data: bytes, position: int, **changes: int) -> bytes:
    header = oracles.Header(*oracles.HEADER.unpack(data[position : position + 61]))._replace(**changes)
    head = oracles.HEADER.pack(*header)
    covered = head[21:] + data[position + 61 : position + header.size]
    sealed = head[:17] + struct.pack(">I", oracles.crc32c(covered)) + covered
    return data[:position] + sealed + data[position + header.size :]


def both(
    data: bytes, expected: int, chain: int = 0, epoch: int = 0, max_batch: int = MAX, context: object = ""
) -> tuple:
    """Scan by the core and by the oracle; guarded or not, both must agree. Returns what they found."""
    segscan.install_guard()
    found = segscan.scan(data, expected, chain, epoch, max_batch)
    want = oracles.scan(data, expected, chain, epoch, max_batch)
    assert found[6] == b""
    assert found[:6] == (
        want.good_end,
        want.reason,
        want.next_offset,
        want.chain,
        want.epoch,
        want.max_timestamp,
    ), context
    assert segscan.scan(data, expected, chain, epoch, max_batch, guarded=True) == found, context
    return found


@given(
    sizes=st.lists(st.integers(1, 5), max_size=8),
    base=st.integers(0, 1 << 62),
    chain=st.integers(0, (1 << 32) - 1),
    wrong=st.sampled_from([0, 0, 0, 1, -1]),
    epoch=st.integers(0, 3),
    bound=st.sampled_from([MAX, MAX, 120]),
)
@quick
def test_scan_equals_the_oracle(sizes: list[int], base: int, chain: int, wrong: int, epoch: int, bound: int) -> None:
    raw, _ = segment(sizes, base)
    both(raw, max(0, base + wrong), chain, epoch, bound)
    assert both(raw, -1, chain, 1)[:2] == (len(raw), Reason.OK)


def test_truncated_at_every_byte() -> None:
    raw, headers = segment([2, 1, 3], 100)
    ends = [0, *(sum(h.size for h in headers[: i + 1]) for i in range(3))]
    for size in range(len(raw) + 1):
        found = both(raw[:size], 100, context=size)
        assert found[0] == max(end for end in ends if end <= size)
        assert (found[1] == Reason.OK) == (size in ends)


def test_every_bit_flip_is_detected() -> None:
    raw, headers = segment([2, 1, 2], 1 << 33)
    intact = both(raw, 1 << 33)
    assert intact[0] == len(raw)
    starts = [0, headers[0].size, headers[0].size + headers[1].size]
    damaged = bytearray(raw)
    for bit in range(len(raw) * 8):
        i = bit // 8
        damaged[i] ^= 1 << bit % 8
        found = both(bytes(damaged), 1 << 33, context=f"bit {bit}")
        start = max(s for s in starts if s <= i)
        stopped = found[1] != Reason.OK and found[0] <= start + 61 + headers[starts.index(start)].size
        assert stopped or found[3] != intact[3], f"bit {bit} was not noticed"
        if i - start >= 21:
            assert found[0] == start and found[1], f"bit {bit}: the batch's own CRC covers it"
        damaged[i] ^= 1 << bit % 8


def test_reasons() -> None:
    raw, headers = segment([2, 1, 2], 5)
    second = headers[0].size
    cases = {
        Reason.BAD_COUNT: reseal(raw, second, count=0, last_delta=-1),
        Reason.BAD_OFFSET: reseal(raw, second, base_offset=8),
        Reason.BAD_EPOCH: reseal(raw, second, epoch=0),
        Reason.BAD_MAGIC: reseal(raw, second, magic=1),
        Reason.BAD_CRC: raw[: second + 70] + b"?" + raw[second + 71 :],
        Reason.ZEROES: raw[:second] + bytes(500),
    }
    for reason, data in cases.items():
        assert both(data, 5, context=reason)[:3] == (second, reason, 7)
    for length, reason in ((48, Reason.BAD_LENGTH), (-1, Reason.BAD_LENGTH), (1 << 30, Reason.TOO_LARGE)):
        data = raw[: second + 8] + struct.pack(">i", length) + raw[second + 12 :]
        assert both(data, 5)[:2] == (second, reason)
    top = reseal(raw[:second], 0, base_offset=(1 << 63) - 2)
    assert both(top, -1)[1] == Reason.BAD_OFFSET
    assert both(reseal(raw[:second], 0, base_offset=(1 << 63) - 3), -1)[2] == (1 << 63) - 1
    assert both(reseal(raw[:second], 0, base_offset=-1), -1)[1] == Reason.BAD_OFFSET


def test_without_verifying_only_the_headers_count() -> None:
    raw, headers = segment([2, 1], 5)
    data = raw[:70] + b"?" + raw[71:]
    assert segscan.scan(data, 5, 0, 0, MAX)[1] == Reason.BAD_CRC
    assert segscan.scan(data, 5, 0, 0, MAX, verify=False)[:3] == (len(raw), Reason.OK, 8)
    assert segscan.scan(raw, 5, 0, 0, MAX, limit_offset=7)[:3] == (headers[0].size, Reason.OK, 7)
    assert segscan.scan(raw, 5, 0, 0, MAX, limit_offset=5)[:3] == (0, Reason.OK, 5)


def test_a_scan_in_two_parts_equals_one() -> None:
    raw, headers = segment([3, 1, 4, 1, 5], 40)
    whole = segscan.scan(raw, 40, 77, 1, MAX, base_offset=40, interval=150)
    split = 0
    for header in headers:
        split += header.size
        one = segscan.scan(raw[:split], 40, 77, 1, MAX, base_offset=40, interval=150)
        last = POINT.unpack(one[6][-40:])[1]
        two = segscan.scan(
            raw[split:], *one[2:5], MAX, base_offset=40, base_position=split, interval=150, last_point=last,
            max_timestamp=one[5],
        )  # fmt: skip
        assert (one[0] + two[0], *two[1:6]) == whole[:6]
        assert one[6] + two[6] == whole[6]


@pytest.mark.parametrize("interval", [1, 100, 200, 1000, 1 << 40])
def test_index_points(interval: int) -> None:
    raw, headers = segment([1, 4, 2, 1, 3, 2, 2, 1], 1000)
    points = segscan.scan(raw, 1000, 9, 0, MAX, base_offset=990, base_position=64, interval=interval)[6]
    want, position, last = [], 0, None
    for header in headers:
        if last is None or position - last >= interval:
            before = oracles.scan(raw[:position], 1000, 9, 0, MAX)
            entry = (header.base_offset - 990, position + 64, before.chain, 0, before.max_timestamp, 0, 0)
            want.append(entry)
            last = position
        position += header.size
    assert list(POINT.iter_unpack(points)) == want
    brief = [(w[0], w[1], w[2], w[4]) for w in want]
    for offset in range(-2, 40):
        assert segscan.floor_offset(points, offset) == max((b for b in brief if b[0] <= offset), default=None)
    for at in [-1, *range(0, len(raw) + 80, 7), 1 << 33, 1 << 62]:
        assert segscan.floor_position(points, at) == max((b for b in brief if b[1] <= at), default=None)
    for timestamp in [INT64_MIN, INT64_MIN + 1, *range(-100, 8000, 50), (1 << 63) - 1]:
        older = max((b for b in brief if b[3] < timestamp), default=None)
        assert segscan.floor_timestamp(points, timestamp) == older
    for floor in (segscan.floor_offset, segscan.floor_position, segscan.floor_timestamp):
        assert floor(b"", 5) is None


def test_find_batch() -> None:
    raw, headers = segment([2, 1, 2, 1], 300)
    starts = [sum(h.size for h in headers[:i]) for i in range(4)]
    damaged = bytearray(b"junk\x02" * 20 + raw)
    shift = 100
    damaged[shift + starts[1] + 70] ^= 1
    for start in range(len(damaged) + 70):
        want = [shift + s for i, s in enumerate(starts) if i != 1 and shift + s >= start]
        assert segscan.find_batch(damaged, start, 0, 1 << 62, MAX) == (want[0] if want else -1)
    assert segscan.find_batch(damaged, 0, 303, 305, MAX) == shift + starts[2]
    assert segscan.find_batch(damaged, 0, 301, 302, MAX) == -1
    assert segscan.find_batch(damaged[:-1], shift + starts[3], 0, 1 << 62, MAX) == -1
    assert segscan.find_batch(damaged, 0, 0, 1 << 62, 70) == -1
    assert segscan.find_batch(b"", 0, 0, 9, MAX) == -1


@given(
    sizes=st.lists(st.integers(1, 5), max_size=7),
    bytes_=st.integers(0, 900),
    end=st.integers(-1, 30),
    hide=st.integers(0, 400),
)
@quick
def test_cut(sizes: list[int], bytes_: int, end: int, hide: int) -> None:
    raw, headers = segment(sizes)
    data = raw[: max(0, len(raw) - hide)]
    if len(data) < 61:
        assert segscan.cut(data, bytes_, end) == (0, -1)
        return
    taken, following = headers[0].size, headers[0].count
    for header in headers[1:]:
        if taken + header.size > min(bytes_, len(data)) or header.base_offset >= end:
            break
        taken, following = taken + header.size, following + header.count
    assert segscan.cut(data, bytes_, end) == (taken, following)


@given(sizes=st.lists(st.integers(1, 5), max_size=7), offset=st.integers(-3, 40), hide=st.integers(0, 300))
@quick
def test_seek(sizes: list[int], offset: int, hide: int) -> None:
    raw, headers = segment(sizes, 2)
    data = raw[: max(0, len(raw) - hide)]
    for timestamp in (INT64_MIN, 0, 2000, 4500, 1 << 62):
        position, want = 0, None
        for header in headers:
            fits = header.base_offset + header.count > offset and header.max_timestamp >= timestamp
            if position + 61 <= len(data) and want is None and fits:
                want = (position, header.base_offset, header.size)
            position += header.size
        assert segscan.seek(data, offset, timestamp) == want


@pytest.mark.parametrize("size", [0, 1, 11, 12, 60, 61, 62, 1000, 100_000])
def test_zero_bytes_and_zero_lengths_never_loop(size: int) -> None:
    for data in (bytes(size), (bytes(16) + b"\x02" + bytes(44)) * (size // 61 + 1)):
        position, reason = segscan.scan(data, -1, 0, 0, MAX)[:2]
        assert (position, reason == 0) == (0, not data)
        assert segscan.scan(data, 0, 0, 0, MAX, verify=False, interval=1)[0] == 0
        assert segscan.cut(data, 1 << 40, 1 << 40) == (0, -1)
        assert segscan.seek(data, 0) is None
        assert segscan.find_batch(data, 0, 0, 1 << 62, MAX) == -1
        assert records.decode(data, lambda *_: b"", "", 0)[1] == 0


def test_random_damage() -> None:
    rng = random.Random(SEED)
    raw, _ = segment([2, 1, 3, 1, 2], 9)
    for turn in range(600):
        data = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        del data[: rng.choice((0, 0, rng.randrange(len(data))))]
        context = f"seed {SEED} turn {turn}"
        both(bytes(data), rng.choice((9, 9, 11, -1)), rng.getrandbits(32), rng.randrange(3), context=context)
        taken, _ = segscan.cut(data, rng.randrange(900), 1 << 62)
        assert taken == 0 or taken >= 61, context
        segscan.seek(data, rng.randrange(30))
        segscan.find_batch(data, 0, 0, 1 << 62, MAX)


GUARDED = """
import faulthandler, mmap, os, sys
from edgebroker.storage.log import segscan
faulthandler.enable()
segscan.install_guard()
segscan.install_guard()
path, size = sys.argv[1], int(sys.argv[2])
with open(path, "r+b") as file:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    good = segscan.scan(view, 0, 0, 0, 1 << 20, guarded=True, interval=4096)
    assert good[:2] == (len(view), 0), good[:2]
    for keep in (size // 8192 * 4096, 4096, 0):
        os.ftruncate(file.fileno(), keep)
        for turn in range(3):
            try:
                segscan.scan(view, 0, 0, 0, 1 << 20, guarded=True, interval=4096)
            except OSError as error:
                print(error.errno)
    print("alive")
    print(segscan.scan(bytes(61), 0, 0, 0, 1 << 20, guarded=True)[1], flush=True)
    if sys.argv[3] == "bare":
        segscan.scan(view, 0, 0, 0, 1 << 20)
"""


@pytest.mark.parametrize("last", ["guarded", "bare"])
def test_a_file_truncated_under_its_mapping(tmp_path: Path, last: str) -> None:
    """Guarded: an OSError each time, and the process lives. Not guarded: it dies of SIGBUS, as without the handler."""
    raw, _ = segment([2] * 120, value=1000)
    path = tmp_path / "segment"
    path.write_bytes(raw)
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(path), str(len(raw)), last], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.split() == ["5"] * 9 + ["alive", "14"], done.stderr
    assert done.returncode == (0 if last == "guarded" else -7), done.stderr
