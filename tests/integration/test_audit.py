"""What is recorded about who did what, and that no secret is in it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from edgebroker.broker.access import audit as audit_module
from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from tests.kit.brokers import RunningBroker, batch_of, running, take
from tests.kit.fleet_nodes import Fleet
from tests.kit.trees import follows, publish
from tests.kit.waiting import SECONDS, wait_for

pytestmark = pytest.mark.slow


def recorded(node: RunningBroker, count: int) -> list[tuple[str, str, str, str]]:
    """So many records: principal, action, object, result."""
    with node.consumer(["__audit"], start="earliest", timeout=SECONDS) as consumer:
        found: list[Any] = [json.loads(record.value or b"") for record in take(consumer, count)]
    return [(one["principal"], one["action"], one["object"], one["result"]) for one in found]


def test_who_did_what(fleet: Fleet, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    root = fleet.root()
    joining = fleet.token()
    hub = fleet.join("hub", "l2", "eu", "root", joining)
    token = root.http("POST", "/v1/access/app/tokens", {"allow": ["produce t", "create t"]})[1]["token"]
    client = root.raw(granted=False)
    client.connect("c", token=token.encode())
    assert client.publish("t", batch_of(b"v")).code is Code.OK
    for _ in range(3):
        assert client.publish("u", batch_of(b"v")).code is Code.UNAUTHORISED
        again = root.raw(granted=False)
        again.connect("c", token=token.encode())
    assert root.http("DELETE", "/v1/topics/none")[0] == 404
    assert root.http("GET", "/v1/topics")[0] == 200
    wait_for(lambda: root.http("GET", "/v1/via/hub/v1/node")[0] == 200, "the hub reports", 40.0)
    assert main(["--via", "hub", "topic", "create", "own", "--admin", root.admin]) == 0
    capsys.readouterr()
    id = token.split(".")[1]
    uid = hub.broker.engine.node_uid
    found = recorded(root, 7)
    assert found == [
        ("local", "POST", "/v1/trust/tokens", "OK"),
        ("hub", "join", f"edgebroker://acme/l2/eu/{uid}", "OK"),
        ("local", "POST", "/v1/access/app/tokens", "OK"),
        ("app", "use", f"token {id}", "OK"),
        ("app", "produce", "u", "UNAUTHORISED"),
        ("local", "DELETE", "/v1/topics/none", "404"),
        ("local", "POST", "/v1/via/hub/v1/topics", "OK"),
    ]
    assert ("above", "POST", "/v1/topics", "OK") in recorded(hub, 1)
    # The verb, and the log.
    assert main(["audit", "--admin", root.admin, "--server", root.server]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[4].endswith("  app (127.0.0.1)  produce u  UNAUTHORISED")
    assert "app (127.0.0.1): produce u: UNAUTHORISED" in caplog.text
    assert main(["audit", "--json", "--admin", root.admin, "--server", root.server]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[3])["object"] == f"token {id}"
    # It stays at its node, and holds no secret.
    publish(root, "prices", 0, 1)
    follows(root, hub, "prices")
    assert hub.http("GET", "/v1/topics/__audit")[1]["partitions"][0]["durable_end"] == 1
    assert (
        hub.http("GET", "/v1/topics/__audit")[1]["partitions"][0]["log_id"]
        != (root.http("GET", "/v1/topics/__audit")[1]["partitions"][0]["log_id"])
    )
    fleet.close()
    secrets = [token.split(".")[2], joining[3:], joining]
    texts = [caplog.text.encode(), *(path.read_bytes() for path in fleet.directory.rglob("*") if path.is_file())]
    assert len(texts) > 10
    assert [secret for secret in secrets for text in texts if secret.encode() in text] == []


def test_refusals_do_not_push_out_the_rest(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a client without a right asks for, it is one line a minute; and all together are not many."""
    root = fleet.root()
    token = root.http("POST", "/v1/access/app/tokens", {})[1]["token"]
    client = root.raw(granted=False)
    client.connect("c", token=token.encode())
    for number in range(50):
        assert client.publish(f"topic-{number}", batch_of(b"v")).code is Code.UNAUTHORISED
    assert recorded(root, 3)[1:] == [("app", "use", f"token {token.split('.')[1]}", "OK"), (
        "app", "produce", "topic-0", "UNAUTHORISED",
    )]  # fmt: skip
    monkeypatch.setattr(audit_module, "MOST_REFUSED", 3)
    audit = root.broker.access.audit
    root.call(lambda: [audit.refused("", f"10.0.0.{number}", "connect", "x") for number in range(10)])
    root.call(lambda: audit.record("op", "a", "do", "that"))
    found = recorded(root, 6)
    assert [line[1] for line in found[3:]] == ["connect", "connect", "do"]


def test_a_minute_later_it_is_recorded_again(fleet: Fleet) -> None:
    root = fleet.root()
    root.http("POST", "/v1/access/local", {"deny": ["produce t"]})
    client = root.raw("c")
    for _ in range(2):
        assert client.publish("t", batch_of(b"v")).code is Code.UNAUTHORISED
        root.advance(audit_module.REFUSED_SECONDS + 1)
        client = root.raw("c")
    assert recorded(root, 3)[1:] == [("local", "produce", "t", "UNAUTHORISED")] * 2


def test_too_many_at_a_time_are_counted(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = fleet.root()
    audit = root.broker.access.audit
    monkeypatch.setattr(audit_module, "MOST_WAITING", 5)
    root.call(lambda: [audit.record("p\x1b[2J", "a", "do", "x" * 1000) for _ in range(20)])
    wait_for(lambda: "15 lines of the audit are in this log only" in caplog.text, "they are counted")
    found = recorded(root, 5)
    assert found == [("p\\x1b[2J", "do", "x" * audit_module.MOST_TEXT, "OK")] * 5


def test_without_a_fleet_nothing_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path) as alone:
        alone.create("t")
        root_audit = alone.broker.access.audit
        assert not root_audit._waiting
        assert main(["audit", "--admin", alone.admin, "--server", alone.server]) == 0
        assert capsys.readouterr().err == "nothing is recorded at this node yet\n"
