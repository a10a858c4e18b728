"""The releases of the program on a machine that was installed from the bare binary.

    /opt/edgebroker/releases/VERSION-DIGEST/edgebroker    one file, or the folder form
    /opt/edgebroker/current -> releases/VERSION-DIGEST    replaced by rename
    /opt/edgebroker/previous -> releases/...              what a roll-back goes to

A package keeps the program in /usr/lib/edgebroker instead; then its tools upgrade it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgebroker.cli.machine import Machine, point
from edgebroker.cli.process import environment_of_others
from edgebroker.common.durable import sync_directory, sync_file
from edgebroker.common.errors import ConfigError, EdgeBrokerError

HOME = "opt/edgebroker"
CURRENT, PREVIOUS = f"{HOME}/current", f"{HOME}/previous"
PROGRAM = "edgebroker"
PACKAGED = "/usr/lib/edgebroker"
CHECK_SECONDS = 120


def own_program() -> Path:
    """The file of this program. Raises ConfigError when it is run from source."""
    if not getattr(sys, "frozen", False):
        raise ConfigError("this runs from source: build the program first (make freeze), and let that install itself")
    return Path(sys.executable).resolve()


def packaged() -> bool:
    """True when this program came with the system's package."""
    return getattr(sys, "frozen", False) and str(own_program()).startswith(PACKAGED + "/")


def digest_of(program: Path) -> str:
    with program.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ask_version(program: Path) -> dict[str, Any]:
    """What a program says of itself. Raises EdgeBrokerError when it does not run here or is another one."""
    try:
        done = subprocess.run(
            [program, "version", "--json"],
            capture_output=True,
            text=True,
            timeout=CHECK_SECONDS,
            env=environment_of_others(),
        )
        found = json.loads(done.stdout)
        if done.returncode == 0 and isinstance(found, dict) and {"version", "data_format"} <= found.keys():
            return found
        said = done.stderr or done.stdout
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        said = str(error)
    raise EdgeBrokerError(f"{program} is no edgebroker that runs on this machine: {said.strip()[-500:]}")


def put(machine: Machine, program: Path, version: str) -> str:
    """Copy a program to its place among the releases, durably; the name of the release."""
    release = f"{version}-{digest_of(program)[:12]}"
    target = machine.path(f"{HOME}/releases/{release}")
    if target.is_dir():
        return release
    machine.say(f"copy {program} to {target}")
    if machine.dry:
        return release
    temporary = target.with_name(f".{release}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if (program.parent / "_internal").is_dir():
        shutil.copytree(program.parent, temporary, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy2(program, temporary / PROGRAM)
    (temporary / PROGRAM).chmod(0o755)
    for folder, _, names in os.walk(temporary):
        Path(folder).chmod(0o755)
        for path in (Path(folder) / name for name in names):
            if not path.is_symlink():
                sync_file(path)
        sync_directory(Path(folder))
    temporary.rename(target)
    sync_directory(target.parent)
    return release


def current(machine: Machine) -> str:
    """The release that runs; "" when there is none."""
    return _named(machine, CURRENT)


def previous(machine: Machine) -> str:
    return _named(machine, PREVIOUS)


def _named(machine: Machine, link: str) -> str:
    path = machine.path(link)
    return Path(os.readlink(path)).name if path.is_symlink() else ""


def switch(machine: Machine, release: str) -> None:
    """Make a release the one that the next start uses; the one before stays for a roll-back, older ones go."""
    before = current(machine)
    if before == release:
        return
    machine.say(f"switch to release {release}")
    if machine.dry:
        return
    if before:
        point(machine.path(PREVIOUS), f"releases/{before}")
    point(machine.path(CURRENT), f"releases/{release}")
    for path in machine.path(f"{HOME}/releases").iterdir():
        if path.name not in (release, before):
            shutil.rmtree(path)
