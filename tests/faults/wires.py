"""Hosts as network namespaces, joined by a router in the middle, and what can happen to the wires between them.

with Wires(["root", "l2"]) as wires:
    BrokerProcess(..., command=wires.inside("root"), host=wires.address("root"))
    wires.unplug("l2")
    wires.mend()

The test itself stands in front of the router with a wire of its own that is never touched. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType

# What a narrow line lets through: a packet may wait so long, then it is dropped.
NARROW = ("rate", "512kbit", "burst", "16kb", "latency", "400ms")
_ROUTER, _TEST = "r", "t"


def unavailable() -> str:
    """Why there can be no wires here; "" when there can."""
    if os.geteuid():
        return "needs root"
    for tool in ("ip", "tc", "ss"):
        if shutil.which(tool) is None:
            return f"needs {tool} (iproute2)"
    name = f"eb{os.getpid()}probe"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "add", "w0", "type", "veth", "peer", "name", "w1")
        _run("tc", "-n", name, "qdisc", "add", "dev", "w0", "root", "tbf", *NARROW)
        _run("ip", "-n", name, "rule", "add", "from", "10.0.0.1", "to", "10.0.0.2", "blackhole")
    except OSError as error:
        return f"no network namespaces here: {error}"
    finally:
        _try("ip", "netns", "del", name)
    return ""


def _run(*words: str) -> None:
    """A command that must work. Raises OSError with what it said."""
    result = subprocess.run(words, check=False, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"{' '.join(words)}: {result.stderr.strip()}")


def _try(*words: str) -> None:
    """A command that need not work: what it undoes may never have been done."""
    subprocess.run(words, check=False, capture_output=True)


class Wires:
    """A context manager. Host number n is 10.x.n.2, its side of the router 10.x.n.1; the last network is the test's."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = list(hosts)
        self._prefix = ""
        self._name = f"eb{os.getpid()}"
        self._holes: list[tuple[str, str]] = []

    # ---- names ----

    def inside(self, host: str) -> list[str]:
        """The command in front of one that is to run on a host."""
        return ["ip", "netns", "exec", self._space(host)]

    def address(self, host: str) -> str:
        return f"{self._prefix}.{self._number(host)}.2"

    def _number(self, host: str) -> int:
        return self.hosts.index(host) + 1 if host != _TEST else len(self.hosts) + 1

    def _space(self, host: str) -> str:
        return f"{self._name}{host if host == _ROUTER else self._number(host)}"

    def _device(self, host: str) -> str:
        """The host's wire at the router."""
        return f"w{self._number(host)}"

    # ---- life ----

    def __enter__(self) -> Wires:
        self._prefix = self._reserve()
        try:
            _run("ip", "netns", "add", self._space(_ROUTER))
            _run("ip", "netns", "exec", self._space(_ROUTER), "sysctl", "-qw", "net.ipv4.ip_forward=1")
            for host in self.hosts:
                _run("ip", "netns", "add", self._space(host))
                _run("ip", "-n", self._space(host), "link", "set", "lo", "up")
                self._join(host, ["-n", self._space(host)], "w0")
                _run("ip", "-n", self._space(host), "route", "add", "default", "via", self._gateway(host))
            self._join(_TEST, [], self._name)
            _run("ip", "route", "add", f"{self._prefix}.0.0/16", "via", self._gateway(_TEST))
        except OSError:
            self.close()
            raise
        return self

    @staticmethod
    def _reserve() -> str:
        """A network that no other run uses: a route that leads nowhere says that it is taken."""
        for number in range(100, 200):
            try:
                _run("ip", "route", "add", "blackhole", f"10.{number}.0.0/16", "metric", "9999")
            except OSError:
                continue
            return f"10.{number}"
        raise OSError("no network is free: look at `ip route`")

    def _join(self, host: str, where: list[str], device: str) -> None:
        """A wire from a device of a host to the router."""
        router = self._space(_ROUTER)
        _run("ip", *where, "link", "add", device, "type", "veth", "peer", "name", self._device(host), "netns", router)
        _run("ip", *where, "addr", "add", f"{self.address(host)}/24", "dev", device)
        _run("ip", "-n", router, "addr", "add", f"{self._gateway(host)}/24", "dev", self._device(host))
        _run("ip", *where, "link", "set", device, "up")
        _run("ip", "-n", router, "link", "set", self._device(host), "up")

    def _gateway(self, host: str) -> str:
        return f"{self._prefix}.{self._number(host)}.1"

    def close(self) -> None:
        # A namespace lives on while the kernel still has something to tell its sockets; the wires must not.
        _try("ip", "link", "del", self._name)
        for host in self.hosts:
            _try("ip", "-n", self._space(host), "link", "del", "w0")
        for host in (*self.hosts, _ROUTER):
            _try("ip", "netns", "del", self._space(host))
        _try("ip", "route", "del", "blackhole", f"{self._prefix}.0.0/16", "metric", "9999")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what can happen ----

    def unplug(self, host: str) -> None:
        """Pull the wire out at the router: the host does not even notice."""
        _run("ip", "-n", self._space(_ROUTER), "link", "set", self._device(host), "down")

    def plug(self, host: str) -> None:
        _run("ip", "-n", self._space(_ROUTER), "link", "set", self._device(host), "up")

    def narrow(self, host: str) -> None:
        """512 kbit in both directions."""
        _run("tc", "-n", self._space(_ROUTER), "qdisc", "replace", "dev", self._device(host), "root", "tbf", *NARROW)
        _run("tc", "-n", self._space(host), "qdisc", "replace", "dev", "w0", "root", "tbf", *NARROW)

    def widen(self, host: str) -> None:
        for space, device in ((_ROUTER, self._device(host)), (host, "w0")):
            _try("tc", "-n", self._space(space), "qdisc", "del", "dev", device, "root")

    def swallow(self, one: str, other: str) -> None:
        """What these two send each other vanishes; everybody else reaches them."""
        self._holes.append((one, other))
        self._rule("add", one, other)

    def release(self, one: str, other: str) -> None:
        if (one, other) in self._holes:
            self._holes.remove((one, other))
            self._rule("del", one, other)

    def _rule(self, verb: str, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            words = ("rule", verb, "from", self.address(here), "to", self.address(there), "priority", "100")
            _run("ip", "-n", self._space(_ROUTER), *words, "blackhole")

    def reset(self, host: str) -> None:
        """Every connection of the host ends with an RST."""
        _try(*self.inside(host), "ss", "-K", "-t")

    def mend(self) -> None:
        """Everything is as it was."""
        for pair in list(self._holes):
            self.release(*pair)
        for host in self.hosts:
            self.plug(host)
            self.widen(host)
