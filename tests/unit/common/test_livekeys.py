"""The live records of a table, against a dict."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebroker.common import batch, codecs, records
from edgebroker.common.livekeys import LiveKeys, NoTableError, TooManyKeysError

CEXT = Path(__file__).parents[3] / "cext"

SECRET = bytes(range(16))
Row = tuple[bytes | None, bytes | None, int]
rows = st.tuples(
    st.integers(0, 12).map(lambda number: b"k%d" % number) | st.binary(max_size=40),
    st.none() | st.binary(max_size=60),
    st.integers(-(2**40), 2**40),
)
batches = st.lists(st.tuples(st.lists(rows, min_size=1, max_size=8), st.sampled_from(["none", "gzip"])), max_size=12)


def log_of(found: list[tuple[list[Row], str]]) -> bytes:
    """Stored batches, one behind the other."""
    data, offset = b"", 0
    for content, codec in found:
        one = batch.encode(content, codec=codec)  # type: ignore[arg-type]
        data += records.restamp(one, offset, 1)
        offset += len(content)
    return data


def written(keys: LiveKeys, data: bytes, stop: int) -> list[tuple[bytes | None, bytes | None, int]]:
    out = [*keys.live(data, codecs.inflate, stop)]
    last = keys.flush()
    out += [last] if last is not None else []
    return [(row.key, row.value, row.timestamp) for one in out for row in batch.decode(records.restamp(one, 0, 1))]


@given(batches, st.integers(0, 60))
def test_against_a_dict(found: list[tuple[list[Row], str]], stop: int) -> None:
    data = log_of(found)
    keys = LiveKeys(1 << 20, SECRET)
    keys.note(data, codecs.inflate, stop)
    expected: dict[bytes | None, Row] = {}
    for key, value, timestamp in [row for content, _ in found for row in content][:stop]:
        expected.pop(key, None)
        if value is not None:
            expected[key] = (key, value, timestamp)
    assert written(keys, data, stop) == list(expected.values())
    assert keys.keys == len(expected)
    assert keys.flush() is None


def test_many_keys_grow_and_end_at_their_limit() -> None:
    rows = [(b"%d" % number, b"v", 5) for number in range(40_000)]
    data = log_of([(rows[first : first + 1000], "none") for first in range(0, len(rows), 1000)])
    keys = LiveKeys(65_536 * 32, SECRET)
    keys.note(data, codecs.inflate)
    assert (keys.keys, len(written(keys, data, 1 << 60))) == (40_000, 40_000)
    with pytest.raises(TooManyKeysError):
        LiveKeys(32_768 * 32, SECRET).note(data, codecs.inflate)


def test_headers_come_along_and_batches_are_bounded() -> None:
    headers = (("a", b"1"), ("b", None))
    data = b"".join(
        records.restamp(batch.encode([(b"%d" % n, bytes(100_000), 7)], headers=headers), n, 1) for n in range(9)
    )
    keys = LiveKeys(1 << 20, SECRET)
    keys.note(data, codecs.inflate)
    out = keys.live(data, codecs.inflate)
    last = keys.flush()
    assert last is not None
    assert max(len(one) for one in [*out, last]) < 256 << 10
    found = [row for one in [*out, last] for row in batch.decode(records.restamp(one, 0, 1))]
    assert [row.headers for row in found] == [headers] * 9


def test_what_is_no_table_and_no_batch() -> None:
    with pytest.raises(NoTableError):
        LiveKeys(1 << 20, SECRET).note(log_of([([(None, b"v", 1)], "none")]), codecs.inflate)
    with pytest.raises(ValueError, match="whole batches"):
        LiveKeys(1 << 20, SECRET).note(log_of([([(b"k", b"v", 1)], "none")])[:-1], codecs.inflate)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_hash_is_siphash_2_4_128(tmp_path: Path) -> None:
    """Its published test vectors: the key 00 01 … 0f, the inputs 00 01 … of lengths 0, 1 and 15."""
    source = tmp_path / "vectors.c"
    source.write_text(
        '#include <stdio.h>\n#include "siphash.h"\n'
        "int main(void) { uint8_t in[16]; uint64_t k[2], o[2]; for (int i = 0; i < 16; i++) in[i] = (uint8_t)i;\n"
        "memcpy(k, in, 16); size_t n[] = {0, 1, 15};\n"
        "for (int j = 0; j < 3; j++) { eb_siphash128(in, n[j], k[0], k[1], o);\n"
        'for (int i = 0; i < 16; i++) printf("%02x", ((uint8_t *)o)[i]); puts(""); } return 0; }\n'
    )
    subprocess.run(["cc", "-O2", "-I", str(CEXT), "-o", str(tmp_path / "vectors"), str(source)], check=True)
    printed = subprocess.run([str(tmp_path / "vectors")], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [
        "a3817f04ba25a8e66df67214c7550293",
        "da87c1d86b99af44347659119b22fc45",
        "5493e99933b0a8117e08ec0f97cfc3d9",
    ]
