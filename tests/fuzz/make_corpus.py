"""Write the seed inputs of the fuzzers into corpus/ and corpus-frames/ beside this file; the same bytes every time.

Run from the repository after building the extensions: python -m tests.fuzz.make_corpus
"""

from __future__ import annotations

from pathlib import Path

from edgebroker.common import batch, records
from edgebroker.common.errors import Code
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Connect, FrameType
from tests.kit.raw_client import write_publish

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


def frame_seeds() -> dict[str, bytes]:
    """Streams of frames; the two bytes in front are the largest frame allowed, less one."""

    def publish(correlation: int, topic: str) -> bytes:
        return write_publish(correlation, frames.publish_prefix(2, topic, 0), b"batch")

    run = publish(1, "t") + publish(2, "t")
    connect = Connect(frames.PROTOCOL_VERSION, 1, "till", b"", -1, -1, ["t"])
    streams = {
        "connect": frames.write_connect(1, connect),
        "run": run + publish(3, "u"),
        "mixed": run + frames.write_heartbeat([]) + frames.write_answer(2, Code.OK),
        "torn": run[:-10],
        "short-publish": frames.frame(FrameType.PUBLISH, 1, b"\2\5ab"),
        "too-large": frames.HEADER.pack(0x7FFFFFFF, FrameType.PUBLISH, 0, 0, 1),
        "short-length": frames.HEADER.pack(11, FrameType.PUBLISH, 0, 0, 1),
        "flags": frames.HEADER.pack(12, FrameType.HEARTBEAT, 1, 0, 1),
    }
    return {name: (999).to_bytes(2, "big") + stream for name, stream in streams.items()}


def main() -> None:
    for folder, found in (("corpus", seeds()), ("corpus-frames", frame_seeds())):
        corpus = Path(__file__).parent / folder
        corpus.mkdir(exist_ok=True)
        for name, content in found.items():
            (corpus / name).write_bytes(content)
        print(f"{len(found)} seeds in {corpus}")


if __name__ == "__main__":
    main()
