"""Tenants at a real node: what is above a quota is refused, or waits; others notice nothing."""

from __future__ import annotations

import pytest

from edgebroker.broker.access import tenants as tenants_module
from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from tests.kit.brokers import RunningBroker, batch_of
from tests.kit.fleet_nodes import Fleet
from tests.kit.raw_client import RawClient
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def root(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> RunningBroker:
    monkeypatch.setattr(tenants_module, "SAMPLE_SECONDS", 0.05)
    return fleet.root()


def quota(root: RunningBroker, **limits: int) -> None:
    assert root.http("PUT", "/v1/tenants/acme", limits)[0] == 200


def application(root: RunningBroker, name: str = "acme.tills") -> str:
    wanted = {"allow": ["produce acme.*", "create acme.*", "consume acme.*", "produce other"]}
    return str(root.http("POST", f"/v1/access/{name}/tokens", wanted)[1]["token"])


def connected(root: RunningBroker, token: str, name: str = "c") -> RawClient:
    client = root.raw(granted=False)
    client.connect(name, token=token.encode())
    return client


def test_connections(root: RunningBroker) -> None:
    token = application(root)
    early = connected(root, token, "early")
    quota(root, connections=2)
    root.advance(1.5)  # who was connected before counts as well
    wait_for(lambda: root.http("GET", "/v1/tenants")[1]["tenants"][0]["connections"] == 1, "it is counted")
    second = connected(root, token, "second")
    third = root.raw(granted=False)
    with pytest.raises(AssertionError, match="the tenant acme has 2 of the 2 connections of its quota"):
        third.connect("third", token=token.encode())
    assert third.ended()
    root.drop(second)
    wait_for(lambda: root.http("GET", "/v1/tenants")[1]["tenants"][0]["connections"] == 1, "it is gone")
    assert connected(root, token, "third").publish("acme.t", batch_of(b"v")).code is Code.OK
    assert early.publish("acme.t", batch_of(b"v")).code is Code.OK
    assert root.raw("local").publish("t", batch_of(b"v")).code is Code.OK


def test_stored_bytes_and_partitions_and_groups(root: RunningBroker) -> None:
    client = connected(root, application(root))
    quota(root, stored_bytes=20_000, partitions=2, groups=1)
    for topic in ("acme.a", "acme.b"):
        assert client.publish(topic, batch_of(b"v")).code is Code.OK
    wait_for(lambda: root.http("GET", "/v1/tenants")[1]["tenants"][0]["partitions"] == 2, "they are counted")
    answer = client.publish("acme.c", batch_of(b"v"))
    assert (answer.code, "2 of the 2 partitions" in answer.message) == (Code.OVERLOADED, True)
    assert client.subscribe("acme.a", "acme.one").code is Code.OK
    wait_for(lambda: root.http("GET", "/v1/tenants")[1]["tenants"][0]["groups"] == 1, "it is counted")
    other = connected(root, application(root), "other")
    answer = other.subscribe("acme.a", "acme.two")
    assert (answer.code, "1 of the 1 groups" in answer.message) == (Code.OVERLOADED, True)
    assert other.subscribe("acme.a", "acme.one").code is Code.OK
    assert client.publish("acme.a", batch_of(b"x" * 15_000)).code is Code.OK
    wait_for(lambda: root.http("GET", "/v1/tenants")[1]["tenants"][0]["stored_bytes"] > 15_000, "they are counted")
    answer = client.publish("acme.a", batch_of(b"x" * 15_000))
    assert (answer.code, "of the 20000 stored_bytes" in answer.message) == (Code.OVERLOADED, True)
    # Others have what they had.
    root.create("other")
    assert client.publish("other", batch_of(b"x" * 15_000)).code is Code.OK


def test_bytes_a_second_in(root: RunningBroker) -> None:
    """What is above waits: the next second's worth is answered when its time has come, and nobody else waits."""
    client = connected(root, application(root))
    quota(root, in_bytes_per_second=20_000)
    root.advance(1.5)
    payload = batch_of(b"x" * 50_000)
    begun = root.clock.monotonic()
    assert client.publish("acme.t", payload).code is Code.OK  # a second's worth ahead, and 30,000 above it
    assert root.raw("local").publish("t", batch_of(b"v")).code is Code.OK
    assert client.publish("acme.t", batch_of(b"v")).code is Code.OK
    assert root.clock.monotonic() - begun > 1.4


def test_bytes_a_second_out(root: RunningBroker) -> None:
    reader = connected(root, application(root))
    quota(root, out_bytes_per_second=20_000)
    root.advance(1.5)
    writer = root.raw("local")
    for number in range(3):
        assert writer.publish("acme.t", batch_of(b"%d" % number * 25_000)).code is Code.OK
    assert reader.subscribe("acme.t", "acme.g", size=30_000).code is Code.OK
    begun = root.clock.monotonic()
    for _ in range(3):
        delivered = reader.deliver()
        reader.ack(delivered.head, delivered.head.last + 1)
    assert root.clock.monotonic() - begun > 1.4
    assert root.http("GET", "/v1/tenants")[1]["tenants"][0]["sent_bytes"] > 75_000


def test_the_verbs(root: RunningBroker, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str]:
        code = main([*words, "--admin", root.admin])
        caught = capsys.readouterr()
        return code, caught.out + caught.err

    assert run("tenant", "set", "acme", "--stored", "1048576", "--connections", "5") == (
        0,
        "the quota of acme is set\n",
    )
    assert run("tenant", "set", "a.b")[0] == 1
    assert run("tenant", "list")[1].splitlines() == [
        "tenant  stored          in  out  connections  partitions  groups",
        "acme    0 B of 1.0 MiB  -   -    0 of 5       0           0",
    ]
    assert run("tenant", "delete", "acme") == (0, "acme is not limited any more\n")
    assert run("tenant", "delete", "acme")[0] == 1
    assert run("tenant", "list")[1].splitlines()[1:] == []
