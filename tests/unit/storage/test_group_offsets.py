"""What a store keeps about groups and tables beside the records: places, deletions, snapshots, an older schema."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code
from edgebroker.common.outcome import Outcome
from edgebroker.storage.metadata.meta_db import VERSION, MetaDatabase
from edgebroker.storage.types import GroupOffset
from tests.kit.storage import TOPIC, StoreHarness, store_settings


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[StoreHarness]:
    found = StoreHarness(tmp_path / "data", store_settings(segment_bytes=1000, retention_bytes=2500))
    found.create(kind="table")
    yield found
    found.close()


def test_everything_about_a_place_survives(harness: StoreHarness) -> None:
    harness.fill(5)
    log = harness.log()
    place = GroupOffset(log.identity.log_id, log.epoch, 3, 0, 4, True, "ab" * 16, 1, 5)
    harness.engine.commit_offset(("tills", TOPIC, 0), place)
    harness.stored()
    for stop in (harness.crash, harness.close):
        stop()
        harness.open()
        found = harness.engine.group_offsets()["tills", TOPIC, 0]
        assert (found.next_offset, found.attempts, found.isolated) == (3, 4, True)
        assert (found.reset_id, found.reset_from, found.target, found.refreshing) == ("ab" * 16, 1, 5, True)


def test_a_deleted_place_does_not_come_back(harness: StoreHarness) -> None:
    """offsets.snap is older than the deletion when the power goes."""
    harness.fill(5)
    key = harness.commit(3)
    harness.tick(5.0)
    harness.quiesce()
    assert b"tills" in (harness.path / "offsets.snap").read_bytes()
    harness.engine.commit_offset(key, None)
    harness.stored()
    harness.crash()
    harness.open()
    assert harness.committed() is None
    assert b"tills" in (harness.path / "offsets.snap").read_bytes()
    harness.tick(5.0)
    harness.quiesce()
    assert b"tills" not in (harness.path / "offsets.snap").read_bytes()
    harness.tick()  # the row goes once the snapshot without it is stored
    harness.stored()
    with sqlite3.connect(harness.path / "meta.db") as database:
        assert database.execute("SELECT count(*) FROM group_offsets").fetchone() == (0,)
    harness.restart()
    assert harness.committed() is None


def test_a_deleted_group_may_begin_again(harness: StoreHarness) -> None:
    harness.fill(5)
    key = harness.commit(5)
    harness.engine.commit_offset(key, None)
    harness.commit(2)
    harness.tick(5.0)
    harness.quiesce()
    harness.crash()
    harness.open()
    assert harness.committed() == 2


COLUMNS = ("attempts", "alone", "reset_id", "reset_from", "target", "moved_end")


@pytest.mark.parametrize(("version", "lacking"), [(2, COLUMNS), (3, COLUMNS[-1:])])
def test_places_of_the_schemas_before(harness: StoreHarness, version: int, lacking: tuple[str, ...]) -> None:
    """Version 2 knew neither attempts nor refreshes, 3 no moves by an operator."""
    harness.fill(5)
    harness.commit(3)
    harness.close()
    (harness.path / "offsets.snap").unlink()
    with sqlite3.connect(harness.path / "meta.db") as database:
        for column in lacking:
            database.execute(f"ALTER TABLE group_offsets DROP COLUMN {column}")
        database.execute(f"PRAGMA user_version={version}")
    harness.open()
    assert harness.committed() == 3
    place = harness.engine.group_offsets()["tills", TOPIC, 0]
    assert (place.refreshing, place.moved_end) == (False, -1)
    harness.close()
    with sqlite3.connect(harness.path / "meta.db") as database:
        assert database.execute("PRAGMA user_version").fetchone() == (VERSION,)
    assert not list(harness.path.glob("meta.db.corrupt*"))
    harness.open()


def test_places_of_a_schema_before_that_a_full_disk_keeps(
    harness: StoreHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be upgraded: its places count all the same, and the upgrade comes with the space."""
    harness.fill(5)
    harness.commit(3)
    harness.close()
    (harness.path / "offsets.snap").unlink()
    with closing(sqlite3.connect(harness.path / "meta.db")) as database:
        for _, column, *_ in database.execute("PRAGMA table_info(group_offsets)").fetchall()[7:]:
            database.execute(f"ALTER TABLE group_offsets DROP COLUMN {column}")
        database.execute("PRAGMA user_version=2")

    def full(self: MetaDatabase) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(MetaDatabase, "_connect", full)
        harness.open()
        assert harness.committed() == 3
    harness.commit(4)
    harness.restart()
    assert harness.committed() == 4
    assert not list(harness.path.glob("meta.db.corrupt*"))
    with closing(sqlite3.connect(harness.path / "meta.db")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (VERSION,)


def test_retention_stops_at_the_newest_complete_snapshot(harness: StoreHarness) -> None:
    harness.fill(10)
    answers: list[Code] = []
    harness.engine.complete_snapshot(harness.log(), 4, 9, lambda code, message: answers.append(code))
    harness.until(lambda: answers)
    assert answers == [Outcome.OK]
    harness.fill(60)
    for _ in range(20):
        harness.tick()
    start = harness.log().log_start
    assert start <= 4 < harness.bases()[1], "the segment where the snapshot begins stays, the ones before it go"
    assert harness.log().size_bytes > 2500
    harness.crash()
    harness.open()
    assert harness.log().identity.snapshot == (4, 9)
    harness.engine.complete_snapshot(harness.log(), 40, 45, lambda code, message: answers.append(code))
    harness.until(lambda: len(answers) == 2)
    harness.tick_until(lambda: harness.log().log_start > 4)
    assert harness.log().log_start <= 40


def test_an_identity_written_before_there_were_snapshots(harness: StoreHarness) -> None:
    harness.fill(3)
    harness.close()
    path = harness.directory() / "identity"
    line = path.read_bytes().partition(b"\n")[0].replace(b',"snapshot":[-1,-1]', b"")
    line = line.replace(b',"message_ttl_ms":0', b"")
    assert b"snapshot" not in line
    path.write_bytes(line + b"\n%08x\n" % crc32c(line))
    harness.open()
    assert harness.log().identity.snapshot == (-1, -1)
    assert len(harness.values()) == 3
