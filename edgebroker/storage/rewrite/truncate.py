"""The files of a log when it is created, truncated, recreated or skipped: on the commit thread, between groups.

    truncate   the parent does not have what follows an offset: it is removed, and retained aside
    recreate   the parent has nothing to continue with: the log starts again where an identity says
    skip       the parent has removed what comes next: the log continues behind a gap

Bytes never change in place: what stays of a truncated segment is a new file, the old one keeps its inode for readers
that are being sent it, and is retained aside for a day. A crash at any step of truncating leaves a log that ends there
or later, never a corrupt range: the segments go from the last one on, and the one that is truncated is replaced at
once. Recreating and skipping write the new identity beside the old one first; the next start finishes what that says.
"""

from pathlib import Path

from msgspec.structs import replace

from edgebroker.common.batch import STORED_BATCH_BYTES
from edgebroker.common.errors import DamagedDataError
from edgebroker.storage import files
from edgebroker.storage.identity import change_identity, read_identity, write_identity
from edgebroker.storage.log.aside import NEXT_NAME, finish_rewrite, retain_aside, segment_files
from edgebroker.storage.log.index import index_path
from edgebroker.storage.log.recovery import RecoveredLog, Recovery
from edgebroker.storage.log.segment import ASIDE, Segment, segment_path
from edgebroker.storage.log.walk import walk_file, walk_start
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import Identity, LogGap


def create_log(directory: Path, identity: Identity) -> Segment:
    """Make the files of a log that begins where its identity says; its first segment. Durable when this returns."""
    files.make_directory(directory)
    path = segment_path(directory, identity.log_start)
    files.close(files.create_log(path))
    segment = Segment(path, identity.log_start, base_chain=identity.chain)
    segment.end_chain = identity.chain
    write_identity(directory, identity)
    return segment


def truncate_log(directory: Path, offset: int, quarantine: Quarantine, wall_ms: int) -> tuple[Identity, RecoveredLog]:
    """End a log at a batch boundary; what follows is retained aside. Raises OSError, DamagedDataError."""
    # A snapshot that does not end before is not complete any more.
    identity = change_identity(
        directory, lambda old: replace(old, snapshot=(-1, -1)) if old.snapshot[1] > offset else old
    )
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
    if any(gap.next > offset for gap in identity.gaps):
        # Not before: files behind a gap that nobody knows of would look like the rest of a damaged log.
        identity = change_identity(
            directory, lambda old: replace(old, gaps=[gap for gap in old.gaps if gap.next <= offset])
        )
    return identity, _recover(directory, identity, quarantine)


def recreate_log(directory: Path, identity: Identity, quarantine: Quarantine, wall_ms: int) -> RecoveredLog:
    """Start again with another identity (its log_start, or another log); what was there is retained aside. Raises
    OSError."""
    write_identity(directory, identity, NEXT_NAME)
    finish_rewrite(directory, wall_ms)
    return _recover(directory, identity, quarantine)


def skip_log(directory: Path, gap: LogGap, quarantine: Quarantine, wall_ms: int) -> tuple[Identity, RecoveredLog]:
    """Continue a log behind a gap that begins where it ends; nothing of it is removed. Raises OSError, and then the log
    still ends where it did."""
    old = read_identity(directory)
    gaps = [one for one in old.gaps if one.next <= gap.first]
    if gaps and gaps[-1].next == gap.first:
        gap = gap._replace(first=gaps.pop().first)  # nothing came since
    identity = replace(old, gaps=[*gaps, gap])
    following = segment_path(directory, gap.next)
    with files.removed_on_error(directory / NEXT_NAME), files.removed_on_error(following):
        write_identity(directory, identity, NEXT_NAME)
        finish_rewrite(directory, wall_ms)
    return identity, _recover(directory, identity, quarantine)


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
