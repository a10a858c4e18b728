"""A log of another node's origin: taken over byte for byte, cut where it diverged, recreated, at every power cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from edgebroker.common import records
from edgebroker.common.batch import Reason
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import TopicSettings
from edgebroker.storage import files
from edgebroker.storage.log.aside import ASIDE, ASIDE_MS, drop_aside
from edgebroker.storage.types import Identity, begin_history
from tests.kit.storage import TOPIC, StoreHarness, encode, store_settings

ORIGIN = "0a" * 16


def bytes_of(harness: StoreHarness) -> bytes:
    """The batch bytes of the log as they lie on the disk."""
    return b"".join(path.read_bytes() for path in harness.logs())


def identity_of(log_id: str = "ab" * 16, **changes: object) -> Identity:
    whole = Identity(
        log_id=log_id,
        origin=ORIGIN,
        epochs=[(1, 0)],
        log_start=0,
        chain=crc32c(bytes.fromhex(log_id)),
        settings=TopicSettings(),
    )
    return replace(whole, **changes)


def mirror(harness: StoreHarness, identity: Identity) -> None:
    answers: list[Code] = []
    harness.store.create_mirror(TOPIC, [identity], lambda outcome, message: answers.append(outcome))
    harness.until(lambda: answers)
    assert answers == [Outcome.OK]


def take(harness: StoreHarness, *batches: bytes) -> None:
    """Append batches that carry their offsets, and wait until they are durable."""
    data = b"".join(batches)
    assert harness.engine.append_numbered(harness.log(), memoryview(data)) == (len(data), 0)
    harness.durable()


def batches(first: int, count: int, *, epoch: int = 1, size: int = 100) -> list[bytes]:
    return [
        records.restamp(encode((b"%d-%d" % (offset, epoch)).ljust(size, b".")), offset, epoch)
        for offset in range(first, first + count)
    ]


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[StoreHarness]:
    found = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000))
    mirror(found, identity_of())
    yield found
    found.close()


def answer(harness: StoreHarness, ask: Callable[[Callable[[Outcome, str], None]], None]) -> tuple[Outcome, str]:
    answers: list[tuple[Outcome, str]] = []
    ask(lambda outcome, message: answers.append((outcome, message)))
    for _ in range(300):
        if answers:
            return answers[0]
        harness.loop.turn(0.005)
        harness.clock.advance(0.01)
    raise AssertionError("waited in vain")


def cut(harness: StoreHarness, offset: int) -> Code:
    return answer(harness, lambda done: harness.store.truncate(harness.log(), offset, done))[0]


def restart(harness: StoreHarness, identity: Identity) -> Code:
    return answer(harness, lambda done: harness.store.recreate(harness.log(), lambda old: identity, done))[0]


def chains(harness: StoreHarness, offsets: list[int]) -> dict[int, int]:
    found: list[dict[int, int]] = []
    harness.engine.chains(harness.log(), offsets, lambda points, error: found.append(dict(points)))
    harness.until(lambda: found)
    return found[0]


def test_a_mirror_is_its_origin_byte_for_byte(harness: StoreHarness) -> None:
    stored = batches(0, 30)
    take(harness, *stored[:11])
    for one in stored[11:]:
        take(harness, one)
    assert bytes_of(harness) == b"".join(stored)
    assert harness.log().chain == records.chain(b"".join(stored), identity_of().chain)
    harness.restart()
    assert (harness.log().durable_end, harness.log().identity.origin) == (30, ORIGIN)
    assert harness.log().chain == records.chain(b"".join(stored), identity_of().chain)
    take(harness, *batches(30, 1))


def test_a_newer_history_is_taken_once_it_is_known(harness: StoreHarness) -> None:
    take(harness, *batches(0, 3))
    (newer,) = batches(3, 1, epoch=2)
    assert harness.engine.append_numbered(harness.log(), memoryview(newer)) == (0, Reason.BAD_EPOCH)
    changes = [lambda old: replace(old, epochs=[(1, 0), (2, 3), (4, 9)])]
    assert answer(harness, lambda done: harness.store.change_identities(TOPIC, changes, done))[0] is Outcome.OK
    take(harness, newer)
    assert harness.log().epoch == 2, "the history that its records have come to, not the newest that is known"
    harness.restart()
    assert harness.log().epoch == 2
    take(harness, *batches(4, 5, epoch=2), *batches(9, 1, epoch=4))
    assert harness.log().epoch == 4


def test_a_history_is_given_up_while_records_come(harness: StoreHarness) -> None:
    """A parent says so, and sends in the same breath what follows in the history before."""

    def tell(*epochs: tuple[int, int]) -> list[Outcome]:
        answers: list[Outcome] = []
        changes = [lambda old: replace(old, epochs=list(epochs))]
        harness.store.change_identities(TOPIC, changes, lambda outcome, message: answers.append(outcome))
        return answers

    take(harness, *batches(0, 2))
    told = tell((1, 0), (2, 3))
    harness.until(lambda: told)
    take(harness, *batches(2, 1))
    assert harness.log().epoch == 2
    told = tell((1, 0))
    for offset in range(3, 300):
        (data,) = batches(offset, 1)
        assert harness.engine.append_numbered(harness.log(), memoryview(data)) == (len(data), 0)
        harness.loop.turn(0.005)
        if told:
            break
    harness.durable()
    assert (told, harness.log().epoch, harness.log().durable_end) == ([Outcome.OK], 1, offset + 1)


def test_a_log_may_begin_where_its_parent_begins(tmp_path: Path) -> None:
    harness = StoreHarness(tmp_path / "data")
    mirror(harness, identity_of(log_start=40, chain=77))
    take(harness, *batches(40, 12))
    harness.restart()
    assert (harness.log().log_start, harness.log().durable_end, len(harness.values())) == (40, 52, 12)
    assert harness.log().chain == records.chain(bytes_of(harness), 77)
    harness.close()


@pytest.mark.parametrize("offset", [0, 1, 9, 10, 18, 25, 29])
@pytest.mark.parametrize("crash", [False, True])
def test_cut(harness: StoreHarness, offset: int, crash: bool) -> None:
    """At every kind of place: the beginning, within a segment, between two, near the end."""
    stored = batches(0, 30)
    take(harness, *stored[:12])
    take(harness, *stored[12:])
    harness.commit(min(offset, 5))
    assert cut(harness, offset) is Outcome.OK
    if crash:
        harness.restart()
    log = harness.log()
    assert (log.durable_end, log.staged_end, log.corrupt_ranges) == (offset, offset, [])
    assert bytes_of(harness) == b"".join(stored[:offset])
    assert log.chain == records.chain(b"".join(stored[:offset]), identity_of().chain)
    take(harness, *batches(offset, 35 - offset, size=90))
    assert len(harness.values()) == 35
    harness.restart()
    assert len(harness.values()) == 35
    assert list(harness.directory().glob(f"*{ASIDE}*")), "what was cut off is kept for a day"
    drop_aside(harness.directory(), harness.clock.wall_ms() + ASIDE_MS + 1)
    assert not list(harness.directory().glob(f"*{ASIDE}*"))


def fail_from(patch: pytest.MonkeyPatch, step: int, *names: str) -> None:
    """From the step-th call of these functions of files.py on the device is gone."""
    left = [step]

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(5, "the power went")
            return real(*args, **options)

        return call

    for name in names:
        patch.setattr(files, name, failing(getattr(files, name)))


@pytest.mark.parametrize("what", ["cut", "restart", "another log"])
def test_whatever_step_the_power_goes_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The log is there up to the cut or further, or begins again: no corrupt range, no offset given twice."""
    for step in range(1, 40):
        harness = StoreHarness(tmp_path / f"data{step}", store_settings(segment_bytes=1000))
        mirror(harness, identity_of())
        stored = batches(0, 30)
        take(harness, *stored[:15])
        for one in stored[15:]:
            take(harness, one)
        harness.commit(4)
        further = identity_of("cd" * 16 if what == "another log" else "ab" * 16, log_start=100, chain=5)
        with monkeypatch.context() as patch:
            fail_from(patch, step, "rename_suffix", "move", "copy_start", "remove", "second_name", "sync_directory")
            if what == "cut":
                outcome = cut(harness, 11)
            else:
                outcome = restart(harness, further)
        harness.restart()
        log = harness.log()
        assert log.corrupt_ranges == []
        if log.log_start == 100:
            assert (what != "cut", log.durable_end, log.chain) == (True, 100, 5)
            assert log.identity.log_id == further.log_id
            take(harness, *batches(100, 3))
        else:
            assert log.identity.log_id == "ab" * 16
            assert log.durable_end == 30 if what != "cut" else log.durable_end >= 11
            assert bytes_of(harness) == b"".join(stored[: log.durable_end])
        harness.close()
        if outcome is Outcome.OK:
            assert step > 3
            return
    raise AssertionError("it never came to its end")


def test_another_log_takes_the_place(harness: StoreHarness) -> None:
    take(harness, *batches(0, 20))
    other = identity_of("cd" * 16)
    assert restart(harness, other) is Outcome.OK
    assert (harness.log().durable_end, harness.log().identity.log_id) == (0, "cd" * 16)
    harness.restart()
    take(harness, *batches(0, 2))
    assert harness.log().chain == records.chain(bytes_of(harness), other.chain)


def test_nothing_is_cut_below_what_is_being_stored(harness: StoreHarness) -> None:
    take(harness, *batches(0, 5))
    (more,) = batches(5, 1)
    harness.engine.append_numbered(harness.log(), memoryview(more))
    outcome, message = answer(harness, lambda done: harness.store.truncate(harness.log(), 2, done))
    assert (outcome, "try again" in message) == (Outcome.OVERLOADED, True)
    harness.durable()
    assert harness.log().durable_end == 6


def test_chains(harness: StoreHarness) -> None:
    """Against the obvious: the chain over every prefix."""
    stored = [records.restamp(encode(*[b"%d" % number] * 3, timestamp=number), number * 3, 1) for number in range(25)]
    take(harness, *stored)
    expected = {number * 3: records.chain(b"".join(stored[:number]), identity_of().chain) for number in range(26)}
    for again in range(2):
        asked = list(range(76))
        assert chains(harness, asked) == expected
        for offset in asked:
            known = harness.log().chain_at(offset)
            assert known is None or known == expected[offset]
        assert harness.log().chain_at(75) == expected[75]
        assert harness.log().chain_at(0) == expected[0]
        if not again:
            harness.restart()


def test_what_a_rollback_gives_back_is_of_the_older_history(harness: StoreHarness) -> None:
    log = harness.log()
    log.identity = replace(log.identity, epochs=[(1, 0), (2, 3)])
    data = b"".join([*batches(0, 3), *batches(3, 2, epoch=2)])
    assert harness.engine.append_numbered(log, memoryview(data)) == (len(data), 0)
    log.drop_unwritten()
    assert (log.staged_end, log.staged_epoch) == (0, 1)
    assert harness.engine.append_numbered(log, memoryview(data)) == (len(data), 0)
    harness.durable()


def test_a_group_beyond_the_end_makes_no_hole(harness: StoreHarness) -> None:
    """What a mirror lacks it gets from its parent; the group waits."""
    take(harness, *batches(0, 15))
    harness.commit(15)
    assert cut(harness, 5) is Outcome.OK
    harness.restart()
    assert (harness.log().durable_end, harness.log().corrupt_ranges) == (5, [])


def test_what_was_set_aside_goes_by_itself(harness: StoreHarness) -> None:
    take(harness, *batches(0, 30))
    cut(harness, 8)
    assert list(harness.directory().glob(f"*{ASIDE}*"))
    harness.tick()
    assert list(harness.directory().glob(f"*{ASIDE}*"))
    harness.tick(ASIDE_MS / 1000 + 1)
    harness.quiesce()
    assert not list(harness.directory().glob(f"*{ASIDE}*"))


def test_a_history_that_begins_behind_the_end_is_over() -> None:
    """As when an origin lost its end, and with it where its last history began: the epochs stay in order."""
    before = replace(identity_of(), epochs=[(1, 0), (2, 200), (4, 300)])
    assert begin_history(before, 400).epochs == [(1, 0), (2, 200), (4, 300), (5, 400)]
    assert begin_history(before, 200).epochs == [(1, 0), (2, 200), (5, 200)]
    assert begin_history(before, 150).epochs == [(1, 0), (5, 150)]
