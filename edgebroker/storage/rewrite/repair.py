"""Repair a corrupt range from verified batches of a peer: a new file replaces the damaged one, or a missing one.

The bytes before the damage and after it stay as they are; readers that hold the old file keep it. On the commit thread.
Nothing is put in that does not fit: every batch is checked, they must continue one another from the first missing
offset on, and where the chain after them is known, it has to come out.
"""

from collections.abc import Callable
from pathlib import Path

from edgebroker.common.batch import STORED_BATCH_BYTES, Reason
from edgebroker.common.errors import DamagedDataError
from edgebroker.storage import files
from edgebroker.storage.log import segscan
from edgebroker.storage.log.corrupt_ranges import RepairResult, RepairTarget
from edgebroker.storage.log.index import index_path
from edgebroker.storage.log.segment import NO_TIMESTAMP, segment_path
from edgebroker.storage.log.walk import ScanState, next_good_batch, walk_file, walk_start
from edgebroker.storage.types import UNKNOWN_CHAIN


def repair_segment(target: RepairTarget, data: bytes) -> RepairResult:
    """Put whole batches, the first of which begins at target.first, where they belong; durable when this returns.

    Raises DamagedDataError when they do not fit, OSError when they cannot be stored.
    """
    path = target.path
    if path is None:
        return _new_file(target, data, target.base_chain)
    fd = files.open_log(path)
    try:
        size = min(target.size, files.size_of(fd))
        before = _walk(target, fd, size, target.first)
        if before.next_offset != target.first:
            raise DamagedDataError(f"{path}: offset {target.first} is not where the damage begins")
        if _walk(target, fd, size, target.next).next_offset >= target.next:
            # An earlier repair got as far as the file, and its end was not noted any more.
            whole = _walk(target, fd, size, target.end_offset)
            return _repaired(target, whole, size, target.next)
        next_offset = _check(data, target, before.chain, before.epoch).next_offset
        at = next_good_batch(
            fd, before.position, size, next_offset, target.end_offset - 1, STORED_BATCH_BYTES, salvage=True
        )
        temporary = path.with_suffix(".tmp")
        if at < 0:
            # No good batch follows: the segment ends here, and what was lost gets a file of its own.
            chain = before.chain if target.base_chain != UNKNOWN_CHAIN else UNKNOWN_CHAIN
            if not before.position:
                return _new_file(target, data, chain)

            def shorten() -> None:
                if before.position == size:
                    return
                with files.removed_on_error(temporary):
                    files.copy_start(fd, temporary, before.position)
                _replace(temporary, path)

            return _new_file(target, data, chain, shorten)._replace(shortened=(before.position, chain))
        if next_offset < int.from_bytes(files.read_at(fd, 8, at), "big"):
            at = before.position  # what is still damaged stays where it was
        with files.removed_on_error(temporary):
            files.copy_start(fd, temporary, before.position)
            written = files.append_copy(temporary, memoryview(data), fd, at, size)
            repaired = _look_over(target, temporary, written, next_offset)
        _replace(temporary, path)
        return repaired
    finally:
        files.close(fd)


def _walk(target: RepairTarget, fd: int, size: int, limit: int) -> ScanState:
    """Verify the batches of a segment up to an offset."""
    return walk_file(
        fd, walk_start(target.base, max(target.base_chain, 0), epoch=target.epoch), size, base_offset=target.base,
        max_batch=STORED_BATCH_BYTES, max_epoch=target.max_epoch, limit_offset=limit,
        salvage=True,
    )  # fmt: skip


def _check(data: bytes, target: RepairTarget, chain: int, epoch: int) -> ScanState:
    """What was fetched, as the continuation of what is before it."""
    good, reason, next_offset, chain, last_epoch, newest, _ = segscan.scan(
        data, target.first, chain, epoch, STORED_BATCH_BYTES
    )
    if good != len(data) or not data or last_epoch > target.max_epoch:
        raise DamagedDataError(f"what was fetched for offset {target.first} does not fit: {Reason(reason).name}")
    if next_offset > target.next:
        raise DamagedDataError(f"the batches go to {next_offset}, records from {target.next} on are here")
    return ScanState(good, Reason.OK, next_offset, chain, last_epoch, newest, b"")


def _look_over(target: RepairTarget, path: Path, size: int, next_offset: int) -> RepairResult:
    fd = files.open_log(path)
    try:
        return _repaired(target, _walk(target, fd, size, target.end_offset), size, next_offset)
    finally:
        files.close(fd)


def _repaired(target: RepairTarget, whole: ScanState, size: int, next_offset: int) -> RepairResult:
    """A segment that keeps its file name: the chain at its end is known when there is no more damage in it, and then it
    has to be the one that is known otherwise."""
    assert target.path is not None
    end_chain, newest = UNKNOWN_CHAIN, NO_TIMESTAMP
    if whole.next_offset >= target.end_offset:
        newest = whole.max_timestamp
        if target.base_chain != UNKNOWN_CHAIN:
            end_chain = whole.chain
            _same_chain(target, end_chain)
    return RepairResult(target.path, target.base, size, newest, next_offset, target.end_offset, end_chain)


def _same_chain(target: RepairTarget, chain: int) -> None:
    if target.end_chain not in (UNKNOWN_CHAIN, chain):
        raise DamagedDataError(f"offset {target.first}: the chain after what was fetched differs")


def _new_file(
    target: RepairTarget, data: bytes, base_chain: int, before: Callable[[], None] = lambda: None
) -> RepairResult:
    """A segment of its own for what was fetched; `before` is done once that is stored, before it gets its name."""
    found = _check(data, target, max(base_chain, 0), target.epoch)
    end_chain = found.chain if base_chain != UNKNOWN_CHAIN else UNKNOWN_CHAIN
    if found.next_offset == target.end_offset and end_chain != UNKNOWN_CHAIN:
        _same_chain(target, end_chain)
    path = segment_path(target.directory, target.first)
    temporary = path.with_suffix(".tmp")
    with files.removed_on_error(temporary):
        files.write_new(temporary, memoryview(data))
        before()
    _replace(temporary, path)
    next_offset = found.next_offset
    return RepairResult(path, target.first, len(data), found.max_timestamp, next_offset, next_offset, end_chain)


def _replace(temporary: Path, path: Path) -> None:
    files.remove(index_path(path))
    files.move(temporary, path)
