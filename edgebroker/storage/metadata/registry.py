"""registry.db: the nodes of the tree, and what operators decided about them. Truth: part of every backup.

SQLite in WAL mode with synchronous=FULL, one connection, owned by a thread of its own. What nodes report about
themselves comes again by itself; pins, drains and removals do not. A damaged file is moved aside
(registry.db.corrupt-<ms>) and created again, for the tree works without it.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import Worker
from edgebroker.storage.metadata.database import connect, move_aside, transaction

log = logging.getLogger(__name__)

FILE = "registry.db"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (uid TEXT PRIMARY KEY, report BLOB, connected INTEGER, seen_ms INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS removed (uid TEXT PRIMARY KEY, boot TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pins (uid TEXT, rank INTEGER, parent TEXT, PRIMARY KEY (uid, rank)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drains (uid TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS running (one INTEGER PRIMARY KEY CHECK (one = 1), wall_ms INTEGER);
"""
VERSION = 1
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class NodeRow(NamedTuple):
    """What is kept of a node: its last report that said something lasting; whether it was connected when the row was
    written, and when that was, by the wall clock of the registry."""

    report: bytes
    connected: bool
    seen_ms: int


class _Hub(msgspec.Struct):
    """What of a report says where a node is."""

    name: str = ""
    address: str = ""


class RegistryState:
    """What the file held; `wall_ms` is when the registry was last known to run."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeRow] = {}
        self.removed: dict[str, str] = {}
        self.pins: dict[str, list[str]] = {}
        self.draining: set[str] = set()
        self.wall_ms = 0


class RegistryChanges:
    """What the next transaction writes; None deletes."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeRow | None] = {}
        self.removed: dict[str, str | None] = {}
        self.pins: dict[str, list[str]] = {}
        self.draining: dict[str, bool] = {}
        self.wall_ms = 0

    def __bool__(self) -> bool:
        return bool(self.nodes or self.removed or self.pins or self.draining or self.wall_ms)

    def absorb(self, newer: RegistryChanges) -> None:
        """Add what came after these."""
        for name in ("nodes", "removed", "pins", "draining"):
            getattr(self, name).update(getattr(newer, name))
        self.wall_ms = newer.wall_ms or self.wall_ms


class RegistryStore:
    """Owned by the loop thread; the file belongs to a thread of its own. Fill `changes`, then call write()."""

    def __init__(self, directory: Path, scheduler: Scheduler, clock: Clock) -> None:
        self._path, self._scheduler, self._clock = directory / FILE, scheduler, clock
        self._connection: sqlite3.Connection | None = None
        self._worker = Worker("registry")
        self.changes = RegistryChanges()
        self.failed = ""
        self._busy = False
        self._waiting: list[Callable[[str], None]] = []

    def load(self) -> RegistryState:
        """Read everything; before the loop runs. What is damaged is moved aside; what only cannot be opened or written
        now, or was written by a newer release, is left as it is, and read as far as that goes. Never raises."""
        for _ in range(2):
            try:
                return self._read()
            except (sqlite3.Error, TypeError) as error:
                self._close()
                self.failed = str(error)
                damaged = isinstance(error, TypeError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
                if not damaged:
                    break
                log.error("%s cannot be used (%s): moved aside; pins, drains and removals are lost", self._path, error)
                move_aside(self._path, self._clock.wall_ms())
        log.error("%s cannot be opened for writing: %s", self._path, self.failed)
        return self._as_it_is()

    def begin_again(self) -> None:
        """Move a file aside that is there, and begin an empty one with the next write. Blocks for a moment."""
        self._close()
        if self._path.exists():
            move_aside(self._path, self._clock.wall_ms(), "replaced")

    def written_at(self) -> float:
        """When the file was last written, by the clock of the file system; 0 when there is none."""
        write_ahead = self._path.with_name(f"{FILE}-wal")
        return max((path.stat().st_mtime for path in (self._path, write_ahead) if path.exists()), default=0.0)

    def _as_it_is(self) -> RegistryState:
        """What the file holds, without its write-ahead log."""
        try:
            uri = f"{self._path.absolute().as_uri()}?mode=ro&immutable=1"
            connection = sqlite3.connect(uri, uri=True)
            try:
                return _state(connection)
            finally:
                connection.close()
        except (sqlite3.Error, TypeError) as error:
            log.error("%s cannot be read either: %s", self._path, error)
            return RegistryState()

    def write(self, stored: Callable[[str], None] | None = None) -> None:
        """Store the changes; `stored("")` is called once they are durable, stored(why) when they are not."""
        if stored is not None:
            self._waiting.append(stored)
        if self._busy or not self.changes:
            if not self._busy:
                self._tell("")
            return
        self._busy = True
        changes, self.changes = self.changes, RegistryChanges()
        waiting, self._waiting = self._waiting, []

        def work() -> None:
            error = ""
            try:
                self._apply(changes)
            except Exception as caught:
                error = str(caught) or repr(caught)
            self._scheduler.call_soon_threadsafe(lambda: written(error))

        def written(error: str) -> None:
            self._busy = False
            if error and error != self.failed:
                log.error("%s cannot be written: %s", self._path, error)
            self.failed = error
            if error:
                changes.absorb(self.changes)
                self.changes = changes  # they go with the next write
            for callback in waiting:
                callback(error)
            if not error and (self.changes or self._waiting):
                self.write()

        self._worker.submit(work)

    def stop(self, timeout: float) -> bool:
        """Store what is left and end the thread; True when all of it is durable."""
        failed: list[Exception] = []

        def finish() -> None:
            try:
                self._apply(self.changes)
                self._close()
            except (OSError, sqlite3.Error) as error:
                failed.append(error)
                log.error("%s could not be written at stop: %s", self._path, error)

        self._worker.submit(finish)
        return self._worker.stop(timeout) and not failed

    def _tell(self, error: str) -> None:
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback(error)

    def _apply(self, changes: RegistryChanges) -> None:
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        with transaction(self._connection) as cursor:
            gone = [(uid,) for uid, row in changes.nodes.items() if row is None]
            cursor.executemany("DELETE FROM nodes WHERE uid=?", gone)
            cursor.executemany(
                "REPLACE INTO nodes VALUES (?,?,?,?)",
                [(uid, *row) for uid, row in changes.nodes.items() if row is not None],
            )
            for uid, boot in changes.removed.items():
                cursor.execute("DELETE FROM removed WHERE uid=?", (uid,))
                if boot is not None:
                    cursor.execute("INSERT INTO removed VALUES (?,?)", (uid, boot))
            for uid, parents in changes.pins.items():
                cursor.execute("DELETE FROM pins WHERE uid=?", (uid,))
                cursor.executemany("INSERT INTO pins VALUES (?,?,?)", [(uid, *pin) for pin in enumerate(parents)])
            for uid, draining in changes.draining.items():
                cursor.execute(
                    "REPLACE INTO drains VALUES (?)" if draining else "DELETE FROM drains WHERE uid=?", (uid,)
                )
            if changes.wall_ms:
                cursor.execute("REPLACE INTO running VALUES (1,?)", (changes.wall_ms,))

    def _read(self) -> RegistryState:
        self._connect()
        connection = self._connection
        assert connection is not None
        if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise TypeError("quick_check found damage")
        self.failed = ""
        return _state(connection)

    def _connect(self) -> None:
        connection = self._connection = connect(self._path)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise sqlite3.OperationalError(f"schema {version} was written by another release; nothing in it is changed")
        connection.executescript(_SCHEMA)
        if version != VERSION:
            connection.execute(f"PRAGMA user_version={VERSION}")

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _state(connection: sqlite3.Connection) -> RegistryState:
    state = RegistryState()
    for uid, report, connected, seen_ms in connection.execute("SELECT * FROM nodes"):
        state.nodes[uid] = NodeRow(bytes(report), bool(connected), seen_ms)
    state.removed = dict(connection.execute("SELECT * FROM removed"))
    for uid, parent in connection.execute("SELECT uid, parent FROM pins ORDER BY uid, rank"):
        state.pins.setdefault(uid, []).append(parent)
    state.draining = {uid for (uid,) in connection.execute("SELECT uid FROM drains")}
    state.wall_ms = next((ms for (ms,) in connection.execute("SELECT wall_ms FROM running")), 0)
    return state


def read_hubs(path: Path) -> list[tuple[str, str]]:
    """(name, address) of the nodes of a registry.db that nobody uses which have an address for children."""
    opened = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        reports = [msgspec.json.decode(report, type=_Hub) for (report,) in opened.execute("SELECT report FROM nodes")]
    except (sqlite3.Error, msgspec.DecodeError):
        return []
    finally:
        opened.close()
    return sorted((hub.name, hub.address) for hub in reports if hub.address)


def copy_registry(source: Path, target: Path) -> None:
    """A whole copy of a registry.db that may be in use; SQLite syncs it. The directory is the caller's to sync."""
    opened = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)
    try:
        copy = sqlite3.connect(target)
        try:
            opened.backup(copy)
        finally:
            copy.close()
    finally:
        opened.close()
