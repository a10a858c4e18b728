"""The copy of a partition: whatever is delivered, twice, with gaps, of another history, it has the broker's bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edgebroker.client.refresh import Refresh
from edgebroker.common import batch, records
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import Delivery, Position, TopicPartition
from edgebroker.consumer.copy import segment_copy as copy_module
from edgebroker.consumer.copy.segment_copy import SegmentCopy
from edgebroker.network.io.loop import Loop
from edgebroker.storage.types import ColdRead
from tests.kit.storage import turn_until

KEY = TopicPartition("prices", 3)
LOGS = [bytes([number]) * 16 for number in range(100)]


class Batch(NamedTuple):
    base: int
    next: int
    epoch: int
    data: bytes


def batch_of(base: int, count: int, epoch: int) -> Batch:
    plain = batch.encode([(b"k%d" % number, b"v%d-%d" % (number, epoch), 1000) for number in range(base, base + count)])
    return Batch(base, base + count, epoch, records.restamp(plain, base, epoch))


class World:
    """A copy on a loop that turns here."""

    def __init__(self, path: Path, *, stored: Sequence[tuple[str, int]] = (), max_bytes: int = 64 << 20) -> None:
        self.loop = Loop(SystemClock())
        self.copy = SegmentCopy(
            path, self.loop, SystemClock(), max_bytes=max_bytes, hours=0.0, positions=set(stored),
            from_beginning={"prices"},
        )  # fmt: skip

    def deliver(self, log_id: bytes, batches: Sequence[Batch]) -> None:
        data = b"".join(one.data for one in batches)
        first, last, epoch = batches[0].base, batches[-1].next - 1, batches[-1].epoch
        self.copy.received(Delivery(*KEY, log_id, epoch, first, last, data))

    def settle(self) -> None:
        turn_until(self.loop, lambda: not self.copy.backlog)

    def read(self) -> bytes:
        """All that is there."""
        state, found = self.copy.logs()[KEY], b""
        offset = state.start
        while offset < state.end:
            answers = list[ColdRead]()
            self.copy.read(KEY, offset, 4096, answers.append)
            turn_until(self.loop, lambda answers=answers: answers)
            assert not answers[0].error
            found, offset = found + answers[0].data, answers[0].next_offset
        return found

    def close(self) -> None:
        turn_until(self.loop, self.copy.flush)
        self.copy.close(5.0)
        self.loop.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path / "copy")
    yield found
    found.close()


def after(log_id: bytes, here: list[Batch], same: bool, batches: Sequence[Batch]) -> list[Batch]:
    """What a copy has that had `here` (of this log, or of another) when these were delivered."""
    end, start = (here[-1].next, here[0].base) if here else (-1, -1)
    epochs = {offset: one.epoch for one in here for offset in range(one.base, one.next)}
    known = [one for one in batches if one.base < end and one.base >= start]
    if not same or any(epochs.get(one.base, one.epoch) != one.epoch for one in known):
        return list(batches)
    new = [one for one in batches if one.base >= end]
    if here and new and new[0].epoch < here[-1].epoch:
        return list(batches)
    return here + new


@pytest.mark.parametrize("seed", range(40))
def test_it_has_what_was_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(copy_module, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(copy_module, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(copy_module, "SEGMENTS", 1 << 15)  # so each has 2 KiB
    rng, log_id, epoch = random.Random(seed), LOGS[0], 1
    log: list[Batch] = []
    here, here_of, cursor = list[Batch](), b"", 0
    world = World(tmp_path / "copy")
    for _ in range(rng.randrange(10, 60)):
        for _ in range(rng.randrange(0, 4)):
            base = log[-1].next if log else 0
            log.append(batch_of(base, rng.randrange(1, 6), epoch))
        what = rng.random()
        if what < 0.05:  # the topic is made again
            log_id, epoch, log, cursor = LOGS[LOGS.index(log_id) + 1], 1, [], 0
        elif what < 0.12 and log:  # a broker that is behind takes over
            place = rng.randrange(len(log))
            log, epoch, cursor = log[:place], epoch + 1, min(cursor, rng.randrange(place + 1))
        elif what < 0.25 and log:  # delivered again
            cursor = rng.randrange(min(len(log), cursor + 1))
        elif what < 0.3:  # removed before it was read
            cursor = min(len(log), cursor + rng.randrange(1, 4))
        elif what < 0.4:
            world.settle()
        elif what < 0.45:
            refuse(world, rng)
        elif what < 0.5:
            world.close()
            world = World(tmp_path / "copy")
        piece = log[cursor : cursor + rng.randrange(1, 5)]
        if piece:
            world.deliver(log_id, piece)
            here, here_of = after(log_id, here, log_id == here_of, piece), log_id
            cursor += len(piece)
    world.settle()
    assert not world.copy.failure
    if here:
        state = world.copy.logs()[KEY]
        assert (state.log_id, state.start, state.end) == (here_of, here[0].base, here[-1].next)
        assert state.epoch == here[-1].epoch
        assert world.read() == b"".join(one.data for one in here)
    world.close()


def refuse(world: World, rng: random.Random) -> None:
    """The disk is full for a few attempts."""
    engine, left = world.copy._engine, [rng.randrange(1, 4)]
    refusal = type(engine).refusal

    def refused(*, spare: bool = False) -> object:
        left[0] -= 1
        return (Outcome.DISK_FULL, "the disk is full") if left[0] >= 0 else refusal(engine, spare=spare)

    engine.refusal = refused  # type: ignore[method-assign,assignment]


def test_a_copy_is_whole_from_where_a_view_can_be_built(world: World) -> None:
    log = [batch_of(0, 5, 1), batch_of(5, 5, 1)]
    world.deliver(LOGS[0], log[:1])
    world.settle()
    assert world.copy.logs()[KEY].rebuild_from == 0
    # Loaded again from 5: keys that are only before were removed with that.
    world.copy.resume(refresh_of(LOGS[0], 5, 8), 5)
    turn_until(world.loop, lambda: world.copy.logs()[KEY].rebuild_from == -1)
    world.deliver(LOGS[0], log[1:])
    world.settle()
    assert world.copy.logs()[KEY].rebuild_from == 5
    # A gap behind the beginning.
    world.deliver(LOGS[0], [batch_of(12, 1, 1)])
    world.settle()
    assert (world.copy.logs()[KEY].rebuild_from, world.copy.logs()[KEY].end) == (-1, 13)
    # And from before what is here.
    world.deliver(LOGS[1], [batch_of(20, 1, 4)])
    world.settle()
    assert world.copy.logs()[KEY][2:] == (20, 21, -1)
    world.copy.resume(refresh_of(LOGS[1], 10, 12), 10)
    world.deliver(LOGS[1], [batch_of(10, 10, 4)])
    world.settle()
    assert world.copy.logs()[KEY][2:] == (10, 20, 10)


def refresh_of(log_id: bytes, first: int, target: int) -> Refresh:
    return Refresh(
        reset_id="r", log_id=log_id, topic=KEY.topic, partition=KEY.partition, from_offset=first, target=target
    )


def test_a_copy_that_begins_in_the_midst_is_not_whole(tmp_path: Path) -> None:
    world = World(tmp_path / "copy", stored=[(KEY.topic, KEY.partition)])
    world.deliver(LOGS[0], [batch_of(7, 2, 1)])
    world.settle()
    assert world.copy.logs()[KEY] == (LOGS[0], 1, 7, 9, -1)
    # Where reading goes on: at what is stored, or where the copy ends if that is before.
    assert world.copy.start(KEY, Position(LOGS[0], 1, 8)).next_offset == 8
    assert world.copy.start(KEY, Position(LOGS[0], 1, 20)) == Position(LOGS[0], 1, 9)
    assert world.copy.start(KEY, Position(LOGS[1], 1, 20)).next_offset == 20
    assert world.copy.stored(KEY, 30) == 9 and world.copy.stored(TopicPartition("prices", 0), 30) == -1
    # A refresh: what is staged and not in the copy comes once more, all of it when the copy has another log.
    assert world.copy.resume(refresh_of(LOGS[0], 0, 9), 12) == 9
    assert world.copy.resume(refresh_of(LOGS[1], 3, 9), 12) == 3
    world.close()


def test_one_that_cannot_be_written_is_left_out(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.deliver(LOGS[0], [batch_of(0, 5, 1)])
    world.settle()
    world.copy._engine.refusal = lambda *, spare=False: (Outcome.READ_ONLY, "it is worn out")  # type: ignore[method-assign]
    for number in range(1, 20):
        world.deliver(LOGS[0], [batch_of(number * 5, 5, 1)])
    turn_until(world.loop, lambda: world.copy.failure)
    assert world.copy.has_room and world.copy.stored(KEY, 100) == 100
    assert caplog.text.count("the copy cannot be written: it is worn out; it is left out until the next start") == 1
    assert world.copy.flush()


def test_no_more_is_taken_than_fits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module, "BACKLOG_BYTES", 1000)
    assert world.copy.has_room
    while world.copy.has_room:
        world.deliver(LOGS[0], [batch_of(0, 5, 1)])
    assert 1000 <= world.copy.backlog < 2000
    world.settle()
    assert world.copy.has_room


def test_the_oldest_goes_when_there_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr("edgebroker.storage.upkeep.housekeeping.TICK_SECONDS", 0.01)
    world = World(tmp_path / "copy", max_bytes=256 << 10)
    value = b"x" * 2000
    for number in range(200):
        data = records.restamp(batch.encode([(b"k", value, 1000)]), number, 1)
        world.copy.received(Delivery(*KEY, LOGS[0], 1, number, number, data))
        world.settle()
    turn_until(world.loop, lambda: world.copy.logs()[KEY].start > 0 and world.copy.bytes < 256 << 10)
    state = world.copy.logs()[KEY]
    assert (state.end, state.rebuild_from) == (200, -1)
    world.close()


def test_gaps_alone(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A broker tells that records are gone with a delivery that has no batches: first of all, at last, and between."""
    for first, last in ((0, 9), (0, 9)):
        world.copy.received(Delivery(*KEY, LOGS[0], 1, first, last, b""))
    world.deliver(LOGS[0], [batch_of(10, 2, 1)])
    world.copy.received(Delivery(*KEY, LOGS[0], 1, 12, 19, b""))
    world.deliver(LOGS[0], [batch_of(20, 2, 1)])
    world.copy.received(Delivery(*KEY, LOGS[0], 1, 22, 30, b""))
    world.settle()
    assert world.copy.logs()[KEY][2:4] == (10, 22)
    world.copy.received(Delivery(*KEY, LOGS[1], 1, 0, 3, b""))
    world.deliver(LOGS[1], [batch_of(4, 1, 1)])
    world.settle()
    assert world.copy.logs()[KEY][:4] == (LOGS[1], 1, 4, 5)
    assert not world.copy.failure and "Traceback" not in caplog.text


def test_what_cannot_be_read_ends_the_copy_only(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.copy.received(
        Delivery(*KEY, LOGS[0], 1, 0, 3, b"this is no batch, and long enough to have a header of one" * 2)
    )
    turn_until(world.loop, lambda: world.copy.failure)
    assert world.copy.has_room and "Traceback" not in caplog.text


def test_nothing_waits_for_long_for_room(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes is left out then, and acknowledged; there is one message, and one timer."""
    monkeypatch.setattr(copy_module, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(copy_module, "FULL_SECONDS", 0.05)
    world.deliver(LOGS[0], [batch_of(0, 5, 1)])
    world.settle()
    engine = world.copy._engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "refusal", lambda *, spare=False: (Outcome.DISK_FULL, "it is full"))
        for number in range(1, 30):
            world.deliver(LOGS[0], [batch_of(number * 5, 5, 1)])
        assert world.copy.stored(KEY, 100) == 5
        turn_until(world.loop, lambda: world.copy.left_out)
        assert world.copy.has_room and world.copy.stored(KEY, 100) == 100 and not world.copy.backlog
        world.deliver(LOGS[0], [batch_of(150, 5, 1)])
        world.settle()
        assert len(world.loop._timers) < 20
    assert caplog.text.count("there is no room for the copy of topics") == 1
    world.deliver(LOGS[0], [batch_of(155, 5, 1)])
    world.settle()
    turn_until(world.loop, lambda: world.copy.logs()[KEY].end == 160)
    assert (world.copy.logs()[KEY].rebuild_from, world.copy.left_out) == (-1, False)


def test_what_is_known_is_not_walked_through(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery of a megabyte may have ten thousand batches."""
    log = [batch_of(number, 1, 1) for number in range(300)]
    world.deliver(LOGS[0], log)
    world.settle()
    seen = [0]

    def counted(*arguments: Any) -> Any:
        seen[0] += 1
        return read_header(*arguments)

    read_header = batch.read_header
    monkeypatch.setattr(copy_module.batch, "read_header", counted)
    world.deliver(LOGS[0], log)
    world.settle()
    assert seen[0] <= 3
