"""The data directory as a whole: who may open it, what a stop leaves, and every state that meta.db can be in."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgebroker.common.errors import Code, DataDirectoryError, DataDirectoryInUseError, FormatTooNewError
from edgebroker.common.types import TopicSettings
from edgebroker.storage import files
from edgebroker.storage.directory import DataDirectory
from edgebroker.storage.identity import change_identity, read_identity, write_identity
from edgebroker.storage.metadata.meta_db import (
    MetaDatabase,
    newest_offsets,
    read_offsets_snapshot,
    write_offsets_snapshot,
)
from edgebroker.storage.types import GroupOffset, make_identity
from tests.kit.clock import ManualClock
from tests.kit.storage import TOPIC, StoreHarness, encode, snapshot, tree

SEED = 20240611
Damage = Callable[[Path], object]


@pytest.fixture
def stopped(tmp_path: Path) -> StoreHarness:
    """A closed store with ten records and a group at 6."""
    harness = StoreHarness(tmp_path / "data")
    harness.create()
    harness.fill(10)
    harness.commit(6)
    assert harness.close()
    return harness


# ---- who may open it ----


def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    harness = StoreHarness(tmp_path / "data")
    harness.create()
    harness.fill(3)
    harness.tick()
    harness.quiesce()
    before = tree(harness.path)
    with pytest.raises(DataDirectoryInUseError, match="another edgebroker") as refused:
        DataDirectory(harness.path, "root")
    assert refused.value.exit_code == 75
    assert tree(harness.path) == before
    harness.append(encode(b"still writing"))
    assert harness.close()


@pytest.mark.parametrize(
    "content",
    [
        b'{"version":2}\n',
        b'{"version":1,"incompat":["encrypted"]}\n',
        b'{"version":1,"ro_compat":["tiered"]}\n',
        b'{"version":99,"compat":[],"incompat":["a","b"],"something":{"new":1}}\n',
    ],
)
def test_a_newer_format_is_refused_and_nothing_changes(stopped: StoreHarness, content: bytes) -> None:
    (stopped.path / "FORMAT").write_bytes(content)
    before = tree(stopped.path)
    with pytest.raises(FormatTooNewError, match="nothing was changed") as refused:
        stopped.open()
    assert refused.value.exit_code == 2
    assert tree(stopped.path) == before
    (stopped.path / "FORMAT").write_bytes(b'{"version":1,"compat":["harmless"]}\n')
    stopped.open()  # and the lock was given back
    assert stopped.close()


def test_an_unwritable_directory_is_a_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataDirectoryError, match="choose another --data-dir"):
        DataDirectory(tmp_path / "file" / "data", "root")
    really = os.open

    def refuse(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, flags, mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataDirectoryError, match="check owner and rights") as refused:
        DataDirectory(tmp_path, "root")
    assert refused.value.exit_code == 1


# ---- CLEAN, node, reserve ----


def test_clean_is_removed_first_and_written_last(stopped: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between start and stop there is no mark, whatever happens; it appears when all else is stored."""
    mark = stopped.path / "CLEAN"
    assert mark.exists()
    seen: list[tuple[str, bool]] = []
    really = files.write_durable

    def watch(path: Path, data: bytes) -> None:
        seen.append((path.name, mark.exists()))
        really(path, data)

    monkeypatch.setattr(files, "write_durable", watch)
    (stopped.path / "node").unlink()
    stopped.open()
    assert stopped.store._directory.was_clean
    assert seen == [("node", False)], "a crash while starting would have looked like a clean stop"
    stopped.append(encode(b"more"))
    assert not mark.exists()
    assert stopped.close()
    assert seen[-1] == ("CLEAN", False) and mark.exists()


def test_a_crash_leaves_no_mark(stopped: StoreHarness) -> None:
    stopped.open()
    stopped.crash()
    assert not (stopped.path / "CLEAN").exists()
    stopped.open()
    assert not stopped.store._directory.was_clean
    stopped.close()


def test_no_mark_after_a_storage_problem(stopped: StoreHarness) -> None:
    """A broken file turned the store read-only: the next start must look closely."""
    stopped.open()
    stopped.store._committer.read_only = "prices/0: EIO"
    assert not stopped.close()
    assert not (stopped.path / "CLEAN").exists()


def test_no_mark_while_something_is_staged(stopped: StoreHarness) -> None:
    stopped.open()
    stopped.stage(encode(b"not stored"))
    assert not stopped.store.close(5.0)
    stopped.loop.close()
    stopped.is_open = False
    assert not (stopped.path / "CLEAN").exists()


def test_the_node_keeps_its_uid_and_the_reserve_is_there(stopped: StoreHarness) -> None:
    reserve = stopped.path / "reserve"
    assert reserve.stat().st_blocks * 512 >= 8 << 20
    uid = stopped.store.node_uid
    stopped.open()
    assert stopped.store.node_uid == uid
    assert stopped.store._directory.spend_reserve() and not reserve.exists()
    assert not stopped.store._directory.spend_reserve()
    stopped.close()


def test_a_full_disk_is_no_reason_not_to_start(stopped: StoreHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """FORMAT cannot be written before the reserve is given back."""
    really, reserve = files.write_durable, stopped.path / "reserve"

    def full(path: Path, data: bytes) -> None:
        if reserve.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        really(path, data)

    (stopped.path / "FORMAT").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_durable", full)
        patch.setattr(files, "free_space", lambda path: (0, 1 << 30))
        stopped.open()
        assert len(stopped.values()) == 10
    stopped.close()


# ---- meta.db ----


def zero(name: str) -> Damage:
    return lambda path: (path / name).write_bytes(b"")


def cut_half(name: str) -> Damage:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def noise(name: str) -> Damage:
    def damage(path: Path) -> None:
        size = (path / name).stat().st_size
        (path / name).write_bytes(random.Random(SEED).randbytes(size))

    return damage


def gone(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def noisy_page(number: int) -> Damage:
    def damage(path: Path) -> None:
        raw = bytearray((path / "meta.db").read_bytes())
        raw[4096 * number : 4096 * (number + 1)] = random.Random(SEED).randbytes(4096)
        (path / "meta.db").write_bytes(raw)

    return damage


def sql(statement: str) -> Damage:
    def damage(path: Path) -> None:
        connection = sqlite3.connect(path / "meta.db")
        connection.executescript(statement)
        connection.commit()
        connection.close()

    return damage


def directory(name: str) -> Damage:
    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return damage


ALL = [
    (f"{what.__name__} {name}", what(name))
    for what in (zero, cut_half, noise, gone)
    for name in ("meta.db", "meta.db-wal", "meta.db-shm")
]
STATES = dict(ALL) | {
    **{f"noise in page {number}": noisy_page(number) for number in range(9)},
    "a newer schema": sql("PRAGMA user_version=99"),
    "an older schema": sql("PRAGMA user_version=1; DROP TABLE checkpoints; CREATE TABLE checkpoints (topic TEXT)"),
    "windows without a mark": sql(f"INSERT INTO windows VALUES ('{TOPIC}', 5, 1, 0, 0.0, x'00')"),
    "a directory": directory("meta.db"),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A killed store whose meta.db is partly in the file and partly in the -wal; the group stands at 6."""
    path = tmp_path_factory.mktemp("running") / "data"
    harness = StoreHarness(path)
    harness.create()
    harness.fill(4)
    harness.commit(4)
    assert harness.close()
    harness.open()
    harness.fill(6)
    harness.commit(6)
    harness.tick(5.0)
    harness.tick()
    harness.quiesce()
    snapshot(path, path.with_name("copy"))
    harness.close()
    assert (path.with_name("copy") / "meta.db-wal").stat().st_size
    return path.with_name("copy")


@pytest.mark.parametrize("name", STATES)
def test_any_meta_database_starts(name: str, running: Path, tmp_path: Path) -> None:
    """No record depends on it; the committed offset comes from offsets.snap, and is never further than it was."""
    snapshot(running, tmp_path / "data")
    STATES[name](tmp_path / "data")
    harness = StoreHarness(tmp_path / "data")
    assert len(harness.values()) == 10
    assert harness.committed() == 6
    harness.fill(3)
    harness.commit(9)
    harness.tick()
    assert "metadata" not in harness.store.problems()
    harness.restart()
    assert (len(harness.values()), harness.committed()) == (13, 9)
    assert harness.close()


def test_an_unusable_database_is_kept(stopped: StoreHarness) -> None:
    noise("meta.db")(stopped.path)
    damaged = (stopped.path / "meta.db").read_bytes()
    stopped.open()
    (aside,) = stopped.path.glob("meta.db.corrupt-*[0-9]")
    assert aside.read_bytes() == damaged
    stopped.close()


def test_an_old_copy_of_the_database_takes_no_group_back(running: Path, tmp_path: Path) -> None:
    """A backup was put in its place: the snapshot knows more."""
    harness = StoreHarness(tmp_path / "data")
    harness.create()
    harness.fill(5)
    harness.commit(2)
    harness.close()
    old = (harness.path / "meta.db").read_bytes()
    harness.open()
    harness.fill(5)
    harness.commit(8)
    harness.close()
    (harness.path / "meta.db").write_bytes(old)
    harness.open()
    assert harness.committed() == 8
    assert len(harness.values()) == 10
    harness.close()


def test_a_producer_goes_on_from_the_epoch_that_only_the_log_knows(tmp_path: Path) -> None:
    """The power went before the grant was stored: who comes again with the same name must not be fenced for ever."""
    harness = StoreHarness(tmp_path / "data")
    harness.create()
    harness.engine.producers.grant("keeper", 7, 0, lambda client: False)
    harness.append(encode(b"a", sequence=0))
    harness.close()
    old = (harness.path / "meta.db").read_bytes()
    harness.open()
    harness.engine.producers.grant("keeper", 7, 1, lambda client: False)
    harness.append(encode(b"b", sequence=0, epoch=1))
    harness.close()
    (harness.path / "meta.db").write_bytes(old)
    harness.open()
    assert harness.engine.producers.of("keeper") == (7, 1)
    (placed,) = harness.append(encode(b"c", sequence=0, epoch=2))
    assert (placed.code, placed.offset) == (Code.OK, 2)
    harness.close()


@pytest.mark.parametrize("damage", [zero, cut_half, noise, gone], ids=lambda damage: damage.__name__)
def test_a_damaged_snapshot_takes_nothing_from_the_database(damage: Callable[[str], Damage], running: Path, tmp_path: Path) -> None:  # fmt: skip  # noqa: E501
    snapshot(running, tmp_path / "data")
    damage("offsets.snap")(tmp_path / "data")
    harness = StoreHarness(tmp_path / "data")
    assert harness.committed() == 6
    harness.close()


def test_both_copies_gone_means_earliest(running: Path, tmp_path: Path) -> None:
    """Never `latest`: reading twice is allowed, missing something is not."""
    snapshot(running, tmp_path / "data")
    for path in (tmp_path / "data").glob("meta.db*"):
        path.unlink()
    (tmp_path / "data" / "offsets.snap").unlink()
    harness = StoreHarness(tmp_path / "data")
    assert harness.committed() is None
    assert len(harness.values()) == 10
    harness.close()


def test_the_newer_of_two_copies_wins() -> None:
    """Newer, not further: an operator may have sent a group back."""
    a, b, c = ("g", "t", 0), ("g", "t", 1), ("g", "t", 2)
    database = {a: GroupOffset("x", 1, 5, 1), b: GroupOffset("x", 1, 2, 7)}
    snap = {a: GroupOffset("x", 1, 7, 2), b: GroupOffset("x", 1, 9, 6), c: GroupOffset("y", 1, 3, 1)}
    assert newest_offsets(database, snap) == {a: snap[a], b: database[b], c: snap[c]}
    assert newest_offsets(database, {}) == database
    assert newest_offsets({}, snap) == snap


def test_every_bit_of_the_snapshot_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "offsets.snap"
    offsets = {("tills", TOPIC, 0): GroupOffset("ab" * 16, 1, 42)}
    write_offsets_snapshot(path, offsets)
    assert read_offsets_snapshot(path) == offsets
    raw = path.read_bytes()
    for bit in range(len(raw) * 8):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert read_offsets_snapshot(path) in ({}, offsets), bit
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        assert read_offsets_snapshot(path) in ({}, offsets)


def test_a_missing_directory_is_no_exception(tmp_path: Path) -> None:
    database = MetaDatabase(tmp_path / "nowhere" / "meta.db", ManualClock())
    assert database.load().checkpoints == {}
    database.close()


# ---- identity ----


@pytest.mark.parametrize("with_meta", [True, False])
@pytest.mark.parametrize("damage", [zero, cut_half, noise, gone], ids=lambda damage: damage.__name__)
def test_a_damaged_identity_costs_no_record(
    stopped: StoreHarness, damage: Callable[[str], Damage], with_meta: bool
) -> None:
    """With meta.db the log keeps its log_id, else it gets another one; the records are there in any case."""
    old = read_identity(stopped.directory())
    damage("identity")(stopped.directory())
    if not with_meta:
        for path in stopped.path.glob("meta.db*"):
            path.unlink()
    stopped.open()
    assert len(stopped.values()) == 10
    new = stopped.log().identity
    assert (new.log_id == old.log_id) == with_meta
    assert (new.chain == old.chain) == with_meta, "a chain starts at the CRC of the log_id"
    stopped.fill(2)
    stopped.restart()
    assert stopped.log().identity == new
    assert len(stopped.values()) == 12
    stopped.close()


def test_changes_of_an_identity_do_not_undo_each_other(tmp_path: Path) -> None:
    """Retention and new settings both rewrite it: each starts from what lies on the disk."""
    made = make_identity("aa" * 16, TopicSettings())
    write_identity(tmp_path, made)
    change_identity(tmp_path, lambda old: msgspec.structs.replace(old, log_start=5, chain=7))
    change_identity(tmp_path, lambda old: msgspec.structs.replace(old, settings=TopicSettings(urgent=True)))
    found = read_identity(tmp_path)
    assert (found.log_id, found.log_start, found.chain, found.settings.urgent) == (made.log_id, 5, 7, True)
