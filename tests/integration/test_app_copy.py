"""The copy that an application keeps of its topics: as the broker has them, whatever ends, and views built from it."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import TopicPartition
from edgebroker.consumer.copy import rebuild as rebuild_module
from edgebroker.consumer.copy import segment_copy as copy_module
from edgebroker.consumer.copy.copy_reader import CopyPiece, CopyReader, CopyUnreadableError
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.rest import history as history_module
from tests.kit.applications import VIEW, App, committed, price, publish
from tests.kit.brokers import RunningBroker, running
from tests.kit.trees import Tree, end
from tests.kit.waiting import wait_for

from .test_app_rest import ask, found, refused


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as made:
        made.create("prices", partitions=2)
        yield made


@pytest.fixture
def copying(make: Callable[[str], App]) -> Callable[[str], App]:
    """Applications that keep a copy."""

    def made(text: str) -> App:
        app = make(text)
        app.more = {"copy": "on"}
        return app

    return made


def stored(directory: Path) -> list[bytes]:
    """The bytes of each log of a data directory."""
    return [b"".join(path.read_bytes() for path in sorted(log.glob("*.log"))) for log in sorted(directory.glob("*/*"))]


def copied(app: App) -> list[bytes]:
    return stored(app.path.parent / "copy" / "topics")


def test_it_has_the_bytes_of_the_broker(broker: RunningBroker, copying: Callable[[str], App], tmp_path: Path) -> None:
    app = copying(VIEW)
    publish(broker, *[price(f"c{number}", number) for number in range(50)])
    with app.running():
        app.until("SELECT count(*) FROM prices", [(50,)])
        publish(broker, price("d", 1), ("c1", None))
        publish(broker, price("e", 3), partition=1)
        wait_for(lambda: committed(broker) == [52, 1], "they are acknowledged")
    with app.running():
        publish(broker, price("f", 4), partition=1)
        wait_for(lambda: committed(broker) == [52, 2], "it goes on")
    expected = stored(tmp_path / "data" / "topics")
    assert len(expected) == 2 and copied(app) == expected


COUNTING = """
@on_start
@on_reset
def prepare(database: Database):
    database.execute("CREATE TABLE IF NOT EXISTS sums (code TEXT PRIMARY KEY, sum INTEGER)")


@on_reset
def forget(database: Database):
    database.execute("DELETE FROM sums")


@message_handler("prices")
def count(price: Price, database: Database):
    database.execute("INSERT INTO sums VALUES (?,?) ON CONFLICT (code) DO UPDATE SET sum=sum+excluded.sum",
                     (price.code, price.cents))
"""
SUMS, PRICES = "SELECT * FROM sums ORDER BY code", "SELECT code, cents FROM prices ORDER BY code"


class Away:
    """A broker that cannot be reached."""

    server = "127.0.0.1:9"


def fill(broker: RunningBroker, app: App) -> None:
    """Two partitions of a topic, which the application has and has acknowledged."""
    publish(broker, price("a", 1), price("b", 2), price("a", 5))
    publish(broker, price("c", 3), price("d", 4), ("d", None), partition=1)
    with app.running():
        app.until(PRICES, [("a", 5), ("b", 2), ("c", 3)])
        wait_for(lambda: committed(broker)[:2] == [3, 3], "they are acknowledged")


def test_a_view_is_rebuilt_while_the_broker_is_away(broker: RunningBroker, copying: Callable[[str], App]) -> None:
    app = copying(VIEW)
    fill(broker, app)
    again = copying(VIEW.replace("view=Price", "view=Price, version=2") + COUNTING)
    again.broker = Away()  # type: ignore[assignment]
    with again.running():
        again.until("SELECT version FROM _generations", [(2,)])
        assert again.read(PRICES) == [("a", 5), ("b", 2), ("c", 3)]
        assert again.read(SUMS) == [("a", 6), ("b", 2), ("c", 3), ("d", 4)]
        assert again.read("SELECT topic, loading FROM _state") == [("prices", 0)]
    publish(broker, price("a", 10))
    again.broker = broker
    with again.running():
        again.until(PRICES, [("a", 10), ("b", 2), ("c", 3)])
        again.until(SUMS, [("a", 16), ("b", 2), ("c", 3), ("d", 4)])
        wait_for(lambda: committed(broker) == [4, 3], "they are acknowledged")
        wait_for(lambda: ask(again, "GET", "/readyz")[1]["status"] == "ready", "it is ready")


def test_a_database_that_is_lost_is_built_from_the_copy(broker: RunningBroker, copying: Callable[[str], App]) -> None:
    app = copying(VIEW + COUNTING)
    fill(broker, app)
    for path in app.path.parent.glob("app.db*"):
        path.unlink()
    app.broker = Away()  # type: ignore[assignment]
    with app.running():
        app.until(PRICES, [("a", 5), ("b", 2), ("c", 3)])
        assert app.read(SUMS) == [("a", 6), ("b", 2), ("c", 3), ("d", 4)]
        assert ask(app, "GET", "/readyz")[1]["status"] == "not ready"
    app.broker = broker
    with app.running():
        publish(broker, price("e", 9), partition=1)
        app.until(SUMS, [("a", 6), ("b", 2), ("c", 3), ("d", 4), ("e", 9)])


def test_what_comes_while_it_is_rebuilt(broker: RunningBroker, copying: Callable[[str], App]) -> None:
    """Also of a partition that was empty; the copy goes on, and the switch waits for its time. So do crashes."""
    app = copying(VIEW)
    publish(broker, price("a", 1), price("b", 2))
    with app.running():
        app.until(PRICES, [("a", 1), ("b", 2)])
        wait_for(lambda: committed(broker) == [2, 0], "they are acknowledged")
    again = copying(VIEW.replace("view=Price", "view=Price, version=2") + COUNTING)
    again.more["activate_refresh"] = "command"
    for number in range(3):
        with again.running():
            publish(broker, price("a", 10 + number))
            publish(broker, price(f"c{number}", number), partition=1)
            wait_for(lambda done=number: committed(broker) == [3 + done, 1 + done], "they are loaded")
            assert again.read(PRICES) == [("a", 1), ("b", 2)]
    with again.running():
        wait_for(lambda: ask(again, "POST", "/v1/activate")[0] == 200, "it is loaded")
        again.until(PRICES, [("a", 12), ("b", 2), ("c0", 0), ("c1", 1), ("c2", 2)])
        assert again.read(SUMS) == [("a", 1 + 10 + 11 + 12), ("b", 2), ("c0", 0), ("c1", 1), ("c2", 2)]
        publish(broker, price("c3", 3), partition=1)
        again.until("SELECT count(*) FROM prices", [(6,)])


@pytest.mark.parametrize("lost", [False, True])
def test_a_rebuild_that_is_given_up(broker: RunningBroker, copying: Callable[[str], App], lost: bool) -> None:
    """While it waits for its time: the copy is turned off, or the broker loads the topic itself."""
    app = copying(VIEW + COUNTING)
    fill(broker, app)
    if lost:
        for path in app.path.parent.glob("app.db*"):
            path.unlink()
    again = copying(VIEW.replace("view=Price", "view=Price, version=2") + COUNTING)
    again.more["activate_refresh"] = "command"
    with again.running():
        publish(broker, price("a", 10))
        wait_for(lambda: committed(broker) == [4, 3], "it is loaded")
        if not lost:
            body = {"topic": "prices", "partition": 0}
            assert broker.http("POST", "/v1/groups/prices.till-7/refresh", body)[0] == 200
            publish(broker, price("b", 20), price("e", 5))
            publish(broker, price("f", 6), partition=1)
            wait_for(lambda: committed(broker) == [6, 4], "it is loaded")
            wait_for(lambda: ask(again, "POST", "/v1/activate")[0] == 200, "it is copied")
            again.until(PRICES, [("a", 10), ("b", 20), ("c", 3), ("e", 5), ("f", 6)])
            again.until(SUMS, [("a", 16), ("b", 22), ("c", 3), ("d", 4), ("e", 5), ("f", 6)])
            return
    again.more = {"copy": "off"}
    with again.running():
        publish(broker, price("b", 20))
        again.until(PRICES, [("a", 10), ("b", 20), ("c", 3)])
        again.until(SUMS, [("a", 16), ("b", 22), ("c", 3), ("d", 4)])
        again.until("SELECT loading FROM _state", [(0,)])
        assert again.read("SELECT version FROM _generations") == [(2,)]


def test_a_topic_that_is_made_again_while_it_is_rebuilt(broker: RunningBroker, copying: Callable[[str], App]) -> None:
    app = copying(VIEW)
    fill(broker, app)
    again = copying(VIEW.replace("view=Price", "view=Price, version=2") + COUNTING)
    again.more["activate_refresh"] = "command"
    with again.running():
        publish(broker, price("a", 10))
        wait_for(lambda: committed(broker) == [4, 3], "it is loaded")
        assert broker.http("DELETE", "/v1/topics/prices?confirm=prices")[0] == 200
        new = {"name": "prices", "partitions": 2}
        wait_for(lambda: broker.http("POST", "/v1/topics", new)[0] == 201, "its name is free")
        publish(broker, price("x", 24), price("z", 26))
        publish(broker, price("y", 25), partition=1)
        wait_for(lambda: committed(broker) == [2, 1], "they are loaded")
        wait_for(lambda: ask(again, "POST", "/v1/activate")[0] == 200, "it is copied")
        again.until(PRICES, [("x", 24), ("y", 25), ("z", 26)])
        again.until(SUMS, [("x", 24), ("y", 25), ("z", 26)])


class Traffic(threading.Thread):
    """Publishes one record after the other until it is stopped; `count` are those that were acknowledged."""

    def __init__(self, broker: RunningBroker, topic: str) -> None:
        super().__init__()
        self._broker, self._topic, self._over, self.count = broker, topic, threading.Event(), 0

    def run(self) -> None:
        with self._broker.producer() as producer:
            while not self._over.wait(0.005):
                value = json.dumps({"code": "n", "cents": self.count}).encode()
                producer.send(self._topic, value, b"n%d" % self.count, partition=0).result(10.0)
                self.count += 1

    def __enter__(self) -> Traffic:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()


TWO = (
    VIEW
    + """
@consumer("promotions", view=Price)
class Promotions: ...
"""
)


def second_version(text: str) -> str:
    return text.replace("view=Price", "view=Price, version=2")


def test_records_that_keep_coming(broker: RunningBroker, copying: Callable[[str], App]) -> None:
    """A rebuild ends all the same, and what has several consumers is as fast as before."""
    broker.create("promotions")
    app = copying(TWO)
    publish(broker, price("x", 1), topic="promotions")
    fill(broker, app)
    again = copying(second_version(TWO))
    with again.running(), Traffic(broker, "prices") as traffic:
        again.until("SELECT version FROM _generations", [(2,), (2,)])
        reached = traffic.count + 200
        wait_for(lambda: traffic.count >= reached, "more has come")
        wait_for(lambda: again.read("SELECT count(*) FROM prices WHERE code='n'")[0][0] >= reached, "it keeps up", 2.0)


def test_a_rebuild_that_is_given_up_last_holds_up_no_other(
    broker: RunningBroker, copying: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Topics are read on together when nothing is left in the copy: also when the last of them cannot be read there."""
    broker.create("promotions")
    app = copying(TWO)
    publish(broker, price("x", 1), topic="promotions")
    fill(broker, app)
    answer = CopyReader.answer

    def unreadable(reader: CopyReader, inquiry: Any, key: TopicPartition, offset: int, end: int) -> CopyPiece:
        if key.topic == "promotions":
            raise CopyUnreadableError("it is worn out")
        return answer(reader, inquiry, key, offset, end)

    monkeypatch.setattr(CopyReader, "answer", unreadable)
    monkeypatch.setattr(rebuild_module, "RETRY_SECONDS", 0.001)
    again = copying(second_version(TWO))
    with again.running():
        again.until("SELECT version FROM _generations", [(2,), (2,)])
        publish(broker, price("a", 9))
        publish(broker, price("y", 2), topic="promotions")
        again.until(PRICES, [("a", 9), ("b", 2), ("c", 3)])
        again.until("SELECT code, cents FROM promotions ORDER BY code", [("x", 1), ("y", 2)])


def test_topics_that_change_together_of_which_the_broker_loads_one(
    broker: RunningBroker, copying: Callable[[str], App]
) -> None:
    broker.create("promotions")
    text = TWO.replace('"prices", view=Price', '"prices", view=Price, together=["promotions"]')
    app = copying(text)
    publish(broker, price("x", 1), topic="promotions")
    fill(broker, app)
    again = copying(second_version(text))
    again.more["activate_refresh"] = "command"
    with again.running(), Traffic(broker, "promotions") as traffic:
        wait_for(lambda: committed(broker)[2] > 10, "they are loaded")
        for partition in range(2):
            body = {"topic": "prices", "partition": partition}
            assert broker.http("POST", "/v1/groups/prices.till-7/refresh", body)[0] == 200
        wait_for(lambda: ask(again, "POST", "/v1/activate")[0] == 200, "it is copied")
        again.until("SELECT version FROM _generations", [(2,), (2,)])
        reached = traffic.count + 50
        wait_for(lambda: traffic.count >= reached, "more has come")
    with again.running():
        again.until("SELECT count(*) FROM promotions", [(traffic.count + 1,)])
        again.until(PRICES, [("a", 5), ("b", 2), ("c", 3)])


def test_what_has_outlived_its_time(tmp_path: Path) -> None:
    """It is in the copy, and nowhere else; a rebuild does not wait for it when it is the last."""
    with running(tmp_path / "data", {"storage.engine": "memory"}) as broker:
        broker.create("prices")
        publish(broker, price("a", 1), price("b", 2))
        app = App(broker, tmp_path / "application", VIEW)
        app.more = {"copy": "on"}
        publish_briefly(broker, 999)
        with app.running():
            app.until(PRICES, [("a", 1), ("b", 2)])
            wait_for(lambda: committed(broker) == [3], "they are acknowledged")
            assert len(found(app, "/v1/messages?topic=prices")["records"]) == 3
        again = App(broker, tmp_path / "application", second_version(VIEW))
        again.more = {"copy": "on"}
        publish_briefly(broker, 998)
        with again.running():
            again.until("SELECT version FROM _generations", [(2,)])
            assert again.read(PRICES) == [("a", 1), ("b", 2)]
            wait_for(lambda: ask(again, "GET", "/readyz")[1]["status"] == "ready", "it is ready")


def publish_briefly(broker: RunningBroker, cents: int) -> None:
    """A record that has outlived its time when this returns."""
    with broker.producer() as producer:
        value = b'{"code":"a","cents":%d}' % cents
        producer.send("prices", value, b"a", partition=0, headers=[("eb-ttl-ms", b"1")]).result(10.0)
    broker.advance(1.0)


def test_how_often_it_is_synced(
    broker: RunningBroker, copying: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a second, also while the copy is a little behind."""
    syncs, sync = [0], AppDatabase.sync

    def counted(database: AppDatabase) -> None:
        syncs[0] += 1
        sync(database)

    app = copying(VIEW)
    with app.running(), Traffic(broker, "prices") as traffic:
        wait_for(lambda: traffic.count > 10, "it has begun")
        monkeypatch.setattr(AppDatabase, "sync", counted)
        clock = SystemClock()
        began, before = clock.monotonic(), committed(broker)[0]
        wait_for(lambda: committed(broker)[0] > before + 200, "they are acknowledged", 20.0)
        assert syncs[0] <= 3 * (clock.monotonic() - began) + 3


def test_a_copy_that_is_behind(broker: RunningBroker, copying: Callable[[str], App], tmp_path: Path) -> None:
    """After a power cut it may lack what the database has: that comes again, and has no second effect."""
    app = copying(VIEW + COUNTING)
    copy, older = app.path.parent / "copy", tmp_path / "older"
    fill(broker, app)
    shutil.copytree(copy, older)
    publish(broker, *[price("a", 1) for _ in range(20)])
    with app.running():
        app.until(SUMS, [("a", 26), ("b", 2), ("c", 3), ("d", 4)])
    shutil.rmtree(copy)
    shutil.move(older, copy)
    publish(broker, price("a", 100))
    with app.running():
        app.until(SUMS, [("a", 126), ("b", 2), ("c", 3), ("d", 4)])
        wait_for(lambda: committed(broker) == [24, 3], "they are acknowledged")
    assert copied(app) == stored(tmp_path / "data" / "topics")


def test_a_copy_that_is_not_whole_builds_nothing(broker: RunningBroker, copying: Callable[[str], App]) -> None:
    app = copying(VIEW)
    app.more = {"copy": "off"}
    fill(broker, app)
    app.more = {"copy": "on"}
    with app.running():
        publish(broker, price("a", 7))
        app.until(PRICES, [("a", 7), ("b", 2), ("c", 3)])
        wait_for(lambda: committed(broker) == [4, 3], "they are acknowledged")
    again = copying(VIEW.replace("view=Price", "view=Price, version=2"))
    with again.running():
        again.until("SELECT version FROM _generations", [(2,)])
        again.until(PRICES, [("a", 7), ("b", 2), ("c", 3)])
    # The refresh began at the beginning, so the copy has all of it now.
    third = copying(VIEW.replace("view=Price", "view=Price, version=3"))
    third.broker = Away()  # type: ignore[assignment]
    with third.running():
        third.until("SELECT version FROM _generations", [(3,)])
        third.until(PRICES, [("a", 7), ("b", 2), ("c", 3)])


def test_a_topic_that_is_made_again(broker: RunningBroker, copying: Callable[[str], App], tmp_path: Path) -> None:
    app = copying(VIEW)
    fill(broker, app)
    with app.running():
        assert broker.http("DELETE", "/v1/topics/prices?confirm=prices")[0] == 200
        new = {"name": "prices", "partitions": 2}
        wait_for(lambda: broker.http("POST", "/v1/topics", new)[0] == 201, "its name is free")
        publish(broker, price("x", 24), price("z", 26))
        publish(broker, price("y", 25), partition=1)
        app.until(PRICES, [("x", 24), ("y", 25), ("z", 26)])
        wait_for(lambda: committed(broker) == [2, 1], "they are acknowledged")
    assert copied(app) == stored(tmp_path / "data" / "topics")
    again = copying(VIEW.replace("view=Price", "view=Price, version=2"))
    again.broker = Away()  # type: ignore[assignment]
    with again.running():
        again.until("SELECT version FROM _generations", [(2,)])
        again.until(PRICES, [("x", 24), ("y", 25), ("z", 26)])


# ---- what it answers ----


def offsets(page: Any) -> list[tuple[int, int]]:
    return [(one["partition"], one["offset"]) for one in page["records"]]


def test_messages(broker: RunningBroker, copying: Callable[[str], App], monkeypatch: pytest.MonkeyPatch) -> None:
    app = copying(VIEW)
    with broker.producer() as producer:
        for number in range(6):
            value = b"\xff" if number == 5 else str(number).encode()
            headers = [("h", b"\x01")] if number == 1 else []
            producer.send("prices", value, f"k{number % 2}".encode(), partition=0, timestamp=1000 + number,
                          headers=headers).result(10.0)  # fmt: skip
        producer.send("prices", None, b"gone", partition=1, timestamp=5000).result(10.0)
    with app.running():
        wait_for(lambda: committed(broker) == [6, 1], "they are acknowledged")
        everything = [(0, offset) for offset in range(6)] + [(1, 0)]
        page = found(app, "/v1/messages?topic=prices")
        assert offsets(page) == everything and page["next"] is None and page["missing"] == []
        assert page["as_of"]["offsets"] == {"0": 6, "1": 1}
        assert page["records"][1] == {
            "partition": 0, "offset": 1, "timestamp": 1001, "key": "k1", "value": "1", "headers": [["h", "AQ=="]],
            "key_bytes": None, "value_bytes": None,
        }  # fmt: skip
        assert (page["records"][5]["value"], page["records"][5]["value_bytes"]) == (None, "/w==")
        assert (page["records"][6]["key"], page["records"][6]["value"]) == ("gone", None)
        for query, expected in {
            "partition=1": everything[6:],
            "partition=0&from=2&to=4": everything[2:4],
            "from=1": everything[1:6],
            "from_time=1002&to_time=1004": everything[2:4],
            "from_time=1970-01-01T00:00:01.004Z": everything[4:],
            "to_time=1970-01-01T00:00:01.001%2B00:00": everything[:1],
            "key=k1": [(0, 1), (0, 3), (0, 5)],
            "key=none": [],
            "from_time=99999999": [],
            "partition=7": [],
        }.items():
            assert offsets(found(app, f"/v1/messages?topic=prices&{query}")) == expected, query
        seen, path = [], "/v1/messages?topic=prices&limit=2"
        page = found(app, path)
        while page["next"] is not None:
            seen += offsets(page)
            page = found(app, f"{path}&cursor={page['next']}")
        assert seen + offsets(page) == everything
        status, body, kind = ask(app, "GET", "/v1/messages?topic=prices&format=ndjson&limit=3")
        assert (status, kind) == (200, "application/x-ndjson")
        assert [json.loads(line)["offset"] for line in body.splitlines()] == [0, 1, 2]
        # So much is searched for a page, and it goes on behind it.
        monkeypatch.setattr(history_module, "MOST_SEARCHED_BYTES", 1)
        page = found(app, "/v1/messages?topic=prices&key=gone")
        assert page["records"] == [] and page["next"] is not None
        assert offsets(found(app, f"/v1/messages?topic=prices&key=gone&cursor={page['next']}")) == [(1, 0)]


def test_what_is_asked_wrongly(
    broker: RunningBroker, copying: Callable[[str], App], make: Callable[[str], App]
) -> None:
    app = copying(VIEW)
    with app.running():
        for query, why in {
            "": "which topic? /v1/messages?topic=NAME",
            "topic=other": "this application has no copy of other; it has copies of prices",
            "topic=prices&from=x": "from='x': Expected `int`, got `str`",
            "topic=prices&partition=-1": "partition='-1': Expected `int` >= 0",
            "topic=prices&limit=1001": "limit='1001': Expected `int` <= 1000",
            "topic=prices&offset=1": "there is no offset; a query has topic, partition, from, to, from_time, to_time, "
            "key, limit, cursor, format",
            "topic=prices&from_time=noon": "from_time='noon': milliseconds since 1970, or a time as "
            "2026-11-30T12:00:00Z",
            "topic=prices&cursor=zzz": "this is not a cursor of a page; begin without one",
            "topic=prices&cursor=dGEgYg": "this is not a cursor of a page; begin without one",
        }.items():
            said = refused(app, "GET", f"/v1/messages?{query}", 404 if "other" in query else 400)
            assert said == why
        assert refused(app, "GET", "/v1/segments?cursor=dGEgYg", 400).startswith("this is not a cursor")
    app.more = {"copy": "off"}
    with app.running():
        for path in ("messages?topic=prices", "segments"):
            assert refused(app, "GET", f"/v1/{path}", 409).startswith("this application keeps no copy of topics")


def test_segments(broker: RunningBroker, copying: Callable[[str], App], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module, "SEGMENTS", 1 << 24)  # so each has 64 bytes
    app = copying(VIEW)
    publish(broker, *[price(f"c{number}", number) for number in range(5)])
    publish(broker, price("d", 1), partition=1)
    with app.running():
        wait_for(lambda: committed(broker) == [5, 1], "they are acknowledged")
        publish(broker, price("e", 1))
        wait_for(lambda: committed(broker) == [6, 1], "it is acknowledged")
        page = found(app, "/v1/segments")
        rows = [(one["topic"], one["partition"], one["first"], one["sealed"]) for one in page["segments"]]
        assert rows == [("prices", 0, 0, True), ("prices", 0, 5, False), ("prices", 1, 0, False)]
        sizes = [path.stat().st_size for path in sorted((app.path.parent / "copy/topics/prices.0/0").glob("*.log"))]
        assert [one["bytes"] for one in page["segments"][:2]] == sizes
        first = found(app, "/v1/segments?limit=1&topic=prices")
        second = found(app, f"/v1/segments?limit=1&topic=prices&cursor={first['next']}")
        third = found(app, f"/v1/segments?limit=1&topic=prices&cursor={second['next']}")
        assert first["segments"] + second["segments"] + third["segments"] == page["segments"]
        assert third["next"] is None


# ---- when it cannot be written ----


def test_a_full_disk_in_the_copy(
    broker: RunningBroker, copying: Callable[[str], App], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Readers see what comes, nothing is acknowledged that the copy lacks, and it goes on."""
    monkeypatch.setattr(copy_module, "RETRY_SECONDS", 0.01)
    app = copying(VIEW)
    with app.running():
        engine = app.service._copy._engine  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr(engine, "refusal", lambda *, spare=False: (Outcome.DISK_FULL, "it is full"))
            publish(broker, price("a", 1), price("b", 2))
            app.until(PRICES, [("a", 1), ("b", 2)])
            assert found(app, "/v1/stats")["copy"]["backlog_bytes"] > 0
            assert committed(broker) == [0, 0]
        wait_for(lambda: committed(broker) == [2, 0], "they are acknowledged")
    assert copied(app) == stored(tmp_path / "data" / "topics")[:1]


def test_one_that_cannot_be_written(
    broker: RunningBroker, copying: Callable[[str], App], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The application goes on without it, and with it after the next start."""
    app = copying(VIEW)
    with monkeypatch.context() as patch, app.running():
        publish(broker, price("a", 1))
        wait_for(lambda: committed(broker) == [1, 0], "it is acknowledged")
        engine = app.service._copy._engine  # type: ignore[union-attr]
        patch.setattr(engine, "refusal", lambda *, spare=False: (Outcome.READ_ONLY, "it is worn out"))
        publish(broker, price("b", 2))
        wait_for(lambda: committed(broker) == [2, 0], "it is acknowledged all the same")
        assert found(app, "/v1/stats")["copy"]["problem"] == "it is worn out"
        assert b"edgebroker_app_copy_up 0.0" in ask(app, "GET", "/metrics")[1]
        assert offsets(found(app, "/v1/messages?topic=prices")) == [(0, 0)]
    with app.running():
        publish(broker, price("c", 3))
        wait_for(lambda: committed(broker) == [3, 0], "it is acknowledged")
        page = found(app, "/v1/messages?topic=prices")
        assert offsets(page) == [(0, 0), (0, 1), (0, 2)] or page["missing"] == [{"partition": 0, "first": 1, "next": 2}]


def test_one_that_cannot_be_opened(
    broker: RunningBroker, copying: Callable[[str], App], caplog: pytest.LogCaptureFixture
) -> None:
    app = copying(VIEW)
    app.path.parent.mkdir(parents=True)
    (app.path.parent / "copy").write_text("in the way")
    with app.running():
        publish(broker, price("a", 1))
        app.until(PRICES, [("a", 1)])
        assert "the copy of topics cannot be opened: " in caplog.text
        assert found(app, "/v1/stats")["copy"] is None


# ---- one file, three ways ----

EVERYTHING = """
@consumer("prices", view=Price, version=VERSION)
class Prices:
    @message_handler(key="c1*")
    @retry_policy(max_attempts=2, backoff=0.0, then="dead_letter")
    def some(self, price: Price | None, context: Context, database: Database):
        if price is not None and price.cents % 13 == 0:
            raise ValueError("not this one")
        database.execute("INSERT INTO seen VALUES (?,?,?)", (context.record.partition, context.record.offset,
                                                            price.cents if price is not None else None))


@message_handler("prices", key="c2*", batch=7)
def sums(prices: list[Price], database: Database):
    for price in prices:
        database.execute("INSERT INTO sums VALUES (?,1,?) ON CONFLICT (code) DO UPDATE SET count=count+1,"
                         " sum=sum+excluded.sum", (price.code, price.cents))


@on_start
def prepare(database: Database):
    database.execute("CREATE TABLE IF NOT EXISTS seen (part INTEGER, place INTEGER, cents INTEGER)")
    database.execute("CREATE TABLE IF NOT EXISTS sums (code TEXT PRIMARY KEY, count INTEGER, sum INTEGER)")


@on_reset
def forget(database: Database):
    database.execute("DELETE FROM seen")
    database.execute("DELETE FROM sums")
"""
TABLES = (
    "SELECT key, code, cents, _partition, _offset FROM prices ORDER BY key",
    "SELECT part, place, cents FROM seen ORDER BY part, rowid",
    "SELECT * FROM sums ORDER BY code",
    'SELECT partition, "offset", reason FROM _dead ORDER BY partition, "offset"',
    "SELECT * FROM _position ORDER BY partition",
)


@pytest.mark.parametrize("seed", range(3))
def test_live_loaded_again_and_rebuilt_are_the_same(
    broker: RunningBroker, copying: Callable[[str], App], seed: int
) -> None:
    rng = random.Random(seed)
    app = copying(EVERYTHING.replace("VERSION", "1"))
    rows: dict[int, list[tuple[str, object]]] = {0: [], 1: []}
    for number in range(rng.randrange(100, 300)):
        code, what = f"c{rng.randrange(40)}", rng.random()
        value: object = None if what < 0.15 else b"{" if what < 0.2 else {"code": code, "cents": number}
        rows[number % 2].append((code, value))
    ends = [len(rows[0]), len(rows[1])]

    def tables() -> list[object]:
        return [app.read(sql) for sql in TABLES]

    with app.running():
        for partition, its in rows.items():
            publish(broker, *its, partition=partition)
        wait_for(lambda: committed(broker) == ends, "they are acknowledged")
        live = tables()
        assert all(live), "there are some of each"
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        app.until("SELECT generation, loading FROM _state", [(2, 0)])
        assert tables() == live, "loaded again"
    app = copying(EVERYTHING.replace("VERSION", "2"))
    app.broker = Away()  # type: ignore[assignment]
    with app.running():
        app.until("SELECT version, loading FROM _generations JOIN _state USING (topic)", [(2, 0)])
        assert tables() == live, "rebuilt"
    for path in app.path.parent.glob("app.db*"):
        path.unlink()
    with app.running():
        app.until("SELECT generation, loading FROM _state", [(2, 0)])
        assert tables() == live, "after it was lost"


# ---- several brokers ----


def test_a_broker_that_is_behind_takes_over(tmp_path: Path) -> None:
    """What the application has stays, and nothing of what comes later has an effect twice or is missing."""
    tree, text = Tree(tmp_path / "tree"), VIEW + COUNTING
    try:
        root = tree.start("root")
        root.create("prices")
        hub = tree.start("l2", "root")
        first, second = root.server, hub.server
        app = App(root, tmp_path / "application", text)
        app.broker = SimpleNamespace(server=f"{first},{second}")  # type: ignore[assignment]
        app.more = {"copy": "on"}
        count = "SELECT count(*), (SELECT sum(sum) FROM sums) FROM prices"
        with app.running():
            publish(root, *[price(f"c{number}", 1) for number in range(20)])
            app.until(count, [(20, 20)])
            wait_for(lambda: end(hub, "prices") == 20, "the hub has it")
            tree.stop("l2")
            publish(root, *[price(f"c{number}", 1) for number in range(20, 30)])
            app.until(count, [(30, 30)])
            tree.stop("root")
            hub = tree.start("l2", "root", listen__tcp=second)
            wait_for(lambda: hub.call(lambda: list(hub.broker.sessions)), "it is at the hub", 20.0)
            assert app.read(count) == [(30, 30)]
            root = tree.start("root", listen__tcp=first)
            publish(root, *[price(f"c{number}", 1) for number in range(25, 40)])
            wait_for(lambda: app.read(count) == [(40, 45)], "all of it is there, once", 20.0)
    finally:
        tree.close()
