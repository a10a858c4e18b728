"""A directory to run small programs in under faults, and the toy program of the self-tests."""

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import crashstates, shim

SIZES = (100, 700, 40, 1500, 300, 900, 20, 2000)

# Appends records to two segments; a mark says how many are acknowledged. Then it replaces a small file.
TOY = """
    import os, struct, sys, zlib
    root, sizes = sys.argv[1], [int(size) for size in sys.argv[2].split(",")]
    note = os.open(root + "/.mark", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def sync_directory():
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)

    def write_all(fd, data):
        while data:
            data = data[os.write(fd, data):]

    for n, size in enumerate(sizes):
        if n % 4 == 0:
            log = os.open(f"{root}/{n // 4}.log", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
            sync_directory()
        data = bytes([n]) * size
        write_all(log, struct.pack("<II", size, zlib.crc32(data)) + data)
        os.fdatasync(log)
        os.write(note, b"%d" % (n + 1))
    for text in (b"a" * 1300, b"b" * 1400):
        state = os.open(root + "/state.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        write_all(state, text)
        os.fsync(state)
        os.close(state)
        os.rename(root + "/state.tmp", root + "/state")
        sync_directory()
        os.write(note, text[:1])
"""


class Lab:
    """A directory, a trace and a count for one run under the shim."""

    def __init__(self, path: Path) -> None:
        self.root, self.trace, self.count, self.switch = (path / n for n in ("root", "trace", "count", "switch"))
        self.scratch = path / "scratch"
        self.root.mkdir()

    def run(self, code: str, *arguments: str, rules: list[str] | None = None, switch: bool = False) -> tuple[int, str]:
        """Exit code and output of a Python program."""
        environment = shim.environment(rules or [], self.root, self.switch if switch else None, self.count, self.trace)
        command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code), str(self.root), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout + result.stderr

    def toy(self, *rules: str) -> int:
        return self.run(TOY, ",".join(map(str, SIZES)), rules=list(rules))[0]

    def again(self) -> None:
        for path in (self.trace, self.count, self.switch):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.root)
        self.root.mkdir()

    def states(self, limit: int = 200) -> Iterator[crashstates.State]:
        return crashstates.states(self.trace, self.root, lambda: self.scratch, seed=7, limit=limit)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)
