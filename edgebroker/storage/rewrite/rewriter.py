"""Changing what a log already holds: truncate it, recreate it, continue it behind a gap, repair a corrupt range.

    truncate, recreate, skip   checkpoint withdrawn, durably -> files changed on the commit thread -> state taken over
    repair                     good bytes put in place on the commit thread -> state taken over -> stored -> done

One of them at a time for a log; `rewriting` keeps everything else off its files meanwhile. A log with staged records is
not truncated, recreated or skipped: the caller tries again. A repair changes sealed segments only.
"""

from __future__ import annotations

from collections.abc import Callable

from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.storage import files
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.engine import EngineListener
from edgebroker.storage.identity import read_identity
from edgebroker.storage.log.corrupt_ranges import RepairResult, repair_target, take_repaired
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.recovery import RecoveredLog
from edgebroker.storage.metadata.metadata import Metadata
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.rewrite.repair import repair_segment
from edgebroker.storage.rewrite.truncate import recreate_log, skip_log, truncate_log
from edgebroker.storage.types import Change, Checkpoint, Identity, LogGap
from edgebroker.storage.upkeep.checkpoints import Checkpoints
from edgebroker.storage.upkeep.scrub import Scrub

# Belongs to no log: certifies nothing.
NO_CHECKPOINT = Checkpoint("", 0, 0, 0, 0, 0, 0)

Work = Callable[[], tuple[Identity, RecoveredLog]]


class Rewriter:
    """Owned by the loop thread."""

    def __init__(
        self,
        clock: Clock,
        committer: Committer,
        metadata: Metadata,
        checkpoints: Checkpoints,
        scrub: Scrub,
        quarantine: Quarantine,
        listener: EngineListener,
    ) -> None:
        self._clock, self._committer, self._metadata = clock, committer, metadata
        self._checkpoints, self._scrub = checkpoints, scrub
        self._quarantine, self._listener = quarantine, listener

    def truncate(self, partition: PartitionLog, offset: int, done: Done) -> None:
        """End a log at a batch boundary below its end."""
        wall_ms = self._clock.wall_ms()
        self._rewrite(
            partition, lambda: truncate_log(partition.directory, offset, self._quarantine, wall_ms), done
        )  # fmt: skip

    def recreate(self, partition: PartitionLog, change: Change, done: Done) -> None:
        """Start a log again with a changed identity."""
        wall_ms = self._clock.wall_ms()

        def work() -> tuple[Identity, RecoveredLog]:
            identity = change(read_identity(partition.directory))
            return identity, recreate_log(partition.directory, identity, self._quarantine, wall_ms)

        self._rewrite(partition, work, done)

    def skip(self, partition: PartitionLog, offset: int, chain: int, done: Done) -> None:
        """Continue a log behind a gap from its end to an offset."""
        wall_ms, gap = self._clock.wall_ms(), LogGap(partition.durable_end, offset, chain)
        self._rewrite(partition, lambda: skip_log(partition.directory, gap, self._quarantine, wall_ms), done)

    def _rewrite(self, partition: PartitionLog, work: Work, done: Done) -> None:
        if not partition.quiet:
            done(Outcome.OVERLOADED, f"{partition.name}: something else is being stored; try again in a moment")
            return
        partition.rewriting = partition.rolling = True

        def finished(result: object) -> None:
            partition.rewriting = partition.rolling = False
            if not isinstance(result, tuple):
                done(*files.refusal(f"{partition.name} cannot be rewritten", result))
                return
            for segment in partition.rewritten(*result):
                segment.retire()
                self._checkpoints.forget_segment(partition, segment)
            self._checkpoints.corrupt_ranges_changed(partition)
            self._checkpoints.checkpoint(partition)
            if len(partition.segments) > 1:
                self._checkpoints.note_segment(partition, partition.segments[-2])  # sealed now, perhaps
            self._scrub.verify_log(partition)
            self._listener.on_rewritten(partition)
            done(Outcome.OK, "")
            self._listener.on_topic(partition.topic)

        # The last checkpoint certifies what is removed.
        self._metadata.changes.checkpoints[partition.topic, partition.partition] = NO_CHECKPOINT
        self._metadata.touch(lambda: self._committer.call(work, finished))

    def repair(self, partition: PartitionLog, data: bytes, done: Callable[[int, str], None]) -> None:
        """Put verified batches into the first corrupt range; one in the active segment waits until that is sealed."""
        target = repair_target(partition)
        if target is None or partition.rewriting:
            done(-1, f"{partition.name}: the corrupt range is in the active segment; try again in a moment")
            self._committer.seal(partition)
            return
        refusal = self._committer.refusal()
        if refusal is not None:
            done(-1, f"{partition.name}: {refusal[1]}")
            return
        partition.rewriting = True

        def finished(result: object) -> None:
            partition.rewriting = False
            self._checkpoints.checkpoint(partition)
            if not isinstance(result, RepairResult):
                self._listener.on_rewritten(partition)
                done(-1, files.reason(result))
                return
            for segment in take_repaired(partition, target, result, self._clock.wall_ms()):
                segment.retire()
            for segment in {partition.segment_of(result.base), partition.segment_of(target.base)}:
                self._checkpoints.note_segment(partition, segment)
                self._scrub.verify(partition, segment)
            self._checkpoints.corrupt_ranges_changed(partition)
            self._listener.on_rewritten(partition)
            self._listener.on_topic(partition.topic)
            # Until it is stored that the range is whole again, a crash would bring it back.
            self._metadata.touch(lambda: done(result.next_offset, ""))

        self._committer.call(lambda: repair_segment(target, data), finished)
