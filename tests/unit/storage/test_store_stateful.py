"""A store against a dict, whatever happens in whatever order: appended, read, committed, rolled, retired, killed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgebroker.common.errors import Code
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import AckLevel
from tests.kit.clock import START_WALL_MS
from tests.kit.storage import StoreHarness, encode, store_settings

GROUPS = st.sampled_from(["tills", "labels"])
CONFIG = store_settings(segment_bytes=700, window=4, retention_ms=50_000)


class StoreMachine(RuleBasedStateMachine):
    """`log` is what the store must hold: offset -> value. Nothing acknowledged may be missing, nothing else appear."""

    @initialize()
    def begin(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="edgebroker-"))
        self.harness = StoreHarness(self.home / "data", CONFIG)
        assert self.harness.create() == Outcome.OK
        self.log: dict[int, bytes] = {}
        self.end = 0
        self.groups: dict[str, int] = {}
        self.sequences = {1: 0, 2: 0}
        self.last_sent: dict[int, tuple[bytes, int]] = {}

    def _grow(self, offset: int, values: list[bytes]) -> None:
        assert offset == self.end, "offsets are dense"
        for value in values:
            self.log[self.end] = value
            self.end += 1

    @rule(sizes=st.lists(st.integers(0, 120), min_size=1, max_size=4), level=st.sampled_from(AckLevel))
    def append(self, sizes: list[int], level: AckLevel) -> None:
        values = [b"%d:%d" % (self.end, size) + b"x" * size for size in sizes]
        (answer,) = self.harness.append(encode(*values, timestamp=self.end), level=level)
        assert answer.code == Code.OK
        self._grow(answer.offset, values)

    @rule(batches=st.integers(2, 30))
    def append_a_run(self, batches: int) -> None:
        """Many frames in one turn: they go to the disk as one chunk or as several, across segments."""
        values = [b"run-%d" % number for number in range(batches)]
        answers = self.harness.append(*(encode(value, timestamp=self.end) for value in values))
        assert [answer.offset for answer in answers] == list(range(self.end, self.end + batches))
        self._grow(self.end, values)

    @rule(producer=st.sampled_from([1, 2]), count=st.integers(1, 3))
    def produce(self, producer: int, count: int) -> None:
        """The next batch of an idempotent producer, and the same once more."""
        sequence = self.sequences[producer]
        values = [b"p%d-%d" % (producer, sequence + number) for number in range(count)]
        frame = encode(*values, sequence=sequence, producer=producer, timestamp=self.end)
        first, second = self.harness.append(frame, frame)
        assert (first.code, second) == (Code.OK, first)
        self.last_sent[producer] = frame, first.offset
        self._grow(first.offset, values)
        self.sequences[producer] += count

    @precondition(lambda self: self.last_sent)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        """The answer was lost: nothing is stored twice, kills in between or not."""
        producer = data.draw(st.sampled_from(sorted(self.last_sent)))
        frame, offset = self.last_sent[producer]
        (answer,) = self.harness.stage(frame)
        assert (answer.code, answer.offset) == (Code.OK, offset)

    @rule(group=GROUPS, data=st.data())
    def commit(self, group: str, data: st.DataObject) -> None:
        offset = data.draw(st.integers(self.groups.get(group, 0), self.end))
        self.harness.commit(offset, group)
        self.groups[group] = offset

    @rule()
    def age(self) -> None:
        """Segments are sealed, and what was sealed long enough ago goes."""
        self.harness.tick(20.0)

    @rule()
    def kill(self) -> None:
        self.harness.restart()

    @rule()
    def kill_twice(self) -> None:
        self.harness.restart()
        self.harness.restart()

    @rule()
    def kill_and_lose_indexes(self) -> None:
        self.harness.crash()
        for index in self.harness.directory().glob("*.index"):
            index.unlink()
        self.harness.open()

    @rule()
    def stop(self) -> None:
        assert self.harness.close()
        assert (self.harness.path / "CLEAN").exists()
        self.harness.open()

    @rule(data=st.data(), max_bytes=st.sampled_from([1, 150, 400, 1 << 20]), records=st.sampled_from([1, 3, 1 << 20]))
    def read_from(self, data: st.DataObject, max_bytes: int, records: int) -> None:
        log = self.harness.log()
        start = data.draw(st.integers(log.log_start, self.end))
        found, corrupt_ranges = self.harness.read(start, max_bytes=max_bytes, max_records=records)
        assert not corrupt_ranges
        assert [(m.offset, m.value) for m in found] == [(o, self.log[o]) for o in range(start, self.end)]

    @rule(data=st.data())
    def look_up_a_time(self, data: st.DataObject) -> None:
        timestamp = data.draw(st.integers(0, self.end + 1))
        log = self.harness.log()
        assert log.log_start <= self.harness.offset_at(timestamp) <= self.end

    @invariant()
    def the_store_is_the_model(self) -> None:
        log = self.harness.log()
        assert log.durable_end == log.written_end == log.stage.next_offset == self.end
        assert log.corrupt_ranges == []
        assert self.harness.store.problems() == {}
        assert {group: self.harness.committed(group) for group in self.groups} == self.groups
        bases = self.harness.bases()
        assert bases[0] == log.log_start
        assert bases == sorted(set(bases))

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            found, corrupt_ranges = self.harness.read()
            assert not corrupt_ranges
            start = self.harness.log().log_start
            assert [(m.offset, m.value) for m in found] == [(o, self.log[o]) for o in range(start, self.end)]
            assert self.harness.clock.wall > START_WALL_MS - 1
            self.harness.close()
            shutil.rmtree(self.home)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    stateful_step_count=30,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
