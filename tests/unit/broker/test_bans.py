"""Addresses that are not listened to for a while."""

from __future__ import annotations

import pytest

from edgebroker.broker.access import bans as bans_module
from edgebroker.broker.access.bans import Bans
from tests.kit.clock import ManualClock

PEER = "10.0.0.7:4711"


class World:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.bans = Bans(self.clock.monotonic)

    def fail(self, times: int, peer: str = PEER) -> None:
        for _ in range(times):
            self.bans.failed(peer)


def test_five_within_a_minute() -> None:
    world = World()
    world.fail(4)
    assert not world.bans.refuses(PEER)
    world.fail(1)
    assert world.bans.refuses(PEER)
    assert world.bans.refuses("10.0.0.7:1")
    assert not world.bans.refuses("10.0.0.8:4711")
    world.clock.advance(59.0)
    assert world.bans.refuses(PEER)
    world.clock.advance(1.0)
    assert not world.bans.refuses(PEER)


def test_four_a_minute_are_a_program_that_was_started_again() -> None:
    world = World()
    for _ in range(10):
        world.fail(4)
        world.clock.advance(61.0)
        assert not world.bans.refuses(PEER)


def test_each_time_it_is_twice_as_long_up_to_an_hour() -> None:
    world, lengths = World(), []
    for _ in range(9):
        world.fail(5)
        seconds = 0
        while world.bans.refuses(PEER):
            world.clock.advance(60.0)
            seconds += 60
        lengths.append(seconds)
    assert lengths == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    world.clock.advance(3700.0)
    world.fail(5)
    world.clock.advance(60.0)
    assert not world.bans.refuses(PEER)


def test_never_this_machine() -> None:
    world = World()
    for peer in ("127.0.0.1:5", "[::1]:5", "unix"):
        world.fail(100, peer)
        assert not world.bans.refuses(peer)


def test_not_an_address_with_a_good_token() -> None:
    """Behind it there may be many."""
    world = World()
    world.bans.known(PEER)
    world.fail(100)
    assert not world.bans.refuses(PEER)
    world.clock.advance(3601.0)
    world.fail(5)
    assert world.bans.refuses(PEER)


def test_a_site_with_many_addresses_is_one() -> None:
    world = World()
    for number in range(5):
        world.fail(1, f"[2001:db8:1:2::{number}]:4711")
    assert world.bans.refuses("[2001:db8:1:2:ffff::1]:1")
    assert not world.bans.refuses("[2001:db8:1:3::1]:1")


def test_only_so_many_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bans_module, "MOST_ADDRESSES", 10)
    world = World()
    for number in range(100):
        world.fail(5, f"10.0.1.{number}:1")
    assert len(world.bans._records) == 10
    assert world.bans.refuses("10.0.1.99:1")
