"""Brokers of a tree in one process: started, stopped, put back to an older state, and looked at."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from tests.kit.brokers import JSON, RunningBroker, numbered, running
from tests.kit.waiting import SECONDS, wait_for

LEVELS = ["root", "l2", "l3", "pos", "local"]


class Tree:
    """Nodes that are started and stopped; each below the ones it names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nodes: dict[str, RunningBroker] = {}
        self._stacks: dict[str, ExitStack] = {}
        self._ports: dict[str, int] = {}

    def start(self, name: str, *parents: str, level: str = "", **settings: object) -> RunningBroker:
        """A node under one of LEVELS; a node that was here before comes back at its address."""
        wanted: dict[str, object] = {
            "node.name": name,
            "node.level": level or name,
            "listen.pipe": f"127.0.0.1:{self._ports.get(name, 0)}",
            "storage.segment_bytes": 64 << 10,
            "topics.auto_create": True,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        if parents:
            wanted["pipe.parents"] = ",".join(self.address(parent) for parent in parents)
        stack = self._stacks[name] = ExitStack()
        node = self.nodes[name] = stack.enter_context(running(self.directory / name, wanted))
        self._ports[name] = node.broker.listeners.pipe_address[1]
        return node

    def stop(self, name: str) -> None:
        self._stacks.pop(name).close()
        del self.nodes[name]

    def address(self, name: str) -> str:
        """Where the nodes below reach it, also while it is stopped."""
        return f"127.0.0.1:{self._ports[name]}"

    def admin(self, name: str) -> str:
        return self.nodes[name].admin

    def keep(self, name: str) -> None:
        """Copy the directory of a node that is stopped, for put_back()."""
        shutil.rmtree(self.directory / "kept", ignore_errors=True)
        ignored = shutil.ignore_patterns("*.sock")
        shutil.copytree(self.directory / name, self.directory / "kept", ignore=ignored)

    def put_back(self, name: str) -> None:
        """An older state takes the place of what a stopped node has now."""
        shutil.rmtree(self.directory / name)
        shutil.copytree(self.directory / "kept", self.directory / name)

    def close(self) -> None:
        for name in list(self._stacks):
            self.stop(name)


@contextmanager
def polled(node: RunningBroker, **changes: object) -> Iterator[http.client.HTTPResponse]:
    """The answer to a poll of somebody who is no node."""
    body = {"version": 1, "uid": "ee" * 16, "name": "x", "level": "local", "topics": ["*"], "logs": [], **changes}
    connection = http.client.HTTPConnection(*node.broker.listeners.pipe_address, timeout=SECONDS)
    try:
        connection.request("POST", "/v1/pipe", json.dumps(body), JSON)
        with connection.getresponse() as answer:
            yield answer
    finally:
        connection.close()


# What a node says of itself.
RAW = {"uid": "1" * 32, "name": "x", "level": "local", "version": "1", "boot": "0" * 16, "number": 1}


def batch(*states: dict[str, Any], sender: str = "1" * 32, **more: Any) -> dict[str, Any]:
    """The body of POST /v1/tree/reports."""
    return {"sender": sender, "session": "s", "number": 0, "nodes": list(states), **more}


def reported(node: RunningBroker, body: dict[str, Any]) -> tuple[int, Any]:
    """The answer to a batch whose sender is connected meanwhile."""
    with polled(node, uid=body["sender"], topics=[]):
        return node.pipe("POST", "/v1/tree/reports", body)


def end(node: RunningBroker, topic: str, partition: int = 0) -> int:
    found = node.broker.engine.log(topic, partition)
    return found.durable_end if found is not None else -1


def chain(node: RunningBroker, topic: str) -> int:
    found = node.broker.engine.log(topic, 0)
    assert found is not None
    return found.chain


def digest(tree: Tree, name: str, topic: str, partition: int = 0) -> str:
    """Over the batch bytes as they lie on the disk."""
    directory = tree.directory / name / "topics" / topic / str(partition)
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.log")):
        found.update(path.read_bytes())
    return found.hexdigest()


def follows(upper: RunningBroker, lower: RunningBroker, topic: str, partition: int = 0) -> None:
    wait_for(
        lambda: end(lower, topic, partition) == end(upper, topic, partition) >= 0,
        f"{topic}/{partition} arrives: {end(lower, topic, partition)} of {end(upper, topic, partition)}; {pipe(lower)}",
    )


def pipe(node: RunningBroker) -> dict[str, Any]:
    found: dict[str, Any] = node.http("GET", "/v1/pipe")[1]
    return found


def line(node: RunningBroker, topic: str) -> dict[str, Any]:
    lines: list[dict[str, Any]] = [one for one in pipe(node)["parent"]["logs"] if one["topic"] == topic]
    return lines[0] if lines else {"state": ""}


def grown(tree: Tree) -> RunningBroker:
    """A root with twenty batches of ten records in topic t, in several segments, and a child l2 that has them all."""
    root = tree.start("root")
    for number in range(20):
        publish(root, "t", number * 10, 10, size=900)
    follows(root, tree.start("l2", "root"), "t")
    return root


def publish(node: RunningBroker, topic: str, first: int, count: int, partition: int = 0, size: int = 0) -> None:
    client = node.raw("producer")
    assert client.publish(topic, numbered(first, count, size), partition=partition).code is Code.OK
    node.drop(client)


def run(node: RunningBroker, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """A command at a node: its exit code, and the JSON that it prints."""
    host, port = node.broker.listeners.http_address
    status = main([*arguments, "--admin", f"{host}:{port}", "--json"])
    return status, json.loads(capsys.readouterr().out)
