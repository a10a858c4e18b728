"""Decorators note things and change nothing; a mistake names file and line, and says what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from edgebroker.consumer import (
    Context,
    Database,
    DeclarationError,
    consumer,
    every,
    message_handler,
    on_ready,
    on_start,
    retry_policy,
)
from edgebroker.consumer.declare.declarations import RetryPolicy, notes_of


class Price(msgspec.Struct):
    cents: int


def test_a_function_stays_what_it_is() -> None:
    @retry_policy(max_attempts=2, then="skip")
    @message_handler("prices", key="sku-*", headers={"kind": "sale"})
    def handle(price: Price, database: Database) -> int:
        return price.cents

    assert handle(Price(3), None) == 3  # type: ignore[arg-type]
    notes = notes_of(handle)
    assert notes is not None and notes.policy == RetryPolicy(2, then="skip")
    (handler,) = notes.handlers
    assert handler[:5] == ("prices", "sku-*", {"kind": "sale"}, 1, 30.0)
    assert handler.signature.others == (Database,)


def test_a_class_and_its_methods() -> None:
    @consumer("prices-{node}", view=Price, start="latest")
    class Prices:
        @message_handler()
        def handle(self, price: Price | None, context: Context) -> None: ...

        @on_start
        def prepare(self, database: Database) -> None: ...

        @every(5)
        def tidy(self) -> None: ...

    notes = notes_of(Prices)
    assert notes is not None
    assert notes.consumers[0][:3] == ("prices-{node}", "each", "latest")
    (handler,) = notes_of(Prices.__dict__["handle"]).handlers  # type: ignore[union-attr]
    assert handler.signature[1:] == (True, False, (Context,))
    assert notes_of(Prices.__dict__["prepare"]).hooks[0] == ("start", 0, True)  # type: ignore[union-attr]
    assert notes_of(Prices.__dict__["tidy"]).hooks[0] == ("", 5, False)  # type: ignore[union-attr]


def test_pauses_grow_and_vary() -> None:
    policy = RetryPolicy(backoff=1.0, factor=3.0, max_backoff=20.0, jitter=0.5)
    for attempts, mean in ((1, 1.0), (2, 3.0), (3, 9.0), (4, 20.0), (10**6, 20.0)):
        pauses = [policy.pause(attempts) for _ in range(200)]
        assert mean * 0.5 <= min(pauses) < mean < max(pauses) <= mean * 1.5


def handle(price: Price) -> None: ...
def several(prices: list[Price]) -> None: ...
def strange(price: Price, other: int) -> None: ...
def hook(other: int) -> None: ...
async def waiting(price: Price) -> None: ...


def yielding(price: Price) -> Any:
    yield price


class Prices: ...


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: consumer("no topic!")(Prices), "topic names are 1 to 200 of"),
    (lambda: consumer("prices", scope="all")(Prices), 'scope=\'all\': write "each" or "shared"'),  # type: ignore[arg-type]
    (lambda: consumer("prices", start="now")(Prices), 'start=\'now\': write "earliest" or "latest"'),
    (lambda: consumer("prices", scope="shared", view=Price)(Prices), 'a view needs all records, and scope="shared"'),
    (lambda: consumer("prices", view=int)(Prices), "view: int has no fields to become columns"),
    (lambda: message_handler("no topic!")(handle), "topic names are 1 to 200 of"),
    (lambda: message_handler("p", key="a*b")(handle), "key='a*b': write a key, a beginning followed by *"),
    (lambda: message_handler("p", batch=0)(several), "batch=0: between 1 and 10000"),
    (lambda: message_handler("p", batch=5)(handle), "write list[...] as its annotation"),
    (lambda: message_handler("p", timeout=0)(handle), "timeout=0: seconds, up to 86400"),
    (lambda: message_handler("p")(yielding), "it yields, so nothing of it would be run"),
    (lambda: on_ready(waiting), "waiting is not waited for; write def, without async"),
    (lambda: message_handler("p")(strange), "parameter other has to be one of Database (SQL in the transaction)"),
    (lambda: retry_policy(max_attempts=0)(handle), "max_attempts=0: between 1 and"),
    (lambda: retry_policy(backoff=-1)(handle), "backoff=-1: seconds, up to 86400"),
    (lambda: retry_policy(factor=0.5)(handle), "factor is at least 1"),
    (lambda: retry_policy(then="drop")(handle), 'then=\'drop\': write "dead_letter", "skip" or "stop"'),  # type: ignore[arg-type]
    (lambda: retry_policy(retry_on=(1,))(handle), "retry_on: a tuple of exception classes"),  # type: ignore[arg-type]
    (lambda: on_ready(hook), "hook takes nothing, or one Database"),
    (lambda: every(0)(several), "every(0): seconds, up to 86400"),
]


@pytest.mark.parametrize(("declare", "said"), MISTAKES, ids=[said[:40] for _, said in MISTAKES])
def test_mistakes(declare: Callable[[], Any], said: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        declare()
    assert said in str(caught.value)
    file, line, _ = str(caught.value).split(":", 2)
    assert file == __file__ and line.isdigit()
