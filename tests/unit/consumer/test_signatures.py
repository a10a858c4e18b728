"""What a handler gets is what its annotations say; what cannot be given is told with what to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from edgebroker.common.records import Record
from edgebroker.consumer.declare.signatures import Signature, read_signature


class Price(msgspec.Struct):
    cents: int


@dataclasses.dataclass
class Item:
    name: str


class Database: ...


class Context: ...


KNOWN = {Database: "for SQL", Context: "about the record"}


def signature(function: Callable[..., Any]) -> Signature:
    return read_signature(function, KNOWN)


def record(value: bytes | None) -> Record:
    return cast("Record", SimpleNamespace(value=value))


def test_what_a_record_becomes() -> None:
    def struct(price: Price) -> None: ...
    def item(item: Item) -> None: ...
    def plain(value: dict) -> None: ...  # type: ignore[type-arg]
    def mapping(value: dict[str, int]) -> None: ...
    def text(value: str) -> None: ...
    def raw(value: bytes) -> None: ...
    def whole(value: Record) -> None: ...
    def anything(value: Any) -> None: ...

    cases: list[tuple[Callable[..., None], bytes, object]] = [
        (struct, b'{"cents": 5}', Price(5)),
        (item, b'{"name": "milk"}', Item("milk")),
        (plain, b'{"a": [1]}', {"a": [1]}),
        (mapping, b'{"a": 1}', {"a": 1}),
        (text, "ä".encode(), "ä"),
        (raw, b"\xff", b"\xff"),
        (anything, b"[1]", [1]),
    ]
    for function, value, expected in cases:
        found = signature(function)
        assert (found.decode(record(value)), found.deletions, found.batch) == (expected, False, False)
    one = record(b"x")
    assert signature(whole).decode(one) is one


@pytest.mark.parametrize("value", [b"", b"{", b'{"cents": "5"}', b'{"cent": 5}', b"\xff"])
def test_a_value_that_is_not_as_expected(value: bytes) -> None:
    def struct(price: Price) -> None: ...

    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        signature(struct).decode(record(value))


def test_batches_deletions_and_what_else_is_wanted() -> None:
    def several(prices: list[Price | None], context: Context, database: Database) -> None: ...
    def one(price: Price | None) -> None: ...
    def optional(database_first: Price | None, database: Database) -> None: ...

    assert signature(several)[1:] == (True, True, (Context, Database))
    assert signature(one)[1:] == (True, False, ())
    assert signature(optional)[1:] == (True, False, (Database,))


def nothing() -> None: ...
def unannotated(price) -> None: ...  # type: ignore[no-untyped-def]
def keyword(price: Price, *, database: Database) -> None: ...
def stars(*prices: Price) -> None: ...
def strange(price: complex) -> None: ...
def two(price: Price, other: int) -> None: ...
def unknown(price: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def either(price: Price | Item) -> None: ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (nothing, "a handler takes at least one parameter, for the record: def handle(price: Price)"),
        (unannotated, "parameter price needs an annotation: what a record becomes, for example dict or Price"),
        (keyword, "a handler has plain parameters only"),
        (stars, "a handler has plain parameters only"),
        (strange, "complex cannot be made of a record; use a msgspec.Struct, a dataclass, dict, list, str, bytes or"),
        (two, "parameter other has to be one of Database (for SQL), Context (about the record)"),
        (unknown, "an annotation cannot be resolved: name 'Missing' is not defined"),
        (either, "cannot be made of a record"),
    ],
)
def test_what_cannot_be_given(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(TypeError) as caught:
        signature(function)
    assert said in str(caught.value)
