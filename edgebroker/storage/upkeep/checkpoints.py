"""Noting durable facts about logs in the metadata: checkpoints, producer windows, sealed segments, corrupt ranges.

They ride on the next metadata transaction; nothing waits for it here. A log that is being rewritten gets no
checkpoint: it would certify bytes that are about to be removed.
"""

from __future__ import annotations

from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.metadata.meta_db import SegmentRow, Windows
from edgebroker.storage.metadata.metadata import Metadata

PRODUCER_STATE_BYTES = 8 << 20
PRODUCER_STATE_SECONDS = 5.0


class Checkpoints:
    """Owned by the loop thread."""

    def __init__(self, scheduler: Scheduler, metadata: Metadata) -> None:
        self._scheduler, self._metadata = scheduler, metadata

    def checkpoint(self, partition: PartitionLog) -> None:
        """The durable end moved: note it, with the producer window when that is due."""
        if partition.rewriting:
            return
        key = (partition.topic, partition.partition)
        self._metadata.changes.checkpoints[key] = partition.checkpoint()
        partition.checkpointed = partition.durable_end
        if partition.stage.producer_count:
            since, bytes_in = partition.windows_noted
            late = self._scheduler.now() - since > PRODUCER_STATE_SECONDS
            if late or partition.bytes_in - bytes_in > PRODUCER_STATE_BYTES:
                self.store_window(partition)
        self._metadata.touch()

    def store_window(self, partition: PartitionLog) -> None:
        """Note what is remembered of each producer: with it a restart recognises duplicates."""
        now = self._scheduler.now()
        partition.windows_noted = (now, partition.bytes_in)
        below = partition.durable_end
        producers = [
            (producer, epoch, now - seen, entries) for producer, epoch, seen, entries in partition.stage.dump(below)
        ]
        self._metadata.changes.windows[partition.topic, partition.partition] = Windows(below, producers)

    def note_segment(self, partition: PartitionLog, segment: Segment) -> None:
        """Note what a sealed segment is now, so that a restart need not read its index."""
        self._metadata.changes.segments[partition.topic, partition.partition, segment.base] = SegmentRow(
            segment.end_offset,
            segment.size,
            segment.base_chain,
            segment.end_chain,
            segment.max_timestamp,
            segment.sealed_ms,
        )
        self._metadata.touch()

    def forget_segment(self, partition: PartitionLog, segment: Segment) -> None:
        """Forget a segment; with what changes next."""
        self._metadata.changes.segments[partition.topic, partition.partition, segment.base] = None

    def file_lost(self, partition: PartitionLog, segment: Segment) -> None:
        """The file of a sealed segment is gone: its records are damaged."""
        partition.file_lost(segment)
        self.forget_segment(partition, segment)
        self.corrupt_ranges_changed(partition)

    def corrupt_ranges_changed(self, partition: PartitionLog) -> None:
        """Note the corrupt ranges as they are now."""
        self._metadata.changes.corrupt_ranges[partition.topic, partition.partition] = list(partition.corrupt_ranges)
        self._metadata.touch()
