"""A catalogue is replaced while programs read it, and the application is killed twice meanwhile: no read is ever mixed.

The SQL shell (or Python, without one) and REST read it, and a program in Java when $EB_JDBC is a folder with the jars
of sqlite-jdbc and slf4j-api (`make test-till`, with EB_READER_KEYS keys).
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.producer import Producer
from tests.kit.applications import HEAD, VIEW, environment, read
from tests.kit.waiting import wait_for

from .traffic import SETTINGS, pass_time

KEYS = int(os.environ.get("EB_READER_KEYS", "20000"))
JDBC = os.environ.get("EB_JDBC", "")
SAMPLE = 50


class Reader(threading.Thread):
    """Reads some prices at one moment, again and again. `read` returns their cents, None when there was no answer."""

    def __init__(self, name: str, ask: Callable[[list[str]], list[int] | None]) -> None:
        super().__init__(name=name)
        self._ask, self._rng, self._over = ask, random.Random(name), threading.Event()
        self.reads = self.mixed = self.missing = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._over.is_set() and self.failure is None:
                keys = [f"k{number:07d}" for number in self._rng.sample(range(KEYS), SAMPLE)]
                found = self._ask(keys)
                if found is None:
                    pass_time(0.02)
                    continue
                self.reads += 1
                self.mixed += len(set(found)) > 1
                self.missing += len(found) != SAMPLE
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        self._over.set()
        self.join()


def publish(server: str, generation: int) -> None:
    with Producer(server) as producer:
        for number in range(KEYS):
            key = b"k%07d" % (number * 7919 % KEYS)
            producer.send("prices", json.dumps({"code": "c", "cents": generation}).encode(), key)


@pytest.mark.slow
def test_no_read_is_mixed(tmp_path: Path) -> None:
    source, database = tmp_path / "till.py", tmp_path / "edgebroker-till" / "app.db"
    source.write_text(HEAD + VIEW)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "edgebroker", "app", "run", str(source)]
    log = (tmp_path / "till.log").open("ab")

    with BrokerProcess(tmp_path / "data", settings=SETTINGS | {"EDGEBROKER_LOG_LEVEL": "warning"}) as broker:
        settings = environment(broker.server, HTTP=f"127.0.0.1:{port}")

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, cwd=tmp_path, env=settings, stderr=log)

        def by_shell(keys: list[str]) -> list[int] | None:
            marks = ",".join(f"'{key}'" for key in keys)
            sql = f"SELECT cents FROM prices WHERE key IN ({marks})"
            if shutil.which("sqlite3") is None:
                return [cents for (cents,) in read(database, sql)]
            done = subprocess.run(
                ["sqlite3", "-cmd", ".timeout 5000", f"file:{database}?mode=ro", sql],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return [int(line) for line in done.stdout.split()]

        def by_rest(keys: list[str]) -> list[int] | None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30.0)
            try:
                head = {"content-type": "application/json"}
                connection.request("POST", "/v1/latest/prices", json.dumps({"keys": keys}), head)
                answer = connection.getresponse()
                body: Any = json.load(answer)
            except (OSError, http.client.HTTPException, ValueError):
                return None  # it was killed
            finally:
                connection.close()
            assert answer.status == 200, body
            return [record["value"]["cents"] for record in body["records"]]

        call(broker.admin, "POST", "/v1/topics", {"name": "prices", "partitions": 2})
        publish(broker.server, 1)
        till = start()
        wait_for(lambda: read(database, "SELECT count(*), min(cents) FROM prices") == [(KEYS, 1)], "it is there", 120.0)
        readers = [Reader("shell", by_shell), Reader("rest", by_rest)]
        for reader in readers:
            reader.start()
        java = start_java(database) if JDBC else None
        try:
            wait_for(lambda: committed(broker) == KEYS, "the group has passed them", 60.0)
            call(broker.admin, "DELETE", "/v1/topics/prices?confirm=prices")
            call(broker.admin, "POST", "/v1/topics", {"name": "prices", "partitions": 2})
            publish(broker.server, 2)
            for _ in range(2):
                wait_for(lambda: bool(list(database.parent.glob("staging-*"))), "it is loaded", 60.0)
                pass_time(0.1)
                till.kill()
                till.wait()
                till = start()
            expected = [(KEYS, 2, 2)]
            sql = "SELECT count(*), min(cents), max(cents) FROM prices"
            wait_for(lambda: read(database, sql) == expected, "readers see the new one", 180.0)
            before = [reader.reads for reader in readers]
            wait_for(
                lambda: all(now.reads > was for now, was in zip(readers, before, strict=True)), "they read on", 60.0
            )
            said = java.communicate("\n", timeout=30.0)[0] if java is not None else ""
        finally:
            if java is not None:
                java.kill()
                java.wait()
            for reader in readers:
                reader.stop()
                print(reader.name, reader.reads, reader.failure)
            till.kill()
            till.wait()
            log.close()
    for reader in readers:
        assert reader.failure is None, reader.failure
        assert reader.reads > 3 and (reader.mixed, reader.missing) == (0, 0), vars(reader)
    assert "Traceback" not in (tmp_path / "till.log").read_text()
    print({reader.name: reader.reads for reader in readers})
    if java is not None:
        reads, mixed, missing, errors, *_ = said.split()
        assert int(reads) > 3 and (mixed, missing, errors) == ("0", "0", "0"), said
        print(f"Java: {reads} reads")


def committed(broker: BrokerProcess) -> int:
    lines = call(broker.admin, "GET", "/v1/groups/till.till-7").get("partitions", [])
    return sum(max(0, line["committed"]) for line in lines)


def start_java(database: Path) -> subprocess.Popen[str]:
    folder = Path(JDBC)
    path = ":".join([*map(str, folder.glob("*.jar")), str(folder)])
    source = Path(__file__).with_name("TillReader.java")
    subprocess.run(["javac", "-d", str(folder), str(source)], check=True)
    command = ["java", "-cp", path, "TillReader", str(database), str(KEYS)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
