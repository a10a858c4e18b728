"""Everything that touches data files outside the commit extension: open, sync, rename, remove, lock.

Each function says what it makes durable. A new or renamed file is durable only after its directory was synced:
the functions that promise durability do that themselves.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgebroker.common.errors import DataDirectoryError, DataDirectoryInUseError
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.durable import sync_directory as sync_directory
from edgebroker.common.runtime.durable import write_durable as write_durable
from edgebroker.common.runtime.durable import write_hint as write_hint

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
COPY_BYTES = 1 << 20
# What a device reads, or cannot read, as a whole.
BLOCK_BYTES = 4096
# Not the disk's fault, and over when resources are released.
TRANSIENT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})


def reason(error: object) -> str:
    """What went wrong, in words; the path where it says something."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "this node has too few file descriptors at the moment"
    if error.errno == errno.ENOMEM:
        return "this node has too little memory at the moment"
    why = (error.strerror or "the file cannot be used").lower()
    return f"{why} ({error.filename})" if error.filename else why


def refusal(what: str, error: object) -> tuple[Outcome, str]:
    """How to refuse what an error kept from being stored: because the disk is full, for a moment, or for good."""
    number, outcome = getattr(error, "errno", None), Outcome.READ_ONLY
    if number in FULL:
        outcome = Outcome.DISK_FULL
    elif number in TRANSIENT:
        outcome = Outcome.OVERLOADED
    return outcome, f"{what}: {reason(error)}"


def sync_file(fd: int) -> None:
    """Make a file's data and the size needed to read it durable. After an OSError the file must not be trusted."""
    os.fdatasync(fd)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, durably. Existing ones are fine."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for child in reversed(missing):
        child.mkdir(exist_ok=True)
        sync_directory(child.parent)


def write_at(fd: int, data: memoryview, position: int) -> None:
    """Write a whole buffer at a position; not durable before sync_file."""
    while data:
        written = os.pwrite(fd, data, position)
        data = data[written:]
        position += written


def make_private(path: Path) -> None:
    """Create an empty file with the rights of all our files, where a library would choose others."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
    except OSError:
        pass  # opening it says what is wrong


def create_log(path: Path) -> int:
    """Create an empty segment file; its directory entry is durable when this returns. Returns a descriptor.

    An empty file that an earlier attempt left is taken over; one with bytes in it raises FileExistsError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        if os.fstat(fd).st_size:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.fsync(fd)
        sync_directory(path.parent)
    except OSError:
        os.close(fd)
        raise
    return fd


def open_log(path: Path, *, writable: bool = False) -> int:
    """Open an existing segment file."""
    return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)


def close(fd: int) -> None:
    os.close(fd)


def size_of(fd: int) -> int:
    return os.fstat(fd).st_size


def modified_ms(fd: int) -> int:
    """Wall time of the last write to a file, in milliseconds."""
    return os.fstat(fd).st_mtime_ns // 1_000_000


def read_at(fd: int, length: int, position: int) -> bytes:
    """Read up to `length` bytes; fewer only at the end of the file. May wait for the disk."""
    pieces = []
    while length > 0:
        piece = os.pread(fd, length, position)
        if not piece:
            break
        pieces.append(piece)
        length -= len(piece)
        position += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def salvage_at(fd: int, length: int, position: int) -> bytes:
    """The same for a device that cannot read everything: bytes 0xFF stand for each block that it refuses, and no batch
    begins with them. Raises OSError for what will be over in a moment."""
    try:
        return read_at(fd, length, position)
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
    first, last = position // BLOCK_BYTES, (position + length - 1) // BLOCK_BYTES
    if first == last:
        return b"\xff" * length
    middle = (first + last + 1) // 2 * BLOCK_BYTES
    return salvage_at(fd, middle - position, position) + salvage_at(fd, position + length - middle, middle)


def read_cached(fd: int, length: int, position: int) -> bytes | None:
    """Read from the page cache only: None when a page would have to come from the disk. Never waits."""
    buffer = bytearray(length)
    try:
        count = os.preadv(fd, [buffer], position, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL) and _in_memory(fd):
            return os.pread(fd, length, position)
        return None  # the reader thread finds out what is wrong
    if count < length and position + count < os.fstat(fd).st_size:
        return None
    return bytes(buffer[:count]) if count < length else bytes(buffer)


def _in_memory(fd: int) -> bool:
    """True for tmpfs, which does not know RWF_NOWAIT and needs no disk: it reports no blocks of a device."""
    return os.major(os.fstat(fd).st_dev) == 0


def drop_cache(fd: int) -> None:
    """Ask the kernel to forget clean cached pages, so that the next read comes from the device."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def truncate(fd: int, size: int) -> None:
    """Truncate a file (and free what was preallocated after its end)."""
    os.ftruncate(fd, size)


def remove(path: Path) -> None:
    """Remove a file; one that is gone already is fine."""
    path.unlink(missing_ok=True)


def rename_suffix(path: Path, suffix: str) -> Path:
    """Give a file another suffix, durably; its bytes stay. Its new name."""
    renamed = path.with_suffix(suffix)
    os.rename(path, renamed)
    sync_directory(path.parent)
    return renamed


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it; what cannot be removed stays."""
    # Here, since it brings bz2 and lzma along: 0.7 MiB that a node which never deletes a topic need not have.
    from shutil import rmtree

    rmtree(path, ignore_errors=True)


def copy_start(source: int, target: Path, size: int) -> None:
    """Copy the first bytes of an open file into a new one, durable but for its directory entry."""
    target.unlink(missing_ok=True)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        _copy(source, 0, size, fd, 0, read_at)
        os.fsync(fd)
    finally:
        os.close(fd)


def append_copy(target: Path, data: memoryview, source: int, position: int, end: int) -> int:
    """Add bytes, then a part of an open file (what cannot be read of it as salvage_at() does), to a file, durably; its
    size then."""
    fd = open_log(target, writable=True)
    try:
        size = size_of(fd)
        write_at(fd, data, size)
        size += len(data)
        _copy(source, position, end, fd, size, salvage_at)
        os.fsync(fd)
        return size + end - position
    finally:
        os.close(fd)


def _copy(source: int, position: int, end: int, target: int, at: int, read: Callable[[int, int, int], bytes]) -> None:
    """Bytes [position, end) of an open file to a position in another one."""
    while position < end:
        piece = read(source, min(COPY_BYTES, end - position), position)
        if not piece:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        write_at(target, memoryview(piece), at)
        position += len(piece)
        at += len(piece)


def write_new(target: Path, data: memoryview) -> None:
    """Write a new file, durable but for its directory entry."""
    target.unlink(missing_ok=True)
    os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
    append_copy(target, data, -1, 0, 0)


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """What is being written to a file goes when it cannot be finished: a full disk has no room for it."""
    try:
        yield
    except BaseException:
        remove(path)
        raise


def move(source: Path, target: Path) -> None:
    """Give a file the name of another, which it replaces, durably."""
    os.rename(source, target)
    sync_directory(target.parent)


def second_name(path: Path, suffix: str) -> None:
    """Give a file another name beside it; where a file system knows no links, nothing happens."""
    try:
        os.link(path, path.with_suffix(suffix))
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise


def free_space(path: Path) -> tuple[int, int]:
    """(bytes available to us, size of the file system in bytes)."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize, info.f_blocks * info.f_frsize


def lock(path: Path) -> int:
    """Take the exclusive lock of a data directory; it is released when the process ends, however it ends."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise DataDirectoryError(
            f"{path.parent}: cannot be written: {error.strerror}; check owner and rights"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise DataDirectoryInUseError(
                f"{path.parent}: another edgebroker uses this data directory; stop it or choose another --data-dir"
            ) from error
        raise DataDirectoryError(f"{path}: cannot be locked: {error.strerror}") from error
    return fd
