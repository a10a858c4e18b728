"""app.db: the local database of an application, made to be read by programs in any language.

    one SQLite transaction = rows of views + SQL of handlers + positions + dead letters

views.py has the tables of the views.
Readers open the file with mode=ro: directory 0750, app.db and its -wal 0640, -shm 0660, for the group of readers.
SQLite removes -wal and -shm with the last connection, and readers fail without them: an application never closes this
one, its process ends.
"""

from __future__ import annotations

import errno
import logging
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edgebroker.common.errors import FormatTooNewError
from edgebroker.common.runtime.durable import write_hint
from edgebroker.common.types import Position
from edgebroker.storage import files
from edgebroker.storage.metadata.database import move_aside

log = logging.getLogger(__name__)

FORMAT = 1
NAME, LOCK, DAMAGED = "app.db", "LOCK", "DAMAGED"
CACHE_KIB = 16 << 10
# Pages of the log that are copied into the database at a time.
CHECKPOINT_PAGES = 2000
# The -wal is this small again after all of it was copied; a larger one may be what another program keeps from that.
WAL_BYTES = 64 << 20
RESTART_SECONDS = 0.1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS _positions (topic TEXT, partition INTEGER, log_id BLOB, epoch INTEGER, next_offset INTEGER,
    PRIMARY KEY (topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _generations (topic TEXT PRIMARY KEY, name TEXT UNIQUE, generation INTEGER,
    columns TEXT, version INTEGER, following INTEGER, copied INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _dead (topic TEXT, partition INTEGER, "offset" INTEGER, key BLOB, value BLOB,
    attempts INTEGER, reason TEXT, at_ms INTEGER, timestamp INTEGER, headers TEXT,
    PRIMARY KEY (topic, partition, "offset")) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _loading (topic TEXT, partition INTEGER, reset_id TEXT, log_id BLOB, epoch INTEGER,
    next_offset INTEGER, target INTEGER, PRIMARY KEY (topic, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _outbox (number INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT, key BLOB, value BLOB,
    headers TEXT);
CREATE TABLE IF NOT EXISTS _as_of (topic TEXT PRIMARY KEY, as_of_ms INTEGER) WITHOUT ROWID;
CREATE VIEW IF NOT EXISTS _state AS SELECT topic, generation, EXISTS (SELECT 1 FROM _loading
    WHERE _loading.topic = _generations.topic AND target >= 0) AS loading, as_of_ms IS NOT NULL AS ready, as_of_ms
    FROM _generations LEFT JOIN _as_of USING (topic);
CREATE VIEW IF NOT EXISTS _position AS SELECT topic, partition, next_offset FROM _positions;
"""
# What is said here and what a handler says are two texts: SQLite is asked about the second when it is prepared.
_BEGIN, _COMMIT, _ROLLBACK = "BEGIN IMMEDIATE -- kit", "COMMIT -- kit", "ROLLBACK -- kit"
_DENIED = {
    sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH,
    sqlite3.SQLITE_PRAGMA, sqlite3.SQLITE_CREATE_TEMP_TABLE, sqlite3.SQLITE_CREATE_TEMP_VIEW,
    sqlite3.SQLITE_CREATE_TEMP_INDEX, sqlite3.SQLITE_CREATE_TEMP_TRIGGER,
}  # fmt: skip
_CHANGES = {
    sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE, sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_DROP_VIEW, sqlite3.SQLITE_CREATE_VIEW,
}  # fmt: skip
# Which of two names is that of the table.
_ON_SECOND = {
    sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_DROP_INDEX, sqlite3.SQLITE_DROP_TRIGGER,
    sqlite3.SQLITE_ALTER_TABLE,
}  # fmt: skip
_CHANGES |= _ON_SECOND
_THIS_DEAD = 'WHERE topic=? AND partition=? AND "offset"=?'
Row = tuple[Any, ...]


DatabaseError = sqlite3.Error
# Primary result codes of what may be over in a moment, and of a file that is not a database any more.
_SHORTAGE = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def is_shortage(error: BaseException) -> bool:
    """Could the database not be written or read for now: a full disk, too few descriptors?"""
    return _code(error) in _SHORTAGE or (isinstance(error, OSError) and error.errno in _FULL)


def is_damage(error: BaseException) -> bool:
    """Is what the file holds not what was written?"""
    return _code(error) in _DAMAGE


def _code(error: BaseException) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


class NotStorableError(Exception):
    """A value is none that SQLite stores."""


class DeadRecord(NamedTuple):
    """A record that was given up, and why."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    attempts: int
    reason: str
    at_ms: int
    timestamp: int
    headers: str
    """As JSON: pairs of a name and a value in base64, or null."""


class Loading(NamedTuple):
    """A partition that is loaded again: by which refresh, how far it is, and how far it has to be for the switch."""

    reset_id: str
    position: Position
    target: int


class AppDatabase:
    """Belongs to one thread. Raises sqlite3.Error where nothing else is said."""

    def __init__(self, directory: Path, wall_ms: int) -> None:
        """Open or make the database, and see to it that readers find all of its files. One that is damaged is moved
        aside, and made anew; `wall_ms` is in its name then. Raises DataDirectoryError, DataDirectoryInUseError and
        FormatTooNewError."""
        files.make_directory(directory)
        directory.chmod(0o750)
        self._lock = files.lock(directory / LOCK)
        self.path = directory / NAME
        self._mark = directory / DAMAGED
        self._by_handler = False
        # Views of the kit, in lower case.
        self.protected: set[str] = set()
        # The thread that runs a handler now.
        self._lent_to = 0
        # Rows of the outbox and dead records: those that are stored, and those of the transaction.
        self.outgoing = self._sending = 0
        self.dead = self._burying = 0
        if self._mark.exists():
            self._move_aside(wall_ms)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self.connection.close()
            self._move_aside(wall_ms)
            self._open()
        self.connection.set_authorizer(self._authorize)

    def _move_aside(self, wall_ms: int) -> None:
        log.error("%s is damaged: it is kept as %s.corrupt-%d, and filled again", self.path, NAME, wall_ms)
        move_aside(self.path, wall_ms)
        self._mark.unlink(missing_ok=True)
        files.sync_directory(self.path.parent)

    def damaged(self) -> None:
        """What was read is not what was written: the next start moves the database aside."""
        write_hint(self._mark, b"")

    def _open(self) -> None:
        files.make_private(self.path)
        self.connection = connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA mmap_size=0")
        connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
        self._make_schema()
        self._wal = files.open_log(self.path.with_name(NAME + "-wal"))
        for suffix, mode in (("", 0o640), ("-wal", 0o640), ("-shm", 0o660)):
            self.path.with_name(NAME + suffix).chmod(mode)
        files.sync_directory(self.path.parent)
        self.sync()
        self.outgoing = connection.execute("SELECT count(*) FROM _outbox").fetchone()[0]
        self.dead = connection.execute("SELECT count(*) FROM _dead").fetchone()[0]

    def _make_schema(self) -> None:
        connection = self.connection
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > FORMAT:
            raise FormatTooNewError(f"{self.path} was made by a newer release; nothing in it was changed")
        with self.transaction():
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            # Also when nothing is new: so -wal and -shm are there for readers.
            connection.execute(f"PRAGMA user_version={FORMAT}")

    # ---- transactions ----

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing; durable with the next sync()."""
        self.connection.execute(_BEGIN)
        self._sending = self._burying = 0
        try:
            yield
            self.connection.execute(_COMMIT)
            self.outgoing += self._sending
            self.dead += self._burying
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute(_ROLLBACK)
            raise

    def sync(self) -> None:
        """Make everything that was committed durable. Raises OSError."""
        files.sync_file(self._wal)

    def wal_bytes(self) -> int:
        """The size of the -wal. Any thread."""
        return files.size_of(self._wal)

    def restart_log(self) -> bool:
        """Write the -wal from its beginning again when it is large: readers that follow one another without a gap keep
        it growing otherwise. Waits RESTART_SECONDS for them; False: another program keeps a transaction open."""
        if self.wal_bytes() <= WAL_BYTES:
            return True
        self.connection.execute(f"PRAGMA busy_timeout={int(RESTART_SECONDS * 1000)}")
        (busy, _, _) = self.connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        self.connection.execute("PRAGMA busy_timeout=5000")
        return not busy

    def _authorize(self, action: int, first: str | None, second: str | None, *others: object) -> int:
        if not self._by_handler:
            return sqlite3.SQLITE_OK
        name = second if action in _ON_SECOND else first
        if action in _DENIED:
            return sqlite3.SQLITE_DENY
        if action in _CHANGES and name is not None and (name.startswith("_") or name.lower() in self.protected):
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def by_handler(self, call: Callable[..., sqlite3.Cursor], *arguments: object) -> sqlite3.Cursor:
        """Run a statement of a handler. It can neither end the transaction nor change what belongs to the kit."""
        self._check_lent()
        self._by_handler = True
        try:
            return call(*arguments)
        except sqlite3.DatabaseError as error:
            if "not authorized" in str(error) or "prohibited" in str(error):
                raise sqlite3.DatabaseError(
                    "a handler can neither begin nor end a transaction, nor make temporary tables, nor change views of "
                    "topics and names that begin with an underscore"
                ) from None
            raise
        finally:
            self._by_handler = False

    def lend(self) -> None:
        """This thread runs a handler from now on, which may change the database."""
        self._lent_to = threading.get_ident()

    def take_back(self) -> None:
        """The handler is done: what still has the database can do nothing with it."""
        self._lent_to = 0

    def interrupt(self) -> None:
        """End a statement that takes long; it raises. Any thread."""
        self.connection.interrupt()

    def _check_lent(self) -> None:
        if threading.get_ident() != self._lent_to:
            raise sqlite3.ProgrammingError("what a handler is given can be used in its call only, and in its thread")
        if not self.connection.in_transaction:
            raise sqlite3.ProgrammingError("the transaction of this handler was undone; let it end")

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return self.by_handler(self.connection.execute, sql, parameters)

    def execute_many(self, sql: str, rows: Iterable[Any]) -> sqlite3.Cursor:
        return self.by_handler(self.connection.executemany, sql, rows)

    # ---- loading again ----

    def loading(self, topic: str) -> dict[int, Loading]:
        """The partitions of a topic that are loaded again, and those that were (with a target of -1)."""
        rows = self.connection.execute(
            "SELECT partition, reset_id, log_id, epoch, next_offset, target FROM _loading WHERE topic=?", (topic,)
        )
        return {
            partition: Loading(reset_id, Position(log_id, epoch, offset), target)
            for partition, reset_id, log_id, epoch, offset, target in rows
        }

    def set_loading(self, topic: str, partition: int, one: Loading) -> None:
        self.connection.execute(
            "INSERT OR REPLACE INTO _loading VALUES (?,?,?,?,?,?,?)",
            (topic, partition, one.reset_id, *one.position, one.target),
        )

    def forget_loading(self, topic: str, partition: int) -> None:
        """What was loaded of a partition does not count; within a transaction."""
        self.connection.execute("DELETE FROM _loading WHERE topic=? AND partition=?", (topic, partition))

    def loaded(self, topic: str, loading: Mapping[int, Loading]) -> None:
        """The switch is done; within its transaction."""
        for partition, one in loading.items():
            self.set_loading(topic, partition, one._replace(target=-1))

    # ---- positions and dead records ----

    def positions(self) -> dict[tuple[str, int], Position]:
        """Where reading goes on, by topic and partition."""
        rows = self.connection.execute("SELECT topic, partition, log_id, epoch, next_offset FROM _positions")
        return {(topic, partition): Position(log_id, epoch, offset) for topic, partition, log_id, epoch, offset in rows}

    def set_positions(self, positions: Mapping[tuple[str, int], Position]) -> None:
        self.connection.executemany(
            "INSERT OR REPLACE INTO _positions VALUES (?,?,?,?,?)", [(*key, *one) for key, one in positions.items()]
        )

    def set_as_of(self, as_of: Mapping[str, int]) -> None:
        """When nothing was missing of topics, in milliseconds since 1970; within a transaction."""
        self.connection.executemany("INSERT OR REPLACE INTO _as_of VALUES (?,?)", list(as_of.items()))

    def bury(self, dead: DeadRecord) -> None:
        """Keep a record that was given up; within a transaction."""
        self.unbury(*dead[:3])
        self.connection.execute("INSERT INTO _dead VALUES (?,?,?,?,?,?,?,?,?,?)", dead)
        self._burying += 1

    def dead_record(self, topic: str, partition: int, offset: int) -> DeadRecord | None:
        """A record that was given up, as it is kept."""
        row = self.connection.execute(f"SELECT * FROM _dead {_THIS_DEAD}", (topic, partition, offset)).fetchone()
        return DeadRecord(*row) if row is not None else None

    def newest_dead(self) -> DeadRecord | None:
        """The record that was given up last."""
        row = self.connection.execute("SELECT * FROM _dead ORDER BY at_ms DESC LIMIT 1").fetchone()
        return DeadRecord(*row) if row is not None else None

    def drop_oldest_dead(self, count: int) -> int:
        """Keep so many of the oldest dead records no longer, and those that are as old; how many those were; within a
        transaction."""
        found = self.connection.execute(
            "DELETE FROM _dead WHERE at_ms <= (SELECT at_ms FROM _dead ORDER BY at_ms LIMIT 1 OFFSET ?)", (count - 1,)
        )
        self._burying -= found.rowcount
        return found.rowcount

    def unbury(self, topic: str, partition: int, offset: int) -> None:
        """Keep it no longer; within a transaction."""
        found = self.connection.execute(f"DELETE FROM _dead {_THIS_DEAD}", (topic, partition, offset))
        self._burying -= found.rowcount

    # ---- the outbox ----

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: bytes | None) -> None:
        """Put a record into the outbox, within the transaction of a handler."""
        self._check_lent()
        text = headers.decode() if headers is not None else None
        self.connection.execute(
            "INSERT INTO _outbox (topic, key, value, headers) VALUES (?,?,?,?)", (topic, key, value, text)
        )
        self._sending += 1

    def remove_sent(self, numbers: Sequence[int]) -> None:
        """Remove records from the outbox; within a transaction."""
        found = self.connection.executemany("DELETE FROM _outbox WHERE number=?", [(number,) for number in numbers])
        self._sending -= found.rowcount

    def bury_unsent(self, number: int, reason: str, at_ms: int) -> None:
        """Keep a record of the outbox that can never be sent as a dead one; within a transaction."""
        self.connection.execute(
            "INSERT INTO _dead SELECT topic, -1, number, key, value, 1, ?, ?, ?, coalesce(headers, '[]') FROM _outbox "
            "WHERE number=?",
            (reason, at_ms, at_ms, number),
        )
        self._burying += 1
        self.remove_sent([number])

    # ---- ending ----

    def finish(self) -> None:
        """Copy the log into the database, so that a start has little to read. The files stay open: the process is to
        end without closing them."""
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close everything; readers have to wait for the next start."""
        self.connection.close()
        files.close(self._wal)
        files.close(self._lock)


def view_name(topic: str) -> str:
    """What the view of a topic is called: SQL has no dots and dashes in names."""
    return re.sub(r"[.\-]", "_", topic)
