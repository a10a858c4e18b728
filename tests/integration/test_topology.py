"""Who writes, who follows whom, and what a node may lose: nothing is fetched twice, mixed, lost or repeated."""

from __future__ import annotations

import shutil
import threading
from itertools import pairwise

import pytest

from edgebroker.common.errors import Code
from edgebroker.common.types import Start
from tests.kit.brokers import RunningBroker, numbered
from tests.kit.raw_client import RawClient
from tests.kit.trees import Tree, digest, end, follows, pipe, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

THREE = ["root", "l2", "l3"]


def place(node: RunningBroker) -> int:
    return int(node.http("GET", "/v1/groups/tills")[1]["partitions"][0]["committed"])


def move_on(node: RunningBroker, upto: int) -> None:
    """A member of the node's group acknowledges what lies before an offset."""
    client = node.raw("till")
    client.subscribe("prices", "tills", start=Start.COMMITTED)
    reached = 0
    while reached < upto:
        head = client.deliver().head
        reached = min(upto, head.last + 1)
        assert client.acked(head, reached) is Code.OK
    node.drop(client)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("older", [False, True], ids=["snapshot of the stop", "older snapshot"])
def test_meta_db_is_gone(tree: Tree, name: str, older: bool) -> None:
    """On the first, the middle or the last of three nodes with a group each: the log is the same, nothing is fetched or
    refreshed, and the groups stand where offsets.snap says, which is never further on than they were."""
    root = tree.start("root")
    for number in range(20):
        publish(root, "prices", number * 10, 10, size=1000)
    for upper, lower in pairwise(THREE):
        tree.start(lower, upper)
    follows(root, tree.nodes["l3"], "prices")
    for rank, node in enumerate(tree.nodes.values()):
        move_on(node, 20 + rank * 10)
    places = {one: place(tree.nodes[one]) for one in THREE}
    node, snapshot = tree.nodes[name], tree.directory / name / "offsets.snap"
    log_id = node.broker.engine.log("prices", 0).identity.log_id  # type: ignore[union-attr]
    node.advance(5.0)
    wait_for(snapshot.exists, "it is written")
    kept = tree.directory / "offsets.snap"
    shutil.copy(snapshot, kept)
    if older:
        move_on(node, 150)
    parents = {"root": [], "l2": ["root"], "l3": ["l2"]}[name]
    tree.stop(name)
    if older:
        shutil.copy(kept, snapshot)
    lost = sorted((tree.directory / name).glob("meta.db*"))
    assert lost
    for path in lost:
        path.unlink()
    node = tree.start(name, *parents)
    for below in tree.nodes.values():
        below.advance(31.0)
    publish(tree.nodes["root"], "prices", 200, 5)
    follows(tree.nodes["root"], tree.nodes["l3"], "prices")
    assert node.broker.engine.log("prices", 0).identity.log_id == log_id  # type: ignore[union-attr]
    assert {one: place(tree.nodes[one]) for one in THREE} == places
    for one in THREE:
        counters = tree.nodes[one].counters()
        found = [
            counters[key] for key in ("refreshes_begun", "refreshes_announced", "logs_recreated", "log_truncations")
        ]
        assert found == [0, 0, 0, 0], one
    if name != "root":
        assert node.counters()["pipe_bytes_in"] < 1000, "only what is new"
    client = node.raw("till")
    client.subscribe("prices", "tills", start=Start.COMMITTED)
    assert client.deliver().offsets[0] == places[name]
    for one in reversed(THREE):
        tree.stop(one)
    assert len({digest(tree, one, "prices") for one in THREE}) == 1


def test_one_writer(tree: Tree) -> None:
    """Every mirror names the origin to whoever publishes there, and stores nothing; over restarts as well."""
    root = tree.start("root")
    publish(root, "prices", 0, 5)
    for upper, lower in pairwise(THREE):
        tree.start(lower, upper)
    for name in THREE[1:]:
        follows(root, tree.nodes[name], "prices")
        refused = tree.nodes[name].raw("producer").publish("prices", numbered(0, 1))
        origin = {"l2": f"root at {tree.address('root')}", "l3": f"l2 at {tree.address('l2')}"}[name]
        assert (refused.code, origin in refused.message) == (Code.NOT_ORIGIN, True)
        assert name == "l2" or root.broker.engine.node_uid in refused.message
        assert tree.nodes[name].refused(Code.NOT_ORIGIN) == 1
        assert tree.nodes[name].http("POST", "/v1/topics", {"name": "prices"})[0] == 409
    tree.stop("root")
    tree.stop("l2")
    node = tree.start("l2", "root")
    assert node.raw("producer").publish("prices", numbered(0, 1)).code is Code.NOT_ORIGIN
    root = tree.start("root")
    publish(root, "prices", 5, 1)
    for one in tree.nodes.values():
        one.advance(31.0)
    follows(root, tree.nodes["l3"], "prices")
    for name in reversed(THREE):
        tree.stop(name)
    assert len({digest(tree, name, "prices") for name in THREE}) == 1


@pytest.mark.parametrize("first", ["here", "at the parent"])
def test_a_name_of_two(tree: Tree, first: str) -> None:
    """Both go on writing and serving their own; whoever is below follows the nearest. Nothing is touched by itself."""
    root = tree.start("root")
    if first == "at the parent":
        publish(root, "notes", 500, 9)
    node = tree.start("l2")
    publish(node, "notes", 0, 3)
    tree.stop("l2")
    node = tree.start("l2", "root")
    if first == "here":
        publish(root, "notes", 500, 9)
    publish(root, "prices", 0, 4)
    lower = tree.start("l3", "l2")
    follows(root, lower, "prices")
    wait_for(lambda: "name_clash" in node.http("GET", "/v1/node")[1]["problems"], "the clash is told")
    assert node.refused(Code.NAME_CLASH) == 1
    publish(node, "notes", 3, 3)
    publish(root, "notes", 600, 1)
    follows(node, lower, "notes")
    assert (end(root, "notes"), end(node, "notes"), end(lower, "notes")) == (10, 6, 6)
    assert "name_clash" not in lower.http("GET", "/v1/node")[1]["problems"]
    tree.stop("l2")
    node = tree.start("l2", "root")
    wait_for(lambda: "name_clash" in node.http("GET", "/v1/node")[1]["problems"], "also after a restart")
    publish(node, "notes", 6, 1)
    lower.advance(31.0)
    follows(node, lower, "notes")
    for name in reversed(THREE):
        tree.stop(name)
    assert digest(tree, "l2", "notes") == digest(tree, "l3", "notes") != digest(tree, "root", "notes")


def test_a_clash_ends_when_this_node_gives_its_topic_up(tree: Tree) -> None:
    root, node = tree.start("root"), tree.start("l2")
    publish(node, "notes", 0, 3)
    tree.stop("l2")
    node = tree.start("l2", "root")
    publish(root, "notes", 500, 9)
    wait_for(lambda: "name_clash" in node.http("GET", "/v1/node")[1]["problems"], "the clash is told")
    assert node.http("DELETE", "/v1/topics/notes")[0] == 200
    follows(root, node, "notes")
    assert node.http("GET", "/v1/node")[1]["problems"] == {}


class Load:
    """A producer that publishes at a node, one record after the other, until it is stopped."""

    def __init__(self, node: RunningBroker, topic: str) -> None:
        self._client, self._topic = node.raw("load"), topic
        self._stopping = False
        self.published = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping:
                answer = self._client.publish(self._topic, numbered(self.published, 1, 100))
                assert (answer.code, answer.offset) == (Code.OK, self.published)
                self.published += 1
        except BaseException as failure:
            self._failure = failure

    def goes_on(self, count: int) -> None:
        """Wait for so many records more."""
        wanted = self.published + count
        wait_for(lambda: self.published >= wanted or self._failure, "the load goes on")
        assert self._failure is None

    def stop(self) -> int:
        self._stopping = True
        self._thread.join()
        assert self._failure is None
        return self.published


class Till:
    """A member that acknowledges what it reads; what was acknowledged is read by nobody again."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self._client: RawClient | None = None

    def read(self, node: RunningBroker, upto: int) -> None:
        if self._client is None:
            wait_for(lambda: end(node, "prices") >= 0, "the topic is there")
            self._client = node.raw("till")
            self._client.subscribe("prices", "tills", start=Start.COMMITTED)
        while len(self.offsets) < upto:
            found = self._client.deliver()
            self.offsets += found.offsets
            assert self._client.acked(found.head, found.head.last + 1) is Code.OK

    def leave(self, node: RunningBroker) -> None:
        """What was delivered and not read yet was not acknowledged: it comes again."""
        if self._client is not None:
            node.drop(self._client)
            self._client = None


def test_moving_about_under_load(tree: Tree) -> None:
    """While ROOT is published to, a terminal is put below one POS node, the other, and both, again and again, and a hub
    goes for good."""
    root = tree.start("root")
    load = Load(root, "prices")
    load.goes_on(10)
    tree.start("l2", "root")
    for name in ("a", "b"):
        tree.start(name, "l2", "root", level="pos")
    till = Till()
    moves = [["a"], ["b"], ["a", "b"]] * 2
    for number, parents in enumerate(moves):
        node = tree.start("local", *parents)
        load.goes_on(100)
        till.read(node, load.published)
        assert pipe(node)["parent"]["name"] == parents[0]
        if number == 3:
            tree.stop("l2")  # for good
        if number in (2, 5):
            tree.stop("a")
            wait_for(lambda node=node: pipe(node)["parent"]["name"] == "b", "the other one takes over")  # type: ignore[misc]
            load.goes_on(100)
            till.read(node, load.published)
            tree.start("a", "l2", "root", level="pos")
        load.goes_on(50)
        till.leave(node)
        tree.stop("local")
    node = tree.start("local", "b", "a")
    published = load.stop()
    for name in ("a", "b", "local"):
        follows(root, tree.nodes[name], "prices")
    till.read(node, published)
    assert end(root, "prices") == published
    assert till.offsets == list(range(published))
    for name in ("a", "b", "local"):
        counters = tree.nodes[name].counters()
        assert (counters["log_truncations"], counters["logs_recreated"]) == (0, 0)
    for name in ("local", "a", "b", "root"):
        tree.stop(name)
    assert len({digest(tree, name, "prices") for name in ("root", "a", "b", "local")}) == 1
