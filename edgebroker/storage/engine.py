"""What the broker asks of a storage engine, one protocol for each kind of reader. Implementations are beside it:
storage/store.py (segments on a disk) and storage/memory.py (a process's life long).

Threads: every method is called on the loop thread, and every callback comes back there, never from within the call that
asked for it unless said so. No method waits for the disk, except open() and close().
Durability: what a callback with Outcome.OK reports is on stable storage, as far as the engine has any.
Errors: a method raises only for a caller's mistake; what can go wrong at run time comes back as a Code with a reason.
What an engine cannot do it says as data: `mirrors`, `remover` and `replacements` are None then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from edgebroker.common.histogram import Histogram
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage.metadata.granted import GrantedProducers
from edgebroker.storage.settings import StoreSettings
from edgebroker.storage.types import (
    Appended,
    ChainPoint,
    Change,
    Children,
    ColdRead,
    CorruptRange,
    DeletedTopic,
    DiskState,
    DurableChunk,
    EngineStatus,
    FileSlice,
    Found,
    GroupKey,
    GroupOffset,
    Identity,
    LogInventory,
    LogStatus,
    ResyncRow,
    StoredFile,
    Tombstone,
)


class Log(Protocol):
    """One partition, as the loop sees it: plain state, always current, never blocking."""

    topic: str
    partition: int
    name: str
    """topic/partition, for messages."""
    identity: Identity
    epoch: int
    """The history of the last durable record."""
    written_end: int
    """Next offset after what is in the page cache: it survives the process."""
    durable_end: int
    """Next offset after what is synced, the high watermark: readers get nothing from there on."""
    corrupt_ranges: list[CorruptRange]
    """In order, not overlapping."""
    records_in: int
    bytes_in: int
    """What was appended since the start."""
    chain: int
    """The header chain checksum before written_end; UNKNOWN_CHAIN after a corrupt range."""
    rewriting: bool
    """Its files are being truncated, recreated or repaired: nothing may be decided by them now."""

    @property
    def log_start(self) -> int:
        """The first offset that is stored."""

    @property
    def staged_end(self) -> int:
        """The offset that the next record will get."""

    @property
    def staged_epoch(self) -> int:
        """The history of the last record before staged_end."""

    @property
    def settings(self) -> TopicSettings:
        """Of its topic."""

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""

    def find(self, offset: int, max_bytes: int, max_records: int, hint: tuple[int, int] | None = None) -> Found:
        """What to send to a reader that is at `offset`: the batch that holds it, and as many of the next ones as fit
        into max_bytes and begin before offset + max_records. `hint` is FileSlice.next_hint of the slice that ended
        here."""

    def end_hint(self) -> tuple[int, int] | None:
        """The hint of a reader that has everything; None when hints are of no use."""

    def to_repair(self) -> tuple[int, int]:
        """The offsets [first, next) to be fetched first: the first corrupt range, or a part of it. There is one."""

    def chain_at(self, offset: int) -> int | None:
        """The header chain checksum before an offset; None where only the disk knows it."""

    def damaged_before(self, offset: int) -> bool:
        """True when corruption keeps this node from knowing the chain before an offset."""

    @property
    def records(self) -> int:
        """How many offsets from the start to the durable end are not in a gap."""

    def bytes_from(self, offset: int) -> int:
        """Stored bytes from an offset on, to an index point."""

    def held_bytes(self, offset: int) -> int:
        """Bytes of sealed segments that who is at `offset` has not passed."""

    def status(self) -> LogStatus:
        """For the admin interface."""


class EngineListener(Protocol):
    """Told, on the loop, what became of staged batches."""

    def on_opening(self, done: int, topics: int) -> None:
        """While the engine is being opened: so many of the topics are open, and one more log of the next one."""

    def on_written(self, log: Log) -> None:
        """written_end moved."""

    def on_durable(self, log: Log, chunks: Sequence[DurableChunk]) -> None:
        """durable_end moved, by these chunks, in order."""

    def on_failed(self, log: Log, outcome: Outcome, message: str) -> None:
        """What is staged above written_end is gone: it was not stored."""

    def on_topic(self, name: str) -> None:
        """A topic was created, or the identity of its logs changed: settings, histories, where they begin."""

    def on_rewritten(self, log: Log) -> None:
        """A log was truncated, recreated or repaired: no reader is where it was."""

    def retention_pin(self, log: Log) -> int | None:
        """The offset from which on nothing may be removed now; None: retention decides."""

    def retention_floor(self, log: Log) -> int | None:
        """The offset that everybody has passed who holds back what is removed early; None when nobody has read it."""

    def on_full(self) -> bool:
        """Producers are refused, and nothing more can be removed: somebody who held records back may be given up. True
        when somebody was."""


class LogReader(Protocol):
    """Stored batches and facts about them, beyond what Log.find() gives at once."""

    def read_cold(self, log: Log, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None:
        """Read verified batches through the disk, from the one that holds `offset` on: about max_bytes, and at least
        one batch. `offset` is in [log_start, durable_end). `done` gets the batches, or why there are none."""

    def read_cached(self, piece: FileSlice) -> bytes | None:
        """The bytes of a slice, when all of them are in the page cache; else None. Does not wait."""

    def load_range(self, file: StoredFile, position: int, length: int, done: Callable[[bytes, str], None]) -> None:
        """Read stored bytes that left the page cache while they were being sent: done(data, error). The caller holds
        the file."""

    def live_from(self, log: Log) -> int:
        """The first offset that the topic's time to live leaves; log_start without one."""

    def age_ms(self, log: Log, next_offset: int) -> int:
        """An age at this node, in milliseconds, that every record before next_offset has reached."""

    def chains(self, log: Log, offsets: Sequence[int], done: Callable[[list[ChainPoint], str], None]) -> None:
        """For each offset the first batch boundary at or after it, with the chain there, as far as that is known:
        done(points, error), perhaps from within the call."""

    def offset_at_time(self, log: Log, timestamp: int, done: Callable[[int, str], None]) -> None:
        """The first offset whose record is not older than `timestamp` (ms since 1970; the end when all are):
        done(offset, error), perhaps from within the call."""


class LogWriter(Protocol):
    """Appending. Nothing is stored when append() returns: the listener tells."""

    def refusal(self, *, spare: bool = False) -> tuple[Outcome, str] | None:
        """Why publishing is refused now; None when it is not. `spare`: with what is kept for snapshots of tables, which
        make room (DiskState.spare)."""

    def append(
        self, log: Log, data: memoryview, spans: bytes, level: AckLevel, inflated: bool, producer_id: int
    ) -> Appended:
        """Number and stage the batches of a run of PUBLISH frames (common/spans.py). Fewer frames than given are
        handled when the next one is compressed and `inflated` does not say that it was checked. `producer_id` is the
        one that the sender was granted (-1: none): batches with another one are FENCED."""

    def append_numbered(self, log: Log, data: memoryview) -> tuple[int, int]:
        """Stage batches that carry their offsets (a replica): (bytes taken, the Reason why not more)."""

    @property
    def staged_bytes(self) -> int:
        """What waits for the disk, over all partitions."""

    @property
    def staged_at(self) -> float:
        """Within on_durable(): when the first batch of what is durable now was staged, in monotonic seconds."""


class TopicStore(Protocol):
    """Which topics there are, and what their logs are."""

    def topics(self) -> Iterable[str]:
        """The names of all topics."""

    def log(self, topic: str, partition: int) -> Log | None:
        """None when there is none."""

    def logs(self) -> Iterable[Log]:
        """All logs of all topics."""

    def partitions(self, topic: str) -> list[Log]:
        """The logs of a topic, in order; empty when there is none."""

    def create_topic(self, name: str, settings: TopicSettings, done: Done) -> None:
        """Create a topic that this node writes; durable when done is called. NAME_CLASH: it exists, DISK_FULL,
        READ_ONLY, OVERLOADED: one of that name is being deleted. May call back from within."""

    def alter_topic(self, name: str, settings: TopicSettings, done: Done) -> None:
        """Replace the settings of every partition; durable when done is called. READ_ONLY."""

    def change_identities(self, name: str, changes: Sequence[Change], done: Done) -> None:
        """Change the identities of a topic's partitions, one function for each; durable when done is called.
        READ_ONLY. The functions run on another thread; they must not touch anything shared."""

    def complete_snapshot(self, log: Log, first: int, next_offset: int, done: Done) -> None:
        """Note durably that [first, next_offset) is a complete table snapshot: retention stops there. READ_ONLY."""

    @property
    def tombstones(self) -> Mapping[str, Tombstone]:
        """Logs that were deleted, by log id."""


class GroupStore(Protocol):
    """Small things that outlive a restart: committed offsets, producers, children. What is granted to a producer is
    durable as commit_offset()."""

    @property
    def producers(self) -> GrantedProducers: ...

    def group_offsets(self) -> dict[GroupKey, GroupOffset]:
        """Every committed offset, as stored last."""

    def commit_offset(self, key: GroupKey, offset: GroupOffset | None) -> None:
        """Store a committed offset, or with None forget it; durable within 50 ms, when_stored() tells when."""

    def when_stored(self, callback: Callable[[], None]) -> None:
        """Call back once everything committed so far is durable; perhaps from within."""

    def children(self) -> Children:
        """What the children of this node had in an earlier run."""

    def store_children(self, children: Children) -> None:
        """Remember that, for the next run; durable by the end of close()."""


class MirrorStore(Protocol):
    """Logs that another node writes, and the node's own level in the tree."""

    level: str
    """The configured level, or the one that the node was promoted to."""
    promoted: bool
    topology: list[str]
    """Where the registry said that parents are to be found, as stored last."""

    def store_topology(self, addresses: list[str]) -> None:
        """Remember that; durable as commit_offset()."""

    def change_level(self, level: str, promoted: bool, done: Done) -> None:
        """Remember the level; durable when done is called. READ_ONLY."""

    def create_mirror(self, name: str, identities: Sequence[Identity], done: Done) -> None:
        """Create the logs of a replicated topic, a partition for each identity, as create_topic()."""

    def truncate(self, log: Log, offset: int, done: Done) -> None:
        """End a log at a batch boundary below its end; what is removed is retained aside. Nothing of the log may be
        staged. Committed offsets and positions after it have to be moved and stored before: they would certify what
        is gone. OVERLOADED: something else is being stored, READ_ONLY."""

    def recreate(self, log: Log, change: Change, done: Done) -> None:
        """Start a log again with a changed identity: at a later offset, or as another log. As truncate()."""

    def skip(self, log: Log, offset: int, chain: int, done: Done) -> None:
        """Continue a log at an offset behind its end, where the header chain checksum is `chain`: what lies between is
        a gap, which its identity remembers; what it holds stays. As truncate(), without the committed offsets."""

    def repair(self, log: Log, data: bytes, done: Callable[[int, str], None]) -> None:
        """Put batches from a peer into the first corrupt range of a log, from its beginning on: done(offset up to which
        it is whole now, error); -1 with the error when nothing was done, perhaps from within. The data is verified
        before anything is replaced."""


class TopicRemover(Protocol):
    """Deleting topics, and taking them back."""

    def delete(
        self, name: str, tombstones: Mapping[str, Tombstone], gone: Callable[[Sequence[Log]], None], done: Done
    ) -> None:
        """Delete a topic: `gone` is called with its logs as soon as that is decided, durably; `done` when its name is
        free again. `tombstones` are remembered, by log id; without any the topic goes at this node alone. READ_ONLY,
        OVERLOADED."""

    def deleted_topics(self) -> list[DeletedTopic]:
        """Deleted topics whose files are still there, the oldest first."""

    def undelete(self, topic: str, name: str, done: Done) -> None:
        """Take back the last topic that was called `topic`, as `name`, with this node as its origin; durable when done
        is called. Under its own name it continues in a new history; under another it is another log. NOT_FOUND,
        NAME_CLASH, OVERLOADED, READ_ONLY, DISK_FULL."""

    def lift(self, topic: str, done: Done) -> None:
        """Forget that logs of a topic were deleted; durable when done is called. NOT_FOUND, READ_ONLY."""


class TopicReplacements(Protocol):
    """Exchanging the logs of a topic for a copy that was loaded beside them."""

    rows: list[ResyncRow]
    """What was remembered last."""

    def staging(self, resync_id: str) -> Path:
        """The directory in which the copy of a resync is made."""

    def drop_staging(self, keep: Callable[[str], bool]) -> None:
        """Remove the directories of resyncs that are over, those whose id is not to be kept; in the background."""

    def open_copy(self, resync_id: str, done: Callable[[MirrorEngine | None, str], None]) -> None:
        """Make the engine of a copy, or find it again, not opened yet: done(engine, error)."""

    def quiet(self, name: str) -> bool:
        """Is nothing of the topic staged, and nothing of it being rewritten?"""

    def remember(self, rows: list[ResyncRow], done: Callable[[str], None]) -> None:
        """Store which resyncs are under way: done(error), durable when that is ""."""

    def replace(self, name: str, staged: Path, done: Done) -> None:
        """Put the copy in the place of the topic's logs, in one durable step. READ_ONLY, OVERLOADED."""


class Engine(LogReader, LogWriter, TopicStore, GroupStore, Protocol):
    """All of it, with the engine's life."""

    node_uid: str
    """Of the node whose data this is: 32 hex digits, the same for ever."""

    @property
    def mirrors(self) -> MirrorEngine | None:
        """This engine, when it can hold replicas; else None."""

    @property
    def remover(self) -> TopicRemover | None:
        """None: topics stay until the process ends."""

    @property
    def replacements(self) -> TopicReplacements | None:
        """None: no copy can be loaded beside a topic."""

    def open(self, listener: EngineListener) -> None:
        """Recover what is stored. Blocks; before the loop runs. Raises what DataDirectory refuses."""

    def close(self, timeout: float, *, mark: bool = True) -> bool:
        """Store and release everything, for at most `timeout` seconds. True when the stop was clean. Without `mark` the
        next open() checks as after a crash."""

    def reconfigure(self, settings: StoreSettings) -> None:
        """Continue with other paces and limits, as far as the engine has them; what a log is opened with stays."""

    def flush(self) -> bool:
        """Store what is staged without waiting for intervals; True when nothing is left to do."""

    def inventory(self) -> list[LogInventory] | None:
        """The files that a backup copies; None for an engine that has none."""

    def latencies(self) -> dict[str, Histogram]:
        """Seconds that the disk took: `sync` for each sync, `append` from the first batch of a group to its end."""

    def disk(self) -> DiskState | None:
        """As measured last; None for an engine without a disk, and before the first measurement."""

    def problems(self) -> dict[str, str]:
        """What is wrong with the storage now, by name; empty when all is well."""

    def status(self) -> EngineStatus:
        """For the admin interface and the metrics."""


class MirrorEngine(Engine, MirrorStore, Protocol):
    """An engine that can hold what another node has originated."""
