"""Connections take no descriptor that the logs need, and the operator gets in."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

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
