"""The frozen program, and others made of the same sources: a newer release, and one that does not come up."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PLACE = ROOT / "build" / "appliance"
PROGRAM = ROOT / "dist" / "edgebroker"
FOLDER = ROOT / "dist" / "folder"
NEWER, BROKEN = "99.1.0", "99.2.0"


def variant(version: str, *, entry: str = "") -> Path:
    """Freeze the sources with another version and more lines at the start of the program; the one file."""
    files = _sources()
    digest = hashlib.sha256(f"{version} {entry}".encode())
    for name in files:
        digest.update((ROOT / name).read_bytes())
    place = PLACE / digest.hexdigest()[:16]
    program = place / "dist" / "edgebroker"
    if program.exists():
        return program
    shutil.rmtree(place, ignore_errors=True)
    for name in files:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name)
    _replace(place / "edgebroker/version.py", '__version__ = "', f'__version__ = "{version}"')
    start = place / "packaging/entry.py"
    start.write_text(start.read_text().replace("import sys\n", f"import sys\n{entry}\n", 1))
    environment = {**os.environ, "ENVIRONMENT": str(ROOT / "build" / "freeze")}
    done = subprocess.run(["packaging/freeze.sh"], cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"freezing {version}: {done.stderr[-4000:]}")
    return program


def newer() -> Path:
    return variant(NEWER)


def broken() -> Path:
    """It passes every check of its own, and ends when systemd starts it."""
    return variant(BROKEN, entry='import os\nif "NOTIFY_SOCKET" in os.environ:\n    sys.exit("this build is broken")')


def digest_of(program: Path) -> str:
    return hashlib.sha256(program.read_bytes()).hexdigest()


def _sources() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    wanted = ("edgebroker/", "cext/", "packaging/", "systemd/", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    names = listed.stdout.decode().splitlines()
    return sorted(name for name in names if name.startswith(wanted) and (ROOT / name).is_file())


def _replace(path: Path, start: str, line: str) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line if one.startswith(start) else one for one in lines) + "\n")
