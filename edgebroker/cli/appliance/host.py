"""The machine that a node is installed on: its paths, its systemd, and the files that an earlier installation wrote.

All paths are below `root`. Only the running system ("/") has users and a systemd; an image that is being built does
not have them yet. A file that was edited since it was written here is never overwritten: the new version is written
beside it.
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
from edgebroker.cli.command import system_error
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.runtime.durable import sync_directory, write_durable

RECORD = "etc/edgebroker/.installed.json"
USER = "edgebroker"
ASK_SECONDS = 60


class Machine:
    """Each step is printed as one line; with `dry` nothing else happens. `changed` is set once a file was changed."""

    def __init__(self, root: Path, dry: bool, quiet: bool = False) -> None:
        self.root, self.dry, self._quiet = root, dry, quiet
        self.real = root == Path("/")
        self.changed = False
        self.kept: list[str] = []  # files that were edited by hand and now differ from what is wanted
        self._record = self._read_record()

    def path(self, name: str) -> Path:
        """The location of a path like etc/edgebroker."""
        return self.root / name

    def say(self, what: str) -> None:
        if not self._quiet:
            tell(("would " if self.dry else "") + what)

    # ---- files ----

    def write(self, name: str, text: str, mode: int = 0o644, *, over: bool = False) -> None:
        """Write a file atomically. `over` replaces a file that was not written here, too.

        A file that others may not read gets the group of the node.
        """
        path, new = self.path(name), text.encode()
        old = path.read_bytes() if path.is_file() else None
        if old == new:
            self._fit(path, mode)
            self._remember(name, new)
        elif old is not None and not over and self._record.get(name) != _digest(old):
            self.kept.append(name)
            beside = path.with_name(path.name + ".new")
            if not (beside.is_file() and beside.read_bytes() == new):
                self.say(f"keep {path}: it was edited by hand; the new version goes to {beside.name}")
                self._put(beside, new, mode)
        else:
            self.say(f"{'update' if old is not None else 'write'} {path}")
            if self.dry and old is not None:
                self._show(old.decode(errors="replace"), text)
            self._put(path, new, mode)
            self._remember(name, new)
            self.changed = True

    def secret(self, name: str, text: str) -> None:
        """Write a file for root only, of which nothing is remembered or shown."""
        self.say(f"write {self.path(name)}")
        self._put(self.path(name), text.encode() + b"\n", 0o600)
        self.changed = True

    def _show(self, old: str, new: str) -> None:
        """Print what a dry run would change in a file."""
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""):
            if line[:1] in "+-" and line[:3] not in ("+++", "---"):
                tell(f"    {line}")

    def _put(self, path: Path, data: bytes, mode: int) -> None:
        if not self.dry:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durable(path, data, mode=mode, group=self._group(mode))

    def _fit(self, path: Path, mode: int) -> None:
        """Correct a mode or group that was changed, or that an interrupted installation did not set."""
        found, group = path.stat(), self._group(mode)
        if found.st_mode & 0o7777 == mode and group in (-1, found.st_gid):
            return
        self.say(f"correct the permissions of {path}")
        if not self.dry:
            os.chown(path, -1, group)
            path.chmod(mode)

    def _group(self, mode: int) -> int:
        """The group of the node, or -1 for no change. In an image systemd-tmpfiles sets it at the first boot."""
        if not self.real or mode & 0o004:
            return -1
        try:
            return grp.getgrnam(USER).gr_gid
        except KeyError:
            return -1

    def link(self, name: str, target: str) -> None:
        """Point a symbolic link at `target`, atomically."""
        path = self.path(name)
        if path.is_symlink() and os.readlink(path) == target:
            return
        self.say(f"link {path} to {target}")
        self.changed = True
        if not self.dry:
            path.parent.mkdir(parents=True, exist_ok=True)
            point(path, target)

    def remove(self, name: str) -> None:
        """Remove a link, or a file that was written here and not edited since."""
        path = self.path(name)
        self.discard(f"{name}.new")
        if not path.is_symlink() and path.is_file() and self._record.get(name) != _digest(path.read_bytes()):
            self.say(f"keep {path}: it was edited by hand")
            self._forget(name)
            return
        self.discard(name)

    def discard(self, name: str) -> None:
        """Remove a file, a link or a directory tree, edited or not. A mount point itself stays; it is emptied."""
        path = self.path(name)
        self._forget(name)
        if path.is_dir() and not path.is_symlink():
            self.say(f"remove {path} and everything in it")
            if self.dry:
                return
            for entry in path.iterdir() if path.is_mount() else [path]:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        elif path.exists() or path.is_symlink():
            self.say(f"remove {path}")
            if not self.dry:
                path.unlink()

    # ---- the record of files written here ----

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
        """True for a file that was written here and not removed since, edited or not."""
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
        """Run a system command without a time limit; in an image do nothing. Raises EdgeBrokerError with its output."""
        if not self.real:
            return
        self.say("run " + " ".join(command))
        if self.dry:
            return
        done = _run(command)
        if done.returncode:
            raise EdgeBrokerError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")

    def ask(self, *command: str, always: bool = False) -> str:
        """The output of a system command; "" in an image, when it is missing, or when it fails.

        `always` returns the output of a command that fails, too.
        """
        if not self.real:
            return ""
        try:
            done = _run(command, ASK_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 or always else ""

    def check(self) -> None:
        """Raise EdgeBrokerError unless we are root on a machine with systemd. To be called before any change."""
        os.umask(0o022)  # the user of the nodes must be able to read what is created here
        if self.real and not self.dry:
            if os.geteuid() != 0:
                raise EdgeBrokerError("this needs root; run it with sudo")
            if shutil.which("systemctl") is None:
                raise EdgeBrokerError(
                    "this machine has no systemd; run edgebroker serve --config FILE under another supervisor"
                )


def tell(text: str) -> None:
    """Print a line. When the terminal is gone, as after a lost connection, discard all output and continue."""
    try:
        print(text, flush=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2):
            os.dup2(null, fd)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors of the operating system into EdgeBrokerError, with a message for people."""
    try:
        yield
    except OSError as error:
        raise EdgeBrokerError(system_error(error)) from error
    except subprocess.TimeoutExpired as error:
        raise EdgeBrokerError(f"{error.cmd} did not finish within {error.timeout:g} s") from error


def _run(command: Sequence[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own, so that Ctrl-C reaches only us."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment.for_other_programs(),
        start_new_session=True,
    )


def point(path: Path, target: str) -> None:
    """Replace a symbolic link atomically; durable when this returns."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    sync_directory(path.parent)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
