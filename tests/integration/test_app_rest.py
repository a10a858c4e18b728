"""The REST interface of a running application: look-ups, pages, baskets, changes, dead records, its own functions."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.consumer.handling import dead_records as dead_records_module
from edgebroker.consumer.rest import changes as changes_module
from edgebroker.consumer.rest import lookups as lookups_module
from edgebroker.consumer.rest import queries as queries_module
from edgebroker.consumer.rest import static_files as static_files_module
from edgebroker.consumer.service import StuckError
from tests.kit.applications import VIEW, App, committed, price, publish
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        found.create("prices", partitions=2)
        yield found


def ask(app: App, method: str, path: str, body: object = None) -> tuple[int, Any, str]:
    """Status, body and content type of an answer; the body decoded if it is JSON."""
    connection = http.client.HTTPConnection(*app.service.http_address, timeout=20.0)
    try:
        data = json.dumps(body) if body is not None else None
        connection.request(method, path, data, {"content-type": "application/json"} if data else {})
        answer = connection.getresponse()
        raw, kind = answer.read(), answer.headers.get_content_type()
        return answer.status, json.loads(raw) if kind.endswith(("/json", "+json")) else raw, kind
    finally:
        connection.close()


def found(app: App, path: str) -> Any:
    status, body, _ = ask(app, "GET", path)
    assert status == 200, body
    return body


def refused(app: App, method: str, path: str, status: int, body: object = None) -> str:
    got, answer, kind = ask(app, method, path, body)
    assert (got, answer["status"], kind) == (status, status, "application/problem+json"), answer
    return str(answer["detail"])


def test_look_ups(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW)
    publish(broker, price("a", 1), price("ä/b c", 2))
    publish(broker, price("c", 3), partition=1)
    with app.running():
        app.until("SELECT count(*) FROM prices", [(3,)])
        wait_for(lambda: found(app, "/v1/latest/prices/a")["as_of"]["age_ms"] is not None, "the broker said its ends")
        one = found(app, "/v1/latest/prices/a")
        assert 0 <= one["as_of"].pop("age_ms") < 60_000 and one["record"].pop("timestamp") > 0
        assert one == {
            "record": {
                "key": "a", "value": {"code": "a", "cents": 1}, "partition": 0, "offset": 0, "key_bytes": None
            },
            "as_of": {"offsets": {"0": 2}},
        }  # fmt: skip
        assert found(app, "/v1/latest/prices/%C3%A4%2Fb%20c")["record"]["value"]["cents"] == 2
        assert refused(app, "GET", "/v1/latest/prices/x", 404) == (
            "topic prices has no key x as of partitions 0: 2, 1: 1"
        )
        said = "this application has no view of other; it has views of prices"
        for method, path, body in (
            ("GET", "/v1/latest/other/a", None),
            ("GET", "/v1/latest/other", None),
            ("POST", "/v1/latest/other", {"keys": ["a"]}),
            ("GET", "/v1/changes/other", None),
        ):
            assert refused(app, method, path, 404, body) == said
        status, basket, _ = ask(app, "POST", "/v1/latest/prices", {"keys": ["c", "x", "a", "c"]})
        assert status == 200 and [one["key"] for one in basket["records"]] == ["c", "a"]
        assert basket["missing"] == ["x"] and basket["as_of"]["offsets"] == {"0": 2, "1": 1}
        said = refused(app, "POST", "/v1/latest/prices", 400, {"keys": ["a"] * 501})
        assert said == "the body is not as expected: Expected `array` of length <= 500 - at `$.keys`"
        assert refused(app, "GET", "/v1/nothing", 404) == "there is no /v1/nothing"
        assert refused(app, "PUT", "/v1/stats", 405) == "PUT is not allowed for /v1/stats; use GET, HEAD"


def joined(pages: list[list[str | None]]) -> list[str | None]:
    return [key for page in pages for key in page]


def test_pages(broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch) -> None:
    app = make(VIEW)
    rows = [price(f"{letter}{number:03d}", number) for letter in "abc" for number in range(50)]
    with broker.producer() as producer:
        for key, value in rows:
            producer.send("prices", json.dumps(value).encode(), key.encode(), partition=1)
        producer.send("prices", json.dumps(rows[0][1]).encode(), b"\xff\xfe", partition=1).result(10.0)
    with app.running():
        app.until("SELECT count(*) FROM prices", [(151,)])

        def pages(query: str) -> list[list[str | None]]:
            all_pages, cursor = [], ""
            while True:
                page = found(app, f"/v1/latest/prices?{query}&cursor={cursor}")
                all_pages.append([record["key"] for record in page["records"]])
                cursor = page["next"]
                if cursor is None:
                    return all_pages

        keys: list[str | None] = [key for key, _ in rows]
        got = pages("limit=40")
        assert [len(page) for page in got] == [40, 40, 40, 31] and joined(got) == [*keys, None]
        assert joined(pages("limit=7&prefix=b")) == [key for key in keys if str(key)[0] == "b"]
        assert pages("prefix=x") == [[]]
        last = found(app, "/v1/latest/prices?prefix=&limit=1000")["records"][-1]
        assert (last["key"], last["key_bytes"]) == (None, "//4=")
        monkeypatch.setattr(lookups_module, "MOST_PAGE_BYTES", 1000)
        got = pages("limit=1000")
        assert len(got) > 10 and joined(got) == [*keys, None]
        for query, said in (
            ("limit=0", "limit=0: between 1 and 1000"),
            ("limit=1001", "limit=1001: between 1 and 1000"),
            ("limit=x", "limit=x: between 1 and 1000"),
            ("cursor=%21", "this is not a cursor of a page; begin without one"),
        ):
            assert refused(app, "GET", f"/v1/latest/prices?{query}", 400) == said


def test_columns_of_every_kind_come_back_as_they_were(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make("""
import datetime
import decimal


class Item(msgspec.Struct, rename="camel"):
    is_new: bool
    net_price: decimal.Decimal | None
    since: datetime.date
    tags: list[str]
    weight: float


@consumer("prices", view=Item)
class Items: ...
""")
    value = {"isNew": True, "netPrice": "1.50", "since": "2026-01-02", "tags": ["a", "b"], "weight": 0.5}
    publish(broker, ("a", value))
    publish(broker, ("b", value | {"netPrice": None, "isNew": False}))
    with app.running():
        app.until("SELECT count(*) FROM prices", [(2,)])
        assert found(app, "/v1/latest/prices/a")["record"]["value"] == value
        assert found(app, "/v1/latest/prices/b")["record"]["value"] == value | {"netPrice": None, "isNew": False}
        assert app.read("SELECT is_new, net_price, tags FROM prices WHERE key='a'") == [(1, "1.50", '["a","b"]')]


def test_ready_and_numbers(tmp_path: Path) -> None:
    with running(tmp_path / "data") as first:
        address = first.server
        first.create("prices")
        publish(first, price("a", 1), ("bad", b"{"))
        app = App(first, tmp_path / "application", VIEW)
        with app.running():
            wait_for(lambda: ask(app, "GET", "/readyz")[:2] == (200, {"status": "ready", "why": []}), "it is ready")
            assert found(app, "/healthz") == {"status": "running"}
            stats = found(app, "/v1/stats")
            assert (stats["name"], stats["node"], stats["ready"], stats["dead_records"]) == (
                "prices",
                "till-7",
                True,
                1,
            )
            (topic,) = stats["topics"]
            assert topic["partitions"] == [{"partition": 0, "next_offset": 2, "end": 2, "loading": False}]
            text = ask(app, "GET", "/metrics")[1].decode()
            for line in (
                "edgebroker_app_ready 1.0",
                "edgebroker_app_records_total 2.0",
                "edgebroker_app_dead_records 1.0",
                'edgebroker_app_lag_records{topic="prices"} 0.0',
            ):
                assert line in text.split("\n")
            first.stop()
            wait_for(lambda: found(app, "/readyz")["status"] == "degraded", "its broker is away")
            assert found(app, "/v1/latest/prices/a")["record"]["value"]["cents"] == 1
    with app.running():
        status, body, _ = ask(app, "GET", "/readyz")
        assert status == 503 and body["status"] == "not ready"
        assert found(app, "/v1/latest/prices/a")["record"]["value"]["cents"] == 1, "it answers from what it has"
    assert address


def test_the_unix_socket(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW)
    path = app.directory / "app" / "http.sock"
    with app.running():
        wait_for(path.exists, "it listens")
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x.example\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert not path.exists()


DYING = """
BROKEN = [True]


@retry_policy(max_attempts=1)
@message_handler("prices")
def handle(price: Price, database: Database):
    if BROKEN and price.cents < 0:
        raise ValueError("below zero")
    SEEN.append(price.code)
"""


def test_dead_records_are_handled_once_more_or_dropped(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW + DYING)
    publish(broker, price("a", -1), ("bad", b"{"), price("b", -2), price("c", 3))
    with app.running() as module:
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("b",), ("c",)])
        app.until("SELECT count(*) FROM _dead", [(3,)])
        publish(broker, price("b", 7))
        app.until("SELECT cents FROM prices WHERE code='b'", [(7,)])
        first = found(app, "/v1/dead?limit=2")
        assert [one["offset"] for one in first["records"]] == [0, 1]
        assert first["records"][0]["reason"] == "ValueError: below zero" and first["records"][1]["value"] == "{"
        rest = found(app, f"/v1/dead?topic=prices&cursor={first['next']}")
        assert [one["offset"] for one in rest["records"]] == [2] and rest["next"] is None
        assert found(app, "/v1/dead?topic=other")["records"] == []

        said = refused(app, "POST", "/v1/dead/prices/0/0/replay", 409)
        assert said == "prices/0 record 0 failed again: ValueError: below zero"
        said = refused(app, "POST", "/v1/dead/prices/0/1/replay", 409)
        assert said.startswith("prices/0 record 1 is given up again: the value is not as expected")
        assert found(app, "/v1/stats")["dead_records"] == 3
        module.BROKEN.clear()
        assert ask(app, "POST", "/v1/dead/prices/0/2/replay")[0] == 200
        assert "b" in module.SEEN and app.read("SELECT cents FROM prices WHERE code='b'") == [(7,)], (
            "what is later stays"
        )
        assert ask(app, "DELETE", "/v1/dead/prices/0/1")[0] == 200
        assert [one["offset"] for one in found(app, "/v1/dead")["records"]] == [0]
        assert found(app, "/v1/stats")["dead_records"] == 1
        assert refused(app, "DELETE", "/v1/dead/prices/0/1", 404) == "there is no dead record prices/0 record 1"
        assert "are numbers" in refused(app, "DELETE", "/v1/dead/prices/0/x", 400)


def test_dead_records_are_not_kept_without_end(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dead_records_module, "MOST_DEAD", 20)
    app = make(VIEW)
    publish(broker, *[("bad", b"{") for _ in range(15)])
    with app.running():
        app.until("SELECT count(*) FROM _dead", [(15,)])
        publish(broker, *[("bad", b"{") for _ in range(10)])
        wait_for(lambda: "more than 20 dead records" in caplog.text, "the log says so")
        wait_for(lambda: found(app, "/v1/stats")["dead_records"] <= 20, "the oldest are gone")
        ((kept, last),) = app.read('SELECT count(*), max("offset") FROM _dead')
        assert kept == found(app, "/v1/stats")["dead_records"] and last == 24


def test_a_topic_is_loaded_again(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW)
    publish(broker, price("a", 1))
    with app.running():
        wait_for(lambda: app.read("SELECT code FROM prices") == [("a",)] and committed(broker) == [1, 0], "it is there")
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        app.until("SELECT generation FROM _generations", [(2,)])
        assert found(app, "/v1/latest/prices/a")["record"]["value"]["cents"] == 1
        said = refused(app, "POST", "/v1/reset", 404, {"topic": "other"})
        assert said == "this application does not read other; it reads prices"


class Events:
    """Listens to changes, until it is closed."""

    def __init__(self, app: App, last_id: str = "") -> None:
        self._connection = http.client.HTTPConnection(*app.service.http_address, timeout=20.0)
        self._connection.request("GET", "/v1/changes/prices", headers={"last-event-id": last_id} if last_id else {})
        self._answer = self._connection.getresponse()
        assert (self._answer.status, self._answer.headers.get_content_type()) == (200, "text/event-stream")

    def next(self) -> dict[str, Any]:
        """The next event; comments are passed over."""
        event: dict[str, Any] = {}
        while True:
            line = self._answer.readline().decode().rstrip("\n")
            if not line and "data" in event:
                return event
            name, _, value = line.partition(": ")
            if name:
                event[name] = json.loads(value) if name == "data" else value

    def close(self) -> None:
        self._connection.close()


def test_changes(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW)
    publish(broker, price("a", 1))
    with app.running():
        app.until("SELECT count(*) FROM prices", [(1,)])
        events = Events(app)
        first = events.next()
        assert (first["event"], first["data"]) == ("reset", {"why": "this is the beginning"})
        publish(broker, price("b", 2))
        second = events.next()
        assert second["event"] == "change"
        assert second["data"] == {"key": "b", "value": {"code": "b", "cents": 2}, "partition": 0, "offset": 1}
        publish(broker, ("a", None))
        third = events.next()
        assert third["data"] == {"key": "a", "value": None, "partition": 0, "offset": 2}
        events.close()
        publish(broker, price("c", 3))
        app.until("SELECT count(*) FROM prices", [(2,)])
        again = Events(app, second["id"])
        assert [again.next()["data"]["key"], again.next()["data"]["key"]] == ["a", "c"]
        wait_for(lambda: committed(broker) == [4, 0], "they are acknowledged")
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        assert again.next()["data"] == {"why": "the topic was loaded again"}
        again.close()
        unknown = Events(app, "00000000-5")
        assert unknown.next()["data"] == {"why": "what came after that event is not kept any more"}
        unknown.close()


def test_a_reader_that_is_too_slow_begins_again(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for it is bounded."""
    monkeypatch.setattr(changes_module, "KEPT_BYTES", 1 << 20)
    monkeypatch.setattr(changes_module, "MOST_LISTENERS", 1)
    app = make(VIEW)
    with app.running():
        events = Events(app)
        assert events.next()["event"] == "reset"
        assert refused(app, "GET", "/v1/changes/prices", 503) == "64 programs listen already"
        publish(broker, price("first", 1))
        assert events.next()["data"]["key"] == "first"
        with broker.producer() as producer:
            for number in range(60_000):
                producer.send("prices", json.dumps(price("x" * 50, number)[1]).encode(), b"%d" % number, partition=0)
        app.until("SELECT count(*) FROM prices", [(60_001,)])
        seen, event = 0, events.next()
        while event["event"] == "change":
            seen, event = seen + 1, events.next()
        assert event["data"] == {"why": "it was read too slowly: changes in between are not kept any more"}
        assert seen < 60_000
        events.close()


FUNCTIONS = (
    VIEW
    + """
import threading

FREE = threading.Event()


class Wanted(msgspec.Struct):
    code: str


@route("GET", "/price/{code}")
def one(code: str, query: Query, currency: str = "EUR") -> Price | None:
    '''A price, in cents.'''
    row = query.row("SELECT code, cents FROM prices WHERE key=?", (code,))
    return Price(f"{row[0]} {currency}", row[1]) if row else None


@route("GET", "/cheap")
def cheap(below: int, query: Query):
    return [code for (code,) in query.rows("SELECT code FROM prices WHERE cents<? ORDER BY code", (below,))]


@route("POST", "/wanted")
def wanted(body: Wanted):
    if body.code == "no":
        raise HttpError(409, "it is not sold")
    if body.code == "broken":
        raise KeyError("secret")


@route("GET", "/text")
def text():
    return "grün"


@route("GET", "/slow")
def slow(query: Query):
    return query.rows("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT count(*) FROM n")


@route("GET", "/wait")
def wait():
    SEEN.append(1)
    FREE.wait(30.0)
    return {}


class Shop:
    @route("GET", "/shop/{name}/open")
    def is_open(self, name: str) -> dict:
        return {"name": name}
"""
)


def test_functions_of_the_application(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(FUNCTIONS)
    publish(broker, price("a", 1), price("b", 20))
    with app.running():
        app.until("SELECT count(*) FROM prices", [(2,)])
        assert found(app, "/price/a") == {"code": "a EUR", "cents": 1}
        assert found(app, "/price/a?currency=CHF") == {"code": "a CHF", "cents": 1}
        assert refused(app, "GET", "/price/x", 404) == "there is no such thing"
        assert found(app, "/cheap?below=10") == ["a"]
        assert refused(app, "GET", "/cheap?below=x", 400) == "below='x': Expected `int`, got `str`"
        assert refused(app, "GET", "/cheap", 400) == "the query has no below"
        assert ask(app, "POST", "/wanted", {"code": "a"})[:2] == (200, {})
        assert refused(app, "POST", "/wanted", 409, {"code": "no"}) == "it is not sold"
        said = refused(app, "POST", "/wanted", 500, {"code": "broken"})
        assert said == "an internal error; see the log of the application"
        assert "missing required field" in refused(app, "POST", "/wanted", 400, {})
        assert ask(app, "GET", "/text")[1:] == ("grün".encode(), "text/plain")
        assert found(app, "/shop/north/open") == {"name": "north"}


def test_what_functions_may_do_wrong(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(
        VIEW
        + """
class Mute(Exception):
    def __str__(self):
        raise ValueError("no text")


@route("GET", "/wrong/{what}")
def wrong(what: str, query: Query):
    if what == "exit":
        raise SystemExit(3)
    if what == "mute":
        raise Mute
    if what == "text":
        return "caf\\udce9"
    if what == "refused":
        raise HttpError(404, "caf\\udce9")
    if what == "status":
        raise HttpError(99999, "no status")
    query.rows("ATTACH 'app.db' AS w")
"""
    )
    with app.running():
        for _ in range(8):
            assert "internal error" in refused(app, "GET", "/wrong/exit", 500)
        for what in ("mute", "status", "attach"):
            assert "internal error" in refused(app, "GET", f"/wrong/{what}", 500)
        assert refused(app, "GET", "/wrong/refused", 404) == "caf?"
        assert ask(app, "GET", "/wrong/text")[1] == b"caf?"


def test_requests_that_are_odd(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW)
    publish(broker, price("a", 1))
    with app.running():
        app.until("SELECT count(*) FROM prices", [(1,)])
        for limit in ("00000111111111", "9" * 5000, "000001" + "9" * 40, "-1"):
            for path in ("/v1/latest/prices", "/v1/dead"):
                assert "between 1 and 1000" in refused(app, "GET", f"{path}?limit={limit}", 400)
        assert refused(app, "POST", "/v1/dead/x/1e3/1/replay", 400).startswith("partition and offset are numbers")
        large = "dGEgMCA5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk"  # an offset of more than 64 bits
        assert found(app, f"/v1/dead?cursor={large}")["records"] == []
        events = Events(app, "0000-" + "9" * 5000)
        assert events.next()["event"] == "reset"
        events.close()
        status, body, kind = ask(app, "HEAD", "/v1/changes/prices")
        assert (status, body, kind) == (200, b"", "text/event-stream")
        assert ask(app, "GET", "/healthz")[0] == 200


def test_a_function_that_never_ends_takes_no_thread_for_good(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgebroker.consumer.service.FUNCTION_SECONDS", 0.2)
    monkeypatch.setattr(queries_module, "MOST_LOST", 6)
    app = make(FUNCTIONS)
    publish(broker, price("a", 1))
    with app.running() as module:
        app.until("SELECT count(*) FROM prices", [(1,)])
        for _ in range(4):
            assert refused(app, "GET", "/wait", 503) == "it took longer than 0.2 s"
        wait_for(lambda: ask(app, "GET", "/price/a")[0] == 200, "others took their places")
        for _ in range(2):
            ask(app, "GET", "/wait")
        wait_for(lambda: app.error is not None, "after many the process starts again")
        assert isinstance(app.error, StuckError)
        module.FREE.set()


def test_a_function_that_takes_too_long(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is answered for in time, its SQL is ended, and others are answered meanwhile; too many are told so."""
    monkeypatch.setattr("edgebroker.consumer.service.FUNCTION_SECONDS", 0.5)
    app = make(FUNCTIONS)
    publish(broker, price("a", 1))
    with app.running() as module:
        app.until("SELECT count(*) FROM prices", [(1,)])
        for _ in range(8):
            assert refused(app, "GET", "/slow", 503) == "it took longer than 0.5 s"
        assert found(app, "/price/a")["cents"] == 1, "no thread is lost"
        monkeypatch.setattr(queries_module, "MOST_WAITING", 4)
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(app, "GET", "/wait")[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(module.SEEN) == 4, "every thread waits")
        assert refused(app, "GET", "/price/a", 503) == "too many requests wait; try again in a moment"
        assert found(app, "/v1/latest/prices/a"), "the kit's own are answered by others"
        for thread in threads:
            thread.join()
        assert answers == [503] * 4
        module.FREE.set()
        wait_for(lambda: ask(app, "GET", "/price/a")[0] == 200, "they are free again")


def test_files_of_a_directory(broker: RunningBroker, make: Callable[[str], App], tmp_path: Path) -> None:
    page = tmp_path / "page"
    (page / "sub").mkdir(parents=True)
    large = bytes(range(256)) * 4096
    for name, data in {"index.html": b"<p>till", "a b.css": b"p {}", "sub/index.html": b"sub", "x.bin": large,
                       ".secret": b"no", "empty.txt": b""}.items():  # fmt: skip
        (page / name).write_bytes(data)
    (tmp_path / "outside").write_text("no")
    (page / "link").symlink_to(tmp_path / "outside")
    (page / "circle").symlink_to("circle")
    os.mkfifo(page / "pipe")
    app = make(FUNCTIONS)
    app.more = {"static_dir": str(page)}
    with app.running():
        for path, data, kind in [
            ("/", b"<p>till", "text/html"), ("/index.html?x=1", b"<p>till", "text/html"),
            ("/a%20b.css", b"p {}", "text/css"), ("/sub/", b"sub", "text/html"), ("/sub", b"sub", "text/html"),
            ("/x.bin", large, "application/octet-stream"), ("/empty.txt", b"", "text/plain"),
        ]:  # fmt: skip
            assert ask(app, "GET", path) == (200, data, kind), path
        for path in ("/.secret", "/sub/../.secret", "/%2e%2e/outside", "/..%2foutside", "/link", "/pipe", "/circle",
                     "/none", "/a%00b", "/" + "x" * 5000):  # fmt: skip
            assert refused(app, "GET", path, 404).startswith("there is no /"), path
        assert refused(app, "POST", "/x.bin", 405).startswith("POST is not allowed for /x.bin")
        assert ask(app, "HEAD", "/x.bin")[0] == 200
        assert ask(app, "GET", "/healthz")[1] == {"status": "running"}
        sockets = [socket.create_connection(app.service.http_address) for _ in range(static_files_module.MOST_OPEN)]
        (page / "huge.bin").write_bytes(bytes(16 << 20))
        for one in sockets:
            one.sendall(b"GET /huge.bin HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        wait_for(lambda: ask(app, "GET", "/")[0] == 503, "so many are sent at a time")
        assert found(app, "/healthz") == {"status": "running"}
        for one in sockets:
            one.close()
        wait_for(lambda: ask(app, "GET", "/")[0] == 200, "those who left make room")
