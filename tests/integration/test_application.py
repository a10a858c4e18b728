"""A running application against a real broker: views, handlers and positions in one transaction, failures in order."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edgebroker.client.consumer import Consumer
from edgebroker.consumer import database as database_module
from edgebroker.consumer import instance as instance_module
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.handling.errors import StoppedError
from edgebroker.consumer.views import Views
from tests.kit.applications import VIEW, App, committed, price, publish
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        found.create("prices", partitions=2)
        yield found


def test_a_view_is_the_latest_of_each_key(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW)
    publish(broker, price("a", 1), price("b", 2), price("a", 3))
    publish(broker, price("c", 4), partition=1)
    with app.running():
        app.until("SELECT code, cents FROM prices ORDER BY code", [("a", 3), ("b", 2), ("c", 4)])
        publish(broker, ("b", None), price("a", 5))
        app.until("SELECT code, cents, _offset FROM prices ORDER BY code", [("a", 5, 4), ("c", 4, 0)])
        app.until("SELECT * FROM _position ORDER BY partition", [("prices", 0, 5), ("prices", 1, 1)])
        wait_for(lambda: committed(broker) == [5, 1], "it is acknowledged behind a sync")
    publish(broker, price("d", 6))
    with app.running():
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("c",), ("d",)])


def test_what_is_given_up_is_told(
    broker: RunningBroker, make: Callable[[str], App], caplog: pytest.LogCaptureFixture
) -> None:
    """At the first, then when they are twice as many: whoever reads the log wonders no longer why nothing is there."""
    app = make(VIEW)
    publish(broker, ("a", {"code": "a", "cents": "1"}))
    told = "; the last is prices/0 record"
    with app.running():
        wait_for(
            lambda: f"dead records: 1{told} 0: the value is not as expected: Expected `int`, got `str`" in caplog.text,
            "told",
        )
        assert "(GET /v1/dead)" in caplog.text
        publish(broker, *[("b", b"{") for _ in range(20)])
        wait_for(lambda: "dead records: 21; the last is" in caplog.text or f"{told} 20" in caplog.text, "told again")
    assert caplog.text.count(told) <= 5


def test_what_cannot_be_in_a_view_is_a_dead_record(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW)
    publish(broker, price("a", 1), ("b", b"{"), ("c", {"code": "c"}), price("d", 1 << 63), price("e", 2))
    with broker.producer() as producer:
        producer.send("prices", b'{"code": "f", "cents": 1}', partition=0).result(10.0)
    with app.running():
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("e",)])
        app.until('SELECT "offset", key FROM _dead', [(1, b"b"), (2, b"c"), (3, b"d"), (5, None)])
        reasons = [reason for (reason,) in app.read("SELECT reason FROM _dead")]
        assert reasons[0].startswith("the value is not as expected: ")
        assert "missing required field `cents`" in reasons[1]
        assert reasons[3] == "a record without a key has no place in a view"


COUNTING = """
@on_start
def prepare(database: Database):
    database.execute("CREATE TABLE IF NOT EXISTS sums (code TEXT PRIMARY KEY, sum INTEGER)")


@retry_policy(max_attempts=3, backoff=0.01, then=THEN)
@message_handler("prices")
def count(price: Price, context: Context, database: Database):
    SEEN.append((price.code, context.attempt))
    if price.cents < 0:
        raise ValueError(f"{price.code} is below zero")
    database.execute("INSERT INTO sums VALUES (?,?) ON CONFLICT (code) DO UPDATE SET sum=sum+excluded.sum",
                     (price.code, price.cents))
"""


def test_a_handler_and_its_position_are_one_transaction(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make("THEN = 'dead_letter'\n" + COUNTING)
    publish(broker, *[price("abc"[n % 3], 1) for n in range(300)])
    for _ in range(3):
        with app.running():
            app.until("SELECT * FROM sums ORDER BY code", [("a", 100), ("b", 100), ("c", 100)])


@pytest.mark.parametrize("then", ["dead_letter", "skip"])
def test_a_record_that_fails_holds_its_partition_only(
    broker: RunningBroker, make: Callable[[str], App], then: str
) -> None:
    app = make(f"THEN = {then!r}\n" + COUNTING)
    publish(broker, price("a", 1), price("bad", -1), price("c", 3))
    publish(broker, price("other", 7), partition=1)
    with app.running() as module:
        app.until("SELECT * FROM sums ORDER BY code", [("a", 1), ("c", 3), ("other", 7)])
        assert [attempt for code, attempt in module.SEEN if code == "bad"] == [1, 2, 3]
        seen = [code for code, _ in module.SEEN if code != "other"]
        assert seen.index("c") > len(seen) - 1 - seen[::-1].index("bad"), "nothing behind it comes before it is done"
        dead = [] if then == "skip" else [(1, 3, "ValueError: bad is below zero")]
        app.until('SELECT "offset", attempts, reason FROM _dead', dead)
        wait_for(lambda: committed(broker) == [3, 1], "the group has passed it")


def test_an_application_that_stops_at_a_failure(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make("THEN = 'stop'\n" + COUNTING)
    publish(broker, price("a", 1), price("bad", -1), price("c", 3))
    with app.running():
        wait_for(lambda: app.error is not None, "it has ended")
    assert isinstance(app.error, StoppedError) and "prices/0 record 1: ValueError: bad is below zero" in str(app.error)
    assert app.read("SELECT * FROM sums") == [("a", 1)]


def test_handlers_by_key_and_header_batches_and_hooks(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make("""
@message_handler("prices", key="a*")
def some(price: Price | None):
    SEEN.append(("some", price and price.cents))


@message_handler("prices", key="b", batch=2)
def several(prices: list[dict]):
    SEEN.append(("several", [price["cents"] for price in prices]))


@every(0.01)
def tick():
    SEEN.append(("tick", 0))


@on_ready
def ready():
    SEEN.append(("ready", 0))
""")
    publish(broker, price("a1", 1), price("b", 2), ("a2", None), price("b", 3), price("b", 4), price("c", 5))
    with app.running() as module:
        wait_for(lambda: ("ready", 0) in module.SEEN and ("tick", 0) in module.SEEN, "it is ready")
        found = [one for one in module.SEEN if one[0] in ("some", "several")]
    assert [one for one in found if one[0] == "some"] == [("some", 1), ("some", None)]
    assert [one for one in found if one[0] == "several"] == [("several", [2, 3]), ("several", [4])]


def test_instances_that_share_a_topic(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make("""
@consumer("prices", scope="shared")
class Prices:
    @message_handler()
    def handle(self, price: Price, database: Database):
        SEEN.append(price.code)
""")
    publish(broker, price("a", 1), price("b", 2))
    with app.running() as module:
        wait_for(lambda: module.SEEN == ["a", "b"], "it has them")
        wait_for(lambda: committed(broker, "prices") == [2, 0], "they are acknowledged")
    assert app.read("SELECT * FROM _position") == []


def test_a_database_that_was_removed_is_filled_again(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(VIEW)
    publish(broker, price("a", 1), price("b", 2))
    with app.running():
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("b",)])
        wait_for(lambda: committed(broker) == [2, 0], "the group has passed them")
    shutil.rmtree(app.directory / "app")
    with app.running():
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("b",)])


@pytest.mark.parametrize("damage", [b"nonsense" * 600, None], ids=["no database", "marked"])
def test_a_damaged_database_is_kept_and_filled_again(
    broker: RunningBroker, make: Callable[[str], App], damage: bytes | None
) -> None:
    app = make(VIEW)
    publish(broker, price("a", 1))
    with app.running():
        app.until("SELECT code FROM prices", [("a",)])
    if damage is None:
        (app.directory / "app" / "DAMAGED").touch()
    else:
        (app.directory / "app" / "app.db").write_bytes(damage)
    with app.running():
        app.until("SELECT code FROM prices", [("a",)])
    names = [one.name for one in (app.directory / "app").iterdir()]
    assert "app.db.corrupt-1" in names and "DAMAGED" not in names


@pytest.mark.parametrize("where", ["view", "handler"])
def test_a_full_disk_is_waited_for(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Nothing is given up, nothing is done twice."""
    app = make(VIEW if where == "view" else "THEN = 'dead_letter'\n" + COUNTING)
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    left, owner, method = [3], *((Views, "put") if where == "view" else (AppDatabase, "execute"))
    really = getattr(owner, method)

    def sometimes(self: object, *arguments: Any) -> Any:
        if left[0] and "CREATE" not in str(arguments[0]):
            left[0] -= 1
            raise full
        return really(self, *arguments)

    monkeypatch.setattr(owner, method, sometimes)
    monkeypatch.setattr(instance_module, "RETRY_SECONDS", 0.01)
    publish(broker, *[price("a", 1) for _ in range(50)])
    with app.running():
        if where == "view":
            app.until("SELECT code, _offset FROM prices", [("a", 49)])
        else:
            app.until("SELECT * FROM sums", [("a", 50)])
    assert not left[0] and app.read("SELECT * FROM _dead") == []


def test_the_broker_is_away_for_a_while(tmp_path: Path) -> None:
    with running(tmp_path / "data") as first:
        settings = {"listen.tcp": first.server}
        first.create("prices")
        publish(first, price("a", 1))
        app = App(first, tmp_path / "application", "THEN = 'dead_letter'\n" + COUNTING)
        started = app.running()
        started.__enter__()
        app.until("SELECT * FROM sums", [("a", 1)])
    with running(tmp_path / "data", settings) as again:
        publish(again, price("a", 1), price("b", 5))
        app.until("SELECT * FROM sums ORDER BY code", [("a", 2), ("b", 5)])
        started.__exit__(None, None, None)


def refresh(broker: RunningBroker, partition: int = -1) -> None:
    status, answer = broker.http(
        "POST", "/v1/groups/prices.till-7/refresh", {"topic": "prices", "partition": partition}
    )
    assert status in (200, 202), answer


@pytest.mark.parametrize("partition", [-1, 1])
def test_a_topic_is_loaded_again_as_a_whole(broker: RunningBroker, make: Callable[[str], App], partition: int) -> None:
    """Readers have the old rows, then the new ones of all partitions; one partition alone brings the others."""
    app = make(VIEW)
    publish(broker, price("a", 1), price("b", 2))
    publish(broker, price("c", 3), partition=1)
    with app.running():
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("b",), ("c",)])
        wait_for(lambda: committed(broker) == [2, 1], "they are acknowledged")
        refresh(broker, partition)
        app.until("SELECT generation FROM _generations", [(2,)])
        assert app.read("SELECT code, cents FROM prices ORDER BY code") == [("a", 1), ("b", 2), ("c", 3)]
        wait_for(lambda: states(broker) == ["ready", "ready"], "the broker knows")
        publish(broker, price("d", 4))
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("b",), ("c",), ("d",)])
    with app.running():
        publish(broker, price("e", 5), partition=1)
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("b",), ("c",), ("d",), ("e",)])
        assert app.read("SELECT generation FROM _generations") == [(2,)]


def states(broker: RunningBroker) -> list[str]:
    found = broker.http("GET", "/v1/groups/prices.till-7")[1]["partitions"]
    return [one["refresh"]["state"] if one["refresh"] else "" for one in found]


def test_a_topic_that_was_made_again(broker: RunningBroker, make: Callable[[str], App]) -> None:
    """What is not in the new one is gone; handlers begin with it from the beginning."""
    app = make(
        VIEW
        + """
@on_start
@on_reset
def prepare(database: Database):
    database.execute("CREATE TABLE IF NOT EXISTS sums (code TEXT PRIMARY KEY, sum INTEGER)")
    database.execute("DELETE FROM sums WHERE ?", (bool(SEEN),))


@message_handler("prices")
def count(price: Price, database: Database):
    SEEN.append(price.code)
    database.execute("INSERT INTO sums VALUES (?,?) ON CONFLICT (code) DO UPDATE SET sum=sum+excluded.sum",
                     (price.code, price.cents))
"""
    )
    publish(broker, price("a", 1), price("b", 2))
    with app.running():
        app.until("SELECT code FROM prices ORDER BY code", [("a",), ("b",)])
        wait_for(lambda: committed(broker) == [2, 0], "they are acknowledged")
        assert broker.http("DELETE", "/v1/topics/prices?confirm=prices")[0] == 200
        broker.create("prices", partitions=2)
        publish(broker, price("b", 7), price("b", 1), price("c", 2))
        app.until("SELECT code, cents FROM prices ORDER BY code", [("b", 1), ("c", 2)])
        app.until("SELECT * FROM sums ORDER BY code", [("b", 8), ("c", 2)])


def test_what_was_received_before_a_shortage_is_not_lost(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """poll() raises when a refresh cannot be stored, perhaps behind records that it returned a moment before."""
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    calls, poll = [0], Consumer.poll

    def sometimes(self: Consumer, timeout: float | None = None) -> list[Any]:
        calls[0] += 1
        if calls[0] % 2 == 0 and calls[0] < 40:
            raise full
        return poll(self, timeout)

    monkeypatch.setattr(Consumer, "poll", sometimes)
    monkeypatch.setattr(instance_module, "RETRY_SECONDS", 0.0)
    app = make("THEN = 'dead_letter'\n" + COUNTING)
    for number in range(20):
        publish(broker, price("a", 1), partition=number % 2)
    with app.running():
        app.until("SELECT * FROM sums", [("a", 20)])


def test_hooks_that_fail(broker: RunningBroker, make: Callable[[str], App], caplog: pytest.LogCaptureFixture) -> None:
    app = make(VIEW + "@every(0.01)\ndef tick(): 1 / 0\n")
    publish(broker, price("a", 1))
    with app.running():
        app.until("SELECT code FROM prices", [("a",)])
        wait_for(lambda: "tick failed: ZeroDivisionError: division by zero" in caplog.text, "the log says so")
    app = make(VIEW + "@on_start\ndef prepare(): 1 / 0\n")
    with app.running():
        wait_for(lambda: app.error is not None, "it does not begin")
    assert str(app.error) == "prepare failed: ZeroDivisionError: division by zero"


def test_a_topic_that_shrank_is_not_shown_unless_it_is_meant(
    broker: RunningBroker, make: Callable[[str], App], caplog: pytest.LogCaptureFixture
) -> None:
    app = make(VIEW)
    counted = "SELECT count(*) FROM prices"
    said = "topic prices: what was loaded again has much fewer rows (1 of 20): it is not shown until it has 18, or"

    def make_again() -> None:
        assert broker.http("DELETE", "/v1/topics/prices?confirm=prices")[0] == 200
        broker.create("prices", partitions=2)
        publish(broker, price("c1", 1))

    publish(broker, *[price(f"c{number}", number) for number in range(20)])
    with app.running():
        app.until(counted, [(20,)])
        wait_for(lambda: committed(broker) == [20, 0], "they are acknowledged")
        make_again()
        wait_for(lambda: said in caplog.text, "it says so")
        assert app.read(counted) == [(20,)]
        # The first 17 come twice: as many records, and not as many rows.
        publish(broker, *[price(f"c{number}", 7) for number in (*range(8), *range(17))])
        wait_for(lambda: waiting(app) == 17, "they are loaded, too")
        assert app.read(counted) == [(20,)]
        publish(broker, price("c17", 7))
        app.until("SELECT count(*), sum(cents) FROM prices", [(18, 18 * 7)])
        wait_for(lambda: committed(broker) == [27, 0], "they are acknowledged")
        caplog.clear()
        publish(broker, price("c18", 7), price("c19", 7))
        make_again()
        wait_for(lambda: said in caplog.text, "it says so")
    with app.running():
        wait_for(lambda: caplog.text.count(said) == 2, "it says so again")
        assert app.read(counted) == [(20,)]
    with app.running(force=True):
        app.until(counted, [(1,)])


def test_a_reader_that_keeps_a_transaction_open(
    broker: RunningBroker, make: Callable[[str], App], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1 << 20
    monkeypatch.setattr(database_module, "WAL_BYTES", limit)
    app = make(VIEW)
    said = "app.db-wal has grown to "
    wal = app.path.with_name("app.db-wal")
    publish(broker, price("a", 1))
    with app.running():
        app.until("SELECT count(*) FROM prices", [(1,)])
        with closing(sqlite3.connect(f"{app.path.as_uri()}?mode=ro", uri=True, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM prices").fetchall() == [(1,)]

            def publish_more() -> bool:
                publish(broker, *[price(f"{number:04d}" + 100 * "x", number) for number in range(500)])
                return said in caplog.text

            wait_for(publish_more, "it says so", 30.0)
            assert wal.stat().st_size > limit
            assert reader.execute("SELECT count(*) FROM prices").fetchall() == [(1,)]
        publish(broker, price("b", 1))
        app.until("SELECT cents FROM prices WHERE code='b'", [(1,)])
        wait_for(lambda: small(broker, wal, limit), "it is small again", 30.0)
    assert caplog.text.count(said) == 1


def small(broker: RunningBroker, wal: Path, limit: int) -> bool:
    publish(broker, price("b", 1))
    return wal.stat().st_size <= limit


def waiting(app: App) -> int:
    """The rows of the generation that is not shown."""
    tables = app.read("SELECT name FROM sqlite_schema WHERE type='table' AND name LIKE '_prices_g%' ORDER BY name")
    counts = [app.read(f'SELECT count(*) FROM "{name}"')[0][0] for (name,) in tables]
    return counts[-1] if len(counts) > 1 else 0
