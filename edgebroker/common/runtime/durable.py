"""Replacing small files: whole or not at all, whenever the process or the power dies."""

import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make the content of a file durable that was written by other means."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durable(path: Path, data: bytes, *, mode: int | None = None, group: int = -1) -> None:
    """Replace a small file: when this returns the new content survives a power cut; before, the old one does. It has
    this mode (None: 0640 as the umask allows) and group (-1: that of the process) from its first moment on."""
    _replace(path, data, durable=True, mode=mode, group=group)
    sync_directory(path.parent)


def write_hint(path: Path, data: bytes) -> None:
    """Replace a small file that can be rebuilt: whole or absent after a crash of the process, no promise beyond."""
    _replace(path, data, durable=False)


def destroy(path: Path) -> None:
    """Overwrite a small file, and remove it. What a device keeps of old blocks is beyond a program."""
    try:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
    except FileNotFoundError:
        pass


def _replace(path: Path, data: bytes, *, durable: bool, mode: int | None = None, group: int = -1) -> None:
    """Write a temporary file, and put it in the place of the old one once it is whole (and synced)."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        if group >= 0:  # the units of services allow no other call of it
            os.fchown(fd, -1, group)
        if mode is not None:
            os.fchmod(fd, mode)
        _write_all(fd, data)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
