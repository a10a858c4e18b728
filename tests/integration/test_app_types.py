"""Applications that need no code, as processes that are started by their configuration alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgebroker.common.errors import ConfigError
from edgebroker.consumer.declare.app_types import application_of
from tests.kit.applications import environment, price, publish, read
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for

COMMAND = [sys.executable, "-m", "edgebroker", "app", "run"]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as made:
        made.create("prices")
        made.create("shop.items")
        yield made


@contextmanager
def started(directory: Path, server: str, *flags: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *flags], cwd=directory, env=environment(server, **more), stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30.0)
    assert process.returncode == 0


@pytest.mark.slow
def test_a_store(broker: RunningBroker, tmp_path: Path) -> None:
    publish(broker, price("a", 1), ("b", [1, {"x": None}]), ("c", "text"), ("bad", b"{"))
    publish(broker, ("x", 7), topic="shop.items")
    with started(tmp_path, broker.server, TYPE="store", TOPICS="prices, shop.items"):
        database = tmp_path / "edgebroker-store" / "app.db"
        wait_for(lambda: read(database, "SELECT count(*) FROM prices") == [(3,)], "it has them")
        rows = dict(read(database, "SELECT key, value FROM prices"))  # type: ignore[arg-type]
        assert {key: json.loads(value) for key, value in rows.items()} == {
            "a": {"code": "a", "cents": 1},
            "b": [1, {"x": None}],
            "c": "text",
        }
        wait_for(lambda: read(database, "SELECT value FROM shop_items") == [("7",)], "and those of the other topic")
        assert read(database, "SELECT key FROM _dead") == [(b"bad",)]


@pytest.mark.slow
def test_a_table(broker: RunningBroker, tmp_path: Path) -> None:
    publish(broker, ("a", {"code": "a", "cents": 5, "new": True, "tags": [1]}), ("b", {"code": "b", "cents": 6}))
    publish(broker, ("bad", {"code": "c"}))
    flags = [
        "--type",
        "table",
        "--topics",
        "prices",
        "--columns",
        "new boolean ?, code text, cents integer, tags json ?",
    ]
    with started(tmp_path, broker.server, *flags, "--indexes", "cents; code, cents", "--name", "shelf"):
        database = tmp_path / "edgebroker-shelf" / "app.db"
        sql = "SELECT key, code, cents, new, tags FROM prices ORDER BY key"
        wait_for(lambda: read(database, sql) == [("a", "a", 5, 1, "[1]"), ("b", "b", 6, None, None)], "it has them")
        plan = read(database, "EXPLAIN QUERY PLAN SELECT key FROM prices WHERE cents=5")
        assert "INDEX _prices_g1_i0" in str(plan)
        assert read(database, "SELECT key FROM _dead") == [(b"bad",)]


@pytest.mark.slow
def test_standard_output(broker: RunningBroker, tmp_path: Path) -> None:
    publish(broker, price("a", 1), ("b", None), ("c", b"\xff"))
    with started(tmp_path, broker.server, "--type", "stdout", "--topics", "prices") as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert [(one["key"], one["value"], one["offset"]) for one in lines] == [
        ("a", '{"code": "a", "cents": 1}', 0), ("b", None, 1), ("c", None, 2)
    ]  # fmt: skip
    assert lines[2]["value_bytes"] == "/w=="


@pytest.mark.parametrize(
    ("kind", "topics", "columns", "indexes", "said"),
    [
        ("store", "", "", "", "topics: type = store needs the topics that it reads, with commas between them"),
        ("store", "a b", "", "", "topics: a b: topic names are"),
        ("store", "a", "b text", "", "columns and indexes are for type = table, not for store"),
        ("table", "a", "", "", "columns: type = table needs them, for example: code text"),
        ("table", "a", "b blob", "", "columns: 'b blob': write NAME and one of text, integer, real, boolean, json"),
        ("table", "a", "key text", "", "columns: Row.key: every view has a column of this name; rename the field"),
        ("table", "a", "b text, B text", "", "SQL cannot tell b from its other spelling"),
        ("table", "a", "b text", "c", "columns: an index over c: the columns are b"),
    ],
)
def test_what_is_wrong(kind: str, topics: str, columns: str, indexes: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        application_of(kind, topics, columns, indexes)
    assert said in str(caught.value)


def test_neither_file_nor_type_and_both(tmp_path: Path) -> None:
    for flags, said in (
        ([], "which application? give a Python file, or type = store, table, stdout"),
        (["--type", "store", "--topics", "a", "till.py"], "give a file or type = store, not both"),
    ):
        done = subprocess.run([*COMMAND, *flags], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr, done.stderr
