"""An address for the nodes below: they get all that they need there, and there is nothing else."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.main import main
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, running
from tests.kit.trees import follows
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path: Path) -> Iterator[RunningBroker]:
    settings = {"node.name": "root", "node.level": "root", "registry.enabled": True}
    with running(tmp_path / "root", settings) as found:
        found.raw().publish("t", batch_of(b"1", b"2"))
        yield found


def status(node: RunningBroker, method: str, path: str) -> int:
    connection = http.client.HTTPConnection(*node.broker.listeners.pipe_address, timeout=SECONDS)
    connection.request(method, path)
    found = connection.getresponse().status
    connection.close()
    return found


def test_a_tree_below_it(root: RunningBroker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replication, reports, the registry's answers, and the comparison with another node."""
    assert root.broker.listeners.pipe_address != root.broker.listeners.http_address
    settings = {"node.name": "hub", "node.level": "l2", "pipe.registry": root.parent_address}
    with running(tmp_path / "hub", settings) as hub:
        follows(root, hub, "t")
        wait_for(lambda: root.http("GET", "/v1/tree/nodes")[1]["nodes"], "the hub reports")
        below = {"node.name": "till", "node.level": "local", "pipe.registry": hub.parent_address}
        with running(tmp_path / "till", below) as till:
            follows(root, till, "t")
            wait_for(lambda: len(root.http("GET", "/v1/tree/nodes")[1]["nodes"]) == 2, "both report")
            nodes = {node["name"]: node for node in root.http("GET", "/v1/tree/nodes")[1]["nodes"]}
            assert nodes["hub"]["address"] == hub.parent_address, "where others reach it"
            assert till.http("GET", "/v1/pipe")[1]["parent"]["address"] == hub.parent_address
        assert main(["verify", "--admin", hub.admin, "--against", root.parent_address]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"), ("GET", "/readyz"), ("GET", "/v1/node"), ("GET", "/v1/clients"), ("GET", "/v1/topics"),
        ("POST", "/v1/topics"), ("DELETE", "/v1/topics/t"), ("PATCH", "/v1/topics/t"), ("POST", "/v1/promote"),
        ("GET", "/v1/backup"), ("POST", "/v1/repair"), ("GET", "/v1/groups"), ("POST", "/v1/groups/g/offsets"),
        ("POST", "/v1/resyncs"), ("GET", "/v1/tree"), ("PUT", "/v1/registry/x/drain"), ("DELETE", "/v1/registry/x"),
        ("GET", "/v1/pipe"), ("DELETE", "/v1/children/x"),
    ],
)  # fmt: skip
def test_there_is_no_administration(root: RunningBroker, method: str, path: str) -> None:
    assert status(root, method, path) in (404, 405)
    assert "t" in [topic["name"] for topic in root.http("GET", "/v1/topics")[1]["topics"]]


def test_what_is_there_is_for_nodes(root: RunningBroker) -> None:
    assert status(root, "POST", "/v1/pipe/topics") == 200
    assert status(root, "POST", "/v1/pipe") in (400, 415)
