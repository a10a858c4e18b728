"""What a disk may hold when the power goes: durable contents, and the changes no sync has covered yet.

A file is its durable bytes and the changes since: each 512-byte sector may show any of its versions from the last
synced one on (the page cache only moves forward), the size may be the old one, the new one or one between, and a
truncation or allocation may have happened or not. A directory is its durable entries and the changes since: any
subset of them that keeps the order of changes to the same name; a rename happens as a whole. A sync that failed
leaves what it covered in doubt for good (the kernel takes the pages for clean); only writing it again helps.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
_HEADER = struct.Struct("<cBHHxxqQQ")
FILE, DIRECTORY, FILE_SYSTEM = 0, 1, 2


class Record(NamedTuple):
    """One line of the trace: w(rite), t(runcate), c(reate), d(irectory made), r(ename), l(ink), u(nlink),
    b(egin of a sync), s(ynced), x (sync failed), a(pplication mark)."""

    op: str
    kind: int
    path: str
    other: str
    number: int
    inode: int
    data: bytes


def read_trace(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a trace; one cut short by the end of its process is left out."""
    trace = Path(path).read_bytes()
    position = 0
    while position + _HEADER.size <= len(trace):
        op, kind, path_length, other_length, number, inode, length = _HEADER.unpack_from(trace, position)
        middle = position + _HEADER.size + path_length
        data_at = middle + other_length
        if data_at + length > len(trace):
            return
        name, other = os.fsdecode(trace[middle - path_length : middle]), os.fsdecode(trace[middle:data_at])
        yield Record(op.decode(), kind, name, other, number, inode, trace[data_at : data_at + length])
        position = data_at + length


class Change(NamedTuple):
    """A change of a file not yet part of its durable bytes: data at an offset or, without data, a new size."""

    seq: int
    offset: int
    data: bytes | None
    durable: bool = False
    in_doubt: bool = False

    @property
    def end(self) -> int:
        return self.offset + len(self.data or b"")

    @property
    def sectors(self) -> range:
        return range(self.offset // SECTOR, (self.end + SECTOR - 1) // SECTOR) if self.data else range(0)


class Pick(NamedTuple):
    """One choice of what reached the disk of a file: how many resizes, its size, the last write seen per sector."""

    resizes: int
    size: int
    seen: Mapping[int, int]


def replay(base: bytes, changes: Iterable[Change], pick: Pick) -> bytes:
    """The content that a choice makes."""
    content, resizes = bytearray(base), pick.resizes
    for change in changes:
        if change.data is None:
            if resizes > 0:
                resizes -= 1
                _resize(content, change.offset)
        elif pick.seen.keys().isdisjoint(change.sectors):
            _patch(content, change, change.offset, change.end)
        else:
            for sector in change.sectors:
                if change.seq <= pick.seen.get(sector, change.seq):
                    start, end = max(change.offset, sector * SECTOR), min(change.end, (sector + 1) * SECTOR)
                    _patch(content, change, start, end)
    _resize(content, pick.size)
    return bytes(content)


def _patch(content: bytearray, change: Change, start: int, end: int) -> None:
    assert change.data is not None
    if len(content) < end:
        _resize(content, end)
    content[start:end] = memoryview(change.data)[start - change.offset : end - change.offset]


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def size_after(size: int, changes: Iterable[Change], resizes: int, upto: float = inf) -> int:
    """The size once the first `resizes` resizes and all writes up to a point are done."""
    for change in changes:
        if change.data is None:
            size = change.offset if resizes > 0 else size
            resizes -= 1
        elif change.durable or change.seq <= upto:
            size = max(size, change.end)
    return size


class File:
    """A file by itself, whatever its names."""

    def __init__(self, mode: int = 0o640, base: bytes = b"") -> None:
        self.mode, self.base = mode, base
        self.changes: tuple[Change, ...] = ()

    def settle(self, upto: int, *, failed: bool) -> None:
        """A sync called after change `upto` returned: its changes are durable, or in doubt for good if it failed."""
        self.changes = tuple(
            change
            if change.seq > upto or change.in_doubt or change.durable
            else change._replace(durable=not failed, in_doubt=failed)
            for change in self.changes
        )
        done = next((i for i, change in enumerate(self.changes) if not change.durable), len(self.changes))
        settled, self.changes = self.changes[:done], self.changes[done:]
        if settled:
            self.base = replay(self.base, settled, Pick(done, size_after(len(self.base), settled, done), {}))


class Directory:
    """A directory by itself; what is in it is known to the Disk."""

    def __init__(self, mode: int = 0o750) -> None:
        self.mode = mode


Node = File | Directory
Entries = Mapping[Directory, Mapping[str, Node]]


class EntryChange(NamedTuple):
    """A change of directory entries that happens as a whole."""

    seq: int
    label: str
    entries: tuple[tuple[Directory, str, Node | None], ...]

    @property
    def names(self) -> set[tuple[Directory, str]]:
        return {(directory, name) for directory, name, _ in self.entries}


def apply(entries: Entries, changes: Iterable[EntryChange]) -> Entries:
    """The entries after changes; the ones given stay as they are."""
    result: dict[Directory, Mapping[str, Node]] = dict(entries)
    for change in changes:
        for directory, name, node in change.entries:
            names = {key: value for key, value in result.get(directory, {}).items() if key != name}
            result[directory] = names if node is None else {**names, name: node}
    return result


class Disk:
    """Follows a trace: what the program sees (live), what is durable, and the changes in between."""

    def __init__(self, root: str | os.PathLike[str], initial: str | os.PathLike[str] | None = None) -> None:
        self.path = os.path.realpath(root)
        self.root = Directory()
        self.durable: Entries = {self.root: {}}
        if initial is not None:
            self._load(self.root, Path(initial))
        self.live: Entries = self.durable
        self.pending: tuple[EntryChange, ...] = ()
        self.dirty: dict[File, None] = {}
        self.marks: list[bytes] = []
        self.seq = 0
        self._inodes: dict[int, File] = {}
        self._begun: dict[int, int] = {}

    def _load(self, directory: Directory, path: Path) -> None:
        for entry in sorted(path.iterdir()):
            node: Node = Directory() if entry.is_dir() else File(entry.stat().st_mode & 0o7777, entry.read_bytes())
            self.durable = apply(self.durable, [EntryChange(0, "", ((directory, entry.name, node),))])
            if isinstance(node, Directory):
                self._load(node, entry)

    def apply(self, record: Record) -> str | None:
        """Follow one record; says what happened if something did."""
        name, other = self._name(record.path), self._name(record.other)
        if name is None and other is None and record.op != "a":
            return None
        if record.op == "b":
            self._begun[record.number] = self.seq
            return None
        node = self._node(record, name)
        self.seq += 1
        match record.op:
            case "a":
                self.marks.append(record.data)
                return "mark"
            case "w" | "t" if isinstance(node, File):
                node.changes += (Change(self.seq, record.number, record.data if record.op == "w" else None),)
                self.dirty[node] = None
                return f"{'write' if record.op == 'w' else 'resize'} {name} at {record.number} +{len(record.data)}"
            case "s" | "x":
                self._settle(record, node)
                return f"{'sync' if record.op == 's' else 'failed sync'} {name or 'the root'}"
            case "c" | "d":
                new = File(record.number) if record.op == "c" else Directory(record.number)
                if isinstance(new, File):
                    self._inodes[record.inode] = new
                return self._enter(f"create {name}", (name, new))
            case "u":
                return self._enter(f"unlink {name}", (name, None))
            case "l":
                return self._enter(f"link {name} {other}", (other, node))
            case "r":
                if other is not None and node is None:
                    raise ValueError(f"{record.path} moved into the traced directory; its content is not known")
                return self._enter(f"rename {name} {other}", (name, None), (other, node))
        self.seq -= 1
        return None

    def _name(self, path: str) -> str | None:
        """The path below the root, "" for the root itself, None for one elsewhere."""
        return path[len(self.path) + 1 :] if path == self.path or path.startswith(self.path + "/") else None

    def _lookup(self, name: str) -> Node | None:
        node: Node | None = self.root
        for part in filter(None, name.split("/")):
            node = self.live.get(node, {}).get(part) if isinstance(node, Directory) else None
        return node

    def _node(self, record: Record, name: str | None) -> Node | None:
        if name is None or record.op in "acd":
            return None
        if record.kind == FILE and record.inode in self._inodes:
            return self._inodes[record.inode]
        node = self._lookup(name)
        if record.inode and isinstance(node, File):
            self._inodes[record.inode] = node
        if node is None and record.op in "wtrlu" and not name.endswith(" (deleted)"):
            raise ValueError(f"{name} was there before the trace began: say so by initial=")
        return node

    def _enter(self, label: str, *entries: tuple[str | None, Node | None]) -> str:
        changed = []
        for name, node in entries:
            if name:
                above, _, last = name.rpartition("/")
                directory = self._lookup(above)
                if not isinstance(directory, Directory):
                    raise ValueError(f"{above} was there before the trace began: say so by initial=")
                changed.append((directory, last, node))
        change = EntryChange(self.seq, label, tuple(changed))
        self.live = apply(self.live, [change])
        self.pending += (change,)
        return label

    def _settle(self, record: Record, node: Node | None) -> None:
        upto, failed = self._begun.pop(record.number), record.op == "x"
        everything = record.kind == FILE_SYSTEM
        for file in list(self.dirty) if everything else [node]:
            if isinstance(file, File):
                file.settle(upto, failed=failed)
        if failed:
            return
        needed: set[tuple[Directory, str]] = set()
        durable: list[EntryChange] = []
        for change in reversed(self.pending):
            covered = change.seq <= upto and (everything or any(at is node for at, _, _ in change.entries))
            if covered or change.names & needed:  # an earlier change of the same name comes first
                needed |= change.names
                durable.insert(0, change)
        self.durable = apply(self.durable, durable)
        self.pending = tuple(change for change in self.pending if change not in durable)
        named = {node for entries in (self.live, self.durable) for names in entries.values() for node in names.values()}
        named |= {node for change in self.pending for _, _, node in change.entries if node}
        self.dirty = {file: None for file in self.dirty if file.changes and file in named}
