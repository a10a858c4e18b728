"""The local database: one transaction, views that other programs read, and what a handler may not do."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edgebroker.common.errors import ConfigError, DataDirectoryInUseError, FormatTooNewError
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import Position
from edgebroker.consumer.database import AppDatabase, DeadRecord
from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.reader import Reader
from edgebroker.consumer.views import Views
from tests.kit import applications


class Price(msgspec.Struct):
    code: str
    cents: int


@pytest.fixture
def database(tmp_path: Path) -> Iterator[AppDatabase]:
    found = AppDatabase(tmp_path / "app", 1)
    yield found
    found.close()


def read(database: AppDatabase, sql: str) -> list[tuple[object, ...]]:
    return applications.read(database.path, sql)


def test_rows_and_positions_in_one_transaction(database: AppDatabase) -> None:
    view = Views(database, SystemClock()).open("shop.prices-1", Columns(Price), 1)
    position = Position(b"i" * 16, 1, 8)
    with database.transaction():
        Views(database, SystemClock()).put(view, [("a", "A", 5, 0, 6, 1000), (b"\xff", "B", 6, 0, 7, 1001)], [])
        database.set_positions({("shop.prices-1", 0): position})
    database.sync()
    assert read(database, "SELECT * FROM shop_prices_1 ORDER BY cents") == [
        ("a", "A", 5, 0, 6, 1000),
        (b"\xff", "B", 6, 0, 7, 1001),
    ]
    assert database.positions() == {("shop.prices-1", 0): position}
    assert read(database, "SELECT * FROM _position") == [("shop.prices-1", 0, 8)]
    with pytest.raises(ZeroDivisionError), database.transaction():
        Views(database, SystemClock()).put(view, [], [("a",)])
        database.set_positions({("shop.prices-1", 0): position._replace(next_offset=9)})
        raise ZeroDivisionError
    assert database.positions() == {("shop.prices-1", 0): position}
    with database.transaction():
        Views(database, SystemClock()).put(view, [], [("a",)])
    assert read(database, "SELECT key FROM shop_prices_1") == [(b"\xff",)]


def test_the_rights_of_the_files(database: AppDatabase) -> None:
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in database.path.parent.iterdir()}
    assert modes == {"app.db": 0o640, "app.db-wal": 0o640, "app.db-shm": 0o660, "LOCK": 0o640}
    assert stat.S_IMODE(database.path.parent.stat().st_mode) == 0o750


def test_a_view_that_is_there_already(tmp_path: Path) -> None:
    first = AppDatabase(tmp_path, 1)
    view = Views(first, SystemClock()).open("prices", Columns(Price), 1)
    with first.transaction():
        Views(first, SystemClock()).put(view, [("a", "A", 5, 0, 6, 1000)], [])
    first.close()
    again = AppDatabase(tmp_path, 1)
    Views(again, SystemClock()).open("prices", Columns(Price), 1)
    assert read(again, "SELECT cents FROM prices") == [(5,)]
    other = Columns(msgspec.defstruct("Price", [("code", str)]))
    assert Views(again, SystemClock()).open("prices", other, 1).stale
    assert Views(again, SystemClock()).open("prices", Columns(Price), 2).stale
    Views(again, SystemClock()).open("a.b", Columns(Price), 1)
    with pytest.raises(ConfigError, match=r"topics a.b and a-b would have views of the same name, a_b"):
        Views(again, SystemClock()).open("a-b", Columns(Price), 1)
    again.close()


def test_two_processes(database: AppDatabase) -> None:
    with pytest.raises(DataDirectoryInUseError):
        AppDatabase(database.path.parent, 1)


def test_a_newer_format(tmp_path: Path) -> None:
    AppDatabase(tmp_path, 1).close()
    connection = sqlite3.connect(tmp_path / "app.db")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(FormatTooNewError):
        AppDatabase(tmp_path, 1)


def test_dead_records(database: AppDatabase) -> None:
    dead = DeadRecord("prices", 0, 7, b"k", None, 5, "no number", 1000, 900, "[]")
    for _ in range(2):
        with database.transaction():
            database.bury(dead)
    assert read(database, "SELECT * FROM _dead") == [dead]


@pytest.mark.parametrize(
    "sql",
    [
        "COMMIT", "commit;", "/* now */ COMMIT", "END", "ROLLBACK", "BEGIN", "SAVEPOINT a", "RELEASE a",
        "ATTACH ':memory:' AS other", "PRAGMA synchronous=OFF", "DELETE FROM _positions", "DROP TABLE _positions",
        "UPDATE _positions SET next_offset=0", "INSERT INTO _prices_g1 VALUES (1,2,3,4,5,6)", "DROP VIEW _position",
        "CREATE TABLE _mine (a)", "CREATE INDEX mine ON _prices_g1 (code)", "ALTER TABLE _dead ADD COLUMN a",
        "CREATE TRIGGER mine AFTER INSERT ON _prices_g1 BEGIN SELECT 1; END", "DROP VIEW prices", "DROP VIEW Prices",
        "CREATE TEMP TABLE _positions (a)", "CREATE TEMP TABLE mine (a)", "CREATE TEMP VIEW mine AS SELECT 1",
    ],
)  # fmt: skip
def test_what_a_handler_may_not(database: AppDatabase, sql: str) -> None:
    Views(database, SystemClock()).open("prices", Columns(Price), 1)
    with database.transaction():
        database.set_positions({("prices", 0): Position(b"i" * 16, 1, 8)})
        database.lend()
        with pytest.raises(sqlite3.DatabaseError, match="a handler can neither begin nor end a"):
            database.execute(sql)
    assert database.positions()["prices", 0].next_offset == 8


def test_what_a_handler_may(database: AppDatabase) -> None:
    view = Views(database, SystemClock()).open("prices", Columns(Price), 1)
    with database.transaction():
        Views(database, SystemClock()).put(view, [("a", "A", 5, 0, 6, 1000)], [])
        database.lend()
        database.execute("CREATE TABLE sums (name TEXT PRIMARY KEY, sum INTEGER, _own INTEGER)")
        database.execute("CREATE INDEX by_sum ON sums (sum)")
        database.execute_many("INSERT INTO sums VALUES (?,?,?)", [("a", 1, 0), ("b", 2, 0)])
        database.execute("UPDATE sums SET sum=sum+1, _own=1 WHERE name=?", ("a",))
        assert database.execute("SELECT cents FROM prices").fetchall() == [(5,)]
    assert read(database, "SELECT name, sum FROM sums ORDER BY name") == [("a", 2), ("b", 2)]


@pytest.mark.parametrize(
    "sql",
    [
        "COMMIT", "ROLLBACK", "BEGIN", "ATTACH 'app.db' AS w", "PRAGMA query_only=OFF", "DELETE FROM _positions",
        "CREATE TEMP TABLE a (b)", "VACUUM", "SAVEPOINT a",
    ],
)  # fmt: skip
def test_what_who_reads_may_not(database: AppDatabase, sql: str) -> None:
    reader = Reader(database.path)
    with reader.at_one_moment():
        with pytest.raises(sqlite3.DatabaseError):
            list(reader.each(sql))
        assert reader.rows("SELECT count(*) FROM _position") == [(0,)]
    reader.close()
