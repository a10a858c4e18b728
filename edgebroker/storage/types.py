"""The plain data of the storage interface: what goes into an engine and what comes out of it. Nothing here does I/O."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from edgebroker.common.crc32c import crc32c
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import TopicSettings

GroupKey = tuple[str, str, int]
"""Group, topic, partition."""

UNKNOWN_CHAIN = -1
"""The header chain checksum of an offset after a corrupt range."""


REMEMBER_SECONDS = 30 * 24 * 3600.0
"""A child that was not seen for so long is forgotten."""


# ---- what a reader gets ----


class StoredFile(Protocol):
    """A file of stored batches. It stays open, and its bytes stay as they are, between hold() and release()."""

    fd: int
    base: int
    """The first offset in it."""

    def hold(self) -> None: ...
    def release(self) -> None: ...


class FileSlice(NamedTuple):
    """Whole stored batches that are in the page cache: bytes [position, position + length) of a file. The first batch
    holds `first_offset`. hold() the file before sending. `sealed`: the file does not grow any more."""

    file: StoredFile
    position: int
    length: int
    first_offset: int
    next_offset: int
    sealed: bool

    @property
    def next_hint(self) -> tuple[int, int]:
        """Where the batch at next_offset begins, for the next find(): (base of the file, position)."""
        return self.file.base, self.position + self.length


class Inline(NamedTuple):
    """Whole stored batches in memory."""

    data: memoryview
    first_offset: int
    next_offset: int


class NeedsDisk(NamedTuple):
    """The bytes are not in the page cache, or were not verified yet: read_cold() has to fetch them."""


class CorruptRange(NamedTuple):
    """Offsets [first, next) whose bytes fail their checksum."""

    first: int
    next: int


class LogGap(NamedTuple):
    """Offsets [first, next) that a replica never had: its parent had removed them when it came for them. `chain` is the
    header chain checksum before `next`."""

    first: int
    next: int
    chain: int


Found = FileSlice | Inline | NeedsDisk | CorruptRange | LogGap | None
"""The answer of Log.find(); None: the reader has everything that is durable."""


class ColdRead(msgspec.Struct):
    """The answer of read_cold(): whole verified batches, from the one that holds the wanted offset on.

    `corrupt` is set when the wanted offset is in a corrupt range; `error` when nothing could be read: the device
    refused (`unreadable`), the timeout came first (`timed_out`), or it works in a moment.
    """

    data: bytes = b""
    first_offset: int = -1
    next_offset: int = -1
    corrupt: CorruptRange | None = None
    error: str = ""
    timed_out: bool = False
    unreadable: bool = False

    @property
    def refusal(self) -> Outcome:
        """How to tell the error."""
        if self.timed_out:
            return Outcome.STORAGE_TIMEOUT
        return Outcome.DAMAGED if self.unreadable or self.corrupt is not None else Outcome.OVERLOADED


class DurableChunk(Protocol):
    """Numbered batches that have just become durable: a read-only buffer that lives as long as the object."""

    first_offset: int
    next_offset: int

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


class ChainPoint(NamedTuple):
    """A batch boundary, and the header chain checksum over everything before it."""

    offset: int
    chain: int


# ---- what a writer gets ----


class Appended(NamedTuple):
    """What became of a run of PUBLISH frames. `answers` are packed (common/spans.py), one for each of the `frames` that
    were handled; they are true once the log's end has passed `wait`. `records`: how many were new."""

    answers: bytes
    frames: int
    wait: int
    records: int


# ---- what is stored beside the records ----


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Which log this is. `epochs` are its histories, each with its first offset; `chain` is the header chain checksum
    at `log_start`; `snapshot` is where the newest complete table snapshot begins and ends (-1: there is none); `begun`
    is the first history that the origin began itself: the ones before are of the node that it took over from. `gaps`
    are in order; behind each of them a segment begins. `restored`: the newest history begins where a copy ended that
    was put back, and what others have beyond that was not given up yet."""

    log_id: str
    origin: str
    epochs: list[tuple[int, int]]
    log_start: int
    chain: int
    settings: TopicSettings
    snapshot: tuple[int, int] = (-1, -1)
    begun: int = 1
    gaps: list[LogGap] = []
    restored: bool = False

    @property
    def epoch(self) -> int:
        return self.epochs[-1][0]

    def epoch_at(self, offset: int) -> int:
        """The history that an offset belongs to."""
        return max((epoch for epoch, first in self.epochs if first <= offset), default=0)

    def gap_at(self, offset: int) -> LogGap | None:
        """The gap that an offset lies in."""
        return next((gap for gap in self.gaps if gap.first <= offset < gap.next), None) if self.gaps else None

    def gap_before(self, base: int) -> LogGap | None:
        """The gap after which the segment with this base begins."""
        return next((gap for gap in self.gaps if gap.next == base), None) if self.gaps else None

    def copied(self, end: int) -> Identity:
        """The identity that the copy had, when this log was restored from one and nothing was written since: it ends
        at `end`. Else this one."""
        written = not self.restored or len(self.epochs) < 2 or self.epochs[-1][1] != end
        return self if written else replace(self, epochs=self.epochs[:-1])

    def knows(self, epoch: int) -> bool:
        """Is that one of its histories?"""
        return any(known == epoch for known, _ in self.epochs)

    def contains(self, epoch: int, next_offset: int) -> bool:
        """True when a reader of that history could have come to next_offset by what this log holds: the history did
        not end before. An epoch of -1 is any; one that this log has not reached yet is no contradiction."""
        later = [first for known, first in self.epochs if known > epoch]
        return epoch < 0 or not later or next_offset <= min(later)

    @property
    def log_id_bytes(self) -> bytes:
        return bytes.fromhex(self.log_id)


Change = Callable[[Identity], Identity]
"""The identity that a log gets, from the one that it has."""


def make_identity(origin: str, settings: TopicSettings) -> Identity:
    """A new log of this node: a fresh log_id, epoch 1 from offset 0, the chain that begins with the log_id."""
    log_id = os.urandom(16)
    return Identity(
        log_id=log_id.hex(), origin=origin, epochs=[(1, 0)], log_start=0, chain=crc32c(log_id), settings=settings
    )


def begin_at(identity: Identity, offset: int, chain: int) -> Identity:
    """The identity of a log that begins at a later offset, with the header chain checksum there."""
    return replace(identity, log_start=offset, chain=chain, gaps=[gap for gap in identity.gaps if gap.next > offset])


def begin_history(identity: Identity, end: int) -> Identity:
    """The identity of a log that continues at `end` in a new history. Histories that begin after that ended before
    they began: nothing of them is here."""
    lived = [(epoch, first) for epoch, first in identity.epochs if first <= end]
    return replace(identity, epochs=[*lived, (identity.epoch + 1, end)])


class Checkpoint(NamedTuple):
    """A durable position: the log was synced at least up to here; `chain` is the chain there, `max_timestamp` the
    newest timestamp of the segment up to here."""

    log_id: str
    base: int
    position: int
    offset: int
    chain: int
    epoch: int
    max_timestamp: int


class GroupOffset(msgspec.Struct, frozen=True, array_like=True):
    """The committed offset of a group in one partition: every record before next_offset was acknowledged.

    revision    grows with every commit of the node: tells which of two copies is newer, also after a rewind
    attempts    how often the record at next_offset failed
    isolated    it is delivered alone until it is acknowledged
    reset_id    the group's last snapshot refresh of this partition (hex, "" when there was none), begun at reset_from;
    target      it lasts until READY says that the group has reached this offset (-1: the refresh is over)
    moved_end   where the log ended when an operator moved the offset (-1: that did not happen): what members had
                acknowledged before that is below
    """

    log_id: str
    epoch: int
    next_offset: int
    revision: int = 0
    attempts: int = 0
    isolated: bool = False
    reset_id: str = ""
    reset_from: int = -1
    target: int = -1
    moved_end: int = -1

    @property
    def deleted(self) -> bool:
        """A note that the group was deleted: an older copy of its offset does not bring it back."""
        return self.next_offset < 0

    @property
    def refreshing(self) -> bool:
        """A snapshot refresh is under way."""
        return self.target >= 0

    @property
    def rewound(self) -> bool:
        """An operator moved the offset back, and the group has not passed where the log ended then."""
        return self.next_offset < self.moved_end


class ChildPosition(msgspec.Struct, frozen=True, array_like=True):
    """A child has every record of this log before `offset`, the last of them in `epoch`: that was compared. `seen` is
    when it asked, by the scheduler's clock; in the file, how many seconds before it was written."""

    log_id: str
    epoch: int
    offset: int
    seen: float
    name: str = ""


Children = dict[tuple[str, int], dict[str, ChildPosition]]
"""For each (topic, partition) what each child has, by the child's uid."""


class Tombstone(msgspec.Struct, frozen=True, array_like=True):
    """A log that its origin has deleted: the name of its topic, and the histories that are gone, `first` to `epoch`.
    The ones before `first` were begun by another node: they are not this origin's to delete."""

    topic: str
    epoch: int
    first: int = 1

    def covers(self, epoch: int) -> bool:
        """Is that history deleted?"""
        return self.first <= epoch <= self.epoch


class DeletedTopic(msgspec.Struct, frozen=True):
    """A deleted topic whose files are still there: the node that wrote it, their bytes, and when it was deleted."""

    topic: str
    origin: str
    bytes: int
    deleted_ms: int


ResyncPhase = Literal["waiting", "loading", "switching", "done", "failed"]


class ResyncRow(msgspec.Struct, frozen=True, kw_only=True):
    """A resync that this node was told to do. When it `failed`, `why` tells the reason. `targets`: where each partition
    ended at the parent when it began; `log_ids`: which logs these are; the rest is as in ResyncDirective
    (pipe/report.py)."""

    id: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    topic: str
    group: str = ""
    in_place: bool = False
    force: bool = False
    accept: bool = False
    hours: str = ""
    phase: ResyncPhase = "waiting"
    why: str = ""
    targets: list[int] = []
    log_ids: list[str] = []


# ---- what an engine tells about itself ----


class OffsetRange(msgspec.Struct, frozen=True):
    """Offsets first to last, as they are shown."""

    first: int
    last: int


class LogStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One log: how much there is of it, and how well. `checkpoint` -1: there is none."""

    segments: int
    bytes: int
    producers: int
    staged_bytes: int
    checkpoint: int = -1
    damaged: list[OffsetRange] = []
    gaps: list[OffsetRange] = []


class DiskState(NamedTuple):
    """Bytes of the file system that holds the data directory: free, in all, and how many can be written before
    producers are refused; `used` by all logs together; `spare` for a snapshot of a table, which makes room: half of
    what producers leave, and whatever storage.max_bytes says."""

    free: int
    size: int
    usable: int
    used: int
    spare: int


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine has done and how it is; the memory engine has no more than its name. Sizes in bytes. Counters
    begin at 0 with each start. `clock` is "plausible", or why age removes nothing now."""

    engine: str
    commit_groups: int | None = None
    commit_bytes: int | None = None
    sync_seconds: float | None = None
    slowest_sync_seconds: float | None = None
    rolls: int | None = None
    metadata_transactions: int | None = None
    cold_reads: int | None = None
    read_timeouts: int | None = None
    quarantined_ranges: int | None = None
    disk_free_bytes: int | None = None
    disk_bytes: int | None = None
    disk_usable_bytes: int | None = None
    log_bytes: int | None = None
    removed_segments: int | None = None
    verified_bytes: int | None = None
    unverified_segments: int | None = None
    clock: str | None = None


class SegmentFile(msgspec.Struct, frozen=True):
    """A segment as it is copied: the durable bytes of a file. They never change; files come and go as a whole."""

    file: str
    bytes: int
    sealed: bool


class LogInventory(msgspec.Struct, frozen=True):
    """The files of a log: what a copy of it consists of."""

    topic: str
    partition: int
    identity: Identity
    end: int
    segments: list[SegmentFile]
