"""The tree of the demonstration: five brokers as five processes, and what goes wrong between them.

ROOT - L2 - L3 - POS - LOCAL, each told by the registry at ROOT whom to follow. The line between L3 and POS is cut, L3
and POS are killed, and a byte of a sealed segment at POS is flipped; then all is restored. At the end the logs of all
nodes, read from the disk, must be the same, byte for byte, and ROOT must know that LOCAL has applied everything.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.common.clock import SystemClock, sleep
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.threads import start_thread

LEVELS = {"root": "", "l2": "eu", "l3": "eu/north", "pos": "eu/north/store-1", "local": "eu/north/store-1"}
CUT_SECONDS = 1.5
DEADLINE_SECONDS = 60.0
SETTINGS = {
    "EDGEBROKER_STORAGE_SEGMENT_BYTES": str(256 << 10),
    "EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0",
    "EDGEBROKER_STORAGE_SOFT_FREE_BYTES": "0",
    "EDGEBROKER_LOG_LEVEL": "warning",
}


class DemoLine:
    """A line to another node, `target`, that can be cut; children reach the node by its `address`."""

    def __init__(self) -> None:
        self.target = ""
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._whole = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        start_thread("demo-line", self._accept)

    def _accept(self) -> None:
        while True:
            try:
                lower, _ = self._listener.accept()
            except OSError:
                return
            try:
                if not self._whole:
                    raise OSError("the line is cut")
                host, _, port = self.target.rpartition(":")
                upper = socket.create_connection((host, int(port)), 5.0)
                upper.settimeout(None)
            except OSError:
                lower.close()
                continue
            self._pairs.append((lower, upper))
            for source, sink in ((lower, upper), (upper, lower)):
                start_thread("demo-line", lambda source=source, sink=sink: self._pass_on(source, sink))  # type: ignore[misc]

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass
        _shut(source)
        _shut(sink)

    def cut(self) -> None:
        self._whole = False
        for pair in self._pairs:
            for sock in pair:
                _shut(sock)
        self._pairs.clear()

    def mend(self) -> None:
        self._whole = True

    def close(self) -> None:
        self.cut()
        _shut(self._listener)
        self._listener.close()


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class DemoTree:
    """Started by `with`; whatever happens, all processes end with it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._clock = SystemClock()
        self._nodes: dict[str, BrokerProcess] = {}
        self._line: DemoLine | None = None
        self._damaged: Path | None = None

    @property
    def root(self) -> BrokerProcess:
        return self._nodes["root"]

    @property
    def local(self) -> BrokerProcess:
        return self._nodes["local"]

    def __enter__(self) -> DemoTree:
        try:
            self._line = DemoLine()
            above = ""
            for level, region in LEVELS.items():
                settings = {**SETTINGS, "EDGEBROKER_NODE_LEVEL": level, "EDGEBROKER_NODE_NAME": level}
                settings["EDGEBROKER_NODE_REGION"] = region
                if level == "root":
                    settings["EDGEBROKER_REGISTRY_ENABLED"] = "true"
                else:
                    settings["EDGEBROKER_PIPE_REGISTRY"] = self._nodes[above].admin
                if level == "l3":
                    settings["EDGEBROKER_PIPE_ADDRESS"] = self._line.address
                node = self._nodes[level] = BrokerProcess(self._directory / level, settings=settings)
                node.start()
                if level == "l3":
                    self._line.target = node.admin
                if above:
                    self._wait_for_parent(level, above)
                above = level
        except BaseException:
            self._kill()
            raise
        return self

    def _wait_for_parent(self, level: str, above: str) -> None:
        """Until a node follows the one that it should, and the registry knows it, so that it is named to the next."""

        def follows() -> bool:
            found = {node["name"]: node for node in call(self.root.admin, "GET", "/v1/tree/nodes")["nodes"]}
            return level in found and found[level]["parent"] == above

        self._until(follows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def _kill(self) -> None:
        for node in self._nodes.values():
            node.kill()
        if self._line is not None:
            self._line.close()

    def stop(self) -> bool:
        """End all nodes, the lowest first; True when every one of them stopped cleanly."""
        return all([self._nodes[level].stop() == 0 for level in reversed(list(LEVELS))])

    def wait_for_topic(self, topic: str) -> None:
        """Until it has come down to LOCAL. Raises EdgeBrokerError when it does not."""
        self._until(lambda: topic in [one["name"] for one in call(self.local.admin, "GET", "/v1/topics")["topics"]])

    def disturb(self) -> None:
        """Cut the line between L3 and POS, kill both, flip a byte at POS; a moment later all is restored."""
        assert self._line is not None
        l3, pos = self._nodes["l3"], self._nodes["pos"]
        self._line.cut()
        l3.kill()
        pos.kill()
        sealed = sorted((pos.directory / "topics" / "sales").glob("*/*.log"), key=lambda path: path.name)
        self._damaged = max(sealed[: len(sealed) - 4] or sealed, key=lambda path: path.stat().st_size)
        data = bytearray(self._damaged.read_bytes())
        data[len(data) // 2] ^= 0x10
        self._damaged.write_bytes(data)
        sleep(CUT_SECONDS)
        pos.start()
        l3.start()
        self._line.mend()

    @property
    def repaired(self) -> int:
        """Damaged records that POS fetched again."""
        return int(call(self._nodes["pos"].admin, "GET", "/v1/node")["counters"]["records_repaired"])

    def wait_until_applied(self, topic: str, partitions: int) -> bool:
        """Wait until ROOT knows that every terminal has applied what it holds; False when it does not in time."""
        parts = call(self.root.admin, "GET", f"/v1/topics/{topic}")["partitions"]
        ends = "&".join(f"end={number}:{parts[number]['durable_end']}" for number in range(partitions))

        def applied() -> bool:
            found = call(self.root.admin, "GET", f"/v1/tree/applied?topic={topic}&{ends}")
            return bool(found["nodes"] == found["done"] == 1)

        try:
            self._until(applied)
        except EdgeBrokerError:
            return False
        return True

    def wait_until_same(self, topic: str, partitions: int) -> bool:
        """Wait until every node has everything and nothing is damaged; True when then all hold the same bytes."""

        def settled() -> bool:
            found = [call(node.admin, "GET", f"/v1/topics/{topic}")["partitions"] for node in self._nodes.values()]
            ends = {tuple(part["durable_end"] for part in parts) for parts in found}
            return (
                len(ends) == 1 and not any(part["damaged"] for parts in found for part in parts) and self.repaired > 0
            )

        try:
            self._until(settled)
        except EdgeBrokerError:
            return False
        return all(
            len({self._digest(node, topic, number) for node in self._nodes.values()}) == 1
            for number in range(partitions)
        )

    @staticmethod
    def _digest(node: BrokerProcess, topic: str, partition: int) -> str:
        """Over the batch bytes of a log, as they lie on the disk."""
        found = hashlib.sha256()
        for path in sorted((node.directory / "topics" / topic / str(partition)).glob("*.log")):
            found.update(path.read_bytes())
        return found.hexdigest()

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = self._clock.monotonic() + DEADLINE_SECONDS
        while not condition():
            if self._clock.monotonic() > deadline:
                raise EdgeBrokerError(f"the tree did not settle within {DEADLINE_SECONDS:g} s")
            sleep(0.05)
