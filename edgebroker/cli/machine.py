"""The machine that a node is installed on: its paths, its systemd, and what an earlier installation wrote.

Everything lies below `root`; only the running system ("/") has users and a systemd, an image that is being built has
neither yet. Files that somebody has changed since they were written here are never overwritten: the new version is
laid beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgebroker.cli.process import environment_of_others
from edgebroker.common.durable import sync_directory, write_durable
from edgebroker.common.errors import EdgeBrokerError

RECORD = "etc/edgebroker/.installed.json"
USER = "edgebroker"
COMMAND_SECONDS = 400


class Machine:
    """`dry` only says what would be done. Every step is told to `say` as one line."""

    def __init__(self, root: Path, dry: bool, quiet: bool = False) -> None:
        self.root, self.dry, self._quiet = root, dry, quiet
        self.real = root == Path("/")
        self._record = self._read_record()

    def path(self, name: str) -> Path:
        """Where a path like etc/edgebroker lies."""
        return self.root / name

    def say(self, what: str) -> None:
        if not self._quiet:
            print(("would " if self.dry else "") + what)

    # ---- files ----

    def write(self, name: str, text: str, mode: int = 0o644, *, pristine: str = "") -> bool:
        """Put a file where it belongs; True when that changed something. A file that says just what `pristine` does
        was changed by nobody either."""
        path, new = self.path(name), text.encode()
        old = path.read_bytes() if path.is_file() else None
        if old == new:
            self._remember(name, new)
            return False
        if old is not None and old != pristine.encode() and self._record.get(name) != _digest(old):
            self.say(f"keep {path}: it was changed here; the new version goes to {path.name}.new")
            self._put(path.with_name(path.name + ".new"), new, mode)
            return False
        self.say(f"{'update' if old is not None else 'write'} {path}")
        self._put(path, new, mode)
        self._remember(name, new)
        return True

    def _put(self, path: Path, data: bytes, mode: int) -> None:
        if self.dry:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durable(path, data)
        path.chmod(mode)
        if self.real and mode & 0o004 == 0:
            shutil.chown(path, "root", USER)

    def remove(self, name: str) -> None:
        """Remove a file that was written here and not changed since."""
        path = self.path(name)
        if path.is_file() and self._record.get(name) != _digest(path.read_bytes()):
            self.say(f"keep {path}: it was changed here")
            return
        if path.is_file():
            self.say(f"remove {path}")
            if not self.dry:
                path.unlink()
        self._record.pop(name, None)
        self._store_record()

    def discard(self, name: str) -> None:
        """Remove a file or a whole directory, whoever has changed it."""
        path = self.path(name)
        if path.is_dir():
            self.say(f"remove {path} and everything in it")
            if not self.dry:
                shutil.rmtree(path)
        elif path.exists():
            self.say(f"remove {path}")
            if not self.dry:
                path.unlink()

    # ---- what was written here ----

    def _read_record(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(self.path(RECORD).read_text())
        except (OSError, ValueError):
            return {}
        return found

    def _remember(self, name: str, data: bytes) -> None:
        if self._record.get(name) != _digest(data):
            self._record[name] = _digest(data)
            self._store_record()

    def _store_record(self) -> None:
        if not self.dry and self.path(RECORD).parent.is_dir():
            write_durable(self.path(RECORD), json.dumps(self._record, indent=1, sort_keys=True).encode())

    # ---- the running system ----

    def run(self, *command: str) -> None:
        """Run a command of the system; nothing for an image. Raises EdgeBrokerError with what it said."""
        if not self.real:
            return
        self.say("run " + " ".join(command))
        if self.dry:
            return
        done = _run(command)
        if done.returncode:
            raise EdgeBrokerError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")

    def ask(self, *command: str) -> str:
        """What a command of the system says, "" when it fails or for an image."""
        if not self.real:
            return ""
        try:
            done = _run(command)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    def check(self) -> None:
        """Raises EdgeBrokerError when this is no machine to install on."""
        if self.real and not self.dry:
            if os.geteuid() != 0:
                raise EdgeBrokerError("only root can do this: sudo edgebroker ... (--dry-run shows what would be done)")
            if shutil.which("systemctl") is None:
                raise EdgeBrokerError("there is no systemd here; run edgebroker serve --config FILE by other means")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, env=environment_of_others())


def point(path: Path, target: str) -> None:
    """Replace a symbolic link: at every moment it points at the old or the new target; durable when this returns."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    sync_directory(path.parent)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
