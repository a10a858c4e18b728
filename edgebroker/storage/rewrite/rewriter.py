"""Changing what a log already holds: truncate it, recreate it, repair a corrupt range.

    truncate, recreate   checkpoint withdrawn, durably -> files changed on the commit thread -> state taken over -> done
    repair               good bytes put in place on the commit thread -> state taken over -> stored -> done

One of them at a time for a log; `rewriting` keeps everything else off its files meanwhile. A log with staged records is
not truncated or recreated: the caller tries again. A repair changes sealed segments only.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.engine import EngineListener
from edgebroker.storage.identity import change_identity, read_identity
from edgebroker.storage.log.corrupt_ranges import RepairResult, repair_target, take_repaired
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.recovery import RecoveredLog
from edgebroker.storage.metadata.metadata import Metadata
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.rewrite.repair import repair_segment
from edgebroker.storage.rewrite.truncate import recreate_log, truncate_log
from edgebroker.storage.types import Change, Checkpoint, Identity
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

        def forget(old: Identity) -> Identity:
            """A snapshot that does not end before is not complete any more."""
            return replace(old, snapshot=(-1, -1)) if old.snapshot[1] > offset else old

        def work() -> tuple[Identity, RecoveredLog]:
            identity = change_identity(partition.directory, forget)
            return identity, truncate_log(partition.directory, identity, offset, self._quarantine, wall_ms)

        self._rewrite(partition, work, done)

    def recreate(self, partition: PartitionLog, change: Change, done: Done) -> None:
        """Start a log again with a changed identity."""
        wall_ms = self._clock.wall_ms()

        def work() -> tuple[Identity, RecoveredLog]:
            identity = change(read_identity(partition.directory))
            return identity, recreate_log(partition.directory, identity, self._quarantine, wall_ms)

        self._rewrite(partition, work, done)

    def _rewrite(self, partition: PartitionLog, work: Work, done: Done) -> None:
        if not partition.quiet:
            done(Outcome.OVERLOADED, f"{partition.name}: something else is being stored; try again in a moment")
            return
        partition.rewriting = partition.rolling = True

        def finished(result: object) -> None:
            partition.rewriting = partition.rolling = False
            if not isinstance(result, tuple):
                done(Outcome.READ_ONLY, f"{partition.name} cannot be rewritten: {result}")
                return
            for segment in partition.rewritten(*result):
                segment.retire()
                self._checkpoints.forget_segment(partition, segment)
            self._checkpoints.corrupt_ranges_changed(partition)
            self._checkpoints.checkpoint(partition)
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
                done(-1, str(result))
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
