"""Writing the snapshot of a table from its own log, when the disk wants space and only that makes some.

    check     what is left is hardly more than a copy of the table would take, and most of its log is history
    note      read the log, remember the last record of each key       at a bounded rate; the table is published to
    begin     the table is reserved, BEGIN is durable; the rest is read
    copy      read it again, publish the live records, in batches, one at a time
    complete  END is durable: retention may remove everything before BEGIN

Reading goes through the reader thread, keys and records through the checker thread: the loop only passes them on. A
snapshot may take space that producers are refused (Engine.refusal), so a table that fills the disk can always shrink.
What fails is given up without harm, and tried again after a minute, later after longer ones, up to an hour.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from edgebroker.broker.delivery.refresh import complete_from
from edgebroker.broker.delivery.table_snapshots import SnapshotPlan, TableSnapshot, TableSnapshots
from edgebroker.broker.publish.publishing import Publishing
from edgebroker.common import codecs
from edgebroker.common.batch import EXPLANATION, Reason
from edgebroker.common.errors import Code, CorruptBatchError
from edgebroker.common.livekeys import LiveKeys, NoTableError, TooManyKeysError
from edgebroker.common.messages import PublishRun
from edgebroker.common.names import SNAPSHOT_CLIENTS
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.spans import ANSWER, pack_span
from edgebroker.common.types import AckLevel
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.types import ColdRead

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
PIECE_BYTES, BYTES_PER_SECOND = 1 << 20, 16 << 20
# The keys of all partitions of a table together.
MAX_KEY_BYTES = 128 << 20
LEAST_BYTES = 256 << 10
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60.0, 3600.0

Then = Callable[[], None]


class SnapshotWriter:
    """Owned by the loop thread. One table at a time."""

    def __init__(self, engine: Engine, publishing: Publishing, snapshots: TableSnapshots, scheduler: Scheduler) -> None:
        self.engine, self.publishing, self.snapshots, self.scheduler = engine, publishing, snapshots, scheduler
        self.running: Writing | None = None
        # When a table whose snapshot failed is tried again, and how long that pause is; and why it failed.
        self._pauses: dict[str, tuple[float, float]] = {}
        self.failed: dict[str, str] = {}

    def start(self, *, makes_room: bool) -> None:
        """`makes_room`: what is not needed any more may be removed early; else a snapshot would be of no use."""
        if makes_room:
            self.scheduler.call_later(CHECK_SECONDS, self._check)

    def _check(self) -> None:
        self.scheduler.call_later(CHECK_SECONDS, self._check)
        disk = self.engine.disk()
        for topic in [topic for topic in self._pauses if not self.engine.partitions(topic)]:
            self._succeeded(topic)  # it was deleted
        if self.running is not None or disk is None or self.publishing.draining:
            return
        for topic in list(self.failed):
            size = self._copy_bytes(topic)
            if not size or disk.usable >= size:
                self._succeeded(topic)  # another snapshot was written, or there is room again
        if disk.usable >= disk.used:
            return  # no table is as large as what is left
        sizes = ((self._copy_bytes(topic), topic) for topic in self.engine.topics() if not self._pauses_now(topic))
        size, topic = max(sizes, default=(0, ""))
        if size and disk.usable < size:
            log.info("the disk wants space: a snapshot of %s is written", topic)
            self.running = Writing(self, topic)
            self.running.note()

    def _copy_bytes(self, topic: str) -> int:
        """The bytes that a copy of a table takes at most, when a snapshot of it is worth writing; else 0."""
        logs = self.engine.partitions(topic)
        own = all(one.identity.origin == self.engine.node_uid for one in logs)
        if logs[0].settings.kind != "table" or not own or self.snapshots.describe(topic) is not None:
            return 0
        if any(complete_from(one) is None for one in logs):
            return 0
        since = sum(one.bytes_from(max(one.identity.snapshot[0], one.log_start)) for one in logs)
        after = sum(one.bytes_from(max(one.identity.snapshot[1], one.log_start)) for one in logs)
        return since if since >= max(LEAST_BYTES, 2 * (since - after)) else 0

    def over(self, topic: str, why: str) -> None:
        """A snapshot is complete, or was given up for a reason."""
        self.running = None
        if not why:
            self._succeeded(topic)
            return
        log.warning("no snapshot of %s was written: %s", topic, why)
        pause = min(LONGEST_PAUSE_SECONDS, 2 * self._pauses[topic][1]) if topic in self._pauses else PAUSE_SECONDS
        self._pauses[topic] = (self.scheduler.now() + pause, pause)
        self.failed[topic] = why

    def _pauses_now(self, topic: str) -> bool:
        return self._pauses.get(topic, (0.0, 0.0))[0] > self.scheduler.now()

    def _succeeded(self, topic: str) -> None:
        self._pauses.pop(topic, None)
        self.failed.pop(topic, None)


class Writing:
    """One snapshot being written. It is the publisher of its records."""

    def __init__(self, writer: SnapshotWriter, topic: str) -> None:
        self._writer, self.topic = writer, topic
        self._logs = writer.engine.partitions(topic)
        self.client_id, self.producer_id = f"{SNAPSHOT_CLIENTS}{secrets.token_hex(8)}", -1
        most = MAX_KEY_BYTES // len(self._logs)
        self._keys = {partition: LiveKeys(most, secrets.token_bytes(16)) for partition in self._logs}
        # Where a reader of everything begins, and where reading goes on.
        self._starts = {partition: complete_from(partition) or 0 for partition in self._logs}
        self._offsets = dict(self._starts)
        self._snapshot: TableSnapshot | None = None
        self._copied: Then = lambda: None

    # ---- the story ----

    def note(self) -> None:
        """What is there now, while the table is published to."""
        ends = {partition: partition.durable_end for partition in self._logs}
        self._read(ends, self._noted, self._begin, BYTES_PER_SECOND)

    def _begin(self) -> None:
        self._writer.snapshots.begin(self.topic, self.client_id, self._begun)

    def _begun(self, outcome: Outcome, why: str, snapshot: TableSnapshot | None) -> None:
        if outcome is not Outcome.OK or snapshot is None:
            self._give_up(why)
            return
        self._snapshot = snapshot
        self._read(snapshot.begins, self._noted, self._declare, 0)

    def _declare(self) -> None:
        """All keys are known: is there room for their records?"""
        assert self._snapshot is not None
        size, disk = sum(keys.size for keys in self._keys.values()), self._writer.engine.disk()
        if disk is not None and size * 9 // 8 > disk.spare:
            self._give_up(f"its live records take {size:,} bytes, {disk.spare:,} bytes may be used")
            return
        plan = SnapshotPlan(source="log", keys=sum(keys.keys for keys in self._keys.values()))
        self._writer.snapshots.declare(self.topic, self._snapshot.id.hex(), plan, self._declared)

    def _declared(self, outcome: Outcome, why: str) -> None:
        if outcome is not Outcome.OK:
            self._give_up(why)
            return
        assert self._snapshot is not None
        self._offsets = dict(self._starts)
        self._read(self._snapshot.begins, self._copy, self._flush, 0)

    def _flush(self) -> None:
        """The last records of each partition."""
        last = {partition: keys.flush() for partition, keys in self._keys.items()}
        left = [(partition, batch) for partition, batch in last.items() if batch is not None]

        def following() -> None:
            if left:
                self._publish(*left.pop(), following)
            else:
                self._complete()

        following()

    def _complete(self) -> None:
        assert self._snapshot is not None
        self._writer.snapshots.complete(self.topic, self._snapshot.id.hex(), self._completed)

    def _completed(self, outcome: Outcome, why: str) -> None:
        self._writer.over(self.topic, "" if outcome is Outcome.OK else why)

    def _give_up(self, why: str) -> None:
        if self._snapshot is not None:
            self._writer.snapshots.abort(self.topic, self._snapshot.id.hex(), lambda outcome, message: None)
        self._writer.over(self.topic, why)

    # ---- reading: a piece at a time, partition after partition ----

    def _read(self, ends: dict[Log, int], take: Take, then: Then, bytes_per_second: int) -> None:
        """Read every partition from where it is to its end; `take` each piece; `then` go on."""
        writer = self._writer

        def following() -> None:
            if self._snapshot is not None:
                writer.snapshots.still_written(self.topic)
            waiting = next((one for one in self._logs if self._offsets[one] < ends[one]), None)
            if waiting is None:
                then()
            elif writer.engine.log(waiting.topic, waiting.partition) is not waiting or waiting.rewriting:
                self._give_up("its log was replaced")
            else:
                writer.engine.read_cold(waiting, self._offsets[waiting], PIECE_BYTES, lambda got: found(waiting, got))

        def found(partition: Log, got: ColdRead) -> None:
            if got.error or got.corrupt is not None or not got.data:
                self._give_up(got.error or "some of it is corrupt")
                return
            self._offsets[partition] = min(got.next_offset, ends[partition])
            pause = len(got.data) / bytes_per_second if bytes_per_second else 0.0
            take(partition, got.data, ends[partition], lambda: go_on(pause))

        def go_on(pause: float) -> None:
            writer.scheduler.call_later(pause, following)

        following()

    def _noted(self, partition: Log, data: bytes, stop: int, then: Then) -> None:
        self._check(lambda: self._keys[partition].note(data, codecs.inflate, stop), lambda found: then())

    def _copy(self, partition: Log, data: bytes, stop: int, then: Then) -> None:
        def publish(batches: list[bytes]) -> None:
            if batches:
                self._publish(partition, batches[0], lambda: publish(batches[1:]))
            else:
                then()

        self._check(lambda: self._keys[partition].live(data, codecs.inflate, stop), publish)

    def _check(self, work: Callable[[], list[bytes] | None], then: Callable[[list[bytes]], None]) -> None:
        """Work on records, on the checker thread."""
        found: list[list[bytes] | str] = []

        def run() -> None:
            try:
                found.append(work() or [])
            except (NoTableError, TooManyKeysError, CorruptBatchError, ValueError) as error:
                found.append(str(error))

        def done() -> None:
            if isinstance(found[0], str):
                self._give_up(found[0])
            else:
                then(found[0])

        self._writer.publishing.check(run, done)

    # ---- publishing: one batch at a time ----

    def _publish(self, partition: Log, batch: bytes, then: Then) -> None:
        self._copied = then
        self._writer.snapshots.still_written(self.topic)
        run = PublishRun(
            AckLevel.DURABLE, self.topic, partition.partition, memoryview(batch), pack_span(1, 0, len(batch))
        )
        self._writer.publishing.submit(self, run, internal=True)

    def answered(self, spans: bytes, answers: bytes) -> None:
        _, code, reason = ANSWER.unpack(answers)
        if code == Code.OK:
            self._copied()
        else:
            self._give_up(EXPLANATION.get(Reason(reason), Code(code).name))

    def refused(self, spans: bytes, outcome: Outcome, why: str) -> None:
        self._give_up(why)

    def rejected(self, spans: bytes, code: int, why: str) -> None:
        self._give_up(why)

    def hold(self) -> None:
        """One batch at a time is not a flood."""

    def release(self) -> None:
        """It was not held."""


Take = Callable[[Log, bytes, int, Then], None]
"""What is done with a piece of a log: the batches that begin before an offset; and what follows."""
