"""Connections take no descriptor that the logs need, and the operator gets in."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker import Consumer, Producer
from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.common.errors import Code
from tests.kit.brokers import batch_of
from tests.kit.raw_client import RawClient
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

FILES = 512


@pytest.fixture
def node(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A node that may have 512 descriptors."""
    with BrokerProcess(tmp_path / "node") as process:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        yield process


def in_use(node: BrokerProcess) -> int:
    return sum(1 for _ in Path(f"/proc/{node.pid}/fd").iterdir())


def test_idle_clients_by_the_hundred(node: BrokerProcess) -> None:
    host, _, port = node.server.rpartition(":")
    publisher = RawClient((host, int(port)))
    publisher.connect("publisher")
    idle = [socket.create_connection((host, int(port))) for _ in range(700)]
    try:
        wait_for(lambda: in_use(node) >= FILES - FILES // 4, "connections have all that they may have")
        assert in_use(node) <= FILES - FILES // 4 + 2
        for rank in range(60):
            assert publisher.publish(f"topic-{rank}", batch_of(b"v")).code is Code.OK, rank
        found = call(f"unix:{node.directory / 'ctl.sock'}", "GET", "/v1/node")
        assert "disk_full" not in found["problems"]
    finally:
        for one in idle:
            one.close()
    wait_for(lambda: in_use(node) < FILES // 2, "they have gone")
    with socket.create_connection((host, int(port))):
        assert call(node.admin, "GET", "/healthz") == {"status": "ok"}
    publisher.close()


def test_far_more_partitions_than_descriptors(tmp_path: Path) -> None:
    """Twelve hundred logs with 256 descriptors: written to in turn, read, and written to after a start."""
    partitions, values = 600, (b"first", b"second", b"after a start")
    with BrokerProcess(tmp_path / "node", command=["sh", "-c", 'ulimit -n 256; exec "$@"', "sh"]) as process:
        for topic in ("odd", "even"):
            call(process.admin, "POST", "/v1/topics", {"name": topic, "partitions": partitions})
        for value in values:
            if value == values[-1]:
                process.stop()
                process.start()
            with Producer(process.server) as producer:
                sent = [
                    producer.send(topic, value, partition=partition)
                    for partition in range(partitions)
                    for topic in ("odd", "even")
                ]
                producer.flush()
                assert {one.result(10.0) for one in sent} == {values.index(value)}
            assert in_use(process) < 256 - 256 // 8
        found: dict[tuple[str, int], list[bytes]] = {}
        with Consumer(process.server, ["odd", "even"], group="all") as consumer:
            while sum(map(len, found.values())) < 2 * partitions * len(values):
                for record in consumer.poll(10.0):
                    found.setdefault((record.topic, record.partition), []).append(record.value)
        assert len(found) == 2 * partitions and all(each == list(values) for each in found.values())
        assert call(process.admin, "GET", "/v1/node")["problems"] == {}


def test_descriptors_that_are_taken_away(tmp_path: Path) -> None:
    """The limit is lowered under a running node: files of idle logs are closed, and what was published is stored."""
    with BrokerProcess(tmp_path / "node") as process:
        call(process.admin, "POST", "/v1/topics", {"name": "prices", "partitions": 300})
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (128, 128))
        with Producer(process.server) as producer:
            sent = [producer.send("prices", b"v", partition=partition) for partition in range(300)]
            producer.flush(30.0)
            assert {one.result(0.0) for one in sent} == {0}
