"""Handlers of a running application: in time or ended, async, with an outbox, shared, and when the process dies."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.client.consumer import Consumer
from edgebroker.consumer.handling import outbox as outbox_module
from edgebroker.consumer.handling.in_hand import NAME as IN_HAND
from edgebroker.consumer.reader import Reader
from edgebroker.consumer.service import StuckError
from tests.kit.applications import HEAD, App, committed, price, publish, read, start
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data", {"topics.auto_create": False}) as found:
        found.create("prices", partitions=2)
        yield found


def dead(app: App) -> list[tuple[object, ...]]:
    return app.read('SELECT "offset", attempts, reason FROM _dead ORDER BY partition, "offset"')


SUMS = """
import threading
import time

FREE = threading.Event()


@on_start
def prepare(database: Database):
    database.execute("CREATE TABLE IF NOT EXISTS sums (code TEXT PRIMARY KEY, sum INTEGER)")


def add(database, price):
    database.execute("INSERT INTO sums VALUES (?,?) ON CONFLICT (code) DO UPDATE SET sum=sum+excluded.sum",
                     (price.code, price.cents))
"""
SLOW_WAYS = {
    "in Python": "while True: pass",
    "and catches everything": """
        try:
            while True: pass
        except Exception:
            pass""",
    "in SQL": """
        database.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT count(*) FROM n")""",
    "in SQL, and goes on": """
        try:
            database.execute(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT count(*) FROM n")
        except Exception:
            pass""",
}


@pytest.mark.parametrize("how", SLOW_WAYS)
def test_a_handler_that_takes_too_long(broker: RunningBroker, make: Callable[[str], App], how: str) -> None:
    app = make(
        SUMS
        + f"""
@retry_policy(max_attempts=2, backoff=0.01)
@message_handler("prices", timeout=0.3)
def handle(price: Price, context: Context, database: Database):
    SEEN.append((price.code, context.attempt))
    assert 0 < context.deadline - time.monotonic() <= 0.3
    context.logger.info("it is its turn")
    add(database, price)
    if price.code == "slow":
        {SLOW_WAYS[how]}
"""
    )
    publish(broker, price("a", 1), price("slow", 2), price("b", 3))
    publish(broker, price("c", 4), partition=1)
    with app.running() as module:
        app.until("SELECT * FROM sums ORDER BY code", [("a", 1), ("b", 3), ("c", 4)])
        assert [attempt for code, attempt in module.SEEN if code == "slow"] == [1, 2]
        assert dead(app) == [(1, 2, "TimeoutError: it took longer than 0.3 s")]
        wait_for(lambda: committed(broker) == [3, 1], "they are acknowledged")
    assert app.error is None


def test_a_wait_that_ends_late(
    broker: RunningBroker, make: Callable[[str], App], caplog: pytest.LogCaptureFixture
) -> None:
    """What waits outside of Python is not woken; when it comes back it has failed."""
    app = make(
        SUMS
        + """
@retry_policy(backoff=0.01)
@message_handler("prices", timeout=2.0)
def handle(price: Price, context: Context, database: Database):
    SEEN.append(context.attempt)
    add(database, price)
    FREE.wait(30.0)
"""
    )
    publish(broker, price("a", 1))
    with app.running() as module:
        wait_for(lambda: "takes longer than 2 s: it is told to end" in caplog.text, "it is told to end")
        module.FREE.set()
        app.until("SELECT * FROM sums", [("a", 1)])
        assert module.SEEN == [1, 2]


def test_a_call_that_nothing_ends(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(
        SUMS
        + """
@message_handler("prices", timeout=0.2)
def handle(price: Price):
    FREE.wait(30.0)
"""
    )
    publish(broker, price("a", 1))
    with app.running() as module:
        wait_for(lambda: app.error is not None, "the process is to start again")
        assert isinstance(app.error, StuckError)
        assert "till_app.py:" in str(app.error) and str(app.error).endswith("does not end: the process starts again")
        module.FREE.set()


def test_an_async_handler(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make(
        SUMS
        + """
import asyncio

BESIDE = []


async def tick():
    while True:
        BESIDE.append(1)
        await asyncio.sleep(0.01)


@retry_policy(max_attempts=2, backoff=0.01)
@message_handler("prices", timeout=0.3)
async def handle(price: Price, database: Database):
    if not SEEN:
        handle.beside = asyncio.create_task(tick())
    SEEN.append(price.code)
    add(database, price)
    await asyncio.sleep(30.0 if price.code == "slow" else 0.001)
    if price.code == "bad":
        raise ValueError("no such price")
"""
    )
    publish(broker, price("a", 1), price("slow", 2), price("b", 3), price("bad", 4), price("c", 5))
    with app.running() as module:
        app.until("SELECT * FROM sums ORDER BY code", [("a", 1), ("b", 3), ("c", 5)])
        assert module.SEEN.count("slow") == module.SEEN.count("bad") == 2 and len(module.BESIDE) > 10
        assert dead(app) == [(1, 2, "TimeoutError: it took longer than 0.3 s"), (3, 2, "ValueError: no such price")]


def test_what_handlers_may_raise_and_return(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make("""
import functools


class Mute(Exception):
    def __str__(self):
        raise ValueError("no text")


def hiding(function):
    @functools.wraps(function)
    def call(*arguments):
        return function(*arguments)
    return call


@retry_policy(max_attempts=1)
@message_handler("prices", key="a")
def mute(price: Price):
    raise Mute


@retry_policy(max_attempts=1)
@message_handler("prices", key="b")
def bytes_of_a_name(price: Price):
    raise ValueError("caf\\udce9")


@retry_policy(max_attempts=1)
@message_handler("prices", key="c")
@hiding
async def hidden(price: Price):
    SEEN.append(price)


@retry_policy(max_attempts=1)
@message_handler("prices", key="d")
def leave(price: Price):
    raise SystemExit(3)
""")
    publish(broker, *[price(code, 1) for code in "abcd"])
    with app.running():
        app.until("SELECT count(*) FROM _dead", [(4,)])
        reasons = [reason for (reason,) in app.read('SELECT reason FROM _dead ORDER BY "offset"')]
        assert reasons[:2] == ["Mute: (it has no text)", "ValueError: caf?"]
        assert reasons[2].startswith("TypeError: it returned something that is still to be run")
        assert reasons[3] == "SystemExit: 3"
    assert app.error is None


def test_a_reset_function_that_fails_ends_it_and_is_called_again(
    broker: RunningBroker, make: Callable[[str], App]
) -> None:
    app = make(
        SUMS
        + """
BROKEN = []


@on_reset
def clear(database: Database):
    database.execute("DELETE FROM sums")
    if BROKEN:
        raise RuntimeError("not now")


@message_handler("prices")
def handle(price: Price, database: Database):
    add(database, price)
"""
    )
    publish(broker, price("a", 1), price("b", 2))
    with app.running() as module:
        app.until("SELECT count(*) FROM sums", [(2,)])
        wait_for(lambda: committed(broker) == [2, 0], "they are acknowledged")
        module.BROKEN.append(1)
        assert broker.http("POST", "/v1/groups/prices.till-7/refresh", {"topic": "prices"})[0] in (200, 202)
        wait_for(lambda: app.error is not None, "it ends")
        assert str(app.error) == "clear failed: RuntimeError: not now; nothing is loaded again"
    app.error = None
    with app.running():
        wait_for(lambda: states(broker) == ["ready", "ready"], "it is loaded")
        assert app.read("SELECT * FROM sums ORDER BY code") == [("a", 1), ("b", 2)]


def states(broker: RunningBroker) -> list[str]:
    found = broker.http("GET", "/v1/groups/prices.till-7")[1]["partitions"]
    return [one["refresh"]["state"] if one["refresh"] else "" for one in found]


def test_what_is_kept_beyond_the_call_is_of_no_use(broker: RunningBroker, make: Callable[[str], App]) -> None:
    """A thread that a handler leaves behind can change nothing, neither now nor later."""
    app = make(
        SUMS
        + """
@message_handler("prices")
def handle(price: Price, database: Database, outbox: Outbox):
    def later():
        for attempt in (lambda: add(database, price), lambda: outbox.send("other", "x")):
            try:
                attempt()
            except Exception as error:
                SEEN.append(str(error))

    for wait in (True, False):
        thread = threading.Thread(target=later)
        thread.start()
        if wait:
            thread.join()
    add(database, price)
"""
    )
    publish(broker, price("a", 1))
    with app.running() as module:
        app.until("SELECT * FROM sums", [("a", 1)])
        wait_for(lambda: len(module.SEEN) == 4, "both threads tried")
        assert set(module.SEEN) == {"what a handler is given can be used in its call only, and in its thread"}
        assert app.read("SELECT * FROM _outbox") == []


def test_the_outbox_is_part_of_the_transaction(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "REFUSED_SECONDS", 0.05)
    app = make(
        SUMS
        + """
@retry_policy(max_attempts=3, backoff=0.01)
@message_handler("prices")
def handle(price: Price, context: Context, outbox: Outbox):
    outbox.send("seen", {"code": price.code, "attempt": context.attempt}, price.code, headers={"kind": "price"})
    outbox.send("later", price.code)
    if price.cents < 0 and context.attempt < 3:
        raise ValueError("not yet")
    if price.code == "large":
        outbox.send("seen", b"x" * (2 << 20))
"""
    )
    broker.create("seen")
    publish(broker, price("a", 1), price("b", -2), price("large", 0), price("c", 3))
    with app.running(), Consumer(broker.server, ["seen", "later"], start="earliest") as consumer:
        found: list[object] = []
        while len(found) < 3:
            for record in consumer.poll(10.0):
                assert record.key is not None and record.headers == (("kind", b"price"),)
                found.append((record.key, json.loads(record.value or b"")["attempt"]))
        assert found == [(b"a", 1), (b"b", 3), (b"c", 1)]
        assert dead(app) == [(2, 3, "ValueError: a record of 2,097,152 bytes cannot be sent; at most 1,000,000")]
        app.until("SELECT topic, value FROM _outbox", [("later", b"a"), ("later", b"b"), ("later", b"c")])
        broker.create("later")
        app.until("SELECT topic, value FROM _outbox", [])
        later: list[object] = []
        while len(later) < 3:
            later += [record.value for record in consumer.poll(10.0)]
        assert later == [b"a", b"b", b"c"]


def test_what_the_outbox_has_is_sent_after_the_next_start(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make("""
@message_handler("prices")
def handle(price: Price, outbox: Outbox):
    outbox.send("seen", price.code)
""")
    publish(broker, price("a", 1), price("b", 2))
    with app.running():
        app.until("SELECT topic, value FROM _outbox", [("seen", b"a"), ("seen", b"b")])
    broker.create("seen")
    with app.running(), Consumer(broker.server, ["seen"], start="earliest") as consumer:
        found: list[object] = []
        while len(found) < 2:
            found += [record.value for record in consumer.poll(10.0)]
        assert found == [b"a", b"b"]
        app.until("SELECT count(*) FROM _outbox", [(0,)])


def test_the_outbox_keeps_the_order_of_a_topic_that_refused(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes after a refused record of its topic waits with it, also once the topic would take it."""
    monkeypatch.setattr(outbox_module, "REFUSED_SECONDS", 1.0)
    app = make("""
@message_handler("prices")
def handle(price: Price, outbox: Outbox):
    outbox.send("later", price.code)
""")
    publish(broker, price("a", 1))
    with app.running(), Consumer(broker.server, ["later"], start="earliest") as consumer:
        wait_for(lambda: "records for topic later wait in the outbox" in caplog.text, "it is refused")
        broker.create("later")
        publish(broker, price("b", 2))
        found: list[object] = []
        while len(found) < 2:
            found += [record.value for record in consumer.poll(10.0)]
        assert found == [b"a", b"b"]


def test_the_outbox_goes_on_when_it_could_not_be_read(
    broker: RunningBroker, make: Callable[[str], App], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, really = [3], Reader.rows

    def sometimes(self: Reader, sql: str, *arguments: Any) -> Any:
        if "_outbox" in sql and left[0]:
            left[0] -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return really(self, sql, *arguments)

    monkeypatch.setattr(Reader, "rows", sometimes)
    app = make("""
@message_handler("prices")
def handle(price: Price, outbox: Outbox):
    outbox.send("seen", price.code)
""")
    broker.create("seen")
    publish(broker, price("a", 1))
    with app.running():
        wait_for(lambda: not left[0], "it could not be read")
        app.until("SELECT count(*) FROM _outbox", [(0,)])


def test_what_instances_share_is_given_up_by_the_broker(broker: RunningBroker, make: Callable[[str], App]) -> None:
    app = make("""
@consumer("prices", scope="shared")
class Prices:
    @retry_policy(max_attempts=2, backoff=0.01)
    @message_handler()
    def handle(self, price: Price):
        SEEN.append(price.code)
        if price.cents < 0:
            raise ValueError("below zero")
""")
    publish(broker, price("a", 1), ("nonsense", b"{"), price("b", 2), price("bad", -1), price("c", 3))
    with app.running() as module:
        wait_for(lambda: module.SEEN[-1:] == ["c"], "it has the last one")
        wait_for(lambda: committed(broker, "prices") == [5, 0], "all are passed")
        assert module.SEEN.count("bad") == 2 and module.SEEN[-1] == "c"
        assert app.read("SELECT * FROM _dead") == []
        assert not read(app.path, "SELECT * FROM _position")
    letters: dict[bytes | None, dict[str, bytes | None]] = {}
    with Consumer(broker.server, ["prices.dlq"], start="earliest") as consumer:
        while len(letters) < 2:
            for record in consumer.poll(10.0):
                letters[record.key] = dict(record.headers)
    reasons = {key: str(headers) for key, headers in letters.items()}
    assert "the value is not as expected" in reasons[b"nonsense"] and "ValueError: below zero" in reasons[b"bad"]


@pytest.mark.slow
def test_a_record_that_ends_the_process(broker: RunningBroker, tmp_path: Path) -> None:
    """It is found by handling one at a time what was in hand, and given up when it has done so twice alone."""
    source = tmp_path / "till.py"
    source.write_text(
        HEAD
        + SUMS
        + """
import os, signal


@message_handler("prices")
def handle(price: Price, database: Database):
    if price.code == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    add(database, price)
"""
    )
    publish(broker, *[price(f"c{number}", 1) for number in range(20)], price("killer", 1), price("last", 1))
    directory = tmp_path / "edgebroker-till"
    for _ in range(3):
        dying = start(source, broker.server)
        dying.communicate(timeout=30.0)
        assert dying.returncode == -signal.SIGKILL
        assert b"prices" in (directory / IN_HAND).read_bytes()
    last = start(source, broker.server)
    try:
        wait_for(lambda: read(directory / "app.db", "SELECT count(*), sum(sum) FROM sums") == [(21, 21)], "all others")
        wait_for(lambda: committed(broker, "till.till-7") == [22, 0], "they are acknowledged")
        found = read(directory / "app.db", 'SELECT "offset", reason FROM _dead')
        assert found == [(20, "the process ended 2 times while it was handled alone")]
    finally:
        last.send_signal(signal.SIGTERM)
        last.communicate(timeout=30.0)
    assert last.returncode == 0
    assert (directory / IN_HAND).read_bytes()[:1] == b"\n"


@pytest.mark.slow
def test_a_thread_that_nothing_ends_starts_the_process_again(broker: RunningBroker, tmp_path: Path) -> None:
    source = tmp_path / "till.py"
    source.write_text(
        HEAD
        + SUMS
        + """
@message_handler("prices", timeout=0.2)
def handle(price: Price, database: Database):
    if price.code == "stuck":
        time.sleep(600)
    add(database, price)
"""
    )
    publish(broker, price("a", 1), price("stuck", 1), price("b", 1))
    process = start(source, broker.server)
    database = tmp_path / "edgebroker-till" / "app.db"
    try:
        wait_for(lambda: read(database, "SELECT count(*) FROM _dead") == [(1,)], "given up", 60.0)
        wait_for(lambda: read(database, "SELECT code FROM sums ORDER BY code") == [("a",), ("b",)], "the others")
    finally:
        process.send_signal(signal.SIGTERM)
        _, logged = process.communicate(timeout=30.0)
    assert process.returncode == 0
    assert logged.count("does not end: the process starts again") == 3
    assert "Traceback" not in logged


@pytest.mark.slow
def test_a_stop_that_takes_too_long(broker: RunningBroker, tmp_path: Path) -> None:
    source = tmp_path / "till.py"
    source.write_text(
        HEAD
        + SUMS
        + """
@message_handler("prices")
def handle(price: Price):
    open("begun", "w").close()
    time.sleep(600)
"""
    )
    publish(broker, price("a", 1))
    process = start(source, broker.server, STOP_TIMEOUT="0.3")
    try:
        wait_for((tmp_path / "begun").exists, "it is in the handler")
        process.send_signal(signal.SIGTERM)
        _, logged = process.communicate(timeout=20.0)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopping takes longer than 0.3 s: what is not stored yet comes again" in logged
