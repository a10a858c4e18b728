"""What a mirror does to its log besides appending: on the commit thread, between groups.

    cut       the parent does not have what lies behind an offset: it goes
    restart   the parent has nothing to continue with: the log begins anew where an identity says

Bytes never change in place: what stays of a cut segment is a new file, the old one keeps its inode for whoever is being
sent it, and lies beside it as BASE.diverged-TIME for a day. A crash at any step of a cut leaves a log that ends there
or behind it, never a hole: the segments go from the last one on, and the one that is cut is replaced at once. A restart
writes the new identity beside the old one first; the next start finishes what that says.
"""

import logging
from pathlib import Path

from edgebroker.common.batch import STORED_BATCH_BYTES
from edgebroker.common.errors import DamagedDataError
from edgebroker.storage import files
from edgebroker.storage.identity import FILE_NAME, read_identity, write_identity
from edgebroker.storage.log.index import index_path
from edgebroker.storage.log.recovery import RecoveredLog, Recovery
from edgebroker.storage.log.segment import ASIDE, SUFFIX, Segment, segment_path
from edgebroker.storage.log.walk import walk_file, walk_start
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import Identity

log = logging.getLogger(__name__)

NEXT_NAME = "identity.next"
ASIDE_MS = 24 * 3600 * 1000


def begin_log(directory: Path, identity: Identity) -> Segment:
    """Make the files of a log that begins where its identity says, durably; its first segment."""
    files.make_directory(directory)
    path = segment_path(directory, identity.log_start)
    segment = Segment(path, identity.log_start, base_chain=identity.chain, fd=files.create_log(path))
    segment.end_chain = identity.chain
    write_identity(directory, identity)
    return segment


def cut_log(directory: Path, identity: Identity, offset: int, quarantine: Quarantine, wall_ms: int) -> RecoveredLog:
    """End a log at a batch boundary; what lies behind it is set aside. Raises OSError, DamagedDataError."""
    drop_aside(directory, wall_ms)
    for path in reversed(_segments(directory)):
        base = int(path.stem)
        if base >= offset and base > identity.log_start:
            _set_aside(path, wall_ms)
            continue
        if base < offset:
            _cut_file(path, base, identity, offset, wall_ms)
        elif path.stat().st_size:
            _set_aside(path, wall_ms)
        break
    return _recover(directory, identity, quarantine)


def restart_log(directory: Path, identity: Identity, quarantine: Quarantine, wall_ms: int) -> RecoveredLog:
    """Begin anew with another identity (its log_start, or another log). What was there is set aside. Raises OSError."""
    drop_aside(directory, wall_ms)
    write_identity(directory, identity, NEXT_NAME)
    finish_restart(directory, wall_ms)
    return _recover(directory, identity, quarantine)


def finish_restart(directory: Path, wall_ms: int) -> None:
    """Do what a restart that was begun has left to do: nothing, mostly. Raises OSError."""
    if not (directory / NEXT_NAME).exists():
        return
    read_identity(directory, NEXT_NAME)  # what is not whole is not followed
    for path in reversed(_segments(directory)):
        _set_aside(path, wall_ms)
    files.move(directory / NEXT_NAME, directory / FILE_NAME)


def drop_aside(directory: Path, wall_ms: int) -> None:
    """Remove what was set aside more than a day ago."""
    for path in directory.glob(f"*{ASIDE}*"):
        stamp = path.suffix.removeprefix(ASIDE)
        if stamp.isdigit() and wall_ms - int(stamp) > ASIDE_MS:
            files.remove(path)


def _segments(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix == SUFFIX and path.stem.isdigit())


def _set_aside(path: Path, wall_ms: int) -> None:
    files.remove(index_path(path))
    files.set_aside(path, f"{ASIDE}{wall_ms}")


def _cut_file(path: Path, base: int, identity: Identity, offset: int, wall_ms: int) -> None:
    """Replace a segment by one that holds its batches before an offset."""
    fd = files.open_log(path)
    try:
        size = files.size_of(fd)
        state = walk_file(
            fd,
            walk_start(base, 0, epoch=identity.epoch_at(base)),
            size,
            base_offset=base,
            max_batch=STORED_BATCH_BYTES,
            limit_offset=offset,
        )
        if state.next_offset < offset:
            return  # it ends before, or is damaged there: nothing behind it is followed by anything
        if state.next_offset > offset:
            raise DamagedDataError(f"{path}: {offset} lies within a batch")
        if state.position == size:
            return
        shorter = path.with_suffix(".tmp")
        with files.removed_on_error(shorter):
            files.copy_start(fd, shorter, state.position)
    finally:
        files.close(fd)
    files.remove(index_path(path))
    files.second_name(path, f"{ASIDE}{wall_ms}")
    files.move(shorter, path)


def _recover(directory: Path, identity: Identity, quarantine: Quarantine) -> RecoveredLog:
    name = f"{directory.parent.name}/{directory.name}"
    return Recovery(directory, identity, quarantine, max_batch=STORED_BATCH_BYTES, name=name).run(None, -1)
