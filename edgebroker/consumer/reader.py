"""A connection to the local database that only reads, for a thread of its own: as programs in other languages have.

What one read() asks for is of one moment.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE_KIB = 4 << 10
_BEGIN, _ROLLBACK = "BEGIN -- kit", "ROLLBACK -- kit"
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


class Reader:
    """Raises sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        self._connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        # What is asked in the name of others reads, and nothing else. SQLite is asked about a text once: the texts of
        # transactions here are no one else's.
        self._own = False
        self._connection.set_authorizer(self._authorize)

    def rows(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement."""
        return self._connection.execute(sql, parameters).fetchall()

    def each(self, sql: str, parameters: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        """One row after the other."""
        return self._connection.execute(sql, parameters)

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """What is read inside is of one moment, whatever is written meanwhile."""
        self._own = True
        self._connection.execute(_BEGIN)
        self._own = False
        try:
            yield
        finally:
            self._own = True
            self._connection.execute(_ROLLBACK)
            self._own = False

    def _authorize(self, action: int, *others: object) -> int:
        return sqlite3.SQLITE_OK if self._own or action in _READING else sqlite3.SQLITE_DENY

    def interrupt(self) -> None:
        """End what is being read; it raises. Any thread."""
        self._connection.interrupt()

    def close(self) -> None:
        self._connection.close()
