"""docs/consumer.md does what it says, step by step."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest

from edgebroker.consumer.config import ENV_PREFIX, AppConfig
from tests.kit.applications import read
from tests.kit.brokers import running
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "consumer.md").read_text()


FRANCE = "SELECT lines FROM sold WHERE country='France'"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def command(line: str) -> list[str]:
    assert line.startswith("edgebroker ")
    return [sys.executable, "-m", *line.split()]


def test_the_tutorial(tmp_path: Path) -> None:
    serve, *prepare = blocks("sh")[0].strip().split("\n")
    assert serve == "edgebroker serve --data-dir node &"
    (run,), (look,), (curl,) = (block.strip().split("\n") for block in blocks("sh")[1:])
    (tmp_path / "items.py").write_text("".join(blocks("python")))
    (tmp_path / "edgebroker").symlink_to(ROOT / "edgebroker")
    with running(tmp_path / "node") as broker:
        admin = "{}:{}".format(*broker.broker.listeners.http_address)
        environment = {
            **os.environ,
            "EDGEBROKER_SERVER": broker.server,
            "EDGEBROKER_ADMIN": admin,
            "EDGEBROKER_APP_SERVER": broker.server,
            "EDGEBROKER_APP_HTTP": f"127.0.0.1:{free_port()}",
        }
        for line in prepare:
            subprocess.run(command(line), cwd=tmp_path, env=environment, check=True, capture_output=True)
        application = subprocess.Popen(
            command(run), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            database, question = re.fullmatch(r"sqlite3 'file:(.*)\?mode=ro' \"(.*)\"", look).groups()  # type: ignore[union-attr]

            def ask(sql: str) -> list[tuple[object, ...]]:
                return read(tmp_path / database, sql)

            wait_for(lambda: ask("SELECT sum(lines) FROM sold") == [(30_000,)], "every line is counted, once")
            ((key, description, price),) = ask(question)
            assert (key, description) == ("85123A", "WHITE HANGING HEART T-LIGHT HOLDER") and float(str(price)) > 0
            assert ask("SELECT count(*) FROM sales") == [(2645,)]
            url = curl.removeprefix("curl ").replace("127.0.0.1:7430", environment["EDGEBROKER_APP_HTTP"])
            with urllib.request.urlopen(url, timeout=10.0) as answer:
                assert json.load(answer)["record"]["value"]["Description"] == description
            with urllib.request.urlopen(url.partition("/v1/")[0] + "/sold/France", timeout=10.0) as answer:
                assert json.load(answer) == {"country": "France", "lines": ask(FRANCE)[0][0]}
            application.send_signal(signal.SIGTERM)
            assert application.wait(30.0) == 0
            assert ask("SELECT count(*) FROM sales") == [(2645,)], "it can be read without the application"
        finally:
            application.kill()
            application.communicate()


def test_the_table_of_the_configuration() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE)
    names = [field.name for field in msgspec.structs.fields(AppConfig)]
    assert rows == [(name, ENV_PREFIX + name.upper()) for name in names]
