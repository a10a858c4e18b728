"""Real brokers that mirror each other: topics appear, records follow, and every difference is found and dealt with."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest

from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from edgebroker.common.messages import GapReason, Start
from edgebroker.network.http.client import HttpClient
from edgebroker.network.wire.frames import Gap
from tests.kit.brokers import RunningBroker, numbered
from tests.kit.trees import LEVELS, Tree, chain, digest, end, follows, line, pipe, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


def test_five_levels(tree: Tree) -> None:
    """What is published at the top is at the bottom, byte for byte, also a topic that is made while they are up."""
    nodes = [tree.start("root")]
    publish(nodes[0], "prices", 0, 100, size=200)
    nodes[0].create("items", partitions=3, kind="table", urgent=True)
    for upper, lower in pairwise(LEVELS):
        nodes.append(tree.start(lower, upper))
    for number in range(30):
        publish(nodes[0], "prices", 100 + number * 10, 10, size=1500)
        publish(nodes[0], "items", number, 1, partition=number % 3)
    publish(nodes[0], "late", 0, 5)
    for upper, lower in pairwise(nodes):
        for topic, partition in [("prices", 0), ("items", 0), ("items", 1), ("items", 2), ("late", 0)]:
            follows(upper, lower, topic, partition)
    bottom = nodes[-1]
    assert (
        bottom.http("GET", "/v1/topics/items")[1]["settings"] == nodes[0].http("GET", "/v1/topics/items")[1]["settings"]
    )
    client = bottom.raw("till")
    client.subscribe("prices", "tills")
    offsets: list[int] = []
    while len(offsets) < 400:
        offsets += client.deliver().offsets
    assert offsets == list(range(400))
    refused = client.publish("prices", numbered(0, 1))
    assert (refused.code, nodes[0].broker.engine.node_uid in refused.message) == (Code.NOT_ORIGIN, True)
    assert bottom.http("PATCH", "/v1/topics/prices", {"retention_ms": 5})[0] == 409
    assert pipe(bottom)["parent"]["path"] == [node.broker.engine.node_uid for node in reversed(nodes[:-1])]
    assert [child["name"] for child in pipe(nodes[0])["children"]] == ["l2"]
    for name in reversed(LEVELS):
        tree.stop(name)
    for topic, partition in [("prices", 0), ("items", 0), ("items", 1), ("items", 2), ("late", 0)]:
        assert len({digest(tree, name, topic, partition) for name in LEVELS}) == 1
    assert list((tree.directory / "local" / "topics" / "prices" / "0").glob("*.log"))


def test_settings_and_snapshots_travel(tree: Tree) -> None:
    root = tree.start("root")
    root.create("stock", kind="table")
    child = tree.start("l2", "root")
    publish(root, "stock", 0, 5)
    follows(root, child, "stock")
    assert root.http("PATCH", "/v1/topics/stock", {"retention_ms": 12345})[0] == 200
    wait_for(lambda: child.broker.engine.partitions("stock")[0].settings.retention_ms == 12345, "the settings")
    begun = root.http("POST", "/v1/topics/stock/snapshot", {"client_id": "__snapshot-1"})[1]
    plan = {"source": "content", "keys": 3}
    assert root.http("PUT", f"/v1/topics/stock/snapshot/{begun['id']}", plan)[0] == 200
    writer = root.raw("__snapshot-1")
    writer.publish("stock", numbered(0, 3))
    assert root.http("POST", f"/v1/topics/stock/snapshot/{begun['id']}")[0] == 200
    wait_for(lambda: child.broker.engine.partitions("stock")[0].identity.snapshot == (5, 10), "the snapshot")
    assert end(child, "stock") == 10


def test_only_what_is_wanted(tree: Tree) -> None:
    root = tree.start("root")
    for topic in ("prices", "prices-old", "sales", "items"):
        publish(root, topic, 0, 3)
    child = tree.start("l2", "root", pipe__topics="prices*, items")
    for topic in ("prices", "prices-old", "items"):
        follows(root, child, topic)
    assert sorted(child.broker.engine.topics()) == ["items", "prices", "prices-old"]


def test_a_parent_that_comes_back(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "prices", 0, 50, size=2000)
    child = tree.start("l2", "root")
    follows(root, child, "prices")
    tree.stop("root")
    client = child.raw("till")
    client.subscribe("prices", "tills")
    assert client.deliver().offsets[0] == 0, "what is here is served without a parent"
    root = tree.start("root")
    publish(root, "prices", 50, 10)
    follows(root, child, "prices")
    assert child.counters()["pipe_bytes_wasted"] == 0
    tree.stop("l2")
    publish(root, "prices", 60, 10)
    child = tree.start("l2", "root")
    follows(root, child, "prices")


def test_failover_to_the_next_parent(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "prices", 0, 5)
    upper = tree.start("l2", "root")
    follows(root, upper, "prices")
    child = tree.start("l3", "l2", "root")
    follows(root, child, "prices")
    tree.stop("l2")
    publish(root, "prices", 5, 5)
    follows(root, child, "prices")
    assert pipe(child)["parent"]["name"] == "root"
    wait_for(lambda: child.counters()["pipe_failovers"] == 1, "it is counted")
    tree.start("l2", "root")
    child.advance(30.0)
    wait_for(lambda: child.broker.mirroring.upstream.candidates._healthy_since, "it is seen again")  # type: ignore[union-attr]
    child.advance(301.0)
    child.advance(1.0)
    wait_for(lambda: pipe(child)["parent"]["name"] == "l2" and pipe(child)["parent"]["connected"], "it is back")


def test_a_restored_parent_that_went_on(tree: Tree) -> None:
    """ROOT's directory is copied, goes on, is put back, and goes on differently: no log is a mixture of both."""
    root = tree.start("root")
    publish(root, "prices", 0, 100, size=300)
    upper = tree.start("l2", "root")
    lower = tree.start("l3", "l2")
    follows(root, lower, "prices")
    tree.stop("root")
    tree.keep("root")
    root = tree.start("root")
    for number in range(20):
        publish(root, "prices", 1000 + number * 50, 50, size=100)
    follows(root, lower, "prices")
    client = lower.raw("till")
    client.subscribe("prices", "tills")
    while client.deliver().head.last < 1099:
        pass
    assert client.acked(client.assigned(), 1100) is Code.OK
    tree.stop("root")
    tree.stop("l2")
    tree.put_back("root")
    root = tree.start("root")
    for number in range(25):
        publish(root, "prices", 5000 + number * 50, 50, size=90)
    upper = tree.start("l2", "root")
    follows(root, upper, "prices")
    follows(root, lower, "prices")
    wait_for(
        lambda: lower.broker.engine.log("prices", 0).chain == root.broker.engine.log("prices", 0).chain, "the same"
    )
    again = client.deliver()
    assert again.head.first == 100, "the group goes back to where the logs part"
    assert lower.counters()["log_truncations"] == 1
    for name in ("l3", "l2", "root"):
        tree.stop(name)
    assert len({digest(tree, name, "prices") for name in ("root", "l2", "l3")}) == 1


def test_an_origin_that_lost_history(tree: Tree) -> None:
    """Nothing is published over what children have, until an operator accepts the loss; then they cut it off."""
    root = tree.start("root")
    publish(root, "prices", 0, 10)
    child = tree.start("l2", "root")
    follows(root, child, "prices")
    tree.stop("root")
    tree.keep("root")
    root = tree.start("root")
    publish(root, "prices", 10, 10)
    follows(root, child, "prices")
    tree.stop("root")
    tree.put_back("root")
    root = tree.start("root")
    wait_for(lambda: line(child, "prices")["state"] == "behind", "the child is ahead")
    wait_for(lambda: "history_lost" in root.http("GET", "/v1/node")[1]["problems"], "it has shown what it has")
    producer = root.raw("producer")
    refused = producer.publish("prices", numbered(0, 1))
    assert (refused.code, "topic accept prices" in refused.message) == (Code.HISTORY_LOST, True)
    assert "prices/0" in root.http("GET", "/v1/node")[1]["problems"]["history_lost"]
    assert end(child, "prices") == 20
    assert root.http("POST", "/v1/topics/prices/accept")[0] == 200
    assert producer.publish("prices", numbered(100, 3)).offset == 10
    follows(root, child, "prices")
    assert child.broker.engine.log("prices", 0).epoch == 2  # type: ignore[union-attr]
    assert root.http("POST", "/v1/topics/prices/accept")[0] == 404


def test_a_log_that_was_made_again(tree: Tree) -> None:
    """Another log_id is not followed by itself; the old data is served on until an operator accepts the new one."""
    root = tree.start("root")
    publish(root, "prices", 0, 10)
    child = tree.start("l2", "root")
    follows(root, child, "prices")
    tree.stop("root")
    shutil.rmtree(tree.directory / "root")
    root = tree.start("root")
    publish(root, "prices", 500, 30)
    wait_for(lambda: line(child, "prices")["state"] == "replaced", "it is noticed")
    assert end(child, "prices") == 10
    assert "prices" in child.http("GET", "/v1/node")[1]["problems"]["replaced"]
    client = child.raw("till")
    client.subscribe("prices", "tills")
    assert client.deliver().offsets == list(range(10))
    tree.stop("l2")
    child = tree.start("l2", "root")
    wait_for(lambda: line(child, "prices")["state"] == "replaced", "also after a restart")
    client = child.raw("till")
    client.subscribe("prices", "tills")
    assert child.http("POST", "/v1/topics/prices/accept")[0] == 200
    follows(root, child, "prices")
    assert client.reset().topic == "prices", "its readers begin again"
    assert "replaced" not in child.http("GET", "/v1/node")[1]["problems"]


def test_what_the_parent_has_removed(tree: Tree) -> None:
    root = tree.start("root", storage__retention_bytes=200_000)
    publish(root, "prices", 0, 5)
    child = tree.start("l2", "root")
    follows(root, child, "prices")
    till = child.raw("till")
    till.subscribe("prices", "tills")
    assert till.acked(till.deliver().head, 2) is Code.OK
    tree.stop("l2")
    for number in range(20):
        publish(root, "prices", number, 20, size=2000)
    wait_for(lambda: root.broker.engine.log("prices", 0).log_start > 5, "retention")  # type: ignore[union-attr]
    child = tree.start("l2", "root")
    follows(root, child, "prices")
    log = child.broker.engine.log("prices", 0)
    assert log is not None and log.log_start == 0, "what it had it keeps"
    assert [(gap.first, gap.next) for gap in log.identity.gaps] == [
        (5, root.broker.engine.log("prices", 0).log_start)  # type: ignore[union-attr]
    ]
    assert (child.counters()["log_gaps"], child.counters()["logs_recreated"]) == (1, 0)
    tree.stop("l2")
    child = tree.start("l2", "root")
    publish(root, "prices", 0, 1)
    follows(root, child, "prices")
    leaf = tree.start("l3", "l2")
    follows(root, leaf, "prices")
    assert leaf.broker.engine.log("prices", 0).identity.gaps == log.identity.gaps  # type: ignore[union-attr]
    for node, first in ((child, 2), (leaf, 0)):
        reader = node.raw("reader")
        reader.subscribe("prices", "tills", start=Start.COMMITTED)
        offsets: list[int] = []
        gaps: list[Gap] = []
        while not offsets or offsets[-1] < end(root, "prices") - 1:
            found = reader.deliver()
            offsets += [offset for offset in found.offsets if offset >= found.head.first]
            gaps += found.head.gaps
        behind = log.identity.gaps[0].next
        assert offsets == [*range(first, 5), *range(behind, end(root, "prices"))], "what was here, and what came"
        assert gaps == [Gap(5, behind - 1, GapReason.RETENTION)], "told once"
    described = child.http("GET", "/v1/topics/prices")[1]["partitions"][0]
    assert described["gaps"] == [{"first": 5, "last": behind - 1}]
    for name in ("l3", "l2"):
        tree.stop(name)
        assert main(["log", "verify", str(tree.directory / name)]) == 0


def test_a_topic_of_both(tree: Tree) -> None:
    root = tree.start("root")
    child = tree.start("l2", "root")
    publish(child, "local-notes", 0, 3)
    publish(root, "local-notes", 0, 9)
    publish(root, "prices", 0, 4)
    follows(root, child, "prices")
    wait_for(lambda: "name_clash" in child.http("GET", "/v1/node")[1]["problems"], "the clash is told")
    assert end(child, "local-notes") == 3


@pytest.mark.parametrize("file", ["meta.db*", "offsets.snap"])
def test_without_metadata_nothing_is_fetched_twice(tree: Tree, file: str) -> None:
    """On each node in turn: no new log_id, no refresh, no group moves forward."""
    root = tree.start("root")
    publish(root, "prices", 0, 200, size=1000)
    tree.start("l2", "root")
    lower = tree.start("l3", "l2")
    follows(root, lower, "prices")
    client = lower.raw("till")
    client.subscribe("prices", "tills")
    head = client.deliver().head
    assert client.acked(head, 20) is Code.OK
    for name, parents in [("l3", ["l2"]), ("l2", ["root"]), ("root", [])]:
        tree.stop(name)
        for path in (tree.directory / name).glob(file):
            path.unlink()
        node = tree.start(name, *parents)
        publish(tree.nodes["root"], "prices", 0, 1)
        follows(tree.nodes["root"], tree.nodes["l3"], "prices")
        counters = node.counters()
        assert (counters["log_truncations"], counters["logs_recreated"], counters["pipe_bytes_wasted"]) == (0, 0, 0)
        assert counters["pipe_bytes_in"] < 1000
    assert len({tree.nodes[name].broker.engine.log("prices", 0).identity.log_id for name in tree.nodes}) == 1
    lines = tree.nodes["l3"].http("GET", "/v1/groups/tills")[1]["partitions"]
    assert lines[0]["committed"] <= 20


def test_a_full_disk_pauses_the_pipe(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree.start("root")
    publish(root, "prices", 0, 5)
    child = tree.start("l2", "root")
    follows(root, child, "prices")
    monkeypatch.setattr(child.broker.engine, "refusal", lambda: (Code.DISK_FULL, "as told by the test"))
    publish(root, "prices", 5, 5, size=2000)
    child.advance(2.0)
    assert end(child, "prices") == 5
    monkeypatch.undo()
    child.advance(2.0)
    follows(root, child, "prices")
    assert child.counters()["pipe_bytes_wasted"] == 0


def test_refused_parents(tree: Tree) -> None:
    tree.start("pos")
    child = tree.start("l2", "pos")
    wait_for(lambda: "409" in pipe(child)["parent"]["error"], "a node below cannot be a parent")
    assert tree.nodes["pos"].pipe("POST", "/v1/pipe", {"version": 7})[0] == 400
    tree.stop("pos")
    wait_for(lambda: "refused" in pipe(child)["parent"]["error"].lower(), "nobody is there")


def test_too_many_children(tree: Tree) -> None:
    tree.start("root", pipe__max_children=0)
    child = tree.start("l2", "root")
    wait_for(lambda: "503" in pipe(child)["parent"]["error"], "it is told to come later")


def test_a_cap(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "prices", 0, 300, size=1000)
    child = tree.start("l2", "root", pipe__bytes_per_second=1_000_000)
    follows(root, child, "prices")


def test_a_line_that_waits_for_the_disk_is_measured_on(tree: Tree) -> None:
    """Else a fast line would never be known as one: frames would stay small."""
    root = tree.start("root")
    publish(root, "prices", 0, 1)
    follows(root, tree.start("l2", "root"), "prices")

    def pumped(cold: bool) -> float:
        child = next(iter(root.broker.downstream.children))
        child._busy_since = 5.0
        child._cold = set(child.feed.cursors.values()) if cold else set()
        child.pump(1000)
        child._cold = set()
        return child._busy_since

    assert root.call(lambda: pumped(True)) == 5.0
    assert root.call(lambda: pumped(False)) == 0.0


def test_hours(tree: Tree) -> None:
    """Outside of the hours only what is urgent comes; they begin and end while the line is up."""
    root = tree.start("root")
    second = 12 * 3600.0
    root.broker.downstream.second_of_day = lambda: second  # type: ignore[method-assign]
    root.create("items", kind="table", urgent=True)
    publish(root, "prices", 0, 30)
    publish(root, "items", 0, 3)
    child = tree.start("l2", "root", pipe__hours="22:00-06:00")
    follows(root, child, "items")
    wait_for(lambda: line(child, "prices")["state"] == "waiting", "it is not the time for it")
    assert "22:00-06:00" in line(child, "prices")["why"] and end(child, "prices") == 0
    second = 22 * 3600.0 - 10
    root.advance(121.0)  # the answer is over; the next one ends when the hours begin
    publish(root, "items", 3, 1)
    follows(root, child, "items")
    polls = root.counters()["pipe_polls"]
    second = 22 * 3600.0 + 1
    root.advance(11.0)
    follows(root, child, "prices")
    assert (line(child, "prices")["state"], root.counters()["pipe_polls"] > polls) == ("live", True)
    publish(root, "prices", 100, 1)
    follows(root, child, "prices")
    second = 6 * 3600.0 - 5
    root.advance(121.0)
    wait_for(lambda: root.counters()["pipe_polls"] > polls + 1, "it polls in the last seconds")
    second = 6 * 3600.0
    root.advance(6.0)
    wait_for(lambda: line(child, "prices")["state"] == "waiting", "the hours are over")
    publish(root, "prices", 200, 1)
    publish(root, "items", 4, 1)
    follows(root, child, "items")
    assert end(child, "prices") == 31


def test_root_is_lost_and_a_hub_takes_its_place(tree: Tree) -> None:
    """Nothing that was mirrored is lost; what only the old ROOT had it gives up when it comes back below."""
    root, hub = tree.start("root"), tree.start("l2", "root")
    root.create("items", partitions=2, kind="table")
    publish(root, "prices", 0, 20)
    publish(root, "items", 0, 5, partition=1)
    store = tree.start("l3", "root", "l2")
    for topic, partition in (("prices", 0), ("items", 1)):
        follows(root, hub, topic, partition)
        follows(root, store, topic, partition)
    tree.stop("l2")
    tree.stop("l3")
    publish(root, "prices", 100, 5)  # nobody else has these
    tree.stop("root")
    hub = tree.start("l2", "root")
    assert hub.http("POST", "/v1/promote", {"level": "pos"})[0] == 409
    status, answer = hub.http("POST", "/v1/promote", {"level": "sideways"})
    assert (status, answer["code"]) == (400, "INVALID")
    assert "'sideways'" in answer["error"]
    producer = hub.raw("producer")
    assert producer.publish("prices", numbered(0, 1)).code is Code.NOT_ORIGIN
    assert hub.http("POST", "/v1/promote", {"level": "root"}) == (200, {})
    assert producer.publish("prices", numbered(200, 3)).offset == 20
    assert producer.publish("items", numbered(0, 1), partition=1).offset == 5
    assert hub.http("GET", "/v1/node")[1]["level"] == "root"
    store = tree.start("l3", "root", "l2")
    follows(hub, store, "prices")
    tree.stop("l2")
    hub = tree.start("l2", "root")
    assert hub.http("GET", "/v1/node")[1]["level"] == "root", "also after a restart, whatever its configuration says"
    assert pipe(hub)["parent"] is None
    publish(hub, "prices", 300, 2)
    old = tree.start("root", "l2", level="l2")
    follows(hub, old, "prices")
    follows(hub, old, "items", 1)
    follows(hub, store, "prices")
    # Its end is the same before it gives anything up.
    wait_for(lambda: chain(old, "prices") == chain(hub, "prices"), "it has the same records")
    assert chain(store, "prices") == chain(hub, "prices")
    assert old.raw("producer").publish("prices", numbered(0, 1)).code is Code.NOT_ORIGIN
    client = old.raw("till")
    client.subscribe("prices", "tills")
    offsets: list[int] = []
    while not offsets or offsets[-1] < 24:
        offsets += client.deliver().offsets
    assert offsets == list(range(25))
    assert hub.http("DELETE", "/v1/promote") == (200, {})
    assert hub.http("DELETE", "/v1/promote")[0] == 409
    for name in ("root", "l3", "l2"):
        tree.stop(name)
    assert len({digest(tree, name, "prices") for name in ("root", "l2", "l3")}) == 1


def newest(node: RunningBroker, topic: str) -> int:
    """The number of the newest history of a log."""
    found = node.broker.engine.log(topic, 0)
    assert found is not None
    return found.identity.epoch


@pytest.mark.parametrize("restart", [False, True], ids=["at-once", "after-a-restart"])
def test_a_promotion_that_was_a_mistake_is_undone(tree: Tree, restart: bool) -> None:
    """The parent is alive, and nothing was published at the promoted node: it follows again, and so do those below."""
    root, hub = tree.start("root"), tree.start("l2", "root")
    root.create("items", partitions=2, kind="table")
    publish(root, "prices", 0, 20)
    publish(root, "items", 0, 5, partition=1)
    store = tree.start("l3", "l2")
    for topic, partition in (("prices", 0), ("items", 1)):
        follows(root, store, topic, partition)
    assert hub.http("POST", "/v1/promote", {"level": "root"}) == (200, {})
    wait_for(lambda: newest(store, "prices") == 2, "the new history")
    if restart:
        tree.stop("l2")
        hub = tree.start("l2", "root")
    assert hub.http("DELETE", "/v1/promote") == (200, {})
    tree.stop("l2")
    publish(root, "prices", 100, 5)
    hub = tree.start("l2", "root")
    publish(root, "prices", 200, 5)
    publish(root, "items", 200, 5, partition=1)
    for topic, partition in (("prices", 0), ("items", 1)):
        follows(root, hub, topic, partition)
        follows(root, store, topic, partition)
    assert hub.http("GET", "/v1/node")[1]["problems"] == store.http("GET", "/v1/node")[1]["problems"] == {}
    assert hub.raw("producer").publish("prices", numbered(0, 1)).code is Code.NOT_ORIGIN
    for name in ("l3", "l2", "root"):
        tree.stop(name)
    assert len({digest(tree, name, "prices") for name in ("root", "l2", "l3")}) == 1


def test_a_child_does_not_say_the_same_again(tree: Tree) -> None:
    """The next poll with nothing new takes a hundred bytes; a parent that forgot says so."""
    root = tree.start("root")
    for number in range(20):
        publish(root, f"topic-{number}", 0, 3)
    child = tree.start("l2", "root")
    for number in range(20):
        follows(root, child, f"topic-{number}")
    bodies: list[int] = []
    client = child.broker.mirroring.upstream._client  # type: ignore[union-attr]
    real = client.request

    def request(method: str, path: str, body: bytes) -> None:
        bodies.append(len(body))
        real(method, path, body)

    client.request = request  # type: ignore[method-assign]

    def polls(count: int) -> None:
        before = root.counters()["pipe_polls"]

        def look() -> bool:
            root.advance(10.0)
            child.advance(10.0)
            return bool(root.counters()["pipe_polls"] >= before + count)

        wait_for(look, "the child polls again")

    polls(3)
    assert bodies[-1] < 120, bodies
    root.call(root.broker.downstream._polls.clear)
    polls(1)
    wait_for(lambda: bodies[-1] > 1000, "all of it is said again")
    publish(root, "topic-7", 3, 5)
    follows(root, child, "topic-7")
    polls(1)
    status, answer = root.pipe("POST", "/v1/pipe", {"uid": "1" * 32, "same": 5})
    assert (status, answer["code"]) == (409, "POLL_AGAIN")
    assert root.pipe("POST", "/v1/pipe", {"uid": "1" * 32})[0] == 400


def test_a_parent_that_is_behind_gives_way_to_the_one_that_has_most(tree: Tree) -> None:
    """Three hubs: the first lost its end, the second has less than the third. The child goes to the third at once."""
    root = tree.start("root")
    publish(root, "t", 0, 50)
    for name in ("a", "b", "c"):
        follows(root, tree.start(name, "root", level="l2"), "t")
    for name in ("b", "a"):
        tree.stop(name)
        publish(root, "t", 50 if name == "b" else 60, 10)
        follows(root, tree.nodes["c"], "t")
    pos = tree.start("pos", "c")
    follows(root, pos, "t")
    tree.stop("pos")
    tree.stop("root")
    for name in ("a", "b"):
        tree.start(name, "root", level="l2")
    pos = tree.start("pos", "a", "b", "c")
    wait_for(lambda: line(pos, "t")["state"] == "behind", "the first is behind")
    pos.advance(2.0)
    pos.advance(30.0)
    wait_for(lambda: pipe(pos)["parent"]["name"] == "c", "it goes to the one that has all of it")
    assert line(pos, "t")["state"] == "live"
    pos.advance(1.0)
    wait_for(lambda: pos.counters()["pipe_failovers"] == 1, "it is counted")


def test_one_poll_at_a_time(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll that was to come on a connection that ended does not come on the next one: what answers the one before it
    would be taken for its answer, and nothing be understood any more."""
    root, child = tree.start("root"), tree.start("l2", "root")
    publish(root, "prices", 0, 1)
    follows(root, child, "prices")
    upstream, request = child.broker.mirroring.upstream, HttpClient.request
    assert upstream is not None
    # The connection of the last poll, and polls beside which there was another one.
    last, beside = list[object]([None]), list[str]()

    def watched(client: HttpClient, method: str, path: str, body: bytes) -> None:
        if path == "/v1/pipe":
            unanswered = client._timer is not None or client._chunks is not None
            if unanswered and client.transport is last[0]:
                beside.append(path)
            last[0] = client.transport
        request(client, method, path, body)

    def connect_again() -> None:
        upstream._pause_seconds, upstream._taken_before = 0.2, upstream._follower.bytes_taken
        upstream._polled_at, upstream._complete = child.broker.loop.now(), True
        upstream._advance()
        upstream.again("a test")

    monkeypatch.setattr(HttpClient, "request", watched)
    child.call(connect_again)
    wait_for(lambda: upstream.connected and upstream._client.transport is not None, "it is connected")
    for _ in range(3):
        child.advance(1.0)
    publish(root, "prices", 1, 1)
    follows(root, child, "prices")
    assert beside == []
