"""`edgebroker app` as its user runs it: a process that is killed, stopped, and read by other programs."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.main import main
from tests.kit import applications
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

APPLICATION = """
import msgspec
from edgebroker.consumer import Database, consumer, message_handler, on_start


class Price(msgspec.Struct):
    code: str
    cents: int


@consumer("prices", view=Price)
class Prices:
    @on_start
    def prepare(self, database: Database):
        database.execute("CREATE TABLE IF NOT EXISTS sums (code TEXT PRIMARY KEY, sum INTEGER, count INTEGER)")

    @message_handler()
    def count(self, price: Price, database: Database):
        database.execute(
            "INSERT INTO sums VALUES (?,?,1) "
            "ON CONFLICT (code) DO UPDATE SET sum=sum+excluded.sum, count=count+1",
            (price.code, price.cents))
"""


VIEW = applications.HEAD + applications.VIEW


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        found.create("prices", partitions=2)
        yield found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "till.py"
    path.write_text(APPLICATION)
    return path


@contextmanager
def started(broker: RunningBroker, source: Path) -> Iterator[subprocess.Popen[str]]:
    process = applications.start(source, broker.server)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read(source: Path, sql: str) -> list[tuple[Any, ...]]:
    """As another program; [] before it is there."""
    return applications.read(source.parent / "edgebroker-till" / "app.db", sql)


COUNTED = "SELECT coalesce(sum(count), 0), coalesce(sum(sum), 0) FROM sums"


def count_of(source: Path) -> int:
    found = read(source, COUNTED)
    return int(found[0][0]) if found else 0


def send(broker: RunningBroker, first: int, count: int) -> None:
    with broker.producer() as producer:
        for number in range(first, first + count):
            value = json.dumps({"code": f"c{number % 10}", "cents": number}).encode()
            producer.send("prices", value, b"c%d" % (number % 10), partition=number % 2)


def test_killed_again_and_again(broker: RunningBroker, source: Path) -> None:
    """Whatever is cut off, each record has its effect once, and readers see whole transactions."""
    sent = 0
    for _ in range(8):
        with started(broker, source) as process:
            send(broker, sent, 2000)
            sent += 2000
            wait_for(lambda: count_of(source) >= sent - 1500, "it is under way")  # noqa: B023
            process.kill()
            process.wait()
        ((stored,),) = read(source, "SELECT sum(next_offset) FROM _position")
        assert count_of(source) == stored, "positions and effects are those of the same transactions"
    with started(broker, source):
        wait_for(lambda: read(source, COUNTED) == [(sent, sum(range(sent)))], "all of it, once")
        assert sorted(read(source, "SELECT code, cents FROM prices")) == [(f"c{n}", sent - 10 + n) for n in range(10)]


def test_stopped_it_leaves_what_readers_need(broker: RunningBroker, source: Path) -> None:
    send(broker, 0, 10)
    with started(broker, source) as process:
        wait_for(lambda: len(read(source, "SELECT * FROM prices")) == 10, "it has them")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30.0)
        assert process.returncode == 0
        assert "application till of node till-7 reads prices" in said and said.rstrip().endswith("stopped")
    names = sorted(one.name for one in (source.parent / "edgebroker-till").iterdir())
    assert names == ["IN_HAND", "LOCK", "app.db", "app.db-shm", "app.db-wal"]
    assert len(read(source, "SELECT * FROM prices")) == 10
    with started(broker, source) as first, started(broker, source) as second:
        both = (first, second)
        wait_for(lambda: any(one.poll() is not None for one in both), "one of them finds the other")
        assert [one.returncode for one in both if one.returncode is not None] == [75]


def test_the_schema_and_the_configuration(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "app.toml"
    file.write_text('node = "till-9"\nserver = "hub:7420"\n')
    monkeypatch.setenv("EDGEBROKER_APP_SERVER", "other:7420")
    monkeypatch.setenv("EDGEBROKER_APP_FORCE", "true")
    flags = ["-c", str(file), "--labels", "format=express"]
    assert main(["app", "config", str(source), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["node"] == {"value": "till-9", "source": "file"}
    assert found["server"] == {"value": "other:7420", "source": "environment"}
    assert found["labels"] == {"value": "format=express", "source": "flag"}
    assert found["force"] == {"value": True, "source": "environment"}
    assert found["name"] == {"value": "till", "source": "default"}
    assert main(["app", "config", str(source), "--check"]) == 0
    assert main(["app", "schema", str(source)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("prices: key, code TEXT, cents INTEGER\n")
    assert f"sqlite3 'file:{tmp_path}/edgebroker-till/app.db?mode=ro'" in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name\n", "till.py:1: "),
        ("def f(:\n", "till.py:1: "),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("x = 1\n", "till declares no consumer"),
    ],
)
def test_an_application_that_cannot_be_read(
    source: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    source.write_text(text)
    assert main(["app", "config", str(source), "--check"]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_a_configuration_that_is_wrong_in_several_places(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "app.toml"
    file.write_text('colour = "red"\nlog_level = "loud"\n')
    assert main(["app", "config", str(source), "-c", str(file)]) == 2
    told = capsys.readouterr().err
    assert "there is no key colour; keys are name, type" in told and "log_level = 'loud'" in told
    monkeypatch.setenv("EDGEBROKER_APP_FORCE", "perhaps")
    assert main(["app", "config", str(source), "--check"]) == 2
    assert "EDGEBROKER_APP_FORCE = 'perhaps': " in capsys.readouterr().err
    monkeypatch.delenv("EDGEBROKER_APP_FORCE")
    monkeypatch.setenv("EDGEBROKER_APP_NODE", "no node!")
    assert main(["app", "config", str(source), "--labels", "express"]) == 2
    told = capsys.readouterr().err
    assert "EDGEBROKER_APP_NODE: " in told and "--labels: 'express': NAME=VALUE is expected" in told


def test_killed_while_a_topic_is_loaded_again(broker: RunningBroker, source: Path) -> None:
    """Readers see all of the rows at any moment; in the end the new ones are those that were published."""
    source.write_text(VIEW)
    keys = 3000
    with broker.producer() as producer:
        for number in range(keys):
            value = json.dumps({"code": f"c{number}", "cents": number}).encode()
            producer.send("prices", value, b"c%d" % number, partition=number % 2)
    counts: set[int] = set()

    def whole() -> bool:
        counts.update(count for (count,) in read(source, "SELECT count(*) FROM prices"))
        return counts == {keys}

    with started(broker, source):
        wait_for(lambda: read(source, "SELECT count(*) FROM prices") == [(keys,)], "it has them")
        wait_for(lambda: stored(broker) == keys, "they are acknowledged")
    for attempt in range(6):
        with started(broker, source):
            assert broker.http("POST", "/v1/groups/till.till-7/refresh", {"topic": "prices"})[0] in (200, 404, 409)
            begun = read(source, "SELECT generation FROM _generations")
            try:
                wait_for(lambda: not whole() or loading(source) > attempt * 400, seconds=3.0)  # noqa: B023
            except TimeoutError:
                pass  # it was faster than this looked
            assert counts == {keys}, begun
    with started(broker, source):
        wait_for(lambda: whole() and loading(source) == 0 and refreshed(broker), "it is loaded again")
        assert counts == {keys}
        assert read(source, "SELECT generation FROM _generations") > [(1,)]
    assert sorted(read(source, "SELECT cents FROM prices")) == [(number,) for number in range(keys)]


def loading(source: Path) -> int:
    """How many records a refresh that is not over has stored."""
    found = read(source, "SELECT coalesce(sum(next_offset), 0) FROM _loading WHERE target >= 0")
    return int(found[0][0]) if found else 0


def partitions(broker: RunningBroker) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = broker.http("GET", "/v1/groups/till.till-7")[1]["partitions"]
    return found


def stored(broker: RunningBroker) -> int:
    return sum(one["committed"] for one in partitions(broker))


def refreshed(broker: RunningBroker) -> bool:
    return all(one["refresh"] and one["refresh"]["state"] == "ready" for one in partitions(broker))
