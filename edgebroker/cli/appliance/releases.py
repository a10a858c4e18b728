"""The releases of the program on a machine where it was installed without a package.

    /opt/edgebroker/releases/VERSION-DIGEST/edgebroker    one file, or the folder form
    /opt/edgebroker/current -> releases/VERSION-DIGEST    replaced by rename
    /opt/edgebroker/previous -> releases/...              the target of `upgrade --undo`
    /opt/edgebroker/pending                               the unfinished switch, while a new release is on trial

A package keeps the program in /usr/lib/edgebroker; the package manager upgrades it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edgebroker.cli import environment
from edgebroker.cli.appliance.host import Machine, point
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.runtime.durable import sync_directory, sync_file, write_durable

HOME = "opt/edgebroker"
CURRENT, PREVIOUS, PENDING = f"{HOME}/current", f"{HOME}/previous", f"{HOME}/pending"
RELEASES, STAGED = f"{HOME}/releases", f"{HOME}/releases/.new"
PROGRAM = "edgebroker"
PACKAGED = "usr/lib/edgebroker"
CHECK_SECONDS = 120


class ReleaseSwitch(NamedTuple):
    """An unfinished change of the release: from which to which, and the `previous` one before that.

    Each unit of `well`, which ran before the switch, must be ready again within `timeout` seconds.
    """

    before: str
    after: str
    previous: str
    well: list[str]
    timeout: float


def own_program() -> Path:
    """The file of this program. Raises ConfigError when it runs from source."""
    if not getattr(sys, "frozen", False):
        raise ConfigError("this program runs from source; build a binary with make freeze, and install with that")
    return Path(sys.executable).resolve()


def packaged() -> bool:
    """True when this program is part of the Debian package."""
    return getattr(sys, "frozen", False) and str(own_program()).startswith(f"/{PACKAGED}/")


def is_folder(program: Path) -> bool:
    return (program.parent / "_internal").is_dir()


def digest_of(program: Path) -> str:
    """SHA-256 of the one file; of the folder form, over the names and contents of all its files."""
    if not is_folder(program):
        with program.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for path in sorted(path for path in program.parent.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(program.parent)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def name_of(program: Path, version: str) -> str:
    """The name of the release of a program: VERSION-DIGEST."""
    return f"{version}-{digest_of(program)[:12]}"


def ask_version(program: Path) -> dict[str, Any]:
    """The answer of `version --json`. Raises EdgeBrokerError when the program does not run or is not edgebroker."""
    try:
        done = subprocess.run(
            [program, "version", "--json"],
            capture_output=True,
            text=True,
            timeout=CHECK_SECONDS,
            env=environment.for_other_programs(),
        )
        found = json.loads(done.stdout)
        if done.returncode == 0 and isinstance(found, dict) and {"version", "data_format"} <= found.keys():
            return found
        output = done.stderr or done.stdout
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        output = str(error)
    raise EdgeBrokerError(f"{program} is not an edgebroker program that runs on this machine: {output.strip()[-500:]}")


@contextmanager
def staged(machine: Machine, program: Path) -> Iterator[Path]:
    """A durable copy of a program that only root can change. It is removed afterwards, unless keep() was called."""
    directory = Path(tempfile.mkdtemp(prefix="edgebroker-")) if machine.dry else machine.path(STAGED)
    try:
        shutil.rmtree(directory, ignore_errors=True)
        _copy(program, directory)
        yield directory / PROGRAM
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _copy(program: Path, directory: Path) -> None:
    directory.mkdir(parents=True)
    if is_folder(program):
        shutil.copytree(program.parent, directory, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy2(program, directory / PROGRAM)
    (directory / PROGRAM).chmod(0o755)
    for folder, _, names in os.walk(directory):
        Path(folder).chmod(0o755)
        for path in (Path(folder) / name for name in names):
            if not path.is_symlink():
                sync_file(path)
        sync_directory(Path(folder))


def keep(machine: Machine, program: Path, version: str) -> str:
    """Turn a staged program into a release; its name."""
    release = name_of(program, version)
    target = machine.path(f"{RELEASES}/{release}")
    machine.say(f"copy the program to {target}")
    if machine.dry:
        return release
    if target.exists() and digest_of(target / PROGRAM) == digest_of(program):
        return release
    if target.exists():  # incomplete: a power cut ended an earlier installation
        _remove(target)
    program.parent.rename(target)
    sync_directory(target.parent)
    return release


def current(machine: Machine) -> str:
    """The release that the next start runs; "" when there is none."""
    return _named(machine, CURRENT)


def previous(machine: Machine) -> str:
    """The release before the current one; "" when there is none."""
    found = _named(machine, PREVIOUS)
    return found if found != current(machine) else ""


def pending(machine: Machine) -> ReleaseSwitch | None:
    """The unfinished switch, if there is one."""
    try:
        return ReleaseSwitch(**json.loads(machine.path(PENDING).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _named(machine: Machine, link: str) -> str:
    """The release that a link points to; "" when there is none."""
    path = machine.path(link)
    return Path(os.readlink(path)).name if path.is_symlink() and (path / PROGRAM).exists() else ""


def begin(machine: Machine, release: str, well: list[str], timeout: float) -> ReleaseSwitch:
    """Switch the next start to a release. Until end() the switch can be undone, even after a power cut."""
    found = ReleaseSwitch(current(machine), release, previous(machine), well, timeout)
    machine.say(f"switch to release {release}")
    if not machine.dry:
        write_durable(machine.path(PENDING), json.dumps(found._asdict()).encode())
        point(machine.path(PREVIOUS), f"releases/{found.before}")
        point(machine.path(CURRENT), f"releases/{release}")
    return found


def back(machine: Machine, switch: ReleaseSwitch) -> None:
    """Switch the next start to the release before."""
    point(machine.path(CURRENT), f"releases/{switch.before}")


def end(machine: Machine, switch: ReleaseSwitch) -> None:
    """The nodes run the release of `current`: complete the switch. The release before it is kept."""
    machine.path(PENDING).unlink(missing_ok=True)
    sync_directory(machine.path(HOME))
    if current(machine) == switch.before:
        if switch.previous:
            point(machine.path(PREVIOUS), f"releases/{switch.previous}")
        else:
            machine.path(PREVIOUS).unlink(missing_ok=True)
    _prune(machine)


def _prune(machine: Machine) -> None:
    wanted = (current(machine), _named(machine, PREVIOUS))
    for path in machine.path(RELEASES).iterdir():
        if path.name not in wanted:
            _remove(path)


def _remove(release: Path) -> None:
    """Remove a release; renamed first, so that a part of it is never taken for a release."""
    gone = release.with_name(f".gone-{release.name.lstrip('.')}")
    shutil.rmtree(gone, ignore_errors=True)
    release.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
