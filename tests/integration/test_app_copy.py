"""The copy that an application keeps of its topics: as the broker has them, whatever ends, and views built from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.applications import VIEW, App, committed, price, publish
from tests.kit.brokers import RunningBroker, running
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


def test_it_has_the_bytes_of_the_broker(
    broker: RunningBroker, copying: Callable[[str], App], tmp_path: Path
) -> None:
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
        wait_for(lambda: committed(broker) == [3, 3], "they are acknowledged")


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
