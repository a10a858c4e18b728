"""Applications of the kit in tests: run in this process, and read as other programs read them."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from edgebroker.consumer.config import AppConfig
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.declare.application import load_module, read_application
from edgebroker.consumer.service import Service
from tests.kit.brokers import RunningBroker
from tests.kit.waiting import wait_for

HEAD = """
import msgspec
from edgebroker.consumer import *

SEEN = []


class Price(msgspec.Struct):
    code: str
    cents: int


"""
VIEW = """
@consumer("prices", view=Price)
class Prices: ...
"""


def environment(server: str, **more: str) -> dict[str, str]:
    """For an application as a process; `more` are keys of its configuration."""
    found = {"SERVER": server, "NODE": "till-7", "HTTP": "none", **more}
    return {**os.environ, **{f"EDGEBROKER_APP_{key}": value for key, value in found.items()}}


def start(source: Path, server: str, **more: str) -> subprocess.Popen[str]:
    """An application as a process, in the directory of its file; `more` are keys of its configuration."""
    command = [sys.executable, "-m", "edgebroker", "app", "run", str(source)]
    return subprocess.Popen(
        command, cwd=source.parent, env=environment(server, **more), stderr=subprocess.PIPE, text=True
    )


def read(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """The rows of a local database, as another program gets them; none before there is one."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchall()
    except sqlite3.OperationalError:
        return []


class App:
    """An application whose directory outlives its runs."""

    def __init__(self, broker: RunningBroker, directory: Path, text: str) -> None:
        self.broker, self.directory, self.path = broker, directory, directory / "app" / "app.db"
        path = directory / "till_app.py"
        directory.mkdir(exist_ok=True)
        path.write_text(HEAD + text)
        self.source = str(path)
        self.error: BaseException | None = None
        # More of its configuration.
        self.more: dict[str, Any] = {}

    @contextmanager
    def running(self, *, force: bool = False) -> Iterator[Any]:
        """Run it; its module. It has ended, and its database is closed, afterwards."""
        sys.modules.pop("till_app", None)
        module = load_module(self.source)
        database = AppDatabase(self.directory / "app", 1)
        config = AppConfig(
            name="prices",
            node="till-7",
            server=self.broker.server,
            force=force,
            http="127.0.0.1:0",
            stop_timeout=20.0,
            **self.more,
        )
        self.service = service = Service(read_application(module, "till-7", {}), database, config)

        def run() -> None:
            try:
                service.run()
            except BaseException as error:
                self.error = error

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_for(lambda: service.http_address[1] or not thread.is_alive(), "it answers")
            yield module
        finally:
            service.stop()
            thread.join(30.0)
            assert not thread.is_alive()
            service.worker.join(30.0)  # it may be left behind by a stop that takes too long
            database.close()

    def read(self, sql: str) -> list[tuple[Any, ...]]:
        return read(self.path, sql)

    def until(self, sql: str, expected: object) -> None:
        found: list[object] = []

        def reached() -> bool:
            found[:] = self.read(sql)
            return found == expected or self.error is not None

        try:
            wait_for(reached)
        except TimeoutError:
            raise AssertionError(f"{sql}: {found}") from None
        assert found == expected, self.error


def publish(broker: RunningBroker, *rows: tuple[str, object], partition: int = 0, topic: str = "prices") -> None:
    with broker.producer() as producer:
        for key, value in rows:
            data = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
            producer.send(topic, data, key.encode(), partition=partition).result(10.0)


def price(code: str, cents: int) -> tuple[str, object]:
    return code, {"code": code, "cents": cents}


def committed(broker: RunningBroker, group: str = "prices.till-7") -> list[int]:
    return [one["committed"] for one in broker.http("GET", f"/v1/groups/{group}")[1].get("partitions", [])]
