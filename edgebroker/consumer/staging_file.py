"""Where a topic that is loaded again is put first: records as they come, then their latest rows in the order of keys.

    put() as records come, with positions -> sort(), in a thread -> rows to copy, and what came since: rows_since()

`staging-VIEW.db` has the records, `staging-VIEW.sorted` the latest row of each key up to a record, under that name when
it is complete. Rows that come in the order of their keys fill a table several times as fast as in the order of records.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.types import Position
from edgebroker.consumer.database import Loading, NotStorableError, Row, is_damage
from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.views import NOT_STORABLE, staged_names
from edgebroker.storage import files

log = logging.getLogger(__name__)

CACHE_KIB = 4 << 10
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS progress (partition INTEGER PRIMARY KEY, reset_id TEXT, log_id BLOB, epoch INTEGER, "
    "next_offset INTEGER, target INTEGER)",
    "CREATE TABLE IF NOT EXISTS about (columns TEXT)",
)


class Since(NamedTuple):
    """A record behind those that were sorted: its row, and whether it deletes the key."""

    number: int
    row: Row
    gone: bool


class StagingFile:
    """Belongs to the thread of the database, but for sort(). Raises sqlite3.Error."""

    def __init__(self, directory: Path, name: str, columns: Columns) -> None:
        """Open or make it; one that is damaged, or of other columns, is replaced by an empty one."""
        self._path = directory / f"staging-{name}.db"
        self.sorted = directory / f"staging-{name}.sorted"
        self._columns = columns
        self._names = staged_names(columns)
        marks = ",".join("?" * len(self._names))
        self._insert = f"INSERT INTO records ({', '.join(self._names)}, gone) VALUES ({marks}, 0)"
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            log.warning("%s is damaged: it is replaced by an empty one", self._path)
            self._connection.close()
            self._replace()
        if self._about() != [(columns.declared,)]:
            self.close()
            self._replace()
        self._forget_others()

    @staticmethod
    def exists(directory: Path, name: str) -> bool:
        return (directory / f"staging-{name}.db").exists()

    def _open(self) -> None:
        files.make_private(self._path)
        self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        execute = self._connection.execute
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")
        execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        for statement in _SCHEMA:
            execute(statement)
        execute(f"CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY, {', '.join(self._names)}, gone)")
        rows = execute("SELECT partition, reset_id, log_id, epoch, next_offset, target FROM progress")
        self.loading = {
            partition: Loading(reset_id, Position(log_id, epoch, offset), target)
            for partition, reset_id, log_id, epoch, offset, target in rows
        }
        if not self._about():
            execute("INSERT INTO about VALUES (?)", (self._columns.declared,))
        self._wal = files.open_log(self._path.with_name(self._path.name + "-wal"))

    def _about(self) -> list[tuple[str]]:
        return self._connection.execute("SELECT columns FROM about").fetchall()

    def _replace(self) -> None:
        self._unlink()
        self._open()

    # ---- records ----

    def begin(self, partition: int, loading: Loading) -> None:
        """Load a partition from its beginning."""
        self.sorted.unlink(missing_ok=True)
        with self._connection:
            self._connection.execute("BEGIN")
            self._connection.execute("DELETE FROM records WHERE p=?", (partition,))
            self._set(partition, loading)

    def sync(self) -> None:
        """Make what was appended durable. Raises OSError."""
        files.sync_file(self._wal)

    @contextmanager
    def appending(self, partition: int, loading: Loading) -> Iterator[None]:
        """What is put inside is stored together with how far the partition is then."""
        with self._connection:
            self._connection.execute("BEGIN")
            yield
            self._set(partition, loading)

    def put(self, rows: Sequence[Row], gone: Sequence[Row]) -> None:
        """Add rows, as the table of the view has them, and deletions, (key, partition, offset). Raises
        NotStorableError; some may be there then, and be added once more."""
        nothing = (None,) * len(self._columns.columns)
        try:
            self._connection.executemany(self._insert, rows)
            if gone:
                deletions = [(key, *nothing, partition, offset, None) for key, partition, offset in gone]
                self._connection.executemany(self._insert.replace(", 0)", ", 1)"), deletions)
        except NOT_STORABLE as error:
            raise NotStorableError(str(error)) from None

    def _set(self, partition: int, loading: Loading) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO progress VALUES (?,?,?,?,?,?)",
            (partition, loading.reset_id, *loading.position, loading.target),
        )
        self.loading[partition] = loading

    # ---- sorted ----

    def sort(self, number: int) -> Path:
        """Write the latest row of each key, in their order, into a file of its own. In a thread; takes seconds."""
        temporary = self.sorted.with_name(f"{self.sorted.name}.{number}")
        temporary.unlink(missing_ok=True)
        files.make_private(temporary)
        names = ", ".join(self._names)
        with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}", "temp_store=FILE"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("ATTACH ? AS staging", (str(self._path),))
            (last,) = connection.execute("SELECT coalesce(max(number), 0) FROM staging.records").fetchone()
            # With max(), the other columns are those of the row that has it. Groups come in the order of their keys.
            connection.execute(f"CREATE TABLE rows (number INTEGER PRIMARY KEY, {names}, latest)")
            latest = "SELECT {0}, max(number) FROM staging.records WHERE number <= ? GROUP BY k HAVING NOT gone"
            connection.execute(f"INSERT INTO rows ({names}, latest) {latest.format(names)}", (last,))
            attempt = self._attempt(connection, "staging.")
            connection.execute("CREATE TABLE bound AS SELECT ? AS number, ? AS attempt", (last, attempt))
        fd = files.open_log(temporary)
        files.sync_file(fd)
        files.close(fd)
        return temporary

    def accept(self, path: Path) -> None:
        """What sort() has written is what is copied."""
        files.move(path, self.sorted)

    @staticmethod
    def _attempt(connection: sqlite3.Connection, schema: str = "") -> str:
        """The refreshes of all partitions: what was sorted of others does not count."""
        found = connection.execute(f"SELECT group_concat(reset_id) FROM (SELECT reset_id FROM {schema}progress "
                                   "ORDER BY partition)")  # fmt: skip
        return found.fetchone()[0] or ""

    def _forget_others(self) -> None:
        """A power cut may bring a file back that was removed, or one that is not whole."""
        try:
            with closing(sqlite3.connect(f"{self.sorted.absolute().as_uri()}?mode=ro", uri=True)) as connection:
                (attempt,) = connection.execute("SELECT attempt FROM bound").fetchone()
        except sqlite3.Error:
            attempt = None
        if attempt != self._attempt(self._connection):
            self.sorted.unlink(missing_ok=True)

    def bound(self) -> int:
        """The number of the last record that was sorted."""
        with closing(sqlite3.connect(self.sorted)) as connection:
            return int(connection.execute("SELECT number FROM bound").fetchone()[0])

    def rows_since(self, number: int, count: int) -> list[Since]:
        """The next records behind one."""
        names = ", ".join(self._names)
        rows = self._connection.execute(
            f"SELECT number, gone, {names} FROM records WHERE number > ? ORDER BY number LIMIT ?", (number, count)
        )
        return [Since(row[0], row[2:], bool(row[1])) for row in rows]

    # ---- ending ----

    def close(self) -> None:
        self._connection.close()
        files.close(self._wal)

    def remove(self) -> None:
        """What it has is shown, or of no use."""
        self.close()
        self._unlink()

    def _unlink(self) -> None:
        for path in (self.sorted, self._path, *self.sorted.parent.glob(f"{self.sorted.name}.*")):
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
