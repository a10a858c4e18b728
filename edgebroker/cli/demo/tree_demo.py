"""The tree of the demonstration: five brokers as five processes, and the faults between them.

ROOT - L2 - L3 - POS - LOCAL; they join a fleet with a token each and speak TLS, and the registry at ROOT assigns the
parents. The connection between L3 and POS is cut, L3 and POS are killed, and a byte of a sealed segment at POS is
flipped; then all is restored. In the end the logs of all nodes, read from the disk, must be identical, and ROOT must
know that LOCAL has applied everything.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.runtime.clock import SystemClock, sleep
from edgebroker.common.runtime.threads import start_thread

LEVELS = {"root": "", "l2": "eu", "l3": "eu/north", "pos": "eu/north/store-1", "local": "eu/north/store-1"}
FLEET = "demo"
CUT_SECONDS = 1.5
DEADLINE_SECONDS = 60.0
SETTINGS = {
    "EDGEBROKER_STORAGE_SEGMENT_BYTES": str(256 << 10),
    "EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0",
    "EDGEBROKER_STORAGE_SOFT_FREE_BYTES": "0",
    "EDGEBROKER_LOG_LEVEL": "warning",
}


class CuttableProxy:
    """A TCP proxy from `address` to `target` whose connections can be cut."""

    def __init__(self) -> None:
        self.target = ""
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._open = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        start_thread("demo-proxy", self._accept)

    def _accept(self) -> None:
        while True:
            try:
                lower, _ = self._listener.accept()
            except OSError:
                return
            try:
                if not self._open:
                    raise OSError("the connection is cut")
                host, _, port = self.target.rpartition(":")
                upper = socket.create_connection((host, int(port)), 5.0)
                upper.settimeout(None)
            except OSError:
                lower.close()
                continue
            self._pairs.append((lower, upper))
            for source, sink in ((lower, upper), (upper, lower)):
                start_thread("demo-proxy", partial(self._forward, source, sink))

    @staticmethod
    def _forward(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass
        _shut(source)
        _shut(sink)

    def cut(self) -> None:
        self._open = False
        for pair in self._pairs:
            for sock in pair:
                _shut(sock)
        self._pairs.clear()

    def restore(self) -> None:
        self._open = True

    def close(self) -> None:
        self.cut()
        _shut(self._listener)
        self._listener.close()


def _joined(node: BrokerProcess) -> bool:
    return bool(call(node.admin, "GET", "/v1/trust")["node"])


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class DemoTree:
    """Runs within a `with` block; all processes end with the block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._clock = SystemClock()
        self._nodes: dict[str, BrokerProcess] = {}
        self._proxy: CuttableProxy | None = None
        self._damaged: Path | None = None

    @property
    def root(self) -> BrokerProcess:
        return self._nodes["root"]

    @property
    def local(self) -> BrokerProcess:
        return self._nodes["local"]

    def __enter__(self) -> DemoTree:
        try:
            self._proxy = CuttableProxy()
            above = ""
            for level, region in LEVELS.items():
                settings = {**SETTINGS, "EDGEBROKER_NODE_LEVEL": level, "EDGEBROKER_NODE_NAME": level}
                settings["EDGEBROKER_NODE_REGION"] = region
                if level == "root":
                    settings["EDGEBROKER_REGISTRY_ENABLED"], settings["EDGEBROKER_TRUST_FLEET"] = "true", FLEET
                else:
                    settings["EDGEBROKER_PIPE_REGISTRY"] = self._nodes[above].pipe
                    settings["EDGEBROKER_TRUST_TOKEN_FILE"] = str(self._token_file(level))
                if level == "l3":
                    settings["EDGEBROKER_PIPE_ADDRESS"] = self._proxy.address
                node = self._nodes[level] = BrokerProcess(self._directory / level, settings=settings)
                node.start()
                if level == "l3":
                    self._proxy.target = node.pipe
                self._wait_until(partial(_joined, node))
                if above:
                    self._wait_for_parent(level, above)
                above = level
        except BaseException:
            self._kill()
            raise
        return self

    def _token_file(self, level: str) -> Path:
        """A file with a token for one machine of a level."""
        wanted = {"tokens": [{"levels": [level], "region": LEVELS[level]}]}
        path = self._directory / f"{level}.token"
        path.write_text(call(self.root.admin, "POST", "/v1/trust/tokens", wanted)["tokens"][0])
        return path

    def _wait_for_parent(self, level: str, above: str) -> None:
        """Wait until a node has its parent and the registry knows it, so that it can become a parent itself."""

        def follows() -> bool:
            found = {node["name"]: node for node in call(self.root.admin, "GET", "/v1/tree/nodes")["nodes"]}
            return level in found and found[level]["parent"] == above

        self._wait_until(follows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def _kill(self) -> None:
        for node in self._nodes.values():
            node.kill()
        if self._proxy is not None:
            self._proxy.close()

    def stop(self) -> bool:
        """Stop all nodes, the lowest first; True when every one stopped cleanly."""
        return all([self._nodes[level].stop() == 0 for level in reversed(list(LEVELS))])

    def wait_for_topic(self, topic: str) -> None:
        """Wait until LOCAL has a topic. Raises EdgeBrokerError when it does not get it in time."""
        self._wait_until(
            lambda: topic in [found["name"] for found in call(self.local.admin, "GET", "/v1/topics")["topics"]]
        )

    def disturb(self) -> None:
        """Cut the connection between L3 and POS, kill both, flip a byte at POS; then restore everything."""
        assert self._proxy is not None
        l3, pos = self._nodes["l3"], self._nodes["pos"]
        self._proxy.cut()
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
        self._proxy.restore()

    @property
    def repaired(self) -> int:
        """How many records of corrupt ranges POS has repaired."""
        return int(call(self._nodes["pos"].admin, "GET", "/v1/node")["counters"]["records_repaired"])

    def wait_until_applied(self, topic: str, partitions: int) -> bool:
        """Wait until ROOT knows that every terminal has applied the topic; False when it takes too long."""
        parts = call(self.root.admin, "GET", f"/v1/topics/{topic}")["partitions"]
        ends = "&".join(f"end={number}:{parts[number]['durable_end']}" for number in range(partitions))

        def applied() -> bool:
            found = call(self.root.admin, "GET", f"/v1/tree/applied?topic={topic}&{ends}")
            return bool(found["nodes"] == found["done"] == 1)

        try:
            self._wait_until(applied)
        except EdgeBrokerError:
            return False
        return True

    def wait_until_same(self, topic: str, partitions: int) -> bool:
        """Wait until every node has everything and nothing is corrupt; True when the logs are then identical."""

        def settled() -> bool:
            found = [call(node.admin, "GET", f"/v1/topics/{topic}")["partitions"] for node in self._nodes.values()]
            ends = {tuple(part["durable_end"] for part in parts) for parts in found}
            return (
                len(ends) == 1 and not any(part["damaged"] for parts in found for part in parts) and self.repaired > 0
            )

        try:
            self._wait_until(settled)
        except EdgeBrokerError:
            return False
        return all(
            len({self._digest(node, topic, number) for node in self._nodes.values()}) == 1
            for number in range(partitions)
        )

    @staticmethod
    def _digest(node: BrokerProcess, topic: str, partition: int) -> str:
        """The SHA-256 of the segment files of a log."""
        found = hashlib.sha256()
        for path in sorted((node.directory / "topics" / topic / str(partition)).glob("*.log")):
            found.update(path.read_bytes())
        return found.hexdigest()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = self._clock.monotonic() + DEADLINE_SECONDS
        while not condition():
            if self._clock.monotonic() > deadline:
                raise EdgeBrokerError(f"the tree did not converge within {DEADLINE_SECONDS:g} s")
            sleep(0.05)
