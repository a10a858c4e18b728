"""Putting good bytes into a damaged place of a log, from a node that has them: a new file replaces the old one.

The bytes in front of the damage and behind it stay as they are; readers that hold the old file keep it. On the commit
thread. Nothing is put in that does not fit: every batch is checked, they must continue one another from the first
missing offset on, and where the chain behind them is known, it has to come out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.batch import STORED_BATCH_BYTES, Reason
from edgebroker.common.errors import DamagedDataError
from edgebroker.storage import files
from edgebroker.storage.log import segscan
from edgebroker.storage.log.index import index_path
from edgebroker.storage.log.segment import NO_TIMESTAMP, segment_path
from edgebroker.storage.log.walk import ScanState, next_good_batch, walk_file, walk_start
from edgebroker.storage.types import UNKNOWN_CHAIN


class RepairTarget(NamedTuple):
    """A damaged place as the loop sees it: offsets [first, next), in the sealed segment that holds the first one
    (`path` None: its file is missing), where that ends, and the chains before it and behind it as far as known."""

    directory: Path
    path: Path | None
    size: int
    base: int
    base_chain: int
    end_offset: int
    end_chain: int
    first: int
    next: int
    epoch: int
    max_epoch: int


class RepairResult(NamedTuple):
    """The file that holds good bytes now; offsets up to `next_offset` are whole again. `shortened`: the segment before
    it lost its damaged end, and has this size and this chain at its end; None when nothing changed there."""

    path: Path
    base: int
    size: int
    max_timestamp: int
    next_offset: int
    end_offset: int
    end_chain: int
    shortened: tuple[int, int] | None = None


def repair_segment(wound: RepairTarget, data: bytes) -> RepairResult:
    """Put whole batches, the first of which begins at wound.first, where they belong; durable when this returns.

    Raises DamagedDataError when they do not fit, OSError when they cannot be stored.
    """
    path = wound.path
    if path is None:
        return _new_file(wound, data, wound.base_chain)
    fd = files.open_log(path)
    try:
        size = min(wound.size, files.size_of(fd))
        before = _walk(wound, fd, size, wound.first)
        if before.next_offset != wound.first:
            raise DamagedDataError(f"{path}: offset {wound.first} is not where the damage begins")
        if _walk(wound, fd, size, wound.next).next_offset >= wound.next:
            # An earlier heal came as far as the file, and was not heard of any more.
            whole = _walk(wound, fd, size, wound.end_offset)
            return _repaired(wound, whole, size, wound.next)
        following = _check(data, wound, before.chain, before.epoch).next_offset
        at = next_good_batch(fd, before.position, size, following, wound.end_offset - 1, STORED_BATCH_BYTES)
        target = path.with_suffix(".tmp")
        if at < 0:
            # Nothing good follows: the segment ends here, and what was lost gets a file of its own.
            chain = before.chain if wound.base_chain != UNKNOWN_CHAIN else UNKNOWN_CHAIN
            if not before.position:
                return _new_file(wound, data, chain)

            def shorten() -> None:
                if before.position == size:
                    return
                with files.removed_on_error(target):
                    files.copy_start(fd, target, before.position)
                _replace(target, path)

            return _new_file(wound, data, chain, shorten)._replace(shortened=(before.position, chain))
        if following < int.from_bytes(files.read_at(fd, 8, at), "big"):
            at = before.position  # what is still damaged stays where it was
        with files.removed_on_error(target):
            files.copy_start(fd, target, before.position)
            written = files.append_copy(target, memoryview(data), fd, at, size)
            repaired = _look_over(wound, target, written, following)
        _replace(target, path)
        return repaired
    finally:
        files.close(fd)


def _walk(wound: RepairTarget, fd: int, size: int, limit: int) -> ScanState:
    """Verify the batches of a segment up to an offset."""
    return walk_file(
        fd, walk_start(wound.base, max(wound.base_chain, 0), epoch=wound.epoch), size, base_offset=wound.base,
        max_batch=STORED_BATCH_BYTES, max_epoch=wound.max_epoch, limit_offset=limit,
    )  # fmt: skip


def _check(data: bytes, wound: RepairTarget, chain: int, epoch: int) -> ScanState:
    """What was fetched, as the continuation of what lies before it."""
    good, reason, following, chain, last_epoch, newest, _ = segscan.scan(
        data, wound.first, chain, epoch, STORED_BATCH_BYTES
    )
    if good != len(data) or not data or last_epoch > wound.max_epoch:
        raise DamagedDataError(f"what was fetched for offset {wound.first} does not fit: {Reason(reason).name}")
    if following > wound.next:
        raise DamagedDataError(f"the batches go to {following}, records from {wound.next} on are here")
    return ScanState(good, Reason.OK, following, chain, last_epoch, newest, b"")


def _look_over(wound: RepairTarget, path: Path, size: int, following: int) -> RepairResult:
    fd = files.open_log(path)
    try:
        return _repaired(wound, _walk(wound, fd, size, wound.end_offset), size, following)
    finally:
        files.close(fd)


def _repaired(wound: RepairTarget, whole: ScanState, size: int, following: int) -> RepairResult:
    """A segment that keeps its file name: the chain at its end is known when there is no more damage in it, and then it
    has to be the one that is known otherwise."""
    assert wound.path is not None
    end_chain, newest = UNKNOWN_CHAIN, NO_TIMESTAMP
    if whole.next_offset >= wound.end_offset:
        newest = whole.max_timestamp
        if wound.base_chain != UNKNOWN_CHAIN:
            end_chain = whole.chain
            _same_chain(wound, end_chain)
    return RepairResult(wound.path, wound.base, size, newest, following, wound.end_offset, end_chain)


def _same_chain(wound: RepairTarget, chain: int) -> None:
    if wound.end_chain not in (UNKNOWN_CHAIN, chain):
        raise DamagedDataError(f"offset {wound.first}: the chain behind what was fetched is another one")


def _new_file(
    wound: RepairTarget, data: bytes, base_chain: int, before: Callable[[], None] = lambda: None
) -> RepairResult:
    """A segment of its own for what was fetched; `before` is done once that is stored, before it gets its name."""
    found = _check(data, wound, max(base_chain, 0), wound.epoch)
    end_chain = found.chain if base_chain != UNKNOWN_CHAIN else UNKNOWN_CHAIN
    if found.next_offset == wound.end_offset and end_chain != UNKNOWN_CHAIN:
        _same_chain(wound, end_chain)
    path = segment_path(wound.directory, wound.first)
    target = path.with_suffix(".tmp")
    with files.removed_on_error(target):
        files.write_new(target, memoryview(data))
        before()
    _replace(target, path)
    following = found.next_offset
    return RepairResult(path, wound.first, len(data), found.max_timestamp, following, following, end_chain)


def _replace(target: Path, path: Path) -> None:
    files.remove(index_path(path))
    files.move(target, path)
