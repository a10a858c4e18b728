"""A program of another user reads the local database in every state in which an application may leave it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.applications import HEAD, VIEW, price, publish, read, start
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import wait_for

pytestmark = [pytest.mark.skipif(os.getuid() != 0, reason="another user is needed"), pytest.mark.slow]
OTHER = 65534
READER = """
import os, sqlite3, sys
os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
    print(connection.execute("SELECT group_concat(cents) FROM prices").fetchone()[0])
    connection.execute("DELETE FROM _positions")
except sqlite3.Error as error:
    print(error)
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that others may pass through."""
    made = Path(tempfile.mkdtemp(prefix="edgebroker-readers-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def other_user_reads(path: Path) -> list[str]:
    for one in (path.parent, *path.parent.glob("app.db*")):
        os.chown(one, -1, OTHER)
    found = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


def test_readers_of_another_user(tmp_path: Path, directory: Path) -> None:
    with running(tmp_path / "data") as broker:
        broker.create("prices")
        source, data = directory / "till.py", directory / "app"
        source.write_text(HEAD + VIEW)
        path, refused = data / "app.db", "attempt to write a readonly database"
        shm, wal = data / "app.db-shm", data / "app.db-wal"
        process = begin(broker, source, data, [1])
        assert other_user_reads(path) == ["1", refused], "while it runs"
        end(process, signal.SIGTERM)
        assert other_user_reads(path) == ["1", refused], "after a stop"
        process = begin(broker, source, data, [2, 3])
        end(process, signal.SIGKILL)
        assert wal.stat().st_size > 0
        for what in (b"", os.urandom(32768), shm.read_bytes()):
            shm.write_bytes(what)
            assert other_user_reads(path)[0] == "1,2,3", "after a kill, whatever is in -shm"
        for missing in (shm, wal):
            kept = missing.with_name("kept")
            missing.rename(kept)
            assert other_user_reads(path)[0] in ("unable to open database file", refused), missing
            kept.rename(missing)
        shm.unlink()
        process = begin(broker, source, data, [4])
        assert other_user_reads(path) == ["1,2,3,4", refused], "the next start makes it again"
        end(process, signal.SIGKILL)


def begin(broker: RunningBroker, source: Path, data: Path, cents: list[int]) -> subprocess.Popen[str]:
    """The application, which has these as well."""
    publish(broker, *[price(f"c{one}", one) for one in cents])
    process = start(source, broker.server, DATA_DIR=str(data))
    wanted = [(cents[-1],)]
    wait_for(lambda: read(data / "app.db", "SELECT max(cents) FROM prices") == wanted, "it has them", 20.0)
    return process


def end(process: subprocess.Popen[str], how: int) -> None:
    process.send_signal(how)
    process.communicate(timeout=20.0)
