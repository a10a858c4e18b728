"""Topics that are loaded again by a running application: with other columns, together, at their time, beside others."""

from __future__ import annotations

import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.client.consumer import Consumer
from edgebroker.client.refresh import Refresh
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.consumer import instance as instance_module
from edgebroker.consumer import reloads as reloads_module
from edgebroker.consumer.handling.effect import portions_of
from edgebroker.consumer.staging_file import StagingFile
from tests.kit.applications import VIEW, App, committed, price, publish
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for

from .test_app_rest import ask, found, refused


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as made:
        made.create("prices", partitions=2)
        made.create("promotions")
        yield made


def test_another_version_is_built_beside_the_one_before(broker: RunningBroker, make: Callable[[str], App]) -> None:
    publish(broker, price("a", 1), price("b", 2))
    publish(broker, price("c", 3), partition=1)
    app = make(VIEW)
    with app.running():
        app.until("SELECT code, cents FROM prices ORDER BY code", [("a", 1), ("b", 2), ("c", 3)])
        wait_for(lambda: committed(broker) == [2, 1], "they are acknowledged")
    other = make("""
class Euro(msgspec.Struct):
    cents: int
    currency: str = "EUR"


@consumer("prices", view=Euro)
class Prices: ...
""")
    other.more = {"activate_refresh": "command"}
    with other.running():
        said = refused(other, "GET", "/v1/latest/prices/a", 503)
        assert said == "the view of prices has other columns; it is being loaded for these"
        assert other.read("SELECT code, cents FROM prices WHERE key='a'") == [("a", 1)]
        wait_for(lambda: ask(other, "POST", "/v1/activate")[0] == 200, "it is loaded")
        other.until("SELECT cents, currency FROM prices ORDER BY cents", [(1, "EUR"), (2, "EUR"), (3, "EUR")])
        assert found(other, "/v1/latest/prices/a")["record"]["value"] == {"cents": 1, "currency": "EUR"}
        wait_for(lambda: ask(other, "GET", "/readyz")[1]["status"] == "ready", "it is ready")
    again = make(
        VIEW.replace("view=Price", "view=Price, version=2")
        + """
@on_start
@on_reset
def prepare(database: Database):
    database.execute("CREATE TABLE IF NOT EXISTS sums (code TEXT PRIMARY KEY, sum INTEGER)")
    database.execute("DELETE FROM sums")


@message_handler("prices")
def count(price: Price, database: Database):
    database.execute("INSERT INTO sums VALUES (?,?) ON CONFLICT (code) DO UPDATE SET sum=sum+excluded.sum",
                     (price.code, price.cents))
"""
    )
    publish(broker, price("a", 7))
    with again.running():
        again.until("SELECT code, cents FROM prices ORDER BY code", [("a", 7), ("b", 2), ("c", 3)])
        again.until("SELECT * FROM sums ORDER BY code", [("a", 8), ("b", 2), ("c", 3)])
        assert again.read("SELECT version FROM _generations") == [(2,)]


def test_a_view_of_another_version_stays_until_it_is_loaded(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are those of its positions, also when the process ends before the broker begins."""
    app = make(VIEW)
    publish(broker, price("a", 1))
    with app.running():
        app.until("SELECT code, cents FROM prices", [("a", 1)])
        wait_for(lambda: committed(broker) == [1, 0], "it is acknowledged")
    other, received = make(VIEW.replace("view=Price", "view=Price, version=2")), list[Record]()
    with monkeypatch.context() as patch:
        patch.setattr(reloads_module.Reloads, "ask", lambda self: None)
        patch.setattr(instance_module, "portions_of", lambda records: received.extend(records) or portions_of(records))
        with other.running():
            publish(broker, price("a", 2), price("b", 3))
            wait_for(lambda: len(received) == 2, "they are there")
            publish(broker, price("c", 4))
            wait_for(lambda: len(received) == 3, "it is polled again")
            assert other.read("SELECT next_offset FROM _position WHERE partition=0") == [(1,)]
            assert other.read("SELECT code, cents FROM prices") == [("a", 1)]
    with other.running():
        other.until("SELECT code, cents FROM prices ORDER BY code", [("a", 2), ("b", 3), ("c", 4)])
        wait_for(lambda: committed(broker) == [4, 0], "they are acknowledged")


TWO = (
    VIEW.replace('"prices", view=Price', '"prices", view=Price, together=["promotions"]')
    + """
@consumer("promotions", view=Price)
class Promotions: ...
"""
)


def test_topics_together_and_by_command(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(TWO)
    app.more = {"activate_refresh": "command"}
    publish(broker, price("a", 1))
    publish(broker, price("x", 1), topic="promotions")
    both = "SELECT (SELECT group_concat(cents) FROM prices), (SELECT group_concat(cents) FROM promotions)"
    with app.running():
        app.until(both, [("1", "1")])
        wait_for(lambda: committed(broker) == [1, 0, 1], "they are acknowledged")
        said = refused(app, "POST", "/v1/activate", 409)
        assert said == "nothing is loaded that waits to be shown"
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        wait_for(lambda: all(one["loading"] for one in partitions(app)), "one topic brings the other")
        publish(broker, price("b", 2))
        publish(broker, price("y", 2), topic="promotions")
        wait_for(lambda: committed(broker) == [2, 0, 2], "what comes meanwhile is loaded, too")
        assert app.read(both) == [("1", "1")]
        state = "SELECT topic, generation, loading, ready FROM _state ORDER BY topic"
        assert app.read(state) == [("prices", 1, 1, 1), ("promotions", 1, 1, 1)]
        wait_for(lambda: ask(app, "POST", "/v1/activate")[0] == 200, "it is loaded")
        app.until(both, [("1,2", "1,2")])
        assert app.read(state) == [("prices", 2, 0, 1), ("promotions", 2, 0, 1)]
    with app.running():
        app.until("SELECT sum(generation) FROM _generations", [(4,)])


def partitions(app: App) -> list[Any]:
    return [one for topic in found(app, "/v1/stats")["topics"] for one in topic["partitions"]]


def test_readers_are_told_how_current_it_is(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it is shown: what waits for its hour does not count."""
    monkeypatch.setattr(instance_module, "AS_OF_SECONDS", 0.0)
    state = "SELECT ready, as_of_ms FROM _state"
    app, clock = make(VIEW), SystemClock()
    app.more = {"activate_refresh": "command"}
    publish(broker, price("a", 1))
    began = clock.wall_ms()
    with app.running():
        wait_for(lambda: app.read(state)[:1] and app.read(state)[0][0] == 1, "it is complete")
        ((_, first),) = app.read(state)
        assert began - 10 <= first <= clock.wall_ms()
        wait_for(lambda: app.read(state)[0][1] > first, "it goes on")
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        wait_for(lambda: app.read("SELECT loading FROM _state") == [(1,)], "it is loaded")
        ((_, before),), age = app.read(state), app.service._age_ms("prices")
        wait_for(lambda: (app.service._age_ms("prices") or 0) > (age or 0) + 1500, "it grows older")
        assert app.read(state) == [(1, before)]
        wait_for(lambda: ask(app, "POST", "/v1/activate")[0] == 200, "it is loaded")
        wait_for(lambda: app.read(state)[0][1] > before, "it is current again")


def test_within_hours(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    second = [12 * 3600.0]
    monkeypatch.setattr(reloads_module, "second_of_day", lambda wall_ms: second[0])
    caplog.set_level("INFO")
    app = make(VIEW)
    app.more = {"activate_refresh": "22:00-04:00"}
    publish(broker, price("a", 1))
    with app.running():
        app.until("SELECT code FROM prices", [("a",)])
        wait_for(lambda: committed(broker) == [1, 0], "it is acknowledged")
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        wait_for(lambda: "prices: loaded; readers see it when it is time" in caplog.text, "it waits")
        assert app.read("SELECT generation FROM _generations") == [(1,)]
        second[0] = 23 * 3600.0
        app.until("SELECT generation FROM _generations", [(2,)])


def test_a_full_disk_while_it_is_loaded(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is served from what is there, and goes on."""
    monkeypatch.setattr(instance_module, "RETRY_SECONDS", 0.01)
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    app = make(VIEW)
    publish(broker, *[price(f"c{number}", number) for number in range(50)])
    with app.running():
        app.until("SELECT count(*) FROM prices", [(50,)])
        wait_for(lambda: committed(broker) == [50, 0], "they are acknowledged")
        for name in ("begin", "put", "sort"):
            left, really = [2], getattr(StagingFile, name)

            def sometimes(self: StagingFile, *arguments: Any, left: Any = left, really: Any = really) -> Any:
                if left[0]:
                    left[0] -= 1
                    raise full
                return really(self, *arguments)

            monkeypatch.setattr(StagingFile, name, sometimes)
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        app.until("SELECT generation FROM _generations", [(2,)])
        assert app.read("SELECT count(*) FROM prices") == [(50,)]
        publish(broker, price("later", 1))
        app.until("SELECT count(*) FROM prices", [(51,)])
    assert app.error is None


def test_poll_returns_while_a_refresh_goes_on(broker: RunningBroker) -> None:
    """A refresh may take minutes: who polls has other things to do meanwhile."""
    publish(broker, *[("k", {"x": 1}) for _ in range(3)])

    class Slow:
        loads = 0

        def begin(self, refresh: Refresh) -> int:
            return refresh.from_offset

        def load(self, refresh: Refresh, records: list[Record]) -> None:
            self.loads += 1
            threading.Event().wait(0.05)

        def switch(self, refresh: Refresh) -> None: ...

    staging = Slow()
    with Consumer(broker.server, ["prices"], "slow", start="earliest", staging=staging, window_records=1) as consumer:
        while not consumer.assignment:
            consumer.poll(0.1)
        consumer.poll(0.5)
        consumer.commit()
        publish(broker, *[("k", {"x": 1}) for _ in range(40)])
        consumer.refresh("prices", 0)
        seen = []
        while staging.loads < 40:
            consumer.poll(0.05)
            seen.append(staging.loads)
    assert len(seen) > 5, seen


@pytest.mark.slow
def test_live_topics_go_on_while_another_is_loaded(broker: RunningBroker, make: Callable[[str], App]) -> None:
    """100,000 keys are loaded again; a record of another topic is seen within a moment all the time."""
    sys.setswitchinterval(0.0005)
    app = make(VIEW + '@consumer("promotions", view=Price)\nclass Promotions: ...\n')
    with broker.producer() as producer:
        for number in range(100_000):
            key = b"%06d" % (number * 7919 % 100_000)
            producer.send("prices", b'{"code":"%b","cents":1}' % key, key, partition=number % 2)
    with app.running():
        wait_for(lambda: app.read("SELECT count(*) FROM prices") == [(100_000,)], "it has them", 60.0)
        wait_for(lambda: committed(broker) == [50_000, 50_000, 0], "they are acknowledged")
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        number = 0
        while app.read("SELECT generation FROM _generations WHERE topic='prices'") == [(1,)]:
            number += 1
            publish(broker, price("x", number), topic="promotions")
            app.until("SELECT cents FROM promotions", [(number,)])
        assert number > 2
        assert app.read("SELECT count(*), sum(cents) FROM prices") == [(100_000, 100_000)]


@pytest.mark.slow
def test_a_topic_that_is_made_again_while_it_is_loaded(broker: RunningBroker, make: Callable[[str], App]) -> None:
    """Three times over: readers and handlers have what is in the last one, once."""
    app = make(
        VIEW
        + """
@on_start
@on_reset
def prepare(database: Database):
    database.execute("CREATE TABLE IF NOT EXISTS seen (p INTEGER, o INTEGER, n INTEGER, PRIMARY KEY (p, o))")
    if SEEN:
        database.execute("DELETE FROM seen")
    SEEN.append(1)


@message_handler("prices")
def count(record: Whole, database: Database):
    database.execute("INSERT INTO seen VALUES (?,?,1) ON CONFLICT (p, o) DO UPDATE SET n=n+1",
                     (record.partition, record.offset))
""".replace("record: Record", "record: Whole").replace(
            "@on_start", "from edgebroker import Record as Whole\n\n\n@on_start"
        )
    )

    def fill(cents: int) -> None:
        with broker.producer() as producer:
            for number in range(4000):
                producer.send("prices", b'{"code":"c","cents":%d}' % cents, b"%d" % number, partition=number % 2)

    fill(0)
    with app.running():
        app.until("SELECT count(*) FROM seen", [(4000,)])
        wait_for(lambda: committed(broker)[:2] == [2000, 2000], "they are acknowledged")
        assert ask(app, "POST", "/v1/reset", {"topic": "prices"})[0] == 200
        for cents in (1, 2, 3):
            assert broker.http("DELETE", "/v1/topics/prices?confirm=prices")[0] == 200
            broker.create("prices", partitions=2)
            fill(cents)
        expected = [(4000, 3, 3)]
        wait_for(lambda: app.read("SELECT count(*), min(cents), max(cents) FROM prices") == expected, "the last", 60.0)
        wait_for(lambda: app.read("SELECT count(*), max(n) FROM seen") == [(4000, 1)], "once each", 30.0)
        wait_for(lambda: committed(broker)[:2] == [2000, 2000], "they are acknowledged", 30.0)
    assert app.error is None
