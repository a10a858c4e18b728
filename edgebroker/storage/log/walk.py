"""Walking segment files that may not be in memory: the verified scan for recovery, index rebuilds and cold reads.

Everything here may wait for the disk: it runs before the node listens, on the reader thread, or in the command line.
"""

import mmap
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from edgebroker.common.batch import HEADER_BYTES, Reason, read_header
from edgebroker.storage import files
from edgebroker.storage.log import segscan
from edgebroker.storage.log.index import INTERVAL_BYTES
from edgebroker.storage.log.segment import NO_TIMESTAMP

PIECE_BYTES = 1 << 20
WINDOW_BYTES = 4 << 20


class ScanState(NamedTuple):
    """How far a walk came and what it knows there. `reason` OK means that all bytes asked for were good."""

    position: int
    reason: Reason
    next_offset: int
    chain: int
    epoch: int
    max_timestamp: int
    points: bytes


def walk_file(
    fd: int,
    start: ScanState,
    end: int,
    *,
    base_offset: int,
    max_batch: int,
    max_epoch: int = (1 << 31) - 1,
    limit_offset: int = -1,
    on_piece: Callable[[memoryview], object] | None = None,
    salvage: bool = False,
) -> ScanState:
    """Verify batches by pread from start.position to `end`; `on_piece` sees every run of good batches.

    Memory stays at one piece plus one batch. Stops early at the first bad byte or at limit_offset. `max_epoch` is the
    newest history of the log: the epoch is outside of the CRC, one beyond it is damage. With `salvage` what the device
    cannot read is damage (files.salvage_at), else an OSError.
    """
    read = files.salvage_at if salvage else files.read_at
    state, points = start, [start.points]
    last_point = -1
    carry = b""
    read_to = start.position
    while True:
        if read_to < end:
            piece = read(fd, min(PIECE_BYTES, end - read_to), read_to)
            read_to += len(piece)
            if not piece:
                end = read_to
        else:
            piece = b""
        data = carry + piece
        check = partial(
            segscan.scan,
            expected=state.next_offset,
            chain=state.chain,
            epoch=state.epoch,
            max_batch=max_batch,
            base_offset=base_offset,
            base_position=state.position,
            interval=INTERVAL_BYTES,
            last_point=last_point,
            max_timestamp=state.max_timestamp,
            limit_offset=limit_offset,
        )
        good, reason, next_offset, chain, epoch, max_timestamp, found = _within_epoch(check, data, max_epoch)
        if on_piece is not None and good:
            on_piece(memoryview(data)[:good])
        if found:
            points.append(found)
            last_point = int.from_bytes(found[-36:-32], "little")
        carry = data[good:]
        state = ScanState(state.position + good, Reason(reason), next_offset, chain, epoch, max_timestamp, b"")
        cut_off = reason == Reason.TRUNCATED or (reason == Reason.ZEROES and len(carry) < HEADER_BYTES)
        more = read_to < end and (reason == Reason.OK or cut_off)
        stopped = limit_offset >= 0 and next_offset >= limit_offset
        if not more or stopped:
            return state._replace(points=b"".join(points))


def walk_mapped(
    fd: int, size: int, start: ScanState, *, base_offset: int, max_batch: int, max_epoch: int, limit_offset: int
) -> ScanState:
    """Verify a window of a sealed file through a mapping, from start.position on; for the background check.

    A page that the device cannot read raises OSError (EIO), never SIGBUS. Call again from where it stopped; it is
    over when `position` no longer moves. Points are at least INTERVAL_BYTES apart within one window.
    """
    segscan.install_guard()
    with (
        mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped,
        memoryview(mapped) as view,
        view[start.position : start.position + WINDOW_BYTES + max_batch] as window,
    ):
        check = partial(
            segscan.scan,
            expected=start.next_offset,
            chain=start.chain,
            epoch=start.epoch,
            max_batch=max_batch,
            base_offset=base_offset,
            base_position=start.position,
            interval=INTERVAL_BYTES,
            max_timestamp=start.max_timestamp,
            limit_offset=limit_offset,
            guarded=True,
        )
        good, reason, next_offset, chain, epoch, max_timestamp, points = _within_epoch(check, window, max_epoch)
    return ScanState(start.position + good, Reason(reason), next_offset, chain, epoch, max_timestamp, points)


Scanned = tuple[int, int, int, int, int, int, bytes]


def _within_epoch(check: Callable[..., Scanned], data: bytes | memoryview, max_epoch: int) -> Scanned:
    """Scan, and stop before a batch whose epoch no history of the log has."""
    scanned = check(data)
    if scanned[4] <= max_epoch:
        return scanned
    end = 0
    while (header := read_header(data, end)).epoch <= max_epoch:
        end += header.size
    good, _, *rest = check(memoryview(data)[:end])
    return good, Reason.BAD_EPOCH, *rest  # type: ignore[return-value]


def walk_start(
    offset: int, chain: int, *, position: int = 0, epoch: int = 0, max_timestamp: int = NO_TIMESTAMP
) -> ScanState:
    """Where a walk begins."""
    return ScanState(position, Reason.OK, offset, chain, epoch, max_timestamp, b"")


def next_good_batch(
    fd: int,
    position: int,
    end: int,
    min_offset: int,
    max_offset: int,
    max_batch: int,
    *,
    salvage: bool = False,
) -> int:
    """Position of the first batch after damaged bytes that is whole and fits; -1 when the rest holds none."""
    read = files.salvage_at if salvage else files.read_at
    at = position + 1
    while at + HEADER_BYTES <= end:
        data = read(fd, min(end - at, PIECE_BYTES + max_batch), at)
        found = segscan.find_batch(data, 0, min_offset, max_offset, max_batch)
        if found >= 0:
            return at + found
        if at + len(data) >= end:
            return -1
        at += PIECE_BYTES
    return -1
