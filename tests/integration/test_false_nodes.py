"""Nodes that are not what they say: who reports, polls, asks the registry or is repaired from is checked."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from edgebroker.cli.main import main
from edgebroker.pipe.fleet import NEW_AT_ONCE
from edgebroker.pipe.report import NOT_A_CHILD
from tests.integration.test_registry import joins, nodes, pass_time, root_of
from tests.kit.brokers import JSON, RunningBroker
from tests.kit.trees import RAW, Tree, batch, follows, pipe, polled, publish, reported
from tests.kit.waiting import SECONDS, wait_for

pytestmark = pytest.mark.slow
ELSEWHERE = ("127.0.0.2", 0)


@contextmanager
def asked_from_elsewhere(node: RunningBroker, path: str, body: object) -> Iterator[http.client.HTTPResponse]:
    """The answer to somebody at another address."""
    address = node.broker.listeners.pipe_address
    connection = http.client.HTTPConnection(*address, timeout=SECONDS, source_address=ELSEWHERE)
    try:
        connection.request("POST", path, json.dumps(body), JSON)
        with connection.getresponse() as answer:
            yield answer
    finally:
        connection.close()


def poll(uid: str) -> dict[str, Any]:
    return {"version": 1, "uid": uid, "name": "x", "level": "local", "topics": [], "logs": []}


def test_a_report_comes_from_a_child_with_its_poll(tree: Tree) -> None:
    root = root_of(tree)
    status, answer = root.pipe("POST", "/v1/tree/reports", batch({"report": RAW}))
    assert (status, answer["code"]) == (409, NOT_A_CHILD)
    with polled(root, uid="1" * 32, topics=[]):
        with asked_from_elsewhere(root, "/v1/tree/reports", batch({"report": RAW})) as found:
            assert found.status == 409 and json.loads(found.read())["code"] == NOT_A_CHILD
        assert nodes(root) == {}
        assert root.pipe("POST", "/v1/tree/reports", batch({"report": RAW}))[0] == 200
    assert root.pipe("POST", "/v1/tree/reports", batch({"report": RAW}))[0] == 200, "between two answers to its poll"
    root.advance(16.0)
    assert root.pipe("POST", "/v1/tree/reports", batch({"report": RAW}))[0] == 409


def test_a_connected_node_is_not_replaced_from_another_address(tree: Tree) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    hub = joins(tree, "l2", "root")
    follows(root, hub, "prices")
    stolen = poll(hub.broker.engine.node_uid)
    with asked_from_elsewhere(root, "/v1/pipe", stolen) as found:
        answer = json.loads(found.read())
        assert found.status == 503 and "connected from 127.0.0.1" in answer["error"], answer
    publish(root, "prices", 5, 5)
    follows(root, hub, "prices")
    assert pipe(hub)["parent"]["connected"]
    tree.stop("l2")
    root.advance(16.0)
    with asked_from_elsewhere(root, "/v1/pipe", stolen) as found:
        assert found.status == 200, "it has moved"


def gone(root: RunningBroker, seconds: float) -> None:
    """No child is connected, for so long."""
    wait_for(lambda: not root.broker.downstream.peers(), "its connection is over")
    root.advance(seconds)


def test_between_two_polls_its_place_is_kept_and_at_home_it_comes_first(tree: Tree) -> None:
    root = root_of(tree)
    uid = "7" * 32
    with polled(root, uid=uid, topics=[]):
        pass
    with asked_from_elsewhere(root, "/v1/pipe", poll(uid)) as found:
        assert found.status == 503, "a moment ago it was connected"
    gone(root, 16.0)
    with asked_from_elsewhere(root, "/v1/pipe", poll(uid)) as thief:
        assert thief.status == 200, "it was away"
        with polled(root, uid=uid, topics=[]) as home:
            assert home.status == 200, "this is where it comes from"
            with pytest.raises(http.client.IncompleteRead):  # the other one has to go
                thief.read()
            with asked_from_elsewhere(root, "/v1/pipe", poll(uid)) as again:
                assert again.status == 503
    gone(root, 16.0)
    for _ in range(50):  # it has moved for good
        with asked_from_elsewhere(root, "/v1/pipe", poll(uid)) as found:
            assert found.status == 200
        gone(root, 14.0)
    with polled(root, uid=uid, topics=[]) as home:
        assert home.status == 503


def test_a_poll_that_would_take_long_to_decode(tree: Tree) -> None:
    root = root_of(tree)
    with polled(root, known={f"t{number}": 1 for number in range(260_000)}) as answer:
        assert answer.status == 400 and b"more than 250000 values" in answer.read()


def test_who_asks_the_registry_is_not_a_hub(tree: Tree) -> None:
    """Anybody can ask, and say that it is a hub in a store's region."""
    root = root_of(tree)
    joins(tree, "l2", "root")
    asked = {**RAW, "uid": "5" * 32, "level": "local", "region": "north"}
    before = root.pipe("POST", "/v1/registry", {"report": asked})[1]["candidates"]
    false = {**RAW, "name": "false", "level": "pos", "region": "north", "address": "203.0.113.66:7421"}
    assert root.pipe("POST", "/v1/registry", {"report": false})[0] == 200
    known = {**false, "uid": tree.nodes["l2"].broker.engine.node_uid, "boot": "f" * 16, "number": 1 << 60}
    assert root.pipe("POST", "/v1/registry", {"report": known})[0] == 200
    assert root.pipe("POST", "/v1/registry", {"report": asked})[1]["candidates"] == before
    assert nodes(root).keys() == {"l2"}
    assert nodes(root)["l2"]["address"] == tree.address("l2")


def test_new_nodes_beyond_the_rate_are_told_of_later(tree: Tree) -> None:
    """A hub with thousands of nodes below it is believed, a little later."""
    root = root_of(tree)
    reports = [{"report": {**RAW, "uid": f"{number:032x}", "name": f"till-{number}"}} for number in range(9000)]
    sender, answers = "f" * 32, []
    for first in range(0, len(reports), 500):
        answers.append(reported(root, batch(*reports[first : first + 500], sender=sender)))
        if answers[-1][0] == 503:
            break
    assert NEW_AT_ONCE <= len(root.broker.tree.fleet.members) < len(reports)
    assert (answers[-1][0], "new nodes" in answers[-1][1]["error"]) == (503, True)
    known = {"report": {**reports[7]["report"], "number": 2}}
    assert reported(root, batch(known, sender=sender))[0] == 200
    root.advance(10.0)
    for rank in range(first, len(reports), 500):
        assert reported(root, batch(*reports[rank : rank + 500], sender=sender))[0] == 200
    assert len(root.broker.tree.fleet.members) == len(reports)


def test_nodes_that_are_gone_are_removed_in_bulk(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = root_of(tree)
    joins(tree, "l2", "root")
    gone = [
        {"report": {**RAW, "uid": f"{number:032x}", "name": f"till-{number}", "region": region}, "silent": 90_000.0}
        for number, region in enumerate(["north/1"] * 120 + ["south/1"] * 30)
    ]
    assert reported(root, batch(*gone, sender="f" * 32))[0] == 200
    admin = ["--admin", tree.admin("root")]
    assert main(["node", "remove", "--silent", "1d", "--label", "region=north", *admin]) == 0
    assert capsys.readouterr().out == "120 nodes removed\n"
    assert len(nodes(root)) == 31
    assert main(["node", "remove", "--silent", "2d", *admin]) == 0
    assert main(["node", "remove", "--silent", "1d", "--json", *admin]) == 0
    assert capsys.readouterr().out == '0 nodes removed\n{"removed": 30}\n'
    assert nodes(root).keys() == {"l2"}
    for wrong in (["node", "remove"], ["node", "remove", "x", "--silent", "1d"]):
        assert main([*wrong, *admin]) == 2
        assert "--silent 30d" in capsys.readouterr().err
    assert root.http("DELETE", "/v1/registry?silent=x")[0] == root.http("DELETE", "/v1/registry")[0] == 400
    tree.stop("root")
    assert nodes(root_of(tree)).keys() == {"l2"}, "over a restart"
    pass_time(tree, 4.0)
    wait_for(lambda: nodes(tree.nodes["root"])["l2"]["silent_seconds"] < 0, "it reports again")
