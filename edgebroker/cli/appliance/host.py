"""The machine that a node is installed on: its paths, its systemd, and what an earlier installation wrote.

Everything lies below `root`; only the running system ("/") has users and a systemd, an image that is being built has
neither yet. Files that somebody has changed since they were written here are never overwritten: the new version is
laid beside them.
"""

from __future__ import annotations

import difflib
import grp
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgebroker.cli import environment
from edgebroker.common.durable import sync_directory, write_durable
from edgebroker.common.errors import EdgeBrokerError

RECORD = "etc/edgebroker/.installed.json"
USER = "edgebroker"
ASK_SECONDS = 60


class Machine:
    """`dry` only says what would be done. Every step is told to `say` as one line; `changed` when a file was one."""

    def __init__(self, root: Path, dry: bool, quiet: bool = False) -> None:
        self.root, self.dry, self._quiet = root, dry, quiet
        self.real = root == Path("/")
        self.changed = False
        self.kept: list[str] = []  # files that somebody changed here and that should be others now
        self._record = self._read_record()

    def path(self, name: str) -> Path:
        """Where a path like etc/edgebroker lies."""
        return self.root / name

    def say(self, what: str) -> None:
        if not self._quiet:
            tell(("would " if self.dry else "") + what)

    # ---- files ----

    def write(self, name: str, text: str, mode: int = 0o644, *, over: bool = False) -> None:
        """Put a file where it belongs, whole or not at all. `over`: also over one that was not written here. A file
        that others may not read belongs to the group of the node."""
        path, new = self.path(name), text.encode()
        old = path.read_bytes() if path.is_file() else None
        if old == new:
            self._fit(path, mode)
            self._remember(name, new)
        elif old is not None and not over and self._record.get(name) != _digest(old):
            self.kept.append(name)
            beside = path.with_name(path.name + ".new")
            if not (beside.is_file() and beside.read_bytes() == new):
                self.say(f"keep {path}: it was changed here; the new version goes to {beside.name}")
                self._put(beside, new, mode)
        else:
            self.say(f"{'update' if old is not None else 'write'} {path}")
            if self.dry and old is not None:
                self._show(old.decode(errors="replace"), text)
            self._put(path, new, mode)
            self._remember(name, new)
            self.changed = True

    def _show(self, old: str, new: str) -> None:
        """What a dry run would change in a file."""
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""):
            if line[:1] in "+-" and line[:3] not in ("+++", "---"):
                tell(f"    {line}")

    def _put(self, path: Path, data: bytes, mode: int) -> None:
        if not self.dry:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durable(path, data, mode=mode, group=self._group(mode))

    def _fit(self, path: Path, mode: int) -> None:
        """Rights that somebody has taken away, or that an installation did not come to."""
        found, group = path.stat(), self._group(mode)
        if found.st_mode & 0o7777 == mode and group in (-1, found.st_gid):
            return
        self.say(f"correct the rights of {path}")
        if not self.dry:
            os.chown(path, -1, group)
            path.chmod(mode)

    def _group(self, mode: int) -> int:
        """-1: as it is. In an image there is no such group yet; systemd-tmpfiles sees to it at the first boot."""
        if not self.real or mode & 0o004:
            return -1
        try:
            return grp.getgrnam(USER).gr_gid
        except KeyError:
            return -1

    def link(self, name: str, target: str) -> None:
        """Point a symbolic link at `target`, in one step."""
        path = self.path(name)
        if path.is_symlink() and os.readlink(path) == target:
            return
        self.say(f"link {path} to {target}")
        self.changed = True
        if not self.dry:
            path.parent.mkdir(parents=True, exist_ok=True)
            point(path, target)

    def remove(self, name: str) -> None:
        """Remove a link, or a file that was written here and not changed since."""
        path = self.path(name)
        self.discard(f"{name}.new")
        if not path.is_symlink() and path.is_file() and self._record.get(name) != _digest(path.read_bytes()):
            self.say(f"keep {path}: it was changed here")
            self._forget(name)
            return
        self.discard(name)

    def discard(self, name: str) -> None:
        """Remove a file, a link or a whole directory, whoever has changed it; of a mounted disk, what is on it."""
        path = self.path(name)
        self._forget(name)
        if path.is_dir() and not path.is_symlink():
            self.say(f"remove {path} and everything in it")
            if self.dry:
                return
            for one in path.iterdir() if path.is_mount() else [path]:
                shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
        elif path.exists() or path.is_symlink():
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

    def wrote(self, name: str) -> bool:
        """True for a file that was written here and not removed since, whoever has changed it meanwhile."""
        return name in self._record

    def _forget(self, name: str) -> None:
        if self._record.pop(name, None):
            self._store_record()

    def _store_record(self) -> None:
        path = self.path(RECORD)
        if self.dry:
            return
        if not self._record:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durable(path, json.dumps(self._record, indent=1, sort_keys=True).encode())

    # ---- the running system ----

    def run(self, *command: str) -> None:
        """Run a command of the system, however long it takes; nothing for an image. Raises EdgeBrokerError with what
        it said."""
        if not self.real:
            return
        self.say("run " + " ".join(command))
        if self.dry:
            return
        done = _run(command)
        if done.returncode:
            raise EdgeBrokerError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")

    def ask(self, *command: str, whatever: bool = False) -> str:
        """What a command of the system says; "" for an image, or when it is not there or fails (not so `whatever`)."""
        if not self.real:
            return ""
        try:
            done = _run(command, ASK_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 or whatever else ""

    def check(self) -> None:
        """Before anything is done. Raises EdgeBrokerError when this is no machine to install on."""
        os.umask(0o022)  # the user of the nodes reads what is made here
        if self.real and not self.dry:
            if os.geteuid() != 0:
                raise EdgeBrokerError("only root can do this: sudo edgebroker ...")
            if shutil.which("systemctl") is None:
                raise EdgeBrokerError("there is no systemd here; run edgebroker serve --config FILE by other means")


def tell(text: str) -> None:
    """Print a line. Nobody may be there any more to read it (a line that dropped): that stops nothing."""
    try:
        print(text, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2):
            os.dup2(nowhere, fd)


@contextmanager
def plainly() -> Iterator[None]:
    """What the system refuses becomes a sentence: EdgeBrokerError."""
    try:
        yield
    except OSError as error:
        raise EdgeBrokerError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise EdgeBrokerError(f"{error.cmd} did not end within {error.timeout:g} s") from error


def _run(command: Sequence[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """In a session of its own: Ctrl-C is for us to hear."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment.for_other_programs(),
        start_new_session=True,
    )


def point(path: Path, target: str) -> None:
    """Replace a symbolic link: at every moment it points at the old or the new target; durable when this returns."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    sync_directory(path.parent)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
