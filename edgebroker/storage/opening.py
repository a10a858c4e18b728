"""Opening the logs of a data directory: identity, recovery, what meta.db remembers, duplicates.

Blocking; runs before the node listens. One partition that cannot be opened takes its topic out of service until the
next start, with a reason; it never keeps the others from being served.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

from msgspec.structs import replace

from edgebroker.common.batch import STORED_BATCH_BYTES
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import DamagedDataError
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import DEAD_LETTERS, TopicSettings
from edgebroker.storage import files
from edgebroker.storage.identity import change_identity, read_identity, write_identity
from edgebroker.storage.log.aside import finish_rewrite
from edgebroker.storage.log.index import SealedIndex, read_index
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.recovery import RecoveredLog, Recovery
from edgebroker.storage.log.segment import SUFFIX, Segment
from edgebroker.storage.log.staging import Stage
from edgebroker.storage.log.walk import next_good_batch
from edgebroker.storage.metadata.meta_db import MetaState, SegmentRow
from edgebroker.storage.quarantine import Quarantine
from edgebroker.storage.types import UNKNOWN_CHAIN, Identity, begin_history, make_identity

log = logging.getLogger(__name__)

REPLAY_BYTES = 64 << 20
REPLAY_PIECE_BYTES = 1 << 20


class Opener:
    """Makes PartitionLogs, from what is on the disk or from a topic that was just created.

    `limits`: (largest batch, largest record, batches remembered per producer) for the stages. `unserved`: topics that
    could not be opened, with the reason.
    """

    def __init__(
        self,
        topics: Path,
        node_uid: str,
        quarantine: Quarantine,
        scheduler: Scheduler,
        clock: Clock,
        *,
        limits: tuple[int, int, int],
        segment_bytes: int,
    ) -> None:
        self._topics, self._node_uid, self._quarantine = topics, node_uid, quarantine
        self._scheduler, self._clock = scheduler, clock
        self._limits, self._segment_bytes = limits, segment_bytes
        self.unserved: dict[str, str] = {}

    def open_topic(self, path: Path, state: MetaState, opened: Callable[[], None] = lambda: None) -> list[PartitionLog]:
        """The partitions of a topic in order; none when it cannot be served (then `unserved` says why). `opened` is
        called after each of them: it may take a while."""
        logs: dict[int, PartitionLog] = {}
        for directory in path.iterdir():
            if directory.name.isdigit() and directory.is_dir():
                number = int(directory.name)
                try:
                    recovered = self._open_partition(path.name, number, directory, state)
                except OSError as error:
                    log.error("%s/%d cannot be read or written: %s", path.name, number, error)
                    self.unserved[path.name] = files.reason(error)
                    continue
                opened()
                if recovered is not None:
                    logs[number] = recovered
        wanted = max((found.settings.partitions for found in logs.values()), default=0)
        if sorted(logs) != list(range(len(logs))) or len(logs) < wanted:
            for found in logs.values():
                found.close()
            touched = any(found.size_bytes or found.durable_end for found in logs.values())
            touched = touched or any((path.name, number) in state.checkpoints for number in logs)
            if not touched and path.name not in self.unserved:
                log.warning("topic %s: incomplete, never acknowledged; ignored", path.name)
                return []
            why = self.unserved.setdefault(path.name, f"{len(logs)} of {wanted} partitions were found")
            log.error("topic %s is not served: %s", path.name, why)
            return []
        return [logs[number] for number in sorted(logs)]

    def _open_partition(self, topic: str, number: int, directory: Path, state: MetaState) -> PartitionLog | None:
        key, name = (topic, number), f"{topic}/{number}"
        checkpoint = state.checkpoints.get(key)
        try:
            finish_rewrite(directory, self._clock.wall_ms())
            identity = read_identity(directory)
        except (FileNotFoundError, DamagedDataError) as error:
            sizes = [path.stat().st_size for path in directory.iterdir() if path.suffix == SUFFIX]
            began = any(sizes) or (sizes and isinstance(error, DamagedDataError))
            if not began and checkpoint is None:
                return None  # incomplete, never acknowledged
            log.error("%s: %s; the identity is created again", name, error)
            identity = make_identity(self._node_uid, TopicSettings())
            if checkpoint is not None:
                log_id = checkpoint.log_id
                identity = replace(
                    identity, log_id=log_id, epochs=[(checkpoint.epoch, 0)], chain=crc32c(bytes.fromhex(log_id))
                )
            write_identity(directory, identity)
        groups = [
            offset.next_offset
            for group_key, offset in state.group_offsets.items()
            if group_key[1:] == key and offset.log_id == identity.log_id
        ]
        # Those of another history do not count: what was lost then is not missed now.
        children = [
            position.offset
            for position in state.children.get(key, {}).values()
            if position.log_id == identity.log_id and identity.contains(position.epoch, position.offset)
        ]
        watermark = max([*groups, *children], default=-1)
        if identity.origin != self._node_uid:
            watermark = -1  # what a replica lost at its end it gets again; an offset beyond it waits
        recovery = Recovery(directory, identity, self._quarantine, max_batch=STORED_BATCH_BYTES, name=name)
        recovered = recovery.run(checkpoint, watermark)
        self._describe(recovered.segments, state.segments.get(key, {}), identity)
        partition = self.make_log(topic, number, identity, recovered)
        for corrupt in state.corrupt_ranges.get(key, []):
            if identity.log_start < corrupt.next <= recovered.next_offset:  # else it was of what is not there any more
                partition.add_corrupt_range(corrupt)
        windows = state.windows.get(key)
        now = self._scheduler.now()
        if windows is not None:
            partition.stage.load([(pid, epoch, now - age, entries) for pid, epoch, age, entries in windows.producers])
        _replay_producers(partition, windows.below if windows is not None else -1, now)
        return partition

    def reopen(self, topic: str, number: int, directory: Path) -> tuple[Identity, RecoveredLog]:
        """What is in a partition directory that another store has closed, on the commit thread. Raises OSError,
        DamagedDataError."""
        identity = read_identity(directory)
        recovery = Recovery(
            directory, identity, self._quarantine, max_batch=STORED_BATCH_BYTES, name=f"{topic}/{number}"
        )
        recovered = recovery.run(None, -1)
        self._describe(recovered.segments, {}, identity)
        return identity, recovered

    def _describe(self, segments: list[Segment], rows: dict[int, SegmentRow], identity: Identity) -> None:
        for segment in segments[:-1]:
            self._describe_sealed(segment, rows.get(segment.base), identity)
        _link_chains(segments, identity)

    def _describe_sealed(self, segment: Segment, row: SegmentRow | None, identity: Identity) -> None:
        """What meta.db or else the index says; a segment that neither knows counts as sealed now (never too early)."""
        if row is not None and (row.size, row.end_offset) == (segment.size, segment.end_offset):
            known: SegmentRow | SealedIndex | None = row
        else:
            known = read_index(segment.path, identity.log_id_bytes, segment.base, segment.size)
        if known is not None and known.end_offset == segment.end_offset:
            segment.base_chain, segment.end_chain = known.base_chain, known.end_chain
            segment.max_timestamp, segment.sealed_ms = known.max_timestamp, known.sealed_ms
        segment.sealed_ms = segment.sealed_ms or self._clock.wall_ms()

    def make_log(self, topic: str, number: int, identity: Identity, recovered: RecoveredLog) -> PartitionLog:
        limits = self._limits
        if topic.endswith(DEAD_LETTERS):
            # A dead letter is a record with its reason in headers: it must fit whatever the limit of a record is.
            limits = (STORED_BATCH_BYTES, STORED_BATCH_BYTES, 1)
        if identity.origin != self._node_uid:
            # What its origin took, a replica takes; it comes to a newer history only by its records.
            limits = (STORED_BATCH_BYTES, STORED_BATCH_BYTES, limits[2])
            recovered = recovered._replace(epoch=identity.epoch_at(recovered.next_offset))
        stage = Stage(recovered.next_offset, recovered.epoch, *limits)
        return PartitionLog(
            topic,
            number,
            self._topics / topic / str(number),
            identity,
            recovered,
            stage,
            max_batch=STORED_BATCH_BYTES,
            segment_bytes=identity.settings.segment_bytes or self._segment_bytes,
            born=self._scheduler.now(),
        )


def _link_chains(segments: list[Segment], identity: Identity) -> None:
    """A segment begins with the chain that the one before it ends with."""
    if segments[0].base == identity.log_start:
        segments[0].base_chain = identity.chain
    for before, segment in pairwise(segments):
        gap = identity.gap_before(segment.base)
        if gap is not None:
            segment.base_chain = gap.chain
        elif segment.base_chain == UNKNOWN_CHAIN and before.end_offset == segment.base:
            segment.base_chain = before.end_chain


def _replay_producers(partition: PartitionLog, below: int, now: float) -> None:
    """Bring the producer windows up to the end of the log; without a stored state, from the last 64 MiB on."""
    if below >= partition.durable_end:
        return
    covered = 0
    for rank in range(len(partition.segments) - 1, -1, -1):
        segment = partition.segments[rank]
        covered += segment.size
        if (below >= 0 and segment.base <= below) or covered >= REPLAY_BYTES:
            break
    for segment in partition.segments[rank:]:
        fd = segment.fd if segment.fd >= 0 else files.open_log(segment.path)
        try:
            position, length = 0, REPLAY_PIECE_BYTES
            while position < segment.size:
                data = files.read_at(fd, min(length, segment.size - position), position)
                used = partition.stage.replay(data, now, below)
                if used:
                    position, length = position + used, REPLAY_PIECE_BYTES
                elif length <= STORED_BATCH_BYTES and position + len(data) < segment.size:
                    length = STORED_BATCH_BYTES + 1
                else:
                    # Damage: what follows it was acknowledged as well.
                    position = next_good_batch(fd, position, segment.size, segment.base, 1 << 62, STORED_BATCH_BYTES)
                    if position < 0:
                        break
        except OSError as error:
            log.warning("%s: duplicates are not recognised after an unreadable position: %s", partition.name, error)
        finally:
            if segment.fd < 0:
                files.close(fd)


def raise_epochs(logs: list[PartitionLog], producers: dict[str, tuple[int, int]]) -> None:
    """A record can be older on the disk than its producer's grant, which is stored after the answer: a client that
    comes again under that name must get a newer epoch than any in the logs, or is fenced by its own past."""
    clients = {producer_id: client for client, (producer_id, _) in producers.items()}
    for partition in logs:
        for producer_id, epoch in partition.stage.epochs().items():
            client = clients.get(producer_id)
            if client is not None and producers[client][1] < epoch:
                producers[client] = (producer_id, epoch)


def begin_histories(logs: list[PartitionLog], node_uid: str, *, accepted: bool) -> None:
    """After a restore: what this node wrote after the copy is lost, and others may have it; `accepted`: that is given
    up. Durably, before anything is appended."""

    def begin(old: Identity, end: int) -> Identity:
        return replace(begin_history(old, end), restored=not accepted)

    for partition in logs:
        if partition.identity.origin == node_uid:
            end = partition.durable_end
            identity = change_identity(partition.directory, partial(begin, end=end))
            partition.identity, partition.epoch = identity, identity.epoch
            partition.stage.resume(end, identity.epoch)
    log.warning("restored from a copy: every log of this node continues in a new history")
