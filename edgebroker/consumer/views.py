"""The views of an application and the tables behind them.

A topic has a table `_TOPIC_gN` for each generation, and an SQL view of the topic's name over the one that readers see.
The next generation is filled beside it; one transaction shows it instead. Statements that readers have prepared go on.
What is left of earlier generations is removed in slices.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.errors import ConfigError
from edgebroker.common.runtime.clock import Clock
from edgebroker.consumer.database import AppDatabase, NotStorableError, Row, view_name
from edgebroker.consumer.declare.columns import Columns

SORTED = "sorted"
NOT_STORABLE = (OverflowError, UnicodeEncodeError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
# A slice is to take so long; how many rows that are is learned.
SLICE_SECONDS, FIRST_ROWS, LEAST_ROWS, MOST_ROWS = 0.01, 1000, 50, 50_000


class View(NamedTuple):
    """A generation of a view and the statements that change it. `columns` are those that the application declares; a
    row is the key, these, partition, offset and timestamp of the record. `stale`: it has other columns, or was made by
    another version, and cannot be changed any more."""

    topic: str
    name: str
    generation: int
    columns: Columns
    put: str
    delete: str
    stale: bool


class Slice:
    """How many rows go into a slice, so that it takes SLICE_SECONDS."""

    def __init__(self) -> None:
        self.rows = FIRST_ROWS

    def took(self, seconds: float) -> None:
        factor = min(2.0, SLICE_SECONDS / max(seconds, 1e-6))
        self.rows = max(LEAST_ROWS, min(MOST_ROWS, int(self.rows * factor)))


class Views:
    """Belongs to the thread of the database. Raises sqlite3.Error where nothing else is said."""

    def __init__(self, database: AppDatabase, clock: Clock) -> None:
        self._database, self._connection, self._clock = database, database.connection, clock
        self._dropped = Slice()

    def open(self, topic: str, columns: Columns, version: int) -> View:
        """The view of a topic, made when it is new. Raises ConfigError when another topic has its name."""
        name, text = view_name(topic), _declared(columns)
        if name.startswith("_") or name.lower().startswith("sqlite_"):
            raise ConfigError(f"topic {topic} cannot have a view: names that begin with _ or sqlite_ are taken")
        self._database.protected.add(name.lower())
        found = self._connection.execute(
            "SELECT generation, columns, version FROM _generations WHERE topic=?", (topic,)
        ).fetchone()
        if found is None:
            with self._database.transaction():
                clash = self._connection.execute(
                    "SELECT topic FROM _generations WHERE lower(name)=lower(?)", (name,)
                ).fetchone()
                if clash is not None:
                    raise ConfigError(f"topics {clash[0]} and {topic} would have views of the same name, {name}")
                own = self._connection.execute("SELECT type FROM sqlite_schema WHERE lower(name)=lower(?)", (name,))
                if (found := own.fetchone()) is not None:
                    raise ConfigError(
                        f"the view of {topic} would be called {name}, which is a {found[0]} that a handler has made; "
                        "give that one another name"
                    )
                first = _view(topic, name, 1, columns)
                self._make_table(first)
                self._show(first)
                self._connection.execute(
                    "INSERT INTO _generations VALUES (?,?,1,?,?,0,0)", (topic, name, text, version)
                )
            found = (1, text, version)
        return _view(topic, name, found[0], columns, stale=found[1:] != (text, version))

    def put(self, view: View, rows: Sequence[Row], deleted: Sequence[Row]) -> None:
        """Set rows of a view, and delete others by their keys; within a transaction. Raises NotStorableError for a
        value that SQLite does not take: a number of more than 64 bits."""
        try:
            if rows:
                self._connection.executemany(view.put, rows)
            if deleted:
                self._connection.executemany(view.delete, deleted)
        except NOT_STORABLE as error:
            raise NotStorableError(str(error)) from None

    def offset_of(self, view: View, key: str | bytes) -> int:
        """The offset of the record that a row of a view is of; -1: there is no row."""
        row = self._connection.execute(f'SELECT _offset FROM "{table_of(view)}" WHERE key=?', (key,)).fetchone()
        return row[0] if row is not None else -1

    # ---- the next generation ----

    def begin_next(self, view: View) -> View:
        """Make the table of the next generation, an empty one; within a transaction."""
        (following,) = self._connection.execute(
            "SELECT following FROM _generations WHERE topic=?", (view.topic,)
        ).fetchone()
        new = _view(view.topic, view.name, max(view.generation, following) + 1, view.columns)
        self._make_table(new)
        self._connection.execute(
            "UPDATE _generations SET following=?, copied=0 WHERE topic=?", (new.generation, view.topic)
        )
        return new

    def forget_next(self, view: View) -> None:
        """What the next generation has does not count; within a transaction."""
        self._connection.execute("UPDATE _generations SET copied=-1 WHERE topic=?", (view.topic,))

    def next(self, view: View) -> tuple[View, int] | None:
        """The next generation if it was begun, and how many sorted rows it has."""
        following, copied = self._connection.execute(
            "SELECT following, copied FROM _generations WHERE topic=?", (view.topic,)
        ).fetchone()
        if not following or copied < 0:
            return None
        return _view(view.topic, view.name, following, view.columns), copied

    def attach(self, path: Path) -> int:
        """Have the sorted rows of a file at hand; how many there are. Outside of transactions."""
        self.detach()
        self._connection.execute(f"ATTACH ? AS {SORTED}", (str(path),))
        return int(self._connection.execute(f"SELECT coalesce(max(number), 0) FROM {SORTED}.rows").fetchone()[0])

    def detach(self) -> None:
        if any(name == SORTED for _, name, _ in self._connection.execute("PRAGMA database_list")):
            self._connection.execute(f"DETACH {SORTED}")

    def copy(self, view: View, copied: int, count: int) -> int:
        """Copy so many more sorted rows into a generation; how many it has then; within a transaction."""
        names = ", ".join(staged_names(view.columns))
        self._connection.execute(
            f'INSERT INTO "{table_of(view)}" SELECT {names} FROM {SORTED}.rows WHERE number > ? AND number <= ?',
            (copied, copied + count),
        )
        self._connection.execute("UPDATE _generations SET copied=? WHERE topic=?", (copied + count, view.topic))
        return copied + count

    def count(self, view: View, partitions: Sequence[int]) -> int:
        """The rows of these partitions in a generation."""
        return int(self._connection.execute(counting(view, partitions), partitions).fetchone()[0])

    def switch(self, old: View, new: View, loaded: Sequence[int], version: int) -> None:
        """Show a generation instead of the one before, whose rows of partitions that were not loaded again are taken
        over if they have the same columns; within a transaction."""
        if not old.stale:
            self._connection.execute(
                f'INSERT OR REPLACE INTO "{table_of(new)}" SELECT * FROM "{table_of(old)}" '
                f"WHERE _partition NOT IN ({_marks(loaded)})",
                loaded,
            )
        self._show(new)
        self._connection.execute(
            "UPDATE _generations SET generation=?, columns=?, version=?, following=0, copied=0 WHERE topic=?",
            (new.generation, _declared(new.columns), version, new.topic),
        )

    def drop_some(self) -> bool:
        """Remove some rows of a table that no view needs any more; False: there is none."""
        kept = set[str]()
        names = set[str]()
        for name, generation, following, copied in self._connection.execute(
            "SELECT name, generation, following, copied FROM _generations"
        ):
            names.add(name)
            kept |= {_table(name, generation), *([_table(name, following)] if copied >= 0 else [])}
        tables = [name for (name,) in self._connection.execute("SELECT name FROM sqlite_schema WHERE type='table'")]
        for table in tables:
            found = _TABLE.fullmatch(table)
            if found is not None and found[1] in names and table not in kept:
                self._drop_some_of(table)
                return True
        return False

    def _drop_some_of(self, table: str) -> None:
        began, rows = self._clock.monotonic(), self._dropped.rows
        with self._database.transaction():
            last = self._connection.execute(
                f'SELECT key FROM "{table}" ORDER BY key LIMIT 1 OFFSET ?', (rows,)
            ).fetchone()
            if last is None:
                self._connection.execute(f'DROP TABLE "{table}"')
            else:
                self._connection.execute(f'DELETE FROM "{table}" WHERE key < ?', last)
        self._dropped.took(self._clock.monotonic() - began)

    # ---- tables ----

    def _make_table(self, view: View) -> None:
        own = "".join(f'"{column.name}" {column.sql}, ' for column in view.columns.columns)
        self._connection.execute(
            f'CREATE TABLE IF NOT EXISTS "{table_of(view)}" (key NOT NULL, {own}_partition INTEGER, _offset INTEGER, '
            "_timestamp INTEGER, PRIMARY KEY (key)) WITHOUT ROWID"
        )
        for number, index in enumerate(view.columns.indexes):
            over, name = ", ".join(f'"{column}"' for column in index), f"{table_of(view)}_i{number}"
            self._connection.execute(f'CREATE INDEX IF NOT EXISTS "{name}" ON "{table_of(view)}" ({over})')

    def _show(self, view: View) -> None:
        """Let readers see this generation. Statements that they have prepared see it as well."""
        self._connection.execute(f'DROP VIEW IF EXISTS "{view.name}"')
        self._connection.execute(f'CREATE VIEW "{view.name}" AS SELECT {view.columns.selected} FROM "{table_of(view)}"')


def staged_names(columns: Columns) -> list[str]:
    """What key, columns, partition, offset and timestamp are called where rows are staged: whatever the columns are
    called, no name is taken."""
    return ["k", *(f"c{place}" for place in range(len(columns.columns))), "p", "o", "t"]


def counting(view: View, partitions: Sequence[int]) -> str:
    """SQL that counts the rows of these partitions in a generation; they are its parameters."""
    return f'SELECT count(*) FROM "{_table(view.name, view.generation)}" WHERE _partition IN ({_marks(partitions)})'


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def table_of(view: View) -> str:
    return _table(view.name, view.generation)


def _view(topic: str, name: str, generation: int, columns: Columns, *, stale: bool = False) -> View:
    table, places = _table(name, generation), ",".join("?" * (len(columns.columns) + 4))
    put = f'INSERT OR REPLACE INTO "{table}" VALUES ({places})'
    return View(topic, name, generation, columns, put, f'DELETE FROM "{table}" WHERE key=?', stale)


def _table(name: str, generation: int) -> str:
    return f"_{name}_g{generation}"


_TABLE = re.compile(r"_(.+)_g\d+")


def _declared(columns: Columns) -> str:
    return columns.declared + "".join(f"; index {', '.join(index)}" for index in columns.indexes)
