"""meta.db: what can be rebuilt, and group offsets (whose second copy is offsets.snap).

SQLite in WAL mode with synchronous=FULL, one connection, owned by the metadata thread. Nothing here is on the path of
an acknowledgement: changes are collected on the loop and written in one transaction at most every 50 ms.

A database that cannot be used is moved aside (meta.db.corrupt-<ms>) and created again: no log depends on it, and
group offsets come back from offsets.snap, at most five seconds old and never ahead.
"""

import logging
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgebroker.common.runtime.clock import Clock
from edgebroker.storage.checksummed import read_if_whole, write_checked
from edgebroker.storage.metadata.database import connect, move_aside, transaction
from edgebroker.storage.types import Checkpoint, Children, CorruptRange, GroupKey, GroupOffset

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS checkpoints (topic TEXT, partition INTEGER, log_id TEXT, base INTEGER, position INTEGER,
    next_offset INTEGER, chain INTEGER, epoch INTEGER, max_timestamp INTEGER,
    PRIMARY KEY (topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS segments (topic TEXT, partition INTEGER, base INTEGER, end_offset INTEGER, size INTEGER,
    base_chain INTEGER, end_chain INTEGER, max_timestamp INTEGER, sealed_ms INTEGER,
    PRIMARY KEY (topic, partition, base)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holes (topic TEXT, partition INTEGER, first INTEGER, next INTEGER,
    PRIMARY KEY (topic, partition, first)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS group_offsets (grp TEXT, topic TEXT, partition INTEGER, log_id TEXT, epoch INTEGER,
    next_offset INTEGER, revision INTEGER, attempts INTEGER DEFAULT 0, alone INTEGER DEFAULT 0,
    reset_id TEXT DEFAULT '', reset_from INTEGER DEFAULT -1, target INTEGER DEFAULT -1,
    moved_end INTEGER DEFAULT -1,
    PRIMARY KEY (grp, topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS producers (client_id TEXT PRIMARY KEY, producer_id INTEGER, epoch INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS windows (topic TEXT, partition INTEGER, producer_id INTEGER, epoch INTEGER, age REAL,
    entries BLOB, PRIMARY KEY (topic, partition, producer_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS window_marks (topic TEXT, partition INTEGER, below INTEGER,
    PRIMARY KEY (topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS topology (rank INTEGER PRIMARY KEY, address TEXT);
"""
VERSION = 4
_FROM_VERSION_3 = "ALTER TABLE group_offsets ADD COLUMN moved_end INTEGER DEFAULT -1;"
_FROM_VERSION_2 = f"""
ALTER TABLE group_offsets ADD COLUMN attempts INTEGER DEFAULT 0;
ALTER TABLE group_offsets ADD COLUMN alone INTEGER DEFAULT 0;
ALTER TABLE group_offsets ADD COLUMN reset_id TEXT DEFAULT '';
ALTER TABLE group_offsets ADD COLUMN reset_from INTEGER DEFAULT -1;
ALTER TABLE group_offsets ADD COLUMN target INTEGER DEFAULT -1;
{_FROM_VERSION_3}
"""
# Primary result codes that speak of the disk, not of what the file holds.
_NOT_WRITABLE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}

PartitionKey = tuple[str, int]
# What Stage.dump() gives for a producer: id, epoch, last seen (here: age in seconds), packed entries.
ProducerDump = tuple[int, int, float, bytes]


class SegmentRow(NamedTuple):
    end_offset: int
    size: int
    base_chain: int
    end_chain: int
    max_timestamp: int
    sealed_ms: int


class Windows(NamedTuple):
    """The producer windows of a partition as of the batches below an offset."""

    below: int
    producers: list[ProducerDump]


class MetaState:
    """Everything meta.db held when the node started, empty when it was missing or unusable; and what the children of
    this node had (children.snap)."""

    def __init__(self) -> None:
        self.checkpoints: dict[PartitionKey, Checkpoint] = {}
        self.segments: dict[PartitionKey, dict[int, SegmentRow]] = {}
        self.corrupt_ranges: dict[PartitionKey, list[CorruptRange]] = {}
        self.group_offsets: dict[GroupKey, GroupOffset] = {}
        self.producers: dict[str, tuple[int, int]] = {}
        self.windows: dict[PartitionKey, Windows] = {}
        self.topology: list[str] = []
        self.children: Children = {}

    def forget(self, topics: Sequence[str]) -> None:
        """The files of these topics are gone, or others: what was known about them is about others."""
        for table in (self.checkpoints, self.segments, self.corrupt_ranges, self.windows):
            for key in [key for key in table if key[0] in topics]:
                del table[key]


class MetaChanges:
    """What the next transaction writes; the loop fills it, the metadata thread empties it."""

    def __init__(self) -> None:
        self.checkpoints: dict[PartitionKey, Checkpoint] = {}
        self.segments: dict[tuple[str, int, int], SegmentRow | None] = {}
        self.corrupt_ranges: dict[PartitionKey, list[CorruptRange]] = {}
        self.group_offsets: dict[GroupKey, GroupOffset | None] = {}
        self.producers: dict[str, tuple[int, int] | None] = {}
        self.windows: dict[PartitionKey, Windows] = {}
        self.topology: list[str] | None = None
        # Topics of which every row goes, before anything else is written.
        self.dropped: set[str] = set()

    def __bool__(self) -> bool:
        tables = (
            self.checkpoints,
            self.segments,
            self.corrupt_ranges,
            self.group_offsets,
            self.producers,
            self.windows,
        )
        return any(tables) or self.topology is not None or bool(self.dropped)

    def drop_topic(self, topic: str) -> None:
        """Forget what is known about the logs of a topic. Groups forget their committed offsets in it themselves."""
        tables: tuple[dict[Any, Any], ...] = (self.checkpoints, self.segments, self.corrupt_ranges, self.windows)
        for table in tables:
            for key in [key for key in table if key[0] == topic]:
                del table[key]
        self.dropped.add(topic)

    def absorb(self, later: "MetaChanges") -> None:
        """Put later changes on top of these (after a transaction that failed)."""
        for topic in later.dropped:
            self.drop_topic(topic)
        self.checkpoints.update(later.checkpoints)
        self.segments.update(later.segments)
        self.corrupt_ranges.update(later.corrupt_ranges)
        self.group_offsets.update(later.group_offsets)
        self.producers.update(later.producers)
        self.windows.update(later.windows)
        if later.topology is not None:
            self.topology = later.topology


class MetaDatabase:
    """The connection. Every method runs on the metadata thread."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self._connection: sqlite3.Connection | None = None

    def load(self) -> MetaState:
        """Open, check and read everything; an unusable database is moved aside first. Never raises for its content.

        One that is only not writable (a full disk) is read as it is; write() tries to open it again.
        """
        try:
            return self._open_and_read()
        except (sqlite3.Error, TypeError, KeyError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_WRITABLE:
                log.error("%s cannot be opened for writing: %s", self._path, error)
                state = self._read_only()
                if state is not None:
                    return state
            log.error("%s cannot be used (%s); it is kept as .corrupt and rebuilt from the logs", self._path, error)
            self._move_aside()
        try:
            return self._open_and_read()
        except sqlite3.Error as error:
            log.error("%s cannot be created (%s); continuing without it", self._path, error)
            self._close()
            return MetaState()

    def make(self) -> None:
        """Make the file, so that load() finds it."""
        self.load()
        self._close()

    def write(self, changes: MetaChanges) -> None:
        """One durable transaction. Raises sqlite3.Error when it was not stored."""
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        with transaction(self._connection) as cursor:
            self._apply(cursor, changes)

    def close(self) -> None:
        self._close()

    def _apply(self, cursor: sqlite3.Cursor, changes: MetaChanges) -> None:
        for table in ("checkpoints", "segments", "holes", "windows", "window_marks"):
            cursor.executemany(f"DELETE FROM {table} WHERE topic=?", [(topic,) for topic in changes.dropped])
        cursor.executemany(
            "REPLACE INTO checkpoints VALUES (?,?,?,?,?,?,?,?,?)",
            [(*key, *row) for key, row in changes.checkpoints.items()],
        )
        for (topic, partition, base), segment in changes.segments.items():
            if segment is None:
                cursor.execute(
                    "DELETE FROM segments WHERE topic=? AND partition=? AND base=?", (topic, partition, base)
                )
            else:
                cursor.execute("REPLACE INTO segments VALUES (?,?,?,?,?,?,?,?,?)", (topic, partition, base, *segment))
        for key, corrupt_ranges in changes.corrupt_ranges.items():
            cursor.execute("DELETE FROM holes WHERE topic=? AND partition=?", key)
            cursor.executemany("INSERT INTO holes VALUES (?,?,?,?)", [(*key, *corrupt) for corrupt in corrupt_ranges])
        for group_key, offset in changes.group_offsets.items():
            if offset is None:
                cursor.execute("DELETE FROM group_offsets WHERE grp=? AND topic=? AND partition=?", group_key)
            else:
                cursor.execute(
                    "REPLACE INTO group_offsets VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                    (*group_key, *msgspec.structs.astuple(offset)),
                )
        for client, row in changes.producers.items():
            if row is None:
                cursor.execute("DELETE FROM producers WHERE client_id=?", (client,))
            else:
                cursor.execute("REPLACE INTO producers VALUES (?,?,?)", (client, *row))
        for key, windows in changes.windows.items():
            cursor.execute("DELETE FROM windows WHERE topic=? AND partition=?", key)
            cursor.executemany("INSERT INTO windows VALUES (?,?,?,?,?,?)", [(*key, *row) for row in windows.producers])
            cursor.execute("REPLACE INTO window_marks VALUES (?,?,?)", (*key, windows.below))
        if changes.topology is not None:
            cursor.execute("DELETE FROM topology")
            cursor.executemany("INSERT INTO topology VALUES (?,?)", list(enumerate(changes.topology)))

    def _read_only(self) -> MetaState | None:
        """What the database file itself holds, without its write-ahead log; None when that is not readable either.
        It is an older state at worst, and no older state makes a group or a log go ahead of what is stored."""
        self._close()
        try:
            uri = f"{self._path.absolute().as_uri()}?mode=ro&immutable=1"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        except sqlite3.Error:
            return None
        try:
            return self._read(connection)
        except (sqlite3.Error, TypeError, KeyError):
            return None
        finally:
            connection.close()

    def _open_and_read(self) -> MetaState:
        self._connect()
        assert self._connection is not None
        return self._read(self._connection)

    @staticmethod
    def _read(connection: sqlite3.Connection) -> MetaState:
        if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("quick_check found damage")
        state = MetaState()
        for topic, partition, *row in connection.execute("SELECT * FROM checkpoints"):
            state.checkpoints[topic, partition] = Checkpoint(*row)
        for topic, partition, base, *row in connection.execute("SELECT * FROM segments"):
            state.segments.setdefault((topic, partition), {})[base] = SegmentRow(*row)
        for topic, partition, *row in connection.execute("SELECT * FROM holes ORDER BY first"):
            state.corrupt_ranges.setdefault((topic, partition), []).append(CorruptRange(*row))
        for group, topic, partition, *row in connection.execute("SELECT * FROM group_offsets"):
            state.group_offsets[group, topic, partition] = _group_offset(row)
        for client, *row in connection.execute("SELECT * FROM producers"):
            state.producers[client] = (row[0], row[1])
        for topic, partition, below in connection.execute("SELECT * FROM window_marks"):
            state.windows[topic, partition] = Windows(below, [])
        for topic, partition, *row in connection.execute("SELECT * FROM windows"):
            state.windows[topic, partition].producers.append((row[0], row[1], row[2], row[3]))
        state.topology = _topology(connection)
        return state

    def _connect(self) -> None:
        connection = self._connection = connect(self._path)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 2, 3, VERSION):
            raise sqlite3.DatabaseError(f"schema {version} is not the one that this release knows")
        if version in (2, 3):
            upgrade = _FROM_VERSION_2 if version == 2 else _FROM_VERSION_3
            connection.executescript(f"BEGIN;{upgrade}PRAGMA user_version={VERSION};COMMIT;")
        connection.executescript(_SCHEMA)
        if version != VERSION:
            connection.execute(f"PRAGMA user_version={VERSION}")

    def _close(self) -> None:
        if self._connection is not None:
            try:
                self._connection.close()
            except sqlite3.Error as error:
                log.warning("%s: closing failed: %s", self._path, error)
            self._connection = None

    def _move_aside(self) -> None:
        self._close()
        move_aside(self._path, self._clock.wall_ms())


def _topology(connection: sqlite3.Connection) -> list[str]:
    """Also of a database of the release before, which had none, and which a full disk keeps from being upgraded."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name='topology'").fetchone() is None:
        return []
    return [address for (address,) in connection.execute("SELECT address FROM topology ORDER BY rank")]


def _group_offset(row: list[Any]) -> GroupOffset:
    """A row, also one of the schema before, which a full disk keeps from being upgraded."""
    if len(row) > 5:
        row[5] = bool(row[5])
    return GroupOffset(*row)


class _OffsetsFile(msgspec.Struct):
    offsets: list[tuple[str, str, int, GroupOffset]]


def write_offsets_snapshot(path: Path, offsets: dict[GroupKey, GroupOffset]) -> None:
    """offsets.snap: JSON, then its CRC-32C on a line of its own. Durable when this returns."""
    write_checked(path, _OffsetsFile([(*key, offset) for key, offset in offsets.items()]))


def read_offsets_snapshot(path: Path) -> dict[GroupKey, GroupOffset]:
    """The snapshot, or nothing when it is missing or damaged (which is logged)."""
    snapshot = read_if_whole(path, _OffsetsFile, _OffsetsFile([]))
    return {(group, topic, partition): offset for group, topic, partition, offset in snapshot.offsets}


def newest_offsets(
    database: dict[GroupKey, GroupOffset], snapshot: dict[GroupKey, GroupOffset]
) -> dict[GroupKey, GroupOffset]:
    """The newer of the two copies per group and partition."""
    merged = dict(snapshot)
    for key, offset in database.items():
        other = merged.get(key)
        if other is None or offset.revision >= other.revision:
            merged[key] = offset
    return merged


def stored_ends(path: Path) -> dict[tuple[str, int, str], int]:
    """Up to where logs were durable when it was last noted, by topic, partition and log id; for tools. Nothing when the
    database is missing or cannot be read."""
    for mode in ("mode=ro", "mode=ro&immutable=1"):  # the second one where the directory cannot be written
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as connection:
                rows = connection.execute("SELECT topic, partition, log_id, next_offset FROM checkpoints").fetchall()
            return {(topic, partition, log_id): end for topic, partition, log_id, end in rows}
        except sqlite3.Error:
            continue
    return {}
