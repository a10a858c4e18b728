"""The fuzz targets against a whole node, each for a second; `make test-fuzz` runs them for longer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgebroker.broker.admin.node import NodeAdmin
from edgebroker.network.http.router import Call
from tests.fuzz.live import __main__ as command
from tests.fuzz.live.bodies import ROUTES, WITH_BODY
from tests.fuzz.live.running import TARGETS, run

pytestmark = pytest.mark.slow
EXECUTIONS = {"http": 1000, "json": 1000, "json-below": 600, "pipe": 600, "parent": 200, "sessions": 200}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name: str) -> None:
    executions, findings = run(name, "1", lambda done: done < EXECUTIONS[name])
    assert executions == EXECUTIONS[name]
    assert not findings, findings[0].why


def test_every_route_that_takes_a_body_is_tried() -> None:
    """The router knows them, but for one that takes the body as it comes."""
    assert [route.path for route in ROUTES if route.body_limit != ROUTES[0].body_limit and route not in WITH_BODY] == []


def test_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is made small, kept in a file, and found again by that."""

    def repair(admin: NodeAdmin, call: Call) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(NodeAdmin, "repair", repair)
    monkeypatch.setattr(command.watchdog, "install", lambda: None)
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["live", "1", "json", "--seed", "1"])
    assert command.main() == 1
    told = capsys.readouterr().out
    assert "1 findings" in told and "POST /v1/repair" in told and "--seed 1" in told
    [path] = tmp_path.glob("edgebroker-fuzz-json-*.json")
    [[door, [piece]]] = json.loads(path.read_text())["cases"]
    assert (door, bytes.fromhex(piece)[:15]) == ("http", b"POST /v1/repair")
    monkeypatch.setattr(sys, "argv", ["live", "--replay", str(path)])
    assert command.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
