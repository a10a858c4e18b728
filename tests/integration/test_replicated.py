"""Publishing that waits until nodes below have the records durably: ack level replicated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from edgebroker.broker.mirror.receipts import Receipts
from edgebroker.client.producer import Producer
from edgebroker.common.errors import Code
from edgebroker.common.types import AckLevel
from edgebroker.network.wire import frames
from tests.kit.brokers import RunningBroker, batch_of
from tests.kit.raw_client import write_publish
from tests.kit.trees import Tree, end, follows, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


def send(client: Any, *values: bytes, **more: Any) -> Any:
    return client.publish("t", batch_of(*values), level=AckLevel.REPLICATED, **more)


@contextmanager
def client_of(node: RunningBroker) -> Iterator[Any]:
    client = node.raw("producer")
    yield client
    node.drop(client)


def send_later(client: Any, *values: bytes, sequence: int = -1) -> int:
    """Publish without waiting for the answer; its correlation."""
    correlation: int = client.next_correlation()
    options = {"base_sequence": sequence, "producer_id": client.grants.producer_id, "producer_epoch": 0}
    data = batch_of(*values, **(options if sequence >= 0 else {}))
    client.send(write_publish(correlation, frames.publish_prefix(AckLevel.REPLICATED, "t", 0), data))
    return correlation


def answered(node: RunningBroker, client: Any, correlation: int) -> Any:
    """The answer, while time passes."""
    with ticking(node):
        return client.answer(correlation)


@contextmanager
def ticking(*nodes: RunningBroker) -> Iterator[None]:
    """Time passes for these nodes."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.02):
            for node in nodes:
                node.advance(0.5)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_it_is_at_the_child_when_it_is_acknowledged(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 5)
    child = tree.start("l2", "root")
    follows(root, child, "t")
    with client_of(root) as client:
        for number in range(20):
            assert send(client, b"%d" % number).code is Code.OK
            assert end(child, "t") == 6 + number == end(root, "t")
    assert root.counters()["publish_refused"] == 0


def test_without_a_child_it_is_stored_and_refused_and_stored_once(tree: Tree) -> None:
    """The same batch again, when the child is back: it was stored at once, and is acknowledged now."""
    root = tree.start("root")
    publish(root, "t", 0, 5)
    with client_of(root) as client:
        client.connect("producer", flags=frames.WANT_PRODUCER)
        first = answered(root, client, send_later(client, b"a", sequence=0))
        assert (first.code, first.code.retryable) == (Code.NOT_REPLICATED, True)
        assert end(root, "t") == 6
        child = tree.start("l2", "root")
        follows(root, child, "t")
        again = client.answer(send_later(client, b"a", sequence=0))
        assert (again.code, again.offset, end(root, "t")) == (Code.OK, 5, 6)
        assert client.answer(send_later(client, b"b", sequence=1)).code is Code.OK


def test_two_of_two_and_named_ones(tree: Tree) -> None:
    root = tree.start("root")
    root.create("t", replicas=2)
    for name in ("hub-a", "hub-b"):
        follows(root, tree.start(name, "root", level="l2"), "t")
    with client_of(root) as client:
        assert send(client, b"both").code is Code.OK
        tree.stop("hub-a")
        assert answered(root, client, send_later(client, b"one is missing")).code is Code.NOT_REPLICATED
        assert root.http("PATCH", "/v1/topics/t", {"replicas": 1})[0] == 200
        assert send(client, b"one is enough").code is Code.OK
        assert root.http("PATCH", "/v1/topics/t", {"replica_nodes": "hub-a"})[0] == 200
        assert answered(root, client, send_later(client, b"not this one")).code is Code.NOT_REPLICATED
    assert root.http("PATCH", "/v1/topics/t", {"replicas": 3})[0] == 400, "one name cannot be three nodes"


def test_a_receipt_that_is_lost_is_asked_for_again(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection of the receipts breaks again and again: the publish is refused in time, and acknowledged when it
    comes again."""
    root = tree.start("root")
    publish(root, "t", 0, 5)
    child = tree.start("l2", "root")
    follows(root, child, "t")
    with client_of(root) as client:
        client.connect("producer", flags=frames.WANT_PRODUCER)
        with monkeypatch.context() as patch:
            patch.setattr(Receipts, "on_connected", lambda found: found._client.close("lost"))
            refused = answered(root, client, send_later(client, b"a", sequence=0))
        assert refused.code is Code.NOT_REPLICATED
        assert client.answer(send_later(client, b"a", sequence=0)).code is Code.OK
    assert end(child, "t") == 6


def test_who_is_no_child_confirms_nothing(tree: Tree) -> None:
    root = tree.start("root")
    publish(root, "t", 0, 5)
    log = root.broker.engine.log("t", 0)
    assert log is not None
    with client_of(root) as client:
        correlation = send_later(client, b"a")
        wait_for(lambda: end(root, "t") == 6, "it is stored")
        for uid, end_there in (("a" * 32, 6), (root.broker.engine.node_uid, 6)):
            receipt = {"uid": uid, "logs": [["t", 0, log.identity.log_id, 1, end_there]]}
            assert root.pipe("POST", "/v1/pipe/durable", receipt) == (200, {})
        assert answered(root, client, correlation).code is Code.NOT_REPLICATED


def test_the_producer_goes_on_when_the_child_is_back(tree: Tree) -> None:
    """Through the client: nothing is lost and nothing twice, while the child comes and goes."""
    root = tree.start("root")
    publish(root, "t", 0, 1)
    child = tree.start("l2", "root")
    follows(root, child, "t")
    with Producer(root.server, ack="replicated", timeout=60.0) as producer:
        sent = [producer.send("t", b"%d" % number) for number in range(10)]
        assert [one.result(30) for one in sent] == list(range(1, 11))
        tree.stop("l2")
        waiting = producer.send("t", b"10")
        with ticking(root):
            wait_for(lambda: root.counters()["refused_by_code"].get("NOT_REPLICATED"), "it is refused")
            child = tree.start("l2", "root")
            assert waiting.result(30) == 11
    assert end(root, "t") == end(child, "t") == 12
