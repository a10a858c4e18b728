"""What the broker asks of a storage engine. The segment log is the real one; the in-memory one serves tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from edgebroker.common.errors import Code
from edgebroker.common.histogram import Histogram
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage.identity import Identity
from edgebroker.storage.log.chains import ChainPoint
from edgebroker.storage.log.partition import FileSlice, Found
from edgebroker.storage.log.reader import ColdRead
from edgebroker.storage.log.recovery import CorruptRange
from edgebroker.storage.log.segment import Segment
from edgebroker.storage.log.staging import Chunk
from edgebroker.storage.metadata.children import Children
from edgebroker.storage.metadata.meta_db import GroupKey, GroupOffset

Done = Callable[[Code, str], None]


class Log(Protocol):
    """One partition, as the loop sees it."""

    topic: str
    partition: int
    name: str
    identity: Identity
    epoch: int
    written_end: int
    durable_end: int
    corrupt_ranges: list[CorruptRange]
    records_in: int
    bytes_in: int
    chain: int
    """The chain checksum before written_end."""
    rewriting: bool
    """Its files are being cut, begun anew or healed."""

    @property
    def log_start(self) -> int: ...
    @property
    def staged_end(self) -> int:
        """The offset that the next record will get."""

    @property
    def staged_epoch(self) -> int:
        """The history of the last record before staged_end."""

    @property
    def settings(self) -> TopicSettings: ...
    @property
    def size_bytes(self) -> int: ...
    def find(self, offset: int, max_bytes: int, max_records: int, hint: tuple[int, int] | None = None) -> Found: ...
    def end_hint(self) -> tuple[int, int] | None: ...
    def to_repair(self) -> tuple[int, int]:
        """The offsets [first, next) to be fetched first: the first hole, or a part of it."""

    def chain_at(self, offset: int) -> int | None:
        """The chain before an offset, where it is known without the disk."""

    def damaged_before(self, offset: int) -> bool:
        """True when damage keeps this node from knowing the chain before an offset."""

    def describe(self) -> dict[str, object]: ...


class EngineListener(Protocol):
    """Who is told, on the loop, what became of staged batches."""

    def on_opening(self, done: int, topics: int) -> None:
        """While the engine is being opened: so many of the topics are open, and one more log of the next one."""

    def on_written(self, log: Log) -> None: ...
    def on_durable(self, log: Log, chunks: list[Chunk]) -> None: ...
    def on_failed(self, log: Log, code: Code, message: str) -> None: ...
    def on_topic(self, name: str) -> None:
        """A topic was made, or the identity of its logs changed: settings, histories, where they begin."""

    def on_rewritten(self, log: Log) -> None:
        """A log was cut or begun anew: nobody stands in it where they stood."""

    def retention_pin(self, log: Log) -> int | None:
        """The offset from which on nothing may be removed now; None: retention decides."""

    def retention_floor(self, log: Log) -> int | None:
        """The offset that every live group and child has passed; None when there is none."""


class Tombstone(msgspec.Struct, frozen=True, array_like=True):
    """A log that its origin has deleted: the name of its topic, and the last history of it that is gone."""

    topic: str
    epoch: int


class Appended(NamedTuple):
    """What became of a run of PUBLISH frames: packed answers (staging.pyi), how many frames were handled, and the
    end that must be written or durable before the answers are true."""

    answers: bytes
    frames: int
    wait: int
    records: int


class Engine(Protocol):
    """Everything is called on the loop; callbacks come back on the loop."""

    node_uid: str

    @property
    def tombstones(self) -> Mapping[str, Tombstone]:
        """Logs that were deleted, by log id."""

    def open(self, listener: EngineListener) -> None:
        """Recover what is stored. Blocks; before the loop runs."""

    def close(self, timeout: float) -> bool:
        """Store and release everything. True when the stop was clean."""

    def flush(self) -> bool:
        """Store what is staged without waiting for intervals; True when nothing is left to do (stop)."""

    def topics(self) -> Iterable[str]: ...
    def log(self, topic: str, partition: int) -> Log | None: ...
    def logs(self) -> Iterable[Log]: ...
    def partitions(self, topic: str) -> list[Log]: ...
    def create_topic(self, name: str, settings: TopicSettings, done: Done) -> None: ...
    def repair(self, log: Log, data: bytes, done: Callable[[int, str], None]) -> None:
        """Put batches from another node into the first hole of a log: done(offset up to which it is whole, error)."""

    def chains(self, log: Log, offsets: Sequence[int], done: Callable[[list[ChainPoint], str], None]) -> None:
        """For each offset the first batch boundary at or behind it and the chain there: done(points, error)."""

    def alter_topic(self, name: str, settings: TopicSettings, done: Done) -> None: ...
    def change_identities(self, name: str, changes: Sequence[Callable[[Identity], Identity]], done: Done) -> None:
        """Change the identities of a topic's partitions, one function for each; durable when done is called."""

    def refusal(self) -> tuple[Code, str] | None:
        """Why publishing is refused now; None when it is not."""

    def append(self, log: Log, data: memoryview, spans: bytes, level: AckLevel, inflated: bool) -> Appended: ...
    def append_numbered(self, log: Log, data: memoryview) -> tuple[int, int]:
        """Append batches that carry their offsets (a mirror): (bytes taken, reason it stopped)."""

    @property
    def staged_bytes(self) -> int:
        """What waits for the disk, over all partitions."""

    def read_cold(self, log: Log, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None: ...
    def read_cached(self, extent: FileSlice) -> bytes | None:
        """The bytes of an extent, when all of them are in the page cache. Does not wait."""

    def load_range(self, segment: Segment, position: int, length: int, done: Callable[[bytes, str], None]) -> None:
        """Read stored bytes that left the page cache while they were being sent: done(data, error)."""

    def live_from(self, log: Log) -> int:
        """The first offset that the topic's time to live leaves; log_start without one."""

    def age_ms(self, log: Log, next_offset: int) -> int:
        """An age at this node that every record before next_offset has reached."""

    def complete_snapshot(self, log: Log, first: int, following: int, done: Done) -> None:
        """Note durably that [first, following) is a complete snapshot of a table: retention stops before it."""

    def offset_at_time(self, log: Log, timestamp: int, done: Callable[[int, str], None]) -> None:
        """The first offset whose record is not older than a timestamp (the end when all are): done(offset, error)."""

    def group_offsets(self) -> dict[GroupKey, GroupOffset]: ...
    def commit_offset(self, key: GroupKey, offset: GroupOffset | None) -> None: ...
    def when_stored(self, callback: Callable[[], None]) -> None:
        """Call back once everything committed so far is durable."""

    def children(self) -> Children:
        """What the children of this node had in an earlier run."""

    def store_children(self, children: Children) -> None:
        """Remember that, for the next run; durable by the end of close()."""

    def producer(self, client_id: str) -> tuple[int, int] | None: ...
    def grant_producer(self, client_id: str, producer_id: int, epoch: int) -> None: ...
    @property
    def staged_at(self) -> float:
        """Within on_durable(): when the first batch of what is durable now was staged, in monotonic seconds."""

    def latencies(self) -> dict[str, Histogram]:
        """Seconds that the disk took: `sync` for each sync, `append` from the first batch of a group to its end."""

    def problems(self) -> dict[str, str]:
        """What is wrong with the storage now, by name; empty when all is well."""

    def describe(self) -> dict[str, object]: ...


class MirrorEngine(Engine, Protocol):
    """An engine that can hold what another node has originated. `level` is the node's place in the tree: the configured
    one, or the one that it was `promoted` to."""

    level: str
    promoted: bool
    topology: list[str]
    """Where the registry said that parents are to be found, as it was stored last."""

    def store_topology(self, addresses: list[str]) -> None: ...
    def change_level(self, level: str, promoted: bool, done: Done) -> None: ...
    def create_mirror(self, name: str, identities: Sequence[Identity], done: Done) -> None: ...
    def change_identities(self, name: str, changes: Sequence[Callable[[Identity], Identity]], done: Done) -> None: ...
    def cut(self, log: Log, offset: int, done: Done) -> None: ...
    def restart(self, log: Log, change: Callable[[Identity], Identity], done: Done) -> None: ...
