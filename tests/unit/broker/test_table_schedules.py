"""A table under everything that takes bytes away: whatever the order, a new reader sees exactly the live keys.

Random schedules of publishing, snapshots (the broker's own, those of a client, those that are broken off), a budget
that shrinks, retention, readers that come and go, crashes, and a copy that is put back. EB_TABLE_SCHEDULES of them, the
first from EB_TABLE_SEED.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from edgebroker.broker.core import build_core
from edgebroker.broker.delivery.leases import LeaseLimits
from edgebroker.broker.delivery.refresh import complete_from
from edgebroker.broker.delivery.snapshot_writer import Writing
from edgebroker.broker.delivery.table_snapshots import SnapshotPlan, TableSnapshot
from edgebroker.broker.publish.publishing import PublishLimits
from edgebroker.common import batch
from edgebroker.common.codecs import CodecName
from edgebroker.common.errors import Code
from edgebroker.common.messages import PublishRun
from edgebroker.common.outcome import Outcome
from edgebroker.common.records import Record
from edgebroker.common.spans import ANSWER, pack_span
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log.staging import Chunk
from tests.kit.storage import TOPIC, Listener, StoreHarness, snapshot, store_settings

SCHEDULES = int(os.environ.get("EB_TABLE_SCHEDULES", "60"))
SEED = int(os.environ.get("EB_TABLE_SEED", "0")) or 20261130
STEPS = 14
KEYS = 12
ROOMY = 10_000_000

Table = dict[bytes, bytes]


class CoreListener(Listener):
    """Tells the core what the store says."""

    world: World

    def on_durable(self, log: Log, chunks: list[Chunk]) -> None:
        super().on_durable(log, chunks)
        self.world.core.publishing.on_durable(log)
        self.world.core.table_snapshots.on_durable(log)

    def on_failed(self, log: Log, outcome: Outcome, message: str) -> None:
        super().on_failed(log, outcome, message)
        self.world.core.publishing.on_failed(log, outcome, message)
        self.world.core.table_snapshots.on_failed(log, outcome, message)


class Client:
    """A publisher that notes its answers."""

    def __init__(self, client_id: str) -> None:
        self.client_id, self.producer_id = client_id, -1
        self.codes: list[Code] = []

    def answered(self, spans: bytes, answers: bytes) -> None:
        self.codes += [Code(code) for _, code, _ in ANSWER.iter_unpack(answers)]

    def refused(self, spans: bytes, outcome: Outcome, why: str) -> None:
        self.codes.append(outcome.code)

    def rejected(self, spans: bytes, code: int, why: str) -> None:
        self.codes.append(Code(code))

    def hold(self) -> None: ...
    def release(self) -> None: ...


class World(StoreHarness):
    """A store with the core over it, a table, and what is live in it."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.rng, self.live, self.saved = rng, Table(), Table()
        self.copies = 0
        super().__init__(path, store_settings(segment_bytes=1500))
        settings = TopicSettings(kind="table", retention_bytes=rng.choice([0, 0, 3000]))
        self.engine.create_topic(TOPIC, settings, lambda *told: None)
        self.until(lambda: self.engine.log(TOPIC, 0))

    def make_engine(self) -> Engine:
        engine = super().make_engine()
        publish = PublishLimits(1 << 30, 1 << 29, 1 << 20, 1 << 22, 1000, True, False, 5.0, TopicSettings())
        leases = LeaseLimits(timeout=30.0, backoff=0.0, max_backoff=0.0, max_attempts=2)
        self.core = build_core(engine, self.loop, self.clock, publish, leases)
        floor = getattr(self.listener, "floor", None)
        self.listener = CoreListener()
        self.listener.world, self.listener.floor = self, floor
        return engine

    # ---- what is done to it ----

    def publish(self, topic: str, client: Client, data: bytes) -> Code:
        before = len(client.codes)
        run = PublishRun(AckLevel.DURABLE, topic, 0, memoryview(data), pack_span(1, 0, len(data)))
        self.core.publishing.submit(client, run)
        self.waits(lambda: len(client.codes) > before)
        return client.codes[-1]

    def waits(self, condition: Callable[[], object]) -> None:
        for _ in range(2000):
            if condition():
                return
            self.loop.turn(0.001)
            self.clock.advance(0.01)
        raise AssertionError("waited in vain")

    def row(self, table: Table) -> tuple[bytes | None, bytes | None, int]:
        key = b"key-%d" % self.rng.randrange(KEYS)
        value: bytes | None = b"%d" % self.rng.randrange(1 << 40) + b"." * self.rng.randrange(200)
        if self.rng.random() < 0.25:
            value = None
        table.pop(key, None)
        if value is not None:
            table[key] = value
        return key, value, 1000

    def change(self) -> None:
        for _ in range(self.rng.randrange(1, 12)):
            wanted = dict(self.live)
            rows = [self.row(wanted) for _ in range(self.rng.randrange(1, 4))]
            codec: CodecName = self.rng.choice(["none", "gzip"])
            if self.publish(TOPIC, Client("till"), batch.encode(rows, codec=codec)) is Code.OK:
                self.live = wanted

    def others(self) -> None:
        """Another topic takes space."""
        for _ in range(self.rng.randrange(1, 8)):
            self.publish("sales", Client("till"), batch.encode([(None, b"." * 400, 1000)]))

    def own_snapshot(self) -> None:
        """The broker writes one; sometimes it is interrupted by a crash."""
        writer = self.core.snapshot_writer
        writer.running = Writing(writer, TOPIC)
        writer.running.note()
        if self.rng.random() < 0.3:
            for _ in range(self.rng.randrange(1, 40)):
                self.loop.turn(0.001)
                self.clock.advance(0.01)
            self.restart()
        else:
            self.waits(lambda: writer.running is None)
            assert not writer.failed, writer.failed

    def client_snapshot(self) -> None:
        """The whole content comes from a client, other than what is there; or it ends on the way."""
        begun: list[TableSnapshot | None] = []
        client = Client("__snapshot-1")
        told: list[Outcome] = []
        snapshots = self.core.table_snapshots
        snapshots.begin(TOPIC, client.client_id, lambda outcome, why, found: begun.append(found))
        self.waits(lambda: begun)
        found = begun[0]
        if found is None:
            return
        wanted = {b"key-%d" % number: b"new-%d" % self.rng.randrange(100) for number in range(self.rng.randrange(KEYS))}
        gone = [key for key in self.live if key not in wanted]
        plan = SnapshotPlan(source="content", keys=len(wanted), deleted=len(gone), allow_deletes=len(gone))
        snapshots.declare(TOPIC, found.id.hex(), plan, lambda outcome, why: told.append(outcome))
        assert told == [Outcome.OK]
        rows: list[tuple[bytes | None, bytes | None, int]] = [(key, None, 1) for key in gone]
        rows += [(key, value, 1) for key, value in wanted.items()]
        broken_off = self.rng.random() < 0.4
        for row in rows[: self.rng.randrange(len(rows) + 1)] if broken_off else rows:
            assert self.publish(TOPIC, client, batch.encode([row])) is Code.OK
            key, value, _ = row
            assert key is not None
            self.live.pop(key, None)
            if value is not None:
                self.live[key] = value
        end = snapshots.abort if broken_off else snapshots.complete
        end(TOPIC, found.id.hex(), lambda outcome, why: told.append(outcome))
        self.waits(lambda: len(told) > 1)

    def budget(self) -> None:
        """The budget becomes small, or large again; housekeeping does what it can."""
        most = self.rng.choice([ROOMY, ROOMY, 2000, 5000, 9000])
        self.settings = replace(self.settings, housekeeping=replace(self.settings.housekeeping, max_bytes=most))
        self.store.reconfigure(self.settings)
        for _ in range(6):
            self.tick(self.rng.choice([1.0, 400.0]))

    def readers(self) -> None:
        """Who has read how far."""
        assert isinstance(self.listener, CoreListener)
        end = self.log().durable_end
        self.listener.floor = self.rng.choice([None, 0, end, self.rng.randrange(end + 1)])

    def copy(self) -> None:
        """A copy is made, or put back."""
        target = self.path.with_name("copy")
        if self.copies and self.rng.random() < 0.5:
            self.crash()
            shutil.rmtree(self.path)
            shutil.copytree(target, self.path)
            self.open()
            self.live = dict(self.saved)
            return
        self.durable()
        self.stored()
        self.quiesce()
        shutil.rmtree(target, ignore_errors=True)
        snapshot(self.path, target)
        self.saved, self.copies = dict(self.live), self.copies + 1

    def stop(self) -> None:
        if self.rng.random() < 0.5:
            self.restart()
        else:
            self.close()
            self.open()

    # ---- what a new reader sees ----

    def check(self) -> None:
        self.until(lambda: not self.store._housekeeping._removing)
        begin = complete_from(self.log())
        assert begin is not None, "the table has lost keys"
        for start in {begin, self.log().log_start}:
            seen = Table()
            for row in self.read_batches(start):
                seen.pop(row.key, None)
                if row.value is not None:
                    seen[row.key] = row.value
            assert seen == self.live, f"from {start}"

    def read_batches(self, start: int) -> list[Record]:
        """What a reader gets that begins here; what is removed while it reads it does without, and begins again."""
        found, offset, log = list[Record](), start, self.log()
        while offset < log.durable_end:
            cold = self.read_cold(offset)
            if cold.missing and offset < log.log_start:
                found, offset = [], log.log_start
                continue
            assert not cold.error and cold.corrupt is None
            found += batch.decode(cold.data, first=offset, last=cold.next_offset - 1)
            offset = cold.next_offset
        return found


@pytest.mark.slow
def test_any_schedule(tmp_path: Path) -> None:
    for number in range(SCHEDULES):
        rng, story = random.Random(SEED + number), list[str]()
        world = World(tmp_path / f"{number}" / "data", rng)
        try:
            for _ in range(STEPS):
                steps = [world.change] * 4 + [world.others, world.own_snapshot, world.client_snapshot, world.budget]
                step = rng.choice([*steps, world.budget, world.readers, world.copy, world.stop])
                story.append(step.__name__)
                step()
                world.check()
        except BaseException as error:
            error.add_note(f"EB_TABLE_SEED={SEED + number}: {story}")
            raise
        finally:
            world.close()
        shutil.rmtree(tmp_path / f"{number}")
