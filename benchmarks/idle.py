"""An idle line: what a parent and a child say to each other in an hour in which nothing is published.

The child lives in a network namespace of its own, behind a pair of veth interfaces; the bytes are those that the
parent's interface counts, without the Ethernet headers. Real time, since the kernel's keepalives know no other.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.node import DIRECTORY, connected_child
from benchmarks.rows import Row
from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.pipe.stream import HEADER_BYTES, Kind

TOPICS = tuple(f"topic-{number}" for number in range(20))
POLLS = 3
# A report is made again every half an hour; at the beginning, within the time that is measured, more often.
REPORTS = 2
TARGET_BYTES = 60_000
ETHERNET_BYTES = 14
# The range that is set aside for measuring networks (RFC 2544).
PARENT, CHILD = "198.18.77.1", "198.18.77.2"
FREE = {"EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0", "EDGEBROKER_STORAGE_SOFT_FREE_BYTES": "0"}
QUIET = {**FREE, "EDGEBROKER_LOG_LEVEL": "warning"}
ETH_P_ALL = 3
SYN = 2


def idle(pinned: bool) -> list[Row]:
    """Whole polls of 90 seconds, POLLS of them, scaled to an hour; and the two reports of an hour in which nothing
    changes."""
    name = f"an hour of an idle line, {len(TOPICS)} topics"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return [Row(name, "not measured", "needs root and iproute2 (network namespaces)", 0.0, "60 KB", False)]
    directory = Path(tempfile.mkdtemp(prefix="edgebroker-bench-", dir=DIRECTORY))
    parent = BrokerProcess(
        directory / "parent",
        settings={
            **QUIET,
            "EDGEBROKER_NODE_LEVEL": "root",
            "EDGEBROKER_DEVELOPMENT_INSECURE": "1",
            "EDGEBROKER_REGISTRY_ENABLED": "true",
        },
        host=PARENT,
    )
    child: BrokerProcess | None = None
    try:
        with cable() as (interface, namespace):
            parent.start()
            for topic in TOPICS:
                call(parent.admin, "POST", "/v1/topics", {"name": topic})
            child = BrokerProcess(
                directory / "child",
                settings={**QUIET, "EDGEBROKER_NODE_LEVEL": "pos", "EDGEBROKER_PIPE_REGISTRY": parent.pipe},
                command=["ip", "netns", "exec", namespace],
            )
            child.start()
            seconds, parts = _listen(interface, f"unix:{parent.directory}/ctl.sock")
            seen = _change_seen(parent, f"unix:{child.directory}/ctl.sock")
    finally:
        for node in (child, parent):
            if node is not None:
                node.kill()
        shutil.rmtree(directory, ignore_errors=True)
    report = parts.pop("reports", 0) / max(1, parts.pop("connections", 0))
    hour = {kind: count * 3600 / seconds for kind, count in parts.items()} | {"reports": REPORTS * report}
    told = ", ".join(f"{kind} {count / 1000:.1f} KB" for kind, count in sorted(hour.items()))
    figure = sum(hour.values())
    return [
        Row(name, f"{figure / 1000:.1f} KB", told, figure / 1000, "60 KB", figure < TARGET_BYTES),
        Row("a change of the topology is seen", f"{seen:.1f} s", "seconds, at the child", seen, "120", seen <= 120),
    ]


def _change_seen(parent: BrokerProcess, child: str) -> float:
    """Seconds from the report of a new hub to the moment when the child has it among its candidates."""
    hub = {"uid": "1" * 32, "name": "hub", "level": "l2", "version": "1", "boot": "1" * 16, "number": 1}
    batch = {"sender": "1" * 32, "session": "s", "number": 0, "nodes": [{"report": {**hub, "address": "hub:7421"}}]}
    begun = time.monotonic()
    with connected_child(parent.pipe, str(hub["uid"])):
        call(parent.pipe, "POST", "/v1/tree/reports", batch)
    while "hub:7421" not in call(child, "GET", "/v1/pipe")["parent"]["candidates"]:
        time.sleep(0.1)
    return time.monotonic() - begun


@contextmanager
def cable() -> Iterator[tuple[str, str]]:
    """(this end's interface, the namespace at the other end). Nothing but IPv4 between the two addresses is on it."""
    namespace, near, far = f"eb-idle-{os.getpid()}", f"ebn{os.getpid()}", f"ebf{os.getpid()}"
    macs = ("02:00:00:00:77:01", "02:00:00:00:77:02")
    _ip("netns", "add", namespace)
    try:
        _ip("link", "add", near, "address", macs[0], "type", "veth", "peer", "name", far, "address", macs[1], "netns", namespace)  # fmt: skip  # noqa: E501
        for inside, interface, address, other, mac in (
            ((), near, PARENT, CHILD, macs[1]),
            (("-n", namespace), far, CHILD, PARENT, macs[0]),
        ):
            _ip(*inside, "link", "set", interface, "addrgenmode", "none")
            _ip(*inside, "address", "add", f"{address}/30", "dev", interface)
            _ip(*inside, "link", "set", interface, "up")
            _ip(*inside, "neighbour", "replace", other, "lladdr", mac, "dev", interface, "nud", "permanent")
        _ip("-n", namespace, "link", "set", "lo", "up")
        yield near, namespace
    finally:
        _ip("netns", "delete", namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _listen(interface: str, admin: str) -> tuple[float, Counter[str]]:
    """(seconds, IP bytes both ways by what they were for) of whole polls; all that the interface counted is in it."""

    def polls() -> int:
        return int(call(admin, "GET", "/v1/node")["counters"]["pipe_polls"])

    def next_poll(after: int) -> int:
        """Wait for it, and for what is said with it."""
        while polls() == after:
            time.sleep(0.2)
        time.sleep(2.0)
        return polls()

    seen = next_poll(0)
    sniffer = Sniffer(interface)
    before, begun = _counted(interface), time.monotonic()
    for _ in range(POLLS):
        seen = next_poll(seen)
    size, seconds = _counted(interface) - before, time.monotonic() - begun
    parts = sniffer.close()
    missed = size - sum(count for kind, count in parts.items() if kind != "connections")
    assert abs(missed) < size / 20, f"{missed} of {size} bytes were not looked at"
    return seconds, parts


def _counted(interface: str) -> int:
    def statistic(name: str) -> int:
        return int(Path(f"/sys/class/net/{interface}/statistics/{name}").read_text())

    packets = statistic("rx_packets") + statistic("tx_packets")
    return statistic("rx_bytes") + statistic("tx_bytes") - packets * ETHERNET_BYTES


class Sniffer:
    """Reads every packet of an interface and adds up what it was for. An acknowledgement counts to what it answers."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self._socket.bind((interface, ETH_P_ALL))
        self._socket.settimeout(0.2)
        self._found: Counter[str] = Counter()
        self._last = {True: "polls", False: "polls"}
        self._next = {True: -1, False: -1}
        # The child's port of the connection on which it polls; every other one is for a report.
        self._pipe = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            try:
                packet, address = self._socket.recvfrom(1 << 16)
            except TimeoutError:
                continue
            self._take(packet, address[2] == socket.PACKET_OUTGOING)

    def _take(self, packet: bytes, down: bool) -> None:
        if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
            self._found["other"] += len(packet)
            return
        (size,), head = struct.unpack_from(">H", packet, 2), (packet[0] & 15) * 4
        (sequence,) = struct.unpack_from(">I", packet, head + 4)
        port = struct.unpack_from(">HH", packet, head)[1 if down else 0]
        self._pipe = self._pipe or port
        if port != self._pipe:
            self._found["reports"] += size
            self._found["connections"] += bool(packet[head + 13] & SYN and not down)
            return
        payload = packet[head + (packet[head + 12] >> 4) * 4 : size]
        if payload:
            at = payload.find(b"\r\n") + 2
            told = len(payload) < HEADER_BYTES + 16 and len(payload) > HEADER_BYTES and payload[at + 4] == Kind.IDLE
            self._last[down] = "idle frames" if down and told else "polls"
            self._next[down] = (sequence + len(payload)) & 0xFFFFFFFF
            kind = self._last[down]
        elif self._next[down] >= 0 and sequence == (self._next[down] - 1) & 0xFFFFFFFF:
            kind = self._last[down] = "keepalives"
        else:
            kind = self._last[not down]
        self._found[kind] += size

    def close(self) -> Counter[str]:
        self._closing = True
        self._thread.join()
        self._socket.close()
        return self._found
