"""What reports, the registry and the view of the tree must bear: lost lines, dead hubs, full disks, odd input."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgebroker.broker.fleet.reports import Growth
from edgebroker.cli.main import main
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.peers import Peers
from edgebroker.network.io.loop import Loop
from edgebroker.pipe.fleet import Fleet
from edgebroker.pipe.report import Report, within_limit
from edgebroker.pipe.topology import Topology
from edgebroker.storage.types import DiskState
from tests.integration.test_registry import RAW, batch, joins, nodes, parent, pass_time, root_of, until
from tests.integration.test_registry import told as told_of
from tests.kit.brokers import JSON
from tests.kit.trees import Tree, follows, pipe, publish, reported, run
from tests.kit.waiting import wait_for
from tests.unit.pipe.test_fleet import BOOTS, TOP, report, state, uid

# ---- reports ----


def growth_changes(use: Any, hours: float = 24.0) -> int:
    growth, size, found, changes = Growth(), 100 << 30, None, 0
    for tick in range(int(hours * 1800)):
        now = 10.0 + tick * 2.0
        made = growth.disk(DiskState((50 << 30) - int(use(now)), size, 0, 0, 0), now)
        changes += made != found
        found = made
    return changes


def test_disk_days_of_an_idle_node() -> None:
    """200 MiB were written an hour after the start, then nothing at all."""
    changes = growth_changes(lambda now: (200 << 20) if now > 1800 else 0)
    assert changes < 30, changes


def test_disk_days_of_a_disk_that_fills_slowly() -> None:
    """10 MiB an hour, by another program, evenly."""
    changes = growth_changes(lambda now: now / 3600 * (10 << 20))
    assert changes < 30, changes


# ---- topology ----


def test_candidates_are_not_all_of_one_place() -> None:
    topology = Topology()
    topology.put(uid(1), "root", "", "root:1")
    topology.put(uid(2), "l2", "eu", "l2:1")
    for number in range(10, 22):
        topology.put(uid(number), "l3", "eu/north", f"l3-{number}:1")
    found = topology.candidates(uid(99), "pos", "eu/north/1")
    assert "root:1" in found or "l2:1" in found, found


# ---- HTTP: what is malformed ----


@pytest.mark.parametrize("name", ["\ud800", "a\x1b[2Jb"])
def test_a_name_that_is_no_text(tree: Tree, name: str) -> None:
    root = root_of(tree)
    reported(root, batch({"report": {**RAW, "name": name}}))
    assert root.http("GET", "/v1/tree/nodes")[0] == 200
    assert "\x1b" not in str(nodes(root).keys()).encode().decode("unicode_escape")


def test_deep_nesting(tree: Tree) -> None:
    import http.client

    root = root_of(tree)
    text = json.dumps(batch({"report": 7})).replace("7", "[" * 30000 + "]" * 30000)
    host, port = root.broker.listeners.pipe_address
    connection = http.client.HTTPConnection(host, port)
    connection.request("POST", "/v1/tree/reports", text, JSON)
    assert connection.getresponse().status == 400
    connection.close()


def test_a_report_that_is_too_big_does_not_stop_those_of_others(tree: Tree) -> None:
    """A hub takes a report that it cannot pass on."""
    import http.client

    root = root_of(tree)
    publish(root, "prices", 0, 5)
    hub = tree.start("l2", "root")
    follows(root, hub, "prices")
    until(tree, lambda: "l2" in nodes(root), "l2 is known")
    text = json.dumps(batch({"report": {**RAW, "labels": {}}}), separators=(",", ":"))
    text = text.replace('"labels":{}', '"x":"' + "x" * ((256 << 10) - len(text) - 5) + '"')
    host, port = hub.broker.listeners.pipe_address
    connection = http.client.HTTPConnection(host, port)
    connection.request("POST", "/v1/tree/reports", text, JSON)
    first = connection.getresponse().status
    connection.close()
    other = {**RAW, "uid": "3" * 32, "name": "other"}
    assert reported(hub, batch({"report": other}, sender="3" * 32))[0] == 200
    sent = []
    for _ in range(20):
        pass_time(tree, 10.0, 2.0)
        time.sleep(0.05)
        sent.append(hub.counters()["reports_sent"])
    assert "other" in nodes(root), (first, sent)


# ---- the tree ----


def test_a_terminal_that_does_not_come_back_with_its_store(tree: Tree) -> None:
    """Power is cut in a store; the POS comes back, the terminal does not."""
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    joins(tree, "pos", "root")
    joins(tree, "till", "pos", level="local")
    tree.stop("till")
    tree.stop("pos")
    until(tree, lambda: nodes(root)["till"]["silent_seconds"] > 0, "silent with its store", 5.0)
    told_of(tree, "pos", "root")
    until(tree, lambda: nodes(root)["pos"]["silent_seconds"] < 0, "pos is back", 5.0)
    pass_time(tree, 2400.0, 5.0)
    time.sleep(0.5)
    assert nodes(root)["till"]["silent_seconds"] > 0


def test_a_hub_forgets_who_has_moved_away(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    for name in ("a", "b"):
        joins(tree, name, "root", level="l3", **{"node.region": "north"})
    pos = joins(tree, "pos", "root", **{"node.region": "north/1"})
    until(tree, lambda: len(pipe(pos)["parent"]["candidates"]) == 3 and parent(pos) in "ab", "pos has a parent", 10.0)
    first = parent(pos)
    until(tree, lambda: "pos" in nodes(tree.nodes[first]), "its hub knows it")
    assert run(root, capsys, "node", "drain", first) == (0, {})
    until(tree, lambda: parent(pos) not in ("", first), "pos is moved")
    pass_time(tree, 300.0, 5.0)
    time.sleep(0.5)
    found = nodes(tree.nodes[first]).get("pos")
    assert found is None or found["silent_seconds"] < 0, found


def test_a_terminal_that_belongs_to_another_store_now(tree: Tree) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    joins(tree, "one", "root", level="pos", **{"node.region": "r/1"})
    joins(tree, "two", "root", level="pos", **{"node.region": "r/2"})
    till = joins(tree, "till", "root", level="local", **{"node.region": "r/1"})
    until(tree, lambda: parent(till) == "one", "the till is at its store", 10.0)
    tree.stop("till")
    till = told_of(tree, "till", "root", level="local", **{"node.region": "r/2"})
    until(tree, lambda: parent(till) == "two", "it goes to its new store", 5.0)


def test_draining_the_only_hub_cuts_nobody_off(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    pos = joins(tree, "pos", "root")
    main(["node", "drain", "root", "--admin", tree.admin("root")])
    pass_time(tree, 120.0, 2.0)
    publish(root, "prices", 5, 5)
    time.sleep(1.0)
    assert parent(pos) == "root", pipe(pos)["parent"]


def test_a_pin_to_a_dead_hub(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """The pinned hub dies: the node stays at the one that works."""
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    joins(tree, "a", "root", level="l3")
    pos = joins(tree, "pos", "root")
    assert main(["node", "pin", "pos", "a", "--admin", tree.admin("root")]) == 0
    until(tree, lambda: parent(pos) == "a", "pos is pinned", 5.0)
    tree.stop("a")
    until(tree, lambda: parent(pos) == "root", "pos has gone on", 2.0)
    before = pipe(pos)["parent"]["error"], pos.call(lambda: pos.broker.mirroring.upstream.connections)
    moved = 0
    for _ in range(200):
        pass_time(tree, 3.0, 3.0)
        time.sleep(0.05)
        moved += parent(pos) != "root"
    after = pos.call(lambda: pos.broker.mirroring.upstream.connections)
    assert moved <= 2 and after - before[1] < 12, (moved, before, after)


def test_a_pin_of_a_node_that_is_not_led_is_refused(tree: Tree) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    pos = tree.start("pos", "root")
    follows(root, pos, "prices")
    until(tree, lambda: "pos" in nodes(root), "pos is known")
    status, answer = root.http("PUT", "/v1/registry/pos/pins", {"parents": ["root"]})
    assert status != 200 or answer, "it says nothing of that it has no effect"


def test_a_line_that_drops_now_and_then(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub tells of 2,000 nodes; every fourth request is lost."""
    from edgebroker.broker.fleet import reports as reporting

    calls = []
    real = reporting.HttpCall

    def dropping(loop: Any, address: str, method: str, path: str, body: bytes, told_it: Any, **more: Any) -> Any:
        calls.append(len(body))
        if len(calls) % 4 == 0:
            address = "127.0.0.1:1"
        return real(loop, address, method, path, body, told_it, **more)

    root = tree.start("root")
    hub = tree.start("l2", "root")
    publish(root, "prices", 0, 5)
    follows(root, hub, "prices")
    reports = [
        {
            "report": {
                **RAW, "uid": f"{number:032x}", "name": f"till-{number}", "parent": hub.broker.engine.node_uid,
                "labels": {"filling": "x" * 40, "more": "y" * 40},
            }
        }
        for number in range(2000)
    ]  # fmt: skip
    monkeypatch.setattr(reporting, "HttpCall", dropping)
    for first in range(0, 2000, 250):
        assert reported(hub, batch(*reports[first : first + 250], sender=f"{first:032x}"))[0] == 200
    known = 0
    for _ in range(60):
        pass_time(tree, 10.0, 2.0)
        time.sleep(0.05)
        known = len(root.broker.tree.fleet.members)
        if known == 2001:
            break
    assert known == 2001, (known, len(calls), sum(calls))


def test_two_hubs_that_lost_a_node(tree: Tree) -> None:
    """The one that lost it later knows better, whoever speaks last."""
    fleet = Fleet(TOP)
    fleet.take(state(report(1, boot=BOOTS[1], parent=uid(8)), silent=60.0), uid(8), 0.0)
    fleet.take(state(report(1, boot=BOOTS[0], parent=uid(9)), silent=86400.0), uid(9), 1.0)
    assert fleet.silent_for(fleet.members[uid(1)], 1.0) == 61.0


def test_a_steady_lag_is_shown_as_it_is(tree: Tree) -> None:
    fleet = Fleet(TOP)
    fleet.take(state(report(1)), uid(1), 0.0)
    worst = 0.0
    for second in range(600):
        if second % 10 == 0:
            fleet.measured(uid(1), 2.0, float(second))
        worst = max(worst, fleet.lag(fleet.members[uid(1)], float(second)))
    assert worst < 13.0, worst


def test_a_group_that_stands_in_the_log_of_before_has_not_applied_the_new_one(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:

    from msgspec.structs import replace

    from edgebroker.common.errors import Code

    root = root_of(tree)
    publish(root, "prices", 0, 5)
    till = joins(tree, "till", "root", level="local")
    follows(root, till, "prices")
    for name in ("a", "b"):
        client = till.raw(name)
        client.subscribe("prices", name)
        assert client.acked(client.deliver().head, 5) is Code.OK
        till.drop(client)

    def other() -> None:
        places = till.broker.core.groups.find("b").committed_offsets
        places["prices", 0] = replace(places["prices", 0], log_id="f" * 32)

    till.call(other)
    pass_time(tree, 40.0, 2.0)
    time.sleep(0.5)
    pass_time(tree, 40.0, 2.0)
    assert run(root, capsys, "wait", "--topic", "prices", "--timeout", "0s")[0] == 1, nodes(root)["till"]


# ---- wait ----


def test_wait_does_not_take_a_deleted_topic_for_the_new_one(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """A topic is deleted and made again; a terminal that is cut off still has the old one."""
    root = root_of(tree)
    publish(root, "prices", 0, 50)
    till = joins(tree, "till", "root", level="local")
    follows(root, till, "prices")
    client = till.raw("labels")
    client.subscribe("prices", "labels")
    from edgebroker.common.errors import Code

    assert client.acked(client.deliver().head, 50) is Code.OK
    until(tree, lambda: run(root, capsys, "wait", "--topic", "prices", "--timeout", "0s")[0] == 0, "applied")
    tree.stop("till")
    assert main(["topic", "delete", "prices", "--yes", "--admin", tree.admin("root")]) == 0
    wait_for(lambda: root.http("GET", "/v1/topics/prices")[0] == 404, "deleted")
    publish(root, "prices", 1000, 5)
    pass_time(tree, 100.0, 5.0)
    capsys.readouterr()
    assert run(root, capsys, "wait", "--topic", "prices", "--timeout", "0s")[0] == 1


def test_a_fleet_that_is_full_is_not_complete(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    root = root_of(tree)
    publish(root, "prices", 0, 5)
    topics = [["prices", [5], [["g", [5], False]], 0]]
    assert reported(root, batch({"report": {**RAW, "topics": topics}}))[0] == 200
    root.call(lambda: setattr(root.broker.tree.fleet, "refused", 7))
    assert run(root, capsys, "wait", "--topic", "prices", "--timeout", "0s")[0] == 1


def test_the_view_says_what_a_report_left_out(tree: Tree) -> None:
    root = root_of(tree)
    big = [["big", [10**9] * 100, [[f"g{n}", [5] * 100, False] for n in range(9)], 3]]
    one = msgspec.convert({**RAW, "topics": big}, type=Report)
    raw = msgspec.to_builtins(within_limit(one))
    assert reported(root, batch({"report": raw}, sender="2" * 32))[0] == 200
    assert root.http("GET", "/v1/tree")[1]["worst"], raw


# ---- registry.db ----

OPEN = """
import sys, resource
from pathlib import Path
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.storage.types import DiskState
from edgebroker.storage.metadata.registry import RegistryStore
class Now:
    def call_soon_threadsafe(self, call): call()
    def call_later(self, *a): pass
    def now(self): return 0.0
store = RegistryStore(Path(sys.argv[1]), Now(), SystemClock())
if sys.argv[2] == "pin":
    store.load(); store.changes.pins["1" * 32] = ["2" * 32]; assert store.stop(5.0)
else:
    if sys.argv[2] == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try: print("pins", store.load().pins)
    except Exception as error: print("refused", repr(error))
    import os; os._exit(0)
"""


def opened(directory: Path, how: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", OPEN, str(directory), how], capture_output=True, text=True, check=True
    ).stdout


def test_a_full_disk_at_start_does_not_lose_the_pins(tmp_path: Path) -> None:
    opened(tmp_path, "pin")
    assert "2222" in opened(tmp_path, "read")
    opened(tmp_path, "full")
    assert "2222" in opened(tmp_path, "read"), sorted(one.name for one in tmp_path.iterdir())


def test_a_locked_registry_does_not_lose_the_pins(tmp_path: Path) -> None:
    opened(tmp_path, "pin")
    other = sqlite3.connect(tmp_path / "registry.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    opened(tmp_path, "read")
    other.close()
    assert "2222" in opened(tmp_path, "read"), sorted(one.name for one in tmp_path.iterdir())


def test_a_newer_schema_does_not_lose_the_pins(tmp_path: Path) -> None:
    opened(tmp_path, "pin")
    other = sqlite3.connect(tmp_path / "registry.db")
    other.execute("PRAGMA user_version=2")
    other.close()
    opened(tmp_path, "read")
    assert not list(tmp_path.glob("*corrupt*"))


# ---- a slow line, a watch over many, what is not known yet ----


def test_a_batch_that_goes_up_slowly_but_goes_on() -> None:
    """`silence` is a time without progress, not the time for the whole of the body."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server.bind(("127.0.0.1", 0))
    server.listen()

    def serve() -> None:
        sock, taken = server.accept()[0], 0
        with sock:
            while taken < 4 << 20:
                taken += len(sock.recv(1 << 18)) or 4 << 20
                time.sleep(0.05)
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            sock.recv(1)

    serving = threading.Thread(target=serve)
    serving.start()
    loop, heard = Loop(SystemClock()), []

    def told_it(status: int, answer: bytes, error: str) -> None:
        heard.append((status, error))
        loop.stop()

    address = f"127.0.0.1:{server.getsockname()[1]}"
    HttpCall(Peers(loop, open=True), address, "POST", "/x", b"x" * (4 << 20), told_it, silence=0.5)
    loop.run()
    loop.close()
    serving.join(10.0)
    server.close()
    assert heard == [(200, "")]


def test_wait_after_a_restart_does_not_call_the_first_ones_all(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """Nodes with configured parents, no registry: after a restart a node knows only those that have spoken."""
    from edgebroker.common.errors import Code

    root = tree.start("root")
    publish(root, "prices", 0, 5)
    for name in ("a", "b"):
        till = tree.start(name, "root", level="local")
        follows(root, till, "prices")
        if name == "a":
            client = till.raw("labels")
            client.subscribe("prices", "labels")
            assert client.acked(client.deliver().head, 5) is Code.OK
    until(tree, lambda: len(nodes(root)) == 2 and nodes(root)["a"]["waiting"] == {}, "both are known")
    pass_time(tree, 30.0, 2.0)
    assert run(root, capsys, "wait", "--topic", "prices", "--timeout", "0s")[0] == 1
    tree.stop("b")
    tree.stop("root")
    root = tree.start("root")
    until(tree, lambda: "a" in nodes(root), "one is back")
    assert run(root, capsys, "wait", "--topic", "prices", "--timeout", "0s")[0] == 1
