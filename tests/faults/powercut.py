"""Power cuts on a real ext4: a loop-mounted image, copied at the moment of the cut, replayed by the kernel's journal.

What had not left the page cache of the image's file system is not in the copy, exactly as after a power cut; the
process is stopped first, so that the copy is of one moment.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Protocol

IMAGE_BYTES = 192 << 20


class Program(Protocol):
    """What runs on the disk: a broker, or an application."""

    @property
    def process(self) -> subprocess.Popen[bytes] | None: ...
    def kill(self) -> None: ...


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


class Disk:
    """An ext4 image mounted at `mount`; a context manager."""

    def __init__(self, directory: Path, *, size: int = IMAGE_BYTES, options: str = "loop") -> None:
        self.image, self.mount, self._copy = directory / "disk.img", directory / "mnt", directory / "copy.img"
        self._options = options
        self._mounted = False
        self.mount.mkdir(parents=True)
        with self.image.open("wb") as file:
            file.truncate(size)
        _run("mkfs.ext4", "-qF", "-m", "0", self.image)
        self.attach()

    def attach(self) -> None:
        _run("mount", "-o", self._options, self.image, self.mount)
        self._mounted = True

    def detach(self) -> None:
        if self._mounted:
            _run("umount", self.mount)
            self._mounted = False

    def abort(self) -> None:
        """The file system turns read-only under its users, as ext4 does after an error of its disk."""
        _run("mount", "-o", "remount,abort", self.mount)

    def cut(self, program: Program) -> None:
        """The power goes: the program is gone, the mount shows what a journal replay makes of the disk."""
        assert program.process is not None
        program.process.send_signal(signal.SIGSTOP)
        _run("cp", "--sparse=always", self.image, self._copy)
        program.kill()
        self.detach()
        self._copy.replace(self.image)
        self.attach()

    def __enter__(self) -> "Disk":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        self.image.unlink(missing_ok=True)
        self._copy.unlink(missing_ok=True)


def unavailable() -> str:
    """Why this machine can make no such disk; "" when it can."""
    if os.geteuid() != 0:
        return "mounting a loop image needs root"
    if shutil.which("mkfs.ext4") is None:
        return "mkfs.ext4 is missing (e2fsprogs)"
    with tempfile.TemporaryDirectory() as directory:
        try:
            with Disk(Path(directory), size=8 << 20):
                return ""
        except (OSError, subprocess.CalledProcessError) as error:
            return f"a loop image cannot be mounted here: {error}"
