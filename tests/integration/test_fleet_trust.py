"""A fleet of real nodes: created, joined, renewed, with TLS between all of them; and what is not let in."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import socket
import ssl
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgebroker.broker import listeners as listeners_module
from edgebroker.broker.access import access as access_module
from edgebroker.broker.broker import Broker
from edgebroker.broker.publish import publishing
from edgebroker.broker.trust import authority, decisions, node_trust
from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.cli.main import main
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.config import DEVELOPMENT
from edgebroker.common.errors import AnswerError, Code, ConfigError
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.network.wire import frames
from edgebroker.pipe import candidates
from edgebroker.trust.contexts import client_context, unverified_context
from edgebroker.trust.directory import TrustDirectory, erase_if_told
from edgebroker.trust.issuing import Issuer
from edgebroker.trust.keys import make_key, read_key, write_key
from edgebroker.trust.messages import SignedRecord
from edgebroker.trust.node_name import NodeName
from edgebroker.trust.records import signed_text
from tests.kit.brokers import JSON, RunningBroker, config_for, numbered, running
from tests.kit.fleet_nodes import JOIN_SECONDS, Fleet
from tests.kit.fleets import NOW_MS, TestFleet
from tests.kit.trees import end, follows, pipe, publish
from tests.kit.waiting import SECONDS, wait_for

pytestmark = pytest.mark.slow
DAY_MS = 86_400_000


def status(node: RunningBroker) -> dict[str, Any]:
    return dict(node.http("GET", "/v1/trust")[1])


def problems(node: RunningBroker) -> dict[str, str]:
    return dict(node.http("GET", "/v1/node")[1]["problems"])


@contextmanager
def connected(node: RunningBroker, context: ssl.SSLContext) -> Iterator[http.client.HTTPSConnection]:
    connection = http.client.HTTPSConnection(*node.broker.listeners.pipe_address, timeout=SECONDS, context=context)
    try:
        yield connection
    finally:
        connection.close()


def asked(node: RunningBroker, context: ssl.SSLContext, method: str, path: str, body: object = None) -> tuple[int, Any]:
    with connected(node, context) as connection:
        connection.request(method, path, json.dumps(body) if body is not None else None, JSON)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")


def of_node(node: RunningBroker) -> ssl.SSLContext:
    """With the certificate of a node."""
    files = TrustDirectory(Path(node.config.node.data_dir))
    return client_context(files.root.read_bytes(), files.certificate, files.key)


# ---- the whole way ----


def test_prices_arrive_over_tls(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """Root, hub, store and terminal; the terminal joins through all of them."""
    root = fleet.root()
    token = fleet.token()
    fleet.join("hub", "l2", "eu", "root", token)
    fleet.join("store", "pos", "eu/1", "hub", token)
    till = fleet.join("till", "local", "eu/1", "store", token)
    publish(root, "prices", 0, 10)
    follows(root, till, "prices")
    assert [name for name, node in fleet.nodes.items() if node.http("GET", "/v1/node")[1]["problems"]] == []
    assert status(till)["node"].startswith("edgebroker://acme/local/eu/1/")
    assert till.broker.mirroring.upstream.identity == status(fleet.nodes["store"])["node"]  # type: ignore[union-attr]
    wait_for(lambda: len(root.http("GET", "/v1/tree/nodes")[1]["nodes"]) == 3, "all report", 40.0)
    assert main(["--via", "till", "trust", "status", "--admin", root.admin]) == 0
    assert "fleet:        acme" in capsys.readouterr().out
    assert not TrustDirectory(Path(till.config.node.data_dir)).token.exists(), "the token was destroyed"
    assert root.http("GET", "/v1/trust/tokens")[1]["tokens"][0]["used"] == 3


def test_a_node_comes_back_with_its_certificate(fleet: Fleet) -> None:
    root = fleet.root()
    fleet.join("hub", "l2", "eu", "root", fleet.token())
    fleet.stop("hub")
    publish(root, "prices", 0, 5)
    hub = fleet.start("hub", "l2", "eu", "root")
    follows(root, hub, "prices")


def test_a_machine_waits_for_the_line(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_trust, "FIRST_PAUSE", 0.1)
    root = fleet.root()
    token, port = fleet.token(), root.broker.listeners.pipe_address[1]
    fleet.stop("root")
    hub = fleet.start("hub", "l2", "eu", pipe__parents=f"127.0.0.1:{port}")
    assert hub.http("POST", "/v1/trust/join", {"token": token})[0] == 200
    wait_for(lambda: "Connection refused" in hub.http("GET", "/v1/node")[1]["problems"].get("trust", ""), "it says so")
    fleet.start("root", "root", listen__pipe=f"127.0.0.1:{port}")
    wait_for(lambda: status(hub)["node"], "it joins")
    assert hub.http("GET", "/v1/node")[1]["problems"] == {}


def test_a_token_from_a_file(fleet: Fleet, tmp_path: Path) -> None:
    fleet.root()
    path = tmp_path / "token"
    path.write_text(fleet.token() + "\n")
    hub = fleet.start("hub", "l2", "eu", "root", trust__token_file=str(path))
    wait_for(lambda: status(hub)["node"], "it joins")
    assert not path.exists()


def test_renewal(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fleet.root()
    hub = fleet.join("hub", "l2", "eu", "root", fleet.token())
    before = status(hub)["expires_ms"]
    monkeypatch.setattr(hub.broker.trust, "_renew_after_ms", -1)
    hub.advance(node_trust.TICK_SECONDS + 1)
    wait_for(lambda: status(hub)["issued_ms"] > 0 and status(hub)["expires_ms"] >= before, "renewed")
    wait_for(lambda: not hub.broker.trust._busy, "renewed")
    publish(root, "prices", 0, 5)
    follows(root, hub, "prices")
    assert root.http("GET", "/v1/trust/tokens")[1]["tokens"][0]["used"] == 1


# ---- what is not let in ----


def test_who_is_no_node(fleet: Fleet) -> None:
    """Without a certificate one may ask to join, and nothing else."""
    root = fleet.root()
    publish(root, "prices", 0, 1)
    stranger = unverified_context()
    assert asked(root, stranger, "GET", "/v1/trust/root")[0] == 200
    poll = {"version": 1, "uid": "e" * 32, "name": "x", "level": "local", "topics": ["*"], "logs": []}
    for method, path, body in (
        ("GET", "/healthz", None), ("POST", "/v1/pipe", poll), ("POST", "/v1/pipe/topics", None),
        ("POST", "/v1/registry", {}), ("POST", "/v1/fence", {}), ("POST", "/v1/tree/reports", {}),
    ):  # fmt: skip
        answered, answer = asked(root, stranger, method, path, body)
        assert (answered, answer["code"]) == (403, "UNAUTHORISED"), path
    plain = http.client.HTTPConnection(*root.broker.listeners.pipe_address, timeout=SECONDS)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("GET", "/v1/trust/root")
        plain.getresponse()
    plain.close()


def test_another_fleet(fleet: Fleet, tmp_path: Path) -> None:
    """Neither its certificates nor its tokens are of use, and it is told nothing of a token."""
    root = fleet.root()
    other = TestFleet(tmp_path / "other", "other")
    machine = other.admit("e" * 32)
    context = client_context(
        TrustDirectory(Path(root.config.node.data_dir)).root.read_bytes(),
        machine.directory.certificate,
        machine.directory.key,
    )
    with pytest.raises((OSError, http.client.HTTPException)):
        asked(root, context, "GET", "/v1/trust/root")
    hub = fleet.start("hub", "l2", "eu", "root")
    assert hub.http("POST", "/v1/trust/join", {"token": other.token()})[0] == 200
    wait_for(lambda: "is of another fleet than the token" in status(hub)["joining"], "it says so")
    assert hub.http("POST", "/v1/trust/join", {"token": "EB1XYZ"})[0] == 400


def test_what_a_token_is_not_for(fleet: Fleet) -> None:
    """The machine hears that it is refused, the operator hears why."""
    fleet.root()
    hub = fleet.start("hub", "l2", "eu", "root")
    assert hub.http("POST", "/v1/trust/join", {"token": fleet.token(region="us")})[0] == 200
    wait_for(lambda: "the log of its root says why" in status(hub)["joining"], "it is refused")
    assert status(hub)["node"] == ""


def test_too_many_bad_requests(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "REFUSAL_SECONDS", 0.0)
    root = fleet.root()
    machine = TestFleet(fleet.directory / "other").machine("e" * 32)
    request = TestFleet(fleet.directory / "third").request(machine, "")
    body = json.loads(msgspec.json.encode(request))
    codes = [
        asked(root, unverified_context(), "POST", "/v1/trust/join", body)[0] for _ in range(authority.MOST_BAD + 1)
    ]
    assert codes == [403] * authority.MOST_BAD + [503]


# ---- what certificates are for ----


def test_nodes_speak_for_themselves_only(fleet: Fleet) -> None:
    """A poll, a report and a question of another node, with a certificate of the fleet."""
    root = fleet.root()
    token = fleet.token()
    fleet.join("hub", "l2", "eu", "root", token)
    till = fleet.join("till", "local", "eu/1", "hub", token)
    hub, mine = fleet.nodes["hub"], of_node(till)
    uid = hub.broker.engine.node_uid
    poll = {"version": 1, "uid": "e" * 32, "name": "x", "level": "local", "topics": ["*"], "logs": []}
    answered, answer = asked(hub, mine, "POST", "/v1/pipe", poll)
    assert (answered, answer["code"]) == (409, "IDENTITY")
    answered, answer = asked(
        hub, mine, "POST", "/v1/pipe", {**poll, "uid": till.broker.engine.node_uid, "level": "pos"}
    )
    assert (answered, answer["code"]) == (409, "IDENTITY"), "another level than that of the certificate"
    report = {
        "uid": uid,
        "name": "x",
        "level": "l2",
        "version": "1",
        "boot": "0" * 16,
        "number": 10**15,
        "region": "eu",
    }
    batch = {"sender": till.broker.engine.node_uid, "session": "s", "number": 0, "nodes": [{"report": report}]}
    asked(hub, mine, "POST", "/v1/tree/reports", batch)
    assert all(node["uid"] != uid for node in hub.http("GET", "/v1/tree/nodes")[1]["nodes"])
    assert asked(root, mine, "POST", "/v1/registry", {"report": report})[0] == 409
    for path, body in (("/v1/registry/copy", None), ("/v1/fence", {"uid": uid, "name": "x", "logs": []})):
        assert asked(root, mine, "POST", path, body)[0] == 403


def test_a_store_is_nothing_to_another_one(fleet: Fleet) -> None:
    root = fleet.root()
    token = fleet.token()
    first = fleet.join("store-1", "pos", "eu/1", "root", token)
    second = fleet.join("till-2", "local", "eu/2", "root", token)
    answered, answer = asked(first, of_node(second), "POST", "/v1/pipe/topics")
    assert answered == 403, answer
    assert "may not do this at a pos node of region eu/1" in answer["error"]
    answered, _ = asked(second, of_node(first), "POST", "/v1/pipe/topics")
    assert answered == 403
    publish(root, "prices", 0, 1)
    fleet.stop("till-2")
    wrong = fleet.start("till-2", "local", "eu/2", "store-1")
    wait_for(lambda: "cannot be above" in wrong.http("GET", "/v1/pipe")[1]["parent"]["error"] or
             "answered 403" in wrong.http("GET", "/v1/pipe")[1]["parent"]["error"], "it says so")  # fmt: skip
    assert end(wrong, "prices") == -1


def test_another_place_needs_another_certificate(fleet: Fleet) -> None:
    fleet.root()
    fleet.join("hub", "l2", "eu", "root", fleet.token())
    fleet.stop("hub")
    hub = fleet.start("hub", "l2", "us", "root")
    assert "put the configuration back" in hub.http("GET", "/v1/node")[1]["problems"]["trust"]


# ---- revoking ----


def test_a_node_that_is_revoked_is_shut_out_everywhere(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """Also by nodes that have never seen it, and by those that start later; and it hears it."""
    root = fleet.root()
    token = fleet.token()
    hub = fleet.join("hub", "l2", "eu", "root", token)
    store = fleet.join("store", "pos", "eu/1", "hub", token)
    till = fleet.join("till", "local", "eu/1", "store", token)
    publish(root, "prices", 0, 3)
    follows(root, till, "prices")
    uid, mine = till.broker.engine.node_uid, of_node(till)
    assert main(["node", "revoke", "till", "--admin", root.admin]) == 0
    assert "till is revoked" in capsys.readouterr().out
    wait_for(lambda: all(one.broker.trust.topic.revoked(uid) for one in (root, hub, store)), "all know it")
    wait_for(lambda: "was revoked" in problems(till).get("trust", ""), "it hears it")
    wait_for(lambda: not store.broker.downstream.children, "it is cut off")
    publish(root, "prices", 3, 3)
    follows(root, store, "prices")
    for node in (root, hub, store):
        before = node.counters()["peers_refused"]
        with pytest.raises((OSError, http.client.HTTPException)):
            asked(node, mine, "POST", "/v1/pipe/topics")
        wait_for(lambda node=node, before=before: node.counters()["peers_refused"] > before, "refused")  # type: ignore[misc]
    assert end(till, "prices") == 3
    till.call(lambda: till.broker.trust._renew())
    wait_for(lambda: till.broker.trust._revoked, "also when it asks")
    fleet.stop("store")
    store = fleet.start("store", "pos", "eu/1", "hub")
    assert store.broker.trust.topic.revoked(uid), "from the start"
    assert main(["node", "approve", uid, "--admin", root.admin]) == 0
    wait_for(lambda: not store.broker.trust.topic.revoked(uid), "it may come again")


def test_a_parent_that_is_revoked(fleet: Fleet) -> None:
    root = fleet.root()
    token = fleet.token()
    fleet.join("hub", "l2", "eu", "root", token)
    till = fleet.join("till", "local", "eu/1", "hub", token)
    publish(root, "prices", 0, 3)
    follows(root, till, "prices")
    uid = fleet.nodes["hub"].broker.engine.node_uid
    assert root.http("POST", "/v1/trust/revoke", {"nodes": [uid]})[0] == 200
    wait_for(lambda: till.broker.trust.topic.revoked(uid), "the terminal hears it, from the hub itself")
    wait_for(lambda: not till.broker.mirroring.upstream.connected, "it leaves it")  # type: ignore[union-attr]


@pytest.mark.parametrize("node", ["nobody", "e" * 32])
def test_a_node_that_is_not_known_is_not_revoked(fleet: Fleet, node: str) -> None:
    root = fleet.root()
    for path in ("/v1/trust/revoke", "/v1/trust/approve"):
        status, answer = root.http("POST", path, {"nodes": [node]})
        assert (status, answer["error"]) == (409, f"no node {node} has joined")


def test_who_says_that_a_node_was_revoked_has_to_prove_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub on the way cannot make it up."""
    root = fleet.root()
    hub = fleet.join("hub", "l2", "eu", "root", fleet.token())
    monkeypatch.setattr(authority, "REFUSAL_SECONDS", 0.0)
    lie = authority.Failed("this node was revoked", "REVOKED")
    monkeypatch.setattr(
        authority.Authority, "_issue", lambda self, call, request: call.answer(authority.Response(403, lie))
    )
    hub.call(lambda: hub.broker.trust._renew())
    wait_for(lambda: "does not prove it" in status(hub)["joining"], "it is not believed")
    assert "trust" not in hub.http("GET", "/v1/node")[1]["problems"]
    publish(root, "prices", 0, 1)
    follows(root, hub, "prices")


def test_a_token_for_each_store(fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, file = fleet.root(), tmp_path / "stores.csv"
    create = ["token", "create", "--join", "--stores", str(file), "--admin", root.admin]
    file.write_text('region,uses,name\neu/1,6,"Main Street, 1"\neu/2,,Market\n')
    assert main(create) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "region,uses,token"
    assert [line.split(",")[:2] for line in lines] == [["eu/1", "6"], ["eu/2", "50"]]
    assert len({line.split(",")[2] for line in lines}) == 2
    for text, why in (
        ("name\nx\n", "has no column 'region'; its columns are name"),
        ("region\n", "has no stores; a line with a region is expected for each"),
        ("region,uses\neu/1,many\n", "line 2: no region, or uses that are not a number"),
        ("region,uses\neu/1,0\n", "line 2: no region, or uses that are not a number"),
        ("region,uses\neu/1\n", "line 2: 1 columns, and the header has 2"),
    ):
        file.write_text(text)
        assert main(create) == 2
        assert why in capsys.readouterr().err
    assert main(["token", "list", "--json", "--admin", root.admin]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2, "all or none"


def test_machines_that_wait_for_approval(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node_trust, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(authority, "REFUSAL_SECONDS", 0.0)
    root = fleet.root()
    hub = fleet.start("hub", "l2", "eu", "root")
    assert hub.http("POST", "/v1/trust/join", {"token": fleet.token(hold=True, label="wave1")})[0] == 200
    wait_for(lambda: "waits for approval" in status(hub)["joining"], "it waits")
    assert main(["fleet", "show", "--admin", root.admin]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "nodes:    1 joined, 1 wait for approval (edgebroker node approve), 0 revoked"
    assert lines[2] == "tokens:   wave1: 1 of 10 have joined"
    assert lines[4].split() == ["hub", "l2", "eu", hub.broker.engine.node_uid]
    assert main(["fleet", "show", "--json", "--admin", root.admin]) == 0
    assert json.loads(capsys.readouterr().out)["held"] == 1
    assert main(["fleet", "show", "--admin", hub.admin]) == 1
    assert "certificates are not issued here" in capsys.readouterr().err
    assert main(["node", "approve", "hub", "--admin", root.admin]) == 0
    wait_for(lambda: status(hub)["node"], "it has joined")


def test_no_client_writes_or_changes_what_the_fleet_decides(fleet: Fleet) -> None:
    root = fleet.root()
    hub = fleet.join("hub", "l2", "eu", "root", fleet.token())
    root.http("POST", "/v1/trust/revoke", {"nodes": ["hub"]})
    client = root.raw("client")
    assert client.publish("__trust", numbered(0, 1)).code is Code.UNKNOWN_TOPIC
    assert client.subscribe("__trust", "").code is Code.UNKNOWN_TOPIC
    for method, path, body in (
        ("DELETE", "/v1/topics/__trust", None), ("PATCH", "/v1/topics/__trust", {"retention_ms": 1}),
        ("POST", "/v1/topics/__trust/rename", {"name": "x"}),
        ("POST", "/v1/topics/__trust/snapshot", {"client_id": "__snapshot-1"}),
    ):  # fmt: skip
        assert root.http(method, path, body)[0] == 400, path
    assert hub.broker.engine.node_uid in root.broker.trust.topic._revoked


def test_a_stolen_node_erases_what_it_has(fleet: Fleet, tmp_path: Path) -> None:
    """It hears it from the node above, and ends; nothing is left, and a start makes an empty node."""
    root = fleet.root()
    hub = fleet.join("hub", "l2", "eu", "root", fleet.token())
    publish(root, "prices", 0, 10)
    token = tmp_path / "token"
    token.write_text(fleet.token())
    settings = {
        "EDGEBROKER_NODE_NAME": "till", "EDGEBROKER_NODE_LEVEL": "local", "EDGEBROKER_NODE_REGION": "eu/1",
        "EDGEBROKER_PIPE_PARENTS": hub.parent_address, "EDGEBROKER_TRUST_TOKEN_FILE": str(token),
    }  # fmt: skip
    till = BrokerProcess(tmp_path / "till", environment=settings)
    with till:
        wait_for(lambda: any(till.directory.glob("topics/prices/*/*.log")), "it has prices", JOIN_SECONDS)
        assert main(["node", "revoke", "till", "--erase", "--admin", root.admin]) == 0
        assert till.process is not None
        till.process.wait(JOIN_SECONDS)
    assert list(till.directory.rglob("*")) == []
    assert "its keys and all that it had stored" in till.log_path.read_text()
    with till:
        assert call(till.admin, "GET", "/v1/trust")["node"] == ""


def test_a_stolen_node_that_was_away_is_told_when_it_asks(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes above let it in no more; it asks for a certificate, and gets the word of the root."""
    monkeypatch.setattr(node_trust, "ALONE_SECONDS", 0.5)
    monkeypatch.setattr(node_trust, "TICK_SECONDS", 0.2)
    root = fleet.root()
    fleet.join("till", "local", "eu/1", "root", fleet.token())
    fleet.stop("till")
    assert root.http("POST", "/v1/trust/revoke", {"nodes": ["till"], "erase": True})[0] == 200
    till = fleet.start("till", "local", "eu/1", "root")
    wait_for(lambda: till.broker.trust.directory.erasing.exists(), "it is to be erased", JOIN_SECONDS)
    fleet.stop("till")
    assert erase_if_told(Path(till.config.node.data_dir))
    assert not erase_if_told(Path(till.config.node.data_dir))
    assert list(Path(till.config.node.data_dir).iterdir()) == []


def test_a_word_that_was_taken_back_erases_nothing(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in the topic, where both words come, nor from a node that has kept the old one."""
    monkeypatch.setattr(node_trust, "ERASE_SECONDS", 0.3)
    root = fleet.root()
    till = fleet.join("till", "local", "eu/1", "root", fleet.token())
    uid = till.broker.engine.node_uid
    fleet.stop("till")
    assert root.http("POST", "/v1/trust/revoke", {"nodes": ["till"], "erase": True})[0] == 200
    old = root.broker.trust.topic.record(f"revoked/{uid}")
    assert root.http("POST", "/v1/trust/approve", {"nodes": ["till"]})[0] == 200
    till = fleet.start("till", "local", "eu/1", "root")
    wait_for(lambda: f"revoked/{uid}" in till.broker.trust.topic.said, "both have come")
    said = authority.RevokedAnswer(error="x", record=old, issuer=root.broker.trust.topic.issuer(1))  # type: ignore[arg-type]
    monkeypatch.setattr(authority, "REFUSAL_SECONDS", 0.0)
    monkeypatch.setattr(
        authority.Authority, "_issue", lambda self, call, request: call.answer(authority.Response(403, said))
    )
    till.call(till.broker.trust._renew)
    wait_for(lambda: "does not prove it" in status(till)["joining"], "it is not believed")
    publish(root, "prices", 0, 1)
    follows(root, till, "prices")
    assert not till.broker.trust.erasing


def test_an_erasure_that_was_interrupted_is_ended(tmp_path: Path) -> None:
    till = BrokerProcess(tmp_path / "till")
    with till, Producer(till.server) as producer:
        producer.send("prices", b"1").result(SECONDS)
    files = TrustDirectory(till.directory)
    files.create()
    files.key.write_bytes(b"secret")
    (till.directory / "link").symlink_to(tmp_path)
    (tmp_path / "other").write_text("stays")
    files.erasing.touch()
    with till, Consumer(till.server, ["prices"], missing_topic="raise") as consumer, pytest.raises(AnswerError):
        consumer.poll(SECONDS)
    assert not files.key.exists()
    assert (tmp_path / "other").read_text() == "stays"
    assert "its keys and all that it had stored" in till.log_path.read_text()


def test_the_root_is_not_revoked(fleet: Fleet) -> None:
    root = fleet.root()
    answer = root.http("POST", "/v1/trust/revoke", {"nodes": [root.broker.engine.node_uid], "erase": True})
    assert answer == (409, {"error": "the root of the fleet cannot be revoked", "code": "CONFLICT"})


def test_a_node_that_has_joined_does_not_wait(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attempts without a certificate failed, and the next one was to come much later."""
    root = fleet.root()
    publish(root, "prices", 0, 1)
    monkeypatch.setattr(candidates, "FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(candidates, "LONGEST_PAUSE", 3600.0)
    till = fleet.start("till", "local", "eu/1", "root")
    wait_for(lambda: till.counters()["pipe_lost"], "an attempt fails")
    assert till.http("POST", "/v1/trust/join", {"token": fleet.token()})[0] == 200
    wait_for(lambda: end(till, "prices") == 1, "it follows", JOIN_SECONDS)


# ---- another issuer ----


def test_another_issuer(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pin stays, tokens stay, and nodes with certificates of before go on. The root key is offline otherwise."""
    root = fleet.root()
    token = fleet.token()
    hub = fleet.join("hub", "l2", "eu", "root", token)
    file, passphrase = tmp_path / "root.key", io.StringIO("correct horse battery\n" * 3)
    monkeypatch.setattr(sys, "stdin", passphrase)
    assert main(["fleet", "export-key", str(file), "--admin", root.admin]) == 0
    assert f"the root key is in {file} now, and not on this node" in capsys.readouterr().out
    assert main(["fleet", "rotate", "--admin", root.admin]) == 1
    assert "edgebroker fleet rotate --root-key FILE" in capsys.readouterr().err
    elsewhere = ["--admin", hub.admin]
    assert main(["fleet", "export-key", str(tmp_path / "other"), *elsewhere]) == 1
    assert "the root key is not here; it was taken away, or this node" in capsys.readouterr().err
    assert main(["fleet", "rotate", "--root-key", str(file), "--admin", root.admin]) == 0
    assert not root.broker.trust.directory.root_key.exists(), "only where it was"
    assert "issuer 2" in capsys.readouterr().out
    wait_for(lambda: status(root)["issuer"] == 2, "the root has a certificate of the new issuer")
    till = fleet.join("till", "local", "eu/1", "hub", token)
    assert (status(till)["issuer"], status(hub)["issuer"]) == (2, 1)
    publish(root, "prices", 0, 3)
    follows(root, till, "prices")
    hub.call(lambda: hub.broker.trust._renew())
    wait_for(lambda: status(hub)["issuer"] == 2, "renewed")
    assert root.http("POST", "/v1/trust/revoke", {"nodes": ["till"]})[0] == 200
    uid = till.broker.engine.node_uid
    wait_for(lambda: hub.broker.trust.topic.revoked(uid), "signed by the new issuer, and believed")


def test_an_issuer_that_was_stolen_is_retired(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has its key is not let in any more, and what it signs counts for nothing; nodes renew by themselves, also
    one that was away. What the root had decided stands."""
    monkeypatch.setattr(node_trust, "RETIRED_SECONDS", 0.5)
    monkeypatch.setattr(node_trust, "ALONE_SECONDS", 1.0)
    monkeypatch.setattr(node_trust, "TICK_SECONDS", 0.5)
    root = fleet.root()
    token = fleet.token(uses=20)
    hub = fleet.join("hub", "l2", "eu", "root", token)
    fleet.join("away", "l2", "us", "root", token)
    fleet.join("gone", "local", "eu/2", "hub", token)
    gone = fleet.nodes["gone"].broker.engine.node_uid
    assert root.http("POST", "/v1/trust/revoke", {"nodes": ["gone"]})[0] == 200
    wait_for(lambda: hub.broker.trust.topic.revoked(gone), "revoked")
    for name in ("away", "gone"):
        fleet.stop(name)
    # A thief has the key of issuer 1, and makes a hub with it.
    files = root.broker.trust.directory
    stolen, thief = Issuer(files), TrustDirectory(fleet.directory / "thief")
    thief.create()
    write_key(thief.key, make_key())
    name = NodeName("acme", "l2", "eu", "f" * 32)
    made = stolen.certify(name, read_key(thief.key).public_key(), NOW_MS)
    thief.root.write_bytes(made.root)
    thief.write_certificate(made.issued, made.chain)
    context = client_context(made.root, thief.certificate, thief.key)
    assert asked(hub, context, "POST", "/v1/pipe/topics")[0] == 200
    # What the thief plants at the hub comes with serials beyond those of the root.
    planted = {
        f"revoked/{gone}": b'{"serial": 1152921504606846976, "state": "joined"}',
        "principal/evil": b'{"serial": 1, "principal": {"allow": ["admin"]}}',
        "retired/2": b'{"serial": 1}',
    }
    forged = [
        SignedRecord(key=key, value=value, issuer=1, signature=stolen.sign(signed_text(key, value)))
        for key, value in planted.items()
    ]
    offset = hub.broker.trust.topic._in_force.offset
    hub.call(lambda: hub.broker.trust.topic._done(offset, forged, [True] * 3))
    assert (hub.broker.trust.topic.revoked(gone), "evil" in hub.broker.access.principals) == (False, True)
    assert not hub.broker.trust.topic.retired(2), "only a later issuer retires one"
    assert main(["fleet", "rotate", "--retire", "--admin", root.admin]) == 0
    assert "issuer 2 signs from now on" in capsys.readouterr().out
    wait_for(lambda: status(hub)["issuer"] == 2, "the hub renews", 40.0)
    for node in (root, hub):
        wait_for(lambda node=node: node.broker.trust.topic.retired(1), "it is retired")  # type: ignore[misc]
        with pytest.raises((OSError, http.client.HTTPException)):
            asked(node, context, "POST", "/v1/pipe/topics")
        wait_for(lambda node=node: node.broker.trust.topic.revoked(gone), "the word of the root counts")  # type: ignore[misc]
        assert "evil" not in node.broker.access.principals
        in_force = node.broker.trust.topic._in_force.records
        assert {one.issuer for key, one in in_force.items() if not key.startswith("issuer/")} == {2}
    key, value = "revoked/" + hub.broker.engine.node_uid, b'{"serial": 1152921504606846976, "state": "revoked"}'
    forged = SignedRecord(key=key, value=value, issuer=1, signature=stolen.sign(signed_text(key, value)))
    hub.call(lambda: hub.broker.trust.topic._done(0, [forged], [True]))
    assert not hub.broker.trust.topic.revoked(hub.broker.engine.node_uid)
    stolen.close()
    away = fleet.start("away", "l2", "us", "root")
    wait_for(lambda: status(away)["issuer"] == 2, "who was away renews when it is back", 60.0)
    publish(root, "prices", 0, 3)
    for node in (hub, away):
        follows(root, node, "prices")
    # Once more: those that were retired before stay so.
    assert main(["fleet", "rotate", "--retire", "--admin", root.admin]) == 0
    for node in (root, hub, away):
        topic = node.broker.trust.topic
        wait_for(lambda topic=topic: topic.retired(1) and topic.retired(2), "both are retired")  # type: ignore[misc]


def test_decisions_beside_a_retirement_stand(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is in force is signed again in many steps; what is decided meanwhile comes after it."""
    monkeypatch.setattr(decisions, "MOST_AT_ONCE", 2)
    root = fleet.root()
    for number in range(8):
        assert root.http("POST", f"/v1/access/app-{number}", {"allow": ["view"]})[0] == 200
    with ThreadPoolExecutor(4) as pool:
        retiring = pool.submit(root.http, "POST", "/v1/trust/rotate", {"retire": True})
        changes = [pool.submit(root.http, "DELETE", f"/v1/access/app-{number}") for number in range(4)]
        assert retiring.result()[0] == 200
        assert [change.result()[0] for change in changes] == [200] * 4
    assert sorted(root.broker.access.principals) == [f"app-{number}" for number in range(4, 8)]
    assert root.broker.trust.topic.retired(1)


# ---- the root is lost ----


def test_a_hub_that_is_promoted_has_the_others_below_it(fleet: Fleet) -> None:
    """Its certificate says l2 still: hubs of its level follow it, terminals of another region do not."""
    root = fleet.root()
    token = fleet.token()
    first = fleet.join("hub-a", "l2", "eu", "root", token)
    second = fleet.join("hub-b", "l2", "us", "root", token)
    publish(root, "prices", 0, 3)
    for hub in (first, second):
        follows(root, hub, "prices")
    poll = {"version": 1, "uid": second.broker.engine.node_uid, "name": "x", "level": "l2", "topics": ["*"], "logs": []}
    assert asked(first, of_node(second), "POST", "/v1/pipe", poll)[0] == 403, "not before"
    fleet.stop("root")
    assert first.http("POST", "/v1/promote", {"level": "root"})[0] == 200
    address = first.parent_address
    fleet.stop("hub-b")
    second = fleet.start("hub-b", "l2", "us", "hub-a")
    publish(first, "prices", 3, 3)
    follows(first, second, "prices")
    assert pipe(second)["parent"]["address"] == address


def test_a_root_that_is_restored_with_its_identity(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs from the backup, `trust` from a copy of its own: nodes follow, join and are revoked as before."""
    monkeypatch.setattr(publishing, "COMPARE_SECONDS", 2.0)
    root = fleet.root()
    token = fleet.token()
    fleet.join("hub", "l2", "eu", "root", token)
    publish(root, "prices", 0, 3)
    assert root.http("POST", "/v1/trust/revoke", {"nodes": ["hub"]})[0] == 200
    assert root.http("POST", "/v1/trust/approve", {"nodes": ["hub"]})[0] == 200
    assert main(["backup", str(tmp_path / "copy"), "--admin", root.admin]) == 0
    before = status(root)
    fleet.stop("hub")
    fleet.stop("root")
    shutil.copytree(tmp_path / "root" / "trust", tmp_path / "identity")
    shutil.rmtree(tmp_path / "root")
    assert main(["restore", str(tmp_path / "copy"), "--data-dir", str(tmp_path / "root")]) == 0
    shutil.copytree(tmp_path / "identity", tmp_path / "root" / "trust")
    root = fleet.root()
    assert status(root) == before
    hub = fleet.start("hub", "l2", "eu", "root")
    publish(root, "items", 0, 3)  # restored topics take no records for a while
    follows(root, hub, "items")
    fleet.join("store", "pos", "eu/1", "hub", token)
    wait_for(lambda: root.http("POST", "/v1/trust/revoke", {"nodes": ["store"]})[0] == 200, "so does __trust")
    uid = fleet.nodes["store"].broker.engine.node_uid
    wait_for(lambda: hub.broker.trust.topic.revoked(uid), "newer than what was said before")


# ---- clocks ----


@pytest.mark.parametrize("days", [-20_000, 25_000])
def test_a_clock_that_is_wrong_joins_and_follows(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """1970, and 2095."""
    root = fleet.root()
    publish(root, "prices", 0, 5)
    hub = fleet.start("hub", "l2", "eu", "root")
    real = hub.clock.wall_ms
    monkeypatch.setattr(hub.clock, "wall_ms", lambda: max(0, real() + days * DAY_MS))
    assert hub.http("POST", "/v1/trust/join", {"token": fleet.token()})[0] == 200
    wait_for(lambda: status(hub)["node"], "it joins")
    follows(root, hub, "prices")
    assert ("set the clock" in status(hub)["clock"]) == (days < 0)


@pytest.mark.parametrize(("days", "follows_on"), [(399, True), (401, False)])
def test_how_old_a_certificate_may_be(fleet: Fleet, tmp_path: Path, days: int, follows_on: bool) -> None:
    made = TestFleet(tmp_path / "made", now_ms=NOW_MS - 600 * DAY_MS)
    made.root.directory.path.rename(tmp_path / "kept")
    root = fleet.start("root", "root", trust__fleet="")
    assert status(root)["node"] == ""
    uid = root.broker.engine.node_uid
    fleet.stop("root")
    (tmp_path / "kept").rename(tmp_path / "root" / "trust")
    directory = TrustDirectory(tmp_path / "root")
    issuer = Issuer(directory)
    certified = issuer.admit(NodeName("acme", "root", "", uid), read_key(directory.key).public_key(), NOW_MS)
    directory.write_certificate(certified.issued, certified.chain)
    hub = fleet.start("hub", "l2", "eu")
    node_uid = hub.broker.engine.node_uid
    fleet.stop("hub")
    made.issuer = issuer
    machine = made.machine(node_uid, "l2", "eu")
    key = read_key(machine.directory.key).public_key()
    old = issuer.admit(NodeName("acme", "l2", "eu", node_uid), key, NOW_MS - (days + 90) * DAY_MS)
    made.store(machine, old)
    machine.directory.path.rename(tmp_path / "hub" / "trust")
    issuer.close()
    root = fleet.start("root", "root")
    publish(root, "prices", 0, 3)
    hub = fleet.start("hub", "l2", "eu", "root")
    hub.broker.trust._stopped = not follows_on  # it does not renew meanwhile
    if follows_on:
        follows(root, hub, "prices")
    else:
        wait_for(lambda: root.counters()["peers_refused"], "it is refused")
        assert end(hub, "prices") == -1
        hub.broker.trust._stopped = False
        hub.call(hub.broker.trust._go_on)
        follows(root, hub, "prices")


# ---- starting ----


def test_a_fleet_is_not_for_development(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.root()
    fleet.stop("root")
    monkeypatch.setenv(DEVELOPMENT, "1")
    config = config_for(fleet.directory / "root")
    broker = Broker(config, SystemClock())
    with pytest.raises(ConfigError, match=f"belongs to the fleet acme: remove {DEVELOPMENT}"):
        broker.trust.open()
    broker.loop.close()


@pytest.mark.parametrize("damage", ["key is missing", "rights", "another key", "certificate is damaged"])
def test_files_that_cannot_be_used(fleet: Fleet, damage: str) -> None:
    """The node starts, and says what to do."""
    fleet.root()
    fleet.stop("root")
    directory = TrustDirectory(fleet.directory / "root")
    if damage == "key is missing":
        directory.key.unlink()
    elif damage == "rights":
        directory.key.chmod(0o644)
    elif damage == "another key":
        other = TestFleet(fleet.directory / "other")
        directory.key.write_bytes(other.root.directory.key.read_bytes())
    else:
        directory.certificate.write_bytes(b"edgebroker {}\n")
    root = fleet.start("root", "root")
    assert "join the fleet again: edgebroker join TOKEN" in root.http("GET", "/v1/node")[1]["problems"]["trust"]
    assert status(root)["node"] == ""


def test_addresses_of_others_wait_for_the_certificate(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then clients are served on loopback, and nodes not at all."""
    root = fleet.root()
    token = fleet.token()
    with running(
        tmp_path / "hub",
        {
            "node.level": "l2",
            "node.region": "eu",
            "pipe.parents": root.parent_address,
            "listen.tcp": "0.0.0.0:0",
            "listen.pipe": "0.0.0.0:0",
        },
    ) as hub:
        listeners = hub.broker.listeners
        assert (listeners.tcp_address[0], listeners.pipe_address) == ("127.0.0.1", ("", 0))
        assert hub.http("POST", "/v1/trust/join", {"token": token})[0] == 200
        wait_for(lambda: listeners.pipe_address[0] == listeners.tcp_address[0] == "0.0.0.0", "they are opened")
        follows_topics = asked(hub, of_node(root), "POST", "/v1/pipe/topics")
        assert follows_topics[0] == 200
        hub.raw("local")  # a client of this machine needs no TLS
        monkeypatch.setattr(listeners_module, "is_local", lambda peer: False)
        before = hub.counters()["peers_refused"]
        monkeypatch.setattr(access_module, "is_local", lambda peer: False)
        for context in (of_node(root), unverified_context()):  # the certificate of a node is not a token
            with context.wrap_socket(socket.create_connection(("127.0.0.1", listeners.tcp_address[1]))) as client:
                client.settimeout(SECONDS)
                client.sendall(frames.write_connect(1, frames.Connect(1, 0, "far", b"", -1, -1, [])))
                answer = frames.read_ack(memoryview(client.recv(1000))[frames.HEADER_BYTES :])
                assert isinstance(answer, frames.Answer)
                assert answer.code is Code.UNAUTHORISED
        with socket.create_connection(("127.0.0.1", listeners.tcp_address[1])) as plain:
            plain.settimeout(SECONDS)
            plain.sendall(frames.write_connect(1, frames.Connect(1, 0, "far", b"", -1, -1, [])))
            with pytest.raises(ConnectionResetError):
                plain.recv(100)
        wait_for(lambda: hub.counters()["peers_refused"] == before + 1, "that is counted")
