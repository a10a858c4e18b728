"""The reader thread: everything that must be read from the disk, because the loop may touch cached pages only.

A job that takes longer than its timeout is answered STORAGE_TIMEOUT on the loop; what it returns later is dropped
and the disk counts as stalled until the thread answers again.
"""

import errno
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgebroker.common.batch import EXPLANATION, Reason
from edgebroker.common.errors import CorruptBatchError
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import Worker
from edgebroker.storage import files
from edgebroker.storage.log import segscan
from edgebroker.storage.log.index import SealedIndex, read_index, write_index
from edgebroker.storage.log.segment import NO_TIMESTAMP
from edgebroker.storage.log.walk import ScanState, next_good_batch, walk_file, walk_start
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import UNKNOWN_CHAIN, ColdRead, CorruptRange


class SegmentView(msgspec.Struct, frozen=True):
    """What the reader thread may know of a segment, copied on the loop so that nothing is shared."""

    name: str
    path: Path
    log_id: bytes
    base: int
    end_offset: int
    size: int
    base_chain: int
    sealed: bool
    sealed_ms: int
    points: bytes | None
    max_batch: int
    epoch: int
    max_epoch: int
    salvage: bool = False
    """What the device cannot read is damage."""


class SegmentRead(ColdRead):
    """A cold read with what only the store needs: `fd`, an open descriptor of the segment for the receiver of the
    answer, and `index`, when it was loaded or rebuilt on the way. With an error, `missing` says that there is no such
    file (any more)."""

    fd: int = -1
    index: SealedIndex | None = None
    missing: bool = False


def read_cold(view: SegmentView, offset: int, max_bytes: int, quarantine: Quarantine) -> SegmentRead:
    """Read and verify batches of one segment; on the reader thread. Raises OSError when the device refuses."""
    fd = _open(view)
    try:
        answer = _read_cold(view, fd, offset, max_bytes, quarantine)
    except BaseException:
        files.close(fd)
        raise
    answer.fd = fd
    return answer


def _open(view: SegmentView) -> int:
    """The descriptor of an active segment is used for writing afterwards, if the file system allows that."""
    if not view.sealed:
        try:
            return files.open_log(view.path, writable=True)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
    return files.open_log(view.path)


def _read_cold(view: SegmentView, fd: int, offset: int, max_bytes: int, quarantine: Quarantine) -> SegmentRead:
    answer = SegmentRead()
    points = view.points
    if points is None:
        answer.index = load_index(view, fd)
        points = answer.index.points
    point = segscan.floor_offset(points, offset - view.base)
    relative, position, chain, _ = point or (0, 0, max(view.base_chain, 0), 0)
    state = walk_start(view.base + relative, chain, position=position, epoch=view.epoch)
    while True:
        want = max_bytes + view_margin(points, state.position, view.size)
        walked, data = _read_good(view, fd, state, want, offset)
        found = segscan.seek(data, offset)
        if found is not None:
            start, answer.first_offset, _ = found
            wanted = memoryview(data)[start:]
            length, answer.next_offset = segscan.cut(wanted, max_bytes, walked.next_offset)
            answer.data = bytes(wanted[:length])
            return answer
        corrupt, end = _damage(view, fd, walked)
        if corrupt.next <= corrupt.first:
            raise CorruptBatchError(f"{view.path}: {corrupt.first} comes twice")
        if corrupt.next > offset:
            reason = "cannot be read" if view.salvage else EXPLANATION.get(walked.reason, "incomplete")
            quarantine.keep(view.name, view.path, fd, walked.position, end, reason)
            answer.corrupt = corrupt
            return answer
        # The damage is between the index point and what is wanted.
        state = walk_start(corrupt.next, walked.chain, position=end, epoch=walked.epoch)


def _read_good(view: SegmentView, fd: int, state: ScanState, want: int, offset: int) -> tuple[ScanState, bytearray]:
    """Good batches from a position on: `want` bytes, or more when the batch with `offset` is longer."""
    data, most = bytearray(), want + 2 * view.max_batch
    while True:
        end = min(view.size, state.position + want)
        data.clear()
        walked = walk_file(
            fd,
            state,
            end,
            base_offset=view.base,
            max_batch=view.max_batch,
            max_epoch=view.max_epoch,
            limit_offset=view.end_offset,
            on_piece=data.extend,
            salvage=view.salvage,
        )
        cut_off = walked.reason in (Reason.TRUNCATED, Reason.ZEROES) and end < view.size
        if walked.next_offset > offset or not cut_off or want > most:
            return walked, data
        want += view.max_batch


def view_margin(points: bytes, position: int, size: int) -> int:
    """Bytes that may be between a point and the batch wanted: up to the next point."""
    after = segscan.floor_position(points, size)
    return min(64 << 10, size - position) if after is not None else size - position


def _damage(view: SegmentView, fd: int, walked: ScanState) -> tuple[CorruptRange, int]:
    """How far the damage reaches that a walk stopped at: (offsets, position after it)."""
    first = walked.next_offset
    found = next_good_batch(
        fd, walked.position, view.size, first, view.end_offset - 1, view.max_batch, salvage=view.salvage
    )
    if found < 0:
        return CorruptRange(first, view.end_offset), view.size
    return CorruptRange(first, int.from_bytes(files.read_at(fd, 8, found), "big")), found


def load_index(view: SegmentView, fd: int) -> SealedIndex:
    """The index of a segment: its file when that fits, else rebuilt by walking the log (and written, if sealed)."""
    if view.sealed:
        index = read_index(view.path, view.log_id, view.base, view.size)
        if index is not None and index.end_offset == view.end_offset:
            return index
    index, _ = verify_segment(view, fd)
    return index


def verify_segment(view: SegmentView, fd: int) -> tuple[SealedIndex, list[CorruptRange]]:
    """Verify every batch of a segment and build its index, stepping over damage.

    The chain after a corrupt range is not known; it continues from where it was. An index is written only when the
    chain at its base is known.
    """
    state = walk_start(view.base, max(view.base_chain, 0), epoch=view.epoch)
    damage: list[CorruptRange] = []
    points: list[bytes] = []
    before = -1
    while state.next_offset < view.end_offset:
        stuck, before = state.position == before, state.position
        if state.reason or state.position >= view.size or stuck:
            corrupt, end = _damage(view, fd, state)
            damage.append(corrupt)
            if corrupt.next >= view.end_offset:
                break
            state = state._replace(position=end, next_offset=corrupt.next, reason=Reason.OK)
        state = walk_file(
            fd,
            state._replace(points=b""),
            view.size,
            base_offset=view.base,
            max_batch=view.max_batch,
            max_epoch=view.max_epoch,
            limit_offset=view.end_offset,
            salvage=view.salvage,
        )
        points.append(state.points)
    index = SealedIndex(
        view.log_id,
        view.base,
        view.end_offset,
        view.size,
        view.base_chain,
        UNKNOWN_CHAIN if damage else state.chain,
        NO_TIMESTAMP if damage else state.max_timestamp,
        view.sealed_ms,
        b"".join(points),
    )
    if view.sealed and not damage and view.base_chain != UNKNOWN_CHAIN:
        write_index(view.path, index)
    return index, damage


class ColdReader:
    """Submit jobs from the loop; answers come back on the loop."""

    def __init__(self, scheduler: Scheduler, timeout_seconds: float) -> None:
        self._scheduler, self._timeout = scheduler, timeout_seconds
        self._worker = Worker("reader")
        self.timeouts = 0
        self.jobs = 0
        self.stalled = False

    def submit(
        self, job: Callable[[], SegmentRead], done: Callable[[SegmentRead], None], timeout: float | None = None
    ) -> None:
        """Run a job; `done` is called exactly once, with what it returned or with the timeout."""
        self.jobs += 1
        answered: list[bool] = []

        def answer(result: SegmentRead) -> None:
            if result.timed_out:
                if answered:
                    return
                self.stalled = True
                self.timeouts += 1
            else:
                self.stalled = False
                timer.cancel()
                if answered:
                    if result.fd >= 0:
                        files.close(result.fd)
                    return
            answered.append(True)
            done(result)

        def run() -> None:
            try:
                # A job that timed out in the queue has been answered.
                result = SegmentRead() if answered else job()
            except OSError as error:
                result = SegmentRead(
                    error=files.reason(error),
                    unreadable=error.errno not in files.TRANSIENT,
                    missing=error.errno == errno.ENOENT,
                )
            except (ValueError, CorruptBatchError) as error:
                result = SegmentRead(error=f"the segment does not fit the log any more: {error}")
            self._scheduler.call_soon_threadsafe(lambda: answer(result))

        limit = self._timeout if timeout is None else timeout
        late = SegmentRead(error=f"no answer from the disk within {limit:g} s", timed_out=True)
        timer = self._scheduler.call_later(limit, lambda: answer(late))
        self._worker.submit(run)

    def stop(self, timeout: float) -> bool:
        return self._worker.stop(timeout)
