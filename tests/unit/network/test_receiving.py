"""The bytes of all connections that wait: who is closed when they are too many or too late, and how much is read."""

from __future__ import annotations

import random
import socket

import pytest

from edgebroker.network.io.channel import PlainChannel
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.receiving import FULL_BYTES, SHARED_BYTES, Receiving
from edgebroker.network.io.transport import Transport
from edgebroker.network.wire.connection import ReceiveBuffer
from tests.kit.clock import ManualClock

LIMIT = 1 << 20
SEED = 20261130


class Owner:
    """Of a transport; tells the accounts that it is over, as sessions do."""

    def __init__(self, receiving: Receiving) -> None:
        self.receiving, self.reason = receiving, ""
        self.transport: Transport | None = None

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None: ...
    def on_drained(self) -> None: ...

    def on_closed(self, reason: str) -> None:
        self.reason = reason
        assert self.transport is not None
        self.receiving.handled(self.transport)


class World:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.loop = Loop(self.clock)
        self.receiving = Receiving(self.loop, LIMIT)
        self.buffer = self.receiving.buffer(LIMIT)
        self.owners: list[Owner] = []
        self.others: list[socket.socket] = []

    def add(self) -> Transport:
        mine, other = socket.socketpair()
        owner = Owner(self.receiving)
        owner.transport = Transport(self.loop, PlainChannel(mine), self.buffer, owner, "peer")
        self.owners.append(owner)
        self.others.append(other)
        return owner.transport

    def close(self) -> None:
        for owner in self.owners:
            assert owner.transport is not None
            owner.transport.close("the end")
        for other in self.others:
            other.close()
        assert self.receiving.bytes == 0
        self.loop.close()


@pytest.fixture
def world() -> World:
    return World()


def test_the_one_that_takes_longest_is_closed(world: World) -> None:
    first, second, third = world.add(), world.add(), world.add()
    world.receiving.unfinished(first, LIMIT // 2, 10.0, begun=True)
    world.receiving.unfinished(second, LIMIT // 2, 10.0, begun=True)
    world.receiving.unfinished(first, LIMIT // 4, 10.0, begun=True)  # it has ended that, and began another
    world.receiving.unfinished(third, LIMIT // 4, 10.0, begun=True)
    assert [one.closed for one in (first, second, third)] == [False, False, False]
    world.receiving.unfinished(third, LIMIT // 4 + 1, 10.0, begun=False)
    assert [one.closed for one in (first, second, third)] == [False, True, False]
    assert "limits.receive_bytes" in world.owners[1].reason
    assert (world.receiving.closed, world.receiving.bytes) == (1, LIMIT // 2 + 1)
    world.close()


def test_who_waits_for_the_node_is_not_closed_for_others(world: World) -> None:
    waiting, unfinished = world.add(), world.add()
    world.receiving.waits(waiting, LIMIT * 2)
    assert not waiting.closed
    world.receiving.unfinished(unfinished, 1, 10.0, begun=True)
    assert unfinished.closed
    assert not waiting.closed
    world.close()


def test_one_that_exceeds_the_limit_alone_is_closed(world: World) -> None:
    alone = world.add()
    world.receiving.unfinished(alone, LIMIT + 1, 10.0, begun=True)
    assert alone.closed
    assert world.receiving.bytes == 0
    world.close()


def test_what_is_late_is_closed_however_it_goes_on(world: World) -> None:
    late, other = world.add(), world.add()
    world.receiving.unfinished(late, 1, 10.0, begun=True)
    for second in range(11):
        world.receiving.unfinished(late, second + 2, 10.0, begun=False)
        world.receiving.unfinished(other, second + 2, 10.0, begun=True)
        world.clock.advance(1.0)
        world.loop.turn(0)
        world.receiving.sweep()
        assert late.closed == (second == 10)
    assert not other.closed
    world.close()


def test_less_is_read_at_a_time_as_the_limit_comes_near(world: World) -> None:
    one, two = world.add(), world.add()
    assert len(world.buffer.room) == LIMIT
    world.receiving.waits(one, LIMIT // 4)
    assert len(world.buffer.room) == SHARED_BYTES
    assert len(world.receiving.buffer(LIMIT).room) == SHARED_BYTES
    world.receiving.waits(two, LIMIT)
    assert len(world.buffer.room) == FULL_BYTES
    world.receiving.handled(two)
    assert len(world.buffer.room) == SHARED_BYTES
    world.receiving.handled(one)
    assert len(world.buffer.room) == LIMIT
    world.close()


def test_any_order(world: World) -> None:
    """Against the sum of what each one said last; above the limit nobody is left who could be closed."""
    rng, kept = random.Random(SEED), dict[Transport, int]()
    for _ in range(3000):
        transport = rng.choice([*kept, world.add()][-40:])
        if transport.closed:
            continue
        size = rng.choice([0, 1, 100, LIMIT // 50, LIMIT // 7])
        kind = rng.randrange(5)
        if kind == 0:
            transport.close("gone")
        elif kind == 1:
            world.receiving.handled(transport)
            kept[transport] = 0
        elif kind == 2:
            world.receiving.waits(transport, size)
            kept[transport] = size
        else:
            world.receiving.unfinished(transport, size, 10.0, begun=rng.random() < 0.5)
            kept[transport] = size
        kept = {one: size for one, size in kept.items() if not one.closed}
        assert world.receiving.bytes == sum(kept.values())
        assert world.receiving.bytes <= LIMIT or not world.receiving._unfinished
        if len(world.others) > 200:
            world.close()
            world.__init__()  # type: ignore[misc]
            kept = {}
    world.close()
