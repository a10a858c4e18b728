"""Calls that are watched: who is late and since when, and that being ended goes no further than the call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import TopicPartition
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.declare.application import Handler
from edgebroker.consumer.declare.declarations import RetryPolicy
from edgebroker.consumer.declare.signatures import read_signature
from edgebroker.consumer.handling.calls import CallFailedError, Calls
from edgebroker.consumer.handling.in_hand import InHand
from edgebroker.consumer.handling.watch import Late, Watch
from tests.kit.clock import ManualClock


@pytest.fixture
def database(tmp_path: Path) -> Iterator[AppDatabase]:
    found = AppDatabase(tmp_path / "app", 1)
    yield found
    found.close()


def test_who_is_late_is_told_to_end_once() -> None:
    clock, ended = ManualClock(), list[str]()
    watch = Watch(clock.monotonic)
    assert watch.look() is None
    todo: Any = iter([1, 2, 3])
    watch.begin("here", 5.0, todo, lambda: ended.append("now"))
    next(todo)
    clock.advance(4.9)
    assert watch.look() is None
    next(todo)  # another value, another time
    clock.advance(4.9)
    assert watch.look() is None
    clock.advance(4.9)
    assert watch.look() is None and not ended
    clock.advance(0.1)
    assert watch.look() == Late("here", 5.0, False) and ended == ["now"]
    clock.advance(4.9)
    assert watch.look() is None
    clock.advance(0.1)
    assert watch.look() == Late("here", 5.0, True) and ended == ["now"]
    assert watch.end() == watch.end() == 1, "it was the one after which one is left"
    assert watch.look() is None
    watch.begin("there", 5.0, iter([1]), lambda: None)  # type: ignore[arg-type]
    assert watch.end() == -1


def test_an_end_that_comes_at_any_moment_is_contained(database: AppDatabase) -> None:
    """The time of every call is over at once, and another thread looks all the time."""
    clock = SystemClock()
    watch = Watch(clock.monotonic)
    calls = Calls(database, watch, clock, "till-7", logging.getLogger("app"))
    done: list[int] = []
    over = threading.Event()

    def handle(value: bytes) -> None:
        done.append(1)

    handler = Handler("*", (), 1, 0.0, read_signature(handle, {}), RetryPolicy(), handle, "here")

    def look() -> None:
        while not over.is_set():
            watch.look()

    thread = threading.Thread(target=look)
    thread.start()
    failed = 0
    try:
        for _ in range(20_000):
            try:
                calls.each(handler, [b"1", b"2"], [], 1)
            except CallFailedError as error:
                assert str(error) == "it took longer than 0 s" and error.before in (0, 1)
                failed += 1
    finally:
        over.set()
        thread.join()
    assert failed


def records(*offsets: int) -> list[Record]:
    return [cast("Record", SimpleNamespace(offset=offset)) for offset in offsets]


def test_what_was_in_hand_is_taken_one_at_a_time(tmp_path: Path) -> None:
    key, other = TopicPartition("prices", 0), TopicPartition("prices", 1)
    first = InHand(tmp_path)
    assert not first
    first.begin([(key, records(5, 6, 9)), (other, records(3))])
    second = InHand(tmp_path)  # the process died
    assert second and second.deaths(key, records(5)[0]) == 0 and second.deaths(other, records(3)[0]) == 1
    assert second.together(key, records(2, 3, 5, 6)) == 2, "those before it"
    assert second.together(key, records(5, 6, 9, 10)) == 1
    assert second.together(key, records(6, 9, 10)) == 1
    second.begin([(key, records(6))])
    third = InHand(tmp_path)
    assert third.deaths(key, records(6)[0]) == 1 and third.deaths(other, records(3)[0]) == 0
    third.begin([(key, records(6))])
    fourth = InHand(tmp_path)
    assert fourth.deaths(key, records(6)[0]) == 2
    assert fourth.together(key, records(7, 8)) == 2, "it is past"
    assert not fourth
    fourth.begin([(key, records(7))])
    fourth.end()
    assert not InHand(tmp_path)


def test_a_note_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    InHand(tmp_path)
    for content in (b"", b"\0" * 512, b'[["prices",0,1', b'[["prices",0,"a",2,0]]\n', b"\xff\n"):
        (tmp_path / "IN_HAND").write_bytes(content)
        assert not InHand(tmp_path)
