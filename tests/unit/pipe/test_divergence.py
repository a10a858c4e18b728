"""A parent that is not what it was: found out before one wrong byte is taken, and told hop by hop to the bottom."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from edgebroker.broker.mirror.mirrors import _wrote_nothing
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code
from edgebroker.common.messages import GapReason
from edgebroker.common.types import TopicSettings
from edgebroker.storage.engine import Log
from edgebroker.storage.identity import read_identity
from edgebroker.storage.types import make_identity
from tests.kit.brokers import RunningBroker, batch_of
from tests.kit.trees import LEVELS, Tree, chain, digest, end, follows, line, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

MIRRORS = LEVELS[1:]
BATCH_HEADER_BYTES = 61


class State(NamedTuple):
    """Where a log ends, and the chain over everything before: no two histories have one in common but where they are
    the same."""

    end: int
    chain: int


def states_of(directory: Path) -> set[State]:
    """Every state that a log may be in on its way to what lies in this directory."""
    identity = read_identity(directory)
    found, value = {State(identity.log_start, identity.chain)}, identity.chain
    for path in sorted(directory.glob("*.log")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            base, length = struct.unpack_from(">qi", data, at)
            (last,) = struct.unpack_from(">i", data, at + 23)
            value = crc32c(data[at : at + BATCH_HEADER_BYTES], value)
            found.add(State(base + last + 1, value))
            at += 12 + length
    return found


class Watched:
    """Every durable state that the nodes of a tree come to, in order, and the polls that they send."""

    def __init__(self, tree: Tree, topic: str, *names: str) -> None:
        self.states: dict[str, list[State]] = {name: [] for name in names}
        self._nodes = {name: tree.nodes[name] for name in names}
        self._before = {name: node.counters() for name, node in self._nodes.items()}
        for name, node in self._nodes.items():
            self._watch(node, topic, self.states[name])

    @staticmethod
    def _watch(node: RunningBroker, topic: str, states: list[State]) -> None:
        before: Callable[[Log], None] = node.broker.downstream.on_durable

        def on_durable(log: Log) -> None:
            if log.topic == topic:
                states.append(State(log.durable_end, log.durable_chain))  # type: ignore[attr-defined]
            before(log)

        node.broker.downstream.on_durable = on_durable  # type: ignore[method-assign]

    def counted(self, name: str, counter: str) -> int:
        """How far a counter of a node came since the beginning."""
        return int(self._nodes[name].counters()[counter] - self._before[name][counter])

    def took_only(self, *histories: set[State]) -> None:
        """Every node came only to states of these histories, and once it had left one, not to it again."""
        for name, states in self.states.items():
            rank = 0
            for state in states:
                while rank < len(histories) and state not in histories[rank]:
                    rank += 1
                assert rank < len(histories), f"{name}: {state} belongs to none, or to one that was over"


def files_of(tree: Tree, name: str) -> Path:
    return tree.directory / name / "topics" / "t" / "0"


def five_levels(tree: Tree, **settings: object) -> None:
    """All of them have the first hundred records; what ROOT had then is kept."""
    root = tree.start("root", **settings)
    publish(root, "t", 0, 50, size=100)
    publish(root, "t", 50, 50, size=100)
    for upper, lower in pairwise(LEVELS):
        tree.start(lower, upper)
    arrived(tree)
    tree.stop("root")
    tree.keep("root")


def gone_on(tree: Tree, first: int, *counts: int, **settings: object) -> set[State]:
    """ROOT publishes batches of so many records, and stops; the children do not see that. The states of its log."""
    port = tree._ports["root"]
    root = tree.start("root", listen__pipe="127.0.0.1:0", **settings)
    for count in counts:
        publish(root, "t", first, count, size=100)
        first += count
    tree.stop("root")
    tree._ports["root"] = port
    return states_of(files_of(tree, "root"))


def back(tree: Tree, **settings: object) -> RunningBroker:
    """ROOT is reachable again; its child does not wait with trying."""
    root = tree.start("root", **settings)
    tree.nodes["l2"].advance(31.0)
    return root


def arrived(tree: Tree) -> None:
    """All of them have what ROOT has."""
    for name in MIRRORS:
        follows(tree.nodes["root"], tree.nodes[name], "t")
        wait_for(lambda name=name: chain(tree.nodes[name], "t") == chain(tree.nodes["root"], "t"), "the same")  # type: ignore[misc]


def same_bytes(tree: Tree) -> None:
    for name in reversed(LEVELS):
        tree.stop(name)
    assert len({digest(tree, name, "t") for name in LEVELS}) == 1


def few_polls(watched: Watched, most: int) -> None:
    sent = {name: watched.counted(name, "pipe_polls_sent") for name in MIRRORS}
    assert max(sent.values()) <= most, sent


def test_an_older_copy_that_went_on(tree: Tree) -> None:
    """A thousand records after the copy, a thousand others after it was put back: no log mixes them, down to LOCAL."""
    five_levels(tree)
    root = back(tree)
    for number in range(20):
        publish(root, "t", 1000 + number * 50, 50, size=100)
    arrived(tree)
    tills = tree.nodes["local"].raw("till")
    tills.subscribe("t", "tills")
    while (head := tills.deliver().head).last < 1099:
        pass
    assert tills.acked(head, 1100) is Code.OK
    tree.stop("root")
    before = states_of(files_of(tree, "root"))
    tree.put_back("root")
    after = gone_on(tree, 5000, *[40] * 25)
    watched = Watched(tree, "t", *MIRRORS)
    root = back(tree)
    arrived(tree)
    assert {name: watched.counted(name, "log_truncations") for name in MIRRORS} == dict.fromkeys(MIRRORS, 1)
    few_polls(watched, 15)
    watched.took_only(before, after)
    offsets: list[int] = []
    while not offsets or offsets[-1] < 1099:
        offsets += tills.deliver().offsets
    assert offsets == list(range(100, 1100)), "its group goes back to where the logs part, and misses nothing"
    publish(root, "t", 9000, 1)
    arrived(tree)
    same_bytes(tree)


@pytest.mark.parametrize(
    "counts", [[30] * 10, [60] * 5, [300], [1] * 300], ids=["the same batches", "longer ones", "one", "single records"]
)
def test_the_same_length_with_other_bytes(tree: Tree, counts: list[int]) -> None:
    five_levels(tree)
    before = gone_on(tree, 1000, *[30] * 10)
    back(tree)
    arrived(tree)
    tree.stop("root")
    tree.put_back("root")
    after = gone_on(tree, 5000, *counts)
    watched = Watched(tree, "t", *MIRRORS)
    root = back(tree)
    wait_for(lambda: chain(tree.nodes["local"], "t") == chain(root, "t"), "it comes to the bottom")
    arrived(tree)
    assert end(root, "t") == 400
    few_polls(watched, 15)
    watched.took_only(before, after)
    same_bytes(tree)


def test_a_shorter_parent(tree: Tree) -> None:
    """Of the same epoch, and silent: nothing is cut for that. Accepted by an operator it is a new epoch: all that ROOT
    lost is cut off, down to LOCAL."""
    five_levels(tree)
    before = gone_on(tree, 1000, *[30] * 10)
    root = back(tree)
    arrived(tree)
    kept = states_of(files_of(tree, "local"))
    tree.stop("root")
    tree.put_back("root")
    watched = Watched(tree, "t", *MIRRORS)
    root = back(tree)
    wait_for(lambda: line(tree.nodes["l2"], "t")["state"] == "behind", "it is noticed")
    wait_for(lambda: "history_lost" in root.http("GET", "/v1/node")[1]["problems"], "ROOT is told")
    assert root.raw("producer").publish("t", batch_of(b"no")).code is Code.HISTORY_LOST
    assert [end(tree.nodes[name], "t") for name in MIRRORS] == [400] * 4
    few_polls(watched, 3)
    assert root.http("POST", "/v1/topics/t/accept")[0] == 200
    publish(root, "t", 7000, 5)
    arrived(tree)
    few_polls(watched, 15)
    tree.stop("root")
    after = states_of(files_of(tree, "root"))
    assert kept == before and State(105, chain(tree.nodes["local"], "t")) in after - before
    watched.took_only(before, after)


def test_a_log_of_another_identity(tree: Tree) -> None:
    """Nobody follows it by itself; every node serves what it had until an operator says at that node that it may go."""
    five_levels(tree)
    back(tree)
    arrived(tree)
    before = {name: chain(tree.nodes[name], "t") for name in MIRRORS}
    tills = tree.nodes["local"].raw("till")
    tills.subscribe("t", "tills")
    assert tills.deliver().offsets[0] == 0
    tree.stop("root")
    shutil.rmtree(tree.directory / "root")
    after = gone_on(tree, 5000, *[40] * 5)
    watched = Watched(tree, "t", *MIRRORS)
    root = back(tree)
    for rank, name in enumerate(MIRRORS):
        node = tree.nodes[name]
        wait_for(lambda node=node: line(node, "t")["state"] == "replaced", f"{name} notices")  # type: ignore[misc]
        assert "replaced" in node.http("GET", "/v1/node")[1]["problems"]
        assert {below: chain(tree.nodes[below], "t") for below in MIRRORS[rank:]} == {
            below: before[below] for below in MIRRORS[rank:]
        }
        assert node.http("POST", "/v1/topics/t/accept")[0] == 200
        follows(root, node, "t")
        assert chain(node, "t") == chain(root, "t")
    few_polls(watched, 15)
    watched.took_only(after)
    assert tills.reset().topic == "t", "its readers begin again"
    same_bytes(tree)


def test_a_parent_that_begins_further_on(tree: Tree) -> None:
    """Each hop keeps what it has and goes on where the one above begins; readers are told what they miss."""
    five_levels(tree)
    before = states_of(files_of(tree, "root"))
    tills = tree.nodes["local"].raw("till")
    tills.subscribe("t", "tills")
    while (head := tills.deliver().head).last < 99:
        pass
    assert tills.acked(head, 100) is Code.OK
    few = {"storage__retention_bytes": 150_000}
    port = tree._ports["root"]
    root = tree.start("root", listen__pipe="127.0.0.1:0", **few)
    for number in range(60):
        publish(root, "t", 1000 + number * 100, 100, size=100)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    wait_for(lambda: log.log_start > 100 and not log.segments[0].base < log.log_start, "retention")
    tree.stop("root")
    tree._ports["root"] = port
    watched = Watched(tree, "t", *MIRRORS)
    root = back(tree)
    arrived(tree)
    assert {name: watched.counted(name, "log_gaps") for name in MIRRORS} == dict.fromkeys(MIRRORS, 1)
    assert {name: watched.counted(name, "logs_recreated") for name in MIRRORS} == dict.fromkeys(MIRRORS, 0)
    assert {name: watched.counted(name, "log_truncations") for name in MIRRORS} == dict.fromkeys(MIRRORS, 0)
    few_polls(watched, 15)
    watched.took_only(before, states_of(files_of(tree, "root")))
    gaps, offsets = [], list[int]()
    while not offsets or offsets[-1] < end(root, "t") - 1:
        found = tills.deliver()
        gaps += found.head.gaps
        offsets += found.offsets
    start = offsets[0]
    assert start == root.broker.engine.log("t", 0).log_start  # type: ignore[union-attr]
    assert [tuple(gap) for gap in gaps] == [(100, start - 1, GapReason.RETENTION)]
    assert offsets == list(range(start, end(root, "t")))


@pytest.mark.parametrize(
    ("ours", "end", "parents", "nothing"),
    [
        ([(1, 0), (2, 20)], 20, [(1, 0)], True),
        ([(1, 0), (2, 20)], 20, [(1, 0), (3, 25)], True),
        ([(1, 0), (2, 20)], 21, [(1, 0)], False),  # written to
        ([(1, 0)], 20, [(1, 0)], False),  # never promoted
        ([(1, 0), (2, 5), (3, 20)], 20, [(1, 0)], False),  # taken over twice, written to in between
        ([(1, 0), (2, 30)], 30, [(1, 0), (2, 20)], False),  # it holds ten records that the parent never had
    ],
)
def test_a_promotion_is_given_up_only_where_nothing_is_lost(
    ours: list[tuple[int, int]], end: int, parents: list[tuple[int, int]], nothing: bool
) -> None:
    identity = replace(make_identity(bytes(16).hex(), TopicSettings()), epochs=ours)
    partition: Any = SimpleNamespace(identity=identity, staged_end=end)
    part: Any = SimpleNamespace(epochs=parents)
    assert _wrote_nothing(part, partition) is nothing
