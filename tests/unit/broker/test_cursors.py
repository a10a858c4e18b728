"""Cursors that wait: before damage until retention has removed it, and for their turn while their member breaks off."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, GapReason, Wanted
from edgebroker.common.types import AckLevel, Start, TopicSettings
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Gap, Intent, Subscribe
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, numbered, running
from tests.kit.delivery_world import TURN_BYTES, Watcher, World
from tests.kit.raw_client import RawClient
from tests.kit.storage import pack

SEGMENT = {"storage.segment_bytes": 64 << 10, "limits.idle_timeout_ms": 1_000_000_000}


class Nobody:
    """Watches nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *happened: None


def state(broker: RunningBroker) -> str:
    found: str = broker.http("GET", "/v1/groups/g")[1]["partitions"][0]["member"]["state"]
    return found


def damaged(directory: Path) -> int:
    """A log whose first segment has damage in the middle; how many records it has."""
    with running(directory, SEGMENT) as broker:
        client = broker.raw()
        for first in range(0, 400, 10):
            client.publish("t", numbered(first, 10, 500))
    segment = min((directory / "topics" / "t" / "0").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[data.index(b"....", len(data) // 2)] ^= 0x40
    segment.write_bytes(data)
    return 400


def up_to_damage(broker: RunningBroker) -> tuple[RawClient, int]:
    """A member that has handled all that there is before the damage, and where that is."""
    client = broker.raw()
    correlation = client.next_correlation() + 1
    assert client.subscribe("t", "g").code is Code.OK
    told = client.answer(correlation)
    assert told.code is Code.DAMAGED
    head = client.deliver().head
    while head.last + 1 < told.offset:
        head = client.deliver().head
    assert client.acked(head, told.offset) is Code.OK
    assert state(broker) == "damaged"
    return client, told.offset


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [True, False])
def test_who_waits_before_damage_goes_on_when_retention_has_removed_it(tmp_path: Path, quiet: bool) -> None:
    end = damaged(tmp_path / "data")
    with running(tmp_path / "data", SEGMENT) as broker:
        client, offset = up_to_damage(broker)
        assert broker.http("PATCH", "/v1/topics/t", {"retention_bytes": 64 << 10})[0] == 200
        log = broker.broker.engine.log("t", 0)
        assert log is not None
        deadline = time.monotonic() + SECONDS
        while log.log_start <= offset:
            assert time.monotonic() < deadline
            broker.advance(1)
        if not quiet:
            broker.raw("producer").publish("t", numbered(end, 1))
            end += 1
        following = offset
        while following < end:
            delivered = client.deliver()
            if following == offset:
                assert delivered.head.gaps == [Gap(offset, delivered.head.last, GapReason.RETENTION)]
            assert delivered.head.first == following
            following = delivered.head.last + 1
            assert client.acked(delivered.head, following) is Code.OK
        assert state(broker) == "live"


@pytest.mark.parametrize("partitions", [1, 2, 3])
def test_a_member_that_is_found_gone_while_it_is_served(partitions: int) -> None:
    """All its partitions wait for their turn, and the first one shows that the connection is over."""
    world = World()
    world.start(cast("Watcher", Nobody()))
    world.engine.create_topic("t", TopicSettings(partitions=partitions), lambda code, message: None)
    for partition in range(partitions):
        for rank in range(10):
            data, spans = pack([batch_of(b"." * (TURN_BYTES // 3), b"%d" % rank)])
            world.engine.append(world.log(("t", partition)), data, spans, AckLevel.DURABLE, False, -1)
            world.settle()
    member = world.connect("client")
    line = Wanted("t", -1, Start.EARLIEST, NO_LOG_ID, -1, 0)
    member.client_says(frames.write_subscribe(1, Subscribe(Intent.JOIN, "g", 0, 0, [line])))
    world.loop.turn()
    assert len(world.core.push._waiting) == partitions
    member.wire.fuse = 1
    world.settle()
    assert (member.wire.closed, world.members, world.core.push._waiting) == (True, [], {})
