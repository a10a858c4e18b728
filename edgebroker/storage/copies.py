"""What a copy of a data directory consists of: logs by the names that nodes give, and regular files.

A copy is read, often by root, from a medium that others may have written, and its list of files may come from anything
that answers at an address. So no name leads out of its directory, no link is followed, and only files are opened.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from edgebroker.common.errors import DamagedDataError
from edgebroker.common.names import is_name

IDENTITY = "identity"
_PARTITION = re.compile(r"(0|[1-9][0-9]{0,5})\Z")
_SEGMENT = re.compile(r"[0-9]{20}\.log\Z")


def log_directory(root: Path, name: str) -> Path:
    """Where the log TOPIC/PARTITION lies in a data directory or a copy. Raises DamagedDataError for any other name."""
    topic, _, partition = name.partition("/")
    if not is_name(topic) or not _PARTITION.match(partition):
        raise DamagedDataError(f"{root}: {name!r} is not the name of a log; a backup has no such thing")
    return root / "topics" / topic / partition


def segment_file(directory: Path, name: str) -> Path:
    """The path of a segment file. Raises DamagedDataError for any other name."""
    if not _SEGMENT.match(name):
        raise DamagedDataError(f"{directory}: {name!r} is not the name of a segment file")
    return directory / name


def files_of(root: Path, directory: Path) -> list[Path]:
    """The files of a log in a copy. Raises DamagedDataError when something else is there, or a link leads to it."""
    no_links(root, directory)
    found = sorted(directory.iterdir())
    for path in found:
        if path.name != IDENTITY:
            segment_file(directory, path.name)
        no_links(root, path)
    return found


def no_links(root: Path, path: Path) -> None:
    """Raises DamagedDataError when a link stands between `root` and the path, or the path is neither a directory nor a
    regular file; FileNotFoundError when there is nothing."""
    part = root
    for name in path.relative_to(root).parts:
        part /= name
        mode = part.lstat().st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
            raise DamagedDataError(f"{part} is {kind}; a backup consists of regular files only")


def open_file(path: Path) -> int:
    """Open a regular file for reading. Raises DamagedDataError when it has become something else."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DamagedDataError(f"{path} is not a regular file; a backup consists of regular files only")
    return fd
