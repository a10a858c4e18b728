"""The loop: timers, the order of a turn, and the door for other threads, of which no knock may be lost."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from edgebroker.common.runtime.clock import SystemClock
from edgebroker.network.io.loop import READ, Loop


class TurnedClock:
    """Time that only tests move."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def wall_ms(self) -> int:
        return int(self.seconds * 1000)


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
def loop(clock: TurnedClock) -> Iterator[Loop]:
    made = Loop(clock)
    yield made
    made.close()


def test_timers_run_when_due_in_order(loop: Loop, clock: TurnedClock) -> None:
    ran: list[str] = []
    for name, seconds in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("a2", 1.0)):
        loop.call_later(seconds, lambda name=name: ran.append(name))  # type: ignore[misc]
    loop.turn(0)
    assert ran == []
    clock.seconds += 1.0
    loop.turn(0)
    assert sorted(ran) == ["a", "a2"]
    clock.seconds += 5.0
    loop.turn(0)
    assert ran[2:] == ["b", "c"]


def test_a_cancelled_timer_does_not_run(loop: Loop, clock: TurnedClock) -> None:
    ran: list[int] = []
    first = loop.call_later(1.0, lambda: ran.append(1))
    second = loop.call_later(1.0, lambda: ran.append(2))
    third = loop.call_later(1.0, lambda: (ran.append(3), second.cancel()))  # type: ignore[arg-type, return-value, func-returns-value]
    first.cancel()
    first.cancel()
    clock.seconds += 2.0
    loop.turn(0)
    assert 1 not in ran
    assert 3 in ran
    third.cancel()


def test_a_timer_bounds_the_wait() -> None:
    loop = Loop(SystemClock())
    ran: list[float] = []
    loop.call_later(0.02, lambda: ran.append(loop.now()))
    began = loop.clock_now()
    while not ran:
        loop.turn(5.0)
    assert 0.02 <= ran[0] - began < 1.0
    loop.close()


def test_now_is_read_once_a_turn(loop: Loop, clock: TurnedClock) -> None:
    seen: list[float] = []
    for _ in range(2):
        loop.call_soon_threadsafe(lambda: seen.append(loop.now()))
        loop.call_soon_threadsafe(lambda: setattr(clock, "seconds", clock.seconds + 1))
    loop.turn(0)
    assert seen == [1000.0, 1000.0]
    assert loop.clock_now() == 1002.0
    loop.turn(0)
    assert loop.now() == 1002.0


def test_the_order_of_a_turn(loop: Loop, clock: TurnedClock) -> None:
    ran: list[str] = []
    ours, theirs = socket.socketpair()
    loop.register(ours.fileno(), READ, lambda mask: (ran.append("event"), ours.recv(10)))  # type: ignore[arg-type, return-value, func-returns-value]
    theirs.send(b"x")
    loop.at_end_of_iteration(lambda: ran.append("end"))
    loop.at_end_of_iteration(lambda: ran.append("end 2"))
    loop.call_soon_threadsafe(lambda: ran.append("posted"))
    loop.call_later(0.0, lambda: ran.append("timer"))
    loop.turn(0)
    assert ran == ["event", "posted", "timer", "end", "end 2"]
    ran.clear()
    loop.turn(0)
    assert ran == ["end", "end 2"]
    loop.unregister(ours.fileno())
    ours.close()
    theirs.close()


def test_what_a_callback_posts_runs_in_the_next_turn(loop: Loop) -> None:
    ran: list[int] = []

    def post(depth: int) -> None:
        ran.append(depth)
        loop.call_soon_threadsafe(lambda: post(depth + 1))

    loop.call_soon_threadsafe(lambda: post(0))
    for turn in range(5):
        loop.turn(10.0)  # never waits: something is posted
        assert ran == list(range(turn + 1))


def test_readers(loop: Loop) -> None:
    ran: list[int] = []
    reading, writing = os.pipe()
    loop.add_reader(reading, lambda: ran.append(len(os.read(reading, 10))))
    os.write(writing, b"abc")
    loop.turn(1.0)
    assert ran == [3]
    loop.remove_reader(reading)
    os.write(writing, b"abc")
    loop.turn(0)
    assert ran == [3]
    os.close(reading)
    os.close(writing)


def test_run_until_stopped() -> None:
    loop = Loop(SystemClock())
    thread = threading.Thread(target=loop.run)
    thread.start()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10.0)
    assert not thread.is_alive()
    assert loop.iterations >= 1
    loop.close()
    loop.call_soon_threadsafe(loop.stop)  # to nobody; harmless


def test_no_wake_up_is_lost() -> None:
    """Four threads post one callback at a time and wait for it; a loop without timers must run each at once."""
    loop = Loop(SystemClock())
    thread = threading.Thread(target=loop.run)
    thread.start()
    count = 3000
    late: list[int] = []

    def knock(number: int) -> None:
        done = threading.Event()
        for rank in range(count):
            done.clear()
            loop.call_soon_threadsafe(done.set)
            if not done.wait(5.0):
                late.append(number * count + rank)
                return

    threads = [threading.Thread(target=knock, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60.0)
    assert late == []
    # A turn per callback and one for its wake-up at most: it does not spin either.
    assert loop.iterations <= 2 * 4 * count + 10
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10.0)
    assert not thread.is_alive()
    loop.close()


def test_many_posts_keep_their_order() -> None:
    loop = Loop(SystemClock())
    thread = threading.Thread(target=loop.run)
    thread.start()
    ran: list[tuple[int, int]] = []

    def post(number: int) -> None:
        for rank in range(5000):
            loop.call_soon_threadsafe(lambda rank=rank: ran.append((number, rank)))  # type: ignore[misc]

    threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30.0)
    done = threading.Event()
    loop.call_soon_threadsafe(done.set)
    assert done.wait(10.0)
    for number in range(4):
        assert [rank for who, rank in ran if who == number] == list(range(5000))
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10.0)
    loop.close()


def test_a_post_while_the_pipe_is_drained_does_not_silence_the_next(loop: Loop) -> None:
    """The flag that says "a wake-up is under way" may go down only when the pipe is empty: else recv() swallows one."""
    ran: list[str] = []
    woken = loop._woken

    class PostedMeanwhile:
        def recv(self, count: int) -> bytes:
            loop.call_soon_threadsafe(lambda: ran.append("meanwhile"))
            return woken.recv(count)

    loop.call_soon_threadsafe(lambda: ran.append("first"))
    loop._woken = PostedMeanwhile()  # type: ignore[assignment]
    loop.turn(0)
    loop._woken = woken
    assert ran == ["first", "meanwhile"]
    loop.turn(0)
    loop.call_soon_threadsafe(lambda: ran.append("next"))
    assert select.select([woken], [], [], 0)[0] == [woken]  # a loop that waits would be woken
    loop.turn(0)
    assert ran[2:] == ["next"]


def test_slow_callbacks_are_counted_and_named(loop: Loop, clock: TurnedClock, caplog: pytest.LogCaptureFixture) -> None:
    def slow() -> None:
        clock.seconds += 0.05

    caplog.set_level(logging.DEBUG)
    loop.call_later(0.0, slow)
    loop.turn(0)
    assert loop.slow_callbacks == 1
    warning, detail = caplog.records
    assert (warning.levelname, warning.getMessage()) == ("WARNING", "a timer kept the loop for 50 ms")
    assert detail.levelname == "DEBUG" and detail.getMessage().endswith("<locals>.slow")
    loop.call_later(0.0, lambda: None)
    loop.turn(0)
    assert loop.slow_callbacks == 1
    loop.call_soon_threadsafe(slow)
    loop.turn(0)
    loop.at_end_of_iteration(slow)
    loop.turn(0)
    assert loop.slow_callbacks == 3


def test_what_is_ready_has_ten_milliseconds_of_a_turn(loop: Loop, clock: TurnedClock) -> None:
    """The rest comes first in the next turn, before what became ready since; what was posted does not wait for it."""
    pairs = [socket.socketpair() for _ in range(5)]
    ran: list[object] = []

    def take(rank: int) -> None:
        pairs[rank][0].recv(1)
        ran.append(rank)
        clock.seconds += 0.006

    for rank, (one, other) in enumerate(pairs):
        loop.register(one.fileno(), READ, lambda mask, rank=rank: take(rank))  # type: ignore[misc]
        other.send(b"x")
    loop.call_soon_threadsafe(lambda: ran.append("posted"))
    loop.turn(0)
    first = list(ran)
    assert len(first) == 3
    assert first[2] == "posted"
    pairs[first[0]][1].send(b"x")  # type: ignore[index]
    loop.turn(0)
    loop.turn(0)
    assert sorted(ran[3:6]) == sorted({0, 1, 2, 3, 4} - {*first})  # type: ignore[type-var]
    loop.turn(0)
    assert ran[6:] == [first[0]]
    for one, other in pairs:
        loop.unregister(one.fileno())
        one.close()
        other.close()


def test_those_who_wait_for_their_turn_share_a_millisecond(loop: Loop, clock: TurnedClock) -> None:
    ran: list[str] = []

    def work(name: str, seconds: float, times: int) -> None:
        ran.append(name)
        clock.seconds += seconds
        if times > 1:
            loop.call_in_turn(lambda: work(name, seconds, times - 1))

    for name in ("a", "b", "c"):
        loop.call_in_turn(lambda name=name: work(name, 0.0006, 3))  # type: ignore[misc]
    for turns, expected in enumerate(("ab", "abca", "abcabc", "abcabcab", "abcabcabc"), 1):
        loop.turn()  # it does not wait: somebody has something to do
        assert "".join(ran) == expected, turns
    loop.call_in_turn(lambda: work("long", 0.5, 1))
    loop.call_in_turn(lambda: work("short", 0.0, 1))
    loop.turn()
    assert ran[9:] == ["long"]
    assert loop.slow_callbacks == 1
    loop.turn()
    assert ran[9:] == ["long", "short"]


def test_one_of_those_who_wait_that_fails_does_not_stop_the_others(loop: Loop) -> None:
    ran: list[int] = []
    loop.call_in_turn(lambda: ran.append(1 // 0))
    loop.call_in_turn(lambda: ran.append(2))
    loop.turn()
    assert (ran, loop.failed_callbacks) == ([2], 1)
