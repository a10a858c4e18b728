"""`edgebroker log dump|verify`: inspect segment files, without a broker."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from edgebroker.cli.command import Parser, subcommand, subcommands
from edgebroker.cli.render import counted, json_line
from edgebroker.common import batch
from edgebroker.common.batch import EXPLANATION, STORED_BATCH_BYTES, BatchHeader, Reason
from edgebroker.common.errors import ConfigError, DamagedDataError
from edgebroker.storage import files
from edgebroker.storage.identity import read_identity
from edgebroker.storage.log.index import read_index
from edgebroker.storage.log.walk import next_good_batch, walk_file, walk_start
from edgebroker.storage.metadata.meta_db import stored_ends

CODEC_NAMES = {0: "none", 1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}


class DamagedBytes(NamedTuple):
    """A range of a segment file that fails its checks, and the offset at which it begins."""

    path: Path
    position: int
    end: int
    offset: int
    why: str


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    dump_parser = subcommand(commands, "dump", "print the batches or records of segment files", dump)
    verify_parser = subcommand(commands, "verify", "check every checksum of segment files", verify)
    for each in (dump_parser, verify_parser):
        each.add_argument("path", help="a segment file (.log), a partition directory, or a data directory")
        each.add_argument("--json", action="store_true", help="print JSON, one object a line")
    dump_parser.add_argument("--records", action="store_true", help="print records instead of batches")


def dump(options: argparse.Namespace) -> int:
    """Print batches or records. Damage is reported on stderr and skipped; exit code 4 when there is any."""
    damaged = False
    for path, limit in segments(Path(options.path)):
        for found in walk(path, limit):
            if isinstance(found, DamagedBytes):
                damaged = True
                print(f"edgebroker: {describe(found)}", file=sys.stderr)
            elif options.records:
                _print_records(path, found, options.json)
            else:
                _print_batch(path, *found, options.json)
    return DamagedDataError.exit_code if damaged else 0


def verify(options: argparse.Namespace) -> int:
    """Check the CRC, the continuity and the header chain of every batch; exit code 4 when a check fails."""
    total = batches = 0
    damage: list[DamagedBytes] = []
    logs: dict[Path, _Coverage] = {}
    one_file = Path(options.path).is_file()
    for path, limit in segments(Path(options.path)):
        coverage = logs.get(path.parent) or _Coverage(path.parent, path)
        logs[path.parent] = coverage
        damage += [] if one_file else coverage.begin(path)
        for found in walk(path, limit):
            coverage.seen(found)
            if isinstance(found, DamagedBytes):
                damage.append(found)
            else:
                batches += 1
                total += found[1].size
        damage += _check_chain(path)
    for coverage in logs.values():
        damage += [] if one_file else coverage.ended()
    if options.json:
        bad = [
            {"file": str(d.path), "position": d.position, "end": d.end, "offset": d.offset, "why": d.why}
            for d in damage
        ]
        print(json.dumps({"batches": batches, "bytes": total, "damage": bad}))
    else:
        for found in damage:
            print(describe(found))
        checked = counted(batches, "batch", "batches")
        print(f"{checked}, {total} bytes, {counted(len(damage), 'damaged range')}")
    return DamagedDataError.exit_code if damage else 0


def segments(path: Path) -> list[tuple[Path, int]]:
    """Segment files below a path, each with the base offset of its successor (-1: none)."""
    if path.is_file():
        if not (path.stem.isascii() and path.stem.isdigit()):
            raise ConfigError(f"{path}: not a segment file; the name of one is the offset that it begins with")
        return [(path, -1)]
    if not path.is_dir():
        raise ConfigError(f"{path}: {'not a file or directory' if path.exists() else 'no such file or directory'}")
    found = sorted(
        file for file in path.rglob("*.log") if file.stem.isdigit() and "deleted" not in file.relative_to(path).parts
    )
    if not found:
        raise ConfigError(f"{path}: contains no segment files (*.log)")
    limits = []
    for rank, file in enumerate(found):
        successor = found[rank + 1] if rank + 1 < len(found) else None
        limits.append((file, int(successor.stem) if successor and successor.parent == file.parent else -1))
    return limits


class _Coverage:
    """Which records of a log should be there, and which are: `end` grows with every file."""

    def __init__(self, directory: Path, first: Path) -> None:
        self._directory, self._last = directory, first
        try:
            identity = read_identity(directory)
        except (OSError, DamagedDataError):
            identity = None
        self._log_id = identity.log_id if identity is not None else ""
        self._gaps = identity.gaps if identity is not None else []
        self._end = identity.log_start if identity is not None else int(first.stem)
        self._whole = True

    def begin(self, path: Path) -> Iterator[DamagedBytes]:
        """A file comes next: are records missing before it?"""
        base = int(path.stem)
        # Nobody had what is in a gap.
        self._end = next((gap.next for gap in self._gaps if gap.first == self._end), self._end)
        if self._whole and base > self._end:
            yield DamagedBytes(path, 0, 0, self._end, f"the records up to {base - 1} are missing, and their file")
        self._last, self._end = path, max(self._end, base)

    def seen(self, found: tuple[int, BatchHeader, bytes] | DamagedBytes) -> None:
        """What was found in it, in order: damage is told by itself."""
        self._whole = not isinstance(found, DamagedBytes)
        if not isinstance(found, DamagedBytes):
            self._end = found[1].last_offset + 1

    def ended(self) -> Iterator[DamagedBytes]:
        """There are no more files: are records missing behind the last one?"""
        root = self._directory.parent.parent.parent
        known = stored_ends(root / "meta.db") if self._directory.name.isdigit() else {}
        end = known.get((self._directory.parent.name, int(self._directory.name), self._log_id), 0) if known else 0
        if self._whole and end > self._end:
            yield DamagedBytes(self._last, 0, 0, self._end, f"the records up to {end - 1} are missing behind it")


def walk(path: Path, limit: int) -> Iterator[tuple[int, BatchHeader, bytes] | DamagedBytes]:
    """Position, header and bytes of every intact batch of a file, and the damage between them, in order."""
    fd = files.open_log(path)
    try:
        size = files.size_of(fd)
        base = int(path.stem) if path.stem.isdigit() else 0
        state = walk_start(base, 0)
        while state.position < size and not (0 <= limit <= state.next_offset):
            pieces: list[bytes] = []
            began = state.position
            state = walk_file(
                fd,
                state._replace(points=b"", reason=Reason.OK),
                min(size, began + (4 << 20)),
                base_offset=base,
                max_batch=STORED_BATCH_BYTES,
                limit_offset=limit,
                on_piece=partial(_keep, pieces),
            )
            position = began
            for piece in pieces:
                at = 0
                while at < len(piece):
                    header = batch.read_header(piece, at)
                    yield position + at, header, piece[at : at + header.size]
                    at += header.size
                position += len(piece)
            if state.position == began:
                found = next_good_batch(fd, began, size, state.next_offset, (1 << 62), STORED_BATCH_BYTES)
                end = found if found >= 0 else size
                yield DamagedBytes(path, began, end, state.next_offset, EXPLANATION.get(state.reason, "damaged"))
                next_offset = int.from_bytes(files.read_at(fd, 8, found), "big") if found >= 0 else state.next_offset
                state = state._replace(position=end, next_offset=next_offset)
    finally:
        files.close(fd)


def _keep(pieces: list[bytes], piece: memoryview) -> None:
    pieces.append(bytes(piece))


def _check_chain(path: Path) -> list[DamagedBytes]:
    """Compare the header chain at the end of a sealed segment with its index: it covers what a batch CRC does not."""
    try:
        identity = read_identity(path.parent)
    except (OSError, DamagedDataError):
        return []
    size = path.stat().st_size
    index = read_index(path, identity.log_id_bytes, int(path.stem), size)
    if index is None:
        return []
    fd = files.open_log(path)
    try:
        state = walk_file(
            fd,
            walk_start(index.base, index.base_chain),
            size,
            base_offset=index.base,
            max_batch=STORED_BATCH_BYTES,
            limit_offset=index.end_offset,
        )
    finally:
        files.close(fd)
    if state.reason or state.chain == index.end_chain:
        return []
    return [DamagedBytes(path, 0, size, index.base, "the header chain checksum does not match the index")]


def describe(found: DamagedBytes) -> str:
    if found.position == found.end:
        return f"{found.path}: from offset {found.offset} on {found.why}"
    return f"{found.path}: bytes {found.position} to {found.end} (from offset {found.offset} on): {found.why}"


def _print_batch(path: Path, position: int, header: BatchHeader, data: bytes, as_json: bool) -> None:
    codec = CODEC_NAMES.get(header.codec, "?")
    if as_json:
        fields = {"file": str(path), "position": position, "codec": codec, **header._asdict()}
        print(json.dumps(fields))
    else:
        print(
            f"{path.name} @{position}: offsets {header.base_offset}..{header.last_offset}, {header.size} bytes, "
            f"epoch {header.epoch}, codec {codec}, producer {header.producer_id}/{header.producer_epoch} "
            f"sequence {header.base_sequence}, timestamps {header.base_timestamp}..{header.max_timestamp}"
        )


def _print_records(path: Path, found: tuple[int, BatchHeader, bytes], as_json: bool) -> None:
    for record in batch.decode(found[2]):
        if as_json:
            fields = {
                "file": str(path),
                "offset": record.offset,
                "timestamp": record.timestamp,
                "key": record.key.decode(errors="replace") if record.key is not None else None,
                "value": record.value.decode(errors="replace") if record.value is not None else None,
                "headers": [[name, (value or b"").decode(errors="replace")] for name, value in record.headers],
            }
            print(json_line(fields))
        else:
            print(f"{record.offset}\t{record.timestamp}\t{record.key!r}\t{record.value!r}\t{record.headers!r}")
