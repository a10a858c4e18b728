"""A transport at the edges of its life: held, full, closed; and a loop that outlives a defect in a callback."""

import logging
import socket

import pytest

from edgebroker.common.runtime.clock import SystemClock
from edgebroker.network.io.channel import PlainChannel
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.transport import Transport
from edgebroker.network.wire.connection import ReceiveBuffer


class Owner:
    def __init__(self) -> None:
        self.closed: list[str] = []
        self.received = 0

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        self.received += received

    def on_drained(self) -> None: ...

    def on_closed(self, reason: str) -> None:
        self.closed.append(reason)


@pytest.mark.parametrize("held", [False, True])
def test_closing_is_told_once_whether_the_peer_is_read_or_held(held: bool) -> None:
    """A held transport is in no selector: closing it ended the loop once."""
    loop, owner = Loop(SystemClock()), Owner()
    ours, theirs = socket.socketpair()
    transport = Transport(loop, PlainChannel(ours), ReceiveBuffer(), owner, "peer")
    if held:
        transport.pause()
    assert transport.reading is not held
    transport.close("enough")
    transport.close("again")
    assert owner.closed == ["enough"]
    theirs.close()
    loop.close()


def test_a_held_peer_is_read_again_after_it_was_let_go() -> None:
    loop, owner = Loop(SystemClock()), Owner()
    ours, theirs = socket.socketpair()
    transport = Transport(loop, PlainChannel(ours), ReceiveBuffer(), owner, "peer")
    transport.pause()
    theirs.sendall(b"x" * 10)
    loop.turn(0.0)
    assert owner.received == 0
    transport.resume()
    loop.turn(1.0)
    assert owner.received == 10
    transport.close("done")
    theirs.close()
    loop.close()


def test_a_failing_callback_is_counted_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    loop, seen = Loop(SystemClock()), []

    def fail() -> None:
        raise RuntimeError("a defect")

    loop.call_soon_threadsafe(fail)
    loop.call_soon_threadsafe(lambda: seen.append("posted"))
    loop.call_later(0.0, fail)
    loop.call_later(0.0, lambda: seen.append("timer"))
    loop.at_end_of_iteration(fail)
    loop.at_end_of_iteration(lambda: seen.append("end"))
    with caplog.at_level(logging.ERROR):
        loop.turn(0.0)
    assert sorted(seen) == ["end", "posted", "timer"]
    assert loop.failed_callbacks == 3
    assert "a defect" in caplog.text
    loop.close()
