"""On what the frozen program runs: the C library that the README states, an older Debian, disks that are no help."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .builds import ROOT
from .machine import root_of

VERSION = re.compile(r"GLIBC_(\d+)\.(\d+)")
MOST_BYTES = 15_000_000


def needed(folder: Path) -> tuple[int, int]:
    """The newest version of glibc that any of the libraries asks for."""
    found = {(0, 0)}
    for path in [folder / "edgebroker", *folder.rglob("*.so*")]:
        said = subprocess.run(["objdump", "-T", str(path)], capture_output=True, text=True, check=False).stdout
        found |= {(int(major), int(minor)) for major, minor in VERSION.findall(said)}
    return max(found)


def in_root(release: str, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program in an older Debian."""
    root = root_of(release)
    shutil.copy2(program, root / "root" / "edgebroker")
    return subprocess.run(
        ["chroot", str(root), "/root/edgebroker", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        check=False,
    )


def test_the_stated_floor_is_the_real_one(folder: Path) -> None:
    stated = re.search(r"glibc\s+(\d+)\.(\d+) or later", (ROOT / "README.md").read_text())
    packaged = re.search(r"^GLIBC=(\d+)\.(\d+)$", (ROOT / "packaging/deb.sh").read_text(), re.M)
    assert stated is not None and packaged is not None
    found = needed(folder)
    assert found == tuple(map(int, stated.groups())) == tuple(map(int, packaged.groups()))


def test_below_the_floor_it_says_so_and_does_nothing(program: Path, folder: Path) -> None:
    """Debian 11 has glibc 2.31."""
    done = in_root("bullseye", program, "version")
    if needed(folder) <= (2, 31):
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "GLIBC_" in done.stderr
        assert "not found" in done.stderr


def test_on_the_floor_it_runs(program: Path) -> None:
    done = in_root("bookworm", program, "version")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_one_file_is_small(program: Path) -> None:
    assert program.stat().st_size <= MOST_BYTES


def test_the_one_file_needs_a_place_to_unpack_and_the_folder_does_not(
    program: Path, folder: Path, tmp_path: Path
) -> None:
    """A TMPDIR on a file system without exec, as hardened images have it."""
    noexec = tmp_path / "noexec"
    noexec.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec,size=64m", "tmpfs", str(noexec)], check=True)
    environment = {**os.environ, "TMPDIR": str(noexec)}
    try:
        one = subprocess.run([program, "version"], env=environment, capture_output=True, text=True, check=False)
        whole = subprocess.run([folder / "edgebroker", "version"], env=environment, capture_output=True, check=False)
    finally:
        subprocess.run(["umount", str(noexec)], check=True)
    assert one.returncode != 0
    assert "failed to map segment" in one.stderr
    assert whole.returncode == 0


@pytest.mark.parametrize("form", ["program", "folder"])
def test_every_command_explains_itself(form: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(form)
    program = path if path.is_file() else path / "edgebroker"
    said = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    verbs = re.findall(r"^  ([a-z][a-z-]+) ", said, re.M)
    assert len(verbs) > 25
    for verb in verbs:
        done = subprocess.run([program, verb, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (verb, done.stderr)
