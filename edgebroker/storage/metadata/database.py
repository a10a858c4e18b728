"""How this program uses SQLite: write-ahead log, synchronous=FULL, one connection, and transactions that end."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgebroker.storage import files


def connect(path: Path) -> sqlite3.Connection:
    """Open or make a database. Raises sqlite3.Error."""
    files.make_private(path)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA mmap_size=0")
    connection.execute("PRAGMA cache_size=-1024")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Cursor]:
    """All of it, durably, or nothing. Raises sqlite3.Error when it was not stored."""
    cursor = connection.cursor()
    cursor.execute("BEGIN IMMEDIATE")
    try:
        yield cursor
        cursor.execute("COMMIT")
    except Exception:  # also a value that SQLite does not take: the next one must find no open transaction
        if connection.in_transaction:
            connection.rollback()
        raise


def move_aside(path: Path, wall_ms: int, why: str = "corrupt") -> None:
    """Move a database that is not to be used out of the way, as NAME.corrupt-<ms>."""
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(path.with_name(f"{path.name}.{why}-{wall_ms}{suffix}"))
