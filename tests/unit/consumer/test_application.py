"""A module becomes an application, or is told what in it cannot be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebroker.consumer.declare.application import Application, Handler, _overlap, load_module, read_application
from edgebroker.consumer.declare.declarations import DeclarationError, RetryPolicy
from edgebroker.consumer.declare.signatures import read_signature

HEAD = """
import msgspec
from edgebroker.consumer import Context, Database, consumer, every, message_handler, on_start, retry_policy


class Price(msgspec.Struct):
    code: str
    cents: int


"""


@pytest.fixture(autouse=True)
def imports() -> Iterator[None]:
    before, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def application(tmp_path: Path, text: str) -> Application:
    path = tmp_path / "till.py"
    path.write_text(HEAD + text)
    return read_application(load_module(str(path)), "till-7", {"format": "express"})


def test_topics_views_handlers_and_hooks(tmp_path: Path) -> None:
    found = application(
        tmp_path,
        """
@consumer("prices-{label.format}", view=Price)
class Prices:
    def __init__(self):
        self.seen = []

    @message_handler()
    def handle(self, price: Price):
        self.seen.append(price.cents)

    @every(5)
    def tidy(self): ...


@consumer("sales", scope="shared")
@retry_policy(max_attempts=1)
@message_handler(key="a*", headers={"kind": "x"})
def sale(sale: dict): ...


@message_handler("{node}.settings")
def settings(value: str): ...


@on_start
def prepare(database: Database): ...
""",
    )
    assert list(found.topics) == ["prices-express", "sales", "till-7.settings"]
    prices, sales, settings = found.topics.values()
    assert prices.view is not None and [column.name for column in prices.view.columns] == ["code", "cents"]
    assert (sales.scope, settings.scope) == ("shared", "each")
    assert (sales.handlers[0].policy.max_attempts, settings.handlers[0].policy.max_attempts) == (1, 5)
    prices.handlers[0].call(prices.handlers[0].signature.decode(_Value(b'{"code": "a", "cents": 3}')))  # type: ignore[arg-type]
    assert prices.handlers[0].call.__self__.seen == [3]  # type: ignore[attr-defined]
    assert [(hook.moment, hook.seconds) for hook in found.hooks] == [("", 5), ("start", 0)]


class _Value:
    def __init__(self, value: bytes) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "till declares no consumer; write @consumer(TOPIC, view=...) or a handler"),
        ("@consumer('a')\nclass A: ...", "topic a is read for nothing; give it a view or a handler"),
        ("@consumer('a', view=Price)\nclass A: ...\n@consumer('a', view=Price)\nclass B: ...",
         "has a consumer already"),
        ("@message_handler()\ndef f(p: Price): ...", "of which topic? write message_handler(TOPIC)"),
        ("@message_handler('a')\ndef f(p: Price): ...\n@message_handler('a')\ndef g(p: Price): ...",
         "some records of a are for the handler at"),
        ("@consumer('a-{label.none}', view=Price)\nclass A: ...", "a-{label.none}: this node has no label none"),
        ("@consumer('a', view=Price)\nclass A:\n    def __init__(self, x): ...", "A is made without arguments"),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        application(tmp_path, text)
    assert said in str(caught.value)


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    for source, said in ((str(tmp_path / "no.py"), "there is no such file"), ("no_such_module", "there is no module")):
        with pytest.raises(DeclarationError, match=said):
            load_module(source)


def test_what_lies_beside_it_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "shop_types.py").write_text(HEAD)
    (tmp_path / "shop.py").write_text(
        "from shop_types import Price, consumer\n@consumer('prices', view=Price)\nclass Prices: ...\n"
    )
    found = read_application(load_module(str(tmp_path / "shop.py")), "", {})
    assert list(found.topics) == ["prices"]


def handler(key: str, headers: dict[str, str]) -> Handler:
    def call(value: bytes) -> None: ...

    pairs = tuple((name, value.encode()) for name, value in headers.items())
    return Handler(key, pairs, 1, 30.0, read_signature(call, {}), RetryPolicy(), call, "")


KEYS = st.sampled_from(["*", "a*", "ab*", "a", "ab", "abc", "b"])
HEADERS = st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["1", "2"]))


@given(KEYS, HEADERS, KEYS, HEADERS)
def test_two_handlers_overlap_where_a_record_is_for_both(
    key: str, headers: dict[str, str], other_key: str, other_headers: dict[str, str]
) -> None:
    one, other = handler(key, headers), handler(other_key, other_headers)
    records = [
        (k, ((("x", x),) if x else ()) + ((("y", y),) if y else ()))
        for k in (b"a", b"ab", b"abc", b"abcd", b"b", b"", None)
        for x in (b"1", b"2", None)
        for y in (b"1", b"2", None)
    ]
    assert _overlap(one, other) == any(one.takes(*record) and other.takes(*record) for record in records)
