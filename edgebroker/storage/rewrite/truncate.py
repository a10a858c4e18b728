"""The files of a log when it is created, truncated or recreated: on the commit thread, between groups.

    truncate   the parent does not have what follows an offset: it is removed, and retained aside
    recreate   the parent has nothing to continue with: the log starts again where an identity says

Bytes never change in place: what stays of a truncated segment is a new file, the old one keeps its inode for readers
that are being sent it, and is retained aside for a day. A crash at any step of truncating leaves a log that ends there
or later, never a corrupt range: the segments go from the last one on, and the one that is truncated is replaced at
once. Recreating writes the new identity beside the old one first; the next start finishes what that says.
"""

from pathlib import Path

from edgebroker.common.batch import STORED_BATCH_BYTES
from edgebroker.common.errors import DamagedDataError
from edgebroker.storage import files
from edgebroker.storage.identity import write_identity
from edgebroker.storage.log.aside import NEXT_NAME, finish_recreate, retain_aside, segment_files
from edgebroker.storage.log.index import index_path
from edgebroker.storage.log.recovery import RecoveredLog, Recovery
from edgebroker.storage.log.segment import ASIDE, Segment, segment_path
from edgebroker.storage.log.walk import walk_file, walk_start
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import Identity


def create_log(directory: Path, identity: Identity) -> Segment:
    """Make the files of a log that begins where its identity says; its first segment. Durable when this returns."""
    files.make_directory(directory)
    path = segment_path(directory, identity.log_start)
    segment = Segment(path, identity.log_start, base_chain=identity.chain, fd=files.create_log(path))
    segment.end_chain = identity.chain
    try:
        write_identity(directory, identity)
    except BaseException:
        segment.close()
        raise
    return segment


def truncate_log(
    directory: Path, identity: Identity, offset: int, quarantine: Quarantine, wall_ms: int
) -> RecoveredLog:
    """End a log at a batch boundary; what follows is retained aside. Raises OSError, DamagedDataError."""
    for path in reversed(segment_files(directory)):
        base = int(path.stem)
        if base >= offset and base > identity.log_start:
            retain_aside(path, wall_ms)
            continue
        if base < offset:
            _truncate_file(path, base, identity, offset, wall_ms)
        elif path.stat().st_size:
            retain_aside(path, wall_ms)
        break
    return _recover(directory, identity, quarantine)


def recreate_log(directory: Path, identity: Identity, quarantine: Quarantine, wall_ms: int) -> RecoveredLog:
    """Start again with another identity (its log_start, or another log); what was there is retained aside. Raises
    OSError."""
    write_identity(directory, identity, NEXT_NAME)
    finish_recreate(directory, wall_ms)
    return _recover(directory, identity, quarantine)


def _truncate_file(path: Path, base: int, identity: Identity, offset: int, wall_ms: int) -> None:
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
            return  # it ends before, or is damaged there: no batch continues what is before the offset
        if state.next_offset > offset:
            raise DamagedDataError(f"{path}: {offset} is within a batch")
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
