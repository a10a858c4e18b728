"""Reads a data directory: written from docs/storage.md alone, with the standard library alone. Argument: DIRECTORY."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from collections import namedtuple
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

BATCH = struct.Struct(">qiibIhiqqqhii")  # the header of a batch, big-endian
INDEX = struct.Struct("<4sI16sQQQIIqqII")  # the header of an index, little-endian
POINT = struct.Struct("<IIIIqqq")
CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [(entry >> 1) ^ (0x82F63B78 if entry & 1 else 0) for entry in CRC_TABLE]

Record = namedtuple("Record", "topic partition offset timestamp key value headers")


def crc32c(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def read_checked(path: Path) -> dict:
    """A file of two lines: JSON and its CRC."""
    text, crc, rest = path.read_bytes().split(b"\n")
    if rest or crc.decode() != f"{crc32c(text):08x}":
        raise ValueError(f"{path.name}: the checksum does not match")
    return json.loads(text)


def group_offsets(directory: Path) -> dict[tuple[str, str, int], tuple[str, int, int]]:
    """From offsets.snap: (group, topic, partition) to (log id, epoch, next offset)."""
    path = directory / "offsets.snap"
    entries = read_checked(path)["offsets"] if path.exists() else []
    return {(group, topic, partition): tuple(place[:3]) for group, topic, partition, place in entries}


def varint(data: BytesIO) -> int:
    number = shift = 0
    while (byte := data.read(1)[0]) & 0x80:
        number, shift = number | (byte & 0x7F) << shift, shift + 7
    number |= byte << shift
    return (number >> 1) ^ -(number & 1)


def sized(data: BytesIO) -> bytes | None:
    return None if (length := varint(data)) < 0 else data.read(length)


class Reader:
    """Iterate over it once; then `found` says what was seen, and `problems` what is wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.found: list[str] = []
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[Record]:
        for path in sorted(self.directory.glob("topics/*/*/"), key=lambda path: (path.parent.name, int(path.name))):
            yield from self.partition(path)

    def partition(self, path: Path) -> Iterator[Record]:
        try:
            identity = read_checked(path / "identity")
        except (OSError, ValueError) as error:
            self.problems.append(f"{path.parent.name}/{path.name}: no identity: {error}")
            return
        chain: int | None = identity["chain"]
        bases = sorted(base for log in path.glob("*.log") if (base := int(log.stem)) >= identity["log_start"])
        if not bases or bases[0] != identity["log_start"]:
            self.problems.append(f"{path.parent.name}/{path.name}: no segment at {identity['log_start']}")
            chain = None
        for base, limit in zip(bases, [*bases[1:], None], strict=True):
            chain = yield from self.segment(path / f"{base:020}.log", identity, limit, chain)

    def segment(self, path: Path, identity: dict, limit: int | None, chain: int | None) -> Iterator[Record]:
        """Its records; returns the chain behind it. Sealed when there is a limit, the base of the next."""
        data, name = path.read_bytes(), "/".join(path.parts[-3:])
        position, expected, epoch = 0, int(path.stem), 0
        chains = {0: (expected, chain)}  # position: offset, chain before it
        while position < len(data) and (limit is None or expected < limit):
            header = data[position : position + BATCH.size].ljust(BATCH.size, b"\0")
            offset, length, batch_epoch, magic, crc, attributes, delta, base, *_, count = BATCH.unpack(header)
            batch = data[position : position + length + 12]
            shaped = magic == 2 and BATCH.size <= length + 12 <= 16 << 20 and len(batch) == length + 12
            fits = offset == expected and 1 <= count == delta + 1 and epoch <= batch_epoch <= identity["epochs"][-1][0]
            if not (shaped and fits and crc == crc32c(batch[21:])):
                break
            if not attributes & 0x20:
                yield from self.batch(path, batch, offset, base, count, attributes & 7)
            chain = None if chain is None else crc32c(header, chain)
            epoch, expected, position = batch_epoch, expected + count, position + length + 12
            chains[position] = expected, chain
        self.found.append(f"{name}: offsets up to {expected}, {position} of {len(data)} bytes")
        if limit is None and position < len(data):
            self.problems.append(f"{name}: a torn tail at byte {position}")
        elif limit not in (None, expected):
            self.problems.append(f"{name}: damage at byte {position}, offset {expected} of {limit}")
        elif limit and path.with_suffix(".index").exists():
            self.index(path.with_suffix(".index"), identity, len(data), limit, chains)
        return chain if limit in (None, expected) else None  # unknown behind damage

    def batch(self, path: Path, batch: bytes, offset: int, base: int, count: int, codec: int) -> Iterator[Record]:
        if codec > 1:
            self.problems.append(f"{path.name}: the batch at offset {offset} has codec {codec}, not read")
            return
        lines = BytesIO(gzip.decompress(batch[BATCH.size :]) if codec else batch[BATCH.size :])
        for _ in range(count):
            line = BytesIO(sized(lines)[1:])
            timestamp, at, key, value = base + varint(line), offset + varint(line), sized(line), sized(line)
            headers = tuple((sized(line).decode(), sized(line)) for _ in range(varint(line)))
            yield Record(path.parts[-3], int(path.parts[-2]), at, timestamp, key, value, headers)

    def index(self, path: Path, identity: dict, size: int, end: int, chains: dict) -> None:
        data, name = path.read_bytes(), "/".join(path.parts[-3:])
        *head, base_chain, end_chain, _, _, count, crc = INDEX.unpack_from(data)
        base, points = int(path.stem), list(POINT.iter_unpack(data[INDEX.size :]))
        if head != [b"EBIX", 1, bytes.fromhex(identity["log_id"]), base, end, size] or count != len(points):
            self.problems.append(f"{name}: it belongs to another log file")
        if crc != crc32c(data[80:], crc32c(data[:76])):
            self.problems.append(f"{name}: the checksum does not match")
        places = [(0, base, base_chain), (max(chains), end, end_chain)]
        for position, offset, chain in places + [(at, base + delta, chain) for delta, at, chain, *_ in points]:
            if chains.get(position) not in ((offset, chain), (offset, None)):
                self.problems.append(f"{name}: no batch with this chain at byte {position}, offset {offset}")
        self.found.append(f"{name}: {count} points")


def main(directory: str) -> int:
    reader = Reader(Path(directory))
    for line in [*reader, *group_offsets(Path(directory)).items(), *reader.found, *reader.problems]:
        print(line)
    return 4 if reader.problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
