"""What comes back after a stop, whatever kind of stop it was, and whatever happened to the files meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edgebroker.common import batch
from edgebroker.storage.identity import read_identity, write_identity
from edgebroker.storage.log.index import read_index
from tests.kit.storage import TOPIC, StoreHarness, encode, snapshot, store_settings

SEED = 20240611
Start = Callable[..., StoreHarness]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Opens stores; closes those that a test leaves open."""
    opened: list[StoreHarness] = []

    def begin(path: Path = tmp_path / "data", **settings: int) -> StoreHarness:
        opened.append(StoreHarness(path, store_settings(**settings)))
        return opened[-1]

    yield begin
    for harness in opened:
        harness.close()


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def batches_of(path: Path) -> list[tuple[int, int, int, int]]:
    """(position, size, first offset, next offset) of every batch of a healthy segment."""
    raw, position, found = path.read_bytes(), 0, []
    while position < len(raw):
        header = batch.read_header(raw, position)
        found.append((position, header.size, header.base_offset, header.base_offset + header.count))
        position += header.size
    return found


def kept(harness: StoreHarness) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((harness.path / "quarantine").glob("*.bytes")))


# ---- the damage table: name, what is done to the directory, offsets that are gone (of 0..29) ----
# Thirty batches of one record in segments of five; everything was acknowledged; the last segment begins at 25.

Damage = Callable[[Path], object]


def segment(base: int) -> str:
    return f"topics/{TOPIC}/0/{base:020d}.log"


def cut(base: int, rank: int, extra: int = 0) -> Damage:
    """End a segment in front of its batch number `rank`, `extra` bytes into it."""

    def damage(path: Path) -> None:
        log = path / segment(base)
        log.write_bytes(log.read_bytes()[: batches_of(log)[rank][0] + extra])

    return damage


def overwrite(base: int, rank: int, at: int, data: bytes) -> Damage:
    def damage(path: Path) -> None:
        log = path / segment(base)
        start = batches_of(log)[rank][0] + at
        raw = log.read_bytes()
        log.write_bytes(raw[:start] + data + raw[start + len(data) :])

    return damage


def both(*steps: Damage) -> Damage:
    def damage(path: Path) -> None:
        for step in steps:
            step(path)

    return damage


def remove(*names: str) -> Damage:
    def damage(path: Path) -> None:
        for name in names:
            for found in list(path.glob(name)):
                found.unlink()

    return damage


def append(base: int, data: bytes) -> Damage:
    def damage(path: Path) -> None:
        with (path / segment(base)).open("ab") as log:
            log.write(data)

    return damage


NOTHING: list[int] = []
META = remove("meta.db*")
INDEXES = remove(f"topics/{TOPIC}/0/*.index")
TABLE: dict[str, tuple[Damage, list[int]]] = {
    "nothing": (both(), NOTHING),
    "all caches gone": (both(META, INDEXES), NOTHING),
    "indexes gone": (INDEXES, NOTHING),
    "meta.db gone": (META, NOTHING),
    "garbage behind the end": (append(25, b"\x7fgarbage" * 9), NOTHING),
    "zeroes behind the end": (append(25, bytes(4096)), NOTHING),
    "half a batch behind the end": (append(25, encode(b"torn")[:70]), NOTHING),
    "value of a sealed batch": (overwrite(10, 2, 80, b"\xff\xff"), [12]),
    "header of a sealed batch": (overwrite(10, 2, 0, b"\xff" * 61), [12]),
    "two batches in a row": (overwrite(10, 2, 30, b"\xff" * 200), [12, 13]),
    "first batch of a segment": (overwrite(10, 0, 70, b"\xff"), [10]),
    "last batch of a sealed segment": (overwrite(10, 4, 70, b"\xff"), [14]),
    "first and last batch": (both(overwrite(0, 0, 70, b"\xff"), overwrite(25, 4, 70, b"\xff")), [0, 29]),
    "value of an active batch": (overwrite(25, 1, 80, b"\xff"), [26]),
    "zeroed sector": (overwrite(5, 1, 0, bytes(512)), [6, 7, 8]),
    "sealed segment cut at a batch": (cut(10, 3), [13, 14]),
    "sealed segment cut inside a batch": (cut(10, 3, 20), [13, 14]),
    "sealed segment empty": (cut(10, 0), [10, 11, 12, 13, 14]),
    "active segment cut at a batch": (cut(25, 3), [28, 29]),
    "active segment cut inside a batch": (cut(25, 3, 20), [28, 29]),
    "active segment empty": (cut(25, 0), [25, 26, 27, 28, 29]),
    "a middle segment gone": (remove(segment(10)), [10, 11, 12, 13, 14]),
    "two middle segments gone": (remove(segment(10), segment(15)), list(range(10, 20))),
    "the first segment gone": (remove(segment(0)), [0, 1, 2, 3, 4]),
    "the last segment gone": (remove(segment(25)), [25, 26, 27, 28, 29]),
    "a middle segment and the caches gone": (both(remove(segment(10)), META, INDEXES), [10, 11, 12, 13, 14]),
    "value of a sealed batch, caches gone": (both(overwrite(10, 2, 80, b"\xff"), META, INDEXES), [12]),
    "every segment gone": (remove(f"topics/{TOPIC}/0/*.log"), list(range(30))),
    "strange files everywhere": (
        both(*(lambda path, name=name: (path / name).write_bytes(b"?") for name in (
            "topics/README", f"topics/{TOPIC}/7", f"topics/{TOPIC}/0/notes.txt", f"topics/{TOPIC}/0/1.log",
            f"topics/{TOPIC}/0/identity.tmp", "quarantine/x"))),
        NOTHING,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with thirty acknowledged batches, as a kill left it, and a group that stands at 30."""
    path = tmp_path_factory.mktemp("thirty") / "data"
    harness = StoreHarness(path)
    harness.create()
    harness.fill(30)
    assert harness.bases() == [0, 5, 10, 15, 20, 25]
    harness.commit(30)
    harness.tick(5.0)
    harness.crash()
    return path


def value(offset: int) -> bytes:
    return (b"%d-" % offset).ljust(100, b".")


@pytest.mark.parametrize("when", ["read at once", "verified first", "read, verified, read"])
@pytest.mark.parametrize("name", TABLE)
def test_damage_costs_what_it_hit_and_is_named(
    name: str, when: str, thirty: Path, tmp_path: Path, start: Start
) -> None:
    damage, gone = TABLE[name]
    snapshot(thirty, tmp_path / "data")
    damage(tmp_path / "data")
    for again in (False, True):
        harness = start()
        if when == "read, verified, read":
            harness.read()
        if when != "read at once":
            harness.tick_until(lambda harness=harness: not unverified(harness))
        found, corrupt_ranges = harness.read()
        assert [(message.offset, message.value) for message in found] == [
            (offset, value(offset)) for offset in range(30) if offset not in gone
        ]
        assert {offset for corrupt in corrupt_ranges for offset in range(*corrupt)} == set(gone), (
            name,
            again,
            corrupt_ranges,
        )
        assert ("damaged" in harness.store.problems()) == bool(gone)
        assert harness.log().durable_end == 30
        assert harness.committed() == 30
        harness.crash()


def unverified(harness: StoreHarness) -> list[int]:
    """Bases of segments that the background check has yet to look at; a damaged one stays unverified."""
    log = harness.log()
    return [s.base for s in log.segments if s.unverified_end and not any(
        s.base <= corrupt.first < max(s.end_offset, s.base + 1) for corrupt in log.corrupt_ranges)]  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_writing_goes_on_after_damage(name: str, thirty: Path, tmp_path: Path, start: Start) -> None:
    """New offsets follow the old ones, whatever was lost; and all of it is there again at the next start."""
    damage, gone = TABLE[name]
    snapshot(thirty, tmp_path / "data")
    damage(tmp_path / "data")
    harness = start()
    harness.read()
    new = harness.fill(12)
    assert harness.read(30)[0][0].offset == 30
    harness.restart()
    found, corrupt_ranges = harness.read()
    assert [message.value for message in found] == [value(o) for o in range(30) if o not in gone] + new
    assert {offset for corrupt in corrupt_ranges for offset in range(*corrupt)} == set(gone)
    assert "read_only" not in harness.store.problems()


# ---- a crash between two steps ----


def empty_segment(base: int) -> Damage:
    return lambda path: (path / segment(base)).write_bytes(b"")


def touch(name: str) -> Damage:
    return lambda path: (path / name).write_bytes(b"half")


ROLL: dict[str, Damage] = {
    "before the index": remove(f"topics/{TOPIC}/0/{25:020d}.index"),
    "while the index is written": touch(f"topics/{TOPIC}/0/{25:020d}.index.tmp"),
    "index half written": touch(f"topics/{TOPIC}/0/{25:020d}.index"),
    "segment begun, not used": empty_segment(30),
    "segment begun, index lost": both(empty_segment(30), INDEXES),
    "segment begun, meta.db lost": both(empty_segment(30), META),
}


@pytest.mark.parametrize("name", ROLL)
def test_a_crash_while_rolling_costs_nothing(name: str, thirty: Path, tmp_path: Path, start: Start) -> None:
    snapshot(thirty, tmp_path / "data")
    ROLL[name](tmp_path / "data")
    harness = start()
    new = harness.fill(12)
    for _ in range(2):
        assert harness.values() == [value(offset) for offset in range(30)] + new
        assert harness.store.problems() == {}
        assert [s.end_offset for s in harness.segments()[:-1]] == harness.bases()[1:]
        harness.restart()


@pytest.mark.parametrize("meta", ["kept", "lost"])
@pytest.mark.parametrize("steps", range(7))
def test_a_crash_while_retention_removes(steps: int, meta: str, thirty: Path, tmp_path: Path, start: Start) -> None:
    """The identity says where the log begins; after it, index and log of each segment go, oldest first."""
    snapshot(thirty, tmp_path / "data")
    directory = tmp_path / "data" / "topics" / TOPIC / "0"
    old = read_identity(directory)
    first = read_index(
        directory / f"{15:020d}.log", old.log_id_bytes, 15, (directory / f"{15:020d}.log").stat().st_size
    )
    assert first is not None
    write_identity(directory, msgspec.structs.replace(old, log_start=15, chain=first.base_chain))
    names = [f"{base:020d}.{kind}" for base in (0, 5, 10) for kind in ("index", "log")]
    for name in names[:steps]:
        (directory / name).unlink()
    if meta == "lost":
        META(tmp_path / "data")
    harness = start()
    assert harness.bases() == [15, 20, 25]
    assert harness.values() == [value(offset) for offset in range(15, 30)]
    assert harness.store.problems() == {}
    assert not any((directory / name).exists() for name in names), "what was begun was not finished"


# ---- a file that fails while it is written ----


@pytest.mark.parametrize("device", ["/dev/null", "read only"])
def test_a_file_that_fails_is_left_and_nothing_is_lost(device: str, tmp_path: Path, start: Start) -> None:
    """/dev/null takes the bytes and refuses the sync; what was not durable goes to a new segment, once."""
    harness = start()
    harness.create()
    values = harness.fill(3)
    active = harness.log().active
    broken = os.open(
        active.path if device == "read only" else device, os.O_RDONLY if device == "read only" else os.O_RDWR
    )
    os.dup2(broken, active.fd, inheritable=False)
    os.close(broken)
    values += harness.fill(3)
    assert harness.bases()[:2] == [0, 3]
    assert harness.values() == values
    assert [event for event in harness.listener.events if event[0] == "failed"] == []
    assert harness.store.refusal() is None
    for _ in range(2):
        harness.restart()
        assert harness.values() == values
        values += harness.fill(3)
