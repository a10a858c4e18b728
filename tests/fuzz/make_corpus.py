"""Write the seed inputs of the fuzzer into corpus/ beside this file; the same bytes every time.

Run from the repository after building the extensions: python tests/fuzz/make_corpus.py
"""

from __future__ import annotations

from pathlib import Path

from edgebroker.common import batch, records

ROWS = [(b"key", b"value", 1_700_000_000_000), (None, b"", 1_699_999_999_000), (b"", None, 1_700_000_000_500)]
HEADERS = [("trace", b"\x00\xff"), ("größe", None), ("", b"")]


def seeds() -> dict[str, bytes]:
    """Name to bytes of every seed."""
    one = batch.encode(ROWS[:1])
    three = batch.encode(ROWS, headers=HEADERS)
    stored = b"".join(records.restamp(three, 3 * i, i // 2) for i in range(4))
    builder = records.BatchBuilder()
    count, raw = records.encode_headers(HEADERS)
    for i in range(40):
        builder.append(bytes([i]) * i, None if i % 3 else b"%d" % i, 1000 - 7 * i, count * (i % 2), raw * (i % 2))
    mixed = builder.build(producer_id=7, producer_epoch=1, base_sequence=40)
    return {
        "one": one,
        "three": three,
        "mixed": mixed,
        "stored": stored,
        "torn": stored[:-5],
        "zero-tail": one + bytes(100),
        "gzip": batch.encode(ROWS, codec="gzip"),
        "lz4": batch.encode(ROWS, codec="lz4"),
        "zstd": batch.encode(ROWS, codec="zstd", producer_id=1, producer_epoch=0, base_sequence=0),
        "records": three[61:],
        "header": three[:61],
        "far-timestamps": batch.encode([(None, b"", -(1 << 61)), (None, b"", 1 << 61)]),
        "long-value": batch.encode([(b"k", bytes(300), 0)]),
        "varint-longest": b"\xff" * 9 + b"\x01",
        "varint-too-long": b"\xff" * 10 + b"\x01",
        "utf8": "aé€😀".encode() + b"\xed\xa0\x80",
    }


def main() -> None:
    corpus = Path(__file__).parent / "corpus"
    corpus.mkdir(exist_ok=True)
    for name, content in seeds().items():
        (corpus / name).write_bytes(content)
    print(f"{len(seeds())} seeds in {corpus}")


if __name__ == "__main__":
    main()
