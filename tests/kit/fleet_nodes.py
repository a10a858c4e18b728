"""Nodes of a fleet: a real root, and nodes that join it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for

# A first attempt that fails is repeated some seconds later.
JOIN_SECONDS = 40.0


class Fleet:
    """Nodes of one test; each asks the one above it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.nodes = directory, dict[str, RunningBroker]()
        self._stacks: dict[str, ExitStack] = {}

    def start(self, name: str, level: str, region: str = "", above: str = "", **settings: object) -> RunningBroker:
        wanted: dict[str, object] = {"node.name": name, "node.level": level, "node.region": region}
        if above:
            wanted["pipe.parents"] = self.nodes[above].parent_address
        if level == "root":
            wanted.update({"trust.fleet": "acme", "topics.auto_create": True})
        wanted.update({key.replace("__", "."): value for key, value in settings.items()})
        stack = self._stacks[name] = ExitStack()
        node = self.nodes[name] = stack.enter_context(running(self.directory / name, wanted))
        return node

    def root(self) -> RunningBroker:
        root = self.start("root", "root")
        wait_for(lambda: root.http("GET", "/v1/trust")[1]["node"], "the fleet is created")
        return root

    def token(self, **wanted: object) -> str:
        row = {"levels": ["l2", "l3", "pos", "local"], "uses": 10, **wanted}
        status, answer = self.nodes["root"].http("POST", "/v1/trust/tokens", {"tokens": [row]})
        assert status == 201, answer
        return str(answer["tokens"][0])

    def join(self, name: str, level: str, region: str, above: str, token: str) -> RunningBroker:
        node = self.start(name, level, region, above)
        assert node.http("POST", "/v1/trust/join", {"token": token})[0] == 200
        wait_for(lambda: node.http("GET", "/v1/trust")[1]["node"], f"{name} joins", JOIN_SECONDS)
        return node

    def stop(self, name: str) -> None:
        self._stacks.pop(name).close()
        del self.nodes[name]

    def close(self) -> None:
        for name in reversed(list(self._stacks)):
            self.stop(name)
