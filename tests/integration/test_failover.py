"""Clients that are given several brokers, and clients that are given an address where none is."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from edgebroker.client import link
from edgebroker.client.consume import subscriber
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import UnreachableError
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, running, take
from tests.kit.trees import Tree, follows
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


def values(consumer: Consumer, count: int) -> list[bytes]:
    return [record.value or b"" for record in take(consumer, count)]


def test_the_next_one_is_used_at_once(broker: RunningBroker, tmp_path: Path) -> None:
    with running(tmp_path / "gone") as gone:
        nowhere = gone.server
    began = time.monotonic()
    with Producer(f"{nowhere},{nowhere},{broker.server}") as producer:
        assert producer.send("t", b"v").result(SECONDS) == 0
    with Consumer(f"{nowhere},{broker.server}", ["t"], start="earliest", timeout=SECONDS) as consumer:
        assert values(consumer, 1) == [b"v"]
    assert time.monotonic() - began < SECONDS


def test_positions_hold_and_the_first_one_is_preferred(tree: Tree) -> None:
    root, hub = tree.start("root"), tree.start("l2", "root")
    root.raw().publish("t", batch_of(b"0", b"1", b"2"))
    follows(root, hub, "t")
    with patch.object(link, "RETURN_SECONDS", 0.2):
        consumer = Consumer(f"{hub.server},{root.server}", ["t"], "g", start="earliest", timeout=SECONDS)
        with consumer:
            assert values(consumer, 3) == [b"0", b"1", b"2"]
            consumer.commit()
            port = hub.broker.listeners.tcp_address[1]
            tree.stop("l2")
            root.raw().publish("t", batch_of(b"3"))
            assert values(consumer, 1) == [b"3"], "it goes on at another broker, where it was"
            consumer.commit()
            tree.start("l2", "root", listen__tcp=f"127.0.0.1:{port}")
            wait_for(lambda: members(tree.nodes["l2"]) == 1, "it goes back to the first one")
            root.raw().publish("t", batch_of(b"4"))
            assert values(consumer, 1) == [b"4"]


def members(node: RunningBroker) -> int:
    status, group = node.http("GET", "/v1/groups/g")
    return len(group["members"]) if status == 200 else 0


def test_a_broker_that_is_behind_is_left(tree: Tree) -> None:
    """Its log ends before the position: its parent is away."""
    root, hub = tree.start("root"), tree.start("l2", "root")
    root.raw().publish("t", batch_of(b"0"))
    follows(root, hub, "t")
    tree.stop("l2")
    root.raw("more").publish("t", batch_of(b"1", b"2"))
    with Consumer(root.server, ["t"], start="earliest", timeout=SECONDS) as reader:
        last = take(reader, 3)[-1]
        reader.ack(last)
        positions = reader.positions()
    hub = tree.start("l2")
    with (
        patch.object(subscriber, "BEHIND_SECONDS", 0.1),
        Consumer(f"{hub.server},{root.server}", ["t"], positions=positions, timeout=SECONDS) as consumer,
    ):
        wait_for(lambda: hub.counters()["connections_closed"] == 1, "it is left")
        root.raw("late").publish("t", batch_of(b"3"))
        assert values(consumer, 1) == [b"3"]


def test_the_admin_port_is_named(broker: RunningBroker) -> None:
    admin = "{}:{}".format(*broker.broker.listeners.http_address)
    said = f"{admin} is an HTTP port; clients use the address in listen.tcp"
    with Producer(admin, timeout=SECONDS) as producer, pytest.raises(UnreachableError, match=said):
        producer.send("t", b"v")
    with Consumer(admin, ["t"]) as consumer, pytest.raises(UnreachableError, match=f"{admin} is an HTTP port"):
        consumer.poll(SECONDS)


def test_a_name_that_does_not_exist(caplog: pytest.LogCaptureFixture) -> None:
    said = r"no broker at no-such-host\.invalid:7420: there is no host of this name"
    with (
        caplog.at_level(logging.WARNING),
        Producer("no-such-host.invalid", timeout=SECONDS) as producer,
        pytest.raises(UnreachableError, match=said),
    ):
        producer.send("t", b"v")
    assert "retrying" not in caplog.text


@pytest.mark.parametrize(
    ("server", "code", "said"),
    [
        ("http://127.0.0.1:7420", 2, "http:// does not belong there; write 127.0.0.1:7420"),
        ("127.0.0.1:99999", 2, "is not an address"),
        ("no-such-host.invalid", 3, "there is no host of this name"),
    ],
)
def test_the_command_line_ends(server: str, code: int, said: str) -> None:
    for command in (["publish", "t"], ["consume", "t"]):
        ended = subprocess.run(
            [sys.executable, "-m", "edgebroker", *command, "--server", server],
            input="x\n", capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert (ended.returncode, said in ended.stderr) == (code, True), ended.stderr
