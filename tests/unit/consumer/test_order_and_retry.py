"""Order and retries of an application against a model, with a clock that the test turns.

Whatever handlers do with which attempt, and whenever the process is killed: each record has its effect once, in the
order of its partition, and those that fail hold up no other partition.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebroker.client.refresh import Staging
from edgebroker.common.records import Record
from edgebroker.common.types import Position, TopicPartition
from edgebroker.consumer import instance as instance_module
from edgebroker.consumer import loaded_records as loaded_module
from edgebroker.consumer import subscriptions as subscriptions_module
from edgebroker.consumer.config import AppConfig
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.declare.application import Application, Handler, Topic
from edgebroker.consumer.declare.declarations import FOR_HANDLERS, Context, Database, RetryPolicy
from edgebroker.consumer.declare.signatures import read_signature
from edgebroker.consumer.instance import Instance
from tests.kit.clock import ManualClock

LOG_ID, NAME = bytes(16), "orders"
NEVER = 99
SLACK = 0.5


class Planned(NamedTuple):
    """What a handler does with a record: it fails until this attempt; with an error that is not tried again perhaps."""

    succeeds_at: int
    hopeless: bool


class Plan(NamedTuple):
    """Records of each partition; in which pieces they come, each so long after the one before: (partition, count,
    seconds); after how many pieces the process is killed."""

    partitions: list[list[Planned]]
    policy: RetryPolicy
    pieces: list[tuple[int, int, float]]
    kills: list[int]


class KilledError(BaseException):
    pass


class FakeBroker:
    """The log of a topic, and a consumer group of one member, as Subscriptions shows it to an application."""

    def __init__(self, plan: Plan, clock: ManualClock) -> None:
        self.plan, self.clock = plan, clock
        self.given = dict.fromkeys(range(len(plan.partitions)), 0)
        self.came: dict[tuple[int, int], float] = {}
        self.acked: dict[int, int] = {}
        self.pieces, self.kills = list(plan.pieces), list(plan.kills)
        self.done_pieces, self.next_due = 0, clock.monotonic()
        self.instance: Instance | None = None
        self.consumers = [self]
        self.silent_seconds, self.dead = 0.0, False

    # ---- what an instance asks for ----

    def open(self, topics: Iterable[Topic], positions: Mapping[tuple[str, int], Position], staging: Staging) -> None:
        for number in self.given:
            stored = positions.get((NAME, number))
            self.given[number] = self.acked[number] = stored.next_offset if stored is not None else 0

    def poll(self, consumer: object, wait: float) -> list[Record]:
        if self.kills and self.done_pieces >= self.kills[0]:
            self.kills.pop(0)
            self.dead = True
            raise KilledError
        while self.pieces and self.next_due <= self.clock.monotonic():
            number, count, pause = self.pieces.pop(0)
            self.done_pieces += 1
            self.next_due = self.clock.monotonic() + pause
            if records := self._next(number, count):
                return records
        if not self.pieces:  # the rest, after a kill perhaps
            for number in self.given:
                if records := self._next(number, NEVER):
                    return records
            if self._is_over():
                assert self.instance is not None
                self.instance.stop()
        self.clock.advance(max(wait, 0.001))
        return []

    def _next(self, number: int, count: int) -> list[Record]:
        first = self.given[number]
        end = min(first + count, len(self.plan.partitions[number]))
        self.given[number] = end
        for offset in range(first, end):
            self.came[number, offset] = self.clock.monotonic()
        return [record(number, offset) for offset in range(first, end)]

    def _is_over(self) -> bool:
        assert self.instance is not None
        found = self.instance.positions()
        return all(
            not records or ((NAME, number) in found and found[NAME, number].next_offset == len(records))
            for number, records in enumerate(self.plan.partitions)
        )

    def position_after(self, one: Record) -> Position:
        return Position(LOG_ID, 1, one.offset + 1)

    def acknowledge(self, key: TopicPartition, next_offset: int) -> None:
        if not self.dead:
            assert next_offset >= self.acked.get(key.partition, 0)
            self.acked[key.partition] = next_offset

    def in_progress(self) -> None: ...
    def close(self) -> None: ...
    def note_current(self, behind: object) -> None: ...
    def switch(self, topics: object) -> None: ...

    def held(self, topic: str) -> set[int]:
        return set(self.given)

    def age(self, topic: str) -> None: ...

    def ends(self) -> dict[TopicPartition, int]:
        return {}

    def are_complete(self) -> bool:
        return False


def record(partition: int, offset: int) -> Record:
    made = SimpleNamespace(
        topic=NAME, partition=partition, offset=offset, key=b"k", value=b"%d" % offset, timestamp=1000, headers=()
    )
    return cast("Record", made)


class Attempt(NamedTuple):
    partition: int
    offset: int
    attempt: int
    at: float
    life: int


class World:
    """An application at a fake broker, and what its handler saw."""

    def __init__(self, plan: Plan, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.plan, self.clock, self.directory = plan, ManualClock(), directory
        self.broker = FakeBroker(plan, self.clock)
        self.attempts: list[Attempt] = []
        self.life = 0
        patch.setattr(instance_module, "SystemClock", lambda: self.clock)
        patch.setattr(instance_module, "Subscriptions", lambda *arguments: self.broker)
        for module in (instance_module, loaded_module, subscriptions_module):
            patch.setattr(module, "sleep", self.clock.advance)

    def handle(self, value: bytes, context: Context, database: Database) -> None:
        partition, offset, attempt = context.record.partition, context.record.offset, context.attempt
        assert int(value) == offset
        database.execute("INSERT INTO effects (partition, place) VALUES (?,?)", (partition, offset))
        self.attempts.append(Attempt(partition, offset, attempt, self.clock.monotonic(), self.life))
        planned = self.plan.partitions[partition][offset]
        if attempt < planned.succeeds_at:
            raise LookupError("hopeless") if planned.hopeless else ValueError("not yet")

    def run(self) -> None:
        def handle(value: bytes, context: Context, database: Database) -> None:
            self.handle(value, context, database)

        signature = read_signature(handle, FOR_HANDLERS)
        handler = Handler("*", (), 1, 30.0, signature, self.plan.policy, handle, "here")
        topic = Topic(NAME, "each", "earliest", None, [handler])
        while True:
            database = AppDatabase(self.directory, 1)
            with database.transaction():
                database.connection.execute(
                    "CREATE TABLE IF NOT EXISTS effects (number INTEGER PRIMARY KEY, partition INTEGER, place INTEGER)"
                )
            config = AppConfig(name="a", node="n", server="127.0.0.1:9", http="none")
            self.broker.instance = Instance(Application({NAME: topic}, [], []), database, config, Nothing(), None)
            self.broker.dead = False
            try:
                self.broker.instance.run()
                return
            except KilledError:
                self.life += 1
            finally:
                database.close()

    def read(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.directory / "app.db")) as connection:
            return connection.execute(sql).fetchall()


class Nothing:
    def published(self, *arguments: object) -> None: ...
    def reset(self, topic: str) -> None: ...


def given_up(plan: Plan) -> dict[int, list[tuple[int, int]]]:
    """The slow, obvious way: (offset, attempts) of the records that no attempt helps, one partition after the other."""
    found = {}
    for number, records in enumerate(plan.partitions):
        found[number] = [
            (offset, 1 if one.hopeless else plan.policy.max_attempts)
            for offset, one in enumerate(records)
            if one.succeeds_at > (1 if one.hopeless else plan.policy.max_attempts)
        ]
    return found


planned = st.one_of(
    st.just(Planned(1, False)),
    st.just(Planned(1, False)),
    st.builds(Planned, st.integers(1, 5), st.booleans()),
    st.builds(Planned, st.just(NEVER), st.booleans()),
)
policies = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 4),
    backoff=st.sampled_from([0.0, 0.5, 3.0]),
    factor=st.sampled_from([1.0, 2.0]),
    max_backoff=st.just(10.0),
    jitter=st.just(0.0),
    retry_on=st.just((ValueError,)),
    then=st.sampled_from(["dead_letter", "skip"]),
)
plans = st.builds(
    Plan,
    st.lists(st.lists(planned, max_size=12), min_size=1, max_size=3),
    policies,
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.sampled_from([0.0, 0.01, 1.0])), max_size=12),
    st.lists(st.integers(1, 10), max_size=2).map(sorted),
).map(lambda plan: plan._replace(pieces=[one for one in plan.pieces if one[0] < len(plan.partitions)]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans)
def test_order_and_retries(plan: Plan) -> None:
    directory = Path(tempfile.mkdtemp(prefix="edgebroker-model-"))
    logging.disable(logging.CRITICAL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            world = World(plan, directory, patch)
            world.run()
            check(world)
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(directory)


def check(world: World) -> None:
    plan, policy = world.plan, world.plan.policy
    expected = given_up(plan)
    dead = world.read('SELECT partition, "offset", attempts FROM _dead ORDER BY partition, "offset"')
    kept = policy.then == "dead_letter"
    assert dead == [(number, *one) for number, found in expected.items() for one in found] * kept
    for number, records in enumerate(plan.partitions):
        places = [
            place for (place,) in world.read(f"SELECT place FROM effects WHERE partition={number} ORDER BY number")
        ]
        gone = {offset for offset, _ in expected[number]}
        assert places == [offset for offset in range(len(records)) if offset not in gone], "each once, in order"
        if records:
            assert world.broker.acked[number] == len(records)
    by_record: dict[tuple[int, int, int], list[Attempt]] = {}
    for one in world.attempts:
        by_record.setdefault((one.life, one.partition, one.offset), []).append(one)
    for (_, number, offset), attempts in by_record.items():
        numbers = [one.attempt for one in attempts]
        assert numbers == sorted(numbers) and set(numbers) == set(range(1, max(numbers) + 1))
        firsts = {one.attempt: one.at for one in reversed(attempts)}
        for attempt in range(1, max(numbers)):
            pause = min(policy.max_backoff, policy.backoff * policy.factor ** (attempt - 1))
            assert pause <= firsts[attempt + 1] - firsts[attempt] + 1e-6 <= pause + SLACK, "it pauses as it says"
        assert plan.partitions[number][offset].succeeds_at > 1 or numbers[-1] == 1
    # A partition in which nothing fails waits for no other.
    for number, records in enumerate(plan.partitions):
        if all(one.succeeds_at == 1 for one in records) and not world.life:
            for offset in range(len(records)):
                late = by_record[0, number, offset][0].at - world.broker.came[number, offset]
                assert late <= SLACK, "others do not hold it up"
