"""Putting good bytes into a damaged place of a log, from a node that has them: a new file replaces the old one.

The bytes in front of the damage and behind it stay as they are; readers that hold the old file keep it. On the commit
thread. Nothing is put in that does not fit: every batch is checked, they must continue one another from the first
missing offset on, and where the chain behind them is known, it has to come out.
"""

import logging
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.batch import STORED_BATCH_BYTES, Reason
from edgebroker.common.errors import DamagedDataError
from edgebroker.storage import files, segscan
from edgebroker.storage.index import index_path
from edgebroker.storage.segment import UNKNOWN_CHAIN, segment_path
from edgebroker.storage.walk import next_good_batch, walk_file, walk_start

log = logging.getLogger(__name__)


class Wound(NamedTuple):
    """A damaged place as the loop sees it: the sealed segment that holds its first offset (`path` None: its file is
    missing), where that ends, and the chains before it and behind it as far as they are known."""

    directory: Path
    path: Path | None
    size: int
    base: int
    base_chain: int
    end_offset: int
    end_chain: int
    first: int
    epoch: int
    max_epoch: int


class Healed(NamedTuple):
    """The file that holds good bytes now: its base and size; offsets up to `next_offset` are whole again."""

    path: Path
    base: int
    size: int
    next_offset: int
    end_chain: int


def heal_segment(wound: Wound, data: bytes) -> Healed:
    """Put whole batches, the first of which begins at wound.first, where they belong; durable when this returns.

    Raises DamagedDataError when they do not fit, OSError when they cannot be stored.
    """
    if wound.path is None:
        return _new_file(wound, data)
    fd = files.open_log(wound.path)
    try:
        size = min(wound.size, files.size_of(fd))
        start = walk_start(wound.base, max(wound.base_chain, 0), epoch=wound.epoch)
        before = walk_file(
            fd, start, size, base_offset=wound.base, max_batch=STORED_BATCH_BYTES, max_epoch=wound.max_epoch,
            limit_offset=wound.first,
        )  # fmt: skip
        if before.next_offset != wound.first:
            raise DamagedDataError(f"{wound.path}: offset {wound.first} is not where the damage begins")
        following, _ = _check(data, wound, before.chain, before.epoch)
        at = next_good_batch(
            fd, before.position, size, wound.first, wound.end_offset - 1, STORED_BATCH_BYTES
        )  # fmt: skip
        behind = int.from_bytes(files.read_at(fd, 8, at), "big") if at >= 0 else wound.end_offset
        if following > behind:
            raise DamagedDataError(f"{wound.path}: the batches go to {following}, records from {behind} on are here")
        if following < behind:
            at = before.position  # what is still damaged stays where it was
        target = wound.path.with_suffix(".tmp")
        files.copy_start(fd, target, before.position)
        written = files.append_copy(target, memoryview(data), fd, at if at >= 0 else size, size)
    finally:
        files.close(fd)
    end_chain = _end_chain(wound, target, written) if following == behind else UNKNOWN_CHAIN
    files.remove(index_path(wound.path))
    files.move(target, wound.path)
    return Healed(wound.path, wound.base, written, following, end_chain)


def _check(data: bytes, wound: Wound, chain: int, epoch: int) -> tuple[int, int]:
    """(offset behind the batches, chain there)."""
    good, reason, following, chain, last_epoch, _, _ = segscan.scan(data, wound.first, chain, epoch, STORED_BATCH_BYTES)
    if good != len(data) or not data or last_epoch > wound.max_epoch:
        raise DamagedDataError(f"what was fetched for offset {wound.first} does not fit: {Reason(reason).name}")
    if following > wound.end_offset:
        raise DamagedDataError(f"what was fetched for offset {wound.first} goes on to {following}")
    return following, chain


def _end_chain(wound: Wound, path: Path, size: int) -> int:
    """The chain behind the whole segment, as it would be now; it has to be the one that is known."""
    if wound.base_chain == UNKNOWN_CHAIN:
        return UNKNOWN_CHAIN
    fd = files.open_log(path)
    try:
        walked = walk_file(
            fd, walk_start(wound.base, wound.base_chain, epoch=wound.epoch), size, base_offset=wound.base,
            max_batch=STORED_BATCH_BYTES, max_epoch=wound.max_epoch, limit_offset=wound.end_offset,
        )  # fmt: skip
    finally:
        files.close(fd)
    if walked.next_offset < wound.end_offset:
        return UNKNOWN_CHAIN  # there is more damage in it
    if wound.end_chain not in (UNKNOWN_CHAIN, walked.chain):
        files.remove(path)
        raise DamagedDataError(f"{wound.path}: the chain behind what was fetched is another one")
    return walked.chain


def _new_file(wound: Wound, data: bytes) -> Healed:
    following, chain = _check(data, wound, max(wound.base_chain, 0), wound.epoch)
    complete = following == wound.end_offset
    if complete and UNKNOWN_CHAIN not in (wound.base_chain, wound.end_chain) and chain != wound.end_chain:
        raise DamagedDataError(f"offset {wound.first}: the chain behind what was fetched is another one")
    path = segment_path(wound.directory, wound.first)
    target = path.with_suffix(".tmp")
    files.write_new(target, memoryview(data))
    files.move(target, path)
    end_chain = chain if wound.base_chain != UNKNOWN_CHAIN else UNKNOWN_CHAIN
    return Healed(path, wound.first, len(data), following, end_chain)
