"""The one checker of all fault tests: what was sent, acknowledged and seen, held against what is in the log at the end.

    history = History()
    writer = Writer(history, broker.server, "p0", "orders", partitions=4, seed=1)    # traffic.py
    ...
    history.check("orders", read_back(broker, "orders"))

Values are unique and follow from (producer, n), so that a value tells where it belongs and what its bytes must be.
"""

import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.common import batch
from edgebroker.common.errors import CorruptBatchError
from edgebroker.common.runtime.clock import SystemClock

_HEAD = struct.Struct(">4sQI")
_FILLER = bytes(range(251)) * 64
SHOWN = 12


def value_of(producer: str, n: int, size: int) -> bytes:
    """Value number n of a producer: a head that names it, then bytes that follow from it. 16 to 16,000 bytes."""
    start = (n * 7 + len(producer)) % 251
    return _HEAD.pack(producer.encode(), n, size) + _FILLER[start : start + size - _HEAD.size]


def origin_of(value: bytes) -> tuple[str, int]:
    """(producer, n) of a value; ValueError when these are not the bytes that were sent."""
    if len(value) < _HEAD.size:
        raise ValueError(f"{len(value)} bytes are no value")
    name, n, size = _HEAD.unpack_from(value)
    producer = name.rstrip(b"\0").decode(errors="replace")
    if value_of(producer, n, size) != value:
        raise ValueError(f"bytes of value {n} of {producer} changed")
    return producer, n


class Ack(NamedTuple):
    """One acknowledgement a producer got."""

    topic: str
    partition: int
    offset: int
    producer: str
    n: int
    level: str


class PartitionContent(NamedTuple):
    """One partition as read back: (offset, value) in order, and its ends."""

    log_start: int
    durable_end: int
    records: list[tuple[int, bytes]]


Content = Mapping[int, PartitionContent]


class ConsumerHistory:
    """What one group's consumer saw and acknowledged in one topic; filled by its thread."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.seen: dict[int, dict[int, tuple[str, int]]] = defaultdict(dict)
        self.next_offset: dict[int, int] = {}
        self.acked: dict[int, int] = defaultdict(int)
        self.stored: dict[int, int] = defaultdict(int)
        self.repeats = 0
        self.problems: list[str] = []

    def saw(self, partition: int, offset: int, value: bytes) -> None:
        """A record was handed over: the next one, or one again that was not stored as acknowledged."""
        expected = self.next_offset.get(partition)
        if expected is not None and offset > expected:
            self._note(f"partition {partition}: {offset} came after {expected - 1}: a gap")
        if offset < self.stored[partition]:
            self._note(f"partition {partition}: {offset} came again, {self.stored[partition]} was stored as acked")
        self.repeats += expected is not None and offset < expected
        self.next_offset[partition] = offset + 1
        try:
            origin = origin_of(value)
        except ValueError as error:
            self._note(f"partition {partition}, offset {offset}: {error}")
            return
        before = self.seen[partition].setdefault(offset, origin)
        if before != origin:
            self._note(f"partition {partition}, offset {offset}: {before} first, {origin} later")

    def gap(self, partition: int, first: int, last: int, reason: str) -> None:
        """The broker said that these records will never come: true only of what retention removed."""
        if reason != "RETENTION":
            self._note(f"partition {partition}: {first} to {last} are gone: {reason}")
        if self.next_offset.get(partition, first) >= first:
            self.next_offset[partition] = last + 1

    def acknowledged(self, partition: int, next_offset: int) -> None:
        self.acked[partition] = max(self.acked[partition], next_offset)

    def confirmed(self, ends: Mapping[int, int]) -> None:
        """The broker said that these acknowledgements are stored."""
        for partition, end in ends.items():
            self.stored[partition] = max(self.stored[partition], end)

    def _note(self, problem: str) -> None:
        if len(self.problems) < 100:
            self.problems.append(f"group {self.group}: {problem}")


class History:
    """Everything that clients know; safe to be filled by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.acks: list[Ack] = []
        self.sent: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.consumers: list[ConsumerHistory] = []

    def sending(self, producer: str, n: int) -> None:
        with self._lock:
            self.sent[producer] = max(self.sent[producer], n + 1)

    def acknowledged(self, ack: Ack) -> None:
        with self._lock:
            self.acks.append(ack)

    def failed(self, error: BaseException) -> None:
        """An outcome that is not known: the record may be in the log or not."""
        with self._lock:
            self.failures[getattr(getattr(error, "code", None), "name", type(error).__name__)] += 1

    def forget(self, topic: str, starts: Mapping[int, int]) -> None:
        """The acknowledgements of records in front of `starts` are not held against any log any more."""
        with self._lock:
            self.acks = [ack for ack in self.acks if ack.topic != topic or ack.offset >= starts.get(ack.partition, 0)]

    def lost(self, topic: str, content: Content) -> list[Ack]:
        """The durable acknowledgements whose record is not at its offset."""
        with self._lock:
            acks = [ack for ack in self.acks if ack.topic == topic and ack.level == "durable"]
        found = {partition: dict(part.records) for partition, part in content.items()}
        missing = []
        for ack in acks:
            part = content.get(ack.partition)
            if part is not None and ack.offset < part.log_start:
                continue  # removed by retention, see problems() for a log_start that is too high
            value = found.get(ack.partition, {}).get(ack.offset)
            try:
                if value is not None and origin_of(value) == (ack.producer, ack.n):
                    continue
            except ValueError:
                pass
            missing.append(ack)
        return missing

    def problems(self, topic: str, content: Content, *, retention: bool = False) -> list[str]:
        """Every broken promise, in words. `retention`: the beginning of a partition may have been removed."""
        found = [f"acknowledged, but lost: {ack}" for ack in self.lost(topic, content)]
        for partition, part in sorted(content.items()):
            found += [f"partition {partition}: {problem}" for problem in self._partition(part, retention)]
        for consumer in self.consumers:
            found += consumer.problems
            found += [f"group {consumer.group}: {problem}" for problem in _seen_otherwise(consumer, content)]
        return found

    def check(self, topic: str, content: Content, context: object = "", *, retention: bool = False) -> None:
        """Raise AssertionError with every broken promise; `context` (the seed) leads the message."""
        found = self.problems(topic, content, retention=retention)
        if found:
            lost = f"{len(self.lost(topic, content))} of {len(self.acks)} acknowledged records lost"
            raise AssertionError(f"{context}: {lost}, {len(found)} problems\n" + "\n".join(found[:SHOWN]))

    def _partition(self, part: PartitionContent, retention: bool) -> Iterable[str]:
        if part.log_start and not retention:
            yield f"begins at {part.log_start} although nothing is ever removed"
        expected, newest = part.log_start, dict[str, int]()
        for offset, value in part.records:
            if offset != expected:
                yield f"offset {offset} follows {expected - 1}"
            expected = offset + 1
            try:
                producer, n = origin_of(value)
            except ValueError as error:
                yield f"offset {offset}: {error}"
                continue
            if n >= self.sent[producer]:
                yield f"offset {offset}: value {n} of {producer} was never sent"
            before = newest.get(producer, -1)
            if n <= before:
                yield f"offset {offset}: value {n} of {producer} after {before}: {'twice' if n == before else 'order'}"
            newest[producer] = max(n, before)
        if expected != part.durable_end:
            yield f"ends at {expected}, not at its durable end {part.durable_end}"


def _seen_otherwise(consumer: ConsumerHistory, content: Content) -> Iterable[str]:
    """Records that a consumer saw and the log does not hold at that offset."""
    for partition, seen in consumer.seen.items():
        part = content[partition]
        held = dict(part.records)
        for offset, origin in seen.items():
            if offset >= part.log_start and (offset not in held or origin_of(held[offset]) != origin):
                yield f"partition {partition}: saw {origin} at {offset}, the log does not hold it"


def check_groups(broker: BrokerProcess, history: History, topic: str, content: Content, context: object = "") -> None:
    """Group offsets: not before what was confirmed, not ahead of what was acknowledged nor of the durable end."""
    wrong: list[str] = []
    for consumer in history.consumers:
        groups = call(broker.admin, "GET", "/v1/groups")["groups"]
        lines = [line for group in groups if group["name"] == consumer.group for line in group["partitions"]]
        known = {line["partition"] for line in lines if line["topic"] == topic}
        gone = [partition for partition, end in consumer.stored.items() if end and partition not in known]
        wrong += [f"{consumer.group}: its place in partitions {gone} is gone"] if gone else []
        for line in lines:
            partition, committed = line["partition"], line["committed"]
            if line["topic"] != topic or committed < 0:
                continue
            low, high = consumer.stored[partition], consumer.acked[partition]
            if not low <= committed <= min(max(high, content[partition].log_start), content[partition].durable_end):
                wrong.append(f"{consumer.group}, partition {partition}: {committed}, stored {low}, acked {high}")
    assert not wrong, f"{context}: {wrong}"


def read_back(broker: BrokerProcess, topic: str, seconds: float = 30.0) -> Content:
    """Everything of a topic, through a consumer of its own. Raises TimeoutError when it does not come."""

    def describe(key: str) -> dict[int, int]:
        return {line["partition"]: line[key] for line in call(broker.admin, "GET", f"/v1/topics/{topic}")["partitions"]}

    ends, starts = describe("durable_end"), describe("log_start")
    records: dict[int, list[tuple[int, bytes]]] = {partition: [] for partition in ends}
    missing = {partition for partition, end in ends.items() if end > starts[partition]}
    clock = SystemClock()
    deadline = clock.monotonic() + seconds
    with Consumer(broker.server, [topic], start="earliest", auto_ack=False, on_gap=lambda gap: None) as consumer:
        while missing:
            if clock.monotonic() > deadline:
                raise TimeoutError(f"{topic}: partitions {sorted(missing)} did not come to their end {ends}")
            batch_of_records = consumer.poll(0.5)
            for record in batch_of_records:
                records[record.partition].append((record.offset, record.value or b""))
                if record.offset + 1 >= ends[record.partition]:
                    missing.discard(record.partition)
            if batch_of_records:
                consumer.ack(batch_of_records[-1])
    # Writers and retention may be at work: what came or went after the question does not count.
    starts = describe("log_start")
    for partition, found in records.items():
        records[partition] = [pair for pair in found if starts[partition] <= pair[0] < ends[partition]]
    return {p: PartitionContent(starts[p], ends[p], records[p]) for p in ends}


def read_files(partition: Path, log_start: int, durable_end: int) -> PartitionContent:
    """A partition straight from its segment files, as an independent reader would: whole batches until one is not."""
    found: list[tuple[int, bytes]] = []
    paths = sorted(partition.glob("*.log"))
    bases = [int(path.stem) for path in paths]
    for path, following in zip(paths, [*bases[1:], durable_end], strict=True):
        data, position = path.read_bytes(), 0
        while position + batch.HEADER_BYTES <= len(data):
            length = int.from_bytes(data[position + 8 : position + 12], "big") + 12
            base = int.from_bytes(data[position : position + 8], "big")
            if length < batch.HEADER_BYTES or position + length > len(data) or base >= following:
                break
            try:
                records = batch.decode(data[position : position + length])
            except CorruptBatchError:
                break
            found += [(record.offset, record.value or b"") for record in records]
            position += length
    return PartitionContent(log_start, durable_end, [pair for pair in found if pair[0] >= log_start])
