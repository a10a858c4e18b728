"""Bringing one partition's log back after a stop, whatever kind of stop it was.

    1  list the segment files; the names are the truth about where segments begin
    2  walk forward from the newest position that a checkpoint (or an index) certifies
    3  bad bytes that are not certified are a torn tail: kept in quarantine, truncated
    4  bad bytes below what is certified are a corrupt range: noted, kept in quarantine, and what follows is kept
    5  sync the tail and the directory before the end of the log is known to anyone

Nothing is deleted. Certified is what is below the checkpoint, below a committed offset or a child's position, or below
the base of a later segment (a segment begins only when the one before it is durable).
"""

import logging
from pathlib import Path
from typing import NamedTuple

from edgebroker.common.batch import EXPLANATION, Reason
from edgebroker.storage import files
from edgebroker.storage.log.index import read_index
from edgebroker.storage.log.segment import ASIDE, SUFFIX, Segment, segment_path
from edgebroker.storage.log.walk import ScanState, next_good_batch, walk_file, walk_start
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import UNKNOWN_CHAIN, Checkpoint, CorruptRange, Identity, LogGap

log = logging.getLogger(__name__)


class RecoveredLog(NamedTuple):
    """Segments in order, the last one active and open for writing; all up to `next_offset` is synced."""

    segments: list[Segment]
    next_offset: int
    chain: int
    epoch: int
    corrupt_ranges: list[CorruptRange]
    torn_bytes: int


class Recovery:
    """Recovers one partition; blocking, called before the log is used."""

    def __init__(
        self, directory: Path, identity: Identity, quarantine: Quarantine, *, max_batch: int, name: str
    ) -> None:
        self._directory, self._identity, self._quarantine = directory, identity, quarantine
        self._max_batch, self._name = max_batch, name
        self._corrupt_ranges: list[CorruptRange] = []
        self._torn = 0
        self._leave_tail = False
        # False after damage, until something certifies the chain: then UNKNOWN_CHAIN is noted instead of it.
        self._chain_known = True

    def run(self, checkpoint: Checkpoint | None, watermark: int) -> RecoveredLog:
        """`watermark`: the highest offset that a group or a child was seen to have; -1 when none is known."""
        if checkpoint is not None and checkpoint.log_id != self._identity.log_id:
            checkpoint = None
        segments = self._list()
        reached = self._identity.gaps[-1].next if self._identity.gaps else -1
        certified = max(watermark, checkpoint.offset if checkpoint else -1, reached)
        if not segments:
            return self._begin(max(self._identity.log_start, certified), checkpoint)
        index, state = self._starting_point(segments, checkpoint)
        for rank in range(index, len(segments)):
            segment, limit = segments[rank], self._limit(segments, rank)
            if rank > index:
                state = self._over_gap(state)
            if segment.base > state.next_offset:
                self._note_corrupt(state.next_offset, segment.base, "a segment is missing")
                self._chain_known = False
            if rank > index:
                state = walk_start(segment.base, state.chain, epoch=state.epoch, max_timestamp=state.max_timestamp)
            if state.position == 0:
                segment.base_chain = self._chain(state)
            state = self._walk(segment, state, limit, certified if limit < 0 else limit)
        if state.next_offset < self._identity.log_start:
            # It was recreated at a later offset, and the power went before its old segments were removed.
            for segment in segments:
                segment.close()
                files.rename_suffix(segment.path, f"{ASIDE}{segment.path.stat().st_mtime_ns // 1_000_000}")
            return self._begin(max(self._identity.log_start, certified), checkpoint)
        if self._leave_tail:
            self._seal(segments, state)
            segments.append(self._create(state.next_offset, self._chain(state)))
        if self._identity.gap_at(state.next_offset) is not None:
            # The segment behind the gap is missing, and all after it.
            self._seal(segments, state)
            state = self._over_gap(state)
            segments.append(self._create(state.next_offset, self._chain(state)))
        if state.next_offset < certified:
            # Everything after the last good byte is damaged, but it was acknowledged: continue after it.
            self._note_corrupt(state.next_offset, certified, "the tail is damaged")
            self._seal(segments, state)
            state = self._after_damaged_tail(certified, checkpoint, state)
            segments.append(self._create(certified, self._chain(state)))
        active = segments[-1]
        active.end_offset = state.next_offset
        active.end_chain, active.max_timestamp = self._chain(state), state.max_timestamp
        files.sync_file(active.fd)
        files.sync_directory(self._directory)
        for segment in segments:
            segment.close()  # it is opened again when it is written to or read
        self._take_index(active)
        epoch = max(state.epoch, self._identity.epoch)
        return RecoveredLog(segments, state.next_offset, self._chain(state), epoch, self._corrupt_ranges, self._torn)

    def _limit(self, segments: list[Segment], rank: int) -> int:
        """Where the records of a segment end at the latest: before the next segment, or a gap; -1: it is the last."""
        following = segments[rank + 1].base if rank + 1 < len(segments) else -1
        gap = next((gap for gap in self._identity.gaps if gap.next > segments[rank].base), None)
        return gap.first if gap is not None and (following < 0 or gap.first < following) else following

    def _over_gap(self, state: ScanState) -> ScanState:
        """Where the log goes on when a gap begins here: behind it the chain is known, whatever is before it."""
        gap = self._identity.gap_at(state.next_offset)
        if gap is None:
            return state
        self._chain_known = True
        return walk_start(gap.next, gap.chain, epoch=state.epoch)

    def _chain(self, state: ScanState) -> int:
        return state.chain if self._chain_known else UNKNOWN_CHAIN

    def _take_index(self, active: Segment) -> None:
        """A clean stop leaves the index of the active segment as well: with it is known when its records came."""
        index = read_index(active.path, self._identity.log_id_bytes, active.base, active.size)
        if index is not None and (index.end_offset, index.end_chain) == (active.end_offset, active.end_chain):
            active.points, active.points_from = bytearray(index.points), 0

    def _after_damaged_tail(self, offset: int, checkpoint: Checkpoint | None, state: ScanState) -> ScanState:
        """Where the log continues after a damaged tail: a gap or the checkpoint may know the chain there."""
        gap, chain = self._identity.gap_before(offset), UNKNOWN_CHAIN
        if gap is not None:
            chain = gap.chain
        elif checkpoint is not None and checkpoint.offset == offset:
            chain = checkpoint.chain
        self._chain_known = chain != UNKNOWN_CHAIN
        return walk_start(offset, max(chain, 0), epoch=state.epoch)

    def _list(self) -> list[Segment]:
        segments = []
        for path in sorted(self._directory.iterdir()):
            if path.suffix == ".tmp":
                files.remove(path)
            elif path.suffix == SUFFIX and path.stem.isdigit() and len(path.stem) == 20:
                segment = Segment(path, int(path.stem), size=path.stat().st_size)
                segment.points, segment.points_from = None, segment.size
                segment.unverified_end = segment.size
                segment.base_chain = segment.end_chain = UNKNOWN_CHAIN
                segments.append(segment)
        start = self._identity.log_start
        # Retention writes the identity first and removes the files after it: finish that.
        while len(segments) > 1 and segments[1].base <= start:
            gone = segments.pop(0)
            files.remove(gone.path)
            files.remove(gone.path.with_suffix(".index"))
        for sealed in segments[:-1]:
            # Until an index or meta.db says more exactly: when it was last written to.
            sealed.sealed_ms = sealed.path.stat().st_mtime_ns // 1_000_000
        for rank, sealed in enumerate(segments[:-1]):
            sealed.end_offset = self._limit(segments, rank)
        if segments:
            active = segments[-1]
            active.fd = files.open_log(active.path, writable=True)
            active.modified_ms = files.modified_ms(active.fd)
            # Pages left clean by a failed write-back are read from the device again.
            files.drop_cache(active.fd)
            if segments[0].base > start:
                self._note_corrupt(start, segments[0].base, "the first segments are missing")
        return segments

    def _starting_point(self, segments: list[Segment], checkpoint: Checkpoint | None) -> tuple[int, ScanState]:
        """The newest position with a known chain, as (rank of the segment, where to begin in it)."""
        if checkpoint is not None and checkpoint.chain != UNKNOWN_CHAIN:
            for rank, segment in enumerate(segments):
                if segment.base == checkpoint.base and checkpoint.position <= segment.size:
                    segment.base_chain = self._base_chain(segments, rank)
                    start = walk_start(
                        checkpoint.offset,
                        checkpoint.chain,
                        position=checkpoint.position,
                        epoch=checkpoint.epoch,
                        max_timestamp=checkpoint.max_timestamp,
                    )
                    return rank, start
        for rank in range(len(segments) - 1, 0, -1):
            base, chain = segments[rank].base, self._base_chain(segments, rank)
            if chain != UNKNOWN_CHAIN:
                return rank, walk_start(base, chain, epoch=self._identity.epoch_at(base))
        base = segments[0].base
        return 0, walk_start(base, self._identity.chain, epoch=self._identity.epoch_at(base))

    def _base_chain(self, segments: list[Segment], rank: int) -> int:
        """The chain at the base of a segment, where the identity or the index before it tells."""
        if segments[rank].base == self._identity.log_start:
            return self._identity.chain
        gap = self._identity.gap_before(segments[rank].base)
        if gap is not None:
            return gap.chain
        if rank:
            before = segments[rank - 1]
            index = read_index(before.path, self._identity.log_id_bytes, before.base, before.size)
            if index is not None and index.end_offset == segments[rank].base:
                return index.end_chain
        return UNKNOWN_CHAIN

    def _walk(self, segment: Segment, state: ScanState, limit: int, certified: int) -> ScanState:
        """Walk one segment to its end, around damage below `certified`, and truncate a torn tail above it."""
        first_position = state.position
        fd = segment.fd if segment.fd >= 0 else files.open_log(segment.path)
        try:
            while True:
                state = walk_file(
                    fd,
                    state,
                    segment.size,
                    base_offset=segment.base,
                    max_batch=self._max_batch,
                    max_epoch=self._identity.epoch,
                    limit_offset=limit,
                )
                ended = state.position == segment.size or (limit >= 0 and state.next_offset >= limit)
                if ended:
                    break
                if state.next_offset >= certified:
                    self._truncate_tail(segment, state)
                    break
                state, found = self._step_over(fd, segment, state, limit)
                if not found:
                    break
                self._chain_known = False
            if limit >= 0 and state.next_offset < limit:
                self._note_corrupt(state.next_offset, limit, "the end of a segment is damaged")
                state = state._replace(next_offset=limit)
                self._chain_known = False
            if limit >= 0 and not self._chain_known:
                index = read_index(segment.path, self._identity.log_id_bytes, segment.base, segment.size)
                if index is not None and index.end_offset == limit and index.end_chain != UNKNOWN_CHAIN:
                    self._chain_known, state = True, state._replace(chain=index.end_chain)
        finally:
            if segment.fd < 0:
                files.close(fd)
        if limit < 0:
            segment.points, segment.points_from = bytearray(state.points), first_position
            segment.unverified_end = first_position
        return state

    def _step_over(self, fd: int, segment: Segment, state: ScanState, limit: int) -> tuple[ScanState, bool]:
        """Continue after damaged bytes; (state, False) when nothing good follows in this segment."""
        highest = limit - 1 if limit >= 0 else state.next_offset + (1 << 31)
        found = next_good_batch(fd, state.position, segment.size, state.next_offset, highest, self._max_batch)
        end = found if found >= 0 else segment.size
        self._quarantine.keep(self._name, segment.path, fd, state.position, end, EXPLANATION.get(state.reason, ""))
        if found < 0:
            return state, False
        base = int.from_bytes(files.read_at(fd, 8, found), "big")
        if base > state.next_offset:
            self._note_corrupt(state.next_offset, base, EXPLANATION.get(Reason(state.reason), "damaged"))
        return state._replace(position=found, next_offset=base), True

    def _truncate_tail(self, segment: Segment, state: ScanState) -> None:
        torn = segment.size - state.position
        kept = self._quarantine.keep(self._name, segment.path, segment.fd, state.position, segment.size, "torn tail")
        segment.size = segment.allocated_end = state.position
        self._torn += torn
        if kept < torn:
            # Nothing is removed that is not safe elsewhere: the file stays as it is, the log continues in another one.
            self._leave_tail = True
            log.error("%s: the last %d bytes of %s are left in place", self._name, torn, segment.path.name)
            return
        files.truncate(segment.fd, state.position)
        log.warning(
            "%s: removed %d bytes after offset %d, incomplete when the node stopped (%s); they are kept in quarantine",
            self._name,
            torn,
            state.next_offset - 1,
            EXPLANATION.get(state.reason, "incomplete"),
        )

    def _seal(self, segments: list[Segment], state: ScanState) -> None:
        """End the active segment; another one follows. One of which nothing is left goes."""
        active = segments[-1]
        files.sync_file(active.fd)
        active.size, active.end_offset, active.end_chain = state.position, state.next_offset, self._chain(state)
        if active.base == state.next_offset:
            active.path = files.rename_suffix(active.path, ".torn")
            segments.pop().close()

    def _begin(self, base: int, checkpoint: Checkpoint | None) -> RecoveredLog:
        state = walk_start(self._identity.log_start, self._identity.chain, epoch=self._identity.epoch)
        if base > state.next_offset:
            self._note_corrupt(state.next_offset, base, "every segment is missing")
            state = self._after_damaged_tail(base, checkpoint, state)
        active = self._create(base, self._chain(state))
        active.close()
        return RecoveredLog([active], base, self._chain(state), self._identity.epoch, self._corrupt_ranges, 0)

    def _create(self, base: int, chain: int) -> Segment:
        path = segment_path(self._directory, base)
        return Segment(path, base, base_chain=chain, fd=files.create_log(path))

    def _note_corrupt(self, first: int, end: int, why: str) -> None:
        """What lies in a gap was never there."""
        for gap in [*self._identity.gaps, LogGap(end, end, 0)]:
            if first < min(gap.first, end):
                self._corrupt_ranges.append(CorruptRange(first, min(gap.first, end)))
                log.error("%s: offsets %d to %d are damaged: %s", self._name, first, min(gap.first, end) - 1, why)
            first = max(first, gap.next)
