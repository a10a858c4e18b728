"""Quotas of tenants: bytes a second against a plain account, and counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgebroker.broker.access.tenants import Bucket, Share, Tenant
from edgebroker.broker.trust.trust_topic import Quota
from tests.kit.clock import ManualClock, ManualScheduler


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 5)), min_size=1, max_size=20),
)
def test_so_many_bytes_a_second(rate: int, taken: list[tuple[int, float]]) -> None:
    """Who waits as long as it is told gets the rate, and a second's worth more at the most."""
    clock = ManualClock()
    bucket = Bucket(clock.monotonic)
    bucket.rate = rate
    begun, total = clock.monotonic(), 0
    for size, pause in taken:
        wait = bucket.take(size)
        total += size
        passed = clock.monotonic() - begun
        assert total <= rate * (passed + wait) + rate + 1e-6
        assert wait >= 0.0
        clock.advance(wait + pause)
    assert bucket.total == total


def test_without_a_rate_nothing_waits() -> None:
    bucket = Bucket(ManualClock().monotonic)
    assert [bucket.take(1 << 40) for _ in range(3)] == [0.0] * 3
    assert bucket.total == 3 << 40


def test_counts() -> None:
    tenant = Tenant("acme", ManualClock().monotonic)
    assert tenant.refusal("connections", 1 << 40) == ""
    tenant.set(Quota(connections=2, stored_bytes=100))
    tenant.connections = 1
    assert tenant.refusal("connections", 1) == ""
    tenant.connections = 2
    assert tenant.refusal("connections", 1) == (
        "the tenant acme has 2 of the 2 connections of its quota (edgebroker tenant list)"
    )
    assert tenant.refusal("stored_bytes", 100) == ""
    assert tenant.refusal("stored_bytes", 101) != ""


def test_a_connection_that_was_sent_too_much_waits() -> None:
    clock = ManualClock()
    scheduler, woken = ManualScheduler(clock), list[float]()
    tenant = Tenant("acme", clock.monotonic)
    tenant.set(Quota(out_bytes_per_second=100))
    share = Share(tenant, scheduler, lambda: woken.append(clock.monotonic()))
    other = Share(tenant, scheduler, lambda: None)
    assert tenant.connections == 2
    begun = clock.monotonic()
    share.sent(400)  # a second's worth, and three seconds more
    assert (share.may_send, other.may_send) == (False, True)
    other.sent(1)
    assert not other.may_send
    clock.advance(2.9)
    scheduler.turn()
    assert not woken
    clock.advance(0.2)
    scheduler.turn()
    assert share.may_send
    assert len(woken) == 1
    assert woken[0] - begun < 3.2
    other.leave()
    assert tenant.connections == 1
