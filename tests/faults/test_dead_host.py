"""A host that vanishes without a word: the kernel notices, and another member gets its partition.

A network namespace is the host; its link goes down, so that neither FIN nor RST ever comes. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.common.config import DEVELOPMENT
from edgebroker.network.io import channel
from tests.kit.brokers import RunningBroker, numbered, running
from tests.kit.waiting import wait_for

NAME, HERE, THERE = f"eb{os.getpid()}", "10.213.47.1", "10.213.47.2"
SECONDS = 6

# Joins the group, says so, and from then on only holds its connections.
_FAR = """
import sys, socket
sys.path[:0] = sys.argv[3:]
from tests.kit.brokers import RawClient
address = (sys.argv[1], int(sys.argv[2]))
holder, idle = RawClient(address), RawClient(address)
holder.connect("far-holder"); idle.connect("far-idle")
holder.subscribe("t", "g")
print("ready", flush=True)
sys.stdin.read()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def far_host() -> Iterator[None]:
    """A namespace with a link to here."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    try:
        ip("netns", "add", NAME)
        ip("link", "add", f"{NAME}a", "type", "veth", "peer", "name", f"{NAME}b", "netns", NAME)
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "del", NAME], check=False, capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    ip("addr", "add", f"{HERE}/30", "dev", f"{NAME}a")
    ip("link", "set", f"{NAME}a", "up")
    ip("-n", NAME, "addr", "add", f"{THERE}/30", "dev", f"{NAME}b")
    ip("-n", NAME, "link", "set", f"{NAME}b", "up")
    yield
    # The namespace lives on while the kernel still has something to tell its sockets; the link must not.
    subprocess.run(["ip", "link", "del", f"{NAME}a"], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "del", NAME], check=False, capture_output=True)


def clients(broker: RunningBroker) -> set[str]:
    return {client["client_id"] for client in broker.http("GET", "/v1/clients")[1]["clients"]}


def test_a_host_that_vanishes(tmp_path: Path, far_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "DEAD_HOST_SECONDS", SECONDS)
    monkeypatch.setenv(DEVELOPMENT, "1")
    settings = {"listen.tcp": f"{HERE}:0", "listen.pipe": ""}
    with running(tmp_path / "data", settings) as broker:
        near = broker.raw("near")
        near.publish("t", numbered(0, 1))
        here, port = broker.broker.listeners.tcp_address
        far = subprocess.Popen(
            ["ip", "netns", "exec", NAME, sys.executable, "-c", _FAR, here, str(port), str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert far.stdout is not None and far.stdout.readline() == b"ready\n"
            near.subscribe("t", "g")
            wait_for(lambda: clients(broker) >= {"far-holder", "far-idle"}, "the far clients", 10.0)
            ip("-n", NAME, "link", "set", f"{NAME}b", "down")
            near.publish("t", numbered(1, 1))
            # Neither the idle timeout (30 s) nor the delivery timeout (60 s) is needed for it.
            wait_for(lambda: clients(broker) == {"near"}, "the kernel to notice", 4.0 * SECONDS)
            assert near.deliver().offsets == [0], "what the far member had in flight comes again"
            assert broker.counters()["delivery_timeouts"] == broker.counters()["idle_timeouts"] == 0
        finally:
            far.kill()
            far.communicate()
