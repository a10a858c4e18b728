"""kill -9 of an application at each named point of its work: nothing is lost, and nothing has an effect twice.

The application has a view and a handler that counts. It is filled, loaded again, and rebuilt for another version; after
the kill it is started again. EB_APP_POINT_TIMES says at how many visits of each point it is killed; without it, at the
first visit of the points that need the most.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.producer import Producer
from edgebroker.common.errors import EdgeBrokerError
from tests.kit.applications import HEAD, environment
from tests.kit.killed import POINTS
from tests.kit.waiting import wait_for

from .traffic import SETTINGS

TIMES = int(os.environ.get("EB_APP_POINT_TIMES", "0"))
FEW = ("in transaction", "committed", "staged", "being filled", "being switched", "switched", "rebuilding")
ROOT = Path(__file__).parents[2]
PARTITIONS, RECORDS = 2, 300
SOURCE = (
    HEAD
    + """
@consumer("prices", view=Price, version=VERSION)
class Prices: ...


@on_start
def prepare(database: Database):
    database.execute("CREATE TABLE IF NOT EXISTS counts (part INTEGER PRIMARY KEY, count INTEGER, last INTEGER)")


@on_reset
def forget(database: Database):
    database.execute("DELETE FROM counts")


@message_handler("prices")
def count(price: Price, context: Context, database: Database):
    part, offset = context.record.partition, context.record.offset
    database.execute("INSERT INTO counts VALUES (?,1,?) ON CONFLICT (part) DO UPDATE SET count=count+1, last=?",
                     (part, offset, offset))
"""
)


class Scene:
    """A broker, an application, and what was published."""

    def __init__(self, directory: Path, broker: BrokerProcess) -> None:
        self._directory, self._broker = directory, broker
        self.path = directory / "edgebroker-till" / "app.db"
        self._source = directory / "till.py"
        self._process: subprocess.Popen[bytes] | None = None
        self.rows: dict[str, int] = {}
        self.ends = [0] * PARTITIONS
        self.change(1)

    def change(self, version: int) -> None:
        self._source.write_text(SOURCE.replace("VERSION", str(version)))

    def publish(self, count: int) -> None:
        with Producer(self._broker.server) as producer:
            for number in range(count):
                code, part = f"c{number % 70}", number % 70 % PARTITIONS
                cents = sum(self.ends) + 1
                producer.send(
                    "prices", b'{"code":"%b","cents":%d}' % (code.encode(), cents), code.encode(), partition=part
                )
                self.rows[code], self.ends[part] = cents, self.ends[part] + 1

    def start(self, *point: str) -> None:
        run = ["tests.kit.killed", *point] if point else ["edgebroker"]
        variables = environment(self._broker.server, COPY="on") | {"PYTHONPATH": str(ROOT)}
        with (self._directory / "till.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *run, "app", "run", str(self._source)],
                cwd=self._directory, env=variables, stderr=log,
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def read(self, sql: str) -> list[tuple[int, ...]]:
        try:
            with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as connection:
                return connection.execute(sql).fetchall()
        except sqlite3.OperationalError as error:
            assert "no such table" in str(error) or "unable to open" in str(error), error
            return []

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something, or for the end of the application."""
        wait_for(lambda: self.ended or condition(), what, 20.0)

    def is_current(self) -> bool:
        """Are view, counts and positions those of all records?"""
        positions = [(part, end) for part, end in enumerate(self.ends)]
        return (
            self.read("SELECT partition, next_offset FROM _position ORDER BY partition") == positions
            and self.read("SELECT part, count FROM counts ORDER BY part") == positions
            and dict(self.read("SELECT key, cents FROM prices")) == self.rows
            and self.read("SELECT loading FROM _state") == [(0,)]
        )

    def is_over(self) -> bool:
        """Is nothing left of what was loaded again, here and at the broker?"""
        lines = call(self._broker.admin, "GET", "/v1/groups/till.till-7")["partitions"]
        tables = self.read("SELECT count(*) FROM sqlite_schema WHERE type='table' AND name GLOB '_prices_g*'")
        return (
            not list(self.path.parent.glob("staging-*"))
            and tables == [(1,)]
            and all(not line["refresh"] or line["refresh"]["state"] == "ready" for line in lines)
        )

    def generation(self) -> int:
        return (self.read("SELECT generation FROM _generations") or [(0,)])[0][0]

    def refresh(self) -> None:
        def asked() -> bool:
            try:
                call(self._broker.admin, "POST", "/v1/groups/till.till-7/refresh", {"topic": "prices"})
            except EdgeBrokerError:
                return self.ended
            return True

        wait_for(asked, "it is asked for")


def check_counts(scene: Scene) -> None:
    """What was counted is what the positions say, unless a topic is being loaded again."""
    if scene.read("SELECT loading FROM _state") == [(0,)]:
        counts = {part: (count, last) for part, count, last in scene.read("SELECT part, count, last FROM counts")}
        for part, end in scene.read("SELECT partition, next_offset FROM _position"):
            assert counts.get(part, (0, -1)) == (end, end - 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(max(1, TIMES)))
@pytest.mark.parametrize("point", POINTS if TIMES else FEW)
def test_a_kill_at(tmp_path: Path, point: str, number: int) -> None:
    with BrokerProcess(tmp_path / "data", settings=SETTINGS | {"EDGEBROKER_LOG_LEVEL": "warning"}) as broker:
        call(broker.admin, "POST", "/v1/topics", {"name": "prices", "partitions": PARTITIONS})
        scene = Scene(tmp_path, broker)
        kills = 0
        try:
            scene.publish(RECORDS)
            scene.start(point, str(number))
            scene.wait_for(scene.is_current, "it is filled")
            scene.publish(20)
            scene.wait_for(scene.is_current, "it has more")
            if not scene.ended:
                before = scene.generation()
                scene.refresh()
                scene.wait_for(lambda: scene.generation() > before and scene.is_current(), "it is loaded again")
                scene.wait_for(scene.is_over, "the broker knows")
            if not scene.ended:
                scene.end()
                scene.change(2)
                scene.start(point, str(number))
                scene.wait_for(lambda: scene.read("SELECT version FROM _generations") == [(2,)], "it is rebuilt")
                scene.wait_for(lambda: scene.is_current() and scene.is_over(), "nothing is left")
            kills += scene.ended
            scene.end()
            check_counts(scene)
            scene.start()
            wait_for(scene.is_current, "all of it is there, once", 20.0)
            scene.publish(10)
            wait_for(lambda: scene.is_current() and scene.is_over(), "it goes on", 20.0)
        finally:
            scene.end()
        assert kills or number, "it never came there"
        assert "Traceback" not in (tmp_path / "till.log").read_text()
