"""A tree of brokers, each on a host of its own (wires.py), and what must be true of it once it has come to rest.

    root - l2 ----- l3 - pos - local         l2b feeds l3 while l2 is away, and pos while l3 is
         \\ l2b - - /

The test talks to the nodes over their unix sockets, so that no fault of a wire stands between them.
"""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.common import batch
from edgebroker.common.errors import EdgeBrokerError
from tests.kit.waiting import wait_for

from .traffic import SETTINGS
from .wires import Wires

# Each node, its level, and whom it asks, the best first. Parents are named before their children.
PLAN = {
    "root": ("root", ()),
    "l2": ("l2", ("root",)),
    "l2b": ("l2", ("root",)),
    "l3": ("l3", ("l2", "l2b")),
    "pos": ("pos", ("l3", "l2b")),
    "local": ("local", ("pos",)),
}
MIRRORS = [name for name, (_, parents) in PLAN.items() if parents]
LINES = [(name, parent) for name, (_, parents) in PLAN.items() for parent in parents]

# A peer that vanished is noticed within seconds; no record becomes a dead letter for what is done to the machines.
NODE = SETTINGS | {
    "EDGEBROKER_DEVELOPMENT_INSECURE": "1",
    "EDGEBROKER_DELIVERY_MAX_ATTEMPTS": "0",
    "EDGEBROKER_DELIVERY_BACKOFF_MS": "50",
    "EDGEBROKER_DELIVERY_MAX_BACKOFF_MS": "500",
    "EDGEBROKER_LIMITS_HEARTBEAT_MS": "1000",
    "EDGEBROKER_LIMITS_IDLE_TIMEOUT_MS": "5000",
}
# What no fault excuses in the log of a node.
_TRACE = re.compile(r"^(Traceback|.* CRITICAL )", re.MULTILINE)


class Node(BrokerProcess):
    """A broker on a host of its own."""

    frozen = False

    @property
    def admin(self) -> str:
        return f"unix:{self.directory / 'ctl.sock'}"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def freeze(self) -> None:
        """It stands still, as if its machine hung."""
        if self.alive and not self.frozen:
            self.frozen = True
            self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self.alive and self.frozen:
            self._signal(signal.SIGCONT)
        self.frozen = False

    def kill(self) -> None:
        super().kill()
        self.frozen = False

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def partitions(self, topic: str) -> list[dict[str, Any]]:
        """As the node describes them; [] while it has no such topic."""
        try:
            found: list[dict[str, Any]] = call(self.admin, "GET", f"/v1/topics/{topic}")["partitions"]
        except EdgeBrokerError:
            return []
        return found

    def problems(self) -> dict[str, str]:
        """As the node tells them."""
        found: dict[str, str] = call(self.admin, "GET", "/v1/node")["problems"]
        return found

    def trouble(self) -> list[str]:
        """What keeps this node from being healthy, in words."""
        found = [f"{name}: {why}" for name, why in self.problems().items()]
        parent = call(self.admin, "GET", "/v1/pipe")["parent"]
        if parent is not None:
            found += [] if parent["connected"] else [f"no parent: {parent['error']}"]
            lines = [line for line in parent["logs"] if line["state"] != "live"]
            found += [f"{line['topic']}/{line['partition']} is {line['state']}: {line['why']}" for line in lines]
        return found

    def logs(self, topic: str) -> list[Path]:
        """The directories of its partitions."""
        return sorted((self.directory / "topics" / topic).glob("[0-9]*"))


class Fleet:
    """The tree of PLAN; a context manager that lets no process and no wire survive."""

    def __init__(self, directory: Path, settings: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.wires = Wires(list(PLAN))
        self.nodes: dict[str, Node] = {}
        self._settings = NODE | (settings or {})

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def __enter__(self) -> Fleet:
        self.wires.__enter__()
        try:
            for name, (level, parents) in PLAN.items():
                self.nodes[name] = self._make(name, level, parents)
                self.nodes[name].start()
        except BaseException:
            self._end()
            raise
        return self

    def _make(self, name: str, level: str, parents: Sequence[str]) -> Node:
        settings = {**self._settings, "EDGEBROKER_NODE_NAME": name, "EDGEBROKER_NODE_LEVEL": level}
        if name == "local":
            settings["EDGEBROKER_DELIVERY_TIMEOUT_MS"] = "5000"
        if parents:
            settings["EDGEBROKER_PIPE_PARENTS"] = ",".join(self[parent].pipe for parent in parents)
        command, host = self.wires.inside(name), self.wires.address(name)
        return Node(self.directory / name, settings=settings, command=command, host=host)

    def _end(self) -> None:
        for node in self.nodes.values():
            node.kill()
        self.wires.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    # ---- coming to rest ----

    def settle(self, topic: str, seconds: float) -> float:
        """Wait until every node has what ROOT has and is well; how long it took. TimeoutError says what is missing."""
        try:
            return wait_for(lambda: not self.unsettled(topic), "the tree comes to rest", seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n" + "\n".join(self.unsettled(topic))) from None

    def unsettled(self, topic: str) -> list[str]:
        """What is missing until all nodes hold the same and are well."""
        ends = [part["durable_end"] for part in self["root"].partitions(topic)]
        found = []
        for name, node in self.nodes.items():
            parts = node.partitions(topic)
            here = [part["durable_end"] for part in parts]
            found += [f"{name}: ends at {here}, ROOT at {ends}"] if here != ends else []
            found += [f"{name}: damaged {part['damaged']}" for part in parts if part["damaged"]]
            found += [f"{name}: {trouble}" for trouble in node.trouble()]
        return found

    def stop(self) -> None:
        """End all nodes as they should, the lowest first. Raises AssertionError when one does not."""
        codes = {name: self[name].stop() for name in reversed(PLAN)}
        assert not any(codes.values()), f"these stopped badly: {codes}"

    def differences(self, topic: str) -> list[str]:
        """What distinguishes the logs of stopped nodes from ROOT's: nothing, from where they all begin on."""
        found = []
        for number, directory in enumerate(self["root"].logs(topic)):
            paths = {
                name: node.directory / directory.relative_to(self["root"].directory)
                for name, node in self.nodes.items()
            }
            start = max(first_offset(path) for path in paths.values())
            digests = {name: digest(path, start) for name, path in paths.items()}
            found += [
                f"partition {number} from {start} on: {name} differs from ROOT"
                for name in MIRRORS
                if digests[name] != digests["root"]
            ]
            # No history was ever replaced here, so that nothing may have been cut off.
            found += [f"{name}: {cut}" for name, path in paths.items() for cut in path.glob("*.diverged-*")]
        return found

    def confessions(self) -> list[str]:
        """What the nodes themselves wrote about faults of the program."""
        found = []
        for name, node in self.nodes.items():
            text = node.log_path.read_text(errors="replace")
            found += [f"{name}: {text[match.start() :][:2000]}" for match in _TRACE.finditer(text)][:3]
        return found


def first_offset(partition: Path) -> int:
    return min((int(path.stem) for path in partition.glob("*.log")), default=0)


def digest(partition: Path, start: int) -> str:
    """SHA-256 over the files of a log, from the batch at `start` on."""
    found = hashlib.sha256()
    for data in _from(partition, start):
        found.update(data)
    return found.hexdigest()


def _from(partition: Path, start: int) -> Iterator[bytes]:
    """The bytes from the batch at `start` on, file by file."""
    for path in sorted(partition.glob("*.log")):
        data, position = path.read_bytes(), 0
        while position + batch.HEADER_BYTES <= len(data):
            if int.from_bytes(data[position : position + 8], "big") >= start:
                break
            position += int.from_bytes(data[position + 8 : position + 12], "big") + 12
        yield data[position:]
