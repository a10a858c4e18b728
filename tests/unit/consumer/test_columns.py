"""What becomes of the fields of a value: columns that any program reads, and back what it was."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import sqlite3
import uuid
from typing import Annotated, Literal

import msgspec
import pytest

from edgebroker.consumer.declare.columns import Columns


class Size(enum.Enum):
    SMALL = "s"


class Price(msgspec.Struct):
    code: str
    cents: int
    weight: float | None = None
    fresh: bool = False
    picture: bytes = b""
    tags: list[str] = []
    vat: decimal.Decimal = decimal.Decimal("0.19")
    since: datetime.date = datetime.date(2026, 11, 30)
    at: datetime.datetime | None = None
    id: uuid.UUID = uuid.UUID(int=7)
    size: Size = Size.SMALL
    kind: Literal["a", "b"] = "a"
    positive: Annotated[int, msgspec.Meta(gt=0)] = 1


@dataclasses.dataclass
class Item:
    name: str


class Empty(msgspec.Struct):
    pass


def test_a_struct() -> None:
    columns = Columns(Price)
    assert [(column.name, column.sql) for column in columns.columns] == [
        ("code", "TEXT"), ("cents", "INTEGER"), ("weight", "REAL"), ("fresh", "INTEGER"), ("picture", "BLOB"),
        ("tags", "TEXT"), ("vat", "TEXT"), ("since", "TEXT"), ("at", "TEXT"), ("id", "TEXT"), ("size", "TEXT"),
        ("kind", "TEXT"), ("positive", "INTEGER"),
    ]  # fmt: skip
    at = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)
    row = columns.row(Price("A1", 120, 0.5, True, b"\0", ["x", "y"], at=at))
    names = ", ".join(f'"{column.name}" {column.sql}' for column in columns.columns)
    database = sqlite3.connect(":memory:")
    database.execute(f"CREATE TABLE t ({names})")
    database.execute(f"INSERT INTO t VALUES ({','.join('?' * len(row))})", row)
    assert database.execute("SELECT * FROM t").fetchone() == (
        "A1", 120, 0.5, 1, b"\0", '["x","y"]', "0.19", "2026-11-30", "2026-11-30T12:00:00Z",
        "00000000-0000-0000-0000-000000000007", "s", "a", 1,
    )  # fmt: skip
    database.close()
    assert columns.row(Price("A1", 1))[2] is None and columns.row(Price("A1", 1))[8] is None


def test_a_dataclass_and_a_struct_without_fields() -> None:
    assert Columns(Item).row(Item("milk")) == ("milk",)
    assert Columns(Empty).row(Empty()) == ()


def test_a_field_has_the_name_that_it_has_in_python() -> None:
    class Renamed(msgspec.Struct, rename="camel"):
        unit_price: int

    assert [column.name for column in Columns(Renamed).columns] == ["unit_price"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (int, "int has no fields to become columns; use a msgspec.Struct or a dataclass"),
        (dict, "dict has no fields"),
        (msgspec.defstruct("Key", [("Key", str)]), "Key.Key: every view has a column of this name; rename the field"),
        (msgspec.defstruct("Two", [("a", str), ("A", str)]), "Two: SQL cannot tell a from its other spelling"),
        (msgspec.defstruct("Odd", [("a", complex)]), "field a: complex cannot be decoded from JSON"),
    ],
)
def test_what_cannot_become_columns(kind: type, said: str) -> None:
    with pytest.raises(TypeError) as caught:
        Columns(kind)
    assert said in str(caught.value)
