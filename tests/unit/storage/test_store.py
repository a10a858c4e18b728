"""What a store promises while it runs: order, places, limits, and what is remembered from one run to the next."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.common import batch, records
from edgebroker.common.batch import Reason
from edgebroker.common.errors import Code
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage import files
from edgebroker.storage.types import FileSlice, GroupOffset
from tests.kit.storage import TOPIC, Harness, Start, StoreHarness, encode, pack, store_settings

SEED = 20240611
WEEK = 7 * 24 * 3600.0


@pytest.fixture(params=["segment", "memory"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    made = StoreHarness(tmp_path / "data") if request.param == "segment" else Harness()
    yield made
    made.close()


# ---- the contract of both engines ----


def test_topics_are_made_once(harness: Harness) -> None:
    assert harness.create(partitions=3, kind="table") == Outcome.OK
    assert harness.create() == Outcome.NAME_CLASH
    assert list(harness.engine.topics()) == [TOPIC]
    assert [log.name for log in harness.engine.partitions(TOPIC)] == [f"{TOPIC}/{n}" for n in range(3)]
    assert len({log.identity.log_id for log in harness.engine.logs()}) == 3
    assert harness.log().settings == TopicSettings(partitions=3, kind="table")
    assert harness.engine.log(TOPIC, 3) is harness.engine.log(TOPIC, -1) is harness.engine.log("none", 0) is None
    assert harness.engine.partitions("none") == []


@pytest.mark.parametrize("level", AckLevel)
def test_offsets_are_dense_and_told_in_order(harness: Harness, level: AckLevel) -> None:
    harness.create()
    answers = harness.append(encode(b"a", b"b", b"c"), encode(b"d"), encode(b"e", b"f"), level=level)
    assert [(a.offset, a.code, a.reason) for a in answers] == [(0, 0, 0), (3, 0, 0), (4, 0, 0)]
    assert harness.values() == [b"a", b"b", b"c", b"d", b"e", b"f"]
    assert harness.values(4) == [b"e", b"f"]
    log = harness.log()
    assert (log.written_end, log.durable_end, log.records_in, log.bytes_in) == (6, 6, 6, log.size_bytes)
    ends = [end for _, _, end in harness.listener.events]
    assert ends == sorted(ends) and ends[-1] == 6


def test_written_is_told_before_durable(harness: Harness) -> None:
    harness.create()
    harness.append(encode(b"a"), level=AckLevel.WRITTEN)
    assert [name for name, _, _ in harness.listener.events] == ["written", "durable"]


def test_nothing_is_visible_before_it_is_durable(harness: Harness) -> None:
    harness.create()
    harness.stage(encode(b"a"))
    assert harness.log().find(0, 100, 100) is None
    assert harness.log().durable_end == 0


def test_a_bad_frame_is_refused_alone(harness: Harness) -> None:
    harness.create()
    damaged = bytearray(encode(b"bad"))
    damaged[-1] ^= 1
    answers = harness.append(encode(b"a"), bytes(damaged), encode(b"b"))
    assert [(a.offset, a.code) for a in answers] == [(0, Code.OK), (-1, Code.INVALID_BATCH), (1, Code.OK)]
    assert answers[1].reason == Reason.BAD_CRC
    assert harness.values() == [b"a", b"b"]


def test_a_reader_gets_at_least_a_batch_and_at_most_what_it_takes(harness: Harness) -> None:
    harness.create()
    sent = [b"%d" % number for number in range(40)]
    for rank in range(0, 40, 4):
        harness.append(encode(*sent[rank : rank + 4]))
    for max_bytes, max_records in ((1, 1), (1, 1000), (200, 1000), (1 << 20, 1), (1 << 20, 5), (1 << 20, 1 << 30)):
        for first in range(40):
            assert harness.values(first, max_bytes=max_bytes, max_records=max_records) == sent[first:]


def test_a_mirror_keeps_the_offsets_it_was_given(harness: Harness) -> None:
    """Whole batches that fit, up to the first that does not; their bytes unchanged."""
    harness.create()
    stored = [records.restamp(encode(b"%d" % n), n, 1) for n in range(5)]
    gap = records.restamp(encode(b"gap"), 9, 1)
    data = memoryview(b"".join(stored) + gap)
    assert harness.engine.append_numbered(harness.log(), data) == (len(data) - len(gap), Reason.BAD_OFFSET)
    assert harness.engine.append_numbered(harness.log(), memoryview(stored[0]))[1] == Reason.BAD_OFFSET
    old = records.restamp(encode(b"old"), 5, 0)
    assert harness.engine.append_numbered(harness.log(), memoryview(old)) == (0, Reason.BAD_EPOCH)
    torn = records.restamp(encode(b"torn"), 5, 1)[:-1]
    assert harness.engine.append_numbered(harness.log(), memoryview(torn)) == (0, Reason.TRUNCATED)
    harness.durable()
    assert harness.values() == [b"%d" % n for n in range(5)]


def test_a_time_is_the_first_record_that_is_not_older(harness: Harness) -> None:
    """Against the list of all records, with times in order and out of it."""
    harness.create()
    rng, times = random.Random(SEED), []
    for number in range(60):
        stamp = 1000 + number * 10 + rng.choice((0, 0, 0, -300, 300))
        times.append(stamp)
    for rank in range(0, 60, 3):
        rows = [(None, b"%d" % number, times[number]) for number in range(rank, rank + 3)]
        harness.append(batch.encode(rows))
    for wanted in sorted({*times, *(stamp + 1 for stamp in times), 0, 10**6}):
        expected = next((offset for offset, stamp in enumerate(times) if stamp >= wanted), 60)
        assert harness.offset_at(wanted) == expected, wanted


def test_a_producer_is_recognised(harness: Harness) -> None:
    harness.create()
    frames = [encode(b"%d" % n, sequence=n) for n in range(3)]
    assert [a.offset for a in harness.append(*frames, frames[1], frames[2])] == [0, 1, 2, 1, 2]
    (gap,) = harness.stage(encode(b"later", sequence=9))
    (fenced,) = [harness.append(encode(b"new", sequence=0, epoch=1)), harness.stage(frames[2])][1]
    assert (gap.code, fenced.code) == (Code.OUT_OF_ORDER, Code.FENCED)
    assert harness.values() == [b"0", b"1", b"2", b"new"]
    assert harness.engine.producers.of("app") is None
    harness.engine.producers.grant("app", 7, 2, lambda client: False)
    assert harness.engine.producers.of("app") == (7, 2)


def test_groups_have_places(harness: Harness) -> None:
    harness.create()
    harness.append(encode(b"a", b"b"))
    key = harness.commit(1)
    assert harness.committed() == 1
    harness.commit(2)
    harness.engine.commit_offset(key, None)
    assert harness.committed() is None
    assert harness.engine.problems() == {} and harness.engine.refusal() is None


# ---- segments ----


def test_segments_end_where_the_next_begins(start: Start) -> None:
    harness = start(segment_bytes=1000)
    values = harness.fill(40)
    segments = harness.segments()
    assert all(segment.size <= 1000 for segment in segments)
    assert [s.end_offset for s in segments[:-1]] == harness.bases()[1:]
    assert [s.end_chain for s in segments[:-1]] == [s.base_chain for s in segments[1:]]
    assert [path.stat().st_size for path in harness.logs()] == [segment.size for segment in segments]
    assert all(path.with_suffix(".index").exists() for path in harness.logs()[:-1])
    for first in (0, 1, 17, 39, 40):
        assert harness.values(first) == values[first:]


def test_a_batch_larger_than_a_segment_has_one_of_its_own(start: Start) -> None:
    harness = start(segment_bytes=1000)
    big = b"x" * 5000
    for value in (b"a", big, b"b"):
        harness.append(encode(value))
    assert harness.values() == [b"a", big, b"b"]
    assert len(harness.bases()) == 3


def test_old_segments_are_sealed(start: Start) -> None:
    harness = start(segment_ms=10_000)
    harness.fill(1)
    harness.tick(9.0)
    assert harness.bases() == [0]
    harness.tick_until(lambda: harness.bases() == [0, 1])
    for _ in range(30):
        harness.tick()
    assert harness.bases() == [0, 1], "an empty segment does not age"
    assert len(harness.values()) == 1


def test_a_reader_at_the_tail_sees_everything_once(start: Start) -> None:
    """With and without its hint, whatever is staged, written or durable when it asks, across segments."""
    rng, harness, values = random.Random(SEED), start(segment_bytes=700), []
    seen: list[bytes | None] = []
    offset, hint = 0, None
    for number in range(400):
        if rng.random() < 0.5:
            values.append(b"%d" % number + b"." * rng.randrange(150))
            harness.stage(encode(values[-1]), level=rng.choice(list(AckLevel)))
        else:
            harness.loop.turn(0.002)
            harness.clock.advance(rng.choice((0.0, 0.006)))
        log = harness.log()
        found = log.find(offset, rng.choice((1, 300, 1 << 20)), rng.choice((1, 1000)), hint)
        if found is None:
            assert offset == log.durable_end
            hint = rng.choice((None, log.end_hint()))
            continue
        if isinstance(found, FileSlice):
            assert found.next_offset <= log.durable_end
            hint = rng.choice((None, (found.file.base, found.position + found.length)))
            following = found.next_offset
        else:
            hint, following = None, log.durable_end
        assert following > offset
        seen += harness.values(offset)[: following - offset]
        offset = following
    harness.durable()
    seen += harness.values(offset)
    assert seen == values and len(harness.bases()) > 10


def test_altered_settings_stay(start: Start) -> None:
    harness = start()
    answers: list[Code] = []
    settings = TopicSettings(retention_ms=5, segment_bytes=300, urgent=True, on_damage="skip")
    harness.store.alter_topic(TOPIC, settings, lambda code, _: answers.append(code))
    harness.until(lambda: answers)
    assert answers == [Outcome.OK] and harness.log().settings == settings
    harness.fill(4)
    assert harness.bases() == [0, 1, 2, 3], "the new segment size counts at once"
    harness.restart()
    assert harness.log().settings == settings


# ---- time until something is stored ----


def test_a_commit_interval_collects_and_urgent_does_not_wait(start: Start) -> None:
    harness = start(commit_interval=0.5)
    harness.create("alarms", urgent=True)
    harness.stage(encode(b"price"))
    for _ in range(5):
        harness.loop.turn(0.001)
    harness.clock.advance(0.4)
    harness.loop.turn(0.001)
    assert harness.log().durable_end == 0
    harness.clock.advance(0.11)
    harness.until(lambda: harness.log().durable_end == 1)
    harness.stage(encode(b"fire"), topic="alarms")
    harness.until(lambda: harness.log("alarms").durable_end == 1)


def test_a_commit_interval_does_not_hold_up_a_stop(start: Start) -> None:
    harness = start(commit_interval=1.0)
    harness.stage(encode(b"last"))
    assert harness.close()
    harness.open()
    assert harness.values() == [b"last"]


def test_a_group_offset_is_stored_within_fifty_milliseconds(start: Start) -> None:
    harness = start()
    harness.append(encode(*(b"%d" % n for n in range(100))))
    for offset in range(1, 60, 3):
        harness.commit(offset, stored=False)
        harness.until(lambda: not harness.store._metadata._busy)
    harness.clock.advance(0.05)
    harness.loop.turn(0.0)
    harness.restart()
    assert harness.committed() == 58
    key = ("tills", TOPIC, 0)
    harness.engine.commit_offset(key, GroupOffset(harness.log().identity.log_id, 1, 9))
    harness.stored()
    harness.restart()
    assert harness.committed() == 9, "a group that was sent back stays there"


# ---- producers across a restart ----


@pytest.mark.parametrize("lost", ["nothing", "meta.db"])
def test_duplicates_are_recognised_after_a_crash(start: Start, lost: str) -> None:
    harness = start(segment_bytes=1000)
    frames = [encode(b"%d" % n, sequence=n) for n in range(30)]
    harness.append(*frames)
    harness.crash()
    if lost != "nothing":
        for path in harness.path.glob("meta.db*"):
            path.unlink()
    harness.open()
    assert [(a.code, a.offset) for a in harness.append(*frames[-10:])] == [(Code.OK, n) for n in range(20, 30)]
    assert [a.offset for a in harness.append(encode(b"next", sequence=30))] == [30]
    assert [a.code for a in harness.append(encode(b"new epoch", sequence=0, epoch=1))] == [Code.OK]
    assert harness.append(frames[-1])[0].code == Code.FENCED
    assert harness.log().durable_end == 32


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_duplicates_are_recognised_behind_damage(start: Start, rank: int) -> None:
    """A bad batch in the segment hides nothing that was sent after it."""
    harness = start(segment_bytes=1 << 16)
    frames = [encode(b"%d" % n, sequence=n) for n in range(10)]
    harness.append(*frames[:8])
    harness.tick()
    harness.append(*frames[8:])
    harness.tick()
    harness.crash()
    raw = bytearray(harness.logs()[0].read_bytes())
    raw[len(raw) // 10 * rank + 8] ^= 0x40  # its length
    harness.logs()[0].write_bytes(raw)
    harness.open()
    assert [a.offset for a in harness.append(frames[8], frames[9])] == [8, 9]
    assert harness.log().durable_end == 10


def test_a_producer_is_forgotten_after_a_week_of_running(start: Start) -> None:
    harness = start()
    frame = encode(b"once", sequence=0)
    harness.append(frame)
    harness.tick(WEEK - 10)
    harness.close()
    harness.clock.seconds += 3 * WEEK  # the node was off: that does not count
    harness.open()
    assert harness.append(frame)[0].offset == 0
    harness.tick(WEEK + 10)
    harness.tick()
    assert harness.log().stage.producer_count == 0
    data, spans = pack([frame])
    assert harness.store.append(harness.log(), data, spans, AckLevel.DURABLE, False, 7).records == 1


def test_records_of_others_do_not_wait_for_many_partitions(tmp_path: Path) -> None:
    harness = StoreHarness(tmp_path / "data")
    harness.create(TOPIC)
    made: list[Outcome] = []
    harness.store.create_topic("wide", TopicSettings(partitions=100), lambda outcome, _: made.append(outcome))
    harness.stage(encode(b"v"))
    harness.until(lambda: harness.log().durable_end == 1)
    assert not made, "it is under way"
    harness.until(lambda: bool(made))
    assert (made, len(harness.store.partitions("wide"))) == ([Outcome.OK], 100)
    harness.close()


def test_a_crash_between_the_steps_of_a_creation(tmp_path: Path) -> None:
    """What is there of the topic was never acknowledged: the next start ignores it, and it can be created."""
    harness = StoreHarness(tmp_path / "data")
    made: list[Outcome] = []
    harness.store.create_topic("wide", TopicSettings(partitions=100), lambda outcome, _: made.append(outcome))
    directory = harness.path / "topics" / "wide"
    harness.until(lambda: directory.exists() and len(list(directory.iterdir())) > 1)
    assert not made
    harness.crash()
    harness.open()
    assert (list(harness.store.topics()), harness.store.problems()) == ([], {})
    assert harness.create("wide", partitions=100) is Outcome.OK
    assert len(harness.store.partitions("wide")) == 100
    harness.close()


@pytest.mark.parametrize(("left", "partitions"), [(3, 5), (20, 40)])
def test_a_creation_that_fails_gives_its_descriptors_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, partitions: int
) -> None:
    harness = StoreHarness(tmp_path / "data")
    harness.create("first")
    create_log, made = files.create_log, list[int]()

    def fail(path: Path) -> int:
        if len(made) == left:
            raise OSError(errno.EMFILE, "too many open files")
        made.append(create_log(path))
        return made[-1]

    monkeypatch.setattr(files, "create_log", fail)
    before = len(os.listdir("/proc/self/fd"))
    assert harness.create("wide", partitions=partitions) is Outcome.OVERLOADED
    assert "too few file descriptors" in harness.store.problems()["descriptors"]
    assert len(made) == left
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.undo()
    assert harness.create("wide", partitions=partitions) is Outcome.OK
    harness.close()


def test_a_segment_for_which_no_descriptor_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no full disk: what was not written is sent again, and the next record tries it again."""
    harness = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000))
    harness.create(TOPIC)
    harness.fill(9)
    failed = ("failed", harness.log().name, Outcome.OVERLOADED)

    def fail(path: Path) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(files, "create_log", fail)
        while failed not in harness.listener.events:
            harness.stage(encode(bytes(100)))
            harness.until(lambda: failed in harness.listener.events or harness.store._committer.stored)
        assert "too few file descriptors" in harness.store.problems()["descriptors"]
        assert "disk_full" not in harness.store.problems()
        assert harness.store.refusal() is None
    values = harness.values()
    assert len(values) >= 9
    harness.tick_until(lambda: not harness.store.problems())
    values += harness.fill(20)
    assert harness.values() == values
    assert len(harness.bases()) > 2
    harness.close()
