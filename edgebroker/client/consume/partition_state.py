"""What a consumer knows about one partition, and what its I/O thread passes to the thread that polls."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.messages import NO_LOG_ID, Holding, Wanted
from edgebroker.common.types import Start, TopicPartition
from edgebroker.network.wire.frames import Deliver, Reset


class PartitionState:
    """How far this consumer is in one partition.

    acked <= handed_out <= expected: acknowledged, handed to the caller, received. `awaiting` is the SUBSCRIBE whose
    answer must come before anything of the partition counts again (-1: not sent yet). `leaving`: the broker is revoking
    the partition, `revoking`: and still waits for what was handed out. `kept`: the position is the caller's own and
    wins over the committed offset of the group. `handed_out_of`: log id and epoch of what was handed out last.
    `applied` is what the caller says that readers see, `applied_sent` what the broker was told of it. `skipped` are
    ranges without a record for the handler; they are acknowledged together with the last record before them.
    """

    __slots__ = (
        "acked", "applied", "applied_sent", "asked", "awaiting", "epoch", "expected", "generation", "handed_out",
        "handed_out_of", "held", "kept", "lease", "leaving", "log_id", "old_lease", "parked", "paused", "refreshing",
        "resuming", "revoking", "skipped", "stored", "wanted",
    )  # fmt: skip

    def __init__(self, wanted: Wanted | None = None) -> None:
        self.wanted = wanted
        self.kept = wanted is not None and wanted.start is Start.POSITION
        self.log_id, self.epoch = (wanted.log_id, wanted.epoch) if wanted is not None else (NO_LOG_ID, -1)
        self.handed_out_of = (NO_LOG_ID, -1)
        self.generation = self.lease = 0
        self.old_lease = (0, 0)
        self.refreshing = False
        self.acked = self.handed_out = self.expected = self.stored = -1
        self.applied = self.applied_sent = -1
        self.awaiting = self.asked = 0
        self.held = self.leaving = self.resuming = self.revoking = self.paused = False
        self.skipped: deque[tuple[int, int]] = deque()
        self.parked: deque[ReceivedDelivery] = deque()

    def end_lease(self) -> None:
        """Nothing that was delivered under the lease counts any more."""
        if self.lease:
            self.old_lease = (self.generation, self.lease)
        self.lease = 0
        self.skipped.clear()
        self.parked.clear()


@dataclass(slots=True)
class ReceivedDelivery:
    """One DELIVER, not decoded yet, and when it was received."""

    partition: TopicPartition
    deliver: Deliver
    batches: bytes
    received_at: float


@dataclass(slots=True)
class AssignmentChange:
    """A partition was assigned, is being revoked, or was revoked; `late`: after a REVOKING that was not obeyed."""

    holding: Holding
    partition: TopicPartition
    late: bool = False


Incoming = ReceivedDelivery | AssignmentChange | Reset | EdgeBrokerError
