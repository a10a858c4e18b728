"""The fault tools on a toy: a log whose writer can be made careless must pass when careful and be caught when not."""

import shutil
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import crashstates, shim
from .conftest import SIZES, Lab
from .disk import Disk, read_trace

pytestmark = [pytest.mark.skipif(not shim.available(), reason="needs Linux and gcc"), pytest.mark.slow]

HEAD = struct.Struct("<II")


def records(directory: Path) -> int:
    """How many records of the toy can be read, up to the first that is damaged."""
    count = 0
    for path in sorted(directory.glob("*.log")):
        data, position = path.read_bytes(), 0
        while position + HEAD.size <= len(data):
            size, crc = HEAD.unpack_from(data, position)
            body = data[position + HEAD.size : position + HEAD.size + size]
            if size != SIZES[count] or len(body) < size or zlib.crc32(body) != crc or body[0] != count:
                return count
            count, position = count + 1, position + HEAD.size + size
    return count


def lost(state: crashstates.State) -> str | None:
    """What a state lacks of what was acknowledged before the power cut."""
    directory = state.materialise()
    acked = max((int(mark) for mark in state.marks if mark.isdigit()), default=0)
    if records(directory) < acked:
        return f"records: {state.describe()}"
    known = [mark for mark in state.marks if not mark.isdigit()]
    text = (directory / "state").read_bytes() if (directory / "state").exists() else b""
    legal = {b"a" * 1300, b"b" * 1400} if known else {b"", b"a" * 1300}
    return None if text in (legal if known != [b"b"] else {b"b" * 1400}) else f"state file: {state.describe()}"


def losses(lab: Lab) -> Iterator[str]:
    return (text for text in map(lost, lab.states()) if text)


# --- the power cut


def test_a_careful_writer_loses_nothing(lab: Lab) -> None:
    assert lab.toy() == 0
    assert list(losses(lab)) == []
    found = list(lab.states())
    assert len(found) > 200
    assert {state.op_index for state in found} == set(range(found[-1].op_index + 1))
    assert found[-1].marks == [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8", b"a", b"b"]


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("fdatasync:.log$:*:skip", "records"),  # the data
        ("fdatasync:1.log$:3:skip", "records"),  # one sync of all
        ("fsync:root$:1:skip", "records"),  # the directory entry of the first segment
        ("fsync:root$:2:skip", "records"),  # of the second one
        ("fsync:state.tmp$:*:skip", "state file"),  # the content before the rename
        ("fsync:root$:3+:skip", "state file"),  # the rename itself
    ],
)
def test_a_missing_sync_is_caught(lab: Lab, rule: str, what: str) -> None:
    assert lab.toy(rule) == 0
    assert any(text.startswith(what) for text in losses(lab))


def test_states_are_the_same_for_the_same_seed(lab: Lab) -> None:
    lab.toy("fdatasync::*:skip")
    first, second = ([(s.op_index, s.files()) for s in lab.states(50)] for _ in range(2))
    assert first == second


def test_a_failed_sync_stays_in_doubt(lab: Lab) -> None:
    """The second sync succeeds, and yet what the first covered may be gone; written again it is safe."""
    code = """
        import os, sys
        fd = os.open(sys.argv[1] + "/a", os.O_RDWR | os.O_CREAT)
        directory = os.open(sys.argv[1], os.O_RDONLY)
        os.fsync(directory)
        note = os.open(sys.argv[1] + "/.mark", os.O_WRONLY | os.O_CREAT)
        os.pwrite(fd, b"x" * 600, 0)
        try:
            os.fdatasync(fd)
        except OSError:
            os.write(note, b"failed")
        os.fdatasync(fd)
        os.write(note, b"retried")
        os.pwrite(fd, b"x" * 600, 0)
        os.fdatasync(fd)
        os.write(note, b"rewritten")
    """
    assert lab.run(code, rules=["fdatasync::1:EIO"]) == (0, "")
    whole: dict[bytes, set[bool]] = {}
    for state in lab.states():
        whole.setdefault(b"".join(state.marks[-1:]), set()).add(state.files().get("a") == b"x" * 600)
    assert whole == {b"": {True, False}, b"failed": {True, False}, b"retried": {True, False}, b"rewritten": {True}}


def test_the_exact_states_of_small_changes(lab: Lab) -> None:
    code = """
        import os, sys
        root = sys.argv[1]
        fd = os.open(root + "/a", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"-" * 1536, 0)
        os.fsync(fd)
        os.fsync(os.open(root, os.O_RDONLY))
        os.pwrite(fd, b"+" * 1536, 0)     # op 5: three sectors
        os.fdatasync(fd)
        os.ftruncate(fd, 100)             # op 7
        os.fdatasync(fd)
        os.pwrite(fd, b"!" * 2, 100)      # op 9: growth
        os.pwrite(fd, b"?" * 2, 102)      # op 10: the same sector again
        os.fsync(fd)
        os.mkdir(root + "/d")             # op 12
        os.rename(root + "/a", root + "/d/b")
        os.fsync(os.open(root, os.O_RDONLY))
    """
    assert lab.run(code) == (0, "")
    by_op: dict[int, list[dict[str, bytes | None]]] = {}
    for state in lab.states():
        by_op.setdefault(state.op_index, []).append(state.files())
    assert sorted(files["a"] or b"" for files in by_op[5]) == sorted(
        b"".join(bytes([c]) * 512 for c in (a, b, c)) for a in b"-+" for b in b"-+" for c in b"-+" if {a, b, c} != {45}
    )
    plus, tail = b"+" * 100, b"!!??"
    assert [files["a"] for files in by_op[7]] == [plus]
    assert {files["a"] for files in by_op[9]} == {plus + end for end in (b"!", b"\0", b"!!", b"\0\0")}
    shown = {tail[:n] + bytes(size - n) for n in (0, 2, 4) for size in (2, 4) if n <= size}
    assert {files["a"] for files in by_op[10]} == {plus + end for end in shown} - {files["a"] for files in by_op[9]}
    assert by_op[12] == [{"a": plus + tail, "d": None}]
    # A rename into a directory that is not durable itself may lead nowhere.
    assert by_op[13] == [{}, {"d": None, "d/b": plus + tail}]
    assert by_op[14] == [{"d": None, "d/b": plus + tail}]


def test_the_model_ends_where_the_real_directory_does(lab: Lab) -> None:
    """Threads, every kind of change, and a second trace on top of what the first left."""
    code = """
        import os, sys, threading
        root, turn = sys.argv[1:]
        def work(me):
            fd = os.open(f"{root}/{me}", os.O_RDWR | os.O_CREAT)
            for n in range(20):
                os.pwrite(fd, bytes([n + me]) * 700, n * 400)
                os.fdatasync(fd)
            os.pwritev(fd, [b"vec", b"tor"], 5)
            os.posix_fallocate(fd, 0, 20000)
            os.ftruncate(fd, 9000 - me)
            os.lseek(fd, 0, os.SEEK_END)
            os.writev(fd, [b"vec", b"tor"])
            os.rename(f"{root}/{me}", f"{root}/renamed{me}")
            os.pwrite(fd, b"late", 50)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os.mkdir(root + turn), os.mkdir(root + "/gone"), os.rmdir(root + "/gone")
        os.link(root + "/renamed1", root + turn + "/linked")
        os.unlink(root + "/renamed2")
        os.truncate(root + "/renamed3", 77)
        with open(root + "/renamed3", "ab") as file:
            file.write(b"appended")
        with open(root + turn + "/linked", "r+b") as file:
            file.write(b"both names")
    """
    before = lab.root.with_name("before")
    for turn in ("/one", "/two"):
        shutil.copytree(lab.root, before, dirs_exist_ok=True)
        lab.trace.unlink(missing_ok=True)
        assert lab.run(code, turn) == (0, "")
        disk = Disk(lab.root, before)
        for record in read_trace(lab.trace):
            disk.apply(record)
        end = crashstates.Point(disk, "the end")
        picks = {file: choices.newest for file, choices in end.choices.items()}
        newest = crashstates.State(end, end.pending, picks)
        shown = {str(path.relative_to(lab.root)): path for path in lab.root.rglob("*")}
        wanted = {name: None if path.is_dir() else path.read_bytes() for name, path in shown.items()}
        assert newest.files() == wanted


def test_sqlite_keeps_what_it_committed(lab: Lab) -> None:
    """Its write-ahead log in synchronous=FULL mode holds its promise in every state, so the states are fair."""
    code = """
        import os, sqlite3, sys
        root = sys.argv[1]
        note = os.open(root + "/.mark", os.O_WRONLY | os.O_CREAT)
        db = sqlite3.connect(root + "/db", isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE t (n INTEGER, filler TEXT)")
        for n in range(6):
            db.execute("INSERT INTO t VALUES (?, ?)", (n, "x" * 3000))
            os.write(note, b"%d" % (n + 1))
            if n == 3:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    """
    assert lab.run(code) == (0, "")
    for state in lab.states(12):
        committed = int(state.marks[-1]) if state.marks else 0
        db = sqlite3.connect(state.materialise() / "db")
        try:
            rows = [n for (n,) in db.execute("SELECT n FROM t ORDER BY n")]
        except sqlite3.OperationalError:  # no table yet
            rows = []
        finally:
            db.close()
        assert len(rows) >= committed, state.describe()
        assert rows == list(range(len(rows)))


def test_a_client_can_mark_the_trace(lab: Lab) -> None:
    lab.run("import os, sys; os.open(sys.argv[1] + '/a', os.O_CREAT)")
    shim.mark(lab.trace, b"seen by the client")
    assert [len(state.marks) for state in lab.states()] == [0, 0, 1, 1]
    assert "not on the disk: create a" in list(lab.states())[2].describe()
